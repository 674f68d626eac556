//! The state in a module's record.
//!
//! A module loads tensors of the shapes that it expects, but a memory has as many rows as its
//! batches. So a state is saved as two tensors of integers. `header` has a fixed shape and tells
//! the length of `content`, which holds the states of all devices as CBOR. Both are made when their
//! values are first used, so a record of other parameters does not wait for the device. The tensors
//! are integers because LoRA, casts and quantization map the float parameters of a model, and must
//! not touch a state. Fields can be added to the CBOR, because a reader skips names that it does
//! not know.

use std::sync::{Arc, Mutex, PoisonError};

use burn::{
    backend::DeviceId,
    module::{ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{DType, Device, Int, Shape, Tensor, TensorData},
};
use serde::{Deserialize, Serialize};

use super::{
    choice::{Averages, Figures},
    device::{DeviceState, Progress},
    offer::{Shown, show},
    reading::Reading,
    rows::Rows,
};

/// The version of the format. It rises with every change that an older reader must not skip.
const VERSION: i32 = 2;
/// The number of integers in `header`: the version, and the number of integers in `content`.
const HEADER: usize = 3;

/// The state on one device.
#[derive(Debug)]
pub(super) struct SavedState {
    /// None if the record does not name it.
    pub(super) device: Option<DeviceId>,
    pub(super) state: DeviceState,
}

/// A state as it is written.
#[derive(Serialize, Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Written {
    /// The type and the index of the device.
    device: Option<[u16; 2]>,
    step: u64,
    k: usize,
    passes: u64,
    chosen: Option<f64>,
    input_chosen: Option<f64>,
    noise: Averages,
    figures: Option<Figures>,
    input_figures: Option<Figures>,
    /// `m^X`, `m^G` and the ages of each set of rows.
    rows: Vec<[TensorData; 3]>,
}

impl Written {
    /// Reads the state, and waits for the device.
    fn of(SavedState { device, state }: &SavedState) -> Self {
        let rows = state.rows.iter().map(|rows| {
            [&rows.input, &rows.grad, &rows.age].map(|tensor| tensor.clone().into_data())
        });
        Self {
            device: device
                .filter(|_| !state.is_blank())
                .map(|id| [id.type_id, id.index_id]),
            step: state.progress.step,
            k: state.progress.k,
            passes: state.passes,
            chosen: state.progress.chosen,
            input_chosen: state.progress.input_chosen,
            noise: state.noise,
            figures: state.reading.as_ref().map(Reading::read),
            input_figures: state.input_reading.as_ref().map(Reading::read),
            rows: rows.collect(),
        }
    }

    /// Restores the state of a layer with these widths on a device. An error says what it must be.
    fn restore(self, widths: [usize; 2], on: &Device) -> Result<SavedState, String> {
        let rows = self
            .rows
            .into_iter()
            .map(|rows| restored_rows(rows, widths, on));
        // Averages that no measurement leads to are dropped, and so is what was chosen by them.
        let is_sound = self.noise.is_sound();
        let share =
            |chosen: Option<f64>| chosen.filter(|&share| is_sound && share > 0.0 && share <= 1.0);
        let noise = match is_sound {
            true => self.noise,
            false => Averages::default(),
        };
        let state = DeviceState {
            progress: Progress {
                step: self.step,
                k: self.k,
                chosen: share(self.chosen),
                input_chosen: share(self.input_chosen),
            },
            passes: self.passes,
            noise,
            reading: self.figures.map(Reading::there),
            input_reading: self.input_figures.map(Reading::there),
            rows: rows.collect::<Result<_, _>>()?,
            ..DeviceState::default()
        };
        let device = self
            .device
            .map(|[type_id, index_id]| DeviceId { type_id, index_id });
        Ok(SavedState { device, state })
    }
}

