//! How a layer meets what passes over a model. Visitors and mappers see tensors and the names of modules,
//! not modules; so a layer leaves itself in a thread-local while its first tensor is visited or mapped,
//! where those of this crate find it. Others do not notice.

use std::{any::type_name, cell::RefCell};

use super::memory::MemoryHandle;
use crate::config::{AopConfig, AopConfigError};

/// What a layer shows of itself to a visitor.
#[derive(Clone)]
pub(crate) struct Shown {
    /// Inputs and outputs.
    pub(crate) widths: [usize; 2],
    pub(crate) memory: MemoryHandle,
}

thread_local! {
    static SHOWN: RefCell<Option<Shown>> = const { RefCell::new(None) };
    static CONFIG: RefCell<Option<(AopConfig, Rule)>> = const { RefCell::new(None) };
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

/// What the configuration of a layer must keep to.
pub(crate) type Rule = fn(&AopConfig) -> Result<(), AopConfigError>;

/// Runs the mapping of a layer's first tensor with its configuration on offer; returns what became of
/// both.
pub(crate) fn offer<T>(config: AopConfig, rule: Rule, map: impl FnOnce() -> T) -> (AopConfig, T) {
    CONFIG.set(Some((config, rule)));
    let mapped = map();
    let (config, _) = CONFIG.take().unwrap_or((config, rule));
    (config, mapped)
}

/// Exchanges the configuration of the layer whose first tensor is being mapped.
///
/// # Errors
///
/// A configuration that the layer does not take.
pub(crate) fn exchange(config: impl FnOnce(AopConfig) -> AopConfig) -> Result<(), AopConfigError> {
    let Some((before, rule)) = CONFIG.take() else {
        return Ok(());
    };
    let after = config(before);
    rule(&after)?;
    CONFIG.set(Some((after, rule)));
    Ok(())
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
