//! The counterparts of Burn's transformer modules against Burn's own.

use std::collections::HashMap;

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    nn::{
        Initializer, SwiGluConfig,
        activation::ActivationConfig,
        attention::{
            CrossAttentionConfig, MhaCache, MultiHeadAttentionConfig, generate_autoregressive_mask,
        },
        transformer::{
            self, PositionWiseFeedForwardConfig, TransformerDecoderConfig, TransformerEncoderConfig,
        },
    },
    store::ModuleRecord,
    tensor::{Bool, Device, Gradients, Tensor, TensorData},
};
use burn_memaop::{
    AopConfig, AopObserver, MemAopLinear, Memory, Method, OuterProducts,
    activation::{self, SwiGlu},
    transformer::{
        MemAopCrossAttentionConfig, MemAopMultiHeadAttention, MemAopMultiHeadAttentionConfig,
        MemAopPositionWiseFeedForward, MemAopPositionWiseFeedForwardConfig,
        MemAopTransformerDecoder, MemAopTransformerDecoderConfig, MemAopTransformerEncoder,
        MemAopTransformerEncoderConfig, MhaInput, TransformerDecoderInput, TransformerEncoderInput,
    },
};

use crate::support::Random;

pub const TOLERANCE: f64 = 1e-5;

pub fn all_rows() -> AopConfig {
    AopConfig::new()
        .with_outer_products(OuterProducts::All)
        .with_seed(40)
}

fn half_of_the_rows() -> AopConfig {
    AopConfig::new()
        .with_outer_products(OuterProducts::Ratio(0.5))
        .with_cost_rule(false)
}

pub fn tokens(random: &mut Random, shape: [usize; 3], device: &Device) -> Tensor<3> {
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| random.value() as f32)
        .collect();
    let tokens = Tensor::from_data(TensorData::new(values, shape), device);
    match device.is_autodiff() {
        true => tokens.require_grad(),
        false => tokens,
    }
}

/// The last token of the second sequence is padding.
pub fn padding(batch: usize, length: usize, device: &Device) -> Tensor<2, Bool> {
    let padded: Vec<bool> = (0..batch * length)
        .map(|token| token == 2 * length - 1)
        .collect();
    Tensor::from_data(TensorData::new(padded, [batch, length]), device)
}

pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

pub fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let difference = found.iter().zip(expected).map(|(a, b)| (a - b).powi(2));
    let norm = expected.iter().map(|b| b * b).sum::<f64>();
    (difference.sum::<f64>() / norm.max(f64::MIN_POSITIVE)).sqrt()
}

/// The gradients of all parameters, by their ids.
struct Collected<'a> {
    grads: &'a Gradients,
    values: HashMap<ParamId, Vec<f64>>,
}

impl ModuleVisitor for Collected<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(self.grads) {
            self.values.insert(param.id, values(gradient));
        }
    }
}

/// The gradients of the inputs and of all parameters, of a loss that weighs every output alike.
pub fn backward<M: Module, const D: usize>(
    module: &M,
    inputs: &[&Tensor<3>],
    output: Tensor<D>,
) -> (Vec<Vec<f64>>, HashMap<ParamId, Vec<f64>>) {
    // Neither linear nor even: a plain sum has no gradient behind a layer norm.
    let grads = (output.clone().square() * output.sin()).sum().backward();
    let mut collected = Collected {
        grads: &grads,
        values: HashMap::new(),
    };
    module.visit(&mut collected);
    let inputs = inputs
        .iter()
        .map(|input| values(input.grad(&grads).unwrap()));
    (inputs.collect(), collected.values)
}

