use burn::tensor::{DType, Device, Tensor};

/// A set of rows of a memory between steps: [`Memory`](crate::rows::Memory) as tensors without autodiff.
#[derive(Debug, Clone)]
pub(crate) struct RowTensors {
    pub(crate) input: Tensor<2>,
    pub(crate) grad: Tensor<2>,
    pub(crate) age: Tensor<2>,
}

impl RowTensors {
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