fn restored_rows(
    rows: [TensorData; 3],
    [d_input, d_output]: [usize; 2],
    device: &Device,
) -> Result<Rows, String> {
    let count = rows[0].shape().first().copied().unwrap_or(0);
    let shapes = [[count, d_input], [count, d_output], [count, 1]];
    let found: Vec<_> = rows.iter().map(|data| data.shape().to_vec()).collect();
    if found != shapes.map(|shape| shape.to_vec()) {
        return Err(format!(
            "a memory of the shapes {shapes:?}, as the layer has them: the record has {found:?}"
        ));
    }
    let is_sound = |data: &TensorData| matches!(data.dtype(), DType::F32 | DType::F64);
    if !rows.iter().all(is_sound) {
        return Err("a memory in single or double precision".to_string());
    }
    let [input, grad, age] = rows.map(|data| {
        let data = match device.supports_dtype(data.dtype()) {
            true => data,
            false => data.convert::<f32>(),
        };
        let dtype = data.dtype();
        Tensor::from_data(data, (device, dtype))
    });
    Ok(Rows { input, grad, age })
}

/// The ids of a state's tensors in the module tree.
#[derive(Debug, Clone)]
pub(super) struct StateRecord([ParamId; 2]);

impl StateRecord {
    pub(super) fn new() -> Self {
        Self(std::array::from_fn(|_| ParamId::new()))
    }

    /// Shows a visitor the tensor by which a layer is found, and the states to save, if any.
    pub(super) fn visit<V: ModuleVisitor>(
        &self,
        states: Vec<SavedState>,
        shown: Option<Shown>,
        visitor: &mut V,
    ) {
        // A visitor that is no record sees a version that stands for no state.
        let (version, length) = match states.is_empty() {
            true => (0, 0),
            false => (VERSION, most_words(&states)),
        };
        let header = vec![version, length as i32, (length as u64 >> 32) as i32];
        let header = self.tensor(0, [HEADER], |device| ints(header, device));
        visitor.enter_module("header", CONTAINER);
        match shown {
            Some(shown) => show(shown, || visitor.visit_int(&header)),
            None => visitor.visit_int(&header),
        }
        visitor.exit_module("header", CONTAINER);
        if length > 0 {
            let content = self.tensor(1, [length], move |device| {
                let mut words = words(&encoded(&states));
                assert!(words.len() <= length, "the content is as long as it can be");
                words.resize(length, 0);
                ints(words, device)
            });
            visitor.enter_module("content", CONTAINER);
            visitor.visit_int(&content);
            visitor.exit_module("content", CONTAINER);
        }
    }

    /// The states that the mapper puts in the place of the present ones, if it is loading a record.
    /// The layer has these widths, and its rows are to be on `device`.
    pub(super) fn map<M: ModuleMapper>(
        &self,
        widths: [usize; 2],
        device: Option<&Device>,
        mapper: &mut M,
    ) -> Option<Vec<SavedState>> {
        let header = self.load(mapper, "header", 0, HEADER)?;
        let &[version, low, high] = header.as_slice() else {
            return None;
        };
        if version > VERSION {
            self.refuse(mapper, &format!(
                "a format that this version of burn-memaop reads: the record has version {version}, and {VERSION} is \
                 the latest known"
            ));
            return None;
        }
        if version == 0 {
            return None;
        }
        let length = u64::from(low as u32) | u64::from(high as u32) << 32;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let content = self.load(mapper, "content", 1, length)?;
        let device = device.cloned().unwrap_or_else(host);
        match decoded(&content, widths, &device) {
            Ok(states) => Some(states),
            // Where partial loading is allowed, a state that cannot be read counts as missing.
            Err(rule) => {
                self.refuse(mapper, &rule);
                None
            }
        }
    }

