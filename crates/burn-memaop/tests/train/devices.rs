//! Several workers: each keeps a memory of its own from step to step.

use burn::{
    module::{Module, Param},
    optim::SgdConfig,
    tensor::{Device, Tensor},
    train::{ExecutionStrategy, Learner, MultiDeviceOptim, TrainStep},
};

use burn_memaop::{
    AopConfig, Memory, Method, OuterProducts, Schedule,
    train::{Checkpoints, resume_loader},
};

use crate::support::{BATCH, Batch, Net, aop, finished, loader, training};

const STEPS: usize = 6;
const RATE: f64 = 1e-3;

/// What a strategy makes of the model in one epoch.
fn trained(strategy: ExecutionStrategy, device: &Device) -> [Vec<f64>; 2] {
    let folder = tempfile::tempdir().unwrap();
    let model = Net::new(aop(), None, device);
    let training = training(folder.path(), loader(2 * BATCH * STEPS, false))
        .with_training_strategy(strategy.into())
        .num_epochs(1);
    weights(&finished(training.launch(Learner::new(
        model,
        SgdConfig::new().init(),
        RATE,
    ))))
}

fn weights(model: &Net) -> [Vec<f64>; 2] {
    [&model.first, &model.second].map(|layer| values(layer.weight.val()))
}

