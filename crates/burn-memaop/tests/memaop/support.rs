//! Random data, and tensors of it.

use burn::{
    module::Param,
    nn::{Linear, LinearConfig},
    tensor::{DType, Device, Tensor, TensorData},
};
use burn_memaop::{AopConfig, Memory, Method, OuterProducts};

/// The method of the paper, in layers of any size.
pub fn published() -> AopConfig {
    AopConfig::new()
        .with_method(Method::TopK(Memory::Published { decay: 1.0 }))
        .with_cost_rule(false)
}

/// A small generator of its own (SplitMix64), so that tests do not depend on a backend's.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `[-1, 1)`, exact in an `f32`.
    pub fn value(&mut self) -> f64 {
        (self.next() >> 41) as f64 / (1u64 << 22) as f64 - 1.0
    }

    /// Uniform in `low..=high`.
    pub fn range(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    /// A matrix whose rows differ in size by a factor of up to 100.
    pub fn matrix(&mut self, rows: usize, columns: usize) -> Matrix {
        let mut matrix = Matrix::zeros(rows, columns);
        for i in 0..rows {
            let scale = f64::from(10f32.powf(self.value() as f32));
            for j in 0..columns {
                matrix.0[i][j] = f64::from((scale * self.value()) as f32);
            }
        }
        matrix
    }
}

/// A layer whose weights do not depend on a backend's generator, which tests share.
pub fn linear(random: &mut Random, inputs: usize, outputs: usize, device: &Device) -> Linear {
    let mut weight = Matrix::zeros(inputs, outputs);
    let values = weight.0.iter_mut().flatten();
    values.for_each(|value| *value = random.value() / (inputs as f64).sqrt());
    let mut linear = LinearConfig::new(inputs, outputs).init(device);
    linear.weight = Param::from_tensor(weight.tensor(device, DType::F32));
    linear.bias = Some(Param::from_tensor(Tensor::zeros([outputs], device)));
    linear
}

/// Rows of `f64`.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix(pub Vec<Vec<f64>>);

impl Matrix {
    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self(vec![vec![0.0; columns]; rows])
    }

    pub fn rows(&self) -> usize {
        self.0.len()
    }

    pub fn columns(&self) -> usize {
        self.0[0].len()
    }

    pub fn tensor(&self, device: &Device, dtype: DType) -> Tensor<2> {
        let values: Vec<f64> = self.0.concat();
        let data = TensorData::new(values, [self.rows(), self.columns()]).convert_dtype(dtype);
        Tensor::from_data(data, (device, dtype))
    }

    pub fn from_tensor(tensor: Tensor<2>) -> Self {
        let [_, columns] = tensor.dims();
        let values: Vec<f64> = tensor.into_data().iter::<f64>().collect();
        Self(values.chunks(columns).map(<[f64]>::to_vec).collect())
    }

    /// The values as a tensor of `dtype` holds them.
    pub fn rounded(&self, dtype: DType) -> Self {
        Self::from_tensor(self.tensor(&Device::flex(), dtype))
    }

    /// `|self - other| / |other|` in Frobenius norms; `|self|` where `other` is zero.
    pub fn relative_error(&self, other: &Self) -> f64 {
        assert_eq!(
            (self.rows(), self.columns()),
            (other.rows(), other.columns())
        );
        let mut difference = 0.0;
        let mut norm = 0.0;
        for (row, expected) in self.0.iter().zip(&other.0) {
            for (a, b) in row.iter().zip(expected) {
                difference += (a - b) * (a - b);
                norm += b * b;
            }
        }
        match norm {
            0.0 => f64::sqrt(difference),
            norm => f64::sqrt(difference / norm),
        }
    }
}

/// The bits of a tensor, for comparisons bit for bit.
pub fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    let data = tensor.into_data();
    assert_eq!(data.dtype(), DType::F32);
    data.iter::<f32>().map(f32::to_bits).collect()
}

/// K rows of every batch, without the cost rule.
pub fn count(k: usize) -> AopConfig {
    AopConfig::new()
        .with_outer_products(OuterProducts::Count(k))
        .with_cost_rule(false)
}
