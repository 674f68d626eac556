//! A transformer encoder that sorts short texts of different lengths by their topic.

use burn::{
    module::Module,
    nn::{
        Embedding, EmbeddingConfig, Linear, LinearConfig,
        attention::{SeqLengthOption, generate_padding_mask},
        loss::CrossEntropyLossConfig,
        transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput},
    },
    optim::{AdamConfig, GradientsParams},
    tensor::{Bool, Device, Int, Tensor, TensorData},
};

use super::untrained;

const SEED: u64 = 13;
const TEXTS: usize = 24;
const TOPICS: usize = 3;
/// The words of the topics, five each, after the padding.
const WORDS: usize = 1 + 5 * TOPICS;
const PADDING: usize = 0;
const LONGEST: usize = 10;
const WIDTH: usize = 16;
const STEPS: usize = 20;
const LEARNING_RATE: f64 = 0.01;

#[derive(Module, Debug)]
struct Model {
    words: Embedding,
    places: Embedding,
    encoder: TransformerEncoder,
    output: Linear,
}

/// Texts `[count, length]`, and which of their places are padding.
#[derive(Clone)]
struct Texts {
    words: Tensor<2, Int>,
    padding: Tensor<2, Bool>,
}

impl Model {
    fn new(device: &Device) -> Self {
        Self {
            words: EmbeddingConfig::new(WORDS, WIDTH).init(device),
            places: EmbeddingConfig::new(2 * LONGEST, WIDTH).init(device),
            encoder: TransformerEncoderConfig::new(WIDTH, 2 * WIDTH, 2, 2)
                .with_dropout(0.0)
                .with_norm_first(true)
                .init(device),
            output: LinearConfig::new(WIDTH, TOPICS).init(device),
        }
    }

    /// The scores of the topics of each text `[count, topics]`.
    fn forward(&self, texts: Texts) -> Tensor<2> {
        let [_, length] = texts.words.dims();
        let places = Tensor::arange(0..length as i64, &texts.words.device()).unsqueeze();
        let x = self.words.forward(texts.words) + self.places.forward(places);
        let input = TransformerEncoderInput::new(x).mask_pad(texts.padding.clone());
        let x = self.encoder.forward(input);
        self.output.forward(mean_of_words(x, texts.padding))
    }
}

/// The mean over the places that are not padding.
fn mean_of_words(x: Tensor<3>, padding: Tensor<2, Bool>) -> Tensor<2> {
    let kept: Tensor<3> = padding.bool_not().float().unsqueeze_dim(2);
    let sums = (x * kept.clone()).sum_dim(1);
    (sums / kept.sum_dim(1)).squeeze_dim(1)
}

/// Four to ten words, of which every third belongs to another topic.
fn text(index: usize) -> Vec<usize> {
    let topic = index % TOPICS;
    let word = |place: usize| {
        let topic = if place % 3 == 2 { topic + 1 } else { topic };
        1 + 5 * (topic % TOPICS) + (3 * index + 2 * place) % 5
    };
    (0..4 + index % 7).map(word).collect()
}

fn batch(length: usize, device: &Device) -> (Texts, Tensor<1, Int>) {
    let texts = (0..TEXTS).map(text).collect();
    let padded = generate_padding_mask(PADDING, texts, SeqLengthOption::Fixed(length), device);
    let topics: Vec<i64> = (0..TEXTS).map(|index| (index % TOPICS) as i64).collect();
    let texts = Texts {
        words: padded.tensor,
        padding: padded.mask,
    };
    let topics = Tensor::from_data(TensorData::new(topics, [TEXTS]), device);
    (texts, topics)
}

fn train() -> (Model, Vec<f32>) {
    let device = Device::flex().autodiff();
    let (texts, topics) = batch(LONGEST, &device);
    let cross_entropy = CrossEntropyLossConfig::new().init(&device);
    let mut model = untrained(SEED, &device, Model::new);
    let mut optimizer = AdamConfig::new().init();
    let mut losses = Vec::with_capacity(STEPS);
    for _ in 0..STEPS {
        let loss = cross_entropy.forward(model.forward(texts.clone()), topics.clone());
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(LEARNING_RATE, model, gradients);
        losses.push(loss.into_scalar());
    }
    (model, losses)
}

/// The loss of each training step.
pub fn losses() -> Vec<f32> {
    train().1
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tolerance;

    use super::*;

    #[test]
    fn loss_falls_to_a_third() {
        let losses = losses();
        assert_eq!(losses.len(), STEPS);
        assert!(losses[STEPS - 1] < losses[0] / 3.0, "{losses:?}");
    }

    #[test]
    fn trained_model_knows_the_topics() {
        let (texts, topics) = batch(LONGEST, &Device::flex());
        let scores = train().0.valid().forward(texts);
        assert_eq!(scores.dims(), [TEXTS, TOPICS]);
        let guesses: Tensor<1, Int> = scores.argmax(1).flatten(0, 1);
        let right: i64 = guesses.equal(topics).int().sum().into_scalar();
        assert!(right >= 22, "{right} of {TEXTS} texts");
    }

    #[test]
    fn further_padding_leaves_the_scores_as_they_are() {
        let device = Device::flex();
        let model = untrained(SEED, &device, Model::new);
        let [scores, padded] = [LONGEST, 2 * LONGEST].map(|length| {
            let (texts, _) = batch(length, &device);
            model.forward(texts).into_data()
        });
        scores.assert_approx_eq::<f32>(&padded, Tolerance::absolute(1e-4));
    }
}
