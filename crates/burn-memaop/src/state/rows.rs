use burn::tensor::{DType, Device, Tensor};

/// The rows left out so far, in gradient units: `m^X`, shape `[rows, d_input]`, and `m^G`, shape
/// `[rows, d_output]`, and the number of steps that each holds something of, shape `[rows, 1]`; all
/// without autodiff.
#[derive(Debug, Clone)]
pub(crate) struct RowTensors {
    pub(crate) input: Tensor<2>,
    pub(crate) grad: Tensor<2>,
    pub(crate) age: Tensor<2>,
}

impl RowTensors {
    pub(crate) fn to_device(&self, device: &Device) -> Self {
        // In a type that the device has.
        let moved = |tensor: &Tensor<2>| match device.supports_dtype(tensor.dtype()) {
            true => tensor.clone().to_device(device),
            false => tensor.clone().cast(DType::F32).to_device(device),
        };
        Self {
            input: moved(&self.input),
            grad: moved(&self.grad),
            age: moved(&self.age),
        }
    }
}
