//! The approximate gradients under Fusion: each one operation in the stream, executed by the inner
//! backend when the stream is, so that nothing is flushed for it.

use std::{fmt, marker::PhantomData};

use burn::{
    backend::tensor::{FloatTensor, IntTensor},
    tensor::{DType, FloatDType, Shape},
};
use burn_fusion::{
    ExecutionError, Fusion, FusionBackend, FusionRuntime, FusionTensor,
    custom::{CustomOpIr, HandleContainer, Operation, OperationIr, StreamId, TensorIr},
};

use crate::{
    op::portable,
    op::{
        MemAopOps,
        noise::StepNoise,
        packing::Packing,
        step::{
            AopStep, Bias, Input, InputStep, NoiseStep, Packed, RowMemory, Share, WeightGradient,
        },
        window::Window,
    },
};

type Client<B> = burn_fusion::client::GlobalFusionClient<<B as FusionBackend>::FusionRuntime>;
type Handles<B> =
    HandleContainer<<<B as FusionBackend>::FusionRuntime as FusionRuntime>::FusionHandle>;

pub(crate) fn weight_gradient<B: FusionBackend + MemAopOps>(
    input: Input<Fusion<B>>,
    grad: FusionTensor<B::FusionRuntime>,
    memory: RowMemory<Fusion<B>>,
    step: AopStep,
) -> WeightGradient<Fusion<B>> {
    let client = grad.client.clone();
    let dtype = grad.dtype;
    let d_input = input.width();
    let [rows, d_output] = grad.shape.dims();
    let kept = match &memory {
        RowMemory::Empty => 0,
        RowMemory::Rows { input, .. } => input.shape[0],
    };

    let (mut inputs, read_input) = input_ir::<B>(input);
    inputs.push(grad.into_ir());
    if let RowMemory::Rows { input, grad, age } = memory {
        inputs.extend([input.into_ir(), grad.into_ir(), age.into_ir()]);
    }
    // In the order of `results`.
    let mut outputs = vec![(Shape::new([d_input, d_output]), dtype)];
    if step.method.memory().decay().is_some() {
        let memory = DType::from(portable::working_dtype(dtype));
        let rows = rows.max(kept);
        let widths = [d_input, d_output, 1];
        outputs.extend(widths.map(|width| (Shape::new([rows, width]), memory)));
    }
    if step.bias {
        outputs.push((Shape::new([d_output]), dtype));
    }
    if step.measure {
        outputs.push((Shape::new([1]), DType::F32));
    }
    let run = move |mut inputs: Values<B>| {
        let (input, grad) = (read_input(&mut inputs), inputs.float());
        let memory = match inputs.is_empty() {
            true => RowMemory::Empty,
            false => RowMemory::Rows {
                input: inputs.float(),
                grad: inputs.float(),
                age: inputs.float(),
            },
        };
        results::<B>(B::memaop_weight_gradient(input, grad, memory, step))
    };
    let outputs = register::<B>("memaop_weight_gradient", &client, inputs, outputs, run);
    described::<B>(outputs, &step)
}

/// The tensors of a weight gradient, in the order in which they are described.
fn results<B: FusionBackend>(gradient: WeightGradient<B>) -> Vec<Value<B>> {
    let mut results = vec![gradient.weight];
    if let RowMemory::Rows { input, grad, age } = gradient.memory {
        results.extend([input, grad, age]);
    }
    results.extend(gradient.bias.into_option());
    if let Share::Measured(share) = gradient.share {
        results.push(share);
    }
    results.into_iter().map(Value::Float).collect()
}

/// The weight gradient of a step, of tensors in that order.
fn described<B: FusionBackend>(
    outputs: Vec<FusionTensor<B::FusionRuntime>>,
    step: &AopStep,
) -> WeightGradient<Fusion<B>> {
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
    let run = move |mut inputs: Values<B>| {
        let (grad, weight) = (inputs.float(), inputs.float());
        vec![Value::Float(B::memaop_input_gradient(grad, weight, step))]
    };
    let outputs = register::<B>("memaop_input_gradient", &client, inputs, vec![output], run);
    let [gradient] = all(outputs);
    gradient
}

