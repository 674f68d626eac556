//! When the approximation pays.

use burn::backend::DispatchDevice;

use crate::config::{AopConfig, Memory};

/// Whether the approximate gradients of a layer are expected to take less time than the exact ones on
/// this device.
///
/// Leaving out M - K of the M outer products saves `2 (M - K) N P` floating-point operations of a
/// matrix product; the price is a pass over `M (N + P)` values, once or, with a memory, three
/// times. Rows left out of the gradient of the input, where it is asked for (`with_input`), save as
/// much, for a pass more. On CPUs the rule compares the two per row, by the measured cost of a value in the pass
/// in operations of the product. On other devices the approximation is always taken.
pub(crate) fn pays(
    device: &DispatchDevice,
    config: &AopConfig,
    [rows, d_input, d_output]: [usize; 3],
    with_input: bool,
) -> bool {
    if !is_cpu(device) {
        return true;
    }
    let left_out = |k: usize| 1.0 - k.min(rows) as f64 / rows as f64;
    let products = left_out(config.outer_products.k(rows));
    let input_rows = match with_input {
        true => left_out(config.input_gradient.k(rows)),
        false => 0.0,
    };
    let weight_pass = match config.memory {
        _ if products == 0.0 => 0.0,
        Memory::None => READ,
        Memory::Published { .. } | Memory::Balanced { .. } => FOLD_IN,
    };
    let input_pass = if input_rows == 0.0 { 0.0 } else { READ };
    let saved = 2.0 * (products + input_rows) * d_input as f64 * d_output as f64;
    saved > (weight_pass + input_pass) * (d_input + d_output) as f64 + ROW
}

/// The cost of a value in the pass without a memory, in operations of a matrix product. As the
/// others, rounded from `cargo bench --bench layer` (`docs/benchmarks.md`).
const READ: f64 = 20.0;
/// The cost of a value in the pass with a memory.
const FOLD_IN: f64 = 70.0;
/// The cost of a row whatever its width: its noise, its key.
const ROW: f64 = 2000.0;

fn is_cpu(device: &DispatchDevice) -> bool {
    match device {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => true,
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => true,
        #[cfg(feature = "autodiff")]
        DispatchDevice::Autodiff(device) => is_cpu(device),
        #[allow(unreachable_patterns)]
        _ => false,
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::config::{InputGradient, OuterProducts, Policy};

    #[test]
    fn small_layers_are_exact_and_large_ones_are_not() {
        let device = burn::tensor::Device::flex();
        let pays = |memory, rows, k, d_input, d_output| {
            let policy = match memory {
                Memory::None => Policy::Systematic,
                _ => Policy::TopK,
            };
            let config = AopConfig::new()
                .with_outer_products(OuterProducts::Count(k))
                .with_policy(policy)
                .with_memory(memory);
            pays(
                device.as_dispatch(),
                &config,
                [rows, d_input, d_output],
                true,
            )
        };
        let balanced = Memory::Balanced { decay: 0.9 };
        for (rows, k, d_input, d_output, without, with) in [
            (64, 8, 784, 10, false, false),
            (512, 64, 32, 32, false, false),
            (128, 16, 64, 64, true, false),
            (128, 16, 128, 128, true, true),
            (512, 64, 784, 512, true, true),
            // K of nearly M saves nothing.
            (512, 500, 784, 512, false, false),
        ] {
            let found = [Memory::None, balanced].map(|m| pays(m, rows, k, d_input, d_output));
            assert_eq!(found, [without, with], "{rows} {k} {d_input} {d_output}");
        }
    }

    #[test]
    fn rows_of_the_input_gradient_count_by_themselves() {
        let device = burn::tensor::Device::flex();
        let quarter = InputGradient::Largest {
            ratio: 0.25,
            minimum: 1,
        };
        let config = AopConfig::new()
            .with_outer_products(OuterProducts::Count(512))
            .with_input_gradient(quarter);
        let taken = |d_output, with_input| {
            pays(
                device.as_dispatch(),
                &config,
                [512, 784, d_output],
                with_input,
            )
        };
        assert!(
            taken(512, true),
            "all outer products, but a quarter of the rows"
        );
        assert!(!taken(10, true));
        assert!(!taken(512, false), "a gradient that nobody asks for");
    }
}
