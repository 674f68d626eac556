//! The room to grow of a record: what its `more` holds.
//!
//! It is a version and entries of a tag, a length and so many integers. Readers skip tags that they do
//! not know, so entries can be added; the version counts what no older reader may skip. A state without
//! `more` is of the first format, which had nothing else to tell.

use burn::backend::DeviceId;

use super::{
    device::DeviceState,
    noise_scale::{Averages, DIVISORS, FIGURES},
    reading::Reading,
};

/// The version of `more` that is written, and the latest that is read.
const VERSION: i32 = 1;
/// The entry of `more` with the numbers of further states, which are under `worker<number>`: those of other devices, and of
/// this one where it has several sets of rows.
const WORKERS: i32 = 1;
/// The entry of `more` with what has been measured of the noise: the share of the rows that was chosen, [`Averages`], then the figures of the last
/// measurement, each number as a low and a high half.
const NOISE: i32 = 2;
const NOISE_NUMBERS: usize = 3 + DIVISORS.len() + FIGURES;
/// The same of the gradient of the input: the share that was chosen, what sampling adds, the figures.
const INPUT: i32 = 3;
const INPUT_NUMBERS: usize = 1 + DIVISORS.len() + FIGURES;
/// The entry of `more` with the device of the state: the number of its type and its own.
const DEVICE: i32 = 4;
/// The entry of `more` with the number of forward passes that have drawn random bits, as a low and a high half.
const PASSES: i32 = 5;
/// More of them are no record of a training.
const MOST_WORKERS: usize = 4096;

/// What `more` holds.
#[derive(Default)]
pub(super) struct More {
    pub(super) workers: Vec<usize>,
    pub(super) device: Option<DeviceId>,
    pub(super) passes: Option<u64>,
    pub(super) chosen: Option<f64>,
    pub(super) noise: Averages,
    pub(super) reading: Option<Reading<FIGURES>>,
    pub(super) input_chosen: Option<f64>,
    pub(super) input_reading: Option<Reading<FIGURES>>,
}

impl More {
    pub(super) fn of(state: &DeviceState, device: Option<DeviceId>, workers: Vec<usize>) -> Self {
        Self {
            workers,
            device: device.filter(|_| !state.is_blank()),
            passes: (!state.is_blank()).then_some(state.passes),
            chosen: state.progress.chosen,
            noise: state.noise,
            reading: state.reading.clone(),
            input_chosen: state.progress.input_chosen,
            input_reading: state.input_reading.clone(),
        }
    }

    fn has_noise(&self) -> bool {
        let Averages { weight, .. } = self.noise;
        self.reading.is_some() || weight > 0.0
    }

    fn has_input(&self) -> bool {
        self.input_reading.is_some() || self.noise.input_added.is_some()
    }

    /// The number of integers, 0 where there is nothing to tell.
    pub(super) fn len(&self) -> usize {
        let entries = [
            (!self.workers.is_empty(), self.workers.len()),
            (self.has_noise(), 2 * NOISE_NUMBERS),
            (self.has_input(), 2 * INPUT_NUMBERS),
            (self.device.is_some(), 2),
            (self.passes.is_some(), 2),
        ];
        let entries = entries.into_iter().filter(|(there, _)| *there);
        match entries.map(|(_, length)| 2 + length).sum() {
            0 => 0,
            entries => 1 + entries,
        }
    }

    /// Waits for the device, if it has not measured the noise yet.
    pub(super) fn encode(&self) -> Vec<i32> {
        let mut more = vec![VERSION];
        if !self.workers.is_empty() {
            more.extend([WORKERS, self.workers.len() as i32]);
            more.extend(self.workers.iter().map(|&number| number as i32));
        }
        if self.has_noise() {
            let Averages {
                weight,
                noise,
                added,
                ..
            } = self.noise;
            let numbers = [self.chosen.unwrap_or(f64::NAN), weight, noise];
            let numbers = numbers
                .into_iter()
                .chain(added)
                .chain(figures(&self.reading));
            more.extend([NOISE, 2 * NOISE_NUMBERS as i32]);
            more.extend(bits(numbers));
        }
        if self.has_input() {
            let chosen = self.input_chosen.unwrap_or(f64::NAN);
            let added = self.noise.input_added.unwrap_or([f64::NAN; DIVISORS.len()]);
            let numbers = std::iter::once(chosen)
                .chain(added)
                .chain(figures(&self.input_reading));
            more.extend([INPUT, 2 * INPUT_NUMBERS as i32]);
            more.extend(bits(numbers));
        }
        if let Some(device) = self.device {
            more.extend([DEVICE, 2, device.type_id.into(), device.index_id.into()]);
        }
        if let Some(passes) = self.passes {
            more.extend([PASSES, 2]);
            more.extend(halves(&[passes]));
        }
        more
    }

