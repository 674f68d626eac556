//! The memory in a module's record.
//!
//! A record holds tensors of the shapes that the module being loaded expects, but a memory has as
//! many rows as the batches it has seen. It is therefore saved as four integer tensors, and the
//! first of them tells the shapes of the others. Integers (the bits of the values) because what
//! maps the float parameters of a model, such as LoRA, casts or quantization, must not touch them.

use std::sync::{Arc, Mutex, PoisonError};

use burn::{
    module::{ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{DType, Device, Int, Shape, Tensor, TensorData},
};

use crate::{
    memory::{Measured, MemoryHandle, MemoryState, RowTensors},
    schedule::Progress,
    tree::{Offer, with_offer},
};

/// Where in the module tree a memory is saved, and in which shapes.
#[derive(Debug, Clone)]
pub(crate) struct MemoryRecord {
    ids: [ParamId; 4],
    d_input: usize,
    d_output: usize,
    device: Device,
}

/// The integers of `memory.state`: the fields of [`Header`], each as a low and a high half.
const HEADER: usize = 16;

struct Header {
    progress: Progress,
    measured: Option<Measured>,
    rate: Option<f64>,
    rows: usize,
    /// The words in a value of a row.
    words: usize,
}

impl Header {
    fn encode(&self) -> Vec<i32> {
        let Progress { step, k, ratio } = self.progress;
        // NaN stands for none.
        let bits = |value: Option<f64>| value.unwrap_or(f64::NAN).to_bits();
        let measured = self.measured.as_ref();
        let fields: [u64; HEADER / 2] = [
            step,
            k as u64,
            bits(ratio),
            bits(measured.map(|measured| measured.ratio)),
            bits(measured.map(Measured::read)),
            bits(self.rate),
            self.rows as u64,
            self.words as u64,
        ];
        let halves = fields.map(|field| [field as i32, (field >> 32) as i32]);
        halves.concat()
    }

    fn decode(values: &[i32], device: &Device) -> Self {
        let field = |index: usize| {
            let half = |value: i32| u64::from(value as u32);
            half(values[2 * index]) | half(values[2 * index + 1]) << 32
        };
        // A share of the rows; anything else in the record is no measurement.
        let share = |index: usize| {
            let value = f64::from_bits(field(index));
            (0.0..=1.0).contains(&value).then_some(value)
        };
        Self {
            progress: Progress {
                step: field(0),
                k: field(1) as usize,
                ratio: share(2),
            },
            measured: share(3).zip(share(4)).map(|(ratio, share)| Measured {
                ratio,
                share: Tensor::from_data([share as f32], (device, DType::F32)),
            }),
            rate: Some(f64::from_bits(field(5))).filter(|rate| *rate > 0.0 && rate.is_finite()),
            rows: field(6) as usize,
            words: field(7) as usize,
        }
    }
}

impl MemoryRecord {
    pub(crate) fn new(d_input: usize, d_output: usize, device: &Device) -> Self {
        Self {
            ids: std::array::from_fn(|_| ParamId::new()),
            d_input,
            d_output,
            device: device.clone().inner(),
        }
    }

    pub(crate) fn on_device(&self, device: &Device) -> Self {
        Self {
            device: device.clone().inner(),
            ..self.clone()
        }
    }

    pub(crate) fn visit<V: ModuleVisitor>(
        &self,
        state: &MemoryState,
        memory: &MemoryHandle,
        visitor: &mut V,
    ) {
        let rows = state.rows.clone();
        let header = Header {
            progress: state.progress,
            measured: state.measured.clone(),
            rate: state.rate,
            rows: rows.as_ref().map_or(0, |rows| rows.input.dims()[0]),
            words: rows.as_ref().map_or(1, |rows| words_in(rows.input.dtype())),
        };
        let (count, words) = (header.rows, header.words);
        let device = self.device.clone();
        let header = Param::uninitialized(
            self.ids[0],
            move |device, _| ints(header.encode(), [HEADER], device),
            device,
            false,
            Shape::new([HEADER]),
        );
        let offer = Offer {
            d_input: self.d_input,
            d_output: self.d_output,
            memory: memory.clone(),
        };
        at(visitor, "state", |visitor| {
            with_offer(offer, || visitor.visit_int(&header));
        });

        let Some(rows) = rows else { return };
        let fields = [
            ("input", self.ids[1], rows.input, self.d_input),
            ("grad", self.ids[2], rows.grad, self.d_output),
            ("age", self.ids[3], rows.age, 1),
        ];
        for (name, id, values, width) in fields {
            // Lazy: most visitors do not look at the values.
            let param: Param<Tensor<2, Int>> = Param::uninitialized(
                id,
                move |device, _| {
                    let [rows, width] = values.dims();
                    ints(to_words(values, words), [rows, width * words], device)
                },
                self.device.clone(),
                false,
                Shape::new([count, width * words]),
            );
            at(visitor, name, |visitor| visitor.visit_int(&param));
        }
    }

    /// The state that the mapper puts in place of the present one, if it is loading a record.
    pub(crate) fn map<M: ModuleMapper>(&self, mapper: &mut M) -> Option<MemoryState> {
        let header = self.load(mapper, "state", self.ids[0], [HEADER])?;
        let header = Header::decode(&header, &self.device);

        // Words that no dtype has, or rows that the record does not hold, meet a shape that the
        // record's tensors do not have, which the mapper reports.
        let shape = |width: usize| [header.rows, width.saturating_mul(header.words)];
        let mut load = |name, id, width| {
            let words = self.load(mapper, name, id, shape(width))?;
            from_words(words, [header.rows, width], header.words, &self.device)
        };
        let rows = match header.rows {
            0 => None,
            _ => {
                let input = load("input", self.ids[1], self.d_input);
                let grad = load("grad", self.ids[2], self.d_output);
                let age = load("age", self.ids[3], 1);
                let rows = input.zip(grad).zip(age);
                rows.map(|((input, grad), age)| RowTensors { input, grad, age })
            }
        };
        Some(MemoryState {
            progress: header.progress,
            measured: header.measured,
            rows,
            rate: header.rate,
            ..MemoryState::default()
        })
    }

    /// Offers the mapper a tensor, and returns what it loads in its place, if it does.
    fn load<M: ModuleMapper, const D: usize>(
        &self,
        mapper: &mut M,
        name: &str,
        id: ParamId,
        shape: [usize; D],
    ) -> Option<Vec<i32>> {
        let loaded = Arc::new(Mutex::new(None));
        let slot = loaded.clone();
        let param: Param<Tensor<D, Int>> = Param::uninitialized(
            id,
            move |device, _| Tensor::zeros(shape, (device, DType::I32)),
            self.device.clone(),
            false,
            Shape::new(shape),
        )
        .load_mapper(move |tensor: Tensor<D, Int>| {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(tensor.clone());
            tensor
        });
        mapper.enter_module(name, CONTAINER);
        mapper.map_int(param);
        mapper.exit_module(name, CONTAINER);

        let loaded = loaded
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()?;
        if loaded.dtype() != DType::I32 {
            // A mapper cannot be told of an error, but it reports a shape that does not fit.
            let id = ParamId::new();
            let unfit = Param::uninitialized(
                id,
                |device, _| Tensor::<1, Int>::zeros([0], (device, DType::I32)),
                self.device.clone(),
                false,
                Shape::new([0]),
            );
            mapper.enter_module(name, CONTAINER);
            mapper.map_int(unfit);
            mapper.exit_module(name, CONTAINER);
            return None;
        }
        Some(loaded.into_data().iter::<i32>().collect())
    }
}

const CONTAINER: &str = "Struct:RowMemory";

fn at<V: ModuleVisitor>(visitor: &mut V, name: &str, visit: impl FnOnce(&mut V)) {
    visitor.enter_module(name, CONTAINER);
    visit(visitor);
    visitor.exit_module(name, CONTAINER);
}

fn ints<const D: usize>(values: Vec<i32>, shape: [usize; D], device: &Device) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::I32))
}

