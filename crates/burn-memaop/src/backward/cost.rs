//! The cost rule, which decides whether an approximate gradient pays, and the time of a step.

#[cfg(feature = "autodiff")]
use burn::tensor::GradientCheckpointingStrategy;
use burn::{backend::DispatchDevice, tensor::DType};

use crate::{
    config::{AopConfig, Memory, OuterProducts, StoredInput},
    rows::MOST_ROWS,
    state::choice::{DIVISORS, ProductTime, StepTime, k_of},
};

/// One backward pass of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pass {
    pub(crate) rows: usize,
    pub(crate) d_input: usize,
    pub(crate) d_output: usize,
    /// The values of input and gradient that are read for each row. A convolution reads fewer than
    /// `d_input + d_output` where its patches overlap.
    pub(crate) read: usize,
    /// The values that are gathered one by one for each drawn row of a convolution. The exact
    /// product copies whole rows of images instead.
    pub(crate) gathered: usize,
    pub(crate) dtype: DType,
    /// Whether the gradient of the input is asked for.
    pub(crate) with_input: bool,
}

impl Pass {
    /// A backward pass of a linear layer with these numbers of inputs and outputs.
    pub(crate) fn of_linear(
        rows: usize,
        [d_input, d_output]: [usize; 2],
        dtype: DType,
        with_input: bool,
    ) -> Self {
        Self {
            rows,
            d_input,
            d_output,
            read: d_input + d_output,
            gathered: 0,
            dtype,
            with_input,
        }
    }
}

/// The configuration with a gradient made exact if its approximation is expected to take longer on
/// this device. Each gradient is decided by itself.
///
/// Leaving out M - K of the M outer products saves `2 (M - K) N P` operations of a matrix product.
/// The price is to read `M (N + P)` values once, or three times with a memory, and to copy those of
/// K rows. Rows left out of the gradient of the input save as much, for one more pass. The rule
/// compares the two per row. The cost of a value is measured on CPUs, and follows a model of a fast
/// GPU on GPUs (`docs/gpu.md`).
///
/// A gradient is also exact where only the default bodies could approximate it, because they take
/// longer than what they save. An input is kept as it is where [it is not worth packing](packs).
pub(crate) fn ruled(config: &AopConfig, device: &DispatchDevice, pass: Pass) -> AopConfig {
    let mut ruled = *config;
    if !config.cost_rule {
        return ruled;
    }
    if !packs(device, pass.dtype) {
        ruled.stored_input = StoredInput::Full;
    }
    let class = device_class(device);
    let cpu = class == Class::Cpu;
    if class == Class::Other || !cpu && pass.rows > MOST_ROWS {
        exact_weight(&mut ruled);
        ruled.input_gradient = OuterProducts::All;
        return ruled;
    }
    let cost = Cost::of(class, pass.dtype);
    if !has_fast_code(pass.dtype, cpu) || !cost.weight_pays(config, pass) {
        exact_weight(&mut ruled);
    }
    if !has_fast_code(pass.dtype, cpu) || !cost.input_pays(config, pass) {
        ruled.input_gradient = OuterProducts::All;
    }
    ruled
}

/// Whether few bits save something. They do not where values would be packed by way of the host, or
/// where gradient checkpointing can compute values again instead of keeping them.
pub(crate) fn packs(device: &DispatchDevice, dtype: DType) -> bool {
    #[cfg(feature = "autodiff")]
    if let DispatchDevice::Autodiff(device) = device
        && device.gradient_checkpointing_strategy() != GradientCheckpointingStrategy::Disabled
    {
        return false;
    }
    has_code_for_values(device, dtype)
}

/// Whether the device itself has code for passes over values of this type.
pub(crate) fn has_code_for_values(device: &DispatchDevice, dtype: DType) -> bool {
    match device_class(device) {
        Class::Cpu => has_fast_code(dtype, true),
        Class::Cube | Class::Cuda => has_fast_code(dtype, false),
        Class::Other => false,
    }
}

pub(crate) fn is_cpu(device: &DispatchDevice) -> bool {
    device_class(device) == Class::Cpu
}

/// The bytes of attention's scores that are computed at a time. On CPUs they stay in the cache. On
/// other devices a block must be large enough for all of its units.
pub(crate) fn attention_block(device: &DispatchDevice) -> usize {
    match device_class(device) {
        Class::Cpu => 1 << 20,
        Class::Cube | Class::Cuda | Class::Other => 1 << 26,
    }
}

