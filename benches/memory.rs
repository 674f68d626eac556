//! Measures what a model keeps between its passes, and the peak and the time of a training step.
//! Layers are Burn's, or those of this crate, which keep their inputs in full or in few bits.
//!
//! ```text
//! cargo bench --bench memory -- --model transformer --width 512 --batch 64 --length 64 --blocks 4
//! ```

use std::fmt;

use anyhow::{Result, ensure};
use burn::{
    module::{Module, ModuleDisplay},
    nn::{
        DropoutConfig, LayerNormConfig, Linear, LinearConfig,
        attention::{self, MultiHeadAttentionConfig},
        transformer::TransformerEncoderConfig,
    },
    optim::{AdamConfig, GradientsParams, ModuleOptimizer},
    tensor::{Device, Tensor, activation},
};
use burn_memaop::{
    AopConfig, MemAopLinear, StoredInput,
    activation::{Gelu, relu},
    nn,
    transformer::{MemAopMultiHeadAttention, MemAopTransformerEncoder, MhaInput},
};
use clap::{Parser, ValueEnum};
use memaop_examples::bench::{Common, interleaved, random};
use memaop_examples::{Encoder, KRatio, check, memory};
use serde::Serialize;

/// Measures the bytes that training steps with Adam keep between their passes, peaks and times
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// Model [default: all of them]
    #[arg(long, value_enum)]
    model: Option<ModelKind>,
    /// Number of inputs and outputs of a layer, or the width of a token
    #[arg(long, default_value_t = 512)]
    width: usize,
    /// Number of rows of the batch, for layer and perceptron
    #[arg(long, default_value_t = 4096)]
    m: usize,
    /// Hidden layers of the perceptron
    #[arg(long, default_value_t = 4)]
    hidden: usize,
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Transformer blocks
    #[arg(long, default_value_t = 4)]
    blocks: usize,
    /// Sequences in a batch
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 64)]
    length: usize,
    /// Dropout of the transformer
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// K as a share of the batch, or auto; 1 for exact gradients
    #[arg(long, default_value = "0.125")]
    k_ratio: KRatio,
    /// Also measures with gradient checkpointing
    #[arg(long)]
    checkpointing: bool,
    /// Measures what single modules keep, in place of whole models
    #[arg(long, conflicts_with_all = ["model", "checkpointing"])]
    parts: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum ModelKind {
    Layer,
    Perceptron,
    Transformer,
}

impl fmt::Display for ModelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{self:?}").to_lowercase())
    }
}

/// What one module keeps.
#[derive(Serialize)]
struct Part {
    part: &'static str,
    /// The bytes beyond the output of the module, which the next module gets.
    bytes_a_row: f64,
    values_a_row: f64,
}

#[derive(Serialize)]
struct Row {
    model: ModelKind,
    side: &'static str,
    checkpointing: bool,
    /// What is allocated between the passes, but not between steps.
    kept_mib: f64,
    /// The most that is allocated in a step, with weights and optimizer state; unknown on a GPU.
    peak_mib: Option<f64>,
    ms: f64,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let device = options.common.device()?;
    check::heads(options.width, options.heads)?;
    ensure!(
        options.m > 1 && options.hidden > 0 && options.blocks > 0,
        "--m must be at least 2, --hidden and --blocks at least 1"
    );
    if options.parts {
        return parts(&options, &device);
    }
    println!(
        "{:<12} {:<20} {:<8} {:>10} {:>6} {:>10} {:>6} {:>9} {:>6}",
        "model", "side", "gc", "kept MiB", "", "peak MiB", "", "ms", ""
    );
    let mut rows = Vec::new();
    let models = match options.model {
        Some(model) => vec![model],
        None => ModelKind::value_variants().to_vec(),
    };
    for model in models {
        for checkpointing in [false, true] {
            if checkpointing && !options.checkpointing {
                continue;
            }
            rows.extend(measure(&options, &device, model, checkpointing)?);
        }
    }
    println!(
        "\nEach figure is followed by its ratio to the first side. gc: gradient checkpointing."
    );
    options.common.save(&rows)
}

