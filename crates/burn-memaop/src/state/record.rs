//! The memory in a module's record.
//!
//! A record holds tensors of the shapes that the module being loaded expects, but a memory has as
//! many rows as the batches it has seen. It is therefore saved as integer tensors of which the first,
//! `state`, has one shape for ever and tells the shapes of the others: `input`, `grad` and `age`, the rows,
//! and `more`, for whatever the format comes to hold. Integers (the bits of the values) because what
//! maps the float parameters of a model, such as LoRA, casts or quantization, must not touch them.

use std::sync::{Arc, Mutex, PoisonError};

use burn::{
    module::{ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{DType, Device, Int, Shape, Tensor, TensorData},
};

use super::{
    memory::{Carried, MemoryState},
    more::{More, halves, whole},
    offer::{Shown, show},
    reading::Reading,
    rows::RowTensors,
    schedule::Progress,
};

/// The integers of `state`: the fields of [`Header`], each as a low and a high half.
const HEADER: usize = 16;

/// Where in the module tree a memory is saved.
#[derive(Debug, Clone)]
pub(crate) struct MemoryRecord {
    ids: [ParamId; 5],
    device: Device,
}

/// A state without its tensors, and their shapes.
struct Header {
    progress: Progress,
    carried: Option<Carried>,
    rate: Option<f64>,
    rows: usize,
    /// The words in a value of a row.
    words: usize,
    /// The integers of `more`.
    more: usize,
}

impl Header {
    fn of(state: &MemoryState, more: usize) -> Self {
        let rows = state.rows.as_ref();
        Self {
            progress: state.progress,
            carried: state.carried.clone(),
            rate: state.rate,
            rows: rows.map_or(0, |rows| rows.input.dims()[0]),
            words: rows.map_or(1, |rows| words_in(rows.input.dtype())),
            more,
        }
    }

    /// Waits for the device, if it has not computed the share of the score mass yet.
    fn encode(&self) -> Vec<i32> {
        let Progress { step, k, ratio, .. } = self.progress;
        // NaN stands for none.
        let bits = |value: Option<f64>| value.unwrap_or(f64::NAN).to_bits();
        let carried = self.carried.as_ref();
        let fields: [u64; HEADER / 2] = [
            step,
            k as u64,
            bits(ratio),
            bits(carried.map(|carried| carried.ratio)),
            bits(carried.map(Carried::read)),
            bits(self.rate),
            self.rows as u64,
            self.words as u64 | (self.more as u64) << 32,
        ];
        halves(&fields)
    }

    fn decode(values: &[i32]) -> Self {
        let field = |index: usize| whole(&values[2 * index..]);
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
                chosen: None,
                input_chosen: None,
            },
            carried: share(3).zip(share(4)).map(|(ratio, share)| Carried {
                ratio,
                share: Reading::there([share]),
            }),
            rate: Some(f64::from_bits(field(5))).filter(|rate| *rate > 0.0 && rate.is_finite()),
            rows: field(6) as usize,
            words: (field(7) & 0xFFFF_FFFF) as usize,
            more: (field(7) >> 32) as usize,
        }
    }
}

