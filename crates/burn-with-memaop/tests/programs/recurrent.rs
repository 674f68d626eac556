//! A convolution along time followed by an LSTM, which tells slow waves from fast ones.

use burn::{
    module::Module,
    nn::{
        Linear, LinearConfig, Lstm, LstmConfig, PaddingConfig1d, Relu,
        conv::{Conv1d, Conv1dConfig},
        loss::CrossEntropyLossConfig,
    },
    optim::{AdamConfig, GradientsParams},
    tensor::{Device, Int, Tensor, TensorData},
};

use super::untrained;

const SEED: u64 = 19;
const WAVES: usize = 16;
const LENGTH: usize = 12;
const STEPS: usize = 30;
const LEARNING_RATE: f64 = 0.01;

#[derive(Module, Debug)]
struct Model {
    conv: Conv1d,
    activation: Relu,
    lstm: Lstm,
    output: Linear,
}

impl Model {
    fn new(device: &Device) -> Self {
        Self {
            conv: Conv1dConfig::new(1, 8, 3)
                .with_padding(PaddingConfig1d::Explicit(1, 1))
                .init(device),
            activation: Relu::new(),
            lstm: LstmConfig::new(8, 16, true).init(device),
            output: LinearConfig::new(16, 2).init(device),
        }
    }

    /// From waves `[count, 1, length]` to the scores of slow and fast `[count, 2]`.
    fn forward(&self, waves: Tensor<3>) -> Tensor<2> {
        let x = self.activation.forward(self.conv.forward(waves));
        let (_, state) = self.lstm.forward(x.swap_dims(1, 2), None);
        self.output.forward(state.hidden)
    }
}

/// A triangle wave with a period of twelve or four, and a start that differs from wave to wave.
fn wave(index: usize) -> impl Iterator<Item = f32> {
    let period = if index.is_multiple_of(2) { 12 } else { 4 };
    (0..LENGTH).map(move |time| {
        let phase = (time + index / 2) % period;
        4.0 * phase.min(period - phase) as f32 / period as f32 - 1.0
    })
}

fn batch(device: &Device) -> (Tensor<3>, Tensor<1, Int>) {
    let waves: Vec<f32> = (0..WAVES).flat_map(wave).collect();
    let fast: Vec<i64> = (0..WAVES).map(|index| (index % 2) as i64).collect();
    (
        Tensor::from_data(TensorData::new(waves, [WAVES, 1, LENGTH]), device),
        Tensor::from_data(TensorData::new(fast, [WAVES]), device),
    )
}

fn train() -> (Model, Vec<f32>) {
    let device = Device::flex().autodiff();
    let (waves, fast) = batch(&device);
    let cross_entropy = CrossEntropyLossConfig::new().init(&device);
    let mut model = untrained(SEED, &device, Model::new);
    let mut optimizer = AdamConfig::new().init();
    let mut losses = Vec::with_capacity(STEPS);
    for _ in 0..STEPS {
        let loss = cross_entropy.forward(model.forward(waves.clone()), fast.clone());
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
    use super::*;

    #[test]
    fn loss_falls_to_a_half() {
        let losses = losses();
        assert_eq!(losses.len(), STEPS);
        assert!(losses[STEPS - 1] < losses[0] / 2.0, "{losses:?}");
    }

    #[test]
    fn trained_model_tells_the_waves_apart() {
        let (waves, fast) = batch(&Device::flex());
        let scores = train().0.valid().forward(waves);
        assert_eq!(scores.dims(), [WAVES, 2]);
        let guesses: Tensor<1, Int> = scores.argmax(1).flatten(0, 1);
        let right: i64 = guesses.equal(fast).int().sum().into_scalar();
        assert!(right >= 14, "{right} of {WAVES} waves");
    }
}
