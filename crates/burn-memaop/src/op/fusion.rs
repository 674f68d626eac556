//! The approximate gradients under Fusion: each one operation in the stream, executed by the inner
//! backend when the stream is, so that nothing is flushed for it.

use std::{fmt, marker::PhantomData};

use burn::{
    backend::tensor::FloatTensor,
    tensor::{DType, Shape},
};
use burn_fusion::{
    ExecutionError, Fusion, FusionBackend, FusionRuntime, FusionTensor,
    custom::{CustomOpIr, HandleContainer, Operation, OperationIr, StreamId, TensorIr},
};

use crate::{
    op::portable,
    op::{
        MemAopOps,
        step::{AopStep, Bias, InputStep, NoiseStep, RowMemory, Share, WeightGradient},
    },
};

type Client<B> = burn_fusion::client::GlobalFusionClient<<B as FusionBackend>::FusionRuntime>;
type Handles<B> =
    HandleContainer<<<B as FusionBackend>::FusionRuntime as FusionRuntime>::FusionHandle>;

pub(crate) fn weight_gradient<B: FusionBackend + MemAopOps>(
    input: FusionTensor<B::FusionRuntime>,
    grad: FusionTensor<B::FusionRuntime>,
    memory: RowMemory<Fusion<B>>,
    step: AopStep,
) -> WeightGradient<Fusion<B>> {
    let client = input.client.clone();
    let dtype = input.dtype;
    let [rows, d_input] = input.shape.dims();
    let [_, d_output] = grad.shape.dims();
    let kept = match &memory {
        RowMemory::Empty => 0,
        RowMemory::Rows { input, .. } => input.shape[0],
    };

    let mut inputs = vec![input.into_ir(), grad.into_ir()];
    if let RowMemory::Rows { input, grad, age } = memory {
        inputs.extend([input.into_ir(), grad.into_ir(), age.into_ir()]);
    }
    // In the order in which they are taken out again below.
    let mut outputs = vec![(Shape::new([d_input, d_output]), dtype)];
    if step.method.memory().decay().is_some() {
        let memory = DType::from(portable::memory_dtype(dtype, &step));
        let age = DType::from(portable::working_dtype(dtype));
        let rows = rows.max(kept);
        let widths = [(d_input, memory), (d_output, memory), (1, age)];
        outputs.extend(widths.map(|(width, dtype)| (Shape::new([rows, width]), dtype)));
    }
    if step.bias {
        outputs.push((Shape::new([d_output]), dtype));
    }
    if step.measure {
        outputs.push((Shape::new([1]), DType::F32));
    }
    let run = move |inputs: Vec<FloatTensor<B>>| {
        let mut inputs = inputs.into_iter();
        let (Some(input), Some(grad)) = (inputs.next(), inputs.next()) else {
            unreachable!("a batch was described");
        };
        let memory = match (inputs.next(), inputs.next(), inputs.next()) {
            (Some(input), Some(grad), Some(age)) => RowMemory::Rows { input, grad, age },
            _ => RowMemory::Empty,
        };
        let gradient = B::memaop_weight_gradient(input, grad, memory, step);
        let mut results = vec![gradient.weight];
        if let RowMemory::Rows { input, grad, age } = gradient.memory {
            results.extend([input, grad, age]);
        }
        results.extend(gradient.bias.into_option());
        if let Share::Measured(share) = gradient.share {
            results.push(share);
        }
        results
    };
    let outputs = register::<B>("memaop_weight_gradient", &client, inputs, outputs, run);
    let mut outputs = outputs.into_iter();
    let mut next = || outputs.next().expect("as many outputs as were described");
    WeightGradient {
        weight: next(),
        memory: match step.method.memory().decay() {
            None => RowMemory::Empty,
            Some(_) => RowMemory::Rows {
                input: next(),
                grad: next(),
                age: next(),
            },
        },
        bias: match step.bias {
            true => Bias::Some(next()),
            false => Bias::None,
        },
        share: match step.measure {
            true => Share::Measured(next()),
            false => Share::Skipped,
        },
    }
}

