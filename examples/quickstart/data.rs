use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use smartcore::dataset::digits;

/// The number of pixels of an image.
pub const PIXELS: usize = 64;
/// The number of digits.
pub const CLASSES: usize = 10;

/// The 1,797 handwritten digits of the UCI repository (Alpaydin, Kaynak), 8 x 8 pixels each.
pub struct Digits {
    train: Vec<Digit>,
    test: Vec<Digit>,
}

#[derive(Clone)]
struct Digit {
    /// The pixels, in `[0, 1]`.
    pixels: Vec<f32>,
    label: i64,
}

/// A batch of images, shape `[batch, PIXELS]`, and labels, shape `[batch]`.
pub struct Batch {
    pub images: Tensor<2>,
    pub labels: Tensor<1, Int>,
}

impl Digits {
    /// Loads all digits. Every fifth one is for testing.
    pub fn load() -> Self {
        let dataset = digits::load_dataset();
        let digits = dataset.data.chunks(PIXELS).zip(&dataset.target);
        let digits = digits.map(|(pixels, &label)| Digit {
            pixels: pixels.iter().map(|pixel| pixel / 16.0).collect(),
            label: label as i64,
        });
        let (test, train): (Vec<_>, Vec<_>) =
            digits.enumerate().partition(|(index, _)| index % 5 == 0);
        let images = |digits: Vec<(usize, Digit)>| digits.into_iter().map(|(_, d)| d).collect();
        Self {
            train: images(train),
            test: images(test),
        }
    }

    /// The number of training batches in an epoch; a smaller last one is left out.
    pub fn batches(&self, batch: usize) -> usize {
        self.train.len() / batch
    }

    /// The training batches of one epoch, in an order that the seed gives.
    pub fn epoch(&self, batch: usize, seed: u64, device: &Device) -> Vec<Batch> {
        let mut order: Vec<_> = (0..self.train.len()).collect();
        order.shuffle(&mut StdRng::seed_from_u64(seed));
        let batches = order.chunks_exact(batch);
        batches
            .map(|indices| {
                let digits: Vec<_> = indices.iter().map(|&i| self.train[i].clone()).collect();
                collate(&digits, device)
            })
            .collect()
    }

    pub fn test(&self, device: &Device) -> Batch {
        collate(&self.test, device)
    }

    pub fn train_len(&self) -> usize {
        self.train.len()
    }
}

fn collate(digits: &[Digit], device: &Device) -> Batch {
    let pixels: Vec<f32> = digits.iter().flat_map(|d| d.pixels.clone()).collect();
    let labels: Vec<i64> = digits.iter().map(|d| d.label).collect();
    Batch {
        images: Tensor::from_data(TensorData::new(pixels, [digits.len(), PIXELS]), device),
        labels: Tensor::from_data(TensorData::new(labels, [digits.len()]), device),
    }
}
