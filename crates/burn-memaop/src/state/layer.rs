//! The state of a layer as a part of its module.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    record::{self, Saved, StateRecord},
    watch::Seen,
};
use crate::config::AopConfig;

/// What a layer keeps between steps: one [`DeviceState`] for each device that it is trained on.
///
/// Clones and forks of a layer share it, as those of Burn's `BatchNorm` share its running state. Because each device has
/// a state of its own, what workers on several devices do depends on no order.
#[derive(Debug, Clone)]
pub(crate) struct LayerState {
    devices: Arc<Mutex<Vec<OnDevice>>>,
    /// The device of this clone, without autodiff.
    device: Device,
    /// The device that this clone was moved from. The first step here goes on with the state there.
    moved_from: Option<Device>,
    record: StateRecord,
}

#[derive(Debug, Clone)]
struct OnDevice {
    /// None where a record does not tell, or was loaded on another device: the first device to ask takes the state.
    device: Option<DeviceId>,
    state: StateHandle,
}

impl LayerState {
    pub(crate) fn new(device: &Device) -> Self {
        Self {
            devices: Arc::default(),
            device: device.clone().inner(),
            moved_from: None,
            record: StateRecord::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OnDevice>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state on the device of this clone, for a pass in training.
    pub(crate) fn here(&self) -> StateHandle {
        self.on(&self.device)
    }

    /// The state on a device, for a pass in training.
    pub(crate) fn on(&self, device: &Device) -> StateHandle {
        let id = id(device);
        let mut devices = self.lock();
        if let Some(state) = find(&devices, Some(id)) {
            return state;
        }
        if let Some(unclaimed) = devices.iter_mut().find(|on| on.device.is_none()) {
            unclaimed.device = Some(id);
            return unclaimed.state.clone();
        }
        let before = self.before(&devices);
        let state = before.map_or_else(StateHandle::default, |before| {
            StateHandle::new(before.lock().move_out())
        });
        devices.push(OnDevice {
            device: Some(id),
            state: state.clone(),
        });
        state
    }

    /// The state that [`here`](Self::here) would give, if it would not be a new one.
    pub(crate) fn present(&self) -> Option<StateHandle> {
        let id = id(&self.device);
        let devices = self.lock();
        let found = find(&devices, Some(id)).or_else(|| find(&devices, None));
        found.or_else(|| self.before(&devices))
    }

    /// The state on the device that this clone was moved from.
    fn before(&self, devices: &[OnDevice]) -> Option<StateHandle> {
        let before = self.moved_from.as_ref()?;
        find(devices, Some(id(before)))
    }

    /// Tells the observer, if there is one, of a gradient that is exact at every step.
    pub(crate) fn note_exact(&self, rows: usize, input: bool) {
        let Some(state) = self.present() else {
            return;
        };
        let mut state = state.lock();
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

    /// A state that no other layer shares, with these in the place of what is kept now. Observers stay.
    fn with_states(self, states: Vec<Saved>) -> Self {
        let mut devices: Vec<OnDevice> = Vec::new();
        let here = id(&self.device);
        let knows_here = states.iter().any(|saved| saved.device == Some(here));
        let states = states.into_iter().enumerate();
        for (index, Saved { device, state }) in states.filter(|(_, saved)| !saved.state.is_blank())
        {
            // The state of the model itself, where it was saved on another device.
            let device = device.filter(|_| index > 0 || knows_here);
            match find(&devices, device) {
                Some(same) => same.lock().take_rows_of(state),
                None => devices.push(OnDevice {
                    device,
                    state: StateHandle::new(state),
                }),
            }
        }
        for before in self.lock().iter() {
            let watch = before.state.lock().watch.renewed();
            let known = devices.iter().find(|on| on.device == before.device);
            match known {
                Some(on) => on.state.lock().watch = watch,
                None if watch.intervals.is_none() => {}
                None => devices.push(OnDevice {
                    device: before.device,
                    state: StateHandle::new(DeviceState::watched_by(watch)),
                }),
            }
        }
        Self {
            devices: Arc::new(Mutex::new(devices)),
            moved_from: None,
            ..self
        }
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
        Self {
            devices: Arc::new(Mutex::new(devices)),
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
    pub(crate) fn to_device(&self, device: &Device) -> Self {
        let device = device.clone().inner();
        if device == self.device {
            return self.clone();
        }
        let here = id(&self.device);
        let moved_from = match find(&self.lock(), Some(here)) {
            Some(_) => Some(self.device.clone()),
            None => self.moved_from.clone(),
        };
        Self {
            device,
            moved_from,
            ..self.clone()
        }
    }

    /// The same state. On a device that has none yet a fork begins anew.
    pub(crate) fn fork(self, device: &Device) -> Self {
        let device = device.clone().inner();
        Self {
            moved_from: self.moved_from.filter(|_| device == self.device),
            device,
            ..self
        }
    }

    /// Shows a visitor the state of a layer with so many inputs and outputs.
    pub(crate) fn show<V: ModuleVisitor>(&self, widths: [usize; 2], visitor: &mut V) {
        let purpose = Purpose::of::<V>();
        if purpose == Purpose::Exchange {
            return;
        }
        let here = id(&self.device);
        let state = self.present().map(|state| state.lock().clone());
        let mut states = vec![Saved {
            device: Some(here),
            state: state.unwrap_or_default(),
        }];
        if purpose == Purpose::Record {
            states = self.to_save(states.remove(0));
        }
        let shown = Shown {
            widths,
            state: self.clone(),
        };
        self.record.visit(states, shown, visitor);
    }

    /// The state of this clone first, then those of other devices in order. Each has one set of rows at most.
    fn to_save(&self, here: Saved) -> Vec<Saved> {
        let devices = self.lock();
        let others = devices.iter().filter_map(|on| {
            // What is unclaimed is that of this clone already.
            let device = on.device.filter(|_| on.device != here.device)?;
            let state = on.state.lock().clone();
            (!state.is_blank()).then_some(Saved {
                device: Some(device),
                state,
            })
        });
        let mut others: Vec<_> = others.collect();
        others.sort_by_key(|saved| saved.device);
        let all = std::iter::once(here).chain(others);
        all.flat_map(|Saved { device, mut state }| {
            let more = state
                .rows
                .drain(1.min(state.rows.len())..)
                .collect::<Vec<_>>();
            let more = more.into_iter().map(DeviceState::of_rows);
            let states = std::iter::once(state).chain(more);
            states
                .map(move |state| Saved { device, state })
                .collect::<Vec<_>>()
        })
        .collect()
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
            Purpose::Record | Purpose::Other => self.record.map(widths, &self.device, mapper),
        };
        match (loaded, purpose) {
            (Some(states), _) => self.with_states(states),
            (None, Purpose::Other) => self,
            // What is pending belongs to the weight that it was left by.
            (None, _) if replaced => self.renewed(),
            (None, _) => self.detached(),
        }
    }
}

/// A device is the same with and without autodiff.
fn id(device: &Device) -> DeviceId {
    device.clone().inner().as_dispatch().to_id()
}

fn find(devices: &[OnDevice], device: Option<DeviceId>) -> Option<StateHandle> {
    let found = devices.iter().find(|on| on.device == device)?;
    Some(found.state.clone())
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
        Self::to_device(&self, device)
    }

    fn fork(self, device: &Device) -> Self {
        Self::fork(self, device)
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