/// Measures all sides of a model: bytes one after the other, and times in turns.
fn measure(
    options: &Options,
    device: &Device,
    model: ModelKind,
    checkpointing: bool,
) -> Result<Vec<Row>> {
    let autodiff = match checkpointing {
        false => device.clone().autodiff(),
        true => device.clone().autodiff().gradient_checkpointing(),
    };
    let mut sides = sides(options, &autodiff, model)?;
    if checkpointing {
        // With checkpointing nothing is packed, so the other sides are like the second.
        sides.truncate(2);
    }
    let mut rows = Vec::new();
    for (side, make) in &sides {
        let [kept, peak] = bytes(device, make.as_ref())?;
        rows.push(Row {
            model,
            side,
            checkpointing,
            kept_mib: kept as f64 / MIB,
            peak_mib: options.common.backend.is_cpu().then_some(peak as f64 / MIB),
            ms: 0.0,
        });
    }
    let mut running: Vec<_> = sides.iter().map(|(_, make)| make()).collect();
    let mut steps: Vec<_> = running.iter_mut().map(|side| || side.step()).collect();
    let mut steps: Vec<_> = steps
        .iter_mut()
        .map(|step| step as &mut dyn FnMut())
        .collect();
    let times = interleaved(device, options.common.repeats, &mut steps)?;
    for (row, ms) in rows.iter_mut().zip(times) {
        row.ms = ms;
    }
    for row in &rows {
        let (peak, peak_ratio) = match (row.peak_mib, rows[0].peak_mib) {
            (Some(peak), Some(first)) => (format!("{peak:.1}"), format!("{:.2}", peak / first)),
            _ => Default::default(),
        };
        println!(
            "{:<12} {:<20} {:<8} {:>10.1} {:>6.2} {peak:>10} {peak_ratio:>6} {:>9.1} {:>6.2}",
            row.model,
            row.side,
            if row.checkpointing { "yes" } else { "no" },
            row.kept_mib,
            row.kept_mib / rows[0].kept_mib,
            row.ms,
            row.ms / rows[0].ms
        );
    }
    Ok(rows)
}

const MIB: f64 = 1024.0 * 1024.0;

/// The bytes that the third step keeps between its passes, and its peak.
fn bytes(device: &Device, make: &dyn Fn() -> Box<dyn Run>) -> Result<[usize; 2]> {
    let before = alive(device)?;
    let mut side = make();
    side.step();
    side.step();
    let between = alive(device)?;
    memory::watch_peak();
    side.forward();
    let kept = alive(device)?.saturating_sub(between);
    side.backward();
    device.sync()?;
    Ok([kept, memory::peak().saturating_sub(before)])
}

