//! The state of a layer as a part of its module.

#[cfg(target_family = "wasm")]
use std::sync::atomic::AtomicU64;
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

#[cfg(not(target_family = "wasm"))]
use burn::tensor::{DType, Distribution, Int, Tensor};
use burn::{
    backend::{Device as _, DeviceId},
    module::{ModuleMapper, ModuleVisitor},
    tensor::Device,
};

use super::{
    device::{DeviceState, StateHandle},
    offer::{Purpose, Shown},
    record::{SavedState, StateRecord},
    watch::StepReport,
};
use crate::{
    config::AopConfig,
    rows::random::{Random, stream},
};

/// What a layer keeps between steps: one [`DeviceState`] for each device that it is trained on.
///
/// Clones and forks of a layer share it, as those of Burn's `BatchNorm` share its running state.
/// Each device has its own state, so that the order of workers on several devices has no effect.
#[derive(Debug, Clone)]
pub(crate) struct LayerState {
    /// This list is locked before the state of a device, never after it.
    devices: Arc<Mutex<Vec<OnDevice>>>,
    /// The device of this clone, without autodiff. None in a module without weights.
    device: Option<Device>,
    origin: Option<Origin>,
    /// A number that belongs to the layer's place in its model. Random bits of forward passes
    /// depend on it, because what they round is part of the gradients of the layers below.
    place: u64,
    /// How often this clone has been mapped, counted from 1. An optimizer maps it at each step.
    maps: u64,
    record: StateRecord,
}

#[derive(Debug, Clone)]
struct OnDevice {
    device: DeviceId,
    state: StateHandle,
}

/// The device that a clone comes from.
#[derive(Debug, Clone)]
struct Origin {
    device: DeviceId,
    /// None in a fork. In a clone that was moved, whether it has taken the state there along.
    moved: Option<Arc<AtomicBool>>,
}

impl LayerState {
    pub(crate) fn new(device: &Device) -> Self {
        Self {
            device: Some(device.clone().inner()),
            ..Self::without_device()
        }
    }

