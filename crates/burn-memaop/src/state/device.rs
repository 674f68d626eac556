//! The state of a layer on one device, and shared access to it.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::tensor::Tensor;

use super::{
    choice::{Averages, FIGURES},
    reading::Reading,
    rows::Rows,
    watch::Watch,
};
use crate::config::AopConfig;

/// What the steps so far have led to.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Progress {
    /// The number of steps so far.
    pub(crate) step: u64,
    /// K of the last step.
    pub(crate) k: usize,
    /// K as a share of the rows, once [`Auto`](crate::OuterProducts::Auto) has chosen it.
    pub(crate) chosen: Option<f64>,
    /// The rows of the gradient of the input as a share, once the layer has chosen them.
    pub(crate) input_chosen: Option<f64>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct DeviceState {
    pub(crate) progress: Progress,
    /// The number of forward passes that have drawn random bits.
    pub(super) passes: u64,
    /// The averages of the noise, and the measurements that the next choice adds to them.
    pub(crate) noise: Averages,
    pub(crate) reading: Option<Reading<FIGURES>>,
    pub(crate) input_reading: Option<Reading<FIGURES>>,
    /// The sets of rows that no pass is working with. The first one has waited longest. There are
    /// as many sets as passes have run at the same time.
    pub(super) rows: VecDeque<Rows>,
    pub(crate) watch: Watch,
    /// How often the clone of the last step had been mapped, 0 before the first step.
    pub(super) maps: u64,
    /// What was known before the first step of that clone.
    pub(super) known: (Progress, Averages),
    /// Whether another device has taken the state over since the last step here.
    pub(super) left: bool,
}

impl DeviceState {
    /// Whether the state is like a new one.
    pub(super) fn is_blank(&self) -> bool {
        self.progress.step == 0 && self.passes == 0 && self.rows.is_empty()
    }

    /// Whether there is no step on this device to go on from.
    pub(super) fn is_new(&self) -> bool {
        self.progress.step == 0 || self.left
    }

    /// Whether other states hold all that this one would save.
    pub(super) fn is_left(&self) -> bool {
        self.is_blank() || self.left && self.rows.is_empty()
    }

    pub(super) fn is_ahead_of(&self, other: &Self) -> bool {
        !self.left && self.progress.step > other.progress.step
    }

    /// The state for another device, which takes the rows along.
    pub(super) fn move_out(&mut self) -> Self {
        let rows = mem::take(&mut self.rows);
        let moved = Self {
            rows,
            ..self.clone()
        };
        self.left = true;
        moved
    }

    /// What was known before the optimizer step of a clone that has been mapped `maps` times.
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

    /// Goes on with the state of another device. If that has not come farther, only its rows are
    /// taken. Observers and rows that are here stay. Returns what is replaced.
    pub(super) fn go_on_from(&mut self, mut other: Self) -> Self {
        let rows = mem::take(&mut self.rows);
        other.rows.extend(rows);
        other.passes = self.passes.max(other.passes);
        if !other.is_ahead_of(self) && !self.is_new() {
            mem::swap(&mut self.rows, &mut other.rows);
            self.passes = other.passes;
            return other;
        }
        other.watch = self.watch.clone();
        mem::replace(self, other)
    }

    /// Counts a step of a clone that was mapped `maps` times. Returns the number of steps before.
    pub(crate) fn count_step(&mut self, maps: u64) -> u64 {
        if self.maps != maps {
            self.maps = maps;
            self.known = (self.progress, self.noise);
        }
        self.left = false;
        let step = self.progress.step;
        // A damaged record can hold any number.
        self.progress.step = step.saturating_add(1);
        step
    }

    /// A set of rows for a pass, which puts it back. A pass that finds none begins with zeros.
    pub(crate) fn take_rows(&mut self) -> Option<Rows> {
        self.rows.pop_front()
    }

    pub(crate) fn put_back(&mut self, rows: Option<Rows>) {
        self.rows.extend(rows);
    }

    /// Counts a pass that draws random bits. Returns the number of such passes before.
    pub(crate) fn count_pass(&mut self) -> u64 {
        let passes = self.passes;
        self.passes = passes.saturating_add(1);
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
        self.known = (self.progress, self.noise);
    }

    pub(crate) fn stats(&self) -> MemoryStats {
        // In single precision the squares of large values would overflow.
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

/// Shared access to the state of a layer on a device, for clones and their autodiff operations.
#[derive(Debug, Clone, Default)]
pub(crate) struct StateHandle(Arc<Mutex<DeviceState>>);

impl StateHandle {
    pub(crate) fn new(state: DeviceState) -> Self {
        Self(Arc::new(Mutex::new(state)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, DeviceState> {
        // A panic in a backward pass leaves a valid state. At worst it lacks the rows of that pass.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A summary of a layer's memory on its device, from
/// [`MemAopLinear::memory_stats`](crate::MemAopLinear::memory_stats).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MemoryStats {
    /// The number of weight gradients computed so far on this device. Layers that always use all
    /// rows and keep their input as it is do not count.
    pub step: u64,
    /// K of the last of these gradients, 0 before the first.
    pub k: usize,
    /// The positions of the batch that the memory has room for, 0 before the first step. Passes
    /// that run at the same time have positions of their own, and all of them count.
    pub rows: usize,
    /// The positions where something is pending.
    pub pending: usize,
    /// The most steps whose rows one position holds, 0 if there are none. The count ends at 2^24.
    pub oldest: usize,
    /// The Frobenius norm of `m^X`.
    pub input_norm: f64,
    /// The Frobenius norm of `m^G`.
    pub grad_norm: f64,
}