fn exact_weight(config: &mut AopConfig) {
    config.outer_products = OuterProducts::All;
}

fn has_fast_code(dtype: DType, cpu: bool) -> bool {
    match cpu {
        true => dtype == DType::F32,
        false => matches!(dtype, DType::F32 | DType::F16 | DType::BF16),
    }
}

/// What the passes cost, in operations of a matrix product, rounded from `cargo bench --bench cost`
/// (`docs/benchmarks.md`).
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// A value in the pass without a memory.
    read: f64,
    /// A value in the pass with a memory.
    fold_in: f64,
    /// A value in the pass for rows of the gradient of the input.
    input: f64,
    /// A value of a drawn row, which is copied. The passes above include an eighth of the rows.
    row: f64,
    /// A value of a drawn patch of a convolution, and a position of its output, for which there is
    /// little to multiply. Both are rough (`docs/convolutions.md`).
    gather: f64,
    position: f64,
    /// A value of the gradient of the weight, which a product of any number of rows writes.
    write: f64,
    /// A launch.
    launch: f64,
    /// A row in the search for the probabilities of all candidates for K, on a GPU by one
    /// multiprocessor. With it, measuring is overestimated at every size of the bench (`measure`).
    search: f64,
}

/// A CPU whose products use registers of 256 bits.
const NARROW: Cost = Cost {
    read: 35.0,
    fold_in: 80.0,
    input: 45.0,
    row: 100.0,
    gather: 60.0,
    position: 500.0,
    write: 50.0,
    launch: 0.0,
    search: 6000.0,
};
/// A CPU whose products use registers of 512 bits and take less time, so that passes weigh more.
#[cfg(any(test, all(feature = "avx512", target_arch = "x86_64")))]
const WIDE: Cost = Cost {
    read: 65.0,
    fold_in: 150.0,
    input: 50.0,
    row: 150.0,
    gather: 120.0,
    position: 1000.0,
    write: 100.0,
    launch: 0.0,
    search: 12000.0,
};

impl Cost {
    fn of(class: Class, dtype: DType) -> Self {
        match (class, dtype) {
            (Class::Cpu, _) => Self::of_this_processor(),
            (Class::Cube | Class::Cuda, DType::F16 | DType::BF16) => GPU_HALF,
            (Class::Cube, _) => GPU,
            (Class::Cuda, _) => GPU_TF32,
            // The rule makes these devices exact.
            (Class::Other, _) => NOTHING,
        }
    }

    fn of_this_processor() -> Self {
        #[cfg(all(feature = "avx512", target_arch = "x86_64"))]
        if std::is_x86_feature_detected!("avx512f") {
            return WIDE;
        }
        NARROW
    }

    fn weight_pays(&self, config: &AopConfig, pass: Pass) -> bool {
        let k = match config.chooses_k() {
            true => least_k(pass.rows),
            false => config.outer_products.fixed_k(pass.rows),
        };
        let copied = self.copied(k as f64 / pass.rows as f64, pass);
        self.saved(k, self.write, pass) > self.weight_pass(config, pass) + copied
    }

    /// What copying a share of the rows adds to a pass, per row of the batch.
    fn copied(&self, share: f64, pass: Pass) -> f64 {
        match pass.gathered {
            0 => self.row * (share - 1.0 / 8.0) * pass.read as f64,
            gathered => self.gather * share * gathered as f64,
        }
    }

    /// The cost of drawing rows for the gradient of the weight, per row.
    fn weight_pass(&self, config: &AopConfig, pass: Pass) -> f64 {
        // A memory takes three launches more.
        let (value, of_memory) = match config.method.memory() {
            Memory::None => (self.read, 0),
            Memory::Published { .. } | Memory::Balanced { .. } => (self.fold_in, 3),
        };
        let position = match pass.gathered {
            0 => 0.0,
            _ => self.position,
        };
        // The launches score, draw and gather rows. A convolution also squares values.
        let of_patches = usize::from(pass.gathered > 0);
        let launches = 2 + of_memory + selection_launches(pass.rows) + of_patches;
        value * pass.read as f64 + position + self.launches(launches, pass)
    }

    fn input_pays(&self, config: &AopConfig, pass: Pass) -> bool {
        let k = match config.chooses_input_rows() {
            true => least_k(pass.rows),
            false => config.fixed_input_rows(pass.rows),
        };
        let copied = self.copied(k as f64 / pass.rows as f64, pass);
        pass.with_input && self.saved(k, 0.0, pass) > self.input_pass(pass) + copied
    }

