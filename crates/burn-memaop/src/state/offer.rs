//! How a layer meets what passes over a model. Visitors and mappers see tensors and the names of modules,
//! not modules; so a layer leaves itself in a thread-local while its first tensor is visited or mapped,
//! where the visitors and mappers of this crate find it. Those of other crates see no difference.

use std::{any::type_name, cell::RefCell};

use super::LayerState;
use crate::config::{AopConfig, AopConfigError};

/// What a layer shows of itself to a visitor.
#[derive(Clone)]
pub(crate) struct Shown {
    /// Inputs and outputs.
    pub(crate) widths: [usize; 2],
    pub(crate) state: LayerState,
}

thread_local! {
    static SHOWN: RefCell<Option<Shown>> = const { RefCell::new(None) };
    static OFFER: RefCell<Option<Offer>> = const { RefCell::new(None) };
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

/// What a mapper of this crate asks of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wish {
    /// A state of its own, and another configuration, if the layer has one.
    Own(Option<AopConfig>),
    /// A new state.
    Reset,
}

#[derive(Clone, Copy)]
struct Offer {
    config: Option<(AopConfig, Rule)>,
    wish: Option<Wish>,
}

/// Runs the mapping of a layer's first tensor with its configuration on offer, if it has one; returns what was asked of
/// the layer, if something was, and what became of the tensor.
pub(crate) fn offer<T>(
    config: Option<(AopConfig, Rule)>,
    map: impl FnOnce() -> T,
) -> (Option<Wish>, T) {
    OFFER.set(Some(Offer { config, wish: None }));
    let mapped = map();
    (OFFER.take().and_then(|offer| offer.wish), mapped)
}

/// Exchanges the configuration of the layer whose first tensor is being mapped, and gives it a state of its own.
///
/// # Errors
///
/// A configuration that the layer does not take.
pub(crate) fn exchange(config: impl FnOnce(AopConfig) -> AopConfig) -> Result<(), AopConfigError> {
    let Some(offer) = OFFER.take() else {
        return Ok(());
    };
    let after = match offer.config {
        None => None,
        Some((before, rule)) => {
            let after = config(before);
            rule(&after)?;
            Some(after)
        }
    };
    OFFER.set(Some(Offer {
        wish: Some(Wish::Own(after)),
        ..offer
    }));
    Ok(())
}

/// Asks the layer whose first tensor is being mapped to begin anew.
pub(crate) fn reset() {
    let wish = Some(Wish::Reset);
    OFFER.set(OFFER.take().map(|offer| Offer { wish, ..offer }));
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