pub fn assert_equal(
    (found_inputs, found): (Vec<Vec<f64>>, HashMap<ParamId, Vec<f64>>),
    (inputs, parameters): (Vec<Vec<f64>>, HashMap<ParamId, Vec<f64>>),
) {
    for (found, expected) in found_inputs.iter().zip(&inputs) {
        let error = relative_error(found, expected);
        let size = expected.iter().map(|value| value.abs()).fold(0.0, f64::max);
        assert!(error < TOLERANCE, "{error:e}, {size:e}, {}", found.len());
    }
    assert_eq!(found.len(), parameters.len());
    let size = |values: &[f64]| values.iter().map(|value| value.abs()).fold(0.0, f64::max);
    let largest = parameters.values().map(|it| size(it)).fold(0.0, f64::max);
    for (id, expected) in &parameters {
        let error = relative_error(&found[id], expected);
        // The bias of the keys moves nearly all scores of a query alike, so its terms cancel, and
        // what is left of them is rounding.
        let cancels = size(expected) < 1e-2 * largest && error < 10.0 * TOLERANCE;
        assert!(
            error < TOLERANCE || size(expected) < 1e-4 || cancels,
            "{error:e}"
        );
    }
}

pub fn feed_forward_equals_burns(device: &Device) {
    let mut random = Random(82);
    for activation in [ActivationConfig::Gelu, ActivationConfig::Relu] {
        let config = PositionWiseFeedForwardConfig::new(6, 10)
            .with_dropout(0.0)
            .with_activation(activation);
        let burns = config.init(device);
        let ours = MemAopPositionWiseFeedForward::from_pwff(burns.clone(), all_rows());
        let input = tokens(&mut random, [2, 5, 6], device);
        let (found, expected) = (ours.forward(input.clone()), burns.forward(input.clone()));
        assert!(relative_error(&values(found.clone()), &values(expected.clone())) < TOLERANCE);
        assert_equal(
            backward(&ours, &[&input], found),
            backward(&burns, &[&input], expected),
        );
        let single: Tensor<1> = input.slice([0..1, 0..1, 0..6]).reshape([6]);
        assert_eq!(ours.forward(single).dims(), [6]);
    }
}

pub fn encoder_equals_burns(device: &Device) {
    let mut random = Random(83);
    let (batch, length, width) = (3, 6, 8);
    for norm_first in [false, true] {
        let config = TransformerEncoderConfig::new(width, 12, 2, 2)
            .with_dropout(0.0)
            .with_norm_first(norm_first);
        let burns = config.init(device);
        let ours = MemAopTransformerEncoder::from_encoder(burns.clone(), all_rows());
        let tokens = tokens(&mut random, [batch, length, width], device);
        let input = TransformerEncoderInput::new(tokens.clone())
            .mask_pad(padding(batch, length, device))
            .mask_attn(generate_autoregressive_mask(batch, length, device));
        let expected = burns.forward(transformer::TransformerEncoderInput::from(input.clone()));
        let found = ours.forward(input);
        assert!(relative_error(&values(found.clone()), &values(expected.clone())) < TOLERANCE);
        assert_equal(
            backward(&ours, &[&tokens], found),
            backward(&burns, &[&tokens], expected),
        );
    }
}

pub fn decoder_equals_burns(device: &Device) {
    let mut random = Random(91);
    let (batch, length, encoded, width) = (3, 5, 7, 8);
    for norm_first in [false, true] {
        let config = TransformerDecoderConfig::new(width, 12, 2, 2)
            .with_dropout(0.0)
            .with_norm_first(norm_first);
        let burns = config.init(device);
        let ours = MemAopTransformerDecoder::from_decoder(burns.clone(), all_rows());
        let target = tokens(&mut random, [batch, length, width], device);
        let memory = tokens(&mut random, [batch, encoded, width], device);
        let hidden: Vec<_> = (0..batch * length * encoded).map(|i| i % 4 == 1).collect();
        let hidden = TensorData::new(hidden, [batch, length, encoded]);
        let input = TransformerDecoderInput::new(target.clone(), memory.clone())
            .target_mask_pad(padding(batch, length, device))
            .target_mask_attn(generate_autoregressive_mask(batch, length, device))
            .memory_mask_pad(padding(batch, encoded, device))
            .memory_mask_attn(Tensor::from_data(hidden, device));
        let expected = burns.forward(transformer::TransformerDecoderInput::from(input.clone()));
        let found = ours.forward(input);
        assert!(relative_error(&values(found.clone()), &values(expected.clone())) < TOLERANCE);
        let inputs = [&target, &memory];
        assert_equal(
            backward(&ours, &inputs, found),
            backward(&burns, &inputs, expected),
        );
    }
}