    fn input_pass(&self, pass: Pass) -> f64 {
        // The launches are sizes, draw, gather, zeros and scatter.
        let launches = 4 + selection_launches(pass.rows);
        self.input * pass.read as f64 + self.launches(launches, pass)
    }

    /// The search per row. A GPU spreads many rows over several multiprocessors (`select/many.rs`).
    fn search(&self, rows: usize) -> f64 {
        let shares = match self.launch > 0.0 && rows > ONE_CUBE {
            true => rows.div_ceil(1024).min(256),
            false => 1,
        };
        self.search / shares as f64
    }

    /// The cost of `count` launches, per row.
    fn launches(&self, count: usize, pass: Pass) -> f64 {
        self.launch * count as f64 / pass.rows as f64
    }

    /// What a product of `k` rows saves, per row. It always pays `write` for a value of its result.
    fn saved(&self, k: usize, write: f64, pass: Pass) -> f64 {
        let rows = pass.rows as f64;
        let left_out = 1.0 - (k as f64 / rows).min(1.0);
        (2.0 - write / rows).max(0.0) * left_out * (pass.d_input * pass.d_output) as f64
    }
}

/// The most rows among which one cube of a GPU draws (`STAGED` in `rows/cube/select.rs`).
const ONE_CUBE: usize = 2048;

/// The launches of systematic sampling on a GPU.
fn selection_launches(rows: usize) -> usize {
    match rows <= ONE_CUBE {
        true => 1,
        false => 9,
    }
}

/// The least K that a layer chooses.
fn least_k(rows: usize) -> usize {
    k_of(1.0 / DIVISORS[DIVISORS.len() - 1] as f64, rows)
}

/// A GPU, by a model of a fast one (`docs/gpu.md`), not by measuring. A value has four bytes, and a
/// byte takes as long as 20 operations (67e12 / 3.35e12 on an H100 in `f32`). Gathering an eighth
/// of the rows takes a quarter more. A launch takes 3 microseconds, at 50e12 operations a second.
const GPU: Cost = Cost {
    read: 100.0,
    fold_in: 240.0,
    input: 160.0,
    row: 160.0,
    gather: 80.0,
    position: 0.0,
    write: 80.0,
    launch: 1.5e8,
    search: 2e5,
};
/// On CUDA, products of single precision use tensor cores in TF32, and take a seventh of the time.
const GPU_TF32: Cost = Cost {
    read: 700.0,
    fold_in: 1700.0,
    input: 1100.0,
    row: 1120.0,
    gather: 560.0,
    position: 0.0,
    write: 560.0,
    launch: 1.05e9,
    search: 1.4e6,
};
/// In half precision values have half of the bytes, and products take a fourteenth of the time.
const GPU_HALF: Cost = Cost {
    launch: 2.1e9,
    search: 2.8e6,
    ..GPU_TF32
};

/// How often each value of weight and output is read or written beside the products: by an
/// optimizer, by way of another tensor, and by an activation, in both directions.
const BESIDE: f64 = 4.0;

/// Only the operations of products count.
const NOTHING: Cost = Cost {
    read: 0.0,
    fold_in: 0.0,
    input: 0.0,
    row: 0.0,
    gather: 0.0,
    position: 0.0,
    write: 0.0,
    launch: 0.0,
    search: 0.0,
};

/// The time of a training step per row, in operations of a matrix product, for the choice of K.
/// Without the cost rule it is the time of the products alone.
pub(crate) fn step_time(config: &AopConfig, device: &DispatchDevice, pass: Pass) -> StepTime {
    let cost = match config.cost_rule {
        true => Cost::of(device_class(device), pass.dtype),
        false => NOTHING,
    };
    let (n, p) = (pass.d_input as f64, pass.d_output as f64);
    let (rows, read) = (pass.rows as f64, pass.read as f64);
    let [none, all] = [0.0, 1.0].map(|share| cost.copied(share, pass));
    let product = 2.0 * n * p;
    // All rows share the work on a value of the weight.
    let weight = n * p / rows;
    let written = (cost.write * weight).min(product);
    let input = match pass.with_input {
        false => ProductTime::default(),
        true => ProductTime {
            pass: cost.input_pass(pass) + none,
            copy: all - none,
            product,
        },
    };
    let measures = match config.chooses_input_rows() && pass.with_input {
        false => 1.0,
        true => 2.0,
    };
    // The search for all K takes as many launches as that for one.
    let launches = cost.launches(8 + selection_launches(pass.rows), pass);
    StepTime {
        fixed: product + written + BESIDE * cost.read * (weight + p),
        weight: ProductTime {
            pass: cost.weight_pass(config, pass) + none,
            copy: all - none,
            product: product - written,
        },
        input,
        measure: measures * (cost.read * (read + weight) + cost.search(pass.rows) + launches),
    }
}

