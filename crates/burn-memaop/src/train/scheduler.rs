use burn::lr_scheduler::{LrScheduler, LrSchedulerRecord};

use crate::SharedLearningRate;

/// A scheduler whose learning rate memories [follow](SharedLearningRate).
///
/// burn-train takes a learning rate from its scheduler after the backward pass, and the published
/// memory needs it before. So this one is always a step ahead of what it returns: the rate of a
/// step is set when the scheduler is made, loaded, or gives the rate of the step before.
///
/// A rate of 0, with which some schedules begin or end, is not followed: memories stay in the units
/// of the last positive one.
///
/// ```
/// # use burn::{lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig, tensor::Device};
/// # use burn_memaop::{MemAopLinearConfig, SharedLearningRate, train::FollowedLrScheduler};
/// # let model = MemAopLinearConfig::new(3, 2).init(&Device::flex().autodiff());
/// let rate = SharedLearningRate::new();
/// rate.attach(&model);
/// let scheduler = CosineAnnealingLrSchedulerConfig::new(0.1, 100).init()?;
/// let scheduler = FollowedLrScheduler::new(scheduler, rate);
/// // Learner::new(model, optimizer, ModuleLrScheduler::new(scheduler))
/// # Ok::<(), String>(())
/// ```
#[derive(Clone)]
pub struct FollowedLrScheduler<S> {
    scheduler: S,
    rate: SharedLearningRate,
    /// The rate to return next.
    next: f64,
    /// The state of the scheduler before it gave that rate.
    record: LrSchedulerRecord,
}

impl<S: LrScheduler> FollowedLrScheduler<S> {
    /// Takes the first step of the scheduler, and sets the rate to it.
    pub fn new(scheduler: S, rate: SharedLearningRate) -> Self {
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
        self.next = self.scheduler.step();
        if let Err(error) = self.rate.set(self.next) {
            // Rates that are 0 are usual.
            debug_assert!(self.next == 0.0, "{error}");
        }
    }
}

impl<S: LrScheduler + Clone + 'static> LrScheduler for FollowedLrScheduler<S> {
    fn step(&mut self) -> f64 {
        let rate = self.next;
        self.advance();
        rate
    }

    fn to_record(&self) -> LrSchedulerRecord {
        self.record.clone()
    }

    fn load_record(&mut self, record: LrSchedulerRecord) {
        self.scheduler.load_record(record);
        self.advance();
    }
}
