//! Attention against Burn's own.

use burn::{
    module::{Lora, Module, ModuleMapper, Param},
    nn::attention::{
        self, CrossAttentionCache, CrossAttentionConfig, MultiHeadAttentionConfig,
        generate_autoregressive_mask,
    },
    tensor::{DType, Device, Tensor, TensorData},
};
use burn_memaop::transformer::{
    MemAopCrossAttention, MemAopCrossAttentionConfig, MemAopMultiHeadAttention,
    MemAopMultiHeadAttentionConfig, MhaInput,
};

use crate::{
    support::{Random, linear},
    transformer::{
        TOLERANCE, all_rows, assert_equal, backward, padding, relative_error, tokens, values,
    },
};

pub fn attention_equals_burns(device: &Device) {
    let mut random = Random(81);
    let (batch, queries, keys, width) = (3, 5, 7, 8);
    for (quiet, masked) in [(false, false), (false, true), (true, true)] {
        let config = MultiHeadAttentionConfig::new(width, 2)
            .with_dropout(0.0)
            .with_quiet_softmax(quiet)
            .with_value_bias(!quiet);
        let burns = config.init(device);
        let ours = MemAopMultiHeadAttention::from_mha(burns.clone(), all_rows());
        let lengths = [queries, keys, keys];
        let [query, key, value] =
            lengths.map(|length| tokens(&mut random, [batch, length, width], device));
        let input = MhaInput::new(query.clone(), key.clone(), value.clone());
        let input = match masked {
            false => input,
            true => {
                let hidden: Vec<_> = (0..batch * queries * keys).map(|i| i % 5 == 1).collect();
                let hidden = TensorData::new(hidden, [batch, queries, keys]);
                input
                    .mask_pad(padding(batch, keys, device))
                    .mask_attn(Tensor::from_data(hidden, device))
            }
        };
        let inputs = [&query, &key, &value];
        let expected = burns.forward(attention::MhaInput::from(input.clone()));
        let found = ours.forward(input);
        for (found, expected) in [
            (values(found.weights.clone()), values(expected.weights)),
            (
                values(found.context.clone()),
                values(expected.context.clone()),
            ),
        ] {
            assert!(relative_error(&found, &expected) < TOLERANCE);
        }
        assert_equal(
            backward(&ours, &inputs, found.context),
            backward(&burns, &inputs, expected.context),
        );
    }
}

/// The output alone, for which the weights are computed again, in one block and in several.
pub fn context_equals_burns(device: &Device) {
    let mut random = Random(97);
    for (batch, queries, keys, quiet, masked) in [
        (3, 5, 7, false, true),
        (2, 1, 33, true, true),
        (2, 9, 4, false, false),
        // Blocks of one sequence, and blocks of one head.
        (3, 200, 210, false, true),
        (1, 530, 520, true, true),
        (1, 530, 520, false, false),
    ] {
        let burns = MultiHeadAttentionConfig::new(8, 4)
            .with_dropout(0.0)
            .with_quiet_softmax(quiet)
            .init(device);
        let ours = MemAopMultiHeadAttention::from_mha(burns.clone(), all_rows());
        let [query, key, value] =
            [queries, keys, keys].map(|length| tokens(&mut random, [batch, length, 8], device));
        let input = |[query, key, value]: [Tensor<3>; 3]| {
            let (device, input) = (query.device(), MhaInput::new(query, key, value));
            if !masked {
                return input;
            }
            // The first query of each sequence attends to no key at all.
            let hidden = (0..batch * queries * keys)
                .map(|i| i / keys % queries == 0 || i % 5 == 1)
                .collect();
            let hidden = TensorData::new::<bool, _>(hidden, [batch, queries, keys]);
            input
                .mask_pad(padding(batch, keys, &device))
                .mask_attn(Tensor::from_data(hidden, &device))
        };
        let tensors = [query.clone(), key.clone(), value.clone()];
        let inferred = input(tensors.clone().map(Tensor::inner));
        let inferred = values(ours.valid().forward_context(inferred));
        let copied = |tensor: Tensor<3>| Tensor::from_data(tensor.into_data(), device);
        let frozen = input(tensors.clone().map(copied));
        let frozen = ours.clone().no_grad().forward_context(frozen);
        assert!(!frozen.is_tracked());
        let input = input(tensors);
        let inputs = [&query, &key, &value];
        let expected = burns.forward(input.clone().into()).context;
        let found = ours.forward_context(input);
        for found in [values(found.clone()), inferred, values(frozen)] {
            let error = relative_error(&found, &values(expected.clone()));
            assert!(error < TOLERANCE, "{queries} x {keys}: {error:e}");
        }
        assert_equal(
            backward(&ours, &inputs, found),
            backward(&burns, &inputs, expected),
        );
    }
}