/// Measures what modules of a perceptron and a transformer keep of a batch of sequences.
fn parts(options: &Options, device: &Device) -> Result<()> {
    let (width, batch, length) = (options.width, options.batch, options.length);
    let autodiff = device.clone().autodiff();
    let linear = LinearConfig::new(width, width).init(&autodiff);
    let norm = LayerNormConfig::new(width).init(&autodiff);
    let mha = MultiHeadAttentionConfig::new(width, options.heads).with_dropout(0.0);
    let mha = mha.init(&autodiff);
    let dropout = DropoutConfig::new(0.1).init();
    let our_norm = nn::LayerNorm::from_layer_norm(norm.clone());
    let our_dropout = nn::DropoutConfig::new(0.1).init();
    let aop = |stored| {
        AopConfig::new()
            .with_outer_products(options.k_ratio.outer_products())
            .with_stored_input(stored)
    };
    let layer = |stored| MemAopLinear::from_linear(linear.clone(), aop(stored));
    let attention = |stored| MemAopMultiHeadAttention::from_mha(mha.clone(), aop(stored));
    let gelu = Gelu::new().with_aop(aop(StoredInput::Int8));
    let [int8, int4] = [StoredInput::Int8, StoredInput::Int4].map(layer);
    let [mha_full, mha_int8, mha_int4] =
        [StoredInput::Full, StoredInput::Int8, StoredInput::Int4].map(attention);
    let ours = |mha: MemAopMultiHeadAttention| {
        move |x: Tensor<3>| mha.forward_context(MhaInput::self_attn(x))
    };
    type Forward = Box<dyn Fn(Tensor<3>) -> Tensor<3>>;
    let linear_forward = move |x| linear.forward(x);
    let modules: Vec<(&'static str, Forward)> = vec![
        ("Linear", Box::new(linear_forward)),
        ("MemAopLinear, int8", Box::new(move |x| int8.forward(x))),
        ("MemAopLinear, int4", Box::new(move |x| int4.forward(x))),
        ("ReLU", Box::new(activation::relu)),
        ("ReLU in one bit", Box::new(relu)),
        ("GELU", Box::new(activation::gelu)),
        ("GELU in 8 bits", Box::new(move |x| gelu.forward(x))),
        ("Dropout", Box::new(move |x| dropout.forward(x))),
        ("Dropout, ours", Box::new(move |x| our_dropout.forward(x))),
        ("LayerNorm", Box::new(move |x| norm.forward(x))),
        ("LayerNorm, ours", Box::new(move |x| our_norm.forward(x))),
        ("attention, Burn's", {
            Box::new(move |x| mha.forward(attention::MhaInput::self_attn(x)).context)
        }),
        ("attention, full", Box::new(ours(mha_full))),
        ("attention, int8", Box::new(ours(mha_int8))),
        ("attention, int4", Box::new(ours(mha_int4))),
    ];

    let rows = batch * length;
    let input = random(rows, width, device, options.common.dtype).autodiff();
    let input = input.to_device(&autodiff).reshape([batch, length, width]);
    let value_bytes = options.common.dtype.dtype().size();
    println!(
        "{:<20} {:>12} {:>12}",
        "module", "bytes a row", "values a row"
    );
    let mut found = Vec::new();
    for (part, forward) in &modules {
        // The first pass can allocate what stays. As in a model, nothing else has the input.
        let run = || forward(input.clone().require_grad() * 1.0);
        run().sum().backward();
        let before = alive(device)?;
        let output = run();
        let kept = alive(device)?.saturating_sub(before + rows * width * value_bytes);
        drop(output);
        let bytes_a_row = kept as f64 / rows as f64;
        let values_a_row = bytes_a_row / value_bytes as f64;
        println!("{part:<20} {bytes_a_row:>12.0} {values_a_row:>12.0}");
        found.push(Part {
            part,
            bytes_a_row,
            values_a_row,
        });
    }
    options.common.save(&found)
}

/// A training that can be stopped between its passes.
trait Run {
    fn forward(&mut self);
    fn backward(&mut self);
    fn step(&mut self) {
        self.forward();
        self.backward();
    }
}

struct Running<M> {
    /// The model, which each step moves through the optimizer.
    model: Option<M>,
    optimizer: ModuleOptimizer,
    loss: Box<dyn Fn(&M) -> Tensor<1>>,
    pending: Option<Tensor<1>>,
}

impl<M: Module> Run for Running<M> {
    fn forward(&mut self) {
        let model = self.model.as_ref().expect("a step gives the model back");
        self.pending = Some((self.loss)(model));
    }

    fn backward(&mut self) {
        let model = self.model.take().expect("a step gives the model back");
        let loss = self.pending.take().expect("the forward pass has run");
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        self.model = Some(self.optimizer.step(1e-3, model, gradients));
    }
}

