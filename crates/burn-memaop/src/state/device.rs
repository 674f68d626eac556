//! The state of a layer on one device, and shared access to it.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::tensor::Tensor;

use super::{
    noise_scale::{Averages, FIGURES},
    reading::Reading,
    rows::RowTensors,
    schedule::Progress,
    watch::Watch,
};
use crate::config::AopConfig;

#[derive(Debug, Clone, Default)]
pub(crate) struct DeviceState {
    pub(crate) progress: Progress,
    /// The number of forward passes that have drawn random bits.
    pub(super) passes: u64,
    /// What has been measured of the noise, and the measurements that the next choice goes by too.
    pub(crate) noise: Averages,
    pub(crate) reading: Option<Reading<FIGURES>>,
    pub(crate) input_reading: Option<Reading<FIGURES>>,
    /// The sets of rows that no pass is working with, the one that has waited longest first. There are as many sets as
    /// passes have run at the same time.
    pub(super) rows: VecDeque<RowTensors>,
    pub(crate) watch: Watch,
    /// The number of maps of the layer before the last step, and what was known then.
    pub(super) maps: u64,
    pub(super) known: (Progress, Averages),
}

impl DeviceState {
    /// A state of nothing but rows.
    pub(super) fn of_rows(rows: RowTensors) -> Self {
        Self {
            rows: [rows].into(),
            ..Self::default()
        }
    }

    /// Whether a new state is the same.
    pub(super) fn is_blank(&self) -> bool {
        self.progress.step == 0 && self.passes == 0 && self.rows.is_empty()
    }

    /// The state for another device, which takes the rows along.
    pub(super) fn move_out(&mut self) -> Self {
        let rows = mem::take(&mut self.rows);
        Self {
            rows,
            ..self.clone()
        }
    }

    /// What was known before the optimizer step that follows so many maps.
    pub(super) fn before(&self, maps: u64) -> Self {
        let (progress, noise) = match self.maps == maps {
            true => self.known,
            false => (self.progress, self.noise),
        };
        Self {
            progress,
            noise,
            ..Self::default()
        }
    }

    /// Goes on with the state of another device; observers and rows that are here stay.
    pub(super) fn go_on_from(&mut self, other: Self) {
        let passes = self.passes.max(other.passes);
        let here = mem::take(self);
        *self = Self {
            passes,
            watch: here.watch,
            ..other
        };
        self.rows.extend(here.rows);
    }

    /// Takes over a saved state, of which the first has all but further rows.
    pub(super) fn load(&mut self, saved: Self) {
        match self.is_blank() {
            true => *self = saved,
            false => self.rows.extend(saved.rows),
        }
    }

    /// Counts a step that follows so many maps of the layer; returns the number of steps before.
    pub(crate) fn count_step(&mut self, maps: u64) -> u64 {
        if self.maps != maps {
            self.maps = maps;
            self.known = (self.progress, self.noise);
        }
        let step = self.progress.step;
        self.progress.step += 1;
        step
    }

    /// A set of rows for a pass, which puts it back; a pass that finds none begins with zeros.
    pub(crate) fn take_rows(&mut self) -> Option<RowTensors> {
        self.rows.pop_front()
    }

    pub(crate) fn put_back(&mut self, rows: Option<RowTensors>) {
        self.rows.extend(rows);
    }

    /// The number of passes before this one that have drawn random bits.
    pub(crate) fn count_pass(&mut self) -> u64 {
        let passes = self.passes;
        self.passes += 1;
        passes
    }

    /// Forgets what another configuration has no use for.
    pub(super) fn reconfigure(&mut self, before: &AopConfig, after: &AopConfig) {
        if after.method.memory().decay().is_none() {
            self.rows.clear();
        }
        if after.outer_products != before.outer_products {
            self.progress.chosen = None;
            self.reading = None;
            self.noise = Averages {
                input_added: self.noise.input_added,
                ..Averages::default()
            };
        }
        if after.input_gradient != before.input_gradient {
            self.progress.input_chosen = None;
            self.noise.input_added = None;
            self.input_reading = None;
        }
    }

    pub(crate) fn stats(&self) -> MemoryStats {
        // A memory in half precision could not hold its own sum of squares.
        let squares = |tensor: &Tensor<2>| {
            let data = tensor.clone().into_data();
            data.iter::<f64>().map(|value| value * value).sum::<f64>()
        };
        let mut stats = MemoryStats {
            step: self.progress.step,
            k: self.progress.k,
            ..MemoryStats::default()
        };
        for rows in &self.rows {
            let ages: Vec<f64> = rows.age.clone().into_data().iter::<f64>().collect();
            stats.rows += ages.len();
            stats.pending += ages.iter().filter(|&&age| age > 0.0).count();
            stats.oldest = ages.iter().fold(stats.oldest, |a, &b| a.max(b as usize));
            stats.input_norm += squares(&rows.input);
            stats.grad_norm += squares(&rows.grad);
        }
        stats.input_norm = stats.input_norm.sqrt();
        stats.grad_norm = stats.grad_norm.sqrt();
        stats
    }
}

/// Shared access to the state of a layer on a device: its clones and the autodiff operations of their forward passes have
/// one.
#[derive(Debug, Clone, Default)]
pub(crate) struct StateHandle(Arc<Mutex<DeviceState>>);

impl StateHandle {
    pub(crate) fn new(state: DeviceState) -> Self {
        Self(Arc::new(Mutex::new(state)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, DeviceState> {
        // A panic in a backward pass leaves a valid state behind, without the rows that the pass had at worst.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A summary of a layer's memory on its device, from
/// [`MemAopLinear::memory_stats`](crate::MemAopLinear::memory_stats).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MemoryStats {
    /// The number of weight gradients computed so far on this device, without those of layers that always take all
    /// rows and keep their input as it is.
    pub step: u64,
    /// K of the last of them, 0 before the first.
    pub k: usize,
    /// The batch positions the memory has room for, 0 before the first step. Passes that run at the same time have
    /// positions of their own, and all of them count.
    pub rows: usize,
    /// The positions where something is pending.
    pub pending: usize,
    /// The most steps that one of them holds something of, 0 if there is none. Counted to 2^24.
    pub oldest: usize,
    /// The Frobenius norm of `m^X`.
    pub input_norm: f64,
    /// The Frobenius norm of `m^G`.
    pub grad_norm: f64,
}
