//! The same checks on every backend that is compiled in, with and without gradient checkpointing.

use burn::tensor::Device;

use crate::{
    activation, attention, auto, broken_values, convolution, dropout, input_gradient, layer, norm,
    observe, operation, packed, transformer,
};

macro_rules! checks {
    ($device:expr; $module:ident: $($check:ident),* $(,)?) => {
        $(
            #[test]
            fn $check() {
                if let Some(device) = $device {
                    $module::$check(&device);
                }
            }
        )*
    };
}

macro_rules! suite {
    ($backend:ident, $device:expr) => {
        mod $backend {
            use super::*;

            checks!($device; operation:
                operation_equals_the_oracle,
                batches_of_every_size_equal_the_oracle,
                large_batches_equal_the_oracle,
                draws_of_many_rows_equal_the_oracle,
                the_largest_of_many_rows_equal_the_oracle,
                ten_steps_leave_the_memory_of_the_oracle,
                a_change_of_precision_keeps_the_memory,
                half_and_double_precision_equal_the_oracle,
                rows_of_zeros_add_nothing,
                equal_seeds_draw_the_rows_of_the_oracle,
                one_tensor_as_both_factors,
            );

            checks!($device; packed:
                packed_rows_equal_the_oracle,
                packed_rows_of_every_type,
                gradients_of_packed_rows_equal_the_oracle,
                the_noise_of_packed_rows_is_that_of_the_rows,
                values_that_are_not_finite_stay_in_their_group,
                zeros_and_tiny_values_are_kept_as_zeros,
            );

            checks!($device; dropout:
                dropouts_equal_the_oracle,
            );

            checks!($device; auto:
                the_noise_of_a_gradient_equals_the_oracle,
            );

            checks!($device; input_gradient:
                input_gradients_equal_their_definition,
                rows_of_zeros_stay_zero,
                rows_of_zeros_change_nothing,
            );

            mod autodiff {
                use super::*;

                checks!($device.map(Device::autodiff); broken_values:
                    broken_values_are_in_the_gradients,
                    tiny_rows_count_as_others_do,
                    a_row_that_stands_for_many_does_not_overflow,
                );

                checks!($device.map(Device::autodiff); input_gradient:
                    only_the_gradient_of_the_input_changes,
                );

                checks!($device.map(Device::autodiff); auto:
                    k_falls_where_there_is_no_noise,
                    a_layer_may_go_while_a_measurement_is_on_its_way,
                    the_rows_of_the_gradient_of_the_input_are_chosen,
                );

                checks!($device.map(Device::autodiff); layer:
                    layer_equals_the_oracle,
                    k_equal_to_m_is_the_exact_gradient,
                    non_contiguous_input_is_handled,
                    frozen_weight_takes_no_step,
                );
                checks!($device.map(Device::autodiff); packed:
                    layers_with_packed_inputs_equal_the_oracle,
                    attention_packs_its_input_once,
                );
                checks!($device.map(Device::autodiff); activation:
                    activations_equal_burns,
                    the_rounding_of_a_derivative_is_unbiased,
                );
                checks!($device.map(Device::autodiff); dropout:
                    a_backward_pass_drops_what_the_forward_pass_dropped,
                    attention_with_dropout_equals_its_definition,
                );
                checks!($device.map(Device::autodiff); norm:
                    norms_equal_burns,
                    norms_equal_the_oracle,
                );
                checks!($device.map(Device::autodiff); convolution:
                    convolutions_equal_the_oracle,
                    convolutions_of_every_type_equal_the_oracle,
                    images_in_other_orders_are_handled,
                    idle_positions_add_nothing,
                    exact_convolutions_equal_burns,
                    a_pointwise_convolution_is_a_linear_layer,
                    convolutions_without_images_have_gradients_of_zeros,
                    images_in_few_bits_are_unbiased,
                );
                checks!($device.map(Device::autodiff); observe:
                    errors_equal_their_definition,
                );
                checks!($device.map(Device::autodiff); attention:
                    attention_equals_burns,
                    context_equals_burns,
                    cross_attention_equals_burns,
                    attention_in_half_precision_is_close,
                );
                checks!($device.map(Device::autodiff); transformer:
                    feed_forward_equals_burns,
                    encoder_equals_burns,
                    decoder_equals_burns,
                    swiglu_equals_burns,
                );
            }

            mod checkpointed {
                use super::*;

                checks!($device.map(|device| device.autodiff().gradient_checkpointing()); layer:
                    layer_equals_the_oracle,
                    k_equal_to_m_is_the_exact_gradient,
                    recomputation_takes_no_step_of_its_own,
                );
                checks!($device.map(|device| device.autodiff().gradient_checkpointing()); attention:
                    context_equals_burns,
                    cross_attention_equals_burns,
                );
                checks!($device.map(|device| device.autodiff().gradient_checkpointing()); dropout:
                    a_backward_pass_drops_what_the_forward_pass_dropped,
                    attention_with_dropout_equals_its_definition,
                );
                checks!($device.map(|device| device.autodiff().gradient_checkpointing()); norm:
                    norms_equal_burns,
                );
                checks!($device.map(|device| device.autodiff().gradient_checkpointing()); transformer:
                    encoder_equals_burns,
                );
                checks!($device.map(|device| device.autodiff().gradient_checkpointing()); convolution:
                    images_in_other_orders_are_handled,
                );
                checks!($device.map(|device| device.autodiff().gradient_checkpointing()); packed:
                    layers_with_packed_inputs_equal_the_oracle,
                );
                checks!($device.map(|device| device.autodiff().gradient_checkpointing()); activation:
                    activations_equal_burns,
                );
            }
        }
    };
}

suite!(flex, Some(Device::flex()));

#[cfg(feature = "ndarray")]
suite!(ndarray, Some(ndarray()));

#[cfg(feature = "wgpu")]
suite!(wgpu, wgpu());

#[cfg(feature = "tch")]
suite!(tch, Some(tch()));

#[cfg(feature = "ndarray")]
#[allow(deprecated)]
fn ndarray() -> Device {
    Device::ndarray()
}

#[cfg(feature = "tch")]
#[allow(deprecated)]
fn tch() -> Device {
    Device::libtorch()
}

/// The default adapter. A machine without one skips the tests, except in CI.
#[cfg(feature = "wgpu")]
pub fn wgpu() -> Option<Device> {
    use burn::tensor::Tensor;
    use std::sync::OnceLock;

    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = *FOUND.get_or_init(|| {
        std::panic::catch_unwind(|| {
            let device = Device::wgpu(Default::default());
            Tensor::<1>::ones([1], &device).into_data();
        })
        .is_ok()
    });
    if !found {
        let message = "no wgpu adapter: install a driver (on Debian, mesa-vulkan-drivers)";
        assert!(std::env::var_os("CI").is_none(), "{message}");
        eprintln!("skipped: {message}");
    }
    found.then(|| Device::wgpu(Default::default()))
}