/// Half precision, against the same values in single precision. Scores and sums are computed in
/// single precision, so the errors are those of the products.
pub fn attention_in_half_precision_is_close(device: &Device) {
    for (dtype, tolerance) in [(DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        if !device.supports_dtype(dtype) {
            continue;
        }
        let mut random = Random(98);
        let config = MultiHeadAttentionConfig::new(16, 2).with_dropout(0.0);
        let mut single = config.init(device);
        for layer in [
            &mut single.query,
            &mut single.key,
            &mut single.value,
            &mut single.output,
        ] {
            *layer = linear(&mut random, 16, 16, device);
        }
        let input = tokens(&mut random, [3, 40, 16], device).inner();
        let mask = padding(3, 40, device);
        let gradients = |dtype: DType| {
            let mha = single.clone().map(&mut Cast(dtype));
            let ours = MemAopMultiHeadAttention::from_mha(mha, all_rows());
            let input = Tensor::from_inner(input.clone().cast(dtype)).require_grad();
            let context = MhaInput::self_attn(input.clone()).mask_pad(mask.clone());
            let context = ours.forward_context(context);
            assert_eq!(context.dtype(), dtype);
            let grads = context.clone().sin().sum().backward();
            let of_key = ours.key.weight.val().grad(&grads).unwrap();
            // Without a mask, because only then Burn's own attention may run.
            let inferred = MhaInput::self_attn(input.clone().inner());
            let inferred = ours.valid().forward_context(inferred);
            assert_eq!(inferred.dtype(), dtype);
            [
                values(inferred),
                values(context),
                values(input.grad(&grads).unwrap()),
                values(of_key),
            ]
        };
        let (found, expected) = (gradients(dtype), gradients(DType::F32));
        for (found, expected) in found.iter().zip(&expected) {
            let error = relative_error(found, expected);
            assert!(error < tolerance, "{dtype:?}: {error:e}");
        }
    }
}

struct Cast(DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| Tensor::from_inner(tensor.inner().cast(self.0)).require_grad())
    }
}

/// NaN and infinity go through, as in Burn.
#[test]
fn values_that_are_not_finite_come_out() {
    let device = Device::flex().autodiff();
    let burns = MultiHeadAttentionConfig::new(8, 2).with_dropout(0.0);
    let ours = MemAopMultiHeadAttention::from_mha(burns.init(&device), all_rows());
    for broken in [f32::NAN, f32::INFINITY] {
        let mut values = vec![0.5; 3 * 40 * 8];
        values[8 * 41 + 3] = broken;
        let values = TensorData::new(values, [3, 40, 8]);
        let input = Tensor::<3>::from_data(values, &device).require_grad();
        let output = ours.forward_context(MhaInput::self_attn(input.clone()));
        let of_sequence = |tensor: &Tensor<3>, index: usize| {
            let part = tensor.clone().narrow(0, index, 1);
            part.into_data().iter::<f32>().all(f32::is_finite)
        };
        let finite = [0, 1, 2].map(|index| of_sequence(&output, index));
        assert_eq!(finite, [true, false, true], "{broken}");
        let grads = output.sum().backward();
        let gradient = input.grad(&grads).unwrap();
        let finite = [0, 1, 2].map(|index| of_sequence(&gradient, index));
        assert_eq!(finite, [true, false, true], "{broken}");
    }
}