fn values(tensor: Tensor<2>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

fn distance(found: &[Vec<f64>; 2], expected: &[Vec<f64>; 2]) -> f64 {
    let pairs = found.iter().flatten().zip(expected.iter().flatten());
    let difference: f64 = pairs.map(|(a, b)| (a - b) * (a - b)).sum();
    let size: f64 = expected.iter().flatten().map(|v| v * v).sum();
    (difference / size).sqrt()
}

/// The rule by hand: every worker has the same weights and a memory of its own, and takes its half
/// of the data in order; the weights move by the sum of their gradients.
fn by_hand(device: &Device) -> [Vec<f64>; 2] {
    let model = Net::new(aop(), None, device);
    let mut workers = [model.clone(), model];
    let data = loader(2 * BATCH * STEPS, false).to_device(device);
    let halves = [
        data.slice(0, BATCH * STEPS),
        data.slice(BATCH * STEPS, 2 * BATCH * STEPS),
    ];
    let mut batches: Vec<_> = halves.iter().map(|half| half.iter()).collect();
    for _ in 0..STEPS {
        let grads: Vec<_> = workers
            .iter()
            .zip(&mut batches)
            .map(|(worker, batches)| {
                let batch: Batch = batches.next().unwrap().unwrap();
                let error = worker.forward(batch.input) - batch.target;
                let grads = error.square().mean().backward();
                let weights =
                    [&worker.first, &worker.second].map(|layer| layer.weight.grad(&grads));
                let biases = [&worker.first, &worker.second].map(|layer| {
                    let bias = layer.bias.as_ref().unwrap();
                    bias.grad(&grads)
                });
                (weights.map(Option::unwrap), biases.map(Option::unwrap))
            })
            .collect();
        fn moved<const D: usize>(param: Param<Tensor<D>>, by: Tensor<D>) -> Param<Tensor<D>> {
            param.map(|tensor| Tensor::from_inner(tensor.inner() - by).require_grad())
        }
        let sum = |layer: usize| {
            let weight = grads[0].0[layer].clone() + grads[1].0[layer].clone();
            let bias = grads[0].1[layer].clone() + grads[1].1[layer].clone();
            (weight * RATE, bias * RATE)
        };
        workers = workers.map(|mut worker| {
            for (index, layer) in [&mut worker.first, &mut worker.second]
                .into_iter()
                .enumerate()
            {
                let (weight, bias) = sum(index);
                layer.weight = moved(layer.weight.clone(), weight);
                layer.bias = layer.bias.clone().map(|param| moved(param, bias));
            }
            worker
        });
    }
    weights(&workers[0].valid())
}

#[test]
fn workers_of_the_multi_device_strategies_keep_their_memories() {
    let device = Device::flex().autodiff();
    let expected = by_hand(&device);
    for optim in [
        MultiDeviceOptim::OptimMainDevice,
        MultiDeviceOptim::OptimSharded,
    ] {
        let devices = vec![device.clone(), device.clone()];
        let found = trained(ExecutionStrategy::multi(devices, optim), &device);
        let error = distance(&found, &expected);
        assert!(error < 1e-6, "{optim:?}: {error:e}");
    }
    // Without a second memory the result is another.
    let single = trained(ExecutionStrategy::single(device.clone()), &device);
    assert!(distance(&single, &expected) > 1e-4);
}

/// Two workers, stopped after the first of two epochs and resumed: exact steps, adaptive K, noise and the
/// memory of each worker go on where they were.
#[test]
fn workers_resume_where_they_stopped() {
    let device = Device::flex().autodiff();
    let share = OuterProducts::Share {
        share: 0.8,
        interval: 2,
    };
    let constant = Schedule::Constant {
        exact_steps: STEPS - 2,
    };
    let linear = Schedule::Linear {
        exact_steps: 2,
        steps: 2 * STEPS,
    };
    let adaptive = aop().with_outer_products(share);
    let auto = AopConfig::new().with_cost_rule(false);
    for (aop, steps) in [
        (aop().with_schedule(constant), STEPS),
        (aop().with_schedule(linear), STEPS),
        (adaptive.with_method(Method::TopK(Memory::None)), STEPS),
        // Stopped with a measurement that has not been read, and resumed before the second choice.
        (auto, 20),
    ] {
        let train_with = |aop: AopConfig, folder: &std::path::Path, epochs: usize| {
            let checkpoints = Checkpoints::new(folder.join("checkpoint"));
            let done = checkpoints.resumable().unwrap().unwrap_or(0);
            let devices = vec![device.clone(), device.clone()];
            let strategy = ExecutionStrategy::multi(devices, MultiDeviceOptim::OptimMainDevice);
            let data = resume_loader(loader(2 * BATCH * steps, false), done);
            let mut training = training(folder, data)
                .with_custom_checkpointers(
                    checkpoints.model(),
                    checkpoints.optimizer(),
                    checkpoints.scheduler(),
                )
                .with_training_strategy(strategy.into())
                .num_epochs(epochs);
            if done > 0 {
                training = training.checkpoint(done);
            }
            let model = Net::new(aop, None, &device);
            let learner = Learner::new(model, SgdConfig::new().init(), RATE);
            finished(training.launch(learner))
        };
        let train = |folder: &std::path::Path, epochs| train_with(aop, folder, epochs);
        let whole = tempfile::tempdir().unwrap();
        let expected = weights(&train(whole.path(), 2));
        let all_rows = aop.with_outer_products(OuterProducts::Count(BATCH));
        let exact = tempfile::tempdir().unwrap();
        let exact = weights(&train_with(all_rows, exact.path(), 2));
        assert!(
            distance(&exact, &expected) > 1e-5,
            "no row was left out: {aop:?}"
        );
        let parts = tempfile::tempdir().unwrap();
        let half = weights(&train(parts.path(), 1));
        assert!(distance(&half, &expected) > 1e-4);
        // The sum of two workers' gradients does not depend on their order.
        assert!(weights(&train(parts.path(), 2)) == expected, "{aop:?}");
    }
}

/// Distributed data parallel gives each thread a clone of the model, which it forks once and then
/// trains. Burn has the collective operations between them for CUDA and its remote backend only, so
/// here the threads train without.
#[test]
fn threads_that_fork_a_clone_once_do_not_disturb_each_other() {
    let device = Device::flex().autodiff();
    let model = Net::new(aop(), None, &device);
    let train = |model: Net, half: usize| {
        let mut model = model.fork(&device);
        let mut optimizer = SgdConfig::new().init();
        let data = loader(2 * BATCH * STEPS, false).to_device(&device);
        let data = data.slice(half * BATCH * STEPS, (half + 1) * BATCH * STEPS);
        for batch in data.iter() {
            let output = TrainStep::step(&model, batch.unwrap());
            model = optimizer.step(RATE, model, output.grads);
        }
        assert_eq!(model.first.memory_stats().step, STEPS as u64);
        model.fingerprint()
    };
    let alone = [0, 1].map(|half| train(model.clone(), half));
    assert_ne!(alone[0], alone[1]);
    for _ in 0..3 {
        let train = &train;
        let together = std::thread::scope(|scope| {
            let workers = [0, 1].map(|half| {
                let clone = model.clone();
                scope.spawn(move || train(clone, half))
            });
            workers.map(|worker| worker.join().unwrap())
        });
        assert!(together == alone);
    }
}
