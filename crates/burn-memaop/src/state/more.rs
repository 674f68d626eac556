//! The room to grow of a record: what its `more` holds.
//!
//! It is a version and entries of a tag, a length and so many integers. Readers skip tags that they do
//! not know, so entries can be added; the version counts what no older reader may skip. A state without
//! `more` is of the first format, which had nothing else to tell.

use super::{
    memory::MemoryState,
    noise_scale::{Averages, DIVISORS, FIGURES, Reading},
};

/// The version of `more` that is written, and the latest that is read.
const VERSION: i32 = 1;
/// The entry of `more` with the numbers of the workers, whose memories are under `worker<number>`.
const WORKERS: i32 = 1;
/// The entry of `more` with what has been measured of the noise: the share of the rows that was chosen, [`Averages`], then the figures of the last
/// measurement, each number as a low and a high half.
const NOISE: i32 = 2;
const NOISE_NUMBERS: usize = 3 + DIVISORS.len() + FIGURES;
/// More of them are no record of a training.
const MOST_WORKERS: usize = 4096;

/// What `more` holds.
#[derive(Default)]
pub(super) struct More {
    pub(super) workers: Vec<usize>,
    pub(super) chosen: Option<f64>,
    pub(super) noise: Averages,
    pub(super) reading: Option<Reading>,
}

impl More {
    pub(super) fn of(state: &MemoryState, workers: Vec<usize>) -> Self {
        Self {
            workers,
            chosen: state.progress.chosen,
            noise: state.noise,
            reading: state.reading.clone(),
        }
    }

    fn has_noise(&self) -> bool {
        self.reading.is_some() || self.noise != Averages::default()
    }

    /// The number of integers, 0 where there is nothing to tell.
    pub(super) fn len(&self) -> usize {
        let workers = match self.workers.len() {
            0 => 0,
            count => 2 + count,
        };
        let noise = match self.has_noise() {
            true => 2 + 2 * NOISE_NUMBERS,
            false => 0,
        };
        match workers + noise {
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
            } = self.noise;
            // NaN stands for none.
            let figures = self
                .reading
                .as_ref()
                .map_or([f64::NAN; FIGURES], Reading::read);
            let numbers = [self.chosen.unwrap_or(f64::NAN), weight, noise]
                .into_iter()
                .chain(added)
                .chain(figures);
            let numbers: Vec<_> = numbers.map(f64::to_bits).collect();
            more.extend([NOISE, 2 * NOISE_NUMBERS as i32]);
            more.extend(halves(&numbers));
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

    /// Averages that no measurement leads to are as none.
    fn set_noise(&mut self, values: &[i32]) -> bool {
        if values.len() != 2 * NOISE_NUMBERS {
            return false;
        }
        let numbers = values
            .chunks_exact(2)
            .map(|pair| f64::from_bits(whole(pair)));
        let numbers: Vec<_> = numbers.collect();
        let [chosen, weight, noise, rest @ ..] = &numbers[..] else {
            return false;
        };
        let (added, figures) = rest.split_at(DIVISORS.len());
        let averages = Averages {
            weight: *weight,
            noise: *noise,
            added: std::array::from_fn(|index| added[index]),
        };
        let positive = |value: &f64| *value >= 0.0 && value.is_finite();
        let sound = added.iter().chain([weight, noise]).all(positive);
        if sound {
            self.noise = averages;
            self.chosen = Some(*chosen).filter(|chosen| *chosen > 0.0 && *chosen <= 1.0);
        }
        let mut figures = figures.iter().copied();
        let figures = std::array::from_fn(|_| figures.next().unwrap_or(f64::NAN));
        self.reading = (!figures[0].is_nan()).then(|| Reading::there(figures));
        true
    }
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