pub fn swiglu_equals_burns(device: &Device) {
    let mut random = Random(93);
    for bias in [false, true] {
        let burns = SwiGluConfig::new(6, 10).with_bias(bias).init(device);
        let ours = SwiGlu::from_swiglu(burns.clone(), all_rows());
        let input = tokens(&mut random, [2, 5, 6], device);
        let (found, expected) = (ours.forward(input.clone()), burns.forward(input.clone()));
        assert!(relative_error(&values(found.clone()), &values(expected.clone())) < TOLERANCE);
        assert_equal(
            backward(&ours, &[&input], found),
            backward(&burns, &[&input], expected),
        );
    }
}

/// All else being Burn's, the gradients of the weights must be unbiased wherever the tokens of a
/// transformer meet.
#[test]
fn sampled_gradients_are_those_of_burns_encoder_on_average() {
    let device = Device::flex().autodiff();
    let burns = TransformerEncoderConfig::new(8, 12, 2, 2)
        .with_dropout(0.0)
        .with_norm_first(true)
        .init(&device);
    let ours = MemAopTransformerEncoder::from_encoder(burns.clone(), half_of_the_rows());
    let tokens = tokens(&mut Random(84), [3, 6, 8], &device);
    let output = burns.forward(transformer::TransformerEncoderInput::new(tokens.clone()));
    let (_, exact) = backward(&burns, &[&tokens], output);

    const DRAWS: usize = 200;
    let mut sums: HashMap<ParamId, (Vec<f64>, f64)> = HashMap::new();
    for _ in 0..DRAWS {
        let output = ours.forward(TransformerEncoderInput::new(tokens.clone()));
        for (id, gradient) in backward(&ours, &[&tokens], output).1 {
            let (sum, square) = sums.entry(id).or_insert((vec![0.0; gradient.len()], 0.0));
            let difference = gradient.iter().zip(&exact[&id]);
            *square += difference.map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            for (sum, value) in sum.iter_mut().zip(gradient) {
                *sum += value;
            }
        }
    }
    let norm = |values: &[f64]| values.iter().map(|b| b * b).sum::<f64>().sqrt();
    let largest = exact
        .values()
        .map(|values| norm(values))
        .fold(0.0, f64::max);
    let mut approximate = 0;
    for (id, (sum, square)) in sums {
        let draws = DRAWS as f64;
        let distance = sum.iter().zip(&exact[&id]);
        let distance = distance.map(|(sum, b)| (sum / draws - b).powi(2));
        let distance = distance.sum::<f64>().sqrt();
        // Its standard deviation, were the mean the exact gradient.
        let deviation = (square / draws / draws).sqrt();
        let size = norm(&exact[&id]);
        // The gradient of the bias of the keys is nothing but rounding.
        if size < 1e-5 * largest {
            continue;
        }
        assert!(
            distance < 3.0 * deviation + 1e-5 * size,
            "{distance} {deviation} {size}"
        );
        // All but the weights are exact, and so equal to rounding.
        approximate += usize::from(deviation * draws.sqrt() > 0.01 * size);
    }
    assert_eq!(approximate, 12, "the weights of two blocks");
}

