//! Who shares the state of a layer, and what is kept apart: clones, forks, threads, devices, records.

use std::{sync::Barrier, thread};

use burn::{
    module::{Module, ModuleMapper},
    nn::LinearConfig,
    optim::{GradientsParams, LBFGSConfig},
    store::ModuleRecord,
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{
    AopConfig, AopObserver, MemAopLinear, Memory, Method, OuterProducts, baseline::Baseline, reset,
    with_aop,
};

use crate::{
    memory::{K, N, assert_close, batch, device, layer, oracle, step},
    support::{Random, bits},
};

struct Optimizer;
impl ModuleMapper for Optimizer {}

fn saved(layer: &MemAopLinear) -> ModuleRecord {
    let bytes = layer.clone().into_record().into_bytes().unwrap();
    ModuleRecord::from_bytes(bytes).unwrap()
}

/// Each pass through another copy of the layer: as `LBFGS` trains, as a loop over clones does, as burn-train's workers do.
#[test]
fn a_training_through_copies_is_one_training() {
    let mut random = Random(26);
    let (mut model, mut oracle) = (layer(), oracle());
    for number in 0..8 {
        let (x, g) = batch(&mut random, 10);
        let copy = match number % 4 {
            0 => model.clone(),
            1 => model.clone().fork(&device()),
            2 => model.clone().valid().train(),
            _ => model
                .valid()
                .to_device(&Device::flex())
                .train()
                .map(&mut Optimizer),
        };
        assert_close(&step(&copy, &x, &g), &oracle.step(&x, &g, K));
        assert_eq!(model.memory_stats().step, number + 1);
        model = model.map(&mut Optimizer);
    }
}

#[test]
fn a_clone_between_the_passes_is_in_the_same_training() {
    let mut random = Random(27);
    let (x, g) = batch(&mut random, 10);
    let layer = layer();
    let output = layer.forward(x.tensor(&device(), DType::F32));
    let clone = layer.clone();
    drop(layer);
    (output * g.tensor(&device(), DType::F32)).sum().backward();
    assert_eq!(
        (clone.memory_stats().step, clone.memory_stats().pending),
        (1, 10 - K)
    );
}

#[test]
fn lbfgs_trains_the_layer() {
    let device = device();
    let mut layer = layer();
    let x = Random(28).matrix(10, N).tensor(&device, DType::F32);
    let mut optimizer = LBFGSConfig::new().with_max_iter(4).init();
    let mut evaluations = 0;
    for _ in 0..2 {
        let closure = |layer: MemAopLinear| {
            evaluations += 1;
            let loss = (layer.forward(x.clone()) - 1.0).square().mean();
            let grads = GradientsParams::from_grads(loss.backward(), &layer);
            (loss.into_scalar::<f32>().into(), grads)
        };
        (layer, _) = optimizer.step(0.1, layer, closure);
    }
    assert!(evaluations > 2);
    assert_eq!(layer.memory_stats().step, evaluations);
    assert!(layer.memory_stats().pending > 0);
}

/// Passes at the same time have a set of rows each, and none is lost.
#[test]
fn threads_share_the_steps_and_keep_all_rows() {
    const THREADS: usize = 4;
    const PASSES: usize = 25;
    let layer = layer();
    let barrier = Barrier::new(THREADS);
    thread::scope(|scope| {
        for number in 0..THREADS {
            let (layer, barrier) = (layer.clone(), &barrier);
            scope.spawn(move || {
                let mut random = Random(30 + number as u64);
                for _ in 0..PASSES {
                    let (x, g) = batch(&mut random, 10);
                    barrier.wait();
                    step(&layer, &x, &g);
                }
            });
        }
    });
    let stats = layer.memory_stats();
    assert_eq!(stats.step, (THREADS * PASSES) as u64);
    let sets = stats.rows / 10;
    assert!(
        (1..=THREADS).contains(&sets) && stats.rows == 10 * sets,
        "{stats:?}"
    );
    assert!(stats.pending >= sets * (10 - K), "{stats:?}");
    // All of them are in the record.
    let loaded = reset(layer.clone()).load_record(saved(&layer));
    assert_eq!(loaded.memory_stats(), stats);
    // Each set is used in its turn, and so none holds rows of all of the steps that follow.
    let before = loaded.memory_stats().oldest;
    let (x, g) = batch(&mut Random(29), 10);
    for _ in 0..40 {
        step(&loaded, &x, &g);
    }
    let after = loaded.memory_stats();
    assert_eq!(after.rows, stats.rows);
    assert!(
        after.oldest <= before + 40usize.div_ceil(sets),
        "{before} {after:?}"
    );
}

/// What gives a layer a state of its own, and how.
#[test]
fn some_calls_give_a_state_of_its_own() {
    let mut random = Random(31);
    let model = layer();
    let (x, g) = batch(&mut random, 10);
    step(&model, &x, &g);
    let before = model.memory_stats();
    let other = layer();
    for _ in 0..3 {
        step(&other, &x, &g);
    }
    let linear_record = LinearConfig::new(N, 4).init(&device()).into_record();
    type Call<'a> = Box<dyn FnOnce(MemAopLinear) -> MemAopLinear + 'a>;
    let calls: [(&str, u64, Call<'_>); 6] = [
        ("reset", 0, Box::new(reset)),
        (
            "with_aop",
            1,
            Box::new(|layer| {
                let aop = layer.aop();
                layer.with_aop(aop)
            }),
        ),
        (
            "with_aop of a model",
            1,
            Box::new(|layer| with_aop(layer, |_, aop| aop)),
        ),
        (
            "from_linear",
            0,
            Box::new(|layer| {
                let aop = layer.aop();
                MemAopLinear::from_linear(layer.into_linear(), aop)
            }),
        ),
        (
            "load_record",
            3,
            Box::new(|layer| layer.load_record(saved(&other))),
        ),
        (
            "load_record of Linear",
            0,
            Box::new(|layer| layer.load_record(linear_record.allow_partial(true))),
        ),
    ];
    for (name, steps, call) in calls {
        let apart = call(model.clone());
        assert_eq!(apart.memory_stats().step, steps, "{name}");
        assert_eq!(
            apart.memory_stats().rows,
            if steps > 0 { 10 } else { 0 },
            "{name}"
        );
        for _ in 0..2 {
            step(&apart, &x, &g);
        }
        assert_eq!(apart.memory_stats().step, steps + 2, "{name}");
        assert_eq!(model.memory_stats(), before, "{name}");
    }
    assert_eq!(other.memory_stats().step, 3);

    // Nor does what happens to the one that was given.
    let apart = with_aop(model.clone(), |_, aop| aop);
    step(&model, &x, &g);
    assert_eq!(
        (apart.memory_stats(), model.memory_stats().step),
        (before, 2)
    );
}

/// A record that has nothing for a layer leaves it what it has, but on its own.
#[test]
fn a_record_of_other_layers_keeps_the_state() {
    #[derive(Module, Debug)]
    struct Pair {
        first: MemAopLinear,
        second: MemAopLinear,
    }
    #[derive(Module, Debug)]
    struct First {
        first: MemAopLinear,
    }
    let mut random = Random(32);
    let (x, g) = batch(&mut random, 10);
    let pair = Pair {
        first: layer(),
        second: layer(),
    };
    step(&pair.second, &x, &g);
    let record = First { first: layer() }.into_record();
    let loaded = pair.clone().load_record(record.allow_partial(true));
    assert_eq!(loaded.second.memory_stats(), pair.second.memory_stats());
    step(&loaded.second, &x, &g);
    assert_eq!(
        (
            loaded.second.memory_stats().step,
            pair.second.memory_stats().step
        ),
        (2, 1)
    );
}

#[test]
fn a_forward_pass_alone_costs_nothing() {
    let mut random = Random(33);
    let (model, mut oracle) = (layer(), oracle());
    for _ in 0..4 {
        let (x, g) = batch(&mut random, 10);
        assert_close(&step(&model, &x, &g), &oracle.step(&x, &g, K));
        let before = (
            model.memory_stats(),
            saved(&model).into_bytes().unwrap().len(),
        );
        let worker = model.clone().fork(&device());
        let _never_propagated = worker.forward(x.tensor(&device(), DType::F32));
        let teacher = worker.clone().no_grad();
        teacher.forward(x.tensor(&device(), DType::F32));
        let after = (
            model.memory_stats(),
            saved(&model).into_bytes().unwrap().len(),
        );
        assert_eq!(before, after);
    }
}

/// Draws, signs and the rows kept: each device has its own, whatever the other does.
fn each_device_has_its_own_state(devices: [Device; 2]) {
    let memory = Memory::Balanced { decay: 0.9 };
    let configs = [
        AopConfig::new().with_method(Method::Baseline(Baseline::WeightedK(memory))),
        AopConfig::new().with_outer_products(OuterProducts::Ratio(0.5)),
        // K chosen by each.
        AopConfig::new(),
    ];
    let linear = LinearConfig::new(N, 4).init(&devices[0].clone().autodiff());
    for config in configs.map(|config| config.with_cost_rule(false).with_saved_state(true)) {
        let new = || MemAopLinear::from_linear(linear.clone(), config);
        // The passes of each device are the same whatever the order in which the devices take theirs.
        let pass = |model: &MemAopLinear, device: usize, number: u64| {
            let on = devices[device].clone().autodiff();
            let worker = model.clone().fork(&on);
            let mut random = Random(100 * device as u64 + number);
            let (x, g) = batch(&mut random, 20);
            let output = worker.forward(x.tensor(&on, DType::F32));
            let grads = (output * g.tensor(&on, DType::F32)).sum().backward();
            bits(worker.weight.grad(&grads).unwrap())
        };
        let train = |model: &MemAopLinear, steps: std::ops::Range<u64>, turns: bool| {
            let mut found = Vec::new();
            for number in steps {
                let reversed = turns && number % 2 == 1;
                let mut both = match reversed {
                    false => [0, 1].map(|device| (device, pass(model, device, number))),
                    true => [1, 0].map(|device| (device, pass(model, device, number))),
                };
                both.sort_by_key(|(device, _)| *device);
                found.push(both);
            }
            found
        };
        let expected = train(&new(), 0..40, false);
        assert!(train(&new(), 0..40, true) == expected, "{config:?}");
        // Resumed, wherever the one that saved it is.
        for stop in [1, 17] {
            let first = new();
            train(&first, 0..stop, true);
            let first = first.fork(&devices[1].clone().autodiff());
            let resumed = new().load_record(saved(&first));
            let found = train(&resumed, stop..40, true);
            assert!(found[..] == expected[stop as usize..], "{config:?} {stop}");
        }
    }
}

#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)]
fn flex_and_ndarray_have_their_own_states() {
    each_device_has_its_own_state([Device::flex(), Device::ndarray()]);
}

#[cfg(feature = "wgpu")]
#[test]
fn flex_and_wgpu_have_their_own_states() {
    if let Some(device) = crate::backends::wgpu() {
        each_device_has_its_own_state([Device::flex(), device]);
    }
}

/// The state of a model that is trained on one device goes on wherever its record is loaded, all sets of rows too, and
/// also if the model was observed before.
#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)]
fn a_record_goes_on_on_another_device() {
    let model = with_two_sets();
    let before = model.memory_stats();
    assert_eq!(before.rows, 20);
    let elsewhere = Device::ndarray().autodiff();
    let linear = LinearConfig::new(N, 4).init(&elsewhere);
    for observed in [false, true] {
        let target = MemAopLinear::from_linear(linear.clone(), model.aop());
        let observer = AopObserver::new().with_error(1);
        if observed {
            observer.observe(&target);
        }
        let loaded = target.load_record(saved(&model));
        assert_eq!(loaded.memory_stats(), before);
        pass(&loaded, &elsewhere);
        let after = loaded.memory_stats();
        assert_eq!((after.step, after.rows), (before.step + 1, before.rows));
        let report = observer.observe(&loaded);
        assert_eq!(report.layers[0].error().is_some(), observed);
        // Nothing is left of the device of the record.
        assert_eq!(saved(&loaded).len(), saved(&model).len());
    }
}

/// After passes at the same time.
fn with_two_sets() -> MemAopLinear {
    loop {
        let model = layer();
        let barrier = Barrier::new(2);
        thread::scope(|scope| {
            for _ in 0..2 {
                let (model, barrier) = (model.clone(), &barrier);
                scope.spawn(move || {
                    for _ in 0..50 {
                        barrier.wait();
                        pass(&model, &device());
                    }
                });
            }
        });
        if model.memory_stats().rows == 20 {
            return model;
        }
    }
}

fn pass(model: &MemAopLinear, device: &Device) {
    let x = Tensor::<2>::ones([10, N], device);
    model.forward(x).sum().backward();
}

/// A moved layer takes its state along at its first step, there and back. What is not stepped changes nothing.
#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)]
fn a_moved_layer_takes_its_state_along() {
    let here = device();
    let there = Device::ndarray().autodiff();
    let model = layer();
    pass(&model, &here);
    let before = model.memory_stats();
    let bytes = || saved(&model).into_bytes().unwrap().len();
    let size = bytes();

    let moved = model.valid().to_device(&there.clone().inner()).train();
    assert_eq!(moved.memory_stats(), before);
    assert!(
        saved(&moved).into_bytes().unwrap().len() < size + 200,
        "it is saved once"
    );
    AopObserver::new().observe(&moved);
    let _never_propagated = moved.forward(Tensor::<2>::ones([10, N], &there));
    assert_eq!((model.memory_stats(), bytes()), (before, size));

    for step in 2..5 {
        pass(&moved, &there);
        let stats = moved.memory_stats();
        assert_eq!((stats.step, stats.rows), (step, 10));
    }
    assert_eq!(
        (model.memory_stats().step, model.memory_stats().rows),
        (1, 0)
    );
    let back = moved.valid().to_device(&here.clone().inner()).train();
    assert_eq!(back.memory_stats(), moved.memory_stats());
    pass(&back, &here);
    assert_eq!(
        (back.memory_stats().step, back.memory_stats().rows),
        (5, 10)
    );
    assert_eq!(moved.memory_stats().rows, 0);
}

/// As Burn says to go on with training elsewhere: steps and the choice of K go on, rows stay.
#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)]
fn a_fork_on_another_device_goes_on_with_what_is_known() {
    let there = Device::ndarray().autodiff();
    let mut model = layer();
    for _ in 0..3 {
        pass(&model, &device());
        model = model.map(&mut Optimizer);
    }
    let before = model.memory_stats();
    let fork = model.clone().fork(&there);
    // A worker that has been first in this step changes nothing.
    pass(&model, &device());
    pass(&fork, &there);
    assert_eq!((before.step, fork.memory_stats().step), (3, 4));
    let fork = fork.memory_stats();
    assert_eq!((fork.rows, fork.oldest), (10, 1));
    assert_eq!(model.memory_stats().step, 4);
}

/// Moving back and forth between devices by records, by moves and by forks: the farthest state is the one that goes on.
#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)]
fn a_state_that_was_left_behind_is_not_gone_on_from() {
    let here = device();
    let there = Device::ndarray().autodiff();
    let elsewhere = |layer: &MemAopLinear| {
        let linear = LinearConfig::new(N, 4).init(&there);
        MemAopLinear::from_linear(linear, layer.aop())
    };
    // By records.
    let first = layer();
    pass(&first, &here);
    let second = elsewhere(&first).load_record(saved(&first));
    pass(&second, &there);
    let third = layer().load_record(saved(&second));
    assert_eq!(third.memory_stats(), second.memory_stats());
    pass(&third, &here);
    assert_eq!(
        (third.memory_stats().step, third.memory_stats().rows),
        (3, 10)
    );
    // A record goes on in a fork too.
    let fork = layer().load_record(saved(&first)).fork(&there);
    pass(&fork, &there);
    assert_eq!(fork.memory_stats().step, 2);

    // By a move and a fork back.
    let model = layer();
    pass(&model, &here);
    let moved = model.valid().to_device(&there.clone().inner()).train();
    pass(&moved, &there);
    pass(&moved, &there);
    let back = moved.map(&mut Optimizer).fork(&here);
    pass(&back, &here);
    assert_eq!(back.memory_stats().step, 4);
}

/// A move takes rows that are pending, also if the other device has come as far.
#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)]
fn a_move_strands_no_rows() {
    let here = device();
    let there = Device::ndarray().autodiff();
    let model = layer();
    pass(&model, &here);
    pass(&model.clone().fork(&there), &there);
    let moved = model.valid().to_device(&there.clone().inner()).train();
    pass(&moved, &there);
    let stats = moved.memory_stats();
    assert_eq!((stats.step, stats.rows), (2, 20), "both sets of rows");
    assert_eq!(model.memory_stats().rows, 0);
}

/// Clones of a moved layer that take their first step at the same time.
#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)]
fn a_move_is_whole_for_all_clones() {
    let there = Device::ndarray().autodiff();
    for _ in 0..20 {
        let model = layer();
        pass(&model, &device());
        let moved = model.valid().to_device(&there.clone().inner()).train();
        let barrier = Barrier::new(4);
        thread::scope(|scope| {
            for _ in 0..4 {
                let (moved, barrier, there) = (moved.clone(), &barrier, &there);
                scope.spawn(move || {
                    barrier.wait();
                    pass(&moved, there);
                });
            }
        });
        assert_eq!(moved.memory_stats().step, 5);
    }
}

/// Results depend on the seed and the number of the pass, not on what else is in the model.
#[test]
fn the_rows_drawn_do_not_depend_on_the_rest_of_the_model() {
    let device = device();
    let aop = AopConfig::new()
        .with_outer_products(OuterProducts::Ratio(0.25))
        .with_cost_rule(false);
    let linear = LinearConfig::new(N, 4).init(&device);
    let (x, g) = batch(&mut Random(35), 20);
    let gradient = |operations: usize| {
        let layer = MemAopLinear::from_linear(linear.clone(), aop);
        let mut input = x.tensor(&device, DType::F32).require_grad();
        for _ in 0..operations {
            input = input * 1.0;
        }
        let grads = (layer.forward(input) * g.tensor(&device, DType::F32))
            .sum()
            .backward();
        bits(layer.weight.grad(&grads).unwrap())
    };
    assert_eq!(gradient(0), gradient(1));
    assert_eq!(gradient(0), gradient(5));
}
