use burn::tensor::{DType, Device, Tensor};

/// The rows that earlier steps left out, one pair for each position of the batch. A pair is zero
/// where nothing is pending. Rows are in units of the gradient, so they hold no learning rate.
#[derive(Debug, Clone)]
pub struct Rows {
    /// `m^X`, shape `[rows, d_input]`.
    pub input: Tensor<2>,
    /// `m^G`, shape `[rows, d_output]`.
    pub grad: Tensor<2>,
    /// The number of steps whose rows a pair holds, shape `[rows, 1]`, in `f32` at least.
    pub age: Tensor<2>,
}

impl Rows {
    pub(crate) fn moved_to(self, device: &Device) -> Self {
        // Not every device has the type of the tensor.
        let moved = |tensor: Tensor<2>| match device.supports_dtype(tensor.dtype()) {
            true => tensor.to_device(device),
            false => tensor.cast(DType::F32).to_device(device),
        };
        Self {
            input: moved(self.input),
            grad: moved(self.grad),
            age: moved(self.age),
        }
    }
}