    /// The state of a module without weights.
    pub(crate) fn without_device() -> Self {
        Self {
            devices: Arc::default(),
            device: None,
            origin: None,
            place: 0,
            maps: 1,
            record: StateRecord::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OnDevice>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn device(&self) -> Option<DeviceId> {
        self.device.as_ref().map(id)
    }

    /// The state on a device, for a forward pass, which takes no state along from another device.
    pub(crate) fn on(&self, device: &Device) -> StateHandle {
        self.at(id(device))
    }

    /// The same state for a layer at another place of its model.
    pub(crate) fn at_place(self, place: u64) -> Self {
        Self { place, ..self }
    }

    /// The random bits by which a forward pass on a device rounds an activation. The pass is
    /// counted.
    pub(crate) fn pass_random(&self, seed: u64, device: &Device) -> Random {
        Random {
            seed: stream(seed, self.place),
            step: self.on(device).lock().count_pass(),
        }
    }

    /// The random bits of a dropout in a forward pass on a device. The pass is counted, and the first
    /// one has a random number, so that every dropout has bits of its own.
    pub(crate) fn dropout_random(&self, seed: u64, device: &Device) -> Random {
        let state = self.on(device);
        // The state is not locked while this waits for the device.
        let is_new = state.lock().passes == 0;
        let first = is_new.then(|| first_pass(device));
        let mut state = state.lock();
        if let Some(first) = first.filter(|_| state.passes == 0) {
            state.passes = first;
        }
        Random {
            seed: stream(seed, self.place),
            step: state.count_pass(),
        }
    }

    /// The state on the device of this clone, for a forward pass.
    pub(crate) fn here(&self) -> StateHandle {
        let device = self.device.as_ref();
        self.on(device.expect("only modules without weights have no device"))
    }

    fn at(&self, device: DeviceId) -> StateHandle {
        find_or_add(&mut self.lock(), device)
    }

    /// The state on the device of this clone, for a backward pass, and how often it was mapped.
    ///
    /// A clone that was moved takes the rows of the device that it comes from, and goes on with the
    /// state there if that has come farther. A fork on a device without a state takes the progress
    /// and the averages as they were before the present optimizer step, because workers run in any
    /// order. It leaves the rows, which may be those of another worker.
    pub(crate) fn in_step(&self) -> (StateHandle, u64) {
        let (Some(device), Some(origin)) = (self.device(), &self.origin) else {
            return (self.here(), self.maps);
        };
        let is_first = origin
            .moved
            .as_ref()
            .map(|moved| !moved.swap(true, Ordering::Relaxed));
        let mut devices = self.lock();
        let here = find_or_add(&mut devices, device);
        let before = find(&devices, origin.device).filter(|_| device != origin.device);
        let Some(before) = before else {
            return (here, self.maps);
        };
        // The list of devices stays locked, so that no other pass sees a state that has half moved.
        let (mut before, mut state) = (before.lock(), here.lock());
        let replaced = match is_first {
            Some(true) => Some(state.go_on_from(before.move_out())),
            Some(false) => None,
            None if state.is_new() => Some(state.go_on_from(before.before(self.maps))),
            None => None,
        };
        drop((before, state, devices));
        // The drop of a reading may wait for the device.
        drop(replaced);
        (here, self.maps)
    }

    /// A copy of the state that the next step of this clone goes on from.
    pub(crate) fn present(&self) -> DeviceState {
        let here = find_or_blank(&self.lock(), self.device());
        match self.is_to_move(&here) {
            Some(before) => before.lock().clone(),
            None => here,
        }
    }

    /// The state that the next step of this clone takes along, if the clone was moved.
    fn is_to_move(&self, here: &DeviceState) -> Option<StateHandle> {
        let moved = self.origin.as_ref()?.moved.as_ref()?;
        let before = self.before().filter(|_| !moved.load(Ordering::Relaxed))?;
        let is_ahead = before.lock().is_ahead_of(here);
        is_ahead.then_some(before)
    }

    /// The state on the device that this clone comes from.
    fn before(&self) -> Option<StateHandle> {
        let origin = self.origin.as_ref()?;
        let before = find(&self.lock(), origin.device);
        before.filter(|_| self.device() != Some(origin.device))
    }

    /// Begins to report the steps on this device, and to compare one gradient in `error_interval`
    /// with the exact one. Returns the last step, if no observer has been told of it.
    pub(crate) fn watched(&self, error_interval: Option<u64>) -> Option<StepReport> {
        let state = self.here();
        let mut state = state.lock();
        state.watch.is_on = true;
        state.watch.error_interval = error_interval;
        state.watch.report.take()
    }

    /// Tells the observer, if there is one, of a step of a layer whose gradients are always exact.
    pub(crate) fn note_exact(&self, rows: usize, input: bool) {
        let found = self.device().and_then(|device| find(&self.lock(), device));
        let Some(state) = found else {
            return;
        };
        let mut state = state.lock();
        if state.watch.is_on {
            state.watch.report = Some(StepReport {
                step: state.progress.step,
                k: rows,
                rows,
                input_rows: input.then_some(rows),
                noise: None,
                added_noise: Some(0.0),
                time: 1.0,
                error: None,
            });
        }
    }

    /// A state that no other layer shares, with `states` as its content. Observers stay.
    fn with_states(self, states: Vec<SavedState>) -> Self {
        let here = self.device();
        let mut own = Self {
            devices: Arc::default(),
            origin: None,
            ..self.clone()
        };
        let mut first = None;
        for SavedState { device, state } in states {
            // A state that names no device belongs to this one.
            let Some(device) = device.or(here) else {
                continue;
            };
            if !state.is_blank() {
                first.get_or_insert(device);
                *own.at(device).lock() = state;
            }
        }
        // A model that was saved on another device goes on with its state there.
        let saved_here = here.is_none_or(|here| find(&own.lock(), here).is_some());
        own.origin = first.filter(|_| !saved_here).map(|device| Origin {
            device,
            moved: Some(Arc::default()),
        });
        for before in self.lock().iter() {
            let watch = before.state.lock().watch.renewed();
            if watch.is_on {
                own.at(before.device).lock().watch = watch;
            }
        }
        own
    }

    /// A new state that no other layer shares. Observers stay.
    pub(crate) fn renewed(self) -> Self {
        self.with_states(Vec::new())
    }

    /// A copy that no other layer shares.
    pub(crate) fn detached(self) -> Self {
        let copy = |on: &OnDevice| OnDevice {
            device: on.device,
            state: StateHandle::new(on.state.lock().clone()),
        };
        let devices = self.lock().iter().map(copy).collect();
        let origin = self.origin.as_ref().map(Origin::detached);
        Self {
            devices: Arc::new(Mutex::new(devices)),
            origin,
            ..self
        }
    }

    /// A copy that no other layer shares, without what the new configuration does not use.
    pub(crate) fn reconfigured(self, before: &AopConfig, after: &AopConfig) -> Self {
        let own = self.detached();
        for on in own.lock().iter() {
            on.state.lock().reconfigure(before, after);
        }
        own
    }

    /// The same state. Its first step on the new device goes on from the old one, with its rows.
    pub(crate) fn moved_to(self, device: &Device) -> Self {
        self.come_to(device, Some(Arc::default()))
    }

    /// The same state. On a device without one, a fork goes on from the old one without its rows.
    pub(crate) fn forked_to(self, device: &Device) -> Self {
        self.come_to(device, None)
    }

    fn come_to(self, device: &Device, moved: Option<Arc<AtomicBool>>) -> Self {
        let (to, from) = (id(device), self.device());
        let Some(from) = from.filter(|&from| from != to) else {
            return self;
        };
        // A clone that has not taken a step on its device keeps its origin.
        let here = find_or_blank(&self.lock(), Some(from));
        let waits = here.is_new() || self.is_to_move(&here).is_some();
        let origin = match self.origin.clone().filter(|_| waits) {
            // A fork that is moved remains a fork, which leaves the rows.
            Some(origin) => Some(Origin {
                moved: moved.filter(|_| origin.moved.is_some()),
                ..origin
            }),
            None => Some(Origin {
                device: from,
                moved,
            }),
        };
        Self {
            device: Some(device.clone().inner()),
            origin,
            ..self
        }
    }

    /// Shows a visitor the state of a layer with these numbers of inputs and outputs.
    pub(crate) fn show<V: ModuleVisitor>(
        &self,
        aop: AopConfig,
        widths: [usize; 2],
        visitor: &mut V,
    ) {
        let purpose = Purpose::of::<V>();
        if purpose.hides_state(&aop) {
            return;
        }
        let states = match purpose {
            Purpose::Record => self.to_save(),
            _ => Vec::new(),
        };
        let shown = self.device.is_some().then(|| Shown {
            widths,
            aop,
            state: self.clone(),
        });
        self.record.visit(states, shown, visitor);
    }

    /// The state of this clone first, then those of other devices in order.
    fn to_save(&self) -> Vec<SavedState> {
        let here = SavedState {
            device: self.device(),
            state: self.present(),
        };
        // The state that the next step takes along is already `here`.
        let there = find_or_blank(&self.lock(), self.device());
        let moved = self.is_to_move(&there).and(self.origin.as_ref());
        let taken = moved.map(|origin| origin.device);
        let devices = self.lock();
        let others = devices.iter().filter_map(|on| {
            let device = Some(on.device);
            if device == here.device || device == taken {
                return None;
            }
            let state = on.state.lock().clone();
            (!state.is_left()).then_some(SavedState { device, state })
        });
        let mut others: Vec<_> = others.collect();
        others.sort_by_key(|saved| saved.device);
        std::iter::once(here).chain(others).collect()
    }

    /// Maps the state of a layer with these numbers of inputs and outputs. `replaced` says whether
    /// the mapper has put another weight in the place of the layer's weight before.
    pub(crate) fn map_by<M: ModuleMapper>(
        self,
        aop: &AopConfig,
        widths: [usize; 2],
        replaced: bool,
        mapper: &mut M,
    ) -> Self {
        let purpose = Purpose::of::<M>();
        let loaded = match purpose.hides_state(aop) {
            true => None,
            false => self.record.map(widths, self.device.as_ref(), mapper),
        };
        match (loaded, purpose) {
            (Some(states), _) => self.with_states(states),
            (None, Purpose::Other) => Self {
                maps: self.maps + 1,
                ..self
            },
            // The rows that wait in the memory belong to the weight that was replaced.
            (None, _) if replaced => self.renewed(),
            (None, _) => self.detached(),
        }
    }
}

impl Origin {
    fn detached(&self) -> Self {
        let moved = self.moved.as_ref();
        Self {
            device: self.device,
            moved: moved.map(|moved| Arc::new(moved.load(Ordering::Relaxed).into())),
        }
    }
}

/// A random number from 1, by Burn's generator.
#[cfg(not(target_family = "wasm"))]
fn first_pass(device: &Device) -> u64 {
    let range = Distribution::Uniform(0.0, f64::from(1u16 << 15));
    let drawn = Tensor::<1, Int>::random([3], range, (&device.clone().inner(), DType::I32));
    let drawn = drawn.into_data();
    drawn
        .iter::<u64>()
        .fold(1, |number, part| number << 15 | part)
}

/// A browser cannot wait for its GPU, so a count takes the place of a random number.
#[cfg(target_family = "wasm")]
fn first_pass(_: &Device) -> u64 {
    static DROPOUTS: AtomicU64 = AtomicU64::new(1);
    DROPOUTS.fetch_add(1, Ordering::Relaxed) << 32
}

/// A device is the same with and without autodiff.
fn id(device: &Device) -> DeviceId {
    device.clone().inner().as_dispatch().to_id()
}

fn find(devices: &[OnDevice], device: DeviceId) -> Option<StateHandle> {
    let found = devices.iter().find(|on| on.device == device)?;
    Some(found.state.clone())
}

fn find_or_add(devices: &mut Vec<OnDevice>, device: DeviceId) -> StateHandle {
    find(devices, device).unwrap_or_else(|| {
        let state = StateHandle::default();
        devices.push(OnDevice {
            device,
            state: state.clone(),
        });
        state
    })
}

fn find_or_blank(devices: &[OnDevice], device: Option<DeviceId>) -> DeviceState {
    let found = device.and_then(|device| find(devices, device));
    found.map(|state| state.lock().clone()).unwrap_or_default()
}
