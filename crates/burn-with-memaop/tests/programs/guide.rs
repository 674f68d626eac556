//! A small convolutional network in the style of the Burn book, which learns to tell horizontal,
//! vertical and diagonal stripes apart.

use burn::optim::{AdamConfig, GradientsParams};
use burn::prelude::*;

use super::untrained;

const SEED: u64 = 7;
const IMAGES: usize = 24;
const SIDE: usize = 12;
const CLASSES: usize = 3;
const STEPS: usize = 20;
const LEARNING_RATE: f64 = 0.01;

#[derive(Config, Debug)]
struct ModelConfig {
    classes: usize,
    hidden_size: usize,
    #[config(default = "0.5")]
    dropout: f64,
}

#[derive(Module, Debug)]
struct Model {
    first: nn::conv::Conv2d,
    second: nn::conv::Conv2d,
    pool: nn::pool::AdaptiveAvgPool2d,
    dropout: nn::Dropout,
    hidden: nn::Linear,
    output: nn::Linear,
    activation: nn::Relu,
}

impl ModelConfig {
    fn init(&self, device: &Device) -> Model {
        Model {
            first: nn::conv::Conv2dConfig::new([1, 8], [3, 3]).init(device),
            second: nn::conv::Conv2dConfig::new([8, 16], [3, 3]).init(device),
            pool: nn::pool::AdaptiveAvgPool2dConfig::new([2, 2]).init(),
            dropout: nn::DropoutConfig::new(self.dropout).init(),
            hidden: nn::LinearConfig::new(16 * 2 * 2, self.hidden_size).init(device),
            output: nn::LinearConfig::new(self.hidden_size, self.classes).init(device),
            activation: nn::Relu::new(),
        }
    }
}

impl Model {
    /// From images `[count, height, width]` to the scores of their classes `[count, classes]`.
    fn forward(&self, images: Tensor<3>) -> Tensor<2> {
        let [count, height, width] = images.dims();
        let x = images.reshape([count, 1, height, width]);
        let x = self.activation.forward(self.first.forward(x));
        let x = self.activation.forward(self.second.forward(x));
        let x: Tensor<2> = self.pool.forward(x).flatten(1, 3);
        let x = self.hidden.forward(self.dropout.forward(x));
        self.output.forward(self.activation.forward(x))
    }

    /// The scores of the images' classes, and their cross entropy with the true classes.
    fn classify(&self, images: Tensor<3>, classes: Tensor<1, Int>) -> (Tensor<2>, Tensor<1>) {
        let scores = self.forward(images);
        let cross_entropy = nn::loss::CrossEntropyLossConfig::new().init(&scores.device());
        let loss = cross_entropy.forward(scores.clone(), classes);
        (scores, loss)
    }
}

/// Stripes two pixels wide in one of three directions, which move on from image to image.
fn image(index: usize) -> impl Iterator<Item = f32> {
    (0..SIDE * SIDE).map(move |pixel| {
        let (row, column) = (pixel / SIDE, pixel % SIDE);
        let across = match index % CLASSES {
            0 => row,
            1 => column,
            _ => row + column,
        };
        let bright = (across + index / CLASSES) % 4 < 2;
        f32::from(u8::from(bright))
    })
}

fn batch(device: &Device) -> (Tensor<3>, Tensor<1, Int>) {
    let pixels: Vec<f32> = (0..IMAGES).flat_map(image).collect();
    let classes: Vec<i64> = (0..IMAGES).map(|index| (index % CLASSES) as i64).collect();
    (
        Tensor::from_data(TensorData::new(pixels, [IMAGES, SIDE, SIDE]), device),
        Tensor::from_data(TensorData::new(classes, [IMAGES]), device),
    )
}

fn config() -> ModelConfig {
    ModelConfig::new(CLASSES, 32).with_dropout(0.0)
}

fn train() -> (Model, Vec<f32>) {
    let device = Device::flex().autodiff();
    let (images, classes) = batch(&device);
    let mut model = untrained(SEED, &device, |device| config().init(device));
    let mut optimizer = AdamConfig::new().init();
    let mut losses = Vec::with_capacity(STEPS);
    for _ in 0..STEPS {
        let (_, loss) = model.classify(images.clone(), classes.clone());
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

#[cfg(feature = "train")]
mod learner {
    use burn::train::{ClassificationOutput, InferenceStep, TrainOutput, TrainStep};

    use super::*;

    impl TrainStep for Model {
        type Input = (Tensor<3>, Tensor<1, Int>);
        type Output = ClassificationOutput;

        fn step(&self, batch: Self::Input) -> TrainOutput<ClassificationOutput> {
            let item = InferenceStep::step(self, batch);
            TrainOutput::new(self, item.loss.backward(), item)
        }
    }

    impl InferenceStep for Model {
        type Input = (Tensor<3>, Tensor<1, Int>);
        type Output = ClassificationOutput;

        fn step(&self, (images, classes): Self::Input) -> ClassificationOutput {
            let (scores, loss) = self.classify(images, classes.clone());
            ClassificationOutput::new(loss, scores, classes)
        }
    }

    #[test]
    fn a_step_of_the_learner_lowers_the_loss() {
        let device = Device::flex().autodiff();
        let model = untrained(SEED, &device, |device| config().init(device));
        let step = TrainStep::step(&model, batch(&device));
        let mut optimizer = AdamConfig::new().init();
        let model = model.optimize(&mut optimizer, LEARNING_RATE.into(), step.grads);
        let next = InferenceStep::step(&model.valid(), batch(&Device::flex()));
        let [first, next]: [f32; 2] = [step.item.loss, next.loss].map(Tensor::into_scalar);
        assert!((first - losses()[0]).abs() < 1e-4, "{first}");
        assert!(next < first, "{first} {next}");
    }
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
    fn trained_model_recognizes_the_stripes() {
        let (images, classes) = batch(&Device::flex());
        let scores = train().0.valid().forward(images);
        assert_eq!(scores.dims(), [IMAGES, CLASSES]);
        let guesses: Tensor<1, Int> = scores.argmax(1).flatten(0, 1);
        let right: i64 = guesses.equal(classes).int().sum().into_scalar();
        assert!(right >= 22, "{right} of {IMAGES} images");
    }
}