#[test]
fn conversions_keep_parameters_and_count_the_seeds() {
    let device = Device::flex().autodiff();
    let config = TransformerEncoderConfig::new(8, 12, 2, 2);
    let aop = half_of_the_rows().with_seed(40);
    let burns = config.init(&device);
    let ids = burns.layers[1].mha.value.weight.id;
    let ours = MemAopTransformerEncoder::from_encoder(burns.clone(), aop);
    assert_eq!(ours.num_params(), burns.num_params());
    assert_eq!(ours.layers[1].mha.value.weight.id, ids);
    let seeds = |layers: [&MemAopLinear; 6]| layers.map(|layer| layer.aop().seed);
    let of_block = |block: usize| {
        let layer = &ours.layers[block];
        let (mha, pwff) = (&layer.mha, &layer.pwff);
        seeds([
            &mha.query,
            &mha.key,
            &mha.value,
            &mha.output,
            &pwff.linear_inner,
            &pwff.linear_outer,
        ])
    };
    assert_eq!(of_block(0), [40, 41, 42, 43, 44, 45]);
    assert_eq!(of_block(1), [46, 47, 48, 49, 50, 51]);
    let decoder = TransformerDecoderConfig::new(8, 12, 2, 2).init(&device);
    let decoder = MemAopTransformerDecoder::from_decoder(decoder, aop);
    let block = &decoder.layers[1];
    let first = seeds([
        &block.cross_attn.query,
        &block.cross_attn.output,
        &block.self_attn.query,
        &block.self_attn.output,
        &block.pwff.linear_inner,
        &block.pwff.linear_outer,
    ]);
    assert_eq!(first, [50, 53, 54, 57, 58, 59]);
    let back = decoder.clone().into_decoder();
    assert_eq!(
        back.layers[1].cross_attn.key.weight.id,
        block.cross_attn.key.weight.id
    );
    let display = format!("{}", ours.layers[0].mha);
    assert!(display.contains("n_heads: 2"), "{display}");
    assert!(display.contains("Ratio(0.5)"), "{display}");

    let back = ours.clone().into_encoder();
    let weight = |encoder: &transformer::TransformerEncoder| {
        values(encoder.layers[1].pwff.linear_outer.weight.val())
    };
    assert_eq!(weight(&back), weight(&burns));
    assert_eq!(back.layers[1].mha.value.weight.id, ids);

    let mha = MultiHeadAttentionConfig::new(8, 2).init(&device);
    let mha = MemAopMultiHeadAttention::from_mha(mha, aop);
    assert_eq!((mha.d_k, mha.output.aop().seed), (4, 43));
    assert_eq!(mha.into_mha().n_heads, 2);
    let pwff = PositionWiseFeedForwardConfig::new(8, 12).init(&device);
    let pwff = MemAopPositionWiseFeedForward::from_pwff(pwff, aop);
    assert_eq!(pwff.linear_outer.aop().seed, 41);
    assert_eq!(pwff.into_pwff().linear_inner.weight.dims(), [8, 12]);
}

