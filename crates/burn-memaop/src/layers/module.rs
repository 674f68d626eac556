//! The [`Module`](burn::module::Module) of a layer with a state.

use std::ptr;

use burn::{module::Param, tensor::Tensor};

/// Implements `Module` as Burn derives it, for a layer with `weight`, `bias`, `aop` and `state`.
/// But weight and bias are shown as those of Burn's layer: the adapters of burn-store, for
/// PyTorch's layout and half precision, go by the name of the module that a tensor is in.
macro_rules! layer_module {
    ($layer:ident, as $shown:literal, with $rule:path) => {
        impl Module for $layer {
            fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
                visitor.enter_module("weight", $shown);
                self.weight.visit(visitor);
                visitor.exit_module("weight", $shown);
                visitor.enter_module("bias", $shown);
                self.bias.visit(visitor);
                visitor.exit_module("bias", $shown);
                visitor.enter_module("memory", LAYER);
                self.state.show(self.aop, self.widths(), visitor);
                visitor.exit_module("memory", LAYER);
            }

            fn map<M: ModuleMapper>(mut self, mapper: &mut M) -> Self {
                // Another reference to the weight keeps an optimizer from changing it in place.
                let loading = Purpose::of::<M>() != Purpose::Other;
                let before = loading.then(|| self.weight.clone());
                mapper.enter_module("weight", $shown);
                self.weight = Module::map(self.weight, mapper);
                mapper.exit_module("weight", $shown);
                mapper.enter_module("bias", $shown);
                self.bias = Module::map(self.bias, mapper);
                mapper.exit_module("bias", $shown);

                let replaced = before.is_some_and(|before| is_replaced(&before, &self.weight));
                let widths = self.widths();
                mapper.enter_module("memory", LAYER);
                let aop = self.aop;
                let (wish, state) = offer::offer((aop, $rule as offer::Rule), || {
                    self.state.map_by(&aop, widths, replaced, mapper)
                });
                mapper.exit_module("memory", LAYER);
                let layer = Self { state, ..self };
                match wish {
                    None => layer,
                    Some(Wish::Own { aop, place }) => {
                        let state = layer.state.at_place(place);
                        Self { state, ..layer }.with_aop(aop)
                    }
                    Some(Wish::Reset) => Self {
                        state: layer.state.renewed(),
                        ..layer
                    },
                }
            }

            fn collect_devices(&self, devices: Devices) -> Devices {
                let devices = self.weight.collect_devices(devices);
                self.bias.collect_devices(devices)
            }

            fn to_device(self, device: &Device) -> Self {
                Self {
                    weight: self.weight.to_device(device),
                    bias: self.bias.to_device(device),
                    state: self.state.moved_to(device),
                    ..self
                }
            }

            fn fork(self, device: &Device) -> Self {
                Self {
                    weight: self.weight.fork(device),
                    bias: self.bias.fork(device),
                    state: self.state.forked_to(device),
                    ..self
                }
            }

            fn valid(&self) -> Self {
                Self {
                    weight: self.weight.valid(),
                    bias: self.bias.valid(),
                    ..self.clone()
                }
            }

            fn train(self) -> Self {
                Self {
                    weight: self.weight.train(),
                    bias: self.bias.train(),
                    ..self
                }
            }

            fn materialize(self) -> Self {
                Self {
                    weight: self.weight.materialize(),
                    bias: self.bias.materialize(),
                    ..self
                }
            }

            fn num_params(&self) -> usize {
                Module::num_params(&self.weight) + Module::num_params(&self.bias)
            }
        }

        const LAYER: &str = concat!("Struct:", stringify!($layer));

        impl core::fmt::Display for $layer {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{}", ModuleDisplay::format(self, Default::default()))
            }
        }

        impl ModuleDisplayDefault for $layer {
            fn content(&self, content: Content) -> Option<Content> {
                content
                    .set_top_level_type(stringify!($layer))
                    .add("weight", &self.weight)
                    .add("bias", &self.bias)
                    .add_debug_attribute("aop", &self.aop)
                    .optional()
            }

            fn num_params(&self) -> usize {
                Module::num_params(self)
            }
        }
    };
}

pub(super) use layer_module;

/// Whether a mapper has replaced a weight by another.
pub(super) fn is_replaced<const D: usize>(
    before: &Param<Tensor<D>>,
    after: &Param<Tensor<D>>,
) -> bool {
    match (before.is_initialized(), after.is_initialized()) {
        (false, false) => false,
        // The value of a parameter stays where it is while it is cloned and moved.
        (true, true) => !ptr::eq::<Tensor<D>>(&**before, &**after),
        _ => true,
    }
}
