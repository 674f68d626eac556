//! The program. It names `burn` alone.

mod data;
mod losses;
mod model;
#[cfg(test)]
pub mod tests;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, Result, anyhow, ensure};
use burn::{
    data::dataloader::DataLoader,
    lr_scheduler::{composed::ComposedLrSchedulerConfig, linear::LinearLrSchedulerConfig},
    module::{Lora, Module},
    optim::{AdamWConfig, GradientsParams},
    store::{ModuleSnapshot, SafetensorsStore},
    tensor::{Device, activation::softmax},
    train::{
        ClassificationOutput, Learner, SupervisedTraining,
        metric::{AccuracyMetric, LearningRateMetric},
    },
};
use clap::{Args, Parser, Subcommand};
use memaop_examples::memory;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::json;

use crate::Layers;

use self::{
    data::{Batch, Loader, Sentence},
    losses::{Run, TimedLoss},
    model::{Classifier, Config, Encoder},
};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// Fine-tunes a pre-trained encoder to sort sentences into classes
#[derive(Parser, Debug)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Trains, tests after each epoch, and writes the weights to OUT/classifier.safetensors
    Train(Train),
    /// Sorts sentences with the weights of a training
    Predict(Predict),
    /// Measures training steps on one batch: times, bytes kept between the passes, and the peak
    Step(Step),
    /// Prints the first numbers of the embeddings of sentences
    Embed(Embed),
    /// Draws the losses of several trainings by time
    Picture(Picture),
}

#[derive(Args, Debug)]
struct Data {
    /// Folder with model.safetensors, config.json and tokenizer.json
    #[arg(long)]
    model: PathBuf,
    /// File with lines of a class, a tab and a sentence
    #[arg(long)]
    data: PathBuf,
    /// Sentences to train on, drawn at random; the others are for the test
    #[arg(long, default_value_t = 7000)]
    train: usize,
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Cuts sentences off at so many tokens
    #[arg(long, default_value_t = 128)]
    longest: usize,
    /// Pads all sentences to so many tokens, in place of the longest of a batch
    #[arg(long)]
    pad: Option<usize>,
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    /// Trains adapters (LoRA) of this rank and the head, and not the pre-trained weights
    #[arg(long)]
    lora: Option<usize>,
    /// Seed of the new head, the order of the sentences, and the dropout
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    layers: Layers,
}

#[derive(Args, Debug)]
struct Train {
    #[command(flatten)]
    data: Data,
    #[arg(long, default_value_t = 2)]
    epochs: usize,
    /// Learning rate of AdamW after the warm-up, from where it falls to zero
    #[arg(long, default_value_t = 5e-5)]
    lr: f64,
    /// Goes on after this epoch, whose checkpoint is in --out
    #[arg(long)]
    resume: Option<usize>,
    /// Folder for logs, checkpoints and the weights
    #[arg(long, default_value = "finetune-run")]
    out: PathBuf,
}

#[derive(Args, Debug)]
struct Predict {
    /// Folder with config.json and tokenizer.json
    #[arg(long)]
    model: PathBuf,
    /// Folder of a training
    #[arg(long, default_value = "finetune-run")]
    out: PathBuf,
    /// Cuts sentences off at so many tokens
    #[arg(long, default_value_t = 128)]
    longest: usize,
    sentences: Vec<String>,
}

#[derive(Args, Debug)]
struct Step {
    #[command(flatten)]
    data: Data,
    #[arg(long, default_value_t = 5)]
    repeats: usize,
}

#[derive(Args, Debug)]
struct Embed {
    #[arg(long)]
    model: PathBuf,
    sentences: Vec<String>,
}

#[derive(Args, Debug)]
struct Picture {
    /// Folders of trainings
    runs: Vec<PathBuf>,
    #[arg(long, default_value = "losses.svg")]
    chart: PathBuf,
}

pub fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Train(train) => train.run().map(drop),
        Command::Predict(predict) => predict.run(),
        Command::Step(step) => step.run(),
        Command::Embed(embed) => embed.run(),
        Command::Picture(picture) => picture.run(),
    }
}

