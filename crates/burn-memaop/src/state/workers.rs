//! The memories of the workers of a model.
//!
//! burn-train's multi-device strategy clones the model for each worker at each step, and the worker
//! forks its clone, trains the fork on one batch and drops it. So that its rows are found again, they
//! stay with the model: *the n-th clone between two optimizer steps, once forked, goes on with the
//! memory of the n-th clone of the step before.* Clones are numbered on the thread that makes them, so
//! which worker gets which memory does not depend on when it runs. Where numbers have shifted, because a
//! worker has no more data or something else was cloned, the device decides.
//!
//! A model and its clones share one list until something maps one of them, as an optimizer does at each
//! step; what comes out has a list of its own, which takes over the memories at its first fork. So a
//! training goes on with its memories whatever is mapped beside it (a moving average of the
//! weights, say), and a second training from a clone of the same model finds none.

use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::tensor::Device;

use super::{
    memory::{MemoryHandle, MemoryState, WeakHandle},
    schedule::Progress,
};

/// Optimizer steps after which a worker that has not been seen is taken to have ended.
const PATIENCE: u32 = 64;

#[derive(Debug, Default)]
pub(crate) struct Workers(Mutex<List>);

#[derive(Debug, Default)]
struct List {
    workers: Vec<Worker>,
    /// The step of the model itself whose rows a worker goes on with; no other may apply them again.
    rows_given: Option<u64>,
    /// How far the workers had come at the start of the step.
    progress: Option<Progress>,
    /// The list of an earlier step, whose workers this one has not taken over yet.
    before: Option<Arc<Workers>>,
}

#[derive(Debug)]
struct Worker {
    /// No two workers of a list have the same.
    number: usize,
    /// None before the first fork of a memory that comes from a record.
    device: Option<Device>,
    /// Optimizer steps since it has been asked for; 0 since the last one.
    unseen: u32,
    /// The steps that the model itself had taken when it was asked for.
    model_step: u64,
    memory: MemoryHandle,
}

impl Workers {
    /// As they are in a record of a model after `model_step` steps, by their numbers.
    pub(crate) fn loaded(states: Vec<(usize, MemoryState)>, model_step: u64) -> Self {
        let worker = |(number, state)| Worker {
            number,
            device: None,
            unseen: 1,
            model_step,
            memory: MemoryHandle::new(state),
        };
        Self(Mutex::new(List {
            rows_given: (!states.is_empty()).then_some(model_step),
            workers: states.into_iter().map(worker).collect(),
            ..List::default()
        }))
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The list of a model that was mapped.
    pub(crate) fn after(self: &Arc<Self>) -> Self {
        let before = self.lock().before.clone();
        Self(Mutex::new(List {
            before: Some(before.unwrap_or_else(|| self.clone())),
            ..List::default()
        }))
    }

    /// The memory for the fork of the clone with a number, of a model whose own state is `own`: that of a
    /// worker, unless the model itself has taken steps since, or a new one.
    pub(crate) fn memory(&self, number: usize, device: &Device, own: &MemoryState) -> MemoryHandle {
        let mut list = self.lock();
        list.take_over(own);
        match list.find(number, device) {
            Some(index) => list.go_on(index, device, own),
            None => list.add(number, device, own),
        }
    }

    /// Drops the memory of a fork that is no more, but what became of it is trained: the fork was the model,
    /// and no worker. With it go those that a record had for workers that there are not.
    pub(crate) fn forget(&self, memory: &WeakHandle) {
        let mut list = self.lock();
        if let Some(before) = &list.before {
            before.forget(memory);
        }
        let is = |worker: &Worker| memory.is(&worker.memory);
        if memory.has_one_owner() && list.workers.iter().any(is) {
            let others = |worker: &Worker| !is(worker) && worker.device.is_some();
            list.workers.retain(others);
        }
    }

    /// The states of the workers that would go on with them, with their numbers, and the state of the model
    /// (`own`) with the progress of the training: its own, or that of the worker that has come farthest.
    pub(crate) fn states(&self, own: &MemoryState) -> (Vec<(usize, MemoryState)>, MemoryState) {
        let list = self.lock();
        if let Some(before) = &list.before {
            return before.states(own);
        }
        let state = |worker: &Worker| (worker.number, worker.memory.lock().clone());
        let present = |worker: &&Worker| worker.model_step == own.progress.step;
        let mut states: Vec<_> = list.workers.iter().filter(present).map(state).collect();
        states.sort_by_key(|(number, _)| *number);
        let model = MemoryState {
            progress: list.farthest(own),
            ..own.clone()
        };
        (states, model)
    }
}

impl List {
    /// At the first fork after an optimizer step.
    fn take_over(&mut self, own: &MemoryState) {
        let Some(before) = self.before.take() else {
            return;
        };
        let mut before = before.lock();
        self.progress = Some(before.farthest(own));
        // Clones of the model of that step that are still there begin anew.
        self.rows_given = before.rows_given.take();
        self.workers = mem::take(&mut before.workers);
        self.workers
            .iter_mut()
            .for_each(|worker| worker.unseen += 1);
        self.workers.retain(|worker| worker.unseen <= PATIENCE);
    }

