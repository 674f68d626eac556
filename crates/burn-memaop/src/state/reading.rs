//! Figures on their way from the device to the host.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker},
};

use burn::tensor::{ExecutionError, TensorData};

use crate::rows::transfer::Transfer;

/// `N` figures on their way to the host. Clones share them.
#[derive(Clone)]
pub(crate) struct Reading<const N: usize>(Arc<Mutex<Figures<N>>>);

enum Figures<const N: usize> {
    Coming(Pending),
    There([f64; N]),
}

impl<const N: usize> Reading<N> {
    /// Polls a copy for the first time, which begins it.
    pub(crate) fn start(mut copy: Transfer) -> Self {
        let figures = match copy.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(data) => Figures::There(figures_of(data)),
            Poll::Pending => return Self::coming(copy),
        };
        Self(Arc::new(Mutex::new(figures)))
    }

    pub(crate) fn there(figures: [f64; N]) -> Self {
        Self(Arc::new(Mutex::new(Figures::There(figures))))
    }

    /// Waits for the figures and returns them. They are NaN if they are late or cannot be read.
    pub(crate) fn read(&self) -> [f64; N] {
        let mut figures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match &mut *figures {
            Figures::There(figures) => return *figures,
            Figures::Coming(copy) => copy.wait(),
        };
        let Some(found) = found else {
            return [f64::NAN; N];
        };
        let found = figures_of(found);
        *figures = Figures::There(found);
        found
    }
}

#[cfg(not(target_family = "wasm"))]
impl<const N: usize> Reading<N> {
    fn coming(copy: Transfer) -> Self {
        Self(Arc::new(Mutex::new(Figures::Coming(Pending(Some(copy))))))
    }

    /// Whether the figures have not come yet and cannot be waited for.
    pub(crate) fn is_late(&self) -> bool {
        false
    }
}

/// A copy that waits when it is dropped, because CubeCL would reuse the buffer that it copies to.
#[cfg(not(target_family = "wasm"))]
struct Pending(Option<Transfer>);

#[cfg(not(target_family = "wasm"))]
impl Pending {
    fn wait(&mut self) -> Option<Result<TensorData, ExecutionError>> {
        self.0.take().and_then(burn::tensor::try_read_sync)
    }
}

#[cfg(not(target_family = "wasm"))]
impl Drop for Pending {
    fn drop(&mut self) {
        self.wait();
    }
}

/// A browser cannot wait. The copy is a task there, which ends while the program yields.
#[cfg(target_family = "wasm")]
impl<const N: usize> Reading<N> {
    fn coming(copy: Transfer) -> Self {
        let reading = Self(Arc::new(Mutex::new(Figures::Coming(Pending))));
        let figures = reading.0.clone();
        wasm_bindgen_futures::spawn_local(async move {
            let data = copy.await;
            *figures.lock().unwrap_or_else(PoisonError::into_inner) =
                Figures::There(figures_of(data));
        });
        reading
    }

    pub(crate) fn is_late(&self) -> bool {
        let figures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(*figures, Figures::Coming(_))
    }
}

#[cfg(target_family = "wasm")]
struct Pending;

#[cfg(target_family = "wasm")]
impl Pending {
    fn wait(&mut self) -> Option<Result<TensorData, ExecutionError>> {
        None
    }
}

impl<const N: usize> fmt::Debug for Reading<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reading")
    }
}

fn figures_of<const N: usize>(data: Result<TensorData, ExecutionError>) -> [f64; N] {
    let data = match data {
        Ok(data) => data,
        Err(error) => {
            report(&error);
            return [f64::NAN; N];
        }
    };
    let mut values = data.iter::<f64>();
    std::array::from_fn(|_| values.next().unwrap_or(f64::NAN))
}

#[cfg(feature = "cubecl-backend")]
fn report(error: &ExecutionError) {
    log::warn!(target: "burn_memaop::read", "figures that K is chosen by cannot be read, and it stays as it is: {error}");
}

#[cfg(not(feature = "cubecl-backend"))]
fn report(_: &ExecutionError) {}
