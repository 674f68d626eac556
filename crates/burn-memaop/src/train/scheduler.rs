use burn::lr_scheduler::{LrScheduler, LrSchedulerRecord, module_lr_scheduler::ModuleLrScheduler};

use crate::state::learning_rate::SharedLearningRate;

/// A scheduler whose learning rate memories [follow](SharedLearningRate).
///
/// burn-train takes a learning rate from its scheduler after the backward pass, and the published
/// memory needs it before. So this one is always a step ahead of what it returns: the rate of a
/// step is set when the scheduler is made, loaded, or gives the rate of the step before.
///
/// A rate of 0, with which some schedules begin or end, is not followed: memories stay in the units
/// of the last positive one. Of a scheduler with groups the base rate is followed, and the groups are
/// dropped; give them to a
/// [`ModuleLrScheduler`](burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler) of this one.
///
/// ```
/// # use burn::{lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig, tensor::Device};
/// # use burn_memaop::{MemAopLinearConfig, SharedLearningRate, train::FollowedLrScheduler};
/// # let model = MemAopLinearConfig::new(3, 2).init(&Device::flex().autodiff());
/// let rate = SharedLearningRate::new();
/// rate.attach(&model);
/// let scheduler = CosineAnnealingLrSchedulerConfig::new(0.1, 100).init()?;
/// let scheduler = FollowedLrScheduler::new(scheduler, rate);
/// // Learner::new(model, optimizer, scheduler)
/// # Ok::<(), String>(())
/// ```
#[derive(Clone)]
pub struct FollowedLrScheduler {
    scheduler: ModuleLrScheduler,
    rate: SharedLearningRate,
    /// The rate to return next.
    next: f64,
    /// The state of the scheduler before it gave that rate.
    record: LrSchedulerRecord,
}

impl FollowedLrScheduler {
    /// Takes the first step of the scheduler, and sets the rate to it.
    pub fn new(scheduler: impl Into<ModuleLrScheduler>, rate: SharedLearningRate) -> Self {
        let scheduler = scheduler.into();
        let mut followed = Self {
            record: scheduler.to_record(),
            scheduler,
            rate,
            next: 0.0,
        };
        followed.advance();
        followed
    }

    fn advance(&mut self) {
        self.record = self.scheduler.to_record();
        self.next = self.scheduler.step().base();
        if let Err(error) = self.rate.set(self.next) {
            // Rates that are 0 are usual.
            debug_assert!(self.next == 0.0, "{error}");
        }
    }
}

impl LrScheduler for FollowedLrScheduler {
    fn step(&mut self) -> f64 {
        let rate = self.next;
        self.advance();
        rate
    }

    fn to_record(&self) -> LrSchedulerRecord {
        self.record.clone()
    }

    fn load_record(&mut self, record: LrSchedulerRecord) {
        self.scheduler = self.scheduler.clone().load_record(record);
        self.advance();
    }
}
