//! After its first step a layer allocates nothing of the size of batch or memory that `Linear` does
//! not allocate too, and keeps no more of its input between the passes than it is told to.

#![cfg(all(feature = "flex", feature = "autodiff"))]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use burn::{
    module::Module,
    nn::{
        Linear, LinearConfig,
        attention::MultiHeadAttentionConfig,
        transformer::{self as burns, TransformerEncoderConfig},
    },
    optim::{GradientsParams, SgdConfig},
    tensor::{Device, Distribution, Tensor},
};
use burn_memaop::{
    AopConfig, MemAopLinear, Memory, Method, OuterProducts, StoredInput, activation, nn,
    op::{AopStep, weight_gradient},
    transformer::{
        MemAopMultiHeadAttention, MemAopTransformerEncoder, MhaInput, TransformerEncoderInput,
    },
};

/// The system's allocator, counting requests of at least [`LARGE`] bytes, and the bytes that are alive.
struct Counting;

static LARGE_REQUESTS: AtomicUsize = AtomicUsize::new(0);
static ALIVE: AtomicUsize = AtomicUsize::new(0);

fn count(size: usize) {
    if size >= LARGE {
        LARGE_REQUESTS.fetch_add(1, Relaxed);
    }
    ALIVE.fetch_add(size, Relaxed);
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        ALIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        ALIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const M: usize = 2048;
const N: usize = 64;
const P: usize = 48;
/// A quarter of the smaller factor: far above what selection and the panels of K rows take.
const LARGE: usize = 4 * M * P / 4;

fn large_requests(run: impl FnOnce()) -> usize {
    let before = LARGE_REQUESTS.load(Relaxed);
    run();
    LARGE_REQUESTS.load(Relaxed) - before
}

fn random(columns: usize, device: &Device) -> Tensor<2> {
    Tensor::random([M, columns], Distribution::Default, device)
}

fn operation(memory: Memory) -> Vec<usize> {
    let device = Device::flex();
    let (x, g) = (random(N, &device), random(P, &device));
    let mut kept = None;
    let mut step = |number| {
        let settings = AopStep {
            k: 32,
            method: Method::TopK(memory),
            seed: 0,
            step: number,
        };
        kept = weight_gradient(x.clone(), g.clone(), kept.take(), settings).memory;
    };
    (0..4)
        .map(|number| large_requests(|| step(number)))
        .collect()
}

fn training<L: Module>(mut layer: L, forward: fn(&L, Tensor<2>) -> Tensor<2>) -> Vec<usize> {
    let device = Device::flex().autodiff();
    let mut optimizer = SgdConfig::new().init();
    let x = random(N, &device);
    (0..4)
        .map(|_| {
            let mut next = None;
            let requests = large_requests(|| {
                let loss = forward(&layer, x.clone().require_grad()).square().mean();
                let grads = GradientsParams::from_grads(loss.backward(), &layer);
                next = Some(optimizer.step(0.1, layer.clone(), grads));
            });
            layer = next.expect("the step has run");
            requests
        })
        .collect()
}

/// The bytes that a forward pass in training leaves behind, beyond the output, in shares of the input's.
fn kept(forward: impl Fn(Tensor<2>) -> Tensor<2>) -> f64 {
    kept_on(&Device::flex().autodiff(), forward)
}

fn kept_on(device: &Device, forward: impl Fn(Tensor<2>) -> Tensor<2>) -> f64 {
    let random = random(WIDE, device).require_grad();
    // No one else has the input, as below another layer.
    forward(random.clone() * 1.0).sum().backward();
    let before = ALIVE.load(Relaxed);
    let output = forward(random.clone() * 1.0);
    let kept = ALIVE.load(Relaxed) - before;
    let [_, columns] = output.dims();
    (kept as f64 - (4 * M * columns) as f64) / (4 * M * WIDE) as f64
}

const WIDE: usize = 512;

fn inputs_are_kept_in_as_many_bytes_as_are_asked_for() {
    let linear = LinearConfig::new(WIDE, 8).init(&Device::flex().autodiff());
    let burns = kept(|input| linear.forward(input));
    assert!((0.99..1.02).contains(&burns), "{burns}");
    for outer_products in [OuterProducts::Count(M), OuterProducts::Count(M / 8)] {
        for (stored_input, least, most) in [
            (StoredInput::Full, 0.99, 1.02),
            (StoredInput::Int8, 0.26, 0.27),
            (StoredInput::Int4, 0.13, 0.15),
        ] {
            let aop = AopConfig::new()
                .with_outer_products(outer_products)
                .with_stored_input(stored_input);
            let layer = MemAopLinear::from_linear(linear.clone(), aop);
            let kept = kept(|input| layer.forward(input));
            assert!((least..most).contains(&kept), "{aop:?}: {kept}");
        }
    }
    // Rows of sequences, and the input of three projections once.
    let aop = AopConfig::new()
        .with_outer_products(OuterProducts::Count(M))
        .with_stored_input(StoredInput::Int8);
    let layer = MemAopLinear::from_linear(linear.clone(), aop);
    let sequences = |input: Tensor<2>| input.reshape([32, M / 32, WIDE]);
    let rows = kept(|input| layer.forward(sequences(input)).flatten(0, 1));
    assert!((0.26..0.27).contains(&rows), "{rows}");
    let mha = MultiHeadAttentionConfig::new(WIDE, 8).with_dropout(0.0);
    let mha = mha.init(&Device::flex().autodiff());
    let attention = |aop| {
        let mha = MemAopMultiHeadAttention::from_mha(mha.clone(), aop);
        kept(|input| {
            mha.forward(MhaInput::self_attn(sequences(input)))
                .context
                .flatten(0, 1)
        })
    };
    let saved = attention(aop.with_stored_input(StoredInput::Full)) - attention(aop);
    // Of the input, and of that of the last layer.
    assert!((2.0 * 0.73..2.0 * 0.74).contains(&saved), "{saved}");

    // Of the weights of attention nothing is kept: long sequences keep as much for each token.
    let [short, long] = [32, 256].map(|length| {
        let mha = MemAopMultiHeadAttention::from_mha(mha.clone(), aop);
        kept(|input| {
            let sequences = input.reshape([M / length, length, WIDE]);
            mha.forward_context(MhaInput::self_attn(sequences))
                .flatten(0, 1)
        })
    });
    assert!((short - long).abs() < 0.1, "{short} {long}");

    let device = Device::flex().autodiff();
    let dropout = nn::DropoutConfig::new(0.1).init();
    let dropped = kept(|input| dropout.forward(input));
    assert!(dropped.abs() < 0.001, "{dropped}");
    let norm = nn::LayerNormConfig::new(WIDE).init(&device);
    let normed = kept(|input| norm.forward(input));
    assert!((0.99..1.02).contains(&normed), "{normed}");

    // With gradient checkpointing less is kept than with Burn's modules.
    let device = device.inner().autodiff().gradient_checkpointing();
    let config = TransformerEncoderConfig::new(WIDE, WIDE, 8, 2);
    for (norm_first, prob) in [(false, 0.0), (true, 0.0), (false, 0.1), (true, 0.1)] {
        let config = config
            .clone()
            .with_norm_first(norm_first)
            .with_dropout(prob);
        let burns = config.init(&device);
        let exact = AopConfig::new().with_outer_products(OuterProducts::All);
        let ours = MemAopTransformerEncoder::from_encoder(burns.clone(), exact);
        let burns = kept_on(&device, |input| {
            let input = burns::TransformerEncoderInput::new(sequences(input));
            burns.forward(input).flatten(0, 1)
        });
        let ours = kept_on(&device, |input| {
            let input = TransformerEncoderInput::new(sequences(input));
            ours.forward(input).flatten(0, 1)
        });
        assert!(ours < 0.9 * burns, "{norm_first} {prob}: {ours} {burns}");
    }

    // Beyond the output, which the layer above keeps anyway.
    let gelu = activation::Gelu::new().with_aop(aop);
    let (relu, gelu) = (kept(activation::relu), kept(|x| gelu.forward(x)));
    assert!((0.03..0.035).contains(&relu), "{relu}");
    assert!((0.26..0.27).contains(&gelu), "{gelu}");
}

// One test, because the allocator counts for the whole process.
#[test]
fn nothing_large_is_allocated_after_the_first_step() {
    inputs_are_kept_in_as_many_bytes_as_are_asked_for();

    let aop = AopConfig::new()
        .with_outer_products(OuterProducts::Count(32))
        .with_cost_rule(false);
    let linear = LinearConfig::new(N, P).init(&Device::flex().autodiff());
    let exact = training(linear.clone(), Linear::forward::<2>);
    assert!(exact[3] > 0, "the output and its gradient are large");

    for memory in [
        Memory::Published { decay: 1.0 },
        Memory::Balanced { decay: 0.9 },
    ] {
        let requests = operation(memory);
        assert!(requests[0] > 0, "the memory is allocated: {requests:?}");
        assert_eq!(requests[1..], [0, 0, 0], "{memory:?}");

        let layer =
            MemAopLinear::from_linear(linear.clone(), aop.with_method(Method::TopK(memory)));
        let ours = training(layer, MemAopLinear::forward::<2>);
        assert!(ours[1] <= exact[1], "{memory:?}: {ours:?} {exact:?}");
        assert!(ours[3] <= exact[3], "{memory:?}: {ours:?} {exact:?}");
    }
    assert_eq!(operation(Memory::None), [0; 4]);

    // The exact path has no pass of its own, in steps whose noise is measured too (the first is), for sequences too.
    let all = aop.with_outer_products(OuterProducts::Count(M));
    let sequences = |layer: &MemAopLinear, x: Tensor<2>| {
        let x: Tensor<3> = x.reshape([32, M / 32, N]);
        layer.forward(x).reshape([M, P])
    };
    for aop in [all, aop.with_outer_products(OuterProducts::Auto)] {
        let layer = || MemAopLinear::from_linear(linear.clone(), aop);
        for forward in [MemAopLinear::forward::<2>, sequences] {
            let ours = training(layer(), forward);
            let more = ours.iter().zip(&exact).any(|(ours, exact)| ours > exact);
            assert!(!more, "{aop:?}: {ours:?} {exact:?}");
        }
    }
}
