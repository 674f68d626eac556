//! The state of a layer as a part of its module.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use burn::{
    backend::{Device as _, DeviceId},
    module::{
        Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    },
    tensor::Device,
};

use super::{
    device::{DeviceState, StateHandle},
    offer::{self, Purpose, Shown, Wish},
    record::{self, SavedState, StateRecord},
    watch::StepReport,
};
use crate::config::AopConfig;

/// What a layer keeps between steps: one [`DeviceState`] for each device that it is trained on.
///
/// Clones and forks of a layer share it, as those of Burn's `BatchNorm` share its running state. Because each device has
/// a state of its own, what workers on several devices do depends on no order.
#[derive(Debug, Clone)]
pub(crate) struct LayerState {
    /// Locked before the state of a device, never after it.
    devices: Arc<Mutex<Vec<OnDevice>>>,
    /// The device of this clone, without autodiff. A module without weights has none, and is where its input is.
    device: Option<Device>,
    origin: Option<Origin>,
    /// How often this clone has been mapped, as an optimizer does at each step, from 1.
    maps: u64,
    record: StateRecord,
}

#[derive(Debug, Clone)]
struct OnDevice {
    device: DeviceId,
    state: StateHandle,
}

/// The device from which a clone has come to its own.
#[derive(Debug, Clone)]
struct Origin {
    device: DeviceId,
    /// None in a fork. A clone that was moved takes the state there along at its first step, once.
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

    /// The state on a device, for a forward pass: it changes nothing but what the pass counts.
    pub(crate) fn on(&self, device: &Device) -> StateHandle {
        self.at(id(device))
    }

    /// The state on the device of this clone, for a forward pass.
    pub(crate) fn here(&self) -> StateHandle {
        let device = self.device.as_ref();
        self.on(device.expect("only modules without weights have no device"))
    }

    fn at(&self, device: DeviceId) -> StateHandle {
        find_or_add(&mut self.lock(), device)
    }

