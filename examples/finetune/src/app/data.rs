//! Sentences from a file, as batches of tokens.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, Result, anyhow, ensure};
use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderIterator, Progress},
        dataset::DatasetError,
    },
    tensor::{Bool, Device, Int, Tensor, TensorData},
};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use tokenizers::{Tokenizer, TruncationParams};

/// A sentence as tokens, and the number of its class.
#[derive(Debug, Clone)]
pub struct Sentence {
    pub tokens: Vec<i64>,
    pub class: i64,
}

/// Some sentences, padded to one length.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Shape `[sentences, length]`.
    pub tokens: Tensor<2, Int>,
    /// True at padding, shape `[sentences, length]`.
    pub padding: Tensor<2, Bool>,
    /// Shape `[sentences]`.
    pub classes: Tensor<1, Int>,
}

impl Batch {
    /// Pads sentences to `length`, or to the longest of them.
    pub fn new(sentences: &[&Sentence], length: Option<usize>, device: &Device) -> Self {
        let longest = sentences.iter().map(|it| it.tokens.len()).max();
        let length = length.or(longest).unwrap_or(0);
        let shape = [sentences.len(), length];
        let mut tokens = vec![0i64; shape[0] * length];
        let mut padding = vec![true; shape[0] * length];
        let rows = tokens
            .chunks_mut(length)
            .zip(padding.chunks_mut(length))
            .zip(sentences);
        for ((tokens, padding), sentence) in rows {
            let count = sentence.tokens.len().min(length);
            tokens[..count].copy_from_slice(&sentence.tokens[..count]);
            padding[..count].fill(false);
        }
        let classes: Vec<_> = sentences.iter().map(|it| it.class).collect();
        Self {
            tokens: Tensor::from_data(TensorData::new(tokens, shape), device),
            padding: Tensor::from_data(TensorData::new(padding, shape), device),
            classes: Tensor::from_data(TensorData::new(classes, [shape[0]]), device),
        }
    }
}

/// The tokenizer of a model with so many positions. It cuts sentences off at `longest` tokens.
pub fn tokenizer(model: &Path, longest: usize, positions: usize) -> Result<Tokenizer> {
    ensure!(
        (3..=positions).contains(&longest),
        "--longest must be 3 to {positions} (the positions of the model), but got {longest}"
    );
    let path = model.join("tokenizer.json");
    let failed = |error| anyhow!("{}: {error}", path.display());
    let mut tokenizer = Tokenizer::from_file(&path).map_err(failed)?;
    let truncation = TruncationParams {
        max_length: longest,
        ..TruncationParams::default()
    };
    tokenizer
        .with_truncation(Some(truncation))
        .map_err(failed)?
        .with_padding(None);
    Ok(tokenizer)
}

pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<i64>> {
    let encoding = tokenizer.encode(text, true);
    let encoding = encoding.map_err(|error| anyhow!("{text:?}: {error}"))?;
    Ok(encoding.get_ids().iter().map(|&id| i64::from(id)).collect())
}

/// Reads lines of a class, a tab and a sentence. Returns the names of the classes in alphabetical
/// order, and the sentences.
pub fn read(path: &Path, tokenizer: &Tokenizer) -> Result<(Vec<String>, Vec<Sentence>)> {
    let text = fs::read_to_string(path).with_context(|| format!("--data {}", path.display()))?;
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.is_empty());
    let pairs = lines.map(|(number, line)| {
        let pair = line.split_once('\t');
        let pair = pair.filter(|(_, text)| !text.trim().is_empty());
        pair.with_context(|| {
            let path = path.display();
            format!("--data {path}: line {number} must have a class, a tab and a sentence")
        })
    });
    let pairs = pairs.collect::<Result<Vec<_>>>()?;
    let mut classes: Vec<_> = pairs.iter().map(|(class, _)| class.to_string()).collect();
    classes.sort();
    classes.dedup();
    ensure!(
        classes.len() > 1,
        "--data {}: it must have at least two classes, but has {}",
        path.display(),
        classes.len()
    );
    let sentence = |(class, text): &(&str, &str)| {
        let class = classes.binary_search_by(|name| name.as_str().cmp(class));
        Ok(Sentence {
            tokens: encode(tokenizer, text)?,
            class: class.expect("it is in the list") as i64,
        })
    };
    let sentences = pairs.iter().map(sentence).collect::<Result<_>>()?;
    Ok((classes, sentences))
}

/// The number of batches that are sorted by length together.
const BUCKET: usize = 50;

/// Loads batches of sentences of like lengths.
#[derive(Clone)]
pub struct Loader {
    pub sentences: Arc<Vec<Sentence>>,
    pub batch: usize,
    /// The length that all sentences are padded to, or that of the longest of a batch.
    pub length: Option<usize>,
    /// The seed of the order, or the order of the file.
    pub seed: Option<u64>,
    /// The number of the next epoch.
    pub epoch: Arc<AtomicU64>,
    pub device: Device,
}

impl Loader {
    /// The sentences of each batch of an epoch.
    fn batches(&self) -> Vec<Vec<usize>> {
        let mut order: Vec<_> = (0..self.sentences.len()).collect();
        let epoch = self.epoch.fetch_add(1, Ordering::Relaxed);
        let mut random = self
            .seed
            .map(|seed| StdRng::seed_from_u64(seed << 32 | epoch));
        if let Some(random) = &mut random {
            order.shuffle(random);
        }
        for bucket in order.chunks_mut(BUCKET * self.batch) {
            bucket.sort_by_key(|&index| self.sentences[index].tokens.len());
        }
        let mut batches: Vec<_> = order.chunks(self.batch).map(<[_]>::to_vec).collect();
        if let Some(random) = &mut random {
            batches.shuffle(random);
        }
        batches
    }
}

impl DataLoader<Batch> for Loader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<Batch> + 'a> {
        Box::new(Epoch {
            loader: self,
            batches: self.batches().into_iter(),
            done: 0,
        })
    }

    fn num_items(&self) -> usize {
        self.sentences.len()
    }

    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<Batch>> {
        Arc::new(Self {
            device: device.clone(),
            ..self.clone()
        })
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<Batch>> {
        Arc::new(Self {
            sentences: Arc::new(self.sentences[start..end].to_vec()),
            ..self.clone()
        })
    }
}

struct Epoch<'a> {
    loader: &'a Loader,
    batches: std::vec::IntoIter<Vec<usize>>,
    done: usize,
}

impl Iterator for Epoch<'_> {
    type Item = Result<Batch, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        let indices = self.batches.next()?;
        self.done += indices.len();
        let sentences = indices.iter().map(|&index| &self.loader.sentences[index]);
        let sentences: Vec<_> = sentences.collect();
        let Loader { length, device, .. } = self.loader;
        Some(Ok(Batch::new(&sentences, *length, device)))
    }
}

impl DataLoaderIterator<Batch> for Epoch<'_> {
    fn progress(&self) -> Progress {
        let all = self.loader.sentences.len();
        Progress::new(self.done, all, Some("sentences".to_string()))
    }
}
