//! How the visitors and mappers of this crate find a layer. Burn gives them tensors and the names
//! of modules, but not modules. So a layer leaves itself in a thread-local while its state is
//! visited or mapped. Visitors and mappers of other crates see no difference.

use std::{any::type_name, cell::RefCell};

use super::LayerState;
use crate::config::{AopConfig, AopConfigError};

/// What a layer shows of itself to a visitor.
#[derive(Clone)]
pub(crate) struct Shown {
    /// The numbers of inputs and outputs.
    pub(crate) widths: [usize; 2],
    pub(crate) aop: AopConfig,
    pub(crate) state: LayerState,
}

thread_local! {
    static SHOWN: RefCell<Option<Shown>> = const { RefCell::new(None) };
    static OFFER: RefCell<Option<Offer>> = const { RefCell::new(None) };
}

/// Runs the visit of a layer's state. During the visit [`shown`] finds the layer.
pub(crate) fn show(shown: Shown, visit: impl FnOnce()) {
    SHOWN.set(Some(shown));
    visit();
    SHOWN.take();
}

/// The layer whose state is being visited. It is returned once.
pub(crate) fn shown() -> Option<Shown> {
    SHOWN.take()
}

/// The check that the configuration of a layer must pass.
pub(crate) type Rule = fn(&AopConfig) -> Result<(), AopConfigError>;

/// What a mapper of this crate asks of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wish {
    /// A state that no other layer shares, and another configuration. `place` is a number that
    /// belongs to the layer's place in the model.
    Own { aop: AopConfig, place: u64 },
    /// A new state.
    Reset,
}

#[derive(Clone, Copy)]
struct Offer {
    config: (AopConfig, Rule),
    wish: Option<Wish>,
}

/// Runs the mapping of a layer's state, and offers the mapper the configuration of the layer.
/// Returns what the mapper asks of the layer, and the result of the mapping.
pub(crate) fn offer<T>(config: (AopConfig, Rule), map: impl FnOnce() -> T) -> (Option<Wish>, T) {
    OFFER.set(Some(Offer { config, wish: None }));
    let mapped = map();
    (OFFER.take().and_then(|offer| offer.wish), mapped)
}

/// Exchanges the configuration of the layer that is being mapped, and gives it a state of its own.
///
/// # Errors
///
/// Returns an error if the layer does not take the configuration.
pub(crate) fn exchange(
    place: u64,
    config: impl FnOnce(AopConfig) -> AopConfig,
) -> Result<(), AopConfigError> {
    let Some(offer) = OFFER.take() else {
        return Ok(());
    };
    let (before, rule) = offer.config;
    let aop = config(before);
    rule(&aop)?;
    OFFER.set(Some(Offer {
        wish: Some(Wish::Own { aop, place }),
        ..offer
    }));
    Ok(())
}

/// Asks the layer that is being mapped for a new state.
pub(crate) fn reset() {
    let wish = Some(Wish::Reset);
    OFFER.set(OFFER.take().map(|offer| Offer { wish, ..offer }));
}

/// What a visitor or mapper is for, where a layer must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Burn's own records, which hold all of a training.
    Record,
    /// burn-store, which exchanges weights with other frameworks. A layer must look like Burn's
    /// layer there, with no tensor that other frameworks do not know.
    Exchange,
    Other,
}

impl Purpose {
    /// The purpose of a visitor or mapper. Only the path of its type tells it. If burn-store had
    /// another path, loading would report that the tensors of the state are missing.
    pub(crate) fn of<V>() -> Self {
        let name = type_name::<V>();
        match () {
            () if name.starts_with("burn_core::store::") => Self::Record,
            () if name.starts_with("burn_store::") => Self::Exchange,
            () => Self::Other,
        }
    }

    /// Whether a layer hides its state, so that what is visited are the tensors of Burn's layer.
    pub(crate) fn hides_state(self, aop: &AopConfig) -> bool {
        match self {
            Self::Record => !aop.is_state_saved(),
            Self::Exchange => true,
            Self::Other => false,
        }
    }
}
