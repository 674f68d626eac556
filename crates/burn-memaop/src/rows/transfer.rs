//! Values on their way from the device to the host.

use std::{future::Future, pin::Pin};

use burn::{
    backend::{Backend, Dispatch, tensor::FloatTensor},
    tensor::{ExecutionError, TensorData},
};

/// A copy that is waited for later.
pub(crate) type Transfer = Pin<Box<dyn Future<Output = Result<TensorData, ExecutionError>> + Send>>;

pub(crate) trait CopyOut: Backend {
    /// Begins to copy values when it is first polled, behind the work that the device has by then.
    fn copy_out(values: FloatTensor<Self>) -> Transfer {
        Box::pin(Self::float_into_data(values))
    }
}

impl CopyOut for Dispatch {}
