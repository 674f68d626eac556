//! A language model that reads a text character by character. It is trained with Burn's encoder and
//! with that of burn-memaop, from the same weights and in turns.
//!
//! ```text
//! cargo charlm --text FILE
//! cargo charlm --text FILE --k-ratio 0.25,0.5 --seeds 3 --out DIR
//! ```

mod model;
mod report;
mod text;
mod training;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use burn::tensor::Device;
use burn_memaop::AopConfig;
use clap::Parser;
use memaop_examples::{
    AopOptions, Backend, InputGradientOptions, KRatio, PolicyOption, StoredInputOption, check,
    parallel,
};
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    model::{CharLm, Size},
    report::Method,
    text::Text,
    training::{Contender, Training},
};

/// Trains a character-level language model with exact and with approximate gradients
#[derive(Parser, Debug)]
struct Options {
    /// File with a text in UTF-8; its last tenth is for validation
    #[arg(long)]
    text: PathBuf,
    /// K as a share of the rows, or auto; each value is a training of its own
    #[arg(long, value_delimiter = ',', default_value = "1,auto")]
    k_ratio: Vec<KRatio>,
    /// Policies, each with its usual memory: balanced, or none if it takes none
    #[arg(long, value_enum, value_delimiter = ',', default_value = "systematic")]
    policy: Vec<PolicyOption>,
    #[command(flatten)]
    input_gradient: InputGradientOptions,
    /// How layers keep their inputs for the backward pass; each value is a training of its own
    #[arg(long, value_enum, value_delimiter = ',', default_value = "full")]
    stored_input: Vec<StoredInputOption>,
    /// Also trains with all rows, and gradients between blocks for these shares of the sequences
    #[arg(long, value_delimiter = ',')]
    sequences: Vec<f64>,
    #[arg(long, default_value_t = 800)]
    steps: usize,
    /// Sequences in a batch; M, the number of rows, is --batch times --length
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Characters in a sequence
    #[arg(long, default_value_t = 64)]
    length: usize,
    #[arg(long, default_value_t = 128)]
    width: usize,
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Transformer blocks
    #[arg(long, default_value_t = 2)]
    blocks: usize,
    /// Learning rate of Adam
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Lets the learning rate fall to zero, by a cosine
    #[arg(long)]
    falling: bool,
    /// Leaves out Burn's own encoder
    #[arg(long)]
    ours: bool,
    /// Number of seeds of weights and batches
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Steps from one validation to the next
    #[arg(long, default_value_t = 50)]
    interval: usize,
    /// Number of characters that each model writes in the end
    #[arg(long, default_value_t = 0)]
    sample: usize,
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    backend: Backend,
    /// Folder for the table, the runs and figures of loss against steps and time
    #[arg(long)]
    out: Option<PathBuf>,
}

/// The number of batches in a validation.
const VALIDATION_BATCHES: usize = 10;

fn main() -> Result<()> {
    let options = Options::parse();
    options.validate()?;
    let device = options.backend.device()?;
    let text = Text::read(&options.text, options.length)?;
    println!(
        "{} characters, {} different ones; M = {}",
        text.len(),
        text.vocabulary(),
        options.batch * options.length
    );

    let mut methods = options.methods(0)?;
    for seed in 0..options.seeds {
        compare(&options, &text, seed, &device, &mut methods)?;
    }
    let table = report::table(&methods);
    println!("\n{table}");
    if let Some(out) = &options.out {
        fs::create_dir_all(out).with_context(|| format!("--out {}", out.display()))?;
        parallel::write(&out.join("table.md"), &table)?;
        parallel::write(&out.join("runs.json"), &serde_json::to_string(&methods)?)?;
        report::figure(&methods, &out.join("loss.svg"))?;
    }
    Ok(())
}

/// Trains all methods from the same weights and on the same batches. They take turns, a step each.
fn compare(
    options: &Options,
    text: &Text,
    seed: u64,
    device: &Device,
    methods: &mut [Method],
) -> Result<()> {
    device.seed(seed);
    let autodiff = device.clone().autodiff();
    let size = Size {
        vocabulary: text.vocabulary(),
        length: options.length,
        width: options.width,
        heads: options.heads,
        blocks: options.blocks,
    };
    let exact = CharLm::new(size, &autodiff);
    let falling = options.falling.then_some(options.steps);
    let mut contenders: Vec<Box<dyn Contender>> = Vec::new();
    for aop in options.configurations(seed)? {
        let model = exact.clone();
        contenders.push(match aop {
            None => Box::new(Training::new(model, options.lr, falling, seed, &autodiff)),
            Some(aop) => {
                let model = model.with_memaop(aop);
                Box::new(Training::new(model, options.lr, falling, seed, &autodiff))
            }
        });
    }
    for &share in &options.sequences {
        let all = AopConfig::new().with_outer_products(KRatio::ALL.outer_products());
        let model = exact.clone().with_memaop(all).with_sequences(share);
        contenders.push(Box::new(Training::new(
            model, options.lr, falling, seed, &autodiff,
        )));
    }

    let (batch, length) = (options.batch, options.length);
    let validation = text.validation(VALIDATION_BATCHES, batch, length, &autodiff);
    let mut random = StdRng::seed_from_u64(seed);
    report::heading(seed, methods);
    for step in 1..=options.steps {
        let batch = text.draw(batch, length, &mut random, &autodiff);
        for contender in &mut contenders {
            contender.step(&batch)?;
        }
        if step % options.interval == 0 || step == options.steps {
            let losses = contenders
                .iter_mut()
                .map(|contender| contender.validate(&validation));
            report::line(step, losses.collect());
        }
    }
    for (method, contender) in methods.iter_mut().zip(&mut contenders) {
        if options.sample > 0 {
            let mut random = StdRng::seed_from_u64(seed);
            let written = contender.sample(&[0], options.sample, length, &mut random);
            let written = written.into_iter().map(|token| text.character(token));
            println!("\n{}: {}", method.name, written.collect::<String>());
        }
        method.runs.push(contender.finish());
    }
    Ok(())
}

