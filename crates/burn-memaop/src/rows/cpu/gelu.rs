//! GELU and its derivative with wide registers. Flex takes one value at a time through `erf` and
//! `exp` of the C library, which is most of what a transformer spends beside its products.

use std::f32::consts::{FRAC_1_SQRT_2, LN_2, LOG2_E};

use burn::backend::{TensorMetadata, tensor::FloatTensor};

use super::{
    HostTensors, from_values,
    passes::{RowWork, Rows, RowsMut, in_parallel},
    rows, rows_mut,
};

/// Burn's `gelu`, to 1e-6.
pub(super) fn forward<B: HostTensors>(input: FloatTensor<B>) -> FloatTensor<B> {
    let device = input.device();
    let input = B::contiguous(input);
    let input = rows::<B>(&input);
    let shape = [input.count(), input.width];
    let mut output = vec![0.0; input.values.len()];
    in_parallel(WithInput {
        input,
        values: RowsMut::new(&mut output, shape[1]),
        function: |x, _| gelu(x),
    });
    from_values::<B>(output, shape, &device)
}

/// Burn's `gelu_backward`, to 1e-6.
pub(super) fn backward<B: HostTensors>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let (input, mut grad) = (B::contiguous(input), B::contiguous(grad));
    in_parallel(WithInput {
        input: rows::<B>(&input),
        values: rows_mut::<B>(&mut grad),
        function: |x, grad| grad * derivative(x),
    });
    grad
}

/// Replaces each value by a function of it and of an input.
struct WithInput<'a, F> {
    input: Rows<'a, f32>,
    values: RowsMut<'a, f32>,
    function: F,
}

impl<F: Fn(f32, f32) -> f32 + Copy + Send> RowWork for WithInput<'_, F> {
    type Output = ();

    fn rows(&self) -> usize {
        self.input.values.len() / self.input.width
    }

    fn width(&self) -> usize {
        WORK * self.input.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (input, values) = (self.input.split_at(row), self.values.split_at(row));
        let work = |input, values| Self {
            input,
            values,
            ..self
        };
        (work(input.0, values.0), work(input.1, values.1))
    }

    #[inline(always)]
    fn run(self) {
        for (value, &input) in self.values.values.iter_mut().zip(self.input.values) {
            *value = (self.function)(input, *value);
        }
    }

    fn join((): (), (): ()) {}
}

/// A value takes as long as so many values that are only read.
const WORK: usize = 8;

/// `x Phi(x)`, where Phi is the standard normal distribution function.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    x * normal(x).0
}

#[inline(always)]
pub(super) fn derivative(x: f32) -> f32 {
    let (phi, density) = normal(x);
    phi + x * density
}

/// The normal distribution function and density, to 2e-7 (Abramowitz, Stegun, 1964, 7.1.26).
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    const INVERSE_SQRT_2_PI: f32 = 0.398_942_3;
    let power = exp_of_minus(0.5 * x * x);
    let t = 1.0 / (1.0 + 0.327_591_1 * FRAC_1_SQRT_2 * x.abs());
    let series = 1.061_405_4;
    let series = t * series - 1.453_152_1;
    let series = t * series + 1.421_413_7;
    let series = t * series - 0.284_496_72;
    let series = t * series + 0.254_829_6;
    let tail = 0.5 * t * series * power;
    let phi = if x < 0.0 { tail } else { 1.0 - tail };
    (phi, INVERSE_SQRT_2_PI * power)
}

/// `e^-s` for s from 0, to a part of 1e-7 near 1, or of 1e-5 where it is tiny, or 0 below that.
#[inline(always)]
pub(super) fn exp_of_minus(s: f32) -> f32 {
    let y = (-s * LOG2_E).max(-127.0);
    let whole = (y + 0.5).floor();
    // The rest comes from s itself, which the rounding of y has not touched.
    let rest = (-s).max(-127.0 * LN_2) - whole * LN_2;
    let series = 1.0 / 720.0;
    let series = rest * series + 1.0 / 120.0;
    let series = rest * series + 1.0 / 24.0;
    let series = rest * series + 1.0 / 6.0;
    let series = rest * series + 0.5;
    let series = rest * series + 1.0;
    let series = rest * series + 1.0;
    let scale = f32::from_bits(((whole as i32 + 127) << 23) as u32);
    scale * series
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Phi by the series of the error function, and in the tails by its continued fraction.
    fn phi(x: f64) -> f64 {
        let z = x.abs() / 2f64.sqrt();
        let tail = if z < 3.0 {
            let mut term = z;
            let mut sum = z;
            for n in 1..200 {
                term *= -z * z / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            0.5 - sum / std::f64::consts::PI.sqrt()
        } else {
            let mut fraction = z;
            for n in (1..200).rev() {
                fraction = z + f64::from(n) / 2.0 / fraction;
            }
            (-z * z).exp() / fraction / std::f64::consts::PI.sqrt() / 2.0
        };
        if x < 0.0 { tail } else { 1.0 - tail }
    }

    #[test]
    fn gelu_and_its_derivative_are_those_of_the_normal_distribution() {
        for step in -4000..=4000 {
            let x = step as f32 * 0.005;
            let wide = f64::from(x);
            let density = (-0.5 * wide * wide).exp() / (2.0 * std::f64::consts::PI).sqrt();
            let value = f64::from(gelu(x)) - wide * phi(wide);
            assert!(
                value.abs() <= 2.5e-7 * wide.abs().max(1.0),
                "{x}: {value:e}"
            );
            let slope = f64::from(derivative(x)) - (phi(wide) + wide * density);
            assert!(slope.abs() < 5e-7, "{x}: {slope:e}");
        }
        for x in [f32::MAX, 1e20, 100.0] {
            assert_eq!((normal(x).0, derivative(x)), (1.0, 1.0), "{x}");
            assert_eq!((normal(-x).0, derivative(-x)), (0.0, 0.0), "{x}");
        }
        assert!(derivative(f32::NAN).is_nan() && normal(f32::NAN).0 * f32::NAN != 0.0);
    }
}