/// Configurations are written as Burn's are, so that a file of one is a file of the other.
#[test]
fn configurations_are_burns() {
    let initializer = Initializer::Normal {
        mean: 0.5,
        std: 0.25,
    };
    let activation = ActivationConfig::Relu;
    let pairs = [
        (
            MemAopMultiHeadAttentionConfig::new(8, 2).to_string(),
            MultiHeadAttentionConfig::new(8, 2).to_string(),
        ),
        (
            MemAopPositionWiseFeedForwardConfig::new(8, 12).to_string(),
            PositionWiseFeedForwardConfig::new(8, 12).to_string(),
        ),
        (
            MemAopTransformerEncoderConfig::new(8, 12, 2, 3).to_string(),
            TransformerEncoderConfig::new(8, 12, 2, 3).to_string(),
        ),
        (
            MemAopTransformerDecoderConfig::new(8, 12, 2, 3).to_string(),
            TransformerDecoderConfig::new(8, 12, 2, 3).to_string(),
        ),
        (
            MemAopCrossAttentionConfig::new(8, 6, 4, 2, 3).to_string(),
            CrossAttentionConfig::new(8, 6, 4, 2, 3).to_string(),
        ),
        (
            activation::SwiGluConfig::new(8, 12).to_string(),
            SwiGluConfig::new(8, 12).to_string(),
        ),
    ];
    for (ours, burns) in pairs {
        assert_eq!(ours, burns);
    }

    let device = Device::flex();
    let ours = MemAopTransformerEncoderConfig::new(8, 12, 2, 1)
        .with_initializer(initializer)
        .with_activation(activation)
        .with_norm_first(true)
        .with_quiet_softmax(true)
        .with_layer_norm_eps(0.125)
        .with_dropout(0.25)
        .init(&device);
    assert!(ours.norm_first && ours.quiet_softmax);
    assert_eq!(
        (ours.dropout, ours.n_layers, ours.n_heads, ours.d_ff),
        (0.25, 1, 2, 12)
    );
    let block = &ours.layers[0];
    assert!(format!("{:?}", block.pwff.activation).contains("Relu"));
    assert!(format!("{block}").contains("0.125"));
    let values = values(block.mha.query.weight.val());
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    assert!(mean > 0.3 && mean < 0.7, "{mean}");
    let mha = MemAopMultiHeadAttentionConfig::new(8, 2)
        .with_key_bias(false)
        .with_min_float(-7.0)
        .init(&device);
    assert!(mha.key.bias.is_none() && mha.query.bias.is_some() && mha.min_float == -7.0);
    let pwff = MemAopPositionWiseFeedForwardConfig::new(8, 12).with_dropout(0.75);
    assert_eq!(pwff.init(&device).dropout.prob, 0.75);
}

/// A model with Burn's encoder can be saved and go on with ours, and the other way round.
#[test]
fn records_load_into_each_other() {
    let device = Device::flex().autodiff();
    let config = TransformerEncoderConfig::new(8, 12, 2, 1).with_dropout(0.0);
    let aop = half_of_the_rows().with_method(Method::TopK(Memory::Balanced { decay: 0.9 }));
    let tokens = tokens(&mut Random(85), [2, 4, 8], &device);
    let bytes = |record: ModuleRecord| -> ModuleRecord {
        ModuleRecord::from_bytes(record.into_bytes().unwrap()).unwrap()
    };
    let burns = config.init(&device);
    let input = || TransformerEncoderInput::new(tokens.clone());
    let expected = values(burns.forward(input().into()));

    // A layer without a memory saves what Burn's saves.
    let exact = MemAopTransformerEncoder::from_encoder(config.init(&device), all_rows());
    let exact = exact.load_record(bytes(burns.clone().into_record()));
    assert!(relative_error(&values(exact.forward(input())), &expected) < TOLERANCE);
    let back = config.init(&device).load_record(bytes(exact.into_record()));
    assert!(relative_error(&values(back.forward(input().into())), &expected) < TOLERANCE);

    let record = bytes(burns.into_record()).allow_partial(true);
    let ours = MemAopTransformerEncoder::from_encoder(config.init(&device), aop);
    let ours = ours.load_record(record);
    assert!(relative_error(&values(ours.forward(input())), &expected) < TOLERANCE);

    backward(&ours, &[], ours.forward(input()));
    assert!(ours.layers[0].mha.key.memory_stats().pending > 0);
    let record = bytes(ours.into_record()).allow_unused(true);
    let back = config.init(&device).load_record(record);
    assert!(relative_error(&values(back.forward(input().into())), &expected) < TOLERANCE);
}

