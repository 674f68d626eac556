use burn::tensor::{DType, Device, Tensor};

/// The rows that earlier steps left out, in units of the gradient (there is no learning rate in them). There is one pair
/// of rows for each position of the batch. A pair of zeros is a position where nothing is pending.
#[derive(Debug, Clone)]
pub struct Rows {
    /// `m^X`, shape `[rows, d_input]`.
    pub input: Tensor<2>,
    /// `m^G`, shape `[rows, d_output]`.
    pub grad: Tensor<2>,
    /// The number of steps that each pair holds something of, shape `[rows, 1]`, in single precision at least.
    pub age: Tensor<2>,
}

impl Rows {
    pub(crate) fn moved_to(self, device: &Device) -> Self {
        // In a type that the device has.
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
