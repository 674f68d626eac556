//! Finds the layers of a model, whatever its fields are called.

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{Int, Tensor},
};

use crate::{
    config::AopConfig,
    state::offer::{self, Shown},
};

/// All layers of a model in the order of its fields, each with the fields that lead to it,
/// separated by dots.
pub(crate) fn layers<M: Module>(module: &M) -> Vec<(String, Shown)> {
    let mut finder = Finder::default();
    module.visit(&mut finder);
    finder.found
}

#[derive(Default)]
struct Finder {
    path: Vec<String>,
    found: Vec<(String, Shown)>,
}

impl ModuleVisitor for Finder {
    fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {
        if let Some(shown) = offer::shown() {
            self.found.push((layer(&self.path), shown));
        }
    }

    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }
}

/// The fields that lead to a layer, from the path to the first tensor of the layer's state.
fn layer(path: &[String]) -> String {
    path[..path.len().saturating_sub(2)].join(".")
}

/// Gives the layers of a model other configurations: [`MemAopLinear`](crate::MemAopLinear),
/// [`MemAopConv2d`](crate::MemAopConv2d), [`Gelu`](crate::activation::Gelu) and
/// [`Dropout`](crate::nn::Dropout). `config` gets the fields that lead to a layer, separated by
/// dots, and its configuration. Layers go on with their
/// state, as [`MemAopLinear::with_aop`](crate::MemAopLinear::with_aop) says, and clones of the given
/// model do not share it.
///
/// Call it with the whole model. Activations in few bits then round by different random bits, which
/// depend on the names of these fields.
///
/// ```
/// # use burn::{prelude::*, tensor::Device};
/// # use burn_memaop::{AopConfig, MemAopLinear, MemAopLinearConfig, OuterProducts};
/// # #[derive(Module, Debug)]
/// # struct Model { hidden: MemAopLinear, output: MemAopLinear }
/// # let device = Device::flex();
/// # let layer = || MemAopLinearConfig::new(3, 3).init(&device);
/// # let model = Model { hidden: layer(), output: layer() };
/// // Half of the outer products from here on, but for the last layer.
/// let model = burn_memaop::with_aop(model, |layer, aop| match layer {
///     "output" => aop,
///     _ => aop.with_outer_products(OuterProducts::Ratio(0.5)),
/// });
/// assert_ne!(model.hidden.aop(), model.output.aop());
/// ```
///
/// # Panics
///
/// Panics if [`AopConfig::validate`] (of a convolution [`AopConfig::validate_convolution`]) rejects
/// a configuration; the message names the layer.
pub fn with_aop<M: Module>(model: M, config: impl FnMut(&str, AopConfig) -> AopConfig) -> M {
    let mut exchange = Exchange {
        path: Vec::new(),
        config,
    };
    model.map(&mut exchange)
}

struct Exchange<F> {
    path: Vec<String>,
    config: F,
}

impl<F: FnMut(&str, AopConfig) -> AopConfig> ModuleMapper for Exchange<F> {
    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let layer = layer(&self.path);
        if let Err(error) = offer::exchange(place(&layer), |aop| (self.config)(&layer, aop)) {
            panic!("with_aop: the layer {layer:?}: {error}");
        }
        param
    }

    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }
}

/// A number for the fields that lead to a layer, by the hash function FNV-1a.
fn place(layer: &str) -> u64 {
    layer.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Gives each layer of a model a new [state](crate::MemAopLinear#state): steps are counted from 0,
/// the memory is empty, and K is yet to be chosen. Clones and forks of the given model keep theirs.
///
/// Use it to begin a new task with the weights of a record that also holds the state of the old
/// task. Use it for two trainings from one model too, because plain clones share the state of
/// layers.
///
/// ```
/// # use burn::tensor::{Device, Tensor};
/// # use burn_memaop::{AopConfig, MemAopLinearConfig};
/// # let device = Device::flex().autodiff();
/// # let aop = AopConfig::new().with_cost_rule(false);
/// # let trained = MemAopLinearConfig::new(3, 2).init(&device).with_aop(aop);
/// # trained.forward(Tensor::<2>::ones([8, 3], &device)).sum().backward();
/// let model = burn_memaop::reset(trained.clone());
/// assert_eq!((trained.memory_stats().step, model.memory_stats().step), (1, 0));
/// ```
pub fn reset<M: Module>(model: M) -> M {
    model.map(&mut Reset)
}

struct Reset;

impl ModuleMapper for Reset {
    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        offer::reset();
        param
    }
}
