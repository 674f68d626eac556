use burn::{
    data::dataloader::batcher::Batcher,
    nn::loss::CrossEntropyLossConfig,
    tensor::{Device, Int, Tensor, TensorData},
    train::ClassificationOutput,
};
use burn_dataset::vision::MnistItem;

/// A batch of images, shape `[batch, 784]`, and labels, shape `[batch]`.
#[derive(Clone, Debug)]
pub struct MnistBatch {
    /// The pixels, standardised by the mean and the standard deviation of the training images.
    pub images: Tensor<2>,
    /// The digits, from 0 to 9.
    pub labels: Tensor<1, Int>,
}

/// Makes batches of images.
#[derive(Clone, Default)]
pub struct MnistBatcher;

impl Batcher<MnistItem, MnistBatch> for MnistBatcher {
    fn batch(&self, items: Vec<MnistItem>, device: &Device) -> MnistBatch {
        // 0.1307 is the mean and 0.3081 the standard deviation of the training pixels.
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

/// The loss of logits, shape `[batch, 10]`, in the form that burn-train's metrics need.
pub fn classified(output: Tensor<2>, labels: Tensor<1, Int>) -> ClassificationOutput {
    let loss = CrossEntropyLossConfig::new()
        .init(&output.device())
        .forward(output.clone(), labels.clone());
    ClassificationOutput::new(loss, output, labels)
}
