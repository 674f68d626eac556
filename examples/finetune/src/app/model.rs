//! A BERT-like encoder, and a head that sorts what it makes of a sentence into classes.

use std::{fs, path::Path};

use anyhow::{Context, Result, anyhow, ensure};
use burn::{
    module::{Lora, Module},
    nn::{
        Dropout, DropoutConfig, Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear,
        LinearConfig,
        loss::CrossEntropyLossConfig,
        transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput},
    },
    store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore},
    tensor::{Bool, Device, Int, Tensor},
    train::{ClassificationOutput, InferenceStep, TrainOutput, TrainStep},
};
use serde::Deserialize;

use super::data::Batch;

/// What `config.json` says of a model.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_attention_heads: usize,
    pub num_hidden_layers: usize,
    pub layer_norm_eps: f64,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub vocab_size: usize,
    model_type: String,
    hidden_act: String,
}

impl Config {
    pub fn read(model: &Path) -> Result<Self> {
        let path = model.join("config.json");
        let text = fs::read_to_string(&path);
        let config = text.map(|text| serde_json::from_str::<Self>(&text));
        let name = || format!("--model: {}", path.display());
        let config = config.with_context(name)?.with_context(name)?;
        for (field, value, rule) in [
            ("model_type", &config.model_type, "bert"),
            ("hidden_act", &config.hidden_act, "gelu"),
        ] {
            ensure!(
                value == rule,
                "{}: {field} must be {rule:?}, but got {value:?}",
                name()
            );
        }
        Ok(config)
    }
}

#[derive(Module, Debug)]
struct Embeddings {
    word: Embedding,
    position: Embedding,
    token_type: Embedding,
    norm: LayerNorm,
    dropout: Dropout,
}

/// Embeddings and a stack of post-norm blocks, as in BERT (Devlin and others, 2019,
/// arXiv:1810.04805).
#[derive(Module, Debug)]
pub struct Encoder {
    embeddings: Embeddings,
    encoder: TransformerEncoder,
}

/// The names of the tensors in the files of PyTorch, and the fields of [`Encoder`].
const NAMES: [(&str, &str); 9] = [
    (
        r"^embeddings\.(word|position|token_type)_embeddings\.",
        "embeddings.$1.",
    ),
    (r"^embeddings\.LayerNorm\.", "embeddings.norm."),
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"\.attention\.self\.", ".mha."),
    (r"\.attention\.output\.dense\.", ".mha.output."),
    (r"\.attention\.output\.LayerNorm\.", ".norm_1."),
    (r"\.intermediate\.dense\.", ".pwff.linear_inner."),
    (r"(layers\.\d+)\.output\.dense\.", "$1.pwff.linear_outer."),
    (r"(layers\.\d+)\.output\.LayerNorm\.", "$1.norm_2."),
];

impl Encoder {
    pub fn new(config: &Config, dropout: f64, device: &Device) -> Self {
        let width = config.hidden_size;
        let embedding = |count| EmbeddingConfig::new(count, width).init(device);
        let encoder = TransformerEncoderConfig::new(
            width,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_hidden_layers,
        );
        let norm = LayerNormConfig::new(width).with_epsilon(config.layer_norm_eps);
        Self {
            embeddings: Embeddings {
                word: embedding(config.vocab_size),
                position: embedding(config.max_position_embeddings),
                token_type: embedding(config.type_vocab_size),
                norm: norm.init(device),
                dropout: DropoutConfig::new(dropout).init(),
            },
            encoder: encoder
                .with_dropout(dropout)
                .with_layer_norm_eps(config.layer_norm_eps)
                .init(device),
        }
    }

    /// Loads the weights of `model.safetensors`.
    pub fn load(&mut self, model: &Path) -> Result<()> {
        let path = model.join("model.safetensors");
        let names = NAMES.into_iter();
        let store = SafetensorsStore::from_file(&path).with_from_adapter(PyTorchToBurnAdapter);
        let mut store = names.fold(store, |store, (from, to)| {
            store.with_key_remapping(from, to)
        });
        let loaded = self.load_from(&mut store);
        loaded.map_err(|error| anyhow!("--model: {}: {error}", path.display()))?;
        Ok(())
    }

    /// The mean of what the last block makes of each token, padding left out: shape
    /// `[sentences, width]`.
    pub fn forward(&self, tokens: Tensor<2, Int>, padding: Tensor<2, Bool>) -> Tensor<2> {
        let [sentences, length] = tokens.dims();
        let encoded = self.encode(self.embed(tokens), padding.clone());
        let weights = padding.bool_not().float().reshape([sentences, length, 1]);
        let sum = (encoded * weights.clone()).sum_dim(1);
        (sum / weights.sum_dim(1)).squeeze_dim(1)
    }

    /// The embeddings of all tokens, shape `[vocabulary, width]`.
    #[cfg(test)]
    pub fn words(&self) -> Tensor<2> {
        self.embeddings.word.weight.val()
    }

    /// The input of the first block, shape `[sentences, length, width]`.
    pub fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let [_, length] = tokens.dims();
        let device = tokens.device();
        let positions = Tensor::arange(0..length as i64, &device).unsqueeze::<2>();
        let first = Tensor::<2, Int>::zeros([1, 1], &device);
        let Embeddings {
            word,
            position,
            token_type,
            norm,
            dropout,
        } = &self.embeddings;
        let embedded =
            word.forward(tokens) + position.forward(positions) + token_type.forward(first);
        dropout.forward(norm.forward(embedded))
    }

    /// The output of the last block.
    pub fn encode(&self, embedded: Tensor<3>, padding: Tensor<2, Bool>) -> Tensor<3> {
        let input = TransformerEncoderInput::new(embedded).mask_pad(padding);
        self.encoder.forward(input)
    }
}

/// An encoder with a linear layer for the classes.
#[derive(Module, Debug)]
pub struct Classifier {
    pub encoder: Encoder,
    head: Linear,
}

impl Classifier {
    pub fn new(encoder: Encoder, width: usize, classes: usize, device: &Device) -> Self {
        Self {
            encoder,
            head: LinearConfig::new(width, classes).init(device),
        }
    }

    /// Gives the matrices of the encoder adapters. What else was pre-trained is frozen.
    pub fn with_adapters(mut self, lora: Lora) -> Self {
        let Encoder {
            embeddings,
            encoder,
        } = self.encoder;
        self.encoder = Encoder {
            embeddings: embeddings.no_grad(),
            encoder: encoder.apply_lora(lora),
        };
        self
    }

    pub fn forward(&self, batch: Batch) -> ClassificationOutput {
        let Batch {
            tokens,
            padding,
            classes,
        } = batch;
        let output = self.head.forward(self.encoder.forward(tokens, padding));
        let loss = CrossEntropyLossConfig::new().init(&output.device());
        ClassificationOutput {
            loss: loss.forward(output.clone(), classes.clone()),
            output,
            targets: classes,
        }
    }
}

impl TrainStep for Classifier {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> TrainOutput<ClassificationOutput> {
        let output = self.forward(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Classifier {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> ClassificationOutput {
        self.forward(batch)
    }
}