    /// `refuse` is told of what cannot be read.
    pub(super) fn decode(more: &[i32], mut refuse: impl FnMut(&str)) -> Option<Self> {
        let (&version, mut entries) = more.split_first()?;
        if version > VERSION {
            refuse(&format!(
                "a format that this version of burn-memaop reads: the record has version {version}, \
                 and {VERSION} is the latest known"
            ));
            return None;
        }
        let mut decoded = Self::default();
        while let [tag, length, rest @ ..] = entries {
            let length = usize::try_from(*length)
                .ok()
                .filter(|&length| length <= rest.len());
            let Some((values, rest)) = length.map(|length| rest.split_at(length)) else {
                refuse("sound entries in `more`");
                return None;
            };
            let sound = match *tag {
                WORKERS => decoded.set_workers(values),
                NOISE => decoded.set_noise(values),
                INPUT => decoded.set_input(values),
                DEVICE => decoded.set_device(values),
                PASSES => decoded.set_passes(values),
                _ => true,
            };
            if !sound {
                refuse("sound entries in `more`");
                return None;
            }
            entries = rest;
        }
        Some(decoded)
    }

    fn set_workers(&mut self, values: &[i32]) -> bool {
        let numbers = values.iter().map(|&number| usize::try_from(number));
        let Ok(numbers) = numbers.collect() else {
            return false;
        };
        self.workers = numbers;
        values.len() <= MOST_WORKERS
    }

    fn set_device(&mut self, values: &[i32]) -> bool {
        let &[type_id, index_id] = values else {
            return false;
        };
        let (Ok(type_id), Ok(index_id)) = (type_id.try_into(), index_id.try_into()) else {
            return false;
        };
        self.device = Some(DeviceId { type_id, index_id });
        true
    }

    fn set_passes(&mut self, values: &[i32]) -> bool {
        let is_whole = values.len() == 2;
        self.passes = is_whole.then(|| whole(values));
        is_whole
    }

    /// Averages that no measurement leads to are as none.
    fn set_noise(&mut self, values: &[i32]) -> bool {
        let Some(numbers) = numbers::<NOISE_NUMBERS>(values) else {
            return false;
        };
        let [chosen, weight, noise, rest @ ..] = numbers;
        let (added, figures) = rest.split_at(DIVISORS.len());
        if added.iter().chain([&weight, &noise]).all(is_measured) {
            self.noise.weight = weight;
            self.noise.noise = noise;
            self.noise.added = std::array::from_fn(|index| added[index]);
            self.chosen = share(chosen);
        }
        self.reading = reading(figures);
        true
    }

    fn set_input(&mut self, values: &[i32]) -> bool {
        let Some(numbers) = numbers::<INPUT_NUMBERS>(values) else {
            return false;
        };
        let [chosen, rest @ ..] = numbers;
        let (added, figures) = rest.split_at(DIVISORS.len());
        if added.iter().all(is_measured) {
            self.noise.input_added = Some(std::array::from_fn(|index| added[index]));
            self.input_chosen = share(chosen);
        }
        self.input_reading = reading(figures);
        true
    }
}

fn is_measured(value: &f64) -> bool {
    *value >= 0.0 && value.is_finite()
}

fn share(chosen: f64) -> Option<f64> {
    (chosen > 0.0 && chosen <= 1.0).then_some(chosen)
}

/// NaN stands for none.
fn figures(reading: &Option<Reading<FIGURES>>) -> [f64; FIGURES] {
    let figures = reading.as_ref().map(Reading::read);
    figures.unwrap_or([f64::NAN; FIGURES])
}

fn reading(figures: &[f64]) -> Option<Reading<FIGURES>> {
    let there = figures.first().is_some_and(|figure| !figure.is_nan());
    there.then(|| Reading::there(std::array::from_fn(|index| figures[index])))
}

fn bits(numbers: impl Iterator<Item = f64>) -> Vec<i32> {
    let numbers: Vec<_> = numbers.map(f64::to_bits).collect();
    halves(&numbers)
}

fn numbers<const N: usize>(values: &[i32]) -> Option<[f64; N]> {
    let numbers = values
        .chunks_exact(2)
        .map(|pair| f64::from_bits(whole(pair)));
    let numbers: Vec<_> = numbers.collect();
    numbers.try_into().ok().filter(|_| values.len() == 2 * N)
}

/// Each number as a low and a high half.
pub(super) fn halves(numbers: &[u64]) -> Vec<i32> {
    let halves = |&number: &u64| [number as i32, (number >> 32) as i32];
    numbers.iter().flat_map(halves).collect()
}

/// The number of the first two halves.
pub(super) fn whole(halves: &[i32]) -> u64 {
    let half = |value: i32| u64::from(value as u32);
    half(halves[0]) | half(halves[1]) << 32
}
