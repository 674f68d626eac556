use std::sync::{Arc, Once};

use burn::{
    data::dataloader::{DataLoader, DataLoaderIterator},
    tensor::Device,
};

/// A data loader that goes on with the shuffle of the epoch after `epochs`.
///
/// A loader shuffles each epoch with the random numbers that follow those of the epoch before.
/// Built anew for a resumed training, it would begin with those of the first epoch. This one first
/// draws those of the epochs before: when it is first iterated over, or burn-train moves it.
///
/// It takes a loader with `num_workers(0)`, because worker threads draw at times of their own.
pub fn resume_loader<O: Send + 'static>(
    loader: Arc<dyn DataLoader<O>>,
    epochs: usize,
) -> Arc<dyn DataLoader<O>> {
    Arc::new(Resumed {
        loader,
        epochs,
        drawn: Once::new(),
    })
}

struct Resumed<O> {
    loader: Arc<dyn DataLoader<O>>,
    epochs: usize,
    drawn: Once,
}

fn draw<O>(loader: &dyn DataLoader<O>, epochs: usize) {
    for _ in 0..epochs {
        drop(loader.iter());
    }
}

impl<O: Send + 'static> DataLoader<O> for Resumed<O> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<O> + 'a> {
        self.drawn
            .call_once(|| draw(self.loader.as_ref(), self.epochs));
        self.loader.iter()
    }

    fn num_items(&self) -> usize {
        self.loader.num_items()
    }

    /// The loader on another device draws random numbers of its own.
    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<O>> {
        let loader = self.loader.to_device(device);
        draw(loader.as_ref(), self.epochs);
        loader
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<O>> {
        resume_loader(self.loader.slice(start, end), self.epochs)
    }
}