/// One mask for all sequences of a batch, as Burn's takes it.
#[test]
fn a_mask_is_broadcast() {
    let device = Device::flex();
    let burns = MultiHeadAttentionConfig::new(8, 2).init(&device);
    let ours = MemAopMultiHeadAttention::from_mha(burns.clone(), all_rows());
    let input = MhaInput::self_attn(tokens(&mut Random(95), [3, 5, 8], &device));
    let input = input.mask_attn(generate_autoregressive_mask(1, 5, &device));
    let expected = burns.forward(input.clone().into()).context;
    let found = ours.forward(input).context;
    assert!(relative_error(&values(found), &values(expected)) < TOLERANCE);
}

/// A cross-attention whose layers have adapters infers as before.
#[test]
fn adapters_of_a_cross_attention_come_along() {
    let device = Device::flex();
    let attention = MemAopCrossAttentionConfig::new(6, 6, 2, 2, 3).init(&device);
    let attention = attention.apply_lora(Lora::new(2, 1.0));
    let burns = attention.clone().into_cross_attention();
    assert_eq!(burns.num_params(), attention.num_params());
    let [query, context] = [4, 5].map(|length| tokens(&mut Random(96), [2, length, 6], &device));
    let expected = attention.forward(query.clone(), context.clone(), None);
    let mut cache = CrossAttentionCache::new();
    let found = attention.forward_cache(query, context, None, &mut cache);
    assert!(relative_error(&values(found), &values(expected)) < TOLERANCE);
}

pub fn cross_attention_equals_burns(device: &Device) {
    let mut random = Random(92);
    let (batch, queries, keys) = (3, 5, 7);
    for (heads_kv, quiet, masked) in [(4, false, false), (2, true, true), (1, false, true)] {
        let burns = CrossAttentionConfig::new(6, 10, 4, heads_kv, 3)
            .with_dropout(0.0)
            .with_quiet_softmax(quiet);
        let config = MemAopCrossAttentionConfig::new(6, 10, 4, heads_kv, 3)
            .with_dropout(0.0)
            .with_quiet_softmax(quiet);
        let burns = burns.init(device);
        let ours = MemAopCrossAttention::from_cross_attention(burns.clone(), &config, all_rows());
        let query = tokens(&mut random, [batch, queries, 6], device);
        let context = tokens(&mut random, [batch, keys, 10], device);
        let mask = masked.then(|| padding(batch, keys, device));
        let expected = burns.forward(query.clone(), context.clone(), mask.clone());
        let found = ours.forward(query.clone(), context.clone(), mask.clone());
        assert!(relative_error(&values(found.clone()), &values(expected.clone())) < TOLERANCE);
        let inputs = [&query, &context];
        assert_equal(
            backward(&ours, &inputs, found),
            backward(&burns, &inputs, expected.clone()),
        );
        let mut cache = CrossAttentionCache::new();
        let cached = ours.forward_cache(query.clone(), context.clone(), mask.clone(), &mut cache);
        assert!(relative_error(&values(cached), &values(expected.clone())) < TOLERANCE);
        let back = ours.into_cross_attention();
        let again = back.forward(query, context, mask);
        assert_eq!(values(again), values(expected));
    }
}

#[test]
#[should_panic(
    expected = "cross-attention: the parameters must have the shapes of the configuration, and no adapters"
)]
fn cross_attention_of_another_configuration_is_refused() {
    let device = Device::flex();
    let burns = CrossAttentionConfig::new(6, 10, 4, 2, 3).init(&device);
    let config = MemAopCrossAttentionConfig::new(6, 10, 4, 1, 3);
    MemAopCrossAttention::from_cross_attention(burns, &config, all_rows());
}

#[test]
#[should_panic(
    expected = "assert_shape!(input.key, [batch_size, _, self.d_model]): axis 0 expected 2"
)]
fn a_key_that_does_not_fit_is_named() {
    let device = Device::flex();
    let attention = MemAopMultiHeadAttentionConfig::new(8, 2);
    let zeros = |batch| Tensor::<3>::zeros([batch, 3, 8], &device);
    let input = MhaInput::new(zeros(2), zeros(1), zeros(2));
    attention.init(&device).forward(input);
}
