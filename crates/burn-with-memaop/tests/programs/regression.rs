//! A perceptron that learns a smooth function of two variables, with its settings kept in a file.

use burn::optim::{GradientsParams, SgdConfig, momentum::MomentumConfig};
use burn::prelude::*;

use super::untrained;

const SEED: u64 = 17;
const POINTS: usize = 32;
const STEPS: usize = 30;

#[derive(Config, Debug, PartialEq)]
struct Settings {
    hidden_size: usize,
    learning_rate: f64,
    #[config(default = 0.9)]
    momentum: f64,
    note: Option<String>,
}

#[derive(Module, Debug)]
struct Perceptron {
    hidden: nn::Linear,
    activation: nn::Relu,
    output: nn::Linear,
}

impl Perceptron {
    fn new(hidden_size: usize, device: &Device) -> Self {
        Self {
            hidden: nn::LinearConfig::new(2, hidden_size).init(device),
            activation: nn::Relu::new(),
            output: nn::LinearConfig::new(hidden_size, 1).init(device),
        }
    }

    /// From points `[count, 2]` to the function's values `[count, 1]`.
    fn forward(&self, points: Tensor<2>) -> Tensor<2> {
        let x = self.activation.forward(self.hidden.forward(points));
        self.output.forward(x)
    }
}

fn settings() -> Settings {
    Settings::new(32, 0.05)
        .with_momentum(0.8)
        .with_note(Some("two variables".into()))
}

/// Points scattered over the square from -1 to 1, and the function's values there.
fn batch(device: &Device) -> (Tensor<2>, Tensor<2>) {
    let points: Vec<[f32; 2]> = (0..POINTS)
        .map(|index| [index, 7 * index].map(|place| (place % POINTS) as f32 / 16.0 - 1.0))
        .collect();
    let values: Vec<f32> = points.iter().map(|&[x, y]| x * y + x - 0.5 * y).collect();
    let points = points.into_flattened();
    (
        Tensor::from_data(TensorData::new(points, [POINTS, 2]), device),
        Tensor::from_data(TensorData::new(values, [POINTS, 1]), device),
    )
}

fn train(settings: &Settings) -> Vec<f32> {
    let device = Device::flex().autodiff();
    let (points, values) = batch(&device);
    let mut model = untrained(SEED, &device, |device| {
        Perceptron::new(settings.hidden_size, device)
    });
    let momentum = MomentumConfig::new().with_momentum(settings.momentum);
    let mut optimizer = SgdConfig::new().with_momentum(Some(momentum)).init();
    let mut losses = Vec::with_capacity(STEPS);
    for _ in 0..STEPS {
        let guesses = model.forward(points.clone());
        let mean = nn::loss::Reduction::Mean;
        let loss = nn::loss::MseLoss::new().forward(guesses, values.clone(), mean);
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(settings.learning_rate, model, gradients);
        losses.push(loss.into_scalar());
    }
    losses
}

/// The loss of each training step.
pub fn losses() -> Vec<f32> {
    train(&settings())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_falls_to_a_third() {
        let losses = losses();
        assert_eq!(losses.len(), STEPS);
        assert!(losses[STEPS - 1] < losses[0] / 3.0, "{losses:?}");
    }

    #[test]
    fn settings_come_back_from_their_file() {
        let name = format!("burn-regression-{}.json", std::process::id());
        let file = std::env::temp_dir().join(name);
        settings().save(&file).unwrap();
        let loaded = Settings::load(&file);
        std::fs::remove_file(&file).unwrap();
        let loaded = loaded.unwrap();
        assert_eq!(loaded, settings());
        assert_ne!(loaded, Settings::new(32, 0.05));
    }

    #[test]
    fn layers_have_weights_of_their_sizes() {
        let model = untrained(SEED, &Device::flex(), |device| Perceptron::new(8, device));
        assert_eq!(model.hidden.weight.dims(), [2, 8]);
        assert_eq!(model.output.weight.dims(), [8, 1]);
        assert_eq!(model.output.bias.as_ref().unwrap().dims(), [1]);
        assert_eq!(model.num_params(), 2 * 8 + 8 + 8 + 1);
        let unbiased = nn::LinearConfig::new(2, 8).with_bias(false);
        assert!(unbiased.init(&Device::flex()).bias.is_none());
    }
}