    /// Offers the mapper a tensor, and returns the values that it loads in its place, if it does.
    fn load<M: ModuleMapper>(
        &self,
        mapper: &mut M,
        name: &str,
        index: usize,
        length: usize,
    ) -> Option<Vec<i32>> {
        let loaded = Arc::new(Mutex::new(None));
        let slot = loaded.clone();
        // A mapper reads this value only for its type, and a damaged length could not be allocated.
        let param = self.tensor(index, [length], |device| ints(vec![0], device));
        let param = param.load_mapper(move |tensor: Tensor<1, Int>| {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(tensor.clone());
            tensor
        });
        mapper.enter_module(name, CONTAINER);
        mapper.map_int(param);
        mapper.exit_module(name, CONTAINER);

        let mut loaded = loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = loaded.take()?;
        if loaded.dtype() != DType::I32 {
            self.refuse(mapper, &format!("{name} of type I32"));
            return None;
        }
        Some(loaded.into_data().iter::<i32>().collect())
    }

    /// Makes the mapper report an error, as the name of a tensor that the record does not have.
    fn refuse<M: ModuleMapper>(&self, mapper: &mut M, name: &str) {
        let param = self.tensor(1, [1], |device| ints(vec![0], device));
        mapper.enter_module(name, CONTAINER);
        mapper.map_int(param);
        mapper.exit_module(name, CONTAINER);
    }

    /// A tensor of the state. `values` makes it when its value is first used.
    fn tensor(
        &self,
        index: usize,
        shape: [usize; 1],
        values: impl FnOnce(&Device) -> Tensor<1, Int> + Send + Sync + 'static,
    ) -> Param<Tensor<1, Int>> {
        Param::uninitialized(
            self.0[index],
            move |device, _| values(device),
            host(),
            false,
            Shape::new(shape),
        )
    }
}

/// The most integers that states take, which follows from the shapes of their rows.
fn most_words(states: &[SavedState]) -> usize {
    // The names and numbers of a state, and those of a tensor.
    const STATE: usize = 1024;
    const TENSOR: usize = 128;
    let of_tensor =
        |tensor: &Tensor<2>| TENSOR + tensor.shape().num_elements() * tensor.dtype().size();
    let of_rows = |rows: &Rows| {
        [&rows.input, &rows.grad, &rows.age]
            .map(of_tensor)
            .iter()
            .sum::<usize>()
    };
    let of_state = |saved: &SavedState| STATE + saved.state.rows.iter().map(of_rows).sum::<usize>();
    states.iter().map(of_state).sum::<usize>().div_ceil(4)
}

fn encoded(states: &[SavedState]) -> Vec<u8> {
    let states: Vec<_> = states.iter().map(Written::of).collect();
    let mut content = Vec::new();
    ciborium::into_writer(&states, &mut content).expect("a vector can be written to");
    content
}

fn decoded(words: &[i32], widths: [usize; 2], device: &Device) -> Result<Vec<SavedState>, String> {
    let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    // Zeros may follow.
    let states: Vec<Written> = ciborium::from_reader(bytes.as_slice())
        .map_err(|error| format!("a sound state: {error}"))?;
    let states = states
        .into_iter()
        .map(|saved| saved.restore(widths, device));
    states.collect()
}

/// Puts four bytes in each word, with zeros after the last byte.
fn words(bytes: &[u8]) -> Vec<i32> {
    let word = |bytes: &[u8]| {
        let mut whole = [0; 4];
        whole[..bytes.len()].copy_from_slice(bytes);
        i32::from_le_bytes(whole)
    };
    bytes.chunks(4).map(word).collect()
}

/// A device on the host, if there is one. Saved values are there, and must not be copied back.
fn host() -> Device {
    #[cfg(feature = "flex")]
    return Device::flex();
    #[cfg(all(not(feature = "flex"), feature = "ndarray"))]
    return Device::ndarray();
    #[cfg(not(any(feature = "flex", feature = "ndarray")))]
    Device::default()
}

pub(super) const CONTAINER: &str = "Struct:LayerState";

fn ints(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let shape = [values.len()];
    Tensor::from_data(TensorData::new(values, shape), (device, DType::I32))
}
