//! The backward pass of a layer norm. It computes mean and deviation of each row again, while the
//! row is in the cache.

use burn::backend::{TensorMetadata, tensor::FloatTensor};

use super::{
    HostTensors, from_values,
    in_place::sum_of,
    passes::{RowWork, Rows, RowsMut, in_parallel},
    rows, rows_mut,
};

/// Replaces the gradient of the output by that of the input. Returns those of gamma and beta, too.
pub(super) fn backward<B: HostTensors>(
    input: FloatTensor<B>,
    gamma: FloatTensor<B>,
    grad: FloatTensor<B>,
    epsilon: f64,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let device = grad.device();
    let [input, gamma, mut grad] = [input, gamma, grad].map(B::contiguous);
    let sums = in_parallel(NormBackward {
        input: rows::<B>(&input),
        gamma: B::values(&gamma),
        grad: rows_mut::<B>(&mut grad),
        epsilon: epsilon as f32,
    });
    let [of_gamma, of_beta] = sums.map(|sum| {
        let width = sum.len();
        from_values::<B>(sum, [width], &device)
    });
    (grad, of_gamma, of_beta)
}

struct NormBackward<'a> {
    input: Rows<'a, f32>,
    gamma: &'a [f32],
    grad: RowsMut<'a, f32>,
    epsilon: f32,
}

impl RowWork for NormBackward<'_> {
    /// The gradients of gamma and beta.
    type Output = [Vec<f32>; 2];

    fn rows(&self) -> usize {
        self.input.count()
    }

    fn width(&self) -> usize {
        // A value is read and written several times.
        4 * self.input.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (input, grad) = (self.input.split_at(row), self.grad.split_at(row));
        let work = |input, grad| Self {
            input,
            grad,
            ..self
        };
        (work(input.0, grad.0), work(input.1, grad.1))
    }

    #[inline(always)]
    fn run(mut self) -> [Vec<f32>; 2] {
        let (gamma, width) = (self.gamma, self.input.width);
        let [mut of_gamma, mut of_beta] = [(); 2].map(|()| vec![0.0; width]);
        // The input without its mean, and then the part of it that the norm keeps.
        let mut normal = vec![0.0; width];
        for row in 0..self.rows() {
            let (input, grad) = (self.input.row(row), self.grad.row(row));
            let mean = sum_of(input, input, |value, _| value) / width as f32;
            for (normal, value) in normal.iter_mut().zip(input) {
                *normal = value - mean;
            }
            let variance = sum_of(&normal, &normal, |a, b| a * b) / width as f32;
            let inverse = 1.0 / (variance + self.epsilon).sqrt();
            let columns = of_gamma.iter_mut().zip(&mut of_beta).zip(&mut normal);
            for (((of_gamma, of_beta), normal), (grad, gamma)) in
                columns.zip(grad.iter_mut().zip(gamma))
            {
                *normal *= inverse;
                *of_gamma += *grad * *normal;
                *of_beta += *grad;
                *grad *= gamma;
            }
            let mean = sum_of(grad, grad, |grad, _| grad) / width as f32;
            let along = sum_of(grad, &normal, |grad, normal| grad * normal) / width as f32;
            for (grad, normal) in grad.iter_mut().zip(&normal) {
                *grad = inverse * (*grad - mean - normal * along);
            }
        }
        [of_gamma, of_beta]
    }

    fn join(mut first: Self::Output, second: Self::Output) -> Self::Output {
        for (sum, second) in first.iter_mut().zip(second) {
            for (sum, value) in sum.iter_mut().zip(second) {
                *sum += value;
            }
        }
        first
    }
}
