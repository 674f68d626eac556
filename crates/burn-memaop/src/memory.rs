//! The memory of a layer: what it holds, who shares it, how it is saved.
//!
//! A module owns one [`MemoryHandle`]; the autodiff operations of its forward passes share it.
//! Cloning a module copies the state (two references to the same tensors) into a handle of its
//! own. Only [`Module::fork`] shares: burn-train forks a model for every step of every worker, and
//! each fork has to find what the worker's last fork left.

use std::{
    cell::RefCell,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use burn::{
    module::{
        Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    },
    tensor::{Device, Tensor},
};

use crate::{
    learning_rate::SharedLearningRate,
    observe::{AopObserver, Measurement},
    record::MemoryRecord,
    schedule::Progress,
};

/// The rows left out so far, in gradient units: `m^X`, shape `[rows, d_input]`, and `m^G`, shape
/// `[rows, d_output]`, and the number of steps that each holds something of, shape `[rows, 1]`; all
/// without autodiff.
#[derive(Debug, Clone)]
pub(crate) struct RowTensors {
    pub(crate) input: Tensor<2>,
    pub(crate) grad: Tensor<2>,
    pub(crate) age: Tensor<2>,
}

impl RowTensors {
    pub(crate) fn to_device(&self, device: &Device) -> Self {
        Self {
            input: self.input.clone().to_device(device),
            grad: self.grad.clone().to_device(device),
            age: self.age.clone().to_device(device),
        }
    }
}

/// The share of the score mass that the chosen rows carried at K = `ratio * rows`, on the device.
#[derive(Debug, Clone)]
pub(crate) struct Measured {
    pub(crate) ratio: f64,
    pub(crate) share: Tensor<1>,
}

impl Measured {
    /// Waits for the device, if it has not computed the share yet.
    pub(crate) fn read(&self) -> f64 {
        self.share.clone().into_scalar::<f64>()
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryState {
    pub(crate) progress: Progress,
    /// The measurement that the next adjustment of K goes by.
    pub(crate) measured: Option<Measured>,
    /// Allocated by the first approximate gradient, where the configuration asks for a memory.
    pub(crate) rows: Option<RowTensors>,
    /// The learning rate that the rows are in the units of, where they follow one.
    pub(crate) rate: Option<f64>,
    pub(crate) watch: Watch,
}

/// Who asks for more than the gradient, and what there is to tell. Not saved.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watch {
    pub(crate) observer: Option<AopObserver>,
    /// The last gradient, if nobody has been told of it.
    pub(crate) seen: Option<Seen>,
    pub(crate) rate: Option<SharedLearningRate>,
}

impl Watch {
    /// Takes over the watchers of another.
    fn join(&mut self, other: &Self) {
        if other.observer.is_some() {
            self.observer = other.observer;
        }
        if other.rate.is_some() {
            self.rate.clone_from(&other.rate);
        }
    }

    /// The same watchers, with nothing to tell.
    fn renewed(&self) -> Self {
        Self {
            seen: None,
            ..self.clone()
        }
    }
}

/// A gradient, for a report.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) step: u64,
    pub(crate) k: usize,
    pub(crate) rows: usize,
    pub(crate) measurement: Option<Arc<Measurement>>,
}

impl MemoryState {
    fn to_device(&self, device: &Device) -> Self {
        Self {
            progress: self.progress,
            measured: self.measured.as_ref().map(|measured| Measured {
                ratio: measured.ratio,
                share: measured.share.clone().to_device(device),
            }),
            rows: self.rows.as_ref().map(|rows| rows.to_device(device)),
            rate: self.rate,
            watch: self.watch.clone(),
        }
    }

    /// A state with the same watchers.
    fn watched_by(self, watch: &Watch) -> Self {
        Self {
            watch: watch.renewed(),
            ..self
        }
    }
}

/// Shared access to a memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryHandle(Arc<Mutex<MemoryState>>);

impl MemoryHandle {
    fn new(state: MemoryState) -> Self {
        Self(Arc::new(Mutex::new(state)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, MemoryState> {
        // A panic in a backward pass leaves a valid state behind, without the rows at worst.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// A summary of a layer's memory, from
/// [`MemAopLinear::memory_stats`](crate::MemAopLinear::memory_stats).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryStats {
    /// The number of weight gradients computed so far, without those of layers that have no
    /// schedule and K >= M.
    pub step: u64,
    /// K of the last of them, 0 before the first.
    pub k: usize,
    /// The batch positions the memory has room for, 0 before the first step.
    pub rows: usize,
    /// The positions where something is pending.
    pub pending: usize,
    /// The most steps that one of them holds something of, 0 if there is none.
    pub oldest: usize,
    /// The Frobenius norm of `m^X`.
    pub input_norm: f64,
    /// The Frobenius norm of `m^G`.
    pub grad_norm: f64,
}

/// The memory of one layer, as a part of its module.
#[derive(Debug)]
pub(crate) struct RowMemoryModule {
    handle: MemoryHandle,
    workers: Arc<Mutex<Vec<Worker>>>,
    record: MemoryRecord,
}

/// The memory of the forks that one thread makes for one device.
#[derive(Debug)]
struct Worker {
    device: Device,
    /// Alive as long as the thread is.
    thread: Weak<()>,
    handle: MemoryHandle,
}

thread_local! {
    static THREAD: RefCell<Arc<()>> = RefCell::new(Arc::new(()));
}

impl RowMemoryModule {
    pub(crate) fn new(d_input: usize, d_output: usize, device: &Device) -> Self {
        Self {
            handle: MemoryHandle::default(),
            workers: Arc::default(),
            record: MemoryRecord::new(d_input, d_output, device),
        }
    }

    pub(crate) fn handle(&self) -> MemoryHandle {
        self.handle.clone()
    }

    /// Tells the observer, if there is one, of a gradient that is none of this crate's.
    pub(crate) fn note_exact(&self, rows: usize) {
        let mut state = self.handle.lock();
        if state.watch.observer.is_some() {
            state.watch.seen = Some(Seen {
                step: state.progress.step,
                k: rows,
                rows,
                measurement: None,
            });
        }
    }

    /// Forgets all rows and starts counting steps from 0, in forks to come as well.
    pub(crate) fn reset(&self) {
        let mut state = self.handle.lock();
        *state = MemoryState::default().watched_by(&state.watch);
        drop(state);
        lock(&self.workers).clear();
    }

    pub(crate) fn stats(&self) -> MemoryStats {
        let MemoryState { progress, rows, .. } = self.handle.lock().clone();
        let Progress { step, k, .. } = progress;
        let Some(rows) = rows else {
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

    fn with_handle(&self, handle: MemoryHandle, device: Option<&Device>) -> Self {
        Self {
            handle,
            workers: self.workers.clone(),
            record: match device {
                Some(device) => self.record.on_device(device),
                None => self.record.clone(),
            },
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Clone for RowMemoryModule {
    fn clone(&self) -> Self {
        let state = self.handle.lock().clone();
        self.with_handle(MemoryHandle::new(state), None)
    }
}

impl Module for RowMemoryModule {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        let state = self.handle.lock().clone();
        self.record.visit(&state, &self.handle, visitor);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        match self.record.map(mapper) {
            None => self,
            // A loaded memory starts a life of its own.
            Some(state) => Self {
                handle: MemoryHandle::new(state.watched_by(&self.handle.lock().watch)),
                workers: Arc::default(),
                record: self.record,
            },
        }
    }

    fn to_device(self, device: &Device) -> Self {
        let state = self.handle.lock().to_device(&device.clone().inner());
        self.with_handle(MemoryHandle::new(state), Some(device))
    }

    /// The memory that this thread's last fork to `device` left, unless that fork is still in use
    /// or this memory has taken more steps; a copy of this memory otherwise. A new thread takes
    /// over from one that has ended.
    fn fork(self, device: &Device) -> Self {
        let device = device.clone().inner();
        let thread = THREAD.with_borrow(Arc::downgrade);
        let state = self.handle.lock().clone();
        let mut workers = lock(&self.workers);

        let own = |worker: &Worker| worker.thread.ptr_eq(&thread);
        let orphan = |worker: &Worker| worker.thread.strong_count() == 0;
        let free = |worker: &Worker| worker.device == device && !worker.handle.is_shared();
        let found = workers
            .iter()
            .position(|worker| free(worker) && own(worker))
            .or_else(|| {
                workers
                    .iter()
                    .position(|worker| free(worker) && orphan(worker))
            });

        let handle = match found {
            Some(index) => {
                let worker = &mut workers[index];
                worker.thread = thread;
                let mut kept = worker.handle.lock();
                if kept.progress.step < state.progress.step {
                    *kept = state.to_device(&device);
                }
                kept.watch.join(&state.watch);
                drop(kept);
                worker.handle.clone()
            }
            None => {
                let handle = MemoryHandle::new(state.to_device(&device));
                workers.push(Worker {
                    device: device.clone(),
                    thread,
                    handle: handle.clone(),
                });
                handle
            }
        };
        drop(workers);
        self.with_handle(handle, Some(&device))
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn materialize(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn train(self) -> Self {
        self
    }
}

impl ModuleDisplayDefault for RowMemoryModule {
    fn content(&self, _content: Content) -> Option<Content> {
        None
    }
}

impl ModuleDisplay for RowMemoryModule {}