    fn find(&self, number: usize, device: &Device) -> Option<usize> {
        let known = self.workers.iter().any(|worker| worker.number == number);
        // The better, the smaller.
        let rank = |worker: &Worker| {
            let same = worker.number == number;
            let here = match &worker.device {
                None => same,
                Some(other) => other == device,
            };
            let rank = match (same, worker.unseen > 0) {
                (true, _) => 0,
                (false, true) => 1,
                // Seen since the last optimizer step. Its number must have shifted since then: a number
                // that no worker has is that of a new one.
                (false, false) if known => 2,
                (false, false) => return None,
            };
            let free = here && !worker.memory.is_shared();
            free.then_some((rank, worker.number.abs_diff(number), worker.number))
        };
        let ranked = self.workers.iter().enumerate();
        let ranked = ranked.filter_map(|(index, worker)| Some((rank(worker)?, index)));
        ranked.min().map(|(_, index)| index)
    }

    /// The worker goes on with its memory, unless the model itself has taken steps since.
    fn go_on(&mut self, index: usize, device: &Device, own: &MemoryState) -> MemoryHandle {
        let worker = &mut self.workers[index];
        let mut state = worker.memory.lock();
        // What comes from a record has no device yet.
        if worker.device.is_none() {
            *state = state.to_device(device);
        }
        if own.progress.step > worker.model_step {
            let rows = state.rows.take();
            *state = own.to_device(device);
            if self.rows_given.replace(own.progress.step) == Some(own.progress.step) {
                state.rows = rows;
            }
        }
        state.watch.join(&own.watch);
        drop(state);
        worker.device = Some(device.clone());
        worker.unseen = 0;
        worker.model_step = own.progress.step;
        worker.memory.clone()
    }

    /// A worker that begins with the progress of the others; the first, with the rows of the model.
    fn add(&mut self, number: usize, device: &Device, own: &MemoryState) -> MemoryHandle {
        let taken = |number| self.workers.iter().any(|worker| worker.number == number);
        let last = self.workers.iter().map(|worker| worker.number).max();
        let number = match taken(number) {
            true => last.map_or(0, |last| last + 1),
            false => number,
        };
        let mut state = own.to_device(device);
        state.progress = self.progress.unwrap_or(own.progress);
        if self.rows_given.replace(own.progress.step) == Some(own.progress.step) {
            state.rows = None;
        }
        let memory = MemoryHandle::new(state);
        self.workers.push(Worker {
            number,
            device: Some(device.clone()),
            unseen: 0,
            model_step: own.progress.step,
            memory: memory.clone(),
        });
        memory
    }