#[test]
fn inference_token_by_token_equals_the_whole_sequence() {
    let device = Device::flex();
    let (length, width) = (5, 8);
    let tokens = tokens(&mut Random(86), [2, length, width], &device);
    let encoder = MemAopTransformerEncoderConfig::new(width, 12, 2, 2)
        .with_norm_first(true)
        .init(&device);
    let causal = |length| generate_autoregressive_mask(2, length, &device);
    let whole = TransformerEncoderInput::new(tokens.clone()).mask_attn(causal(length));
    let whole = encoder.forward(whole);
    let mut cache = encoder.new_autoregressive_cache();
    for until in 1..=length {
        let part = tokens.clone().slice([0..2, 0..until, 0..width]);
        // The cache gives the last token alone to each layer, and it may see all before it.
        let part = TransformerEncoderInput::new(part);
        let last = encoder.forward_autoregressive_inference(part, &mut cache);
        let [_, cached, _] = last.dims();
        let last = last.slice([0..2, cached - 1..cached, 0..width]);
        let expected = whole.clone().slice([0..2, until - 1..until, 0..width]);
        assert!(
            relative_error(&values(last), &values(expected)) < TOLERANCE,
            "{until}"
        );
    }

    let memory = self::tokens(&mut Random(94), [2, 3, width], &device);
    let decoder = MemAopTransformerDecoderConfig::new(width, 12, 2, 2).init(&device);
    let whole = TransformerDecoderInput::new(tokens.clone(), memory.clone())
        .target_mask_attn(causal(length));
    let whole = decoder.forward(whole);
    let mut cache = decoder.new_autoregressive_cache();
    for until in 1..=length {
        let part = tokens.clone().slice([0..2, 0..until, 0..width]);
        let part = TransformerDecoderInput::new(part, memory.clone());
        let last = decoder.forward_autoregressive_inference(part, &mut cache);
        let [_, cached, _] = last.dims();
        let last = last.slice([0..2, cached - 1..cached, 0..width]);
        let expected = whole.clone().slice([0..2, until - 1..until, 0..width]);
        assert!(
            relative_error(&values(last), &values(expected)) < TOLERANCE,
            "{until}"
        );
    }

    let attention = MemAopMultiHeadAttentionConfig::new(width, 2);
    let attention = attention.init(&device);
    let mut cache = MhaCache::autoregressive();
    let cached = attention.forward_cache(MhaInput::self_attn(tokens.clone()), &mut cache);
    let whole = attention.forward(MhaInput::self_attn(tokens));
    assert!(relative_error(&values(cached.context), &values(whole.context)) < TOLERANCE);
}

#[test]
fn all_layers_are_observed_and_none_waits_in_inference() {
    let device = Device::flex().autodiff();
    let encoder = TransformerEncoderConfig::new(8, 12, 2, 2).init(&device);
    let encoder = MemAopTransformerEncoder::from_encoder(encoder, half_of_the_rows());
    let observer = AopObserver::new();
    observer.observe(&encoder);
    let tokens = tokens(&mut Random(87), [2, 4, 8], &device);
    let output = encoder.forward(TransformerEncoderInput::new(tokens));
    backward(&encoder, &[], output);
    let report = observer.observe(&encoder);
    let mut names: Vec<_> = report
        .layers
        .iter()
        .map(|layer| layer.name.as_str())
        .collect();
    names.sort_unstable();
    assert_eq!(names.len(), 12);
    assert!(names.contains(&"layers.0.mha.query"), "{names:?}");
    assert!(names.contains(&"layers.1.pwff.linear_outer"), "{names:?}");
    for layer in &report.layers {
        assert_eq!((layer.outer_products, layer.rows), (4, 8), "{}", layer.name);
    }
}

#[test]
#[should_panic(expected = "AopConfig.outer_products: the ratio must be in (0, 1], but got 1.5")]
fn a_bad_configuration_is_named() {
    let aop = AopConfig::new().with_outer_products(OuterProducts::Ratio(1.5));
    let encoder = TransformerEncoderConfig::new(8, 12, 2, 1).init(&Device::flex());
    MemAopTransformerEncoder::from_encoder(encoder, aop);
}
