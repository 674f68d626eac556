//! What a weight gradient asks of a wgpu device, counted from outside the crate: kernels by
//! CubeCL's observer of launches, read-backs by wgpu's own log.

#![cfg(all(feature = "wgpu", feature = "autodiff"))]

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_cubecl::cubecl::logging::{LaunchObservation, LaunchObserver};
use burn_memaop::{
    AopConfig, AopObserver, MemAopConv2dConfig, MemAopLinearConfig, Memory, Method, OuterProducts,
    StoredInput,
    activation::{Gelu, relu},
    baseline::Baseline,
    nn,
    op::{self, AopStep, parts},
};
use log::{LevelFilter, Log, Metadata, Record};

#[derive(Default)]
struct Kernels(Mutex<Vec<&'static str>>);

impl LaunchObserver for Kernels {
    fn launched(&self, kernel: &'static str) {
        self.0.lock().unwrap().push(kernel);
    }
}

/// Counts the buffers that are mapped for reading, and the read-backs that the crate reports.
struct Reads {
    mapped: AtomicUsize,
    reported: AtomicUsize,
}

static READS: Reads = Reads {
    mapped: AtomicUsize::new(0),
    reported: AtomicUsize::new(0),
};

impl Log for Reads {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.target().starts_with("wgpu_core") || metadata.target() == "burn_memaop::read"
    }

    fn log(&self, record: &Record) {
        if record.target() == "burn_memaop::read" {
            self.reported.fetch_add(1, Ordering::Relaxed);
        } else if self.enabled(record.metadata())
            && record.args().to_string().starts_with("Buffer::map_async")
        {
            self.mapped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

/// The kernels launched and the buffers read while `work` ran.
fn observe(device: &Device, work: impl FnOnce()) -> (Vec<&'static str>, usize) {
    device.sync().unwrap();
    let kernels = Arc::new(Kernels::default());
    let before = READS.mapped.load(Ordering::Relaxed);
    let observation = LaunchObservation::new(kernels.clone());
    work();
    device.sync().unwrap();
    drop(observation);
    let reads = READS.mapped.load(Ordering::Relaxed) - before;
    let kernels = kernels.0.lock().unwrap().clone();
    (kernels, reads)
}

fn random(shape: [usize; 2], device: &Device, dtype: DType) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), (device, dtype))
}

/// One test, because what it counts is of the whole process.
#[test]
fn a_weight_gradient_is_three_kernels_and_a_product_and_never_waits() {
    let found = std::panic::catch_unwind(|| {
        Tensor::<1>::ones([1], &Device::wgpu(Default::default())).into_data();
    });
    if found.is_err() {
        assert!(std::env::var_os("CI").is_none(), "no wgpu adapter");
        eprintln!("skipped: no wgpu adapter");
        return;
    }
    log::set_logger(&READS).unwrap();
    log::set_max_level(LevelFilter::Trace);
    let device = Device::wgpu(Default::default());

    // The counters count.
    let (kernels, reads) = observe(&device, || {
        let sum = Tensor::<1>::ones([3], &device) + 1.0;
        assert_eq!(sum.into_data().iter::<f32>().sum::<f32>(), 6.0);
    });
    assert!(!kernels.is_empty() && reads == 1, "{kernels:?} {reads}");

    operation(&device);
    input_gradient(&device);
    noise(&device);
    packed(&device);
    host_selection_is_reported(&device);
    layer(&device);
    choosing_layer(&device);
    convolution(&device);
    transformer(&device);
}