impl Options {
    fn validate(&self) -> Result<()> {
        check::at_least_one(&[
            ("steps", self.steps),
            ("batch", self.batch),
            ("length", self.length),
            ("blocks", self.blocks),
            ("interval", self.interval),
            ("seeds", self.seeds as usize),
        ])?;
        check::heads(self.width, self.heads)?;
        for &share in &self.sequences {
            ensure!(
                share > 0.0 && share <= 1.0,
                "--sequences must be in (0, 1], but got {share}"
            );
        }
        check::positive("lr", self.lr)
    }

    /// The configurations of the trainings: none for Burn's own modules, then every policy and K.
    fn configurations(&self, seed: u64) -> Result<Vec<Option<AopConfig>>> {
        let pairs = self.pairs().map(|(policy, k_ratio, stored_input)| {
            let options = AopOptions {
                k: None,
                k_ratio,
                policy,
                memory: None,
                decay: None,
                input_gradient: match k_ratio {
                    KRatio::ALL => InputGradientOptions::default(),
                    _ => self.input_gradient,
                },
                stored_input,
                no_cost_rule: false,
            };
            options.config(seed << 32).map(Some)
        });
        let burns = (!self.ours).then_some(Ok(None));
        burns.into_iter().chain(pairs).collect()
    }

    fn pairs(&self) -> impl Iterator<Item = (PolicyOption, KRatio, StoredInputOption)> {
        let policies = self.policy.iter().enumerate();
        policies.flat_map(move |(number, &policy)| {
            let k_ratios = self.k_ratio.iter().filter(move |&&k_ratio| {
                // With all rows every policy is the same.
                k_ratio.goes_with(policy) && (k_ratio != KRatio::ALL || number == 0)
            });
            k_ratios.flat_map(move |&k_ratio| {
                let stored = self.stored_input.iter();
                stored.map(move |&stored| (policy, k_ratio, stored))
            })
        })
    }

    fn methods(&self, seed: u64) -> Result<Vec<Method>> {
        // Wrong values are found before any training.
        self.configurations(seed)?;
        for policy in &self.policy {
            let fixed = |k: &KRatio| k.goes_with(*policy) && *k != KRatio::ALL;
            ensure!(
                self.k_ratio.iter().any(fixed) || self.k_ratio == [KRatio::ALL],
                "--k-ratio must have a share below 1 for --policy {policy}, which has no auto"
            );
        }
        let pairs = self.pairs().map(|(policy, k_ratio, stored)| {
            let name = match k_ratio {
                KRatio::ALL => "exact, flat".to_string(),
                k => format!("{policy} {k}") + &self.input_gradient.suffix(),
            };
            Method::new(name + &stored.suffix())
        });
        let sequences = self.sequences.iter();
        let sequences = sequences.map(|share| Method::new(format!("sequences {share}")));
        let burns = (!self.ours).then(|| Method::new("exact".to_string()));
        Ok(burns.into_iter().chain(pairs).chain(sequences).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn options(text: &Path, more: &str) -> Options {
        let words = ["charlm", "--text", text.to_str().unwrap()].into_iter();
        let words = words.chain(more.split_whitespace());
        Options::try_parse_from(words).unwrap()
    }

    #[test]
    fn a_text_is_learned_by_all_and_exactly_with_all_rows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        fs::write(
            &path,
            "the quick brown fox jumps over the lazy dog. ".repeat(40),
        )
        .unwrap();
        let options = options(
            &path,
            "--k-ratio 0.125,1 --sequences 0.5 --steps 40 --interval 20 --sample 5 --lr 0.01 --batch 32 --length 16 \
             --width 64 --heads 2 --blocks 1",
        );
        options.validate().unwrap();
        let text = Text::read(&path, options.length).unwrap();
        let mut methods = options.methods(0).unwrap();
        compare(&options, &text, 0, &Device::flex(), &mut methods).unwrap();
        let losses: Vec<_> = methods
            .iter()
            .map(|method| &method.runs[0].validation_loss)
            .collect();
        let guessing = (text.vocabulary() as f64).ln();
        for losses in &losses {
            assert!(
                losses[1] < losses[0] && losses[1] < 0.6 * guessing,
                "{losses:?}"
            );
        }
        // With all rows layers train as Burn's own modules do; with an eighth of them they do not.
        let distance = |method: usize| (losses[method][1] - losses[0][1]).abs();
        assert!(distance(2) < 1e-5 && distance(1) > 1e-4, "{losses:?}");
        // With one block no gradient passes between blocks.
        assert!(distance(3) < 1e-5, "{losses:?}");

        let table = report::table(&methods);
        assert!(table.contains("| systematic M/8 |"), "{table}");
        let figure = folder.path().join("loss.svg");
        report::figure(&methods, &figure).unwrap();
        assert!(figure.exists());
    }

    #[test]
    fn bad_values_are_named() {
        let path = Path::new("text");
        let error = options(path, "--heads 3")
            .validate()
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "--width must be a multiple of --heads 3, but got 128"
        );
        let error = options(path, "--k-ratio 1.5")
            .methods(0)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("must be in (0, 1], but got 1.5"), "{error}");
    }
}
