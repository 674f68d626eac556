//! Dropout, which keeps two numbers, and attention with it.

use burn::{
    module::{Module, Param},
    nn::{self, Linear, attention::MultiHeadAttentionConfig},
    store::ModuleRecord,
    tensor::{DType, Device, Distribution, Tensor, activation::softmax},
};
use burn_memaop::{
    nn::{Dropout, DropoutConfig},
    op::parts,
    transformer::TransformerEncoderInput,
    transformer::{MemAopMultiHeadAttention, MemAopTransformerEncoderConfig, MhaInput},
    with_aop,
};

use crate::{
    oracle::word_of_value,
    support::{Matrix, Random, bits, linear},
    transformer::{
        TOLERANCE, all_rows, assert_equal, backward, padding, relative_error, tokens, values,
    },
};

pub fn dropouts_equal_the_oracle(device: &Device) {
    let mut random = Random(71);
    for (rows, width, prob, seed, step) in [
        (1, 1, 0.5, 1, 0),
        (5, 70, 0.1, 2, 3),
        (3, 1000, 0.3, 1 << 40, 1 << 45),
        (2000, 300, 0.75, 7, 1),
        (4, 64, 0.0, 7, 1),
    ] {
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let x = random.matrix(rows, width).rounded(dtype);
            let mut expected = Matrix::zeros(rows, width);
            for row in 0..rows {
                for column in 0..width {
                    let word = word_of_value([row, column], step, seed) >> 8;
                    let is_kept = word as f64 >= (prob * 2f64.powi(24)).round();
                    if is_kept {
                        expected.0[row][column] = x.0[row][column] / (1.0 - prob);
                    }
                }
            }
            let found = parts::drop_out(x.tensor(device, dtype), prob, seed, step);
            assert_eq!(found.dtype(), dtype);
            let found = Matrix::from_tensor(found);
            let both = found.0.iter().flatten().zip(expected.0.iter().flatten());
            let tolerance = match dtype {
                DType::F16 => 1e-3,
                DType::BF16 => 1e-2,
                _ => 1e-6,
            };
            for (found, expected) in both {
                let error = (found - expected).abs();
                assert!(error <= tolerance * expected.abs(), "{found} {expected}");
                assert_eq!(*found == 0.0, *expected == 0.0);
            }
        }
    }
    // Rows that do not lie one after the other.
    let x = random.matrix(30, 40).tensor(device, DType::F32);
    let turned = parts::drop_out(x.clone().transpose(), 0.4, 1, 2);
    let copied = Tensor::cat(vec![x.transpose()], 0) * 1.0;
    assert_eq!(bits(turned), bits(parts::drop_out(copied, 0.4, 1, 2)));
}

pub fn a_backward_pass_drops_what_the_forward_pass_dropped(device: &Device) {
    let prob = 0.3;
    let dropout = DropoutConfig::new(prob).init();
    let inner = device.clone().inner();
    for shape in [[40, 5, 33], [1, 1, 1], [3, 200, 300]] {
        let upstream = Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), &inner);
        let pass = || {
            let input = Tensor::<3>::ones(shape, device).require_grad();
            let output = dropout.forward(input.clone());
            let loss = output.clone() * Tensor::from_data(upstream.to_data(), device);
            let gradient = input.grad(&loss.sum().backward()).unwrap();
            (output.inner(), gradient)
        };
        let (output, gradient) = pass();
        let product = upstream.clone() * output.clone();
        // A zero has the sign of what it was.
        gradient.into_data().assert_eq(&product.into_data(), true);
        let output = values(output);
        let is_right = |&value: &f64| value == 0.0 || (value * (1.0 - prob) - 1.0).abs() < 1e-6;
        assert!(output.iter().all(is_right), "{output:?}");
        assert!(output.len() == 1 || output.contains(&0.0));
    }
}