#[allow(dead_code)] // Not all backends are always there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// A CPU with the code of `rows/cpu.rs`.
    Cpu,
    /// A GPU with the kernels of `rows/cube.rs`.
    Cube,
    /// A GPU with these kernels, and with products of single precision in TF32.
    Cuda,
    /// A device with the default bodies alone.
    Other,
}

fn device_class(device: &DispatchDevice) -> Class {
    match device {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => Class::Cpu,
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => Class::Cpu,
        // The cubes of CubeCL's CPU runtime are too small for the kernels.
        #[cfg(feature = "cubecl-backend")]
        DispatchDevice::Cube(burn_cubecl::cubecl::Device::Cpu(_)) => Class::Other,
        #[cfg(feature = "cubecl-backend")]
        DispatchDevice::Cube(burn_cubecl::cubecl::Device::Cuda(_)) => Class::Cuda,
        #[cfg(feature = "cubecl-backend")]
        DispatchDevice::Cube(_) => Class::Cube,
        #[cfg(feature = "autodiff")]
        DispatchDevice::Autodiff(device) => device_class(device),
        #[allow(unreachable_patterns)]
        _ => Class::Other,
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::config::Method;
    use crate::state::choice::Averages;

    fn pass(rows: usize, d_input: usize, d_output: usize) -> Pass {
        Pass {
            rows,
            d_input,
            d_output,
            read: d_input + d_output,
            gathered: 0,
            dtype: DType::F32,
            with_input: true,
        }
    }

    fn config(memory: Memory, k: usize) -> AopConfig {
        let method = match memory {
            Memory::None => Method::Systematic,
            memory => Method::TopK(memory),
        };
        AopConfig::new()
            .with_outer_products(OuterProducts::Count(k))
            .with_method(method)
    }

    const BALANCED: Memory = Memory::Balanced { decay: 0.9 };

    #[test]
    fn small_layers_are_exact_and_large_ones_are_not() {
        for (rows, k, d_input, d_output, narrow, wide) in [
            (64, 8, 784, 10, [false, false], [false, false]),
            (512, 64, 32, 32, [false, false], [false, false]),
            (128, 16, 64, 64, [true, false], [false, false]),
            (128, 16, 128, 128, [true, true], [true, false]),
            (512, 64, 784, 512, [true, true], [true, true]),
            // A K near M saves nothing.
            (512, 500, 784, 512, [false, false], [false, false]),
        ] {
            for (cost, expected) in [(NARROW, narrow), (WIDE, wide)] {
                let pays = |memory| {
                    let config = config(memory, k);
                    cost.weight_pays(&config, pass(rows, d_input, d_output))
                };
                let found = [Memory::None, BALANCED].map(pays);
                assert_eq!(found, expected, "{cost:?} {rows} {k} {d_input} {d_output}");
            }
        }
    }

    #[test]
    fn on_gpus_launches_decide() {
        for (rows, d_input, d_output, single, tf32, half) in [
            (1024, 512, 512, false, false, false),
            (4096, 1024, 1024, true, false, false),
            (16_384, 1024, 4096, true, true, true),
            (8192, 4096, 4096, true, true, true),
        ] {
            let pays = |cost: Cost| {
                let config = config(Memory::None, rows / 8);
                cost.weight_pays(&config, pass(rows, d_input, d_output))
            };
            let expected = [single, tf32, half];
            let found = [GPU, GPU_TF32, GPU_HALF].map(pays);
            assert_eq!(found, expected, "{rows} {d_input} {d_output}");
        }
        assert_eq!(Cost::of(Class::Cuda, DType::BF16).launch, GPU_HALF.launch);
    }

    #[test]
    fn each_gradient_is_decided_by_itself() {
        let device = burn::tensor::Device::flex();
        let quarter = OuterProducts::Ratio(0.25);
        let ruled = |config: AopConfig, pass: Pass| {
            let ruled = ruled(&config, device.as_dispatch(), pass);
            let weight = ruled.outer_products.fixed_k(pass.rows) < pass.rows;
            (weight, ruled.input_gradient != OuterProducts::All)
        };
        let few = config(Memory::None, 64).with_input_gradient(quarter);
        let wide = pass(512, 784, 512);
        assert_eq!(ruled(few, wide), (true, true));
        // A gradient of all rows has nothing to save.
        assert_eq!(ruled(config(Memory::None, 64), wide), (true, false));
        let all = few.with_outer_products(OuterProducts::Count(512));
        assert_eq!(ruled(all, wide), (false, true));
        assert_eq!(
            ruled(
                few,
                Pass {
                    with_input: false,
                    ..wide
                }
            ),
            (true, false)
        );
        assert_eq!(ruled(few, pass(512, 784, 10)), (false, false));
        // With `Auto` a gradient is exact where no K pays.
        let chosen = few.with_outer_products(OuterProducts::Auto);
        assert_eq!(ruled(chosen, pass(512, 784, 10)), (false, false));
        assert_eq!(ruled(chosen, wide), (true, true));
        let input = few.with_input_gradient(OuterProducts::Auto);
        assert_eq!(ruled(input, wide), (true, true));
        assert_eq!(ruled(input, pass(512, 784, 10)), (false, false));
        let off = few.with_cost_rule(false);
        assert_eq!(ruled(off, pass(512, 784, 10)), (true, true));
    }

    #[test]
    fn a_step_is_three_products_and_what_stands_beside() {
        let device = burn::tensor::Device::flex();
        let time = |pass| step_time(&AopConfig::new(), device.as_dispatch(), pass);
        let wide = pass(4096, 1024, 1024);
        let StepTime {
            fixed,
            weight: ProductTime { product, .. },
            input,
            ..
        } = time(wide);
        assert!(fixed > product && fixed < 1.3 * product, "{fixed}");
        assert_eq!(input.product, 2.0 * 1024.0 * 1024.0);
        let first = time(Pass {
            with_input: false,
            ..wide
        });
        assert_eq!((first.fixed, first.input.product), (fixed, 0.0));
        // The rows of dX need a measurement of their own.
        let chosen = AopConfig::new().with_input_gradient(OuterProducts::Auto);
        let measure = |config: &AopConfig, with_input| {
            let pass = Pass { with_input, ..wide };
            step_time(config, device.as_dispatch(), pass).measure
        };
        assert_eq!(
            measure(&chosen, true),
            2.0 * measure(&AopConfig::new(), true)
        );
        assert_eq!(measure(&chosen, false), measure(&AopConfig::new(), false));
        // A small batch pays more for each row, and measures less often if the layer is small too.
        let small = time(pass(64, 128, 128));
        assert!(small.fixed > 1.5 * small.weight.product);
        let settled = Averages {
            weight: 9.0,
            ..Averages::default()
        };
        assert!(small.interval(&settled) > time(wide).interval(&settled));
    }

    #[test]
    fn inputs_are_kept_as_they_are_where_packing_is_slow_or_saves_nothing() {
        let device = burn::tensor::Device::flex();
        let stored = |stored_input, dtype, cost_rule| {
            let config = config(Memory::None, 64)
                .with_stored_input(stored_input)
                .with_cost_rule(cost_rule);
            let pass = Pass {
                dtype,
                ..pass(512, 784, 512)
            };
            ruled(&config, device.as_dispatch(), pass).stored_input
        };
        use StoredInput::{Full, Int8};
        assert_eq!(stored(Int8, DType::F32, true), Int8);
        assert_eq!(stored(Int8, DType::F16, true), Full);
        assert_eq!(stored(Int8, DType::F16, false), Int8);
        assert_eq!(stored(Int8, DType::F64, true), Full);

        let again = device.autodiff().gradient_checkpointing();
        let config = config(Memory::None, 64).with_stored_input(Int8);
        let ruled = |config| ruled(&config, again.as_dispatch(), pass(512, 784, 512)).stored_input;
        assert_eq!(ruled(config), Full);
        assert_eq!(ruled(config.with_cost_rule(false)), Int8);
    }

    #[test]
    fn what_has_only_a_slow_body_is_exact() {
        let device = burn::tensor::Device::flex();
        let approximate = |config: AopConfig, dtype| {
            let pass = Pass {
                dtype,
                ..pass(512, 784, 512)
            };
            let ruled = ruled(&config, device.as_dispatch(), pass);
            ruled.outer_products.fixed_k(512) < 512
        };
        let kept = config(BALANCED, 64);
        assert!(approximate(kept, DType::F32) && !approximate(kept, DType::F64));
        assert!(!approximate(kept, DType::F16) && !approximate(kept, DType::BF16));
        assert!(approximate(config(Memory::None, 64), DType::F32));
    }
}