fn operation(device: &Device) {
    let methods = [
        Method::TopK(Memory::Balanced { decay: 0.9 }),
        Method::TopK(Memory::None),
        Method::Baseline(Baseline::RandK(Memory::Published { decay: 1.0 })),
        Method::Baseline(Baseline::WeightedK(Memory::Published { decay: 0.9 })),
        Method::Baseline(Baseline::ScaledRandK),
        Method::Systematic,
    ];
    for dtype in [DType::F32, DType::F16] {
        if !device.supports_dtype(dtype) {
            continue;
        }
        let (x, g) = (
            random([200, 40], device, dtype),
            random([200, 24], device, dtype),
        );
        // More rows than one cube takes.
        let many = (
            random([3000, 8], device, dtype),
            random([3000, 8], device, dtype),
        );
        for (method, more) in [(Method::Systematic, 8), (Method::TopK(Memory::None), 6)] {
            let settings = AopStep {
                k: 25,
                method,
                seed: 1,
                step: 0,
            };
            let (kernels, reads) = observe(device, || {
                op::weight_gradient(many.0.clone(), many.1.clone(), None, settings);
            });
            let products = kernels.iter().filter(|name| name.contains("matmul"));
            assert_eq!(
                kernels.len() - products.count(),
                3 + more,
                "{method:?}: {kernels:?}"
            );
            assert_eq!(reads, 0, "{method:?}: {kernels:?}");
        }
        for method in methods {
            let mut kept = None;
            let mut step = 0;
            let mut gradient = || {
                let settings = AopStep {
                    k: 25,
                    method,
                    seed: 1,
                    step,
                };
                step += 1;
                let gradient = op::weight_gradient(x.clone(), g.clone(), kept.take(), settings);
                kept = gradient.memory;
                gradient.weight
            };
            // The first step makes a memory.
            gradient();
            let (kernels, reads) = observe(device, || drop(gradient()));
            let context = format!("{method:?} {dtype:?}: {kernels:?}");
            let products = kernels.iter().filter(|name| name.contains("matmul"));
            let products = products.count();
            assert!(products >= 1, "{context}");
            // A memory takes a pass more, which looks for values that are not finite, and a flag for
            // it. Its factors are taken out one after the other.
            let expected = match method.memory() {
                Memory::None => 3,
                _ => 6,
            };
            assert_eq!(kernels.len() - products, expected, "{context}");
            assert_eq!(reads, 0, "{context}");
        }
    }
}

fn input_gradient(device: &Device) {
    let grad = random([200, 24], device, DType::F32);
    let weight = random([40, 24], device, DType::F32);
    let (kernels, reads) = observe(device, || {
        drop(parts::input_gradient(
            grad.clone(),
            weight.clone(),
            50,
            1,
            0,
        ));
    });
    let products = kernels.iter().filter(|name| name.contains("matmul"));
    assert_eq!(kernels.len() - products.count(), 5, "{kernels:?}");
    assert_eq!(reads, 0, "{kernels:?}");
}

/// Scores and what sampling of them adds, in one kernel or in nine, and at most seven of Burn's for the norm and putting the
/// figures together.
fn noise(device: &Device) {
    for (rows, dtype) in [(200, DType::F32), (200, DType::F16), (3000, DType::F32)] {
        if !device.supports_dtype(dtype) {
            continue;
        }
        let (x, g) = (
            random([rows, 33], device, dtype),
            random([rows, 24], device, dtype),
        );
        let gradient = random([33, 24], device, dtype);
        let ks = [200, 100, 50, 25, 12, 6];
        let (kernels, reads) = observe(device, || {
            drop(parts::gradient_noise(
                x.clone(),
                g.clone(),
                gradient.clone(),
                ks,
            ));
        });
        let ours = if rows > 2048 { 10 } else { 2 };
        assert!(kernels.len() <= ours + 7, "{kernels:?}");
        let selecting = kernels.iter().filter(|kernel| kernel.contains("select::"));
        assert_eq!(selecting.count(), ours - 1, "{kernels:?}");
        let scores = kernels.iter().filter(|kernel| kernel.contains("score"));
        assert_eq!(scores.count(), 1, "{kernels:?}");
        assert_eq!(reads, 0, "{kernels:?}");
    }
}