fn words_in(dtype: DType) -> usize {
    match dtype {
        DType::F64 => 2,
        _ => 1,
    }
}

/// The bits of each value: one word of an `f32`, in which a half is held too, or two of an `f64`,
/// the lower first.
fn to_words(values: Tensor<2>, words: usize) -> Vec<i32> {
    let data = values.into_data();
    match words {
        2 => {
            let words = |value: f64| {
                let bits = value.to_bits();
                [bits as i32, (bits >> 32) as i32]
            };
            data.iter::<f64>().flat_map(words).collect()
        }
        _ => data.iter::<f32>().map(|v| v.to_bits() as i32).collect(),
    }
}

fn from_words(
    words: Vec<i32>,
    shape: [usize; 2],
    words_in_value: usize,
    device: &Device,
) -> Option<Tensor<2>> {
    let tensor = match words_in_value {
        1 => {
            let values: Vec<f32> = words.iter().map(|&w| f32::from_bits(w as u32)).collect();
            Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
        }
        2 => {
            let value = |pair: &[i32]| {
                f64::from_bits(u64::from(pair[0] as u32) | u64::from(pair[1] as u32) << 32)
            };
            let values: Vec<f64> = words.chunks_exact(2).map(value).collect();
            Tensor::from_data(TensorData::new(values, shape), (device, DType::F64))
        }
        _ => return None,
    };
    Some(tensor)
}
