use std::{collections::BTreeSet, fs, ops::Range, path::Path};

use anyhow::{Context, Result, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::{RngExt, rngs::StdRng};

/// The share of the text, at its end, that is for validation.
const VALIDATION: f64 = 0.1;

/// A text as numbers, one for each character.
pub struct Text {
    /// Every character that occurs, in ascending order.
    vocabulary: Vec<char>,
    tokens: Vec<i64>,
    train: usize,
}

/// Sequences of characters and, for each character, the one that follows.
#[derive(Clone)]
pub struct Batch {
    /// The characters, shape `[batch, length]`.
    pub tokens: Tensor<2, Int>,
    /// The characters that follow, shape `[batch * length]`.
    pub next: Tensor<1, Int>,
}

impl Text {
    /// Reads a text, which must be long enough for sequences of `length` characters.
    pub fn read(path: &Path, length: usize) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("--text {}", path.display()))?;
        Self::new(&text, length).with_context(|| format!("--text {}", path.display()))
    }

    fn new(text: &str, length: usize) -> Result<Self> {
        let vocabulary: Vec<char> = BTreeSet::from_iter(text.chars()).into_iter().collect();
        let number = |c| vocabulary.binary_search(&c).expect("it occurs") as i64;
        let tokens: Vec<_> = text.chars().map(number).collect();
        let train = tokens.len() - (VALIDATION * tokens.len() as f64) as usize;
        ensure!(
            tokens.len() - train > length,
            "a tenth of the text must be longer than --length {length}, but the text has {} characters",
            tokens.len()
        );
        Ok(Self {
            vocabulary,
            tokens,
            train,
        })
    }

    pub fn vocabulary(&self) -> usize {
        self.vocabulary.len()
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn character(&self, token: i64) -> char {
        self.vocabulary[token as usize]
    }

    /// Sequences from random places of the part that is trained on.
    pub fn draw(&self, count: usize, length: usize, random: &mut StdRng, device: &Device) -> Batch {
        let starts = (0..count).map(|_| random.random_range(0..self.train - length));
        self.batch(&starts.collect::<Vec<_>>(), length, device)
    }

    /// Sequences that are spread evenly over the part for validation.
    pub fn validation(
        &self,
        batches: usize,
        count: usize,
        length: usize,
        device: &Device,
    ) -> Vec<Batch> {
        let Range { start, end } = self.train..self.tokens.len() - length;
        let starts = (0..batches * count).map(|i| start + i * (end - start) / (batches * count));
        let starts: Vec<_> = starts.collect();
        let batches = starts.chunks(count);
        batches
            .map(|starts| self.batch(starts, length, device))
            .collect()
    }

    fn batch(&self, starts: &[usize], length: usize, device: &Device) -> Batch {
        let sequences = |offset: usize| -> Vec<i64> {
            let sequence = |&start: &usize| &self.tokens[start + offset..][..length];
            starts.iter().flat_map(sequence).copied().collect()
        };
        let (tokens, next) = (sequences(0), sequences(1));
        let tokens = TensorData::new(tokens, [starts.len(), length]);
        let next = TensorData::new(next, [starts.len() * length]);
        Batch {
            tokens: Tensor::from_data(tokens, device),
            next: Tensor::from_data(next, device),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn what_follows_is_one_character_later_and_no_validation_is_drawn() {
        let device = Device::flex();
        let text: String = ('a'..='z')
            .cycle()
            .take(180)
            .chain("0123456789ABCDEFGHIJ".chars())
            .collect();
        let text = Text::new(&text, 5).unwrap();
        assert_eq!((text.len(), text.vocabulary()), (200, 46));
        let mut random = StdRng::seed_from_u64(0);
        let letters = |tokens: Vec<i64>| -> String {
            tokens
                .into_iter()
                .map(|token| text.character(token))
                .collect()
        };
        for _ in 0..100 {
            let batch = text.draw(3, 5, &mut random, &device);
            let tokens = letters(batch.tokens.into_data().iter().collect());
            let next = letters(batch.next.into_data().iter().collect());
            for (token, next) in tokens.bytes().zip(next.bytes()) {
                assert!(token.is_ascii_lowercase() && next.is_ascii_lowercase());
                assert_eq!((token - b'a' + 1) % 26, next - b'a');
            }
        }
        let validation = text.validation(2, 3, 5, &device);
        let last: Vec<i64> = validation[1].tokens.clone().into_data().iter().collect();
        assert_eq!(&letters(last)[10..], "CDEFG");
        let first: Vec<i64> = validation[0].next.clone().into_data().iter().collect();
        assert_eq!(&letters(first)[..5], "12345");
    }

    #[test]
    fn a_text_that_is_too_short_is_refused() {
        let error = Text::new("too short", 64).err().unwrap().to_string();
        assert!(
            error.contains("--length 64, but the text has 9 characters"),
            "{error}"
        );
        let error = Text::read(Path::new("/no/such/file"), 64).err().unwrap();
        assert!(
            error.to_string().contains("--text /no/such/file"),
            "{error}"
        );
    }
}
