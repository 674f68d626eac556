use anyhow::Result;
use burn::tensor::{Device, Tensor, module::unfold4d, ops::UnfoldOptions};
use clap::Args;
use memaop_mnist::{Items, MnistBatch, classified, loader};

use crate::{
    Options,
    model::Exact,
    training::{Train, Training},
};

#[derive(Args, Debug)]
pub struct Units {
    /// Steps after which the gradient of the second convolution is measured
    #[arg(long, value_delimiter = ',', default_value = "0,50,200,800")]
    steps: Vec<usize>,
    /// Shares of the positions or images that are sampled
    #[arg(long, value_delimiter = ',', default_value = "0.25,0.125,0.0625")]
    ratios: Vec<f64>,
}

impl Units {
    /// Prints the variance that sampling adds, divided by the square of the gradient. Positions are
    /// sampled by the norms of their factors, and images by those of their gradients, which a
    /// training does not know in advance.
    pub fn run(&self, options: &Options, device: &Device, [train, _]: [Items; 2]) -> Result<()> {
        device.seed(options.adam.mnist.seed);
        let autodiff = device.clone().autodiff();
        let mut training = Training::new(Exact::new(&autodiff), options.adam.lr);
        let last = self.steps.iter().max().copied().unwrap_or(0);
        let train = loader(
            train,
            options.adam.batch,
            Some(options.adam.mnist.seed),
            &autodiff,
        );
        println!("| steps | K / M | positions | images |\n|---|---|---|---|");
        let batches = std::iter::repeat_with(|| train.iter()).flatten();
        for (step, batch) in batches.take(last + 1).enumerate() {
            let batch = batch?;
            if self.steps.contains(&step) {
                let [positions, images] = norms(training.model(), batch.clone());
                let square = images.1;
                for &ratio in &self.ratios {
                    let [positions, images] =
                        [&positions.0, &images.0].map(|norms| variance(norms, ratio) / square);
                    println!("| {step} | {ratio} | {positions:.3} | {images:.3} |");
                }
            }
            training.step(batch);
        }
        Ok(())
    }
}

type Norms = (Vec<f64>, f64);

/// The norms of what positions and images add to the gradient of the second convolution, and the
/// square of the norm of the gradient.
fn norms(model: &Exact, batch: MnistBatch) -> [Norms; 2] {
    let [input, output] = model.cut(batch.images);
    let output = output.require_grad();
    let loss = classified(model.after_cut(output.clone()), batch.labels).loss;
    let grad = output.grad(&loss.backward()).expect("a leaf");
    let [images, channels, height, width] = grad.dims();
    let positions = height * width;
    let grad = grad.reshape([images, channels, positions]);
    let options = UnfoldOptions::new([1, 1], [0, 0], [1, 1]);
    let patches = unfold4d(input.inner(), [3, 3], options);

    let lengths = |rows: Tensor<3>| rows.square().sum_dim(1).sqrt();
    let scores = lengths(patches.clone()) * lengths(grad.clone());
    let products = grad.matmul(patches.swap_dims(1, 2));
    let square = products.clone().sum_dim(0).square().sum();
    let of_images = products.square().sum_dim(2).sum_dim(1).sqrt();
    let square = f64::from(square.into_scalar::<f32>());
    let values = |tensor: Tensor<3>| tensor.into_data().iter::<f64>().collect();
    [(values(scores), square), (values(of_images), square)]
}

/// Returns `sum (1 / p - 1) s^2`. The `p = min(1, c s)` add up to a share of their number.
fn variance(sizes: &[f64], ratio: f64) -> f64 {
    let count = ratio * sizes.len() as f64;
    let probability = |c: f64, size: f64| (c * size).min(1.0);
    let (mut low, mut high) = (0.0, 1.0);
    let sum = |c: f64| sizes.iter().map(|&size| probability(c, size)).sum::<f64>();
    let most = sizes.iter().filter(|size| **size > 0.0).count() as f64;
    while sum(high) < count.min(0.999 * most) {
        high *= 2.0;
    }
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        match sum(middle) < count {
            true => low = middle,
            false => high = middle,
        }
    }
    let positive = sizes.iter().filter(|size| **size > 0.0);
    positive
        .map(|&size| (1.0 / probability(high, size) - 1.0) * size * size)
        .sum()
}