/// One kernel packs. The gradient takes one more than that of whole rows, as each factor is gathered by itself.
fn packed(device: &Device) {
    for dtype in [DType::F32, DType::F16] {
        if !device.supports_dtype(dtype) {
            continue;
        }
        let (x, g) = (
            random([200, 40], device, dtype),
            random([200, 24], device, dtype),
        );
        for stored in [StoredInput::Int8, StoredInput::Int4] {
            let mut rows = None;
            let (kernels, reads) = observe(device, || {
                rows = Some(parts::pack(x.clone(), stored, 1, 0));
            });
            assert_eq!((kernels.len(), reads), (1, 0), "{stored:?}: {kernels:?}");

            let rows = rows.unwrap();
            let settings = AopStep {
                k: 25,
                method: Method::Systematic,
                seed: 1,
                step: 0,
            };
            let (kernels, reads) = observe(device, || {
                rows.clone().weight_gradient(g.clone(), None, settings);
            });
            let products = kernels.iter().filter(|name| name.contains("matmul"));
            assert_eq!(kernels.len() - products.count(), 4, "{kernels:?}");
            assert_eq!(reads, 0, "{stored:?}: {kernels:?}");

            let (kernels, reads) = observe(device, || drop(rows.unpack()));
            assert_eq!((kernels.len(), reads), (1, 0), "{stored:?}: {kernels:?}");
        }
    }
    let device = device.clone().autodiff();
    let aop = AopConfig::new()
        .with_outer_products(OuterProducts::Count(9))
        .with_cost_rule(false)
        .with_stored_input(StoredInput::Int8);
    let layer = MemAopLinearConfig::new(20, 12).init(&device).with_aop(aop);
    let input = random([70, 20], &device, DType::F32).require_grad();
    let (kernels, reads) = observe(&device, || {
        let gelu = Gelu::new().with_aop(aop);
        relu(layer.forward(input.clone())).sum().backward();
        gelu.forward(layer.forward(input.clone())).sum().backward();
    });
    assert_eq!(reads, 0, "{kernels:?}");
}

fn host_selection_is_reported(device: &Device) {
    let (x, g) = (
        random([64, 8], device, DType::F32),
        random([64, 8], device, DType::F32),
    );
    let reported = READS.reported.load(Ordering::Relaxed);
    let (_, reads) = observe(device, || {
        op::weight_gradient(
            x,
            g,
            None,
            AopStep {
                k: 8,
                method: Method::Baseline(Baseline::Bernoulli),
                seed: 1,
                step: 0,
            },
        );
    });
    assert_eq!(reads, 1);
    assert_eq!(READS.reported.load(Ordering::Relaxed) - reported, 1);
}

/// A layer that chooses its K copies some figures to the host in each measured step, and nothing else.
fn choosing_layer(device: &Device) {
    let device = device.clone().autodiff();
    let aop = AopConfig::new().with_cost_rule(false);
    let layer = MemAopLinearConfig::new(20, 12).init(&device).with_aop(aop);
    let input = Tensor::<2>::ones([64, 20], &device);
    let reads = |steps: usize| {
        let (_, reads) = observe(&device, || {
            for _ in 0..steps {
                layer.forward(input.clone()).sum().backward();
            }
        });
        reads
    };
    // Six in the first steps, and one in ten or more steps after them.
    let (first, later) = (reads(30), reads(60));
    assert!((6..=8).contains(&first) && later <= 6, "{first} {later}");
    assert!((1..=30).contains(&reads(300)), "measuring goes on");
    assert!(layer.memory_stats().k < 64);
}

/// Forward and backward of a layer, its update included, and reports of measured steps.
fn layer(device: &Device) {
    let device = device.clone().autodiff();
    for method in [
        Method::TopK(Memory::Balanced { decay: 0.9 }),
        Method::Systematic,
    ] {
        let aop = AopConfig::new()
            .with_outer_products(OuterProducts::Count(9))
            .with_cost_rule(false)
            .with_method(method);
        let layer = MemAopLinearConfig::new(20, 12).init(&device).with_aop(aop);
        let input = random([70, 20], &device, DType::F32);
        let observer = AopObserver::new().with_error(2);
        let mut reports = vec![observer.observe(&layer)];
        let (kernels, reads) = observe(&device, || {
            for _ in 0..3 {
                let grads = layer.forward(input.clone()).sum().backward();
                let gradient = layer.weight.grad(&grads).unwrap();
                drop(layer.weight.val().inner() - gradient * 0.1);
                reports.push(observer.observe(&layer));
            }
        });
        // Two of the steps are compared, and two figures of each are copied, which no one waits for.
        // The observer is also told of the noise, which the first step measures.
        let measured = usize::from(method == Method::Systematic);
        assert_eq!(reads, 2 + measured, "{method:?}: {kernels:?}");
        assert!(reports[3].layers[0].error().is_some());
    }
}

