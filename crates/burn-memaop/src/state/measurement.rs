//! What is measured of one gradient, on the device.

use std::sync::OnceLock;

use burn::tensor::{DType, Tensor, TensorReadError};

use crate::state::rows::RowTensors;

/// The figures of a gradient; none where there is nothing to measure: no memory, no comparison
/// with the exact gradient at this step, only zeros.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// The share of the sum of all `|x^| |g^|` that the chosen rows carry.
    pub share: Option<f64>,
    /// What is left in the memory against what is applied: the root of the sum over all positions
    /// of `(|m^X| |m^G|)^2`, divided by the Frobenius norm of the gradient.
    pub memory: Option<f64>,
    /// The most steps that a position of the memory holds something of.
    pub oldest: Option<f64>,
    /// `|approximate - exact| / |exact|`, in Frobenius norms, of the gradient of this batch alone.
    /// With a memory the approximate gradient also holds rows of earlier batches.
    pub error: Option<f64>,
    /// The cosine between the two.
    pub cosine: Option<f64>,
}

/// The figures of [`Measured`] on the device: one tensor, so that they are read at once.
#[derive(Debug)]
pub(crate) struct Measurement {
    values: Tensor<1>,
    read: OnceLock<Measured>,
}

/// In place of a figure that there is not; none of them can be it.
const MISSING: f64 = -2.0;

impl Measurement {
    pub(crate) fn new(
        share: Option<Tensor<1>>,
        memory: Option<&RowTensors>,
        gradient: &Tensor<2>,
        exact: Option<Tensor<2>>,
    ) -> Self {
        let device = gradient.device();
        let gradient = gradient.clone().cast(DType::F32);
        let missing = || Tensor::full([1], MISSING, (&device, DType::F32));
        let ratio = |a: Tensor<1>, b: Tensor<1>| {
            let none = b.clone().lower_equal_elem(0.0);
            (a / b).mask_fill(none, MISSING)
        };
        let share = share.map(|share| {
            // NaN where there is nothing to share.
            let none = share.clone().is_nan();
            share.mask_fill(none, MISSING)
        });
        let kept = memory.map(|rows| {
            let squares = |tensor: &Tensor<2>| tensor.clone().cast(DType::F32).square().sum_dim(1);
            let pending = (squares(&rows.input) * squares(&rows.grad)).sum().sqrt();
            (
                ratio(pending, norm(&gradient)),
                rows.age.clone().cast(DType::F32).max(),
            )
        });
        let (kept, oldest) = kept.unzip();
        let compared = exact.map(|exact| {
            let exact = exact.cast(DType::F32);
            let difference = gradient.clone() - exact.clone();
            let product = (gradient.clone() * exact.clone()).sum();
            (
                ratio(norm(&difference), norm(&exact)),
                ratio(product, norm(&gradient) * norm(&exact)),
            )
        });
        let (error, cosine) = compared.unzip();
        let values = [share, kept, oldest, error, cosine];
        let values = values.map(|value| value.unwrap_or_else(missing));
        Self {
            values: Tensor::cat(values.to_vec(), 0),
            read: OnceLock::new(),
        }
    }

    pub(crate) fn read(&self) -> Result<Measured, TensorReadError> {
        if let Some(read) = self.read.get() {
            return Ok(*read);
        }
        let data = self.values.clone().try_into_data()?;
        let mut values = data.iter::<f64>();
        let mut next = || values.next().filter(|&value| value != MISSING);
        let measured = Measured {
            share: next(),
            memory: next(),
            oldest: next(),
            error: next(),
            cosine: next(),
        };
        Ok(*self.read.get_or_init(|| measured))
    }

    /// Where the figures are.
    #[cfg(feature = "train")]
    pub(crate) fn device(&self) -> burn::tensor::Device {
        self.values.device()
    }
}

fn norm(matrix: &Tensor<2>) -> Tensor<1> {
    matrix.clone().square().sum().sqrt()
}
