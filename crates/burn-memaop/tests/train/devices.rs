//! Several workers: those of one device take turns, and each device has a state of its own.

use std::path::Path;

use burn::{
    module::Module,
    optim::{GradientsParams, SgdConfig},
    tensor::{Device, Tensor},
    train::{ExecutionStrategy, Learner, MultiDeviceOptim, TrainStep},
};
use burn_memaop::{
    AopConfig, OuterProducts, reset,
    train::{Checkpoints, resume_loader},
};

use crate::support::{BATCH, Batch, Net, aop, finished, loader, training};

const STEPS: usize = 6;
const RATE: f64 = 1e-3;

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

/// Trains a model up to an epoch, from the last checkpoint in the folder.
fn train(aop: AopConfig, devices: &[Device], steps: usize, folder: &Path, epochs: usize) -> Net {
    let checkpoints = Checkpoints::new(folder.join("checkpoint"));
    let done = checkpoints.resumable().unwrap().unwrap_or(0);
    let strategy = ExecutionStrategy::multi(devices.to_vec(), MultiDeviceOptim::OptimMainDevice);
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
    let model = Net::new(aop, None, &devices[0]);
    let learner = Learner::new(model, SgdConfig::new().init(), RATE);
    finished(training.launch(learner))
}

/// Every pass counts, and the rows of passes at the same time are kept apart. With all rows the result does not depend on
/// the order, and is that of a larger batch.
#[test]
fn workers_of_one_device_take_turns() {
    let device = Device::flex().autodiff();
    let trained = |aop: AopConfig, optim: Option<MultiDeviceOptim>| {
        let folder = tempfile::tempdir().unwrap();
        let devices = vec![device.clone(), device.clone()];
        let strategy = match optim {
            Some(optim) => ExecutionStrategy::multi(devices, optim),
            None => ExecutionStrategy::single(device.clone()),
        };
        let training = training(folder.path(), loader(2 * BATCH * STEPS, false))
            .with_training_strategy(strategy.into())
            .num_epochs(1);
        let model = Net::new(aop, None, &device);
        let learner = Learner::new(model, SgdConfig::new().init(), RATE);
        finished(training.launch(learner))
    };
    let all_rows = aop().with_outer_products(OuterProducts::All);
    let optims = [
        MultiDeviceOptim::OptimMainDevice,
        MultiDeviceOptim::OptimSharded,
    ];
    let expected = weights(&by_hand(&device));
    for optim in optims {
        let model = trained(aop(), Some(optim));
        for layer in [&model.first, &model.second] {
            let stats = layer.memory_stats();
            assert_eq!(stats.step, 2 * STEPS as u64, "{optim:?}");
            assert!(
                [BATCH, 2 * BATCH].contains(&stats.rows),
                "{optim:?} {stats:?}"
            );
        }
        let error = distance(&weights(&trained(all_rows, Some(optim))), &expected);
        assert!(error < 1e-6, "{optim:?}: {error:e}");
    }
    let single = weights(&trained(all_rows, None));
    assert!(distance(&single, &expected) > 1e-4);
}

/// Each worker takes its half of the data in order, and the weights move by the sum of their exact gradients.
fn by_hand(device: &Device) -> Net {
    let mut model = Net::new(aop().with_outer_products(OuterProducts::All), None, device);
    let data = loader(2 * BATCH * STEPS, false).to_device(device);
    let halves = [0, 1].map(|half| data.slice(half * BATCH * STEPS, (half + 1) * BATCH * STEPS));
    let mut batches: Vec<_> = halves.iter().map(|half| half.iter()).collect();
    let mut optimizer = SgdConfig::new().init();
    for _ in 0..STEPS {
        let losses = batches.iter_mut().map(|batches| {
            let batch: Batch = batches.next().unwrap().unwrap();
            (model.forward(batch.input) - batch.target).square().mean()
        });
        let loss = losses.reduce(|a, b| a + b).unwrap();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(RATE, model, grads);
    }
    model.valid()
}

/// Two devices, stopped after the first of two epochs and resumed: exact steps, the choice of K, random bits and the
/// memory of each device go on where they were.
fn workers_resume_where_they_stopped(devices: &[Device]) {
    let auto = AopConfig::new()
        .with_cost_rule(false)
        .with_saved_state(true);
    for (aop, steps) in [
        (aop().with_exact_steps(STEPS - 2), STEPS),
        // Stopped with a measurement that has not been read.
        (auto, 20),
    ] {
        let train =
            |aop, folder: &Path, epochs| weights(&train(aop, devices, steps, folder, epochs));
        let [whole, exact, parts] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let expected = train(aop, whole.path(), 2);
        let all_rows = aop.with_outer_products(OuterProducts::All);
        let exact = train(all_rows, exact.path(), 2);
        assert!(
            distance(&exact, &expected) > 1e-5,
            "no row was left out: {aop:?}"
        );
        let half = train(aop, parts.path(), 1);
        assert!(distance(&half, &expected) > 1e-4);
        // The sum of two workers' gradients does not depend on their order.
        assert!(train(aop, parts.path(), 2) == expected, "{aop:?}");
    }
}

#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)]
fn workers_on_flex_and_ndarray_resume() {
    let devices = [Device::flex(), Device::ndarray()].map(Device::autodiff);
    workers_resume_where_they_stopped(&devices);
}

#[cfg(feature = "wgpu")]
#[test]
fn workers_on_flex_and_wgpu_resume() {
    let wgpu = Device::wgpu(Default::default());
    let found = std::panic::catch_unwind(|| {
        Tensor::<1>::ones([1], &Device::wgpu(Default::default())).into_data();
    });
    if found.is_err() {
        let message = "no wgpu adapter: install a driver (on Debian, mesa-vulkan-drivers)";
        assert!(std::env::var_os("CI").is_none(), "{message}");
        return eprintln!("skipped: {message}");
    }
    workers_resume_where_they_stopped(&[Device::flex(), wgpu].map(Device::autodiff));
}

/// Trainings of their own from one model, side by side.
#[test]
fn trainings_of_models_that_were_reset_do_not_disturb_each_other() {
    let device = Device::flex().autodiff();
    let model = Net::new(aop(), None, &device);
    let train = |model: Net, half: usize| {
        let mut model = reset(model).fork(&device);
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
    assert_eq!(model.first.memory_stats().step, 0);
}
