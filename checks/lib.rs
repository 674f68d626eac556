//! Work that runs every kernel of the crate, and what CubeCL compiles for it.

#[cfg(not(target_family = "wasm"))]
mod compiled;
#[cfg(target_family = "wasm")]
mod page;

#[cfg(not(target_family = "wasm"))]
pub use compiled::{Compiled, compiled_by};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Device, Distribution, Tensor},
};
use burn_memaop::{
    AopConfig, AopObserver, MemAopConv2dConfig, MemAopLinearConfig, Memory, Method, OuterProducts,
    StoredInput,
    activation::{Gelu, relu},
    baseline::Baseline,
    op::{
        AopStep,
        parts::{drop_out, gradient_noise, input_gradient, pack},
        weight_gradient,
    },
};

/// All kernels of `rows/cube/`. Their names differ even without their modules.
pub const KERNELS: [&str; 28] = [
    "dropout::drop_out_kernel",
    "gather::gather_grad_kernel",
    "gather::gather_kernel",
    "gather::rest_kernel",
    "gather::spread_kernel",
    "gather::take_out_kernel",
    "images::gather_patches_kernel",
    "images::norm_kernel",
    "images::score_patches_kernel",
    "packed::gather_packed_kernel",
    "packed::pack_kernel",
    "packed::times_kernel",
    "packed::unpack_kernel",
    "scores::check_kernel",
    "scores::fold_kernel",
    "scores::score_kernel",
    "select::largest::largest_kernel",
    "select::many::largest::count_kernel",
    "select::many::largest::digit_kernel",
    "select::many::largest::place_kernel",
    "select::many::search::chunk_largest_kernel",
    "select::many::search::search_kernel",
    "select::many::systematic::draw_kernel",
    "select::many::systematic::places_kernel",
    "select::many::variance::roots_kernel",
    "select::many::variance::sums_kernel",
    "select::systematic::systematic_kernel",
    "select::variance::variance_kernel",
];

/// Runs all kernels, in each floating-point type that the device has.
pub fn run_every_kernel(device: &Device) {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        if device.supports_dtype(dtype) {
            gradients(device, dtype);
            others(device, dtype);
            layers(&device.clone().autodiff(), dtype);
        }
    }
}

fn random(shape: [usize; 2], device: &Device, dtype: DType) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), (device, dtype))
}

/// Casts the parameters of modules to a type.
struct Cast(DType);

impl Cast {
    fn of<M: Module>(mut self, module: M) -> M {
        module.map(&mut self)
    }
}

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(self.0).detach().require_grad())
    }
}

fn gradients(device: &Device, dtype: DType) {
    let methods = [
        Method::Systematic,
        Method::TopK(Memory::None),
        Method::TopK(Memory::Balanced { decay: 0.9 }),
        Method::TopK(Memory::Published { decay: 1.0 }),
        Method::Baseline(Baseline::RandK(Memory::None)),
        Method::Baseline(Baseline::WeightedK(Memory::Balanced { decay: 1.0 })),
    ];
    for method in methods {
        // Rows of width 64 are read as vectors, and rows of width 7 are not.
        for (rows, width) in [(300, 64), (300, 7), (3000, 7)] {
            let step = AopStep {
                k: 40,
                method,
                seed: 1,
                step: 0,
            };
            let batch = || {
                (
                    random([rows, width], device, dtype),
                    random([rows, 12], device, dtype),
                )
            };
            let (x, g) = batch();
            let gradient = weight_gradient(x, g, None, step);
            let (x, g) = batch();
            weight_gradient(x, g, gradient.memory, step);
        }
    }
}

fn others(device: &Device, dtype: DType) {
    for rows in [300, 5000] {
        let (x, g) = (
            random([rows, 70], device, dtype),
            random([rows, 12], device, dtype),
        );
        input_gradient(g.clone(), random([70, 12], device, dtype), 40, 1, 0);
        let ks = [rows, 150, 75, 40, 20, 10];
        let gradient = random([70, 12], device, dtype);
        gradient_noise(x.clone(), g.clone(), gradient, ks);
        drop_out(x.clone(), 0.3, 1, 0);
        for stored in [StoredInput::Int8, StoredInput::Int4] {
            let packed = pack(x.clone(), stored, 1, 0);
            let step = AopStep {
                k: 40,
                method: Method::Systematic,
                seed: 1,
                step: 0,
            };
            packed.clone().weight_gradient(g.clone(), None, step);
            packed.unpack();
        }
    }
}

/// Runs a linear layer, the activations and convolutions of the crate in a type.
fn layers(device: &Device, dtype: DType) {
    let aop = AopConfig::new()
        .with_outer_products(OuterProducts::Count(20))
        .with_cost_rule(false);
    let linear = Cast(dtype).of(MemAopLinearConfig::new(70, 12).init(device).with_aop(aop));
    let hidden = linear.forward(random([300, 70], device, dtype).require_grad());
    let gelu = Gelu::new().with_aop(aop.with_stored_input(StoredInput::Int8));
    (relu(hidden.clone()) + gelu.forward(hidden))
        .sum()
        .backward();

    let images = || {
        let normal = Distribution::Normal(0.0, 1.0);
        Tensor::<4>::random([3, 6, 9, 8], normal, (device, dtype)).require_grad()
    };
    for (groups, outer_products) in [(1, OuterProducts::Count(20)), (2, OuterProducts::Auto)] {
        let conv = MemAopConv2dConfig::new([6, 4], [3, 3])
            .with_groups(groups)
            .init(device)
            .with_aop(aop.with_outer_products(outer_products));
        let conv = Cast(dtype).of(conv);
        let observer = AopObserver::new();
        for _ in 0..2 {
            conv.forward(images()).sum().backward();
            observer.observe(&conv);
        }
    }
}
