//! Two models that write a text letter by letter: a transformer encoder that continues a tongue
//! twister, and an encoder with a decoder that puts the tongue twister into Caesar's cipher.

use burn::{
    module::Module,
    nn::{
        Embedding, EmbeddingConfig, Linear, LinearConfig, PositionalEncoding,
        PositionalEncodingConfig, SwiGlu, SwiGluConfig,
        attention::{CrossAttention, CrossAttentionConfig, generate_autoregressive_mask},
        loss::CrossEntropyLossConfig,
        transformer::{
            TransformerDecoder, TransformerDecoderConfig, TransformerDecoderInput,
            TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput,
        },
    },
    optim::{AdamConfig, GradientsParams},
    tensor::{Device, Int, Tensor, TensorData},
};

use super::untrained;

const SEED: u64 = 23;
const TEXT: &[u8] = b"peter piper picked a peck of pickled peppers ";
/// The alphabet after the space.
const LETTERS: usize = 27;
/// What the decoder reads before its first letter.
const START: usize = LETTERS;
const EXCERPTS: usize = 16;
const LENGTH: usize = 10;
const WIDTH: usize = 24;
const STEPS: usize = 20;
const LEARNING_RATE: f64 = 0.01;

/// Foresees the next letter at each place of a text.
#[derive(Module, Debug)]
struct Writer {
    letters: Embedding,
    places: PositionalEncoding,
    encoder: TransformerEncoder,
    output: Linear,
}

impl Writer {
    fn new(device: &Device) -> Self {
        Self {
            letters: EmbeddingConfig::new(LETTERS, WIDTH).init(device),
            places: places(device),
            encoder: encoder(device),
            output: LinearConfig::new(WIDTH, LETTERS).init(device),
        }
    }

    /// The scores of the letters after each letter `[count, length, letters]`.
    fn forward(&self, text: Tensor<2, Int>) -> Tensor<3> {
        let [count, length] = text.dims();
        let mask = generate_autoregressive_mask(count, length, &text.device());
        let x = self.places.forward(self.letters.forward(text));
        let input = TransformerEncoderInput::new(x).mask_attn(mask);
        self.output.forward(self.encoder.forward(input))
    }
}

/// Foresees the next letter of a text in cipher, of which it reads the plain text.
#[derive(Module, Debug)]
struct Cipher {
    plain: Embedding,
    secret: Embedding,
    places: PositionalEncoding,
    encoder: TransformerEncoder,
    decoder: TransformerDecoder,
    review: CrossAttention,
    gate: SwiGlu,
    output: Linear,
}

impl Cipher {
    fn new(device: &Device) -> Self {
        Self {
            plain: EmbeddingConfig::new(LETTERS, WIDTH).init(device),
            secret: EmbeddingConfig::new(LETTERS + 1, WIDTH).init(device),
            places: places(device),
            encoder: encoder(device),
            decoder: TransformerDecoderConfig::new(WIDTH, 2 * WIDTH, 2, 1)
                .with_dropout(0.0)
                .with_norm_first(true)
                .init(device),
            review: CrossAttentionConfig::new(WIDTH, WIDTH, 2, 1, WIDTH / 2)
                .with_dropout(0.0)
                .init(device),
            gate: SwiGluConfig::new(WIDTH, 2 * WIDTH).init(device),
            output: LinearConfig::new(2 * WIDTH, LETTERS).init(device),
        }
    }

    /// The scores of the next letter in cipher at each place `[count, length, letters]`.
    fn forward(&self, plain: Tensor<2, Int>, secret: Tensor<2, Int>) -> Tensor<3> {
        let [count, length] = secret.dims();
        let mask = generate_autoregressive_mask(count, length, &secret.device());
        let plain = self.places.forward(self.plain.forward(plain));
        let input = TransformerEncoderInput::new(plain.clone());
        let memory = self.encoder.forward(input);
        let secret = self.places.forward(self.secret.forward(secret));
        let input = TransformerDecoderInput::new(secret, memory).target_mask_attn(mask);
        let x = self.decoder.forward(input);
        let x = x.clone() + self.review.forward(x, plain, None);
        self.output.forward(self.gate.forward(x))
    }
}

fn places(device: &Device) -> PositionalEncoding {
    PositionalEncodingConfig::new(WIDTH)
        .with_max_sequence_size(LENGTH)
        .init(device)
}

fn encoder(device: &Device) -> TransformerEncoder {
    TransformerEncoderConfig::new(WIDTH, 2 * WIDTH, 2, 1)
        .with_dropout(0.0)
        .with_norm_first(true)
        .init(device)
}