/// Within five standard errors: the share that is dropped, in a pass and in the next, of values in
/// both passes, of neighbours in a row, and of values below each other.
#[test]
fn values_are_dropped_independently() {
    let (rows, width, prob) = (400, 300, 0.3);
    let device = Device::flex();
    let dropped = |step| -> Vec<bool> {
        let ones = Tensor::<2>::ones([rows, width], &device);
        let output = values(parts::drop_out(ones, prob, 5, step));
        output.into_iter().map(|value| value == 0.0).collect()
    };
    let (first, second) = (dropped(0), dropped(1));
    let check = |pairs: Vec<bool>, prob: f64| {
        let count = pairs.iter().filter(|&&dropped| dropped).count() as f64;
        let n = pairs.len() as f64;
        let error = (n * prob * (1.0 - prob)).sqrt();
        let distance = (count - n * prob).abs() / error;
        assert!(distance < 5.0, "{count} of {n}: {distance}");
    };
    let both = prob * prob;
    check(first.clone(), prob);
    check(second.clone(), prob);
    check(
        first.iter().zip(&second).map(|(a, b)| a & b).collect(),
        both,
    );
    // No value is in two pairs.
    let neighbours = first.chunks(2).map(|pair| pair[0] & pair[1]);
    check(neighbours.collect(), both);
    let pairs = first.chunks(2 * width).flat_map(|rows| {
        let (above, below) = rows.split_at(width);
        above
            .iter()
            .zip(below)
            .map(|(a, b)| a & b)
            .collect::<Vec<_>>()
    });
    check(pairs.collect(), both);
}

/// Values and outputs that are the weights themselves show which of them were dropped. With these,
/// Burn's operations give the expected gradients. Some sequences, or some heads, are one block.
pub fn attention_with_dropout_equals_its_definition(device: &Device) {
    let mut random = Random(72);
    let is_fast = device.clone().inner() == Device::flex();
    for (batch, length, heads) in [(3, 9, 1), (2, 8, 2), (5, 300, 1), (1, 520, 2)] {
        if length > 100 && !is_fast {
            continue;
        }
        let width = length * heads;
        let config = MultiHeadAttentionConfig::new(width, heads).with_dropout(0.2);
        let mut burns = config.init(device);
        for layer in [&mut burns.query, &mut burns.key] {
            *layer = linear(&mut random, width, width, device);
        }
        let identity = || Linear {
            weight: Param::from_tensor(Tensor::eye(width, device)),
            bias: None,
        };
        (burns.value, burns.output) = (identity(), identity());
        let ours = MemAopMultiHeadAttention::from_mha(burns.clone(), all_rows());
        let query = tokens(&mut random, [batch, length, width], device);
        // For each head a unit matrix.
        let value = Tensor::<2>::eye(length, device).unsqueeze::<3>();
        let value = value.repeat(&[batch, 1, heads]).require_grad();
        let mask = padding(batch.max(2), length, device).narrow(0, 0, batch);
        let input = MhaInput::new(query.clone(), query.clone(), value.clone());
        let found = ours.forward_context(input.mask_pad(mask.clone()));

        let split = |tensor: Tensor<3>| {
            tensor
                .reshape([batch, length, heads, length])
                .swap_dims(1, 2)
        };
        let weights = split(found.clone());
        let factors = weights.clone().not_equal_elem(0.0).float() / 0.8;
        let inner = factors.clone().detach();
        let [q, k, v] = [
            split(burns.query.forward(query.clone())),
            split(burns.key.forward(query.clone())),
            split(burns.value.forward(value.clone())),
        ];
        let scores = q.matmul(k.transpose()) / (length as f64).sqrt();
        let mask = mask.reshape([batch, 1, 1, length]);
        let scores = scores.mask_fill(mask.clone().expand([batch, heads, length, length]), -1.0e4);
        let context = (softmax(scores, 3) * inner).matmul(v);
        let expected = context.swap_dims(1, 2).reshape([batch, length, width]);
        let expected = burns.output.forward(expected);

        let error = relative_error(&values(found.clone()), &values(expected.clone()));
        assert!(error < TOLERANCE, "{length}: {error:e}");
        let inputs = [&query, &value];
        assert_equal(
            backward(&ours, &inputs, found),
            backward(&burns, &inputs, expected),
        );
        // Every head of every sequence drops other weights, in one block and in several.
        let masks = values(factors.clone());
        let mut masks: Vec<_> = masks.chunks(length * length).collect();
        masks.sort_by(|a, b| a.partial_cmp(b).unwrap());
        masks.dedup();
        assert_eq!(masks.len(), batch * heads, "{length}");
        // A fifth of the weights is dropped, of all that were not masked.
        let dropped = values(factors.equal_elem(0.0).float());
        let (count, share) = (
            dropped.len() as f64,
            dropped.iter().sum::<f64>() / dropped.len() as f64,
        );
        let masked = if batch > 1 {
            1.0 / (batch * length) as f64
        } else {
            0.0
        };
        let expected = 0.2 + 0.8 * masked;
        let error = 5.0 * (0.16 / count).sqrt();
        assert!(
            (share - expected).abs() < error,
            "{length}: {share}, not {expected}"
        );
    }
}

