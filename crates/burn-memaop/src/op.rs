//! The gradient of the weight as a function of plain tensors, for layers that you build yourself.

use burn::{backend::Dispatch, tensor::Tensor};

use crate::{
    backward::recipe,
    config::Method,
    rows::{Draw, Factor, Memory, random::Random},
};

pub use crate::state::rows::Rows;

/// What [`weight_gradient`] returns.
#[derive(Debug, Clone)]
pub struct Gradient {
    /// The approximate gradient, shape `[d_input, d_output]`, in the dtype of the input.
    pub weight: Tensor<2>,
    /// The memory for the next step, if the method has one. When that step folds its batch in, it
    /// multiplies both factors by the root of the decay.
    pub memory: Option<Rows>,
}

/// The settings of one approximate gradient.
#[derive(Debug, Clone, Copy)]
pub struct AopStep {
    /// The number of rows that are used, from 1 to all of them.
    pub k: usize,
    /// Which rows are used, and what becomes of the others.
    pub method: Method,
    /// The seed of the random bits.
    pub seed: u64,
    /// The number of gradients that were computed with this seed before.
    pub step: u64,
}

fn into_dispatch(rows: Rows) -> Memory<Dispatch> {
    Memory {
        input: rows.input.into_dispatch(),
        grad: rows.grad.into_dispatch(),
        age: rows.age.into_dispatch(),
    }
}

impl AopStep {
    fn draw(self) -> Draw {
        Draw {
            k: self.k,
            method: self.method,
            random: Random {
                seed: self.seed,
                step: self.step,
            },
        }
    }
}

/// The sum of the outer products of K rows, each times its weight, and the memory of the others.
///
/// The memory is taken by value: a backend with the only reference can update it in place. If a
/// value of the batch is NaN or infinite, the whole gradient is NaN, and the memory stays as it is.
///
/// # Shapes
///
/// - input: `[rows, d_input]`
/// - grad: `[rows, d_output]`
/// - memory: any number of rows; the first `rows` take part, and missing ones are zero
///
/// # Panics
///
/// Panics if a tensor is on an autodiff device or on another device than the rest, if `input` and
/// `grad` differ in dtype or rows, if `step.k` is not in `1..=rows`, or if a tensor of the memory
/// has another width or number of rows than the others.
pub fn weight_gradient(
    input: Tensor<2>,
    grad: Tensor<2>,
    memory: Option<Rows>,
    step: AopStep,
) -> Gradient {
    let [rows, d_input] = input.dims();
    let [grad_rows, d_output] = grad.dims();
    same_device([("input", &input), ("grad", &grad)]);
    expect("the rows of grad", rows, grad_rows);
    expect("the dtype of grad", input.dtype(), grad.dtype());
    expect_k(rows, step.k);
    let memory = memory.map(|memory| {
        let Rows {
            input: kept_input,
            grad: kept_grad,
            age,
        } = &memory;
        for (name, tensor) in [
            ("memory.input", kept_input),
            ("memory.grad", kept_grad),
            ("memory.age", age),
        ] {
            same_device([("input", &input), (name, tensor)]);
        }
        let [kept, width] = kept_input.dims();
        expect("the width of memory.input", d_input, width);
        let shape = [kept, d_output];
        expect("the shape of memory.grad", shape, kept_grad.dims());
        expect("the shape of memory.age", [kept, 1], age.dims());
        into_dispatch(memory)
    });
    gradient(Factor::Matrix(input.into_dispatch()), grad, memory, step)
}

fn gradient(
    input: Factor<Dispatch>,
    grad: Tensor<2>,
    memory: Option<Memory<Dispatch>>,
    step: AopStep,
) -> Gradient {
    let (grad, draw) = (grad.into_dispatch(), step.draw());
    let (weight, memory) = recipe::weight_gradient::<Dispatch>(input, grad, memory, draw);
    Gradient {
        weight: Tensor::from_dispatch(weight),
        memory: memory.map(|memory| Rows {
            input: Tensor::from_dispatch(memory.input),
            grad: Tensor::from_dispatch(memory.grad),
            age: Tensor::from_dispatch(memory.age),
        }),
    }
}

fn expect<T: PartialEq + core::fmt::Debug>(what: &str, expected: T, found: T) {
    assert!(
        expected == found,
        "weight_gradient: {what} must be {expected:?}, as the other tensors have it, but is {found:?}"
    );
}