impl Data {
    /// The names of the classes, and the sentences of training and test.
    fn sentences(&self) -> Result<(Vec<String>, [Vec<Sentence>; 2])> {
        for (name, value) in [
            ("batch", Some(self.batch)),
            ("train", Some(self.train)),
            ("lora", self.lora),
        ] {
            ensure!(value != Some(0), "--{name} must be at least 1, but got 0");
        }
        let (longest, dropout) = (self.longest, self.dropout);
        ensure!(
            (0.0..1.0).contains(&dropout),
            "--dropout must be 0 to less than 1, but got {dropout}"
        );
        let positions = Config::read(&self.model)?.max_position_embeddings;
        let tokenizer = data::tokenizer(&self.model, longest, positions)?;
        if let Some(pad) = self.pad {
            ensure!(
                (longest..=positions).contains(&pad),
                "--pad must be {longest} (--longest) to {positions} (the positions of the model), \
                 but got {pad}"
            );
        }
        let (classes, mut train) = data::read(&self.data, &tokenizer)?;
        ensure!(
            self.train < train.len(),
            "--train must leave sentences for the test, but got {} of {}",
            self.train,
            train.len()
        );
        // Trainings with other seeds have the same sentences.
        train.shuffle(&mut StdRng::seed_from_u64(0));
        let test = train.split_off(self.train);
        Ok((classes, [train, test]))
    }

    fn loader(&self, sentences: Vec<Sentence>, shuffled: bool, device: &Device) -> Loader {
        Loader {
            sentences: Arc::new(sentences),
            batch: self.batch,
            length: self.pad,
            seed: shuffled.then_some(self.seed),
            epoch: Arc::new(AtomicU64::new(0)),
            device: device.clone(),
        }
    }

    /// The pre-trained encoder with a new head.
    fn classifier(&self, classes: usize, device: &Device) -> Result<Classifier> {
        let config = Config::read(&self.model)?;
        device.seed(self.seed);
        let mut encoder = Encoder::new(&config, self.dropout, device);
        encoder.load(&self.model)?;
        let classifier = Classifier::new(encoder, config.hidden_size, classes, device);
        let classifier = self.layers.configured(classifier);
        Ok(match self.lora {
            None => classifier,
            Some(rank) => classifier.with_adapters(Lora::new(rank, 2.0 * rank as f64)),
        })
    }
}

impl Train {
    fn run(&self) -> Result<Classifier> {
        ensure!(self.epochs > 0, "--epochs must be at least 1, but got 0");
        let done = self.resume.unwrap_or(0);
        ensure!(
            done < self.epochs,
            "--resume must be less than --epochs ({}), but got {done}",
            self.epochs
        );
        if done > 0 {
            self.check_options()?;
        }
        let device = device();
        let (classes, [train, test]) = self.data.sentences()?;
        let steps = train.len().div_ceil(self.data.batch);
        let warm_up = (steps * self.epochs / 10).max(1);
        let train = self.data.loader(train, true, &device);
        let test = self.data.loader(test, false, &device);
        train.epoch.store(done as u64, Ordering::Relaxed);

        let autodiff = device.clone().autodiff();
        let model = self.data.classifier(classes.len(), &autodiff)?;
        let failed = |error: String| anyhow!("--lr {}: {error}", self.lr);
        let rate = ComposedLrSchedulerConfig::new()
            .linear(LinearLrSchedulerConfig::new(1e-3, 1.0, warm_up))
            .linear(LinearLrSchedulerConfig::new(
                self.lr,
                1e-3 * self.lr,
                steps * self.epochs,
            ))
            .init()
            .map_err(failed)?;
        let [train_losses, test_losses] = [false, true].map(TimedLoss::new);
        let mut training =
            SupervisedTraining::new(&self.out, Arc::new(train), Arc::new(test.clone()))
                .metrics((AccuracyMetric::new(),))
                .metric_train_numeric(LearningRateMetric::new())
                .metric_train_numeric(train_losses.clone())
                .metric_valid_numeric(test_losses.clone())
                .with_training_strategy(burn::train::ExecutionStrategy::single(autodiff).into())
                .with_default_checkpointers()
                .num_epochs(self.epochs)
                .summary();
        match done {
            0 => std::fs::write(self.out.join(OPTIONS), self.options())?,
            _ => training = training.checkpoint(done),
        }
        let optimizer = optimizer().init();
        let start = Instant::now();
        let result = training.launch(Learner::new(model, optimizer, rate));
        if let Some(error) = result.error {
            return Err(anyhow!("{error}"));
        }
        let seconds = start.elapsed().as_secs_f64();
        if let Some(reason) = result.interrupted {
            return Err(anyhow!(
                "the training was stopped ({reason:?}); with --resume it goes on after an epoch"
            ));
        }
        // A model without adapters loads the weights.
        let model = result.model.materialize();
        let [accuracy, loss] = report(&model, &classes, &test);
        ensure!(
            loss.is_finite(),
            "--lr must be lower: with {} the loss is {loss}",
            self.lr
        );
        println!("{seconds:.1} s of training, tests and checkpoints");
        std::fs::write(self.out.join("classes.txt"), classes.join("\n"))?;
        save(&model, &self.out)?;
        let result = json!({
            "accuracy": accuracy, "loss": loss, "seconds": seconds, "resumed": done,
            "train_losses": train_losses.noted(), "test_losses": test_losses.noted(),
        });
        std::fs::write(self.out.join("result.json"), result.to_string())?;
        losses::draw(&[Run::read(&self.out)?], &self.out.join("losses.svg"))?;
        Ok(model)
    }

