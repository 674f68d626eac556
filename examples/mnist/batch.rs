use burn::{
    data::dataloader::batcher::Batcher,
    nn::loss::CrossEntropyLossConfig,
    tensor::{Device, Int, Tensor, TensorData},
    train::ClassificationOutput,
};
use burn_dataset::vision::MnistItem;

/// Images, shape `[batch, 784]`, and labels, shape `[batch]`.
#[derive(Clone, Debug)]
pub struct MnistBatch {
    /// With the mean and the standard deviation of the training pixels taken out.
    pub images: Tensor<2>,
    /// From 0 to 9.
    pub labels: Tensor<1, Int>,
}

/// Makes batches of items.
#[derive(Clone, Default)]
pub struct MnistBatcher;

impl Batcher<MnistItem, MnistBatch> for MnistBatcher {
    fn batch(&self, items: Vec<MnistItem>, device: &Device) -> MnistBatch {
        // The mean and the standard deviation of the training pixels.
        let pixels = |item: &MnistItem| {
            let pixels = item.image.as_flattened().iter();
            pixels
                .map(|pixel| (pixel / 255.0 - 0.1307) / 0.3081)
                .collect::<Vec<_>>()
        };
        let images = TensorData::new(
            items.iter().flat_map(pixels).collect::<Vec<f32>>(),
            [items.len(), 784],
        );
        let labels: Vec<i64> = items.iter().map(|item| i64::from(item.label)).collect();
        MnistBatch {
            images: Tensor::from_data(images, device),
            labels: Tensor::from_data(TensorData::new(labels, [items.len()]), device),
        }
    }
}

/// The loss of logits, shape `[batch, 10]`, and what burn-train's metrics want.
pub fn classified(output: Tensor<2>, labels: Tensor<1, Int>) -> ClassificationOutput {
    let loss = CrossEntropyLossConfig::new()
        .init(&output.device())
        .forward(output.clone(), labels.clone());
    ClassificationOutput::new(loss, output, labels)
}
