//! How a layer meets what passes over a model. Visitors and mappers see tensors and the names of modules,
//! not modules; so a layer leaves itself in a thread-local while its first tensor is visited or mapped,
//! where those of this crate find it. Others do not notice.

use std::{any::type_name, cell::RefCell};

use super::memory::MemoryHandle;
use crate::config::AopConfig;

/// What a layer shows of itself to a visitor.
#[derive(Clone)]
pub(crate) struct Shown {
    /// Inputs and outputs.
    pub(crate) widths: [usize; 2],
    pub(crate) memory: MemoryHandle,
}

thread_local! {
    static SHOWN: RefCell<Option<Shown>> = const { RefCell::new(None) };
    static CONFIG: RefCell<Option<AopConfig>> = const { RefCell::new(None) };
}

/// Runs the visit of a layer's first tensor with the layer on show.
pub(crate) fn show(shown: Shown, visit: impl FnOnce()) {
    SHOWN.set(Some(shown));
    visit();
    SHOWN.take();
}

/// The layer whose first tensor is being visited, once.
pub(crate) fn shown() -> Option<Shown> {
    SHOWN.take()
}

/// Runs the mapping of a layer's first tensor with its configuration on offer; returns what became of
/// both.
pub(crate) fn offer<T>(config: AopConfig, map: impl FnOnce() -> T) -> (AopConfig, T) {
    CONFIG.set(Some(config));
    let mapped = map();
    (CONFIG.take().unwrap_or(config), mapped)
}

/// Exchanges the configuration of the layer whose first tensor is being mapped.
pub(crate) fn exchange(config: impl FnOnce(AopConfig) -> AopConfig) {
    CONFIG.with_borrow_mut(|offered| *offered = offered.take().map(config));
}

/// What a visitor or mapper is for, where a layer must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Burn's own records, which hold all of a training.
    Record,
    /// burn-store, which exchanges weights with other frameworks: a layer has to look as Burn's `Linear`
    /// there, with no tensor that those would not know.
    Exchange,
    Other,
}

impl Purpose {
    /// The purpose of a type, by the crate that it is of: there is no other way to tell. Were the crate
    /// to change its name, loading would say that the tensors of the memory are missing.
    pub(crate) fn of<V>() -> Self {
        let name = type_name::<V>();
        match () {
            () if name.starts_with("burn_core::store::") => Self::Record,
            () if name.starts_with("burn_store::") => Self::Exchange,
            () => Self::Other,
        }
    }
}