    /// The options that decide what is trained, a line each.
    fn options(&self) -> String {
        let Self {
            data, epochs, lr, ..
        } = self;
        format!("{data:#?}\nepochs: {epochs}\nlr: {lr}")
    }

    /// Checks that a training which is resumed has the options that it began with.
    fn check_options(&self) -> Result<()> {
        let options = self.options();
        let written = read_text(&self.out.join(OPTIONS))?;
        let mut lines = written.lines().zip(options.lines());
        if let Some((written, given)) = lines.find(|(written, given)| written != given) {
            let [written, given] = [written, given].map(|line| line.trim().trim_end_matches(','));
            return Err(anyhow!(
                "--resume: the training had {written}, but got {given}"
            ));
        }
        Ok(())
    }
}

/// The file in --out with the options of a training.
const OPTIONS: &str = "options.txt";

/// AdamW with the epsilon that is usual for BERT. Burn's is 1e-5.
fn optimizer() -> AdamWConfig {
    AdamWConfig::new()
        .with_weight_decay(0.01)
        .with_epsilon(1e-8)
}

/// Burn's backend in plain Rust, whatever others the features of a workspace add.
fn device() -> Device {
    Device::flex()
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// Prints the accuracy in percent, the loss and the confusion of classes on the test sentences.
/// Returns accuracy and loss.
fn report(model: &Classifier, classes: &[String], test: &Loader) -> [f64; 2] {
    let mut counts = vec![vec![0; classes.len()]; classes.len()];
    let (mut sum, mut all) = (0.0, 0);
    for batch in test.iter() {
        let batch = batch.expect("the sentences are in memory");
        let count = batch.classes.dims()[0];
        let ClassificationOutput {
            loss,
            output,
            targets,
        } = model.forward(batch);
        sum += f64::from(loss.into_scalar::<f32>()) * count as f64;
        all += count;
        let found = output.argmax(1).into_data();
        for (found, class) in found.iter::<i64>().zip(targets.into_data().iter::<i64>()) {
            counts[class as usize][found as usize] += 1;
        }
    }
    let right: usize = (0..classes.len()).map(|class| counts[class][class]).sum();
    let accuracy = 100.0 * right as f64 / all as f64;
    let loss = sum / all as f64;
    println!("test: accuracy {accuracy:.2} %, loss {loss:.4}");
    println!("class, and how often each class was found for it:");
    for (class, counts) in classes.iter().zip(&counts) {
        println!("  {class}: {counts:?}");
    }
    [accuracy, loss]
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn save(model: &Classifier, out: &Path) -> Result<()> {
    let path = out.join("classifier.safetensors");
    let mut store = SafetensorsStore::from_file(&path).overwrite(true);
    let saved = model.save_into(&mut store);
    saved.map_err(|error| anyhow!("{}: {error}", path.display()))
}

impl Predict {
    fn run(&self) -> Result<()> {
        let device = device();
        let config = Config::read(&self.model)?;
        let classes = read_text(&self.out.join("classes.txt"))?;
        let classes: Vec<_> = classes.lines().collect();
        let encoder = Encoder::new(&config, 0.0, &device);
        let mut model = Classifier::new(encoder, config.hidden_size, classes.len(), &device);
        let path = self.out.join("classifier.safetensors");
        let mut store = SafetensorsStore::from_file(&path);
        let loaded = model.load_from(&mut store);
        loaded.map_err(|error| anyhow!("{}: {error}", path.display()))?;
        let batch = tokenized(&self.model, self.longest, &self.sentences, &device)?;
        let probabilities = softmax(model.forward(batch).output, 1).into_data();
        let rows: Vec<f32> = probabilities.iter().collect();
        for (sentence, row) in self.sentences.iter().zip(rows.chunks(classes.len())) {
            let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            let best = best.expect("there are classes");
            println!("{} ({:.0} %): {sentence}", classes[best], 100.0 * row[best]);
        }
        Ok(())
    }
}

fn tokenized(model: &Path, longest: usize, sentences: &[String], device: &Device) -> Result<Batch> {
    ensure!(!sentences.is_empty(), "give one sentence at least");
    let positions = Config::read(model)?.max_position_embeddings;
    let tokenizer = data::tokenizer(model, longest.min(positions), positions)?;
    let sentences = sentences.iter().map(|text| {
        let tokens = data::encode(&tokenizer, text)?;
        Ok(Sentence { tokens, class: 0 })
    });
    let sentences = sentences.collect::<Result<Vec<_>>>()?;
    Ok(Batch::new(
        &sentences.iter().collect::<Vec<_>>(),
        None,
        device,
    ))
}

impl Embed {
    fn run(&self) -> Result<()> {
        let device = device();
        let mut encoder = Encoder::new(&Config::read(&self.model)?, 0.0, &device);
        encoder.load(&self.model)?;
        let Batch {
            tokens, padding, ..
        } = tokenized(&self.model, 128, &self.sentences, &device)?;
        let embedded = encoder.forward(tokens, padding);
        let [_, width] = embedded.dims();
        let values: Vec<f32> = embedded.into_data().iter().collect();
        for (sentence, row) in self.sentences.iter().zip(values.chunks(width)) {
            println!("{sentence}: {:?}", &row[..width.min(6)]);
        }
        Ok(())
    }
}

impl Picture {
    fn run(&self) -> Result<()> {
        let runs = self.runs.iter().map(|folder| Run::read(folder));
        losses::draw(&runs.collect::<Result<Vec<_>>>()?, &self.chart)
    }
}

impl Step {
    fn run(&self) -> Result<()> {
        ensure!(self.repeats > 0, "--repeats must be at least 1, but got 0");
        let device = device().autodiff();
        let (classes, [train, _]) = self.data.sentences()?;
        let batch: Vec<_> = train.iter().take(self.data.batch).collect();
        let batch = Batch::new(&batch, self.data.pad, &device);
        let mut model = self.data.classifier(classes.len(), &device)?;
        let mut optimizer = optimizer().init();
        let mut times = [(); 5].map(|()| Vec::new());
        let mut bytes = [0; 2];
        for repeat in 0..=self.repeats {
            let before = memory::alive();
            memory::watch_peak();
            let start = Instant::now();
            let loss = model.forward(batch.clone()).loss;
            let forward = start.elapsed();
            let kept = memory::alive().saturating_sub(before);
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            let backward = start.elapsed();
            model = optimizer.step(1e-5, model, grads);
            let all = start.elapsed();
            let peak = memory::peak();

            // The encoder alone, also the gradient of its input.
            let Batch {
                tokens, padding, ..
            } = batch.clone();
            let embedded = model.encoder.embed(tokens).detach().require_grad();
            let start = Instant::now();
            let encoded = model.encoder.encode(embedded, padding);
            let encoder_forward = start.elapsed();
            drop(encoded.sum().backward());
            let encoder = start.elapsed();
            // The first step makes the moments of the optimizer.
            if repeat > 0 {
                let encoder = [encoder_forward, encoder - encoder_forward];
                let parts = [forward, backward - forward, all - backward];
                for (times, part) in times.iter_mut().zip(parts.into_iter().chain(encoder)) {
                    times.push(1e3 * part.as_secs_f64());
                }
                bytes = [kept, peak];
            }
        }
        let median = |times: &mut Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let [
            forward,
            backward,
            optimizer,
            encoder_forward,
            encoder_backward,
        ] = times.each_mut().map(median);
        let [kept, peak] = bytes.map(mib);
        let result = json!({
            "tokens": batch.tokens.dims(), "forward_ms": forward, "backward_ms": backward,
            "optimizer_ms": optimizer, "encoder_forward_ms": encoder_forward,
            "encoder_backward_ms": encoder_backward, "kept_mib": kept, "peak_mib": peak,
        });
        println!("{result}");
        Ok(())
    }
}