    /// The progress of the model itself (`own`), or of the worker that has come farther.
    fn farthest(&self, own: &MemoryState) -> Progress {
        let workers = self.workers.iter();
        let progress = workers.map(|worker| worker.memory.lock().progress);
        let start = self.progress.unwrap_or(own.progress);
        [own.progress, start]
            .into_iter()
            .chain(progress)
            .reduce(|farthest, progress| match progress.step > farthest.step {
                true => progress,
                false => farthest,
            })
            .unwrap_or_default()
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Tensor;

    use super::{super::rows::RowTensors, *};

    /// A training of some workers, each of which has taken a number of steps of its own.
    struct Training {
        workers: Arc<Workers>,
        own: MemoryState,
    }

    impl Training {
        fn new() -> Self {
            Self {
                workers: Arc::default(),
                own: MemoryState::default(),
            }
        }

        /// The fork with a number on a device takes a step; the steps of its memory so far.
        fn fork(&self, number: usize, device: &Device) -> u64 {
            let memory = self.workers.memory(number, device, &self.own);
            let step = &mut memory.lock().progress.step;
            *step += 1;
            *step
        }

        fn optimizer_step(&mut self) {
            self.workers = Arc::new(self.workers.after());
        }

        fn numbers(&self) -> Vec<usize> {
            let (states, _) = self.workers.states(&self.own);
            states.into_iter().map(|(number, _)| number).collect()
        }
    }

    #[cfg(feature = "ndarray")]
    #[allow(deprecated)]
    fn devices() -> [Device; 2] {
        [Device::flex(), Device::ndarray()]
    }

    /// Accumulation over two batches of the first device and three of the second.
    #[cfg(feature = "ndarray")]
    #[test]
    fn a_worker_whose_number_has_shifted_is_found_by_its_device() {
        let [first, second] = devices();
        let mut training = Training::new();
        for window in 0..3 {
            for step in 0..2 {
                assert_eq!(training.fork(0, &first), 2 * window + step + 1);
                assert_eq!(training.fork(1, &second), 3 * window + step + 1);
            }
            // The first has no more data.
            assert_eq!(training.fork(0, &second), 3 * window + 3);
            assert_eq!(training.numbers(), [0, 1]);
            training.optimizer_step();
        }
    }

    /// A model that is cloned for something else too.
    #[cfg(feature = "ndarray")]
    #[test]
    fn other_clones_do_not_shift_workers_of_different_devices() {
        let [first, second] = devices();
        let mut training = Training::new();
        for step in 0..6 {
            let other = usize::from(step % 2 == 1);
            assert_eq!(training.fork(other, &first), step + 1);
            assert_eq!(training.fork(1 + other, &second), step + 1);
            assert_eq!(training.numbers(), [0, 1]);
            training.optimizer_step();
        }
    }

    #[test]
    fn workers_of_one_device_go_by_their_numbers_in_any_order() {
        let device = Device::flex();
        let mut training = Training::new();
        // The second is done before the first begins.
        for (step, order) in (0..).zip([[1, 0], [0, 1], [1, 0]]) {
            for number in order {
                assert_eq!(training.fork(number, &device), step + 1);
            }
            training.optimizer_step();
        }
        // With another clone before them none is lost, and none is added.
        training.fork(1, &device);
        training.fork(2, &device);
        assert_eq!(training.numbers(), [0, 1]);
    }

    #[test]
    fn workers_that_have_ended_are_dropped_in_time() {
        let device = Device::flex();
        let mut training = Training::new();
        training.fork(0, &device);
        training.fork(1, &device);
        for step in 0..2 * PATIENCE {
            training.optimizer_step();
            training.fork(0, &device);
            let left = training.numbers().len();
            assert_eq!(left, 1 + usize::from(step < PATIENCE), "step {step}");
        }
    }

    #[test]
    fn a_worker_that_is_behind_keeps_its_memory_after_a_resume() {
        let device = Device::flex();
        let training = Training::new();
        training.fork(0, &device);
        for _ in 0..2 {
            training.fork(1, &device);
        }
        let (states, own) = training.workers.states(&training.own);
        assert_eq!(own.progress.step, 2);
        let workers = Workers::loaded(states, own.progress.step);
        let resumed = Training {
            workers: Arc::new(workers),
            own,
        };
        assert_eq!(resumed.fork(1, &device), 3);
        assert_eq!(resumed.fork(0, &device), 2);
    }

    fn rows(device: &Device) -> Option<RowTensors> {
        let zeros = |width| Tensor::zeros([3, width], device);
        Some(RowTensors {
            input: zeros(2),
            grad: zeros(2),
            age: zeros(1),
        })
    }

    /// How many of the first workers have rows, each asked for once.
    fn with_rows(training: &Training, device: &Device) -> usize {
        let memories = [0, 1].map(|number| training.workers.memory(number, device, &training.own));
        let with = memories
            .iter()
            .filter(|memory| memory.lock().rows.is_some());
        with.count()
    }

    #[test]
    fn a_model_that_has_trained_on_takes_its_workers_along() {
        let device = Device::flex();
        let mut training = Training::new();
        training.fork(0, &device);
        training.fork(1, &device);
        training.own.progress.step = 7;
        training.own.rows = rows(&device);
        // They are not in a record any more, and after it begin with the model.
        assert!(training.numbers().is_empty());
        // Its rows go to one of them.
        assert_eq!(with_rows(&training, &device), 1);
        assert_eq!(training.fork(0, &device), 8);
        assert_eq!(training.fork(0, &device), 9);
        assert_eq!(training.fork(1, &device), 8);
        assert_eq!(training.numbers(), [0, 1]);
    }

    #[test]
    fn a_second_training_from_the_same_model_gets_its_rows_too() {
        let device = Device::flex();
        let start = || Training {
            workers: Arc::default(),
            own: MemoryState {
                rows: rows(&device),
                ..MemoryState::default()
            },
        };
        let first = start();
        let list = first.workers.clone();
        assert_eq!(with_rows(&first, &device), 1);
        let mut trained = Training {
            workers: Arc::new(list.after()),
            own: first.own,
        };
        assert_eq!(trained.fork(0, &device), 1);
        trained.optimizer_step();
        assert_eq!(trained.fork(0, &device), 2);

        let second = Training {
            workers: list,
            ..start()
        };
        assert_eq!(with_rows(&second, &device), 1);
        assert_eq!(second.fork(0, &device), 1, "from the first step");
    }
}
