use std::sync::{
    Arc, Mutex, OnceLock, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use burn::{
    module::{ModuleMapper, ModuleVisitor},
    tensor::Device,
};

use super::{
    memory::{MemoryHandle, MemoryState, WeakHandle},
    noise_scale::Averages,
    offer::{Purpose, Shown},
    record::MemoryRecord,
    watch::Seen,
    workers::Workers,
};
use crate::config::AopConfig;

/// The memory of one layer, as a part of its module: `clone`, `fork` and so on are those of Burn's
/// modules.
///
/// A clone copies the state (two references to the same tensors) and goes its own way. A fork goes on
/// with the memory of a worker, see [`Workers`], from its first forward pass in training on. What a fork
/// becomes when it is cloned and mapped, as an optimizer does with the fork of burn-train's single-device
/// strategy, is the model itself if it is trained, and then takes the memory from the workers.
#[derive(Debug)]
pub(crate) struct LayerMemory {
    /// The state of the layer; of a fork, a copy of that of the model.
    own: MemoryHandle,
    fork: Option<Fork>,
    /// What the fork that this comes from works with.
    forked: Option<WeakHandle>,
    workers: Mutex<Arc<Workers>>,
    /// Which clone this is of what it was cloned from, and how many have been cloned from it.
    number: usize,
    clones: AtomicUsize,
    record: MemoryRecord,
}

#[derive(Debug)]
struct Fork {
    device: Device,
    memory: OnceLock<MemoryHandle>,
}

impl LayerMemory {
    pub(crate) fn new(device: &Device) -> Self {
        Self::with_state(
            MemoryState::default(),
            Workers::default(),
            MemoryRecord::new(device),
        )
    }

    fn with_state(state: MemoryState, workers: Workers, record: MemoryRecord) -> Self {
        Self {
            own: MemoryHandle::new(state),
            fork: None,
            forked: None,
            workers: Mutex::new(Arc::new(workers)),
            number: 0,
            clones: AtomicUsize::new(0),
            record,
        }
    }

    fn workers(&self) -> Arc<Workers> {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.clone()
    }

    /// The memory that a forward pass in training takes along.
    pub(crate) fn in_training(&self) -> MemoryHandle {
        let Some(Fork { device, memory }) = &self.fork else {
            if let Some(memory) = &self.forked {
                self.workers().forget(memory);
            }
            return self.own.clone();
        };
        let memory = memory.get_or_init(|| {
            let own = self.own.lock().clone();
            self.workers().memory(self.number, device, &own)
        });
        memory.clone()
    }

    /// The present state.
    pub(crate) fn handle(&self) -> &MemoryHandle {
        let fork = self.fork.as_ref().and_then(|fork| fork.memory.get());
        fork.unwrap_or(&self.own)
    }

    /// Tells the observer, if there is one, of a gradient that is exact at every step.
    pub(crate) fn note_exact(&self, rows: usize, input: bool) {
        let memory = self.in_training();
        let mut state = memory.lock();
        if state.watch.intervals.is_some() {
            state.watch.seen = Some(Seen {
                step: state.progress.step,
                k: rows,
                rows,
                input_rows: input.then_some(rows),
                noise: None,
                measurement: None,
            });
        }
    }

    /// Forgets all rows and starts counting steps from 0, in forks to come as well. Clones, and what
    /// this was cloned from, keep theirs.
    pub(crate) fn reset(&self) {
        let mut state = self.handle().lock();
        *state = MemoryState::default().watched_by(&state.watch);
        drop(state);
        *self.workers.lock().unwrap_or_else(PoisonError::into_inner) = Arc::default();
    }

    /// Forgets what another configuration has no use for.
    pub(crate) fn reconfigure(&self, before: &AopConfig, after: &AopConfig) {
        if after.method.memory().decay().is_none() {
            self.drop_rows();
        }
        if after.outer_products != before.outer_products {
            self.forget_k();
        }
        if after.input_gradient != before.input_gradient {
            self.forget_input_rows();
        }
    }

    /// Forgets the rows alone.
    fn drop_rows(&self) {
        self.handle().lock().rows = None;
    }

    /// Forgets the K that was found and what it was found by.
    fn forget_k(&self) {
        let mut state = self.handle().lock();
        let MemoryState {
            progress,
            carried,
            noise,
            reading,
            ..
        } = &mut *state;
        (progress.ratio, progress.chosen) = (None, None);
        (*carried, *reading) = (None, None);
        let input_added = noise.input_added;
        *noise = Averages {
            input_added,
            ..Averages::default()
        };
    }

    /// The same of the rows of the gradient of the input.
    fn forget_input_rows(&self) {
        let mut state = self.handle().lock();
        state.progress.input_chosen = None;
        state.noise.input_added = None;
        state.input_reading = None;
    }

    fn copy(&self, number: usize) -> Self {
        let fork = self.fork.as_ref().and_then(|fork| fork.memory.get());
        Self {
            own: MemoryHandle::new(self.handle().lock().clone()),
            fork: None,
            forked: fork.map(MemoryHandle::downgrade).or(self.forked.clone()),
            workers: Mutex::new(self.workers()),
            number,
            clones: AtomicUsize::new(0),
            record: self.record.clone(),
        }
    }

    /// The same memory on another device.
    pub(crate) fn to_device(&self, device: &Device) -> Self {
        let device = device.clone().inner();
        let moved = self.copy(self.number);
        let state = moved.own.lock().to_device(&device);
        Self {
            own: MemoryHandle::new(state),
            record: moved.record.on_device(&device),
            ..moved
        }
    }

    pub(crate) fn fork(self, device: &Device) -> Self {
        let fork = Fork {
            device: device.clone().inner(),
            memory: OnceLock::new(),
        };
        Self {
            fork: Some(fork),
            ..self.to_device(device)
        }
    }

    /// A snapshot for inference.
    pub(crate) fn valid(&self) -> Self {
        self.copy(self.number)
    }

    /// Of a layer with so many inputs and outputs.
    pub(crate) fn visit<V: ModuleVisitor>(&self, widths: [usize; 2], visitor: &mut V) {
        if Purpose::of::<V>() == Purpose::Exchange {
            return;
        }
        let own = self.handle().lock().clone();
        let (workers, state) = match Purpose::of::<V>() {
            Purpose::Record => self.workers().states(&own),
            _ => (Vec::new(), own),
        };
        let shown = Shown {
            widths,
            memory: self.handle().clone(),
        };
        self.record.visit(&state, &workers, shown, visitor);
    }

    /// What a mapper makes of the memory of a layer with so many inputs and outputs, whose weight, mapped before, has
    /// been `replaced` by another.
    pub(crate) fn map<M: ModuleMapper>(
        mut self,
        widths: [usize; 2],
        replaced: bool,
        mapper: &mut M,
    ) -> Self {
        let purpose = Purpose::of::<M>();
        let loaded = match purpose {
            Purpose::Exchange => None,
            Purpose::Record | Purpose::Other => self.record.map(widths, mapper),
        };
        // A loaded memory starts a life of its own.
        if let Some((state, workers)) = loaded {
            let state = state.watched_by(&self.handle().lock().watch);
            let workers = Workers::loaded(workers, state.progress.step);
            return Self::with_state(state, workers, self.record);
        }
        // What is pending belongs to the weight that it was left by.
        if replaced && purpose != Purpose::Other {
            let state = MemoryState::default().watched_by(&self.handle().lock().watch);
            return Self::with_state(state, Workers::default(), self.record);
        }

        let workers = Mutex::new(Arc::new(self.workers().after()));
        let fork = self.fork.take().and_then(|fork| fork.memory.into_inner());
        Self {
            forked: fork.as_ref().map(MemoryHandle::downgrade).or(self.forked),
            own: fork.unwrap_or(self.own),
            fork: None,
            workers,
            number: self.number,
            clones: AtomicUsize::new(0),
            record: self.record,
        }
    }
}

impl Clone for LayerMemory {
    fn clone(&self) -> Self {
        self.copy(self.clones.fetch_add(1, Ordering::Relaxed))
    }
}