fn expect_k(rows: usize, k: usize) {
    assert!(
        (1..=rows).contains(&k),
        "weight_gradient: step.k must be in 1..={rows}, the rows of the batch, but is {k}"
    );
}

fn same_device([first, second]: [(&str, &Tensor<2>); 2]) {
    let devices = [first.1.device(), second.1.device()];
    assert!(
        devices[0] == devices[1] && !devices[0].is_autodiff(),
        "weight_gradient: {} and {} must be on one device, without autodiff, but are on {devices:?}",
        first.0,
        second.0
    );
}

/// What only the tests and benches of this repository use. It may change at any time.
#[doc(hidden)]
pub mod parts {
    use super::*;
    use crate::{
        config::StoredInput,
        rows::{
            Packed, RowOps,
            packing::{Bits, Packing},
            random::Dropout,
        },
    };
    use burn::tensor::DType;

    /// Packed rows.
    #[derive(Debug, Clone)]
    pub struct PackedRows(Packed<Dispatch>, DType);

    /// Packs rows. Their values are rounded by the random bits of a seed and a step.
    pub fn pack(input: Tensor<2>, stored: StoredInput, seed: u64, step: u64) -> PackedRows {
        let packing = Packing {
            bits: Bits::of(stored).expect("few bits"),
            width: input.dims()[1],
        };
        let (dtype, random) = (input.dtype(), Random { seed, step });
        let packed = Dispatch::memaop_pack(input.into_dispatch(), packing, Some(random));
        PackedRows(packed, dtype)
    }

    impl PackedRows {
        /// All rows, with rounded values.
        pub fn unpack(self) -> Tensor<2> {
            Tensor::from_dispatch(Dispatch::memaop_unpack(self.0, self.1.into()))
        }

        /// The bytes that are kept.
        pub fn bytes(&self) -> usize {
            let norms: Tensor<2> = Tensor::from_dispatch(self.0.norms.clone());
            norms.dims()[0] * (4 * self.0.packing.words() + norms.dtype().size())
        }

        /// [`weight_gradient`](super::weight_gradient) of these rows.
        pub fn weight_gradient(
            self,
            grad: Tensor<2>,
            memory: Option<Rows>,
            step: AopStep,
        ) -> Gradient {
            gradient(
                Factor::Packed(self.0),
                grad,
                memory.map(into_dispatch),
                step,
            )
        }

        /// [`gradient_noise`] of these rows.
        pub fn gradient_noise(
            self,
            grad: Tensor<2>,
            gradient: Tensor<2>,
            ks: [usize; 6],
        ) -> Tensor<1> {
            noise(Factor::Packed(self.0), grad, gradient, ks)
        }
    }

    /// A dropout of a matrix by the random bits of a seed and a step.
    pub fn drop_out(values: Tensor<2>, prob: f64, seed: u64, step: u64) -> Tensor<2> {
        let dropout = Dropout {
            random: Random { seed, step },
            prob,
            first: 0,
        };
        let values = Dispatch::memaop_drop_values(values.into_dispatch(), dropout);
        Tensor::from_dispatch(values)
    }

    /// `grad @ weight^T` from K rows.
    pub fn input_gradient(
        grad: Tensor<2>,
        weight: Tensor<2>,
        k: usize,
        seed: u64,
        step: u64,
    ) -> Tensor<2> {
        let step = AopStep {
            k,
            method: Method::Systematic,
            seed,
            step,
        };
        let (grad, weight) = (grad.into_dispatch(), weight.into_dispatch());
        Tensor::from_dispatch(recipe::input_gradient::<Dispatch>(
            grad,
            weight,
            step.draw(),
        ))
    }

    /// The figures of the noise of a gradient, shape `[8]`.
    pub fn gradient_noise(
        input: Tensor<2>,
        grad: Tensor<2>,
        gradient: Tensor<2>,
        ks: [usize; 6],
    ) -> Tensor<1> {
        noise(Factor::Matrix(input.into_dispatch()), grad, gradient, ks)
    }

    fn noise(
        input: Factor<Dispatch>,
        grad: Tensor<2>,
        gradient: Tensor<2>,
        ks: [usize; 6],
    ) -> Tensor<1> {
        let [grad, gradient] = [grad, gradient].map(Tensor::into_dispatch);
        Tensor::from_dispatch(recipe::noise::<Dispatch>(input, grad, Some(gradient), ks))
    }
}