pub(crate) fn noise<B: FusionBackend + MemAopOps>(
    input: Input<Fusion<B>>,
    grad: FusionTensor<B::FusionRuntime>,
    gradient: FusionTensor<B::FusionRuntime>,
    step: NoiseStep,
) -> FusionTensor<B::FusionRuntime> {
    let client = grad.client.clone();
    let output = (Shape::new([2 + step.ks.len()]), DType::F32);
    let (mut inputs, read_input) = input_ir::<B>(input);
    inputs.extend([grad, gradient].map(FusionTensor::into_ir));
    let run = move |mut inputs: Values<B>| {
        let input = read_input(&mut inputs);
        let (grad, gradient) = (inputs.float(), inputs.float());
        vec![Value::Float(B::memaop_noise(input, grad, gradient, step))]
    };
    let outputs = register::<B>("memaop_noise", &client, inputs, vec![output], run);
    let [noise] = all(outputs);
    noise
}

pub(crate) fn convolve_weight_gradient<B: FusionBackend + MemAopOps>(
    input: FusionTensor<B::FusionRuntime>,
    grad: FusionTensor<B::FusionRuntime>,
    window: Window,
    step: AopStep,
) -> WeightGradient<Fusion<B>> {
    let client = grad.client.clone();
    let (channels, dtype) = (window.channels[1], grad.dtype);
    let mut outputs = vec![(Shape::new([channels, window.patch()]), dtype)];
    if step.bias {
        outputs.push((Shape::new([channels]), dtype));
    }
    if step.measure {
        outputs.push((Shape::new([1]), DType::F32));
    }
    let inputs = [input, grad].map(FusionTensor::into_ir).to_vec();
    let run = move |mut inputs: Values<B>| {
        let (input, grad) = (inputs.float(), inputs.float());
        results::<B>(B::memaop_convolve_weight_gradient(
            input, grad, window, step,
        ))
    };
    let outputs = register::<B>(
        "memaop_convolve_weight_gradient",
        &client,
        inputs,
        outputs,
        run,
    );
    described::<B>(outputs, &step)
}

pub(crate) fn pack<B: FusionBackend + MemAopOps>(
    input: FusionTensor<B::FusionRuntime>,
    packing: Packing,
    noise: Option<StepNoise>,
) -> Packed<Fusion<B>> {
    let client = input.client.clone();
    let rows = input.shape[0];
    let norms = DType::from(portable::working_dtype(input.dtype));
    let outputs = vec![
        (Shape::new([rows, packing.words()]), DType::I32),
        (Shape::new([rows, 1]), norms),
    ];
    let run = move |mut inputs: Values<B>| {
        let packed = B::memaop_pack(inputs.float(), packing, noise);
        vec![Value::Int(packed.words), Value::Float(packed.norms)]
    };
    let inputs = vec![input.into_ir()];
    let outputs = register::<B>("memaop_pack", &client, inputs, outputs, run);
    let [words, norms] = all(outputs);
    Packed {
        words,
        norms,
        packing,
    }
}

pub(crate) fn unpack<B: FusionBackend + MemAopOps>(
    packed: Packed<Fusion<B>>,
    dtype: FloatDType,
) -> FusionTensor<B::FusionRuntime> {
    let client = packed.norms.client.clone();
    let shape = Shape::new([packed.norms.shape[0], packed.packing.width]);
    let (inputs, read) = packed_ir::<B>(packed);
    let run =
        move |mut inputs: Values<B>| vec![Value::Float(B::memaop_unpack(read(&mut inputs), dtype))];
    let output = vec![(shape, dtype.into())];
    let [values] = all(register::<B>("memaop_unpack", &client, inputs, output, run));
    values
}

