use std::sync::Arc;

use burn::{
    data::dataloader::{DataLoader, DataLoaderIterator},
    tensor::Device,
};

/// A data loader that goes on with the shuffle of the epoch after `epochs`.
///
/// A loader shuffles anew in each epoch, with the numbers that follow those of the epoch before;
/// one that is built for a resumed training would begin with those of the first epoch again. It
/// takes a loader without worker threads, `num_workers(0)`: others draw on their own time.
pub fn resume_loader<O: Send + 'static>(
    loader: Arc<dyn DataLoader<O>>,
    epochs: usize,
) -> Arc<dyn DataLoader<O>> {
    Arc::new(Resumed { loader, epochs })
}

struct Resumed<O> {
    loader: Arc<dyn DataLoader<O>>,
    epochs: usize,
}

impl<O: Send + 'static> DataLoader<O> for Resumed<O> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<O> + 'a> {
        self.loader.iter()
    }

    fn num_items(&self) -> usize {
        self.loader.num_items()
    }

    /// burn-train moves a loader to its device before the first epoch, and that draws the seed of
    /// the shuffles.
    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<O>> {
        let loader = self.loader.to_device(device);
        for _ in 0..self.epochs {
            drop(loader.iter());
        }
        loader
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<O>> {
        resume_loader(self.loader.slice(start, end), self.epochs)
    }
}
