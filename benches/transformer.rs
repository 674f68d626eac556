//! Times a training step (forward, loss, backward, Adam) of a transformer encoder, Burn's and that
//! of this crate.
//!
//! ```text
//! cargo bench --bench transformer -- --width 128 --batch 32 --length 64 --k-ratio 0.25
//! ```

use anyhow::{Result, ensure};
use burn::{
    module::Module,
    nn::{
        Linear, LinearConfig,
        loss::CrossEntropyLossConfig,
        transformer::{TransformerEncoder, TransformerEncoderConfig},
    },
    optim::AdamConfig,
    tensor::{Device, Distribution, Int, Tensor},
};
use burn_memaop::{AopConfig, OuterProducts, transformer::MemAopTransformerEncoder};
use clap::Parser;
use memaop_examples::bench::{Common, Size, Step, StepOptions, Training, random, step_table};
use memaop_examples::{Encoder, check};

const CLASSES: usize = 10;

/// Times a training step of a transformer encoder that gives each sequence a class
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// Width of a token; the feed-forward network has four times as many units
    #[arg(long, default_value_t = 128)]
    width: usize,
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Transformer blocks
    #[arg(long, default_value_t = 2)]
    blocks: usize,
    /// Sequences in a batch; M, the number of rows, is --batch times --length
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 64)]
    length: usize,
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Compares with exact gradients of this crate, which take one product for all sequences
    #[arg(long)]
    flat: bool,
    #[command(flatten)]
    steps: StepOptions,
}

#[derive(Module, Debug)]
struct Classifier<E: Encoder> {
    encoder: E,
    output: Linear,
}

impl Classifier<TransformerEncoder> {
    fn new(options: &Options, device: &Device) -> Self {
        let width = options.width;
        let encoder =
            TransformerEncoderConfig::new(width, 4 * width, options.heads, options.blocks)
                .with_norm_first(true)
                .with_dropout(options.dropout);
        Self {
            encoder: encoder.init(device),
            output: LinearConfig::new(width, CLASSES).init(device),
        }
    }

    fn with_memaop(self, aop: AopConfig) -> Classifier<MemAopTransformerEncoder> {
        Classifier {
            encoder: MemAopTransformerEncoder::from_encoder(self.encoder, aop),
            output: self.output,
        }
    }
}

impl<E: Encoder> Classifier<E> {
    fn loss(&self, tokens: &Tensor<3>, labels: &Tensor<1, Int>) -> Tensor<1> {
        let encoded = self
            .encoder
            .encode(tokens.clone(), None)
            .mean_dim(1)
            .squeeze_dim(1);
        let loss = CrossEntropyLossConfig::new().init(&tokens.device());
        loss.forward(self.output.forward(encoded), labels.clone())
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let device = options.common.device()?;
    let autodiff = device.clone().autodiff();
    let (width, batch, length) = (options.width, options.batch, options.length);
    check::heads(width, options.heads)?;
    ensure!(
        batch > 0 && length > 1,
        "--batch must be at least 1, --length at least 2"
    );

    let dtype = options.common.dtype;
    let tokens = random(batch * length, width, &device, dtype);
    let tokens = tokens.reshape([batch, length, width]).autodiff();
    let labels = Distribution::Uniform(0.0, CLASSES as f64);
    let labels = Tensor::<1>::random([batch], labels, &device)
        .int()
        .autodiff();
    let burns = dtype.cast(Classifier::new(&options, &autodiff));

    let size = Size {
        width,
        depth: options.blocks,
        m: batch * length,
    };
    step_table(&options.common, &options.steps, size, &device, |aop| {
        let (tokens, labels) = (&tokens, &labels);
        let memaop = burns.clone().with_memaop(aop);
        let adam = || AdamConfig::new().init();
        let exact: Step<'_> = match options.flat {
            false => {
                let loss = |model: &Classifier<_>| model.loss(tokens, labels);
                let mut exact = Training::new(burns.clone(), adam(), loss);
                Box::new(move || exact.step())
            }
            true => {
                let flat = burns
                    .clone()
                    .with_memaop(AopConfig::new().with_outer_products(OuterProducts::All));
                let loss = |model: &Classifier<_>| model.loss(tokens, labels);
                let mut flat = Training::new(flat, adam(), loss);
                Box::new(move || flat.step())
            }
        };
        let mut memaop = Training::new(memaop, adam(), |model: &Classifier<_>| {
            model.loss(tokens, labels)
        });
        [exact, Box::new(move || memaop.step())]
    })
}