pub(crate) fn times<B: FusionBackend + MemAopOps>(
    packed: Packed<Fusion<B>>,
    values: FusionTensor<B::FusionRuntime>,
) -> FusionTensor<B::FusionRuntime> {
    let client = values.client.clone();
    let output = vec![(values.shape.clone(), values.dtype)];
    let (mut inputs, read) = packed_ir::<B>(packed);
    inputs.push(values.into_ir());
    let run = move |mut inputs: Values<B>| {
        let packed = read(&mut inputs);
        vec![Value::Float(B::memaop_times(packed, inputs.float()))]
    };
    let [products] = all(register::<B>("memaop_times", &client, inputs, output, run));
    products
}

/// The tensors of packed rows, and how to read them again.
fn packed_ir<B: FusionBackend>(
    packed: Packed<Fusion<B>>,
) -> (Vec<TensorIr>, impl Fn(&mut Values<B>) -> Packed<B>) {
    let packing = packed.packing;
    let tensors = vec![packed.words.into_ir(), packed.norms.into_ir()];
    let read = move |values: &mut Values<B>| Packed {
        words: values.int(),
        norms: values.float(),
        packing,
    };
    (tensors, read)
}

/// The tensors of an input, and how to read them again.
fn input_ir<B: FusionBackend>(
    input: Input<Fusion<B>>,
) -> (Vec<TensorIr>, impl Fn(&mut Values<B>) -> Input<B>) {
    let (tensors, packing) = match input {
        Input::Full(input) => (vec![input.into_ir()], None),
        Input::Packed(packed) => {
            let packing = packed.packing;
            (packed_ir::<B>(packed).0, Some(packing))
        }
    };
    let read = move |values: &mut Values<B>| match packing {
        None => Input::Full(values.float()),
        Some(packing) => Input::Packed(Packed {
            words: values.int(),
            norms: values.float(),
            packing,
        }),
    };
    (tensors, read)
}

/// A tensor of the inner backend.
enum Value<B: FusionBackend> {
    Float(FloatTensor<B>),
    Int(IntTensor<B>),
}

/// The inputs of an operation, in the order in which they were described.
struct Values<B: FusionBackend>(std::vec::IntoIter<Value<B>>);

impl<B: FusionBackend> Values<B> {
    fn is_empty(&self) -> bool {
        self.0.as_slice().is_empty()
    }

    fn float(&mut self) -> FloatTensor<B> {
        match self.0.next() {
            Some(Value::Float(tensor)) => tensor,
            _ => unreachable!("a float tensor was described"),
        }
    }

    fn int(&mut self) -> IntTensor<B> {
        match self.0.next() {
            Some(Value::Int(tensor)) => tensor,
            _ => unreachable!("a tensor of integers was described"),
        }
    }
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
    run: impl Fn(Values<B>) -> Vec<Value<B>> + Send + Sync + 'static,
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
    F: Fn(Values<B>) -> Vec<Value<B>> + Send + Sync + 'static,
{
    fn execute(&self, handles: &mut Handles<B>) -> Result<(), ExecutionError> {
        let inputs = self.description.inputs.iter();
        let inputs = inputs.map(|ir| match ir.dtype.is_float() {
            true => Value::Float(handles.get_float_tensor::<B>(ir)),
            false => Value::Int(handles.get_int_tensor::<B>(ir)),
        });
        let inputs: Vec<_> = inputs.collect();
        let results = (self.run)(Values(inputs.into_iter()));
        debug_assert_eq!(results.len(), self.description.outputs.len());
        for (output, result) in self.description.outputs.iter().zip(results) {
            match result {
                Value::Float(tensor) => handles.register_float_tensor::<B>(&output.id, tensor),
                Value::Int(tensor) => handles.register_int_tensor::<B>(&output.id, tensor),
            }
        }
        Ok(())
    }
}
