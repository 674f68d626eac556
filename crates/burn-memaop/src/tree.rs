//! Finds the layers of a model, whatever its fields are called.

use std::cell::RefCell;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Int, Tensor},
};

use crate::memory::MemoryHandle;

/// A layer as found in a module tree.
#[derive(Debug, Clone)]
pub(crate) struct FoundLayer {
    /// The fields that lead to it, separated by dots.
    pub(crate) path: String,
    pub(crate) d_input: usize,
    pub(crate) d_output: usize,
    pub(crate) memory: MemoryHandle,
}

/// What a layer shows of itself to a visitor, which otherwise only sees tensors.
#[derive(Clone)]
pub(crate) struct Offer {
    pub(crate) d_input: usize,
    pub(crate) d_output: usize,
    pub(crate) memory: MemoryHandle,
}

thread_local! {
    static OFFER: RefCell<Option<Offer>> = const { RefCell::new(None) };
}

/// Runs the visit of a layer's first tensor with the layer on offer.
pub(crate) fn with_offer(offer: Offer, visit: impl FnOnce()) {
    OFFER.set(Some(offer));
    visit();
    OFFER.take();
}

/// All layers of the tree, in the order of the fields.
pub(crate) fn layers<M: Module>(module: &M) -> Vec<FoundLayer> {
    let mut finder = Finder::default();
    module.visit(&mut finder);
    finder.found
}

#[derive(Default)]
struct Finder {
    path: Vec<String>,
    found: Vec<FoundLayer>,
}

impl ModuleVisitor for Finder {
    fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {
        let Some(offer) = OFFER.take() else { return };
        // Below the layer come its memory and the tensor that is being visited.
        let depth = self.path.len().saturating_sub(2);
        self.found.push(FoundLayer {
            path: self.path[..depth].join("."),
            d_input: offer.d_input,
            d_output: offer.d_output,
            memory: offer.memory,
        });
    }

    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }
}
