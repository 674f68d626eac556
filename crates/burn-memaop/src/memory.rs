//! The memory of a layer: what it holds, who shares it, how it is saved.
//!
//! A module owns one [`MemoryHandle`]; the autodiff operations of its forward passes share it.
//! Cloning a module copies the state (two references to the same tensors) into a handle of its
//! own. Only [`Module::fork`] shares: burn-train forks a model for every step of every worker, and
//! each fork has to find what the worker's last fork left.

use std::{
    cell::RefCell,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
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
    /// The model that the rows were left by.
    pub(crate) lineage: Lineage,
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
    /// The rows of the gradient of the input that were computed, if it was asked for.
    pub(crate) input_rows: usize,
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
            lineage: self.lineage.clone(),
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

/// Tells the steps of one training from those of another that began with a clone of the same model.
///
/// Whatever maps a model, which an optimizer does at each step, moves it on along its branch. Of
/// two clones that both move on from one place, the second begins a branch of its own.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lineage {
    branch: Arc<AtomicU64>,
    place: u64,
    /// Where this branch began: a place on another.
    from: Option<(Weak<AtomicU64>, u64)>,
}

impl Lineage {
    /// The place after this one.
    fn next(&self) -> Self {
        let next = self.place + 1;
        let free =
            self.branch
                .compare_exchange(self.place, next, Ordering::Relaxed, Ordering::Relaxed);
        match free {
            Ok(_) => Self {
                place: next,
                ..self.clone()
            },
            Err(_) => Self {
                branch: Arc::new(AtomicU64::new(next)),
                place: next,
                from: Some((Arc::downgrade(&self.branch), self.place)),
            },
        }
    }

    /// Whether this is where `later` was, or has come from.
    fn leads_to(&self, later: &Self) -> bool {
        let on = |branch: *const AtomicU64, place: u64| {
            std::ptr::eq(Arc::as_ptr(&self.branch), branch) && self.place <= place
        };
        let from = later.from.as_ref();
        on(Arc::as_ptr(&later.branch), later.place)
            || from.is_some_and(|(branch, place)| on(branch.as_ptr(), *place))
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

/// Optimizer steps after which a worker that has not been seen is taken to have ended.
const PATIENCE: u64 = 64;

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
                input_rows: rows,
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

    /// Drops memories that no fork has asked for in a long time: those of workers that have no more
    /// data, and the first step's of a fork that was trained itself.
    fn forget_workers_behind(&self, lineage: &Lineage) {
        lock(&self.workers).retain(|worker| {
            if worker.handle.is_shared() {
                return true;
            }
            let last = &worker.handle.lock().lineage;
            !last.leads_to(lineage) || lineage.place - last.place <= PATIENCE
        });
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
            None => {
                let mut state = self.handle.lock();
                state.lineage = state.lineage.next();
                let lineage = state.lineage.clone();
                drop(state);
                self.forget_workers_behind(&lineage);
                self
            }
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

    /// The memory that this thread's last fork to `device` left, unless that fork is still in use,
    /// was of another training, or has taken fewer steps than this memory; a copy of this memory
    /// otherwise. A new thread takes over from one that has ended.
    fn fork(self, device: &Device) -> Self {
        let device = device.clone().inner();
        let thread = THREAD.with_borrow(Arc::downgrade);
        let state = self.handle.lock().clone();
        let mut workers = lock(&self.workers);

        let own = |worker: &Worker| worker.thread.ptr_eq(&thread);
        let orphan = |worker: &Worker| worker.thread.strong_count() == 0;
        let free = |worker: &Worker| {
            worker.device == device
                && !worker.handle.is_shared()
                && worker.handle.lock().lineage.leads_to(&state.lineage)
        };
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
                kept.lineage = state.lineage.clone();
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

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    struct Optimizer;
    impl ModuleMapper for Optimizer {}

    /// As burn-train does with one device: a fork that is cloned and stepped ever after.
    #[test]
    fn what_a_fork_left_behind_is_dropped_in_time() {
        let device = Device::flex();
        let mut memory = RowMemoryModule::new(2, 2, &device).fork(&device);
        for step in 0..2 * PATIENCE {
            memory = memory.clone().map(&mut Optimizer);
            let left = lock(&memory.workers).len();
            assert_eq!(left, usize::from(step < PATIENCE), "step {step}");
        }
    }

    #[test]
    fn a_second_training_from_the_same_model_is_another_lineage() {
        let start = Lineage::default();
        let first = start.next();
        let second = start.next();
        assert!(start.leads_to(&first) && start.leads_to(&second) && start.leads_to(&start));
        assert!(!first.leads_to(&second) && !second.leads_to(&first));
        assert!(!first.leads_to(&start));
        assert!(first.leads_to(&first.next().next()));
        assert!(second.leads_to(&second.next().next()));
    }
}