impl MemoryRecord {
    pub(crate) fn new(device: &Device) -> Self {
        Self {
            ids: std::array::from_fn(|_| ParamId::new()),
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
        workers: &[(usize, MemoryState)],
        shown: Shown,
        visitor: &mut V,
    ) {
        let workers_of = workers.iter().map(|(number, _)| *number).collect();
        self.visit_state(state, workers_of, Some(shown), visitor);
        for (number, state) in workers {
            let name = worker_name(*number);
            visitor.enter_module(&name, CONTAINER);
            let record = Self::new(&self.device);
            record.visit_state(state, Vec::new(), None, visitor);
            visitor.exit_module(&name, CONTAINER);
        }
    }

    /// `more` and the rows are lazy: most visitors do not look at the values.
    fn visit_state<V: ModuleVisitor>(
        &self,
        state: &MemoryState,
        workers: Vec<usize>,
        shown: Option<Shown>,
        visitor: &mut V,
    ) {
        let more = More::of(state, workers);
        let header = Header::of(state, more.len());
        let words = header.words;
        let header = self.tensor(0, [HEADER], move |device| {
            ints(header.encode(), [HEADER], device)
        });
        at(visitor, "state", |visitor| match shown {
            Some(shown) => show(shown, || visitor.visit_int(&header)),
            None => visitor.visit_int(&header),
        });
        if more.len() > 0 {
            let shape = [more.len()];
            let more = self.tensor(4, shape, move |device| ints(more.encode(), shape, device));
            at(visitor, "more", |visitor| visitor.visit_int(&more));
        }

        let Some(rows) = state.rows.clone() else {
            return;
        };
        let fields = [
            ("input", rows.input),
            ("grad", rows.grad),
            ("age", rows.age),
        ];
        for (index, (name, values)) in (1..).zip(fields) {
            let [rows, width] = values.dims();
            let shape = [rows, width * words];
            let param = self.tensor(index, shape, move |device| {
                ints(to_words(values, words), shape, device)
            });
            at(visitor, name, |visitor| visitor.visit_int(&param));
        }
    }

    /// The states of the layer and of its workers that the mapper puts in place of the present ones, if it
    /// is loading a record.
    pub(crate) fn map<M: ModuleMapper>(
        &self,
        widths: [usize; 2],
        mapper: &mut M,
    ) -> Option<(MemoryState, Vec<(usize, MemoryState)>)> {
        let (state, workers) = self.map_state(widths, mapper)?;
        let workers = workers.into_iter().flat_map(|number| {
            let name = worker_name(number);
            mapper.enter_module(&name, CONTAINER);
            let worker = self.map_state(widths, mapper);
            mapper.exit_module(&name, CONTAINER);
            worker.map(|(state, _)| (number, state))
        });
        let workers = workers.collect();
        Some((state, workers))
    }

    /// A state, and the numbers of the workers that the record names.
    fn map_state<M: ModuleMapper>(
        &self,
        widths: [usize; 2],
        mapper: &mut M,
    ) -> Option<(MemoryState, Vec<usize>)> {
        let header = self.load(mapper, "state", 0, [HEADER])?;
        let header = Header::decode(&header);
        // Where partial loading is allowed, a memory that cannot be read is as one that is missing.
        let more = match header.more {
            0 => More::default(),
            length => {
                let more = self.load(mapper, "more", 4, [length])?;
                More::decode(&more, |name| self.refuse(mapper, name))?
            }
        };

        // Words that no dtype has, or rows that the record does not hold, meet a shape that the
        // record's tensors do not have, which the mapper reports.
        let mut load = |name, index, width: usize| {
            let shape = [header.rows, width.saturating_mul(header.words)];
            let words = self.load(mapper, name, index, shape)?;
            from_words(words, [header.rows, width], header.words, &self.device)
        };
        let rows = match header.rows {
            0 => None,
            _ => {
                let [d_input, d_output] = widths;
                let input = load("input", 1, d_input);
                let grad = load("grad", 2, d_output);
                let age = load("age", 3, 1);
                let rows = input.zip(grad).zip(age);
                rows.map(|((input, grad), age)| RowTensors { input, grad, age })
            }
        };
        let state = MemoryState {
            progress: Progress {
                chosen: more.chosen,
                input_chosen: more.input_chosen,
                ..header.progress
            },
            carried: header.carried,
            noise: more.noise,
            reading: more.reading,
            input_reading: more.input_reading,
            rows,
            rate: header.rate,
            ..MemoryState::default()
        };
        Some((state, more.workers))
    }

    /// Offers the mapper a tensor, and returns what it loads in its place, if it does.
    fn load<M: ModuleMapper, const D: usize>(
        &self,
        mapper: &mut M,
        name: &str,
        index: usize,
        shape: [usize; D],
    ) -> Option<Vec<i32>> {
        let loaded = Arc::new(Mutex::new(None));
        let slot = loaded.clone();
        // Whoever asks for the value wants to know its type; a damaged shape could not be allocated.
        let param = self.tensor(index, shape, |device| {
            Tensor::zeros([1; D], (device, DType::I32))
        });
        let param = param.load_mapper(move |tensor: Tensor<D, Int>| {
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
            self.refuse(mapper, &format!("{name} of type I32"));
            return None;
        }
        Some(loaded.into_data().iter::<i32>().collect())
    }

    /// A mapper cannot be told of an error, but it reports a tensor that the record does not have by its
    /// name.
    fn refuse<M: ModuleMapper>(&self, mapper: &mut M, name: &str) {
        let param = self.tensor(4, [1], |device| ints(vec![0], [1], device));
        mapper.enter_module(name, CONTAINER);
        mapper.map_int(param);
        mapper.exit_module(name, CONTAINER);
    }

    /// An integer tensor of the memory; `values` makes it when someone looks at it.
    fn tensor<const D: usize>(
        &self,
        index: usize,
        shape: [usize; D],
        values: impl FnOnce(&Device) -> Tensor<D, Int> + Send + Sync + 'static,
    ) -> Param<Tensor<D, Int>> {
        Param::uninitialized(
            self.ids[index],
            move |device, _| values(device),
            self.device.clone(),
            false,
            Shape::new(shape),
        )
    }
}

const CONTAINER: &str = "Struct:LayerMemory";

fn at<V: ModuleVisitor>(visitor: &mut V, name: &str, visit: impl FnOnce(&mut V)) {
    visitor.enter_module(name, CONTAINER);
    visit(visitor);
    visitor.exit_module(name, CONTAINER);
}

fn worker_name(number: usize) -> String {
    format!("worker{number}")
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