type Side = (&'static str, Box<dyn Fn() -> Box<dyn Run>>);

/// The sides of a model, with their names. Their weights have the same values.
fn sides(options: &Options, device: &Device, model: ModelKind) -> Result<Vec<Side>> {
    let aop = |stored| -> Result<AopConfig> {
        let aop = AopConfig::new()
            .with_outer_products(options.k_ratio.outer_products())
            .with_stored_input(stored);
        aop.validate()?;
        Ok(aop)
    };
    let [full, int8, int4] = [
        aop(StoredInput::Full)?,
        aop(StoredInput::Int8)?,
        aop(StoredInput::Int4)?,
    ];
    let (width, batch, length) = (options.width, options.batch, options.length);
    let dtype = options.common.dtype;
    let random = |rows| {
        let values = random(rows, width, &device.clone().inner(), dtype).into_data();
        Tensor::<2>::from_data(values, (device, dtype.dtype()))
    };
    // Each side has weights of its own, so that no side keeps those of another.
    let seeded = {
        let device = device.clone();
        move || device.seed(1)
    };
    Ok(match model {
        ModelKind::Layer => {
            let input = random(options.m);
            let device = device.clone();
            let linear = move || {
                seeded();
                LinearConfig::new(width, width).init(&device)
            };
            let burns = linear.clone();
            let mut sides = vec![side("Linear", burns, {
                let input = input.clone();
                // The product makes the input the output of something, as in a model.
                move |layer: &Linear| layer.forward(input.clone().require_grad() * 1.0).sum()
            })];
            for (name, aop) in [("full", full), ("int8", int8), ("int4", int4)] {
                let (input, linear) = (input.clone(), linear.clone());
                let layer = move || MemAopLinear::from_linear(linear(), aop);
                sides.push(side(name, layer, move |layer| {
                    layer.forward(input.clone().require_grad() * 1.0).sum()
                }));
            }
            sides
        }
        ModelKind::Perceptron => {
            let input = random(options.m);
            let (device, hidden) = (device.clone(), options.hidden);
            let layers = move || -> Vec<Linear> {
                seeded();
                let linear = LinearConfig::new(width, width);
                (0..hidden).map(|_| linear.init(&device)).collect()
            };
            let burns = layers.clone();
            let mut sides = vec![side("Linear", burns, {
                let input = input.clone();
                move |layers: &Vec<Linear>| {
                    let output = layers.iter().fold(input.clone(), |input, layer| {
                        activation::relu(layer.forward(input))
                    });
                    output.square().mean()
                }
            })];
            for (name, aop, compact) in [
                ("full", full, false),
                ("int8, Burn's ReLU", int8, false),
                ("int8", int8, true),
                ("int4", int4, true),
            ] {
                let (input, layers) = (input.clone(), layers.clone());
                let layers = move || -> Vec<_> {
                    let layers = layers().into_iter();
                    layers
                        .map(|linear| MemAopLinear::from_linear(linear, aop))
                        .collect()
                };
                sides.push(side(name, layers, move |layers: &Vec<MemAopLinear>| {
                    let output = layers.iter().fold(input.clone(), |input, layer| {
                        let output = layer.forward(input);
                        match compact {
                            true => relu(output),
                            false => activation::relu(output),
                        }
                    });
                    output.square().mean()
                }));
            }
            sides
        }
        ModelKind::Transformer => {
            let tokens = random(batch * length);
            let tokens = tokens.reshape([batch, length, width]);
            let config =
                TransformerEncoderConfig::new(width, 4 * width, options.heads, options.blocks)
                    .with_norm_first(true)
                    .with_dropout(options.dropout);
            let device = device.clone();
            let encoder = move || {
                seeded();
                config.init(&device)
            };
            let burns = encoder.clone();
            let mut sides = vec![side("Burn's encoder", burns, {
                let tokens = tokens.clone();
                move |encoder| encoder.encode(tokens.clone(), None).square().mean()
            })];
            for (name, aop) in [("full", full), ("int8", int8), ("int4", int4)] {
                let (tokens, encoder) = (tokens.clone(), encoder.clone());
                let encoder = move || MemAopTransformerEncoder::from_encoder(encoder(), aop);
                sides.push(side(
                    name,
                    encoder,
                    move |encoder: &MemAopTransformerEncoder| {
                        encoder.encode(tokens.clone(), None).square().mean()
                    },
                ));
            }
            sides
        }
    })
}

fn side<M: Module + ModuleDisplay + 'static>(
    name: &'static str,
    model: impl Fn() -> M + 'static,
    loss: impl Fn(&M) -> Tensor<1> + Clone + 'static,
) -> Side {
    let make = move || -> Box<dyn Run> {
        Box::new(Running {
            model: Some(model()),
            optimizer: AdamConfig::new().init(),
            loss: Box::new(loss.clone()),
            pending: None,
        })
    };
    (name, Box::new(make))
}

/// The bytes that are allocated, by the process or on the GPU.
fn alive(device: &Device) -> Result<usize> {
    device.sync()?;
    #[cfg(feature = "cubecl-backend")]
    if let burn::backend::DispatchDevice::Cube(device) = device.as_dispatch() {
        use burn_cubecl::cubecl::MemoryScope;
        let usage = device.client().memory_report(MemoryScope::Device).usage();
        return Ok(usage.bytes_in_use as usize);
    }
    Ok(memory::alive())
}

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;
