use burn::module::Module;

use super::tree;
use crate::state::learning_rate::SharedLearningRate;

impl SharedLearningRate {
    /// Makes the memories of all layers in the module tree follow this rate, and those of their
    /// clones and forks from now on. A record holds the rate that a memory is in, but not whom it
    /// follows: attach again after building a model.
    pub fn attach<M: Module>(&self, module: &M) {
        for (_, layer) in tree::layers(module) {
            layer.memory.lock().watch.rate = Some(self.clone());
        }
    }
}
