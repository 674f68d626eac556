//! The state in a module's record.
//!
//! A record holds tensors of the shapes that the module being loaded expects, but a memory has as
//! many rows as the batches it has seen. A state is therefore saved as integer tensors of which the first,
//! `state`, has one shape for ever and tells the shapes of the others: `input`, `grad` and `age`, the rows,
//! and `more`, for whatever the format comes to hold. Integers (the bits of the values) because what
//! maps the float parameters of a model, such as LoRA, casts or quantization, must not touch them.

use std::sync::{Arc, Mutex, PoisonError};

use burn::{
    backend::DeviceId,
    module::{ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{DType, Device, Int, Shape, Tensor, TensorData},
};

use super::{
    device::DeviceState,
    more::{More, halves, whole},
    offer::{Shown, show},
    rows::RowTensors,
    schedule::Progress,
};

/// The integers of `state`: the fields of [`Header`], each as a low and a high half, with room that earlier versions used.
const HEADER: usize = 16;

/// A state that is saved or loaded, and the device that it is of, if that is known.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) device: Option<DeviceId>,
    pub(super) state: DeviceState,
}

/// The ids of a state's tensors in the module tree.
#[derive(Debug, Clone)]
pub(super) struct StateRecord([ParamId; 5]);

/// The part of a state that has one shape for ever, and the shapes of the rest.
struct Header {
    step: u64,
    k: usize,
    rows: usize,
    /// The words in a value of a row.
    words: usize,
    /// The integers of `more`.
    more: usize,
}

impl Header {
    fn of(state: &DeviceState, more: usize) -> Self {
        let rows = state.rows.front();
        Self {
            step: state.progress.step,
            k: state.progress.k,
            rows: rows.map_or(0, |rows| rows.input.dims()[0]),
            words: rows.map_or(1, |rows| words_in(rows.input.dtype())),
            more,
        }
    }

    fn encode(&self) -> Vec<i32> {
        // Earlier versions kept here what they had measured; NaN stood for none.
        let none = f64::NAN.to_bits();
        let fields: [u64; HEADER / 2] = [
            self.step,
            self.k as u64,
            none,
            none,
            none,
            none,
            self.rows as u64,
            self.words as u64 | (self.more as u64) << 32,
        ];
        halves(&fields)
    }

    fn decode(values: &[i32]) -> Self {
        let field = |index: usize| whole(&values[2 * index..]);
        Self {
            step: field(0),
            k: field(1) as usize,
            rows: field(6) as usize,
            words: (field(7) & 0xFFFF_FFFF) as usize,
            more: (field(7) >> 32) as usize,
        }
    }
}

impl StateRecord {
    pub(super) fn new() -> Self {
        Self(std::array::from_fn(|_| ParamId::new()))
    }

    /// Visits the first of some states, and the others as parts of it.
    pub(super) fn visit<V: ModuleVisitor>(
        &self,
        states: Vec<Saved>,
        shown: Option<Shown>,
        visitor: &mut V,
    ) {
        let numbers = 0..states.len().saturating_sub(1);
        let mut states = states.into_iter();
        if let Some(first) = states.next() {
            self.visit_state(&first, numbers.clone().collect(), shown, visitor);
        }
        for (number, saved) in numbers.zip(states) {
            let name = worker_name(number);
            visitor.enter_module(&name, CONTAINER);
            Self::new().visit_state(&saved, Vec::new(), None, visitor);
            visitor.exit_module(&name, CONTAINER);
        }
    }

    /// `more` and the rows are lazy: most visitors do not look at the values.
    fn visit_state<V: ModuleVisitor>(
        &self,
        Saved { device, state }: &Saved,
        others: Vec<usize>,
        shown: Option<Shown>,
        visitor: &mut V,
    ) {
        let more = More::of(state, *device, others);
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

        let Some(rows) = state.rows.front().cloned() else {
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

    /// The states that the mapper puts in place of the present ones, if it is loading a record, with their rows on
    /// `device`.
    pub(super) fn map<M: ModuleMapper>(
        &self,
        widths: [usize; 2],
        device: Option<&Device>,
        mapper: &mut M,
    ) -> Option<Vec<Saved>> {
        let (first, others) = self.map_state(widths, device, mapper)?;
        let mut states = vec![first];
        for number in others {
            let name = worker_name(number);
            mapper.enter_module(&name, CONTAINER);
            let other = self.map_state(widths, device, mapper);
            mapper.exit_module(&name, CONTAINER);
            states.extend(other.map(|(state, _)| state));
        }
        Some(states)
    }

    /// A state, and the numbers of the others that the record names.
    fn map_state<M: ModuleMapper>(
        &self,
        widths: [usize; 2],
        device: Option<&Device>,
        mapper: &mut M,
    ) -> Option<(Saved, Vec<usize>)> {
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
            let device = device.cloned().unwrap_or_else(host);
            from_words(words, [header.rows, width], header.words, &device)
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
        let state = DeviceState {
            progress: Progress {
                step: header.step,
                k: header.k,
                chosen: more.chosen,
                input_chosen: more.input_chosen,
            },
            // Records without the number are of versions that drew once a step at most, but for layers used several
            // times in one.
            passes: more.passes.unwrap_or(header.step),
            noise: more.noise,
            reading: more.reading,
            input_reading: more.input_reading,
            rows: rows.into_iter().collect(),
            ..DeviceState::default()
        };
        let saved = Saved {
            device: more.device,
            state,
        };
        Some((saved, more.workers))
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

    /// An integer tensor of the state; `values` makes it when someone looks at it.
    fn tensor<const D: usize>(
        &self,
        index: usize,
        shape: [usize; D],
        values: impl FnOnce(&Device) -> Tensor<D, Int> + Send + Sync + 'static,
    ) -> Param<Tensor<D, Int>> {
        Param::uninitialized(
            self.0[index],
            move |device, _| values(device),
            host(),
            false,
            Shape::new(shape),
        )
    }
}

/// A device in main memory, if there is one: what is saved has been copied to the host, and is not to be copied back.
fn host() -> Device {
    #[cfg(feature = "flex")]
    return Device::flex();
    #[cfg(all(not(feature = "flex"), feature = "ndarray"))]
    return Device::ndarray();
    #[cfg(not(any(feature = "flex", feature = "ndarray")))]
    Device::default()
}

pub(super) const CONTAINER: &str = "Struct:LayerMemory";

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
            let values = TensorData::new(values, shape);
            match device.supports_dtype(DType::F64) {
                true => Tensor::from_data(values, (device, DType::F64)),
                false => Tensor::from_data(values.convert::<f32>(), (device, DType::F32)),
            }
        }
        _ => return None,
    };
    Some(tensor)
}
