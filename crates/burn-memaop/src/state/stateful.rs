//! The state of a module without weights, which is a module itself.

use burn::{
    module::{
        Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    },
    tensor::Device,
};

use super::{
    LayerState,
    offer::{self, Wish},
    record,
};
use crate::config::AopConfig;

/// The configuration and the state of a module without weights.
#[derive(Debug, Clone)]
pub(crate) struct Stateful {
    pub(crate) aop: AopConfig,
    pub(crate) state: LayerState,
}

impl Stateful {
    pub(crate) fn new() -> Self {
        Self {
            aop: AopConfig::new(),
            state: LayerState::without_device(),
        }
    }

    /// The same with another configuration, and with a state that no other module shares.
    pub(crate) fn with_aop(self, aop: AopConfig) -> Self {
        Self {
            state: self.state.reconfigured(&self.aop, &aop),
            aop,
        }
    }
}

impl Module for Stateful {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.state.show(self.aop, [0, 0], visitor);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let aop = self.aop;
        let (wish, state) = offer::offer((aop, AopConfig::validate), || {
            self.state.map_by(&aop, [0, 0], false, mapper)
        });
        let module = Self { state, aop };
        match wish {
            None => module,
            Some(Wish::Own { aop, place }) => {
                let state = module.state.at_place(place);
                Self { state, ..module }.with_aop(aop)
            }
            Some(Wish::Reset) => Self {
                state: module.state.renewed(),
                ..module
            },
        }
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn to_device(self, device: &Device) -> Self {
        Self {
            state: self.state.moved_to(device),
            ..self
        }
    }

    fn fork(self, device: &Device) -> Self {
        Self {
            state: self.state.forked_to(device),
            ..self
        }
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn train(self) -> Self {
        self
    }

    fn materialize(self) -> Self {
        self
    }
}

impl ModuleDisplayDefault for Stateful {
    fn content(&self, content: Content) -> Option<Content> {
        Some(content)
    }

    fn num_params(&self) -> usize {
        0
    }
}

impl ModuleDisplay for Stateful {}

impl std::fmt::Display for Stateful {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(record::CONTAINER)
    }
}
