use std::sync::{Arc, Once};

use burn::{
    data::dataloader::{DataLoader, DataLoaderIterator},
    tensor::Device,
};

/// A data loader that goes on with the shuffle of the epoch after `epochs`.
///
/// A loader shuffles anew in each epoch, with the numbers that follow those of the epoch before. A loader that is built
/// for a resumed training would begin with those of the first epoch again. This one draws what the epochs before have
/// drawn first: when it is iterated over for the first time, or, in burn-train, when it is moved to its device.
///
/// It takes a loader without worker threads, `num_workers(0)`: others draw on their own time.
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

    /// The loader on another device draws from numbers of its own.
    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<O>> {
        let loader = self.loader.to_device(device);
        draw(loader.as_ref(), self.epochs);
        loader
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<O>> {
        resume_loader(self.loader.slice(start, end), self.epochs)
    }
}
