//! Which memory a fork goes on with: the workers of a model, step by step.

use burn::{
    module::{Module, ModuleMapper},
    store::ModuleRecord,
    tensor::{DType, Device},
};
use burn_memaop::MemAopLinear;

use crate::{
    memory::{K, N, assert_close, batch, device, layer, oracle, step},
    oracle::Oracle,
    support::Random,
};

/// What makes a step of an optimizer, as far as memories go.
struct Optimizer;
impl ModuleMapper for Optimizer {}

/// What burn-train's multi-device strategy does: each step clones the model for each worker, in order;
/// each worker forks its clone, in any order and on any thread, and drops it.
struct Strategy {
    model: MemAopLinear,
    oracles: Vec<Oracle>,
    random: Random,
}

impl Strategy {
    fn new(model: MemAopLinear, workers: usize, seed: u64) -> Self {
        Self {
            model,
            oracles: (0..workers).map(|_| oracle()).collect(),
            random: Random(seed),
        }
    }

    fn step(&mut self, order: &[usize]) {
        let clone = self.model.clone();
        let mut clones: Vec<_> = self.oracles.iter().map(|_| Some(clone.clone())).collect();
        for &worker in order {
            let (x, g) = batch(&mut self.random, 10);
            let expected = self.oracles[worker].step(&x, &g, K);
            let clone = clones[worker].take().unwrap();
            let gradient = std::thread::spawn(move || {
                let fork = clone.fork(&Device::flex());
                step(&fork, &x, &g)
            });
            assert_close(&gradient.join().unwrap(), &expected);
        }
        self.model = self.model.clone().map(&mut Optimizer);
    }
}

#[test]
fn each_worker_finds_its_memory_of_the_step_before() {
    let mut training = Strategy::new(layer(), 3, 28);
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [2, 0, 1], [0, 1, 2]] {
        training.step(&order);
    }
}

/// An average of the weights, say, that is a model of its own.
#[test]
fn mapped_clones_leave_the_memories_of_workers_alone() {
    let mut training = Strategy::new(layer(), 2, 29);
    for _ in 0..4 {
        let average = training.model.clone().map(&mut Optimizer);
        let again = average.clone().map(&mut Optimizer).map(&mut Optimizer);
        training.step(&[0, 1]);
        drop((average, again));
    }
}

#[test]
fn a_second_training_from_the_same_model_begins_anew() {
    let start = layer();
    let mut first = Strategy::new(start.clone(), 2, 34);
    first.step(&[0, 1]);
    let mut second = Strategy::new(start.clone(), 2, 35);
    // In turns from the second step on.
    first.step(&[0, 1]);
    for _ in 0..3 {
        second.step(&[1, 0]);
        first.step(&[0, 1]);
    }
    let mut third = Strategy::new(start, 2, 36);
    third.step(&[0, 1]);
}

/// From a checkpoint, each worker goes on with its memory.
#[test]
fn the_memories_of_workers_are_saved() {
    let mut training = Strategy::new(layer(), 3, 43);
    training.step(&[0, 1, 2]);
    training.step(&[2, 0, 1]);
    let record = training.model.clone().into_record().into_bytes().unwrap();
    training.model = layer().load_record(ModuleRecord::from_bytes(record).unwrap());
    assert_eq!(
        training.model.memory_stats().step,
        2,
        "that of the training"
    );
    training.step(&[1, 2, 0]);
    training.step(&[0, 1, 2]);
}

#[test]
fn a_clone_that_forgets_leaves_the_original_and_its_workers_alone() {
    let mut training = Strategy::new(layer(), 2, 37);
    training.step(&[0, 1]);
    let clone = training.model.clone();
    clone.reset_memory();
    training.step(&[0, 1]);

    // The model itself forgets those of its workers too.
    training.model.reset_memory();
    training.oracles = (0..2).map(|_| oracle()).collect();
    training.step(&[0, 1]);
}

/// A teacher made of the model, say, in the training step of a worker.
#[test]
fn a_mapped_clone_of_a_fork_leaves_the_memory_of_its_worker_alone() {
    let mut random = Random(44);
    let (mut model, mut oracle) = (layer(), oracle());
    for _ in 0..4 {
        let fork = model.clone().clone().fork(&Device::flex());
        let (x, g) = batch(&mut random, 10);
        assert_close(&step(&fork, &x, &g), &oracle.step(&x, &g, K));
        let teacher = fork.clone().no_grad();
        teacher.forward(x.tensor(&device(), DType::F32));
        drop((fork, teacher));
        model = model.clone().map(&mut Optimizer);
    }
}

/// Each device applies the rows that one device has left once.
#[test]
fn rows_of_the_model_go_to_one_worker() {
    let mut random = Random(45);
    let model = layer();
    let (x, g) = batch(&mut random, 10);
    step(&model, &x, &g);
    assert!(model.memory_stats().pending > 0);
    let clone = model.clone();
    let forks = [clone.clone(), clone.clone()].map(|clone| clone.fork(&Device::flex()));
    for fork in &forks {
        fork.forward(x.tensor(&device(), DType::F32));
        assert_eq!(fork.memory_stats().step, 1);
    }
    let pending = forks.map(|fork| fork.memory_stats().pending);
    assert_eq!(pending, [model.memory_stats().pending, 0]);
}

#[test]
fn inference_is_no_work_for_a_worker() {
    let mut random = Random(46);
    let mut training = Strategy::new(layer(), 2, 47);
    for _ in 0..3 {
        training.step(&[0, 1]);
        let fork = training.model.valid().fork(&Device::flex());
        let (x, _) = batch(&mut random, 10);
        fork.forward(x.tensor(&Device::flex(), DType::F32));
        let frozen = training.model.clone().no_grad().fork(&Device::flex());
        frozen.forward(x.tensor(&device(), DType::F32));
    }
}

/// A fork that is trained itself, as burn-train's single-device strategy does, is no worker.
#[test]
fn a_fork_that_is_trained_keeps_its_memory() {
    let mut random = Random(38);
    let (model, mut oracle) = (layer(), oracle());
    let mut fork = model.clone().fork(&Device::flex());
    for _ in 0..4 {
        let (x, g) = batch(&mut random, 10);
        assert_close(&step(&fork, &x, &g), &oracle.step(&x, &g, K));
        fork = fork.clone().map(&mut Optimizer);
    }
    assert_eq!(fork.memory_stats().step, 4);
    // The next fork of the model does not find it.
    let other = model.clone().fork(&Device::flex());
    other.forward(random.matrix(10, N).tensor(&device(), DType::F32));
    assert_eq!(other.memory_stats().step, 0);
}

#[test]
fn forks_in_use_at_the_same_time_train_apart() {
    let mut random = Random(29);
    let model = layer();
    let (x, g) = batch(&mut random, 10);
    step(&model, &x, &g);
    let (first, second) = (
        model.clone().fork(&Device::flex()),
        model.clone().fork(&Device::flex()),
    );
    assert_eq!(first.memory_stats(), model.memory_stats());
    assert_eq!(second.memory_stats(), model.memory_stats());
    step(&first, &x, &g);
    assert_eq!(second.memory_stats(), model.memory_stats());

    // A fork of what has trained on since takes that along.
    drop((first, second));
    step(&model, &x, &g);
    step(&model, &x, &g);
    let fork = model.clone().fork(&Device::flex());
    assert_eq!(fork.memory_stats(), model.memory_stats());
}