pub(crate) fn input_gradient<B: FusionBackend + MemAopOps>(
    grad: FusionTensor<B::FusionRuntime>,
    weight: FusionTensor<B::FusionRuntime>,
    step: InputStep,
) -> FusionTensor<B::FusionRuntime> {
    if step.k >= grad.shape[0] {
        return portable::exact_input_gradient::<Fusion<B>>(grad, weight);
    }
    let client = grad.client.clone();
    let output = (Shape::new([grad.shape[0], weight.shape[0]]), grad.dtype);
    let inputs = [grad, weight].map(FusionTensor::into_ir).to_vec();
    let run = move |inputs| {
        let [grad, weight] = all(inputs);
        vec![B::memaop_input_gradient(grad, weight, step)]
    };
    let outputs = register::<B>("memaop_input_gradient", &client, inputs, vec![output], run);
    let [gradient] = all(outputs);
    gradient
}

pub(crate) fn noise<B: FusionBackend + MemAopOps>(
    input: FusionTensor<B::FusionRuntime>,
    grad: FusionTensor<B::FusionRuntime>,
    gradient: FusionTensor<B::FusionRuntime>,
    step: NoiseStep,
) -> FusionTensor<B::FusionRuntime> {
    let client = input.client.clone();
    let output = (Shape::new([2 + step.ks.len()]), DType::F32);
    let inputs = [input, grad, gradient].map(FusionTensor::into_ir).to_vec();
    let run = move |inputs| {
        let [input, grad, gradient] = all(inputs);
        vec![B::memaop_noise(input, grad, gradient, step)]
    };
    let outputs = register::<B>("memaop_noise", &client, inputs, vec![output], run);
    let [noise] = all(outputs);
    noise
}

fn all<T, const N: usize>(tensors: Vec<T>) -> [T; N] {
    let tensors = tensors.try_into().ok();
    tensors.expect("as many tensors as were described")
}

/// Registers an operation with these inputs, and outputs of these shapes and types, which `run` computes on the inner
/// backend when the stream is executed.
fn register<B: FusionBackend>(
    name: &'static str,
    client: &Client<B>,
    inputs: Vec<TensorIr>,
    outputs: Vec<(Shape, DType)>,
    run: impl Fn(Vec<FloatTensor<B>>) -> Vec<FloatTensor<B>> + Send + Sync + 'static,
) -> Vec<FusionTensor<B::FusionRuntime>> {
    let outputs = outputs.into_iter();
    let outputs: Vec<_> = outputs
        .map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype))
        .collect();
    let description = CustomOpIr::new(name, &inputs, &outputs);
    let operation = Execute::<B, _> {
        description: description.clone(),
        run,
        backend: PhantomData,
    };
    let description = OperationIr::Custom(description);
    client.register(StreamId::current(), description, operation)
}

struct Execute<B, F> {
    description: CustomOpIr,
    run: F,
    backend: PhantomData<fn() -> B>,
}

impl<B, F> fmt::Debug for Execute<B, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.description.fmt(f)
    }
}

impl<B, F> Operation<B::FusionRuntime> for Execute<B, F>
where
    B: FusionBackend,
    F: Fn(Vec<FloatTensor<B>>) -> Vec<FloatTensor<B>> + Send + Sync + 'static,
{
    fn execute(&self, handles: &mut Handles<B>) -> Result<(), ExecutionError> {
        let inputs = self.description.inputs.iter();
        let inputs = inputs.map(|ir| handles.get_float_tensor::<B>(ir)).collect();
        let results = (self.run)(inputs);
        debug_assert_eq!(results.len(), self.description.outputs.len());
        for (output, result) in self.description.outputs.iter().zip(results) {
            handles.register_float_tensor::<B>(&output.id, result);
        }
        Ok(())
    }
}