    /// The state on the device of this clone, for a backward pass, and how often this clone has been mapped.
    ///
    /// A clone that was moved goes on with the state on the device before, if that has come farther, and takes its rows. A
    /// fork on a device without a state goes on with the progress and the averages there. It leaves the rows, which may be those
    /// of another worker, and takes what was known before the present optimizer step, because workers take their passes in no
    /// order.
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
        // The list of devices is locked meanwhile, so that no other pass sees half of it.
        let (mut before, mut state) = (before.lock(), here.lock());
        let replaced = match is_first {
            Some(true) => Some(state.go_on_from(before.move_out())),
            Some(false) => None,
            None if state.is_new() => Some(state.go_on_from(before.before(self.maps))),
            None => None,
        };
        drop((before, state, devices));
        // What is dropped may have to be waited for.
        drop(replaced);
        (here, self.maps)
    }

    /// What the layer knows of itself where this clone is.
    pub(crate) fn present(&self) -> DeviceState {
        let here = find_or_blank(&self.lock(), self.device());
        match self.is_to_move(&here) {
            Some(before) => before.lock().clone(),
            None => here,
        }
    }

    /// The state that the next step of this clone, which was moved, takes along.
    fn is_to_move(&self, here: &DeviceState) -> Option<StateHandle> {
        let moved = self.origin.as_ref()?.moved.as_ref()?;
        let before = self.before().filter(|_| !moved.load(Ordering::Relaxed))?;
        let is_ahead = before.lock().is_ahead_of(here);
        is_ahead.then_some(before)
    }

    /// The state on the device that this clone has come from.
    fn before(&self) -> Option<StateHandle> {
        let origin = self.origin.as_ref()?;
        let before = find(&self.lock(), origin.device);
        before.filter(|_| self.device() != Some(origin.device))
    }

    /// Has the steps on the device of this clone watched, and one of `error_interval` gradients compared. Returns the
    /// last step, if nobody has been told of it.
    pub(crate) fn watched(&self, error_interval: Option<u64>) -> Option<StepReport> {
        let state = self.here();
        let mut state = state.lock();
        state.watch.is_on = true;
        state.watch.error_interval = error_interval;
        state.watch.report.take()
    }

    /// Tells the observer, if there is one, of a gradient that is exact at every step.
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
                error: None,
            });
        }
    }

    /// A state that no other layer shares, with these in the place of what is kept now. Observers stay.
    fn with_states(self, states: Vec<SavedState>) -> Self {
        let here = self.device();
        let mut own = Self {
            devices: Arc::default(),
            origin: None,
            ..self.clone()
        };
        let mut first = None;
        for SavedState { device, state } in states {
            // Records of before do not tell.
            let Some(device) = device.or(here) else {
                continue;
            };
            if !state.is_blank() {
                first.get_or_insert(device);
                *own.at(device).lock() = state;
            }
        }
        // The state of a model that was saved on another device is that of the model.
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

    /// A new state, that no other layer shares. Observers stay.
    pub(crate) fn renewed(self) -> Self {
        self.with_states(Vec::new())
    }

    /// The same state, that no other layer shares from now on.
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

    /// A state that no other layer shares, without what another configuration has no use for.
    pub(crate) fn reconfigured(self, before: &AopConfig, after: &AopConfig) -> Self {
        let own = self.detached();
        for on in own.lock().iter() {
            on.state.lock().reconfigure(before, after);
        }
        own
    }

    /// The same state. The first step on the new device goes on with that on the old one, and takes its rows.
    pub(crate) fn moved_to(self, device: &Device) -> Self {
        self.come_to(device, Some(Arc::default()))
    }

    /// The same state. On a device that has none yet a fork goes on from that on the old one, without its rows.
    pub(crate) fn forked_to(self, device: &Device) -> Self {
        self.come_to(device, None)
    }

    fn come_to(self, device: &Device, moved: Option<Arc<AtomicBool>>) -> Self {
        let (to, from) = (id(device), self.device());
        let Some(from) = from.filter(|&from| from != to) else {
            return self;
        };
        // A clone that has not taken a step where it is still comes from where it came from.
        let here = find_or_blank(&self.lock(), Some(from));
        let waits = here.is_new() || self.is_to_move(&here).is_some();
        let origin = match self.origin.clone().filter(|_| waits) {
            // A fork stays one, which leaves the rows.
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

    /// Shows a visitor the state of a layer with so many inputs and outputs.
    pub(crate) fn show<V: ModuleVisitor>(&self, widths: [usize; 2], visitor: &mut V) {
        let purpose = Purpose::of::<V>();
        if purpose == Purpose::Exchange {
            return;
        }
        let states = match purpose {
            Purpose::Record => self.to_save(),
            _ => Vec::new(),
        };
        let shown = self.device.is_some().then(|| Shown {
            widths,
            state: self.clone(),
        });
        self.record.visit(&states, shown, visitor);
    }

    /// The state of this clone first, then those of other devices in order.
    fn to_save(&self) -> Vec<SavedState> {
        let here = SavedState {
            device: self.device(),
            state: self.present(),
        };
        // What the next step takes along is the state of this clone already.
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

    /// What a mapper makes of the state of a layer with so many inputs and outputs, whose weight, mapped before, has
    /// been `replaced` by another.
    pub(crate) fn map_by<M: ModuleMapper>(
        self,
        widths: [usize; 2],
        replaced: bool,
        mapper: &mut M,
    ) -> Self {
        let purpose = Purpose::of::<M>();
        let loaded = match purpose {
            Purpose::Exchange => None,
            Purpose::Record | Purpose::Other => {
                self.record.map(widths, self.device.as_ref(), mapper)
            }
        };
        match (loaded, purpose) {
            (Some(states), _) => self.with_states(states),
            (None, Purpose::Other) => Self {
                maps: self.maps + 1,
                ..self
            },
            // What is pending belongs to the weight that it was left by.
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

/// The state of a module that has no weight.
impl Module for LayerState {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.show([0, 0], visitor);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let (wish, state) = offer::offer(None, || self.map_by([0, 0], false, mapper));
        match wish {
            None => state,
            Some(Wish::Own(_)) => state.detached(),
            Some(Wish::Reset) => state.renewed(),
        }
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn to_device(self, device: &Device) -> Self {
        self.moved_to(device)
    }

    fn fork(self, device: &Device) -> Self {
        self.forked_to(device)
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn train(self) -> Self {
        self
    }

    fn materialize(self) -> Self {
        self
    }
}

impl ModuleDisplayDefault for LayerState {
    fn content(&self, content: Content) -> Option<Content> {
        Some(content)
    }

    fn num_params(&self) -> usize {
        0
    }
}

impl ModuleDisplay for LayerState {}

impl std::fmt::Display for LayerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(record::CONTAINER)
    }
}
