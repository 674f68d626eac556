//! The memories of the workers of a model.
//!
//! burn-train's multi-device strategy clones the model for each worker at each step, and the worker
//! forks its clone, trains the fork on one batch and drops it. So that its rows are found again, they
//! stay with the model: *the n-th clone between two optimizer steps, once forked, goes on with the
//! memory of the n-th clone of the step before.* Clones are numbered on the thread that makes them, so
//! which worker gets which memory does not depend on when it runs.
//!
//! A model and its clones share one list until something maps one of them, as an optimizer does at each
//! step; what comes out has a list of its own, which takes over the memories at its first fork. So a
//! training goes on with its memories whatever is cloned or mapped beside it (a moving average of the
//! weights, say), and a second training from a clone of the same model finds none.

use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::tensor::Device;

use super::{
    memory::{MemoryHandle, MemoryState},
    schedule::Progress,
};

#[derive(Debug, Default)]
pub(crate) struct Workers(Mutex<List>);

#[derive(Debug, Default)]
struct List {
    workers: Vec<Worker>,
    /// How far the workers had come when they were taken over.
    progress: Option<Progress>,
    /// The list of an earlier step, whose workers this one has not taken over yet.
    before: Option<Arc<Workers>>,
}

#[derive(Debug)]
struct Worker {
    number: usize,
    /// None before the first fork of a memory that comes from a record.
    device: Option<Device>,
    /// Whether it has been asked for since the last optimizer step.
    seen: bool,
    memory: MemoryHandle,
}

impl Workers {
    /// As they are in a record, by their numbers.
    pub(crate) fn loaded(states: Vec<(usize, MemoryState)>) -> Self {
        let worker = |(number, state)| Worker {
            number,
            device: None,
            seen: false,
            memory: MemoryHandle::new(state),
        };
        Self(Mutex::new(List {
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

    /// The memory for the fork of the clone with a number: that of the worker with this number, unless
    /// the model itself (`own`) has taken more steps since; a copy of the model's where there is none.
    ///
    /// A worker whose data has ended is no longer cloned for, and those after it get lower numbers. On
    /// another device they then find the memory with the next higher number that nobody has asked for.
    pub(crate) fn memory(&self, number: usize, device: &Device, own: &MemoryState) -> MemoryHandle {
        let mut list = self.lock();
        if let Some(before) = list.before.take() {
            list.workers = mem::take(&mut before.lock().workers);
            list.workers
                .iter_mut()
                .for_each(|worker| worker.seen = false);
            list.progress = Some(list.farthest(own));
        }
        let fits = |worker: &&mut Worker| {
            let here = worker.device.as_ref().is_none_or(|other| other == device);
            let meant = worker.number == number || worker.number > number && !worker.seen;
            here && meant && !worker.memory.is_shared()
        };
        let found = list.workers.iter_mut().filter(fits);
        if let Some(worker) = found.min_by_key(|worker| worker.number) {
            worker.device = Some(device.clone());
            worker.seen = true;
            let mut state = worker.memory.lock();
            match state.progress.step < own.progress.step {
                true => *state = own.to_device(device),
                // What comes from a record has no device yet.
                false => *state = state.to_device(device),
            }
            state.watch.join(&own.watch);
            drop(state);
            return worker.memory.clone();
        }
        // A worker that joins later goes on with the schedule of the others.
        let mut state = own.to_device(device);
        state.progress = list.progress.unwrap_or(own.progress);
        let memory = MemoryHandle::new(state);
        list.workers.push(Worker {
            number,
            device: Some(device.clone()),
            seen: true,
            memory: memory.clone(),
        });
        memory
    }

    /// Drops the memory of a fork that is trained itself, and no worker.
    pub(crate) fn forget(&self, memory: &MemoryHandle) {
        let mut list = self.lock();
        list.workers.retain(|worker| !worker.memory.is(memory));
    }

    /// The states of all workers with their numbers, and the progress of the training: that of the model
    /// itself (`own`), or of the worker that has come farthest.
    pub(crate) fn states(&self, own: &MemoryState) -> (Vec<(usize, MemoryState)>, MemoryState) {
        let list = self.lock();
        if let Some(before) = &list.before {
            return before.states(own);
        }
        let state = |worker: &Worker| (worker.number, worker.memory.lock().clone());
        let mut states: Vec<_> = list.workers.iter().map(state).collect();
        states.sort_by_key(|(number, _)| *number);
        let progress = list.farthest(own);
        let model = MemoryState {
            progress,
            ..own.clone()
        };
        (states, model)
    }
}

impl List {
    /// The progress of the model itself (`own`), or of the worker that has come farther.
    fn farthest(&self, own: &MemoryState) -> Progress {
        let workers = self.workers.iter();
        let progress = workers.map(|worker| worker.memory.lock().progress);
        progress.fold(own.progress, |farthest, progress| {
            match progress.step > farthest.step {
                true => progress,
                false => farthest,
            }
        })
    }
}
