//! The state of a layer, and shared access to it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use burn::tensor::{Device, Tensor};

use super::{
    noise_scale::{Averages, FIGURES},
    reading::Reading,
    rows::RowTensors,
    schedule::Progress,
    watch::Watch,
};

/// The share of the score mass that the chosen rows carried at K = `ratio * rows`.
#[derive(Debug, Clone)]
pub(crate) struct Carried {
    pub(crate) ratio: f64,
    pub(crate) share: Reading<1>,
}

impl Carried {
    /// Waits for the device, if it has not computed the share yet.
    pub(crate) fn read(&self) -> f64 {
        let [share] = self.share.read();
        share
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryState {
    pub(crate) progress: Progress,
    /// How often the input has been packed, and at which step.
    pub(super) packs: (u64, u64),
    /// The measurement that the next adjustment of K goes by.
    pub(crate) carried: Option<Carried>,
    /// What has been measured of the noise, and the measurement that the next choice of K goes by too.
    pub(crate) noise: Averages,
    pub(crate) reading: Option<Reading<FIGURES>>,
    pub(crate) input_reading: Option<Reading<FIGURES>>,
    /// Allocated by the first approximate gradient, where the configuration asks for a memory.
    pub(crate) rows: Option<RowTensors>,
    /// The learning rate that the rows are in the units of, where they follow one.
    pub(crate) rate: Option<f64>,
    pub(crate) watch: Watch,
}

impl MemoryState {
    pub(crate) fn to_device(&self, device: &Device) -> Self {
        Self {
            progress: self.progress,
            packs: self.packs,
            carried: self.carried.clone(),
            noise: self.noise,
            reading: self.reading.clone(),
            input_reading: self.input_reading.clone(),
            rows: self.rows.as_ref().map(|rows| rows.to_device(device)),
            rate: self.rate,
            watch: self.watch.clone(),
        }
    }

    /// How often the input has been packed before in this step: passes of one step round by noise of their own.
    pub(crate) fn count_pack(&mut self) -> u64 {
        let (count, step) = self.packs;
        let count = if step == self.progress.step { count } else { 0 };
        self.packs = (count + 1, self.progress.step);
        count
    }

    /// A state with the same watchers.
    pub(crate) fn watched_by(self, watch: &Watch) -> Self {
        Self {
            watch: watch.renewed(),
            ..self
        }
    }

    pub(crate) fn stats(&self) -> MemoryStats {
        let Progress { step, k, .. } = self.progress;
        let Some(rows) = &self.rows else {
            return MemoryStats {
                step,
                k,
                rows: 0,
                pending: 0,
                oldest: 0,
                input_norm: 0.0,
                grad_norm: 0.0,
            };
        };
        // A memory in half precision could not hold its own sum of squares.
        let norm = |tensor: &Tensor<2>| {
            let data = tensor.clone().into_data();
            data.iter::<f64>().map(|v| v * v).sum::<f64>().sqrt()
        };
        let ages: Vec<f64> = rows.age.clone().into_data().iter::<f64>().collect();
        MemoryStats {
            step,
            k,
            rows: ages.len(),
            pending: ages.iter().filter(|&&age| age > 0.0).count(),
            oldest: ages.iter().fold(0.0, |a: f64, &b| a.max(b)) as usize,
            input_norm: norm(&rows.input),
            grad_norm: norm(&rows.grad),
        }
    }
}

/// Shared access to the state of a layer: its module and the autodiff operations of its forward passes
/// have one.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryHandle(Arc<Mutex<MemoryState>>);

impl MemoryHandle {
    pub(crate) fn new(state: MemoryState) -> Self {
        Self(Arc::new(Mutex::new(state)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, MemoryState> {
        // A panic in a backward pass leaves a valid state behind, without the rows at worst.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    pub(crate) fn downgrade(&self) -> WeakHandle {
        WeakHandle(Arc::downgrade(&self.0))
    }
}

/// Tells a memory from others without keeping it.
#[derive(Debug, Clone)]
pub(crate) struct WeakHandle(Weak<Mutex<MemoryState>>);

impl WeakHandle {
    pub(crate) fn is(&self, handle: &MemoryHandle) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&handle.0))
    }

    pub(crate) fn has_one_owner(&self) -> bool {
        self.0.strong_count() == 1
    }
}

/// A summary of a layer's memory, from
/// [`MemAopLinear::memory_stats`](crate::MemAopLinear::memory_stats).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryStats {
    /// The number of weight gradients computed so far, without those of layers that have no
    /// schedule, K >= M and keep their input as it is.
    pub step: u64,
    /// K of the last of them, 0 before the first.
    pub k: usize,
    /// The batch positions the memory has room for, 0 before the first step.
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
