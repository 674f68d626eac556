//! The approximate gradients under Fusion: each one operation in the stream, executed by the inner
//! backend when the stream is, so that nothing is flushed for it.

use burn::tensor::{DType, Shape};
use burn_fusion::{
    ExecutionError, Fusion, FusionBackend, FusionRuntime, FusionTensor,
    custom::{
        CustomOpIr, HandleContainer, Operation, OperationIr, OperationOutput, StreamId, TensorIr,
    },
};

use crate::{
    op::portable,
    op::{
        MemAopOps,
        step::{AopStep, Bias, InputStep, NoiseStep, RowMemory, Share, WeightGradient},
    },
};

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
    let outputs: Vec<_> = outputs
        .into_iter()
        .map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype))
        .collect();

    let description = CustomOpIr::new("memaop_weight_gradient", &inputs, &outputs);
    let operation = Execute::<B> {
        description: description.clone(),
        step,
        backend: core::marker::PhantomData,
    };
    let mut outputs = client
        .register(
            StreamId::current(),
            OperationIr::Custom(description),
            operation,
        )
        .into_iter();
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
    let shape = Shape::new([grad.shape[0], weight.shape[0]]);
    let output = TensorIr::uninit(client.create_empty_handle(), shape, grad.dtype);
    let inputs = [grad.into_ir(), weight.into_ir()];
    let description = CustomOpIr::new("memaop_input_gradient", &inputs, &[output]);
    let operation = ExecuteInput::<B> {
        description: description.clone(),
        step,
        backend: core::marker::PhantomData,
    };
    client
        .register(
            StreamId::current(),
            OperationIr::Custom(description),
            operation,
        )
        .output()
}

#[derive(Debug)]
struct ExecuteInput<B> {
    description: CustomOpIr,
    step: InputStep,
    backend: core::marker::PhantomData<B>,
}

impl<B: FusionBackend + MemAopOps> Operation<B::FusionRuntime> for ExecuteInput<B> {
    fn execute(&self, handles: &mut Handles<B>) -> Result<(), ExecutionError> {
        let ([grad, weight], [output]) = self.description.as_fixed();
        let grad = handles.get_float_tensor::<B>(grad);
        let weight = handles.get_float_tensor::<B>(weight);
        let gradient = B::memaop_input_gradient(grad, weight, self.step);
        handles.register_float_tensor::<B>(&output.id, gradient);
        Ok(())
    }
}

pub(crate) fn noise<B: FusionBackend + MemAopOps>(
    input: FusionTensor<B::FusionRuntime>,
    grad: FusionTensor<B::FusionRuntime>,
    gradient: FusionTensor<B::FusionRuntime>,
    step: NoiseStep,
) -> FusionTensor<B::FusionRuntime> {
    let client = input.client.clone();
    let shape = Shape::new([2 + step.ks.len()]);
    let output = TensorIr::uninit(client.create_empty_handle(), shape, DType::F32);
    let inputs = [input, grad, gradient].map(FusionTensor::into_ir);
    let description = CustomOpIr::new("memaop_noise", &inputs, &[output]);
    let operation = ExecuteNoise::<B> {
        description: description.clone(),
        step,
        backend: core::marker::PhantomData,
    };
    client
        .register(
            StreamId::current(),
            OperationIr::Custom(description),
            operation,
        )
        .output()
}

#[derive(Debug)]
struct ExecuteNoise<B> {
    description: CustomOpIr,
    step: NoiseStep,
    backend: core::marker::PhantomData<B>,
}

impl<B: FusionBackend + MemAopOps> Operation<B::FusionRuntime> for ExecuteNoise<B> {
    fn execute(&self, handles: &mut Handles<B>) -> Result<(), ExecutionError> {
        let (inputs, [output]) = self.description.as_fixed();
        let [input, grad, gradient] = inputs
            .each_ref()
            .map(|ir| handles.get_float_tensor::<B>(ir));
        let noise = B::memaop_noise(input, grad, gradient, self.step);
        handles.register_float_tensor::<B>(&output.id, noise);
        Ok(())
    }
}

#[derive(Debug)]
struct Execute<B> {
    description: CustomOpIr,
    step: AopStep,
    backend: core::marker::PhantomData<B>,
}

impl<B: FusionBackend + MemAopOps> Operation<B::FusionRuntime> for Execute<B> {
    fn execute(&self, handles: &mut Handles<B>) -> Result<(), ExecutionError> {
        let inputs = &self.description.inputs;
        let mut inputs = inputs.iter().map(|ir| handles.get_float_tensor::<B>(ir));
        let (Some(input), Some(grad)) = (inputs.next(), inputs.next()) else {
            unreachable!("a batch was described");
        };
        let memory = match (inputs.next(), inputs.next(), inputs.next()) {
            (Some(input), Some(grad), Some(age)) => RowMemory::Rows { input, grad, age },
            _ => RowMemory::Empty,
        };
        drop(inputs);

        let gradient = B::memaop_weight_gradient(input, grad, memory, self.step);
        let mut results = vec![gradient.weight];
        if let RowMemory::Rows { input, grad, age } = gradient.memory {
            results.extend([input, grad, age]);
        }
        results.extend(gradient.bias.into_option());
        if let Share::Measured(share) = gradient.share {
            results.push(share);
        }
        let outputs = &self.description.outputs;
        debug_assert_eq!(results.len(), outputs.len());
        for (output, result) in outputs.iter().zip(results) {
            handles.register_float_tensor::<B>(&output.id, result);
        }
        Ok(())
    }
}
