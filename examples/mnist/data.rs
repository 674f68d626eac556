use std::path::Path;

use anyhow::Result;
use burn::data::dataset::InMemDataset;
use burn_dataset::vision::MnistItem;
use memaop_examples::mnist::{self, Images, PIXELS, SIDE, Split};

/// Reads a split from the IDX files in `mnist` of a data folder, as items of `MnistDataset`.
///
/// # Errors
///
/// Returns an error that names the file and what is wrong with it.
pub fn read(folder: &Path, split: Split) -> Result<InMemDataset<MnistItem>> {
    let Images { pixels, labels } = mnist::read(folder, split)?;
    let items = pixels.chunks_exact(PIXELS).zip(labels);
    let items = items.map(|(pixels, label)| {
        let mut image = [[0.0; SIDE]; SIDE];
        for (value, &pixel) in image.as_flattened_mut().iter_mut().zip(pixels) {
            *value = f32::from(pixel);
        }
        MnistItem { image, label }
    });
    Ok(InMemDataset::new(items.collect()))
}