/// The squares of the planes, the scores, the selection and the patches, and never a wait, also where images are kept in
/// few bits.
fn convolution(device: &Device) {
    let device = device.clone().autodiff();
    let images = Tensor::<4>::random([4, 6, 9, 8], Distribution::Normal(0.0, 1.0), &device);
    let layer = |aop: AopConfig| {
        MemAopConv2dConfig::new([6, 5], [3, 3])
            .init(&device)
            .with_aop(aop.with_cost_rule(false))
    };
    let some = layer(AopConfig::new().with_outer_products(OuterProducts::Count(20)));
    let (forward, _) = observe(&device, || drop(some.forward(images.clone())));
    let (kernels, reads) = observe(&device, || {
        let grads = some.forward(images.clone()).backward();
        drop(some.weight.grad(&grads));
    });
    let ours = [
        "norm_kernel",
        "score_patches_kernel",
        "systematic",
        "gather_patches_kernel",
    ];
    for name in ours {
        let of_this = kernels.iter().filter(|kernel| kernel.contains(name));
        assert_eq!(of_this.count(), 1, "{name}: {kernels:?}");
    }
    // Besides, the product, the gradient of ones, and the two sums of that of the bias.
    let others = kernels.len() - forward.len() - ours.len();
    let products = kernels.iter().filter(|name| name.contains("matmul"));
    let products_before = forward.iter().filter(|name| name.contains("matmul"));
    let products = products.count() - products_before.count();
    assert!(
        products >= 1 && others - products <= 3,
        "{forward:?} {kernels:?}"
    );
    assert_eq!(reads, 0, "{kernels:?}");

    let observer = AopObserver::new();
    let packed = layer(AopConfig::new().with_stored_input(StoredInput::Int8));
    let (kernels, reads) = observe(&device, || {
        for _ in 0..30 {
            packed.forward(images.clone()).sum().backward();
            observer.observe(&packed);
        }
    });
    assert_eq!(reads, 0, "{kernels:?}");
}

/// Dropout, layer norm and attention, without a wait after the first pass, which draws the numbers
/// that the passes of dropouts are counted from.
fn transformer(device: &Device) {
    let device = device.clone().autodiff();
    let input = Tensor::<3>::random([3, 7, 8], Distribution::Normal(0.0, 1.0), &device);
    let count = |pass: &dyn Fn(Tensor<3>) -> Tensor<3>| {
        let forward = observe(&device, || drop(pass(input.clone().require_grad())));
        let both = observe(&device, || {
            pass(input.clone().require_grad()).backward();
        });
        assert_eq!(forward.1 + both.1, 0, "{both:?}");
        [forward.0, both.0]
    };

    let dropout = nn::DropoutConfig::new(0.3).init();
    let (_, reads) = observe(&device, || drop(dropout.forward(input.clone())));
    assert_eq!(reads, 1);
    let [forward, both] = count(&|x| dropout.forward(x));
    // The gradient of the output takes a kernel to be filled with ones.
    assert_eq!((forward.len(), both.len()), (1, 3), "{both:?}");

    let norm = nn::LayerNormConfig::new(8).init(&device);
    let [forward, both] = count(&|x| norm.forward(x));
    let backward = both.len() - forward.len();
    assert!(backward <= 24, "{backward}: {both:?}");

    for prob in [0.0, 0.1] {
        let mha = nn::attention::MultiHeadAttentionConfig::new(8, 2).with_dropout(prob);
        let mha = mha.init(&device);
        let pass = |x: Tensor<3>| mha.forward_context(nn::attention::MhaInput::self_attn(x));
        drop(pass(input.clone().require_grad()));
        let [_, both] = count(&pass);
        let dropped = both.iter().filter(|kernel| kernel.contains("drop_out"));
        // The weights, again in the backward pass, and their gradient.
        let expected = if prob > 0.0 { 3 } else { 0 };
        assert_eq!(dropped.count(), expected, "{both:?}");
    }
}