/// The device and the flag say whether values are dropped, as in Burn.
#[test]
fn dropouts_are_on_when_burns_are() {
    let device = Device::flex().autodiff();
    let dropout = DropoutConfig::new(0.5).init();
    let ones = || Tensor::<2>::ones([20, 50], &device);
    let share = |output: Tensor<2>| {
        output
            .not_equal_elem(1.0)
            .float()
            .mean()
            .into_scalar::<f32>()
    };
    // No gradient is asked for, but the device says that it is training.
    assert_eq!(share(dropout.forward(ones())), 1.0);
    assert_eq!(share(dropout.forward(ones().inner())), 0.0);
    assert_eq!(share(dropout.clone().freeze().forward(ones())), 0.0);
    assert_eq!(share(DropoutConfig::new(0.0).init().forward(ones())), 0.0);
    let empty = dropout.forward(Tensor::<3>::zeros([0, 5, 3], &device));
    assert_eq!(empty.dims(), [0, 5, 3]);
    // NaN and infinity go through or become NaN, as in Burn.
    let broken = dropout.forward(ones() * f32::NAN);
    assert!(values(broken).iter().all(|value| value.is_nan()));
    assert_eq!(
        dropout.to_string(),
        nn::DropoutConfig::new(0.5).init().to_string()
    );
    // Records load both ways.
    let record = |record: ModuleRecord| ModuleRecord::from_bytes(record.into_bytes().unwrap());
    let burns = nn::DropoutConfig::new(0.5).init();
    let loaded = dropout
        .clone()
        .load_record(record(burns.into_record()).unwrap());
    let burns = nn::DropoutConfig::new(0.5).init();
    burns.load_record(record(loaded.into_record()).unwrap());
    let burns = dropout.clone().into_dropout();
    assert_eq!((burns.prob, burns.training.id), (0.5, dropout.training.id));
}

#[test]
#[should_panic(expected = "Dropout probability must be finite and in the range [0, 1), but got 1")]
fn a_dropout_of_everything_is_refused() {
    DropoutConfig::new(1.0).init();
}

/// Clones share the count of passes, so they do not drop the same values. Nor do two modules.
#[test]
fn no_two_passes_drop_the_same_values() {
    let device = Device::flex().autodiff();
    let dropouts: Vec<Dropout> = vec![
        DropoutConfig::new(0.5).init(),
        DropoutConfig::new(0.5).init(),
    ];
    let clone = dropouts[0].clone();
    let pass = |dropout: &Dropout| bits(dropout.forward(Tensor::<2>::ones([4, 64], &device)));
    let mut passes = vec![
        pass(&dropouts[0]),
        pass(&clone),
        pass(&dropouts[0]),
        pass(&dropouts[1]),
        pass(&clone.fork(&device)),
    ];
    let count = passes.len();
    passes.sort();
    passes.dedup();
    assert_eq!(passes.len(), count);
}

/// A training with dropout that is saved and loaded goes on as it would have.
#[test]
fn a_loaded_model_drops_what_the_saved_one_would_have() {
    let device = Device::flex().autodiff();
    let model = || {
        let encoder = MemAopTransformerEncoderConfig::new(8, 16, 2, 2).init(&device);
        with_aop(encoder, |_, _| all_rows().with_saved_state(true))
    };
    let input = tokens(&mut Random(73), [2, 5, 8], &device);
    let pass = |model: &burn_memaop::transformer::MemAopTransformerEncoder| {
        let output = model.forward(TransformerEncoderInput::new(input.clone()));
        let gradient = input.grad(&output.clone().square().sum().backward());
        (bits(output), bits(gradient.unwrap()))
    };
    let saved = model();
    let first = pass(&saved);
    let record = saved.clone().into_record().into_bytes().unwrap();
    let loaded = model().load_record(ModuleRecord::from_bytes(record).unwrap());
    let expected = pass(&saved);
    assert_ne!(first, expected);
    assert_eq!(pass(&loaded), expected);
    assert_eq!(pass(&loaded), pass(&saved));
}