/// The number of a letter of the tongue twister, which begins anew at its end.
fn letter(place: usize) -> usize {
    match TEXT[place % TEXT.len()] {
        letter @ b'a'..=b'z' => usize::from(letter - b'a') + 1,
        _ => 0,
    }
}

/// One text for each excerpt `[count, length]`, with the letters that a function of the excerpt's
/// first place and the place in the excerpt tells.
fn texts(letter: impl Fn(usize, usize) -> usize, device: &Device) -> Tensor<2, Int> {
    let letters: Vec<i64> = (0..EXCERPTS * LENGTH)
        .map(|index| letter(5 * (index / LENGTH), index % LENGTH) as i64)
        .collect();
    Tensor::from_data(TensorData::new(letters, [EXCERPTS, LENGTH]), device)
}

/// Excerpts, and the same excerpts one letter later.
fn excerpts(device: &Device) -> [Tensor<2, Int>; 2] {
    [0, 1].map(|later| texts(|first, place| letter(first + place + later), device))
}

/// Excerpts, what the decoder has read of their cipher at each place, and the whole cipher.
fn ciphers(device: &Device) -> [Tensor<2, Int>; 3] {
    let plain = |first: usize, place: usize| letter(first + place);
    let secret = |first: usize, place: usize| (plain(first, place) + 3) % LETTERS;
    let written = |first: usize, place: usize| match place.checked_sub(1) {
        Some(last) => secret(first, last),
        None => START,
    };
    [
        texts(plain, device),
        texts(written, device),
        texts(secret, device),
    ]
}

/// The mean cross entropy over all places of all texts.
fn cross_entropy(scores: Tensor<3>, letters: Tensor<2, Int>) -> Tensor<1> {
    let cross_entropy = CrossEntropyLossConfig::new().init(&scores.device());
    cross_entropy.forward(scores.flatten(0, 1), letters.flatten(0, 1))
}

fn train<M: Module>(mut model: M, loss: impl Fn(&M) -> Tensor<1>) -> Vec<f32> {
    let mut optimizer = AdamConfig::new().init();
    let mut losses = Vec::with_capacity(STEPS);
    for _ in 0..STEPS {
        let loss = loss(&model);
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(LEARNING_RATE, model, gradients);
        losses.push(loss.into_scalar());
    }
    losses
}

fn writer_losses() -> Vec<f32> {
    let device = Device::flex().autodiff();
    let [texts, later] = excerpts(&device);
    train(untrained(SEED, &device, Writer::new), |model| {
        cross_entropy(model.forward(texts.clone()), later.clone())
    })
}

fn cipher_losses() -> Vec<f32> {
    let device = Device::flex().autodiff();
    let [plain, written, secret] = ciphers(&device);
    train(untrained(SEED, &device, Cipher::new), |model| {
        let scores = model.forward(plain.clone(), written.clone());
        cross_entropy(scores, secret.clone())
    })
}

/// The loss of each training step, first those of the one model and then those of the other.
pub fn losses() -> Vec<f32> {
    [writer_losses(), cipher_losses()].concat()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tolerance;

    use super::*;

    const HALF: usize = LENGTH / 2;

    #[test]
    fn losses_fall_to_a_half() {
        let losses = losses();
        assert_eq!(losses.len(), 2 * STEPS);
        for losses in losses.chunks(STEPS) {
            assert!(losses[STEPS - 1] < losses[0] / 2.0, "{losses:?}");
        }
    }

    #[test]
    fn writer_does_not_read_ahead() {
        let device = Device::flex();
        let model = untrained(SEED, &device, Writer::new);
        let [texts, _] = excerpts(&device);
        let whole = model.forward(texts.clone());
        assert_eq!(whole.dims(), [EXCERPTS, LENGTH, LETTERS]);
        let half = model.forward(texts.narrow(1, 0, HALF));
        let expected = whole.narrow(1, 0, HALF).into_data();
        let tolerance = Tolerance::absolute(1e-4);
        half.into_data()
            .assert_approx_eq::<f32>(&expected, tolerance);
    }

    #[test]
    fn cipher_reads_all_of_the_plain_text_but_not_ahead_in_its_own() {
        let device = Device::flex();
        let model = untrained(SEED, &device, Cipher::new);
        let [plain, written, _] = ciphers(&device);
        let half = |scores: Tensor<3>| scores.narrow(1, 0, HALF).into_data();
        let expected = half(model.forward(plain.clone(), written.clone()));
        let written = written.narrow(1, 0, HALF);
        let found = half(model.forward(plain.clone(), written.clone()));
        found.assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-4));
        let partly = half(model.forward(plain.narrow(1, 0, HALF), written));
        let pairs = partly.iter::<f32>().zip(expected.iter::<f32>());
        let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference > 1e-2, "{difference}");
    }
}
