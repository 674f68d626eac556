use burn::{
    backend::Dispatch,
    config::Config,
    module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay},
    nn::{
        Gelu,
        attention::{self, MhaCache, MhaOutput, MultiHeadAttention, MultiHeadAttentionConfig},
    },
    tensor::{
        Bool, DType, Device, Tensor,
        activation::{quiet_softmax, softmax},
        assert_shape,
        module::attention as fused_attention,
    },
};

use crate::{
    backward::{LayerOps, SharedInput, attention as blocks, cost, is_supported},
    config::AopConfig,
    layers::{dropout::Dropout, later, linear::MemAopLinear},
    rows::{Attention, Mask},
};

/// Configuration to create a [`MemAopMultiHeadAttention`] layer, with the fields of Burn's
/// [`MultiHeadAttentionConfig`]. To set an [`AopConfig`], use [`with_aop`](crate::with_aop).
#[derive(Config, Debug)]
pub struct MemAopMultiHeadAttentionConfig {
    /// The size of each linear layer.
    pub d_model: usize,
    /// The number of heads.
    pub n_heads: usize,
    /// The dropout rate.
    #[config(default = 0.1)]
    pub dropout: f64,
    /// The value that masked attention scores get.
    #[config(default = -1.0e4)]
    pub min_float: f64,
    /// Use "quiet softmax" instead of regular softmax.
    #[config(default = false)]
    pub quiet_softmax: bool,
    /// The type of function used to initialize neural network parameters.
    #[config(
        default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }"
    )]
    pub initializer: Initializer,
    /// Whether the key layer has a bias.
    #[config(default = true)]
    pub key_bias: bool,
    /// Whether the value layer has a bias.
    #[config(default = true)]
    pub value_bias: bool,
    /// Whether the query layer has a bias.
    #[config(default = true)]
    pub query_bias: bool,
    /// Whether the output layer has a bias.
    #[config(default = true)]
    pub output_bias: bool,
}

impl MemAopMultiHeadAttentionConfig {
    /// Creates a [`MemAopMultiHeadAttention`] with the parameters that
    /// [`MultiHeadAttentionConfig::init`] gives from the same random state.
    pub fn init(&self, device: &Device) -> MemAopMultiHeadAttention {
        let mha = MultiHeadAttentionConfig {
            d_model: self.d_model,
            n_heads: self.n_heads,
            dropout: self.dropout,
            min_float: self.min_float,
            quiet_softmax: self.quiet_softmax,
            initializer: self.initializer.clone(),
            key_bias: self.key_bias,
            value_bias: self.value_bias,
            query_bias: self.query_bias,
            output_bias: self.output_bias,
        };
        MemAopMultiHeadAttention::from_mha(mha.init(device), AopConfig::new())
    }
}

/// [`MultiHeadAttention`] whose four linear layers are [`MemAopLinear`].
///
/// Create it with [`MemAopMultiHeadAttentionConfig`], or from a [`MultiHeadAttention`] with
/// [`from_mha`](Self::from_mha).
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct MemAopMultiHeadAttention {
    /// Linear layer to transform the input features into the query space.
    pub query: MemAopLinear,
    /// Linear layer to transform the input features into the key space.
    pub key: MemAopLinear,
    /// Linear layer to transform the input features into the value space.
    pub value: MemAopLinear,
    /// Linear layer to transform the output features back to the original space.
    pub output: MemAopLinear,
    /// Dropout layer.
    pub dropout: Dropout,
    /// Burn's module holds it too, and does not use it either.
    pub activation: Gelu,
    /// The size of each linear layer.
    pub d_model: usize,
    /// The number of heads.
    pub n_heads: usize,
    /// The size of the key and query vectors.
    pub d_k: usize,
    /// The value that masked attention scores get.
    pub min_float: f64,
    /// Use "quiet softmax" instead of regular softmax.
    pub quiet_softmax: bool,
}

impl ModuleDisplay for MemAopMultiHeadAttention {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        content
            .add("d_model", &self.d_model)
            .add("n_heads", &self.n_heads)
            .add("d_k", &self.d_k)
            .add("dropout", &self.dropout.prob)
            .add("min_float", &self.min_float)
            .add("quiet_softmax", &self.quiet_softmax)
            .add_debug_attribute("aop", &self.query.aop())
            .optional()
    }
}

/// Input of [`MemAopMultiHeadAttention`], made like Burn's
/// [`MhaInput`](burn::nn::attention::MhaInput).
#[derive(Debug, Clone)]
pub struct MhaInput {
    query: Tensor<3>,
    key: Tensor<3>,
    value: Tensor<3>,
    /// Whether query and key are one tensor.
    is_self: bool,
    /// Whether key and value are one tensor.
    key_is_value: bool,
    pub(super) mask_pad: Option<Tensor<2, Bool>>,
    pub(super) mask_attn: Option<Tensor<3, Bool>>,
}

impl MhaInput {
    /// Makes one tensor the query, key and value.
    ///
    /// # Shape
    ///
    /// - tensor: `[batch_size, seq_length, d_model]`
    pub fn self_attn(tensor: Tensor<3>) -> Self {
        Self {
            is_self: true,
            ..Self::cross_attn(tensor.clone(), tensor)
        }
    }

    /// Makes an input whose key and value are one tensor.
    pub(super) fn cross_attn(query: Tensor<3>, memory: Tensor<3>) -> Self {
        Self {
            key_is_value: true,
            ..Self::new(query, memory.clone(), memory)
        }
    }

    /// Makes an input of three tensors.
    ///
    /// # Shapes
    ///
    /// - query: `[batch_size, seq_length_1, d_model]`
    /// - key, value: `[batch_size, seq_length_2, d_model]`
    pub fn new(query: Tensor<3>, key: Tensor<3>, value: Tensor<3>) -> Self {
        Self {
            query,
            key,
            value,
            is_self: false,
            key_is_value: false,
            mask_pad: None,
            mask_attn: None,
        }
    }

    /// Sets a mask, shape `[batch_size, seq_length_2]`, that is true at keys which no query attends
    /// to.
    pub fn mask_pad(mut self, mask_pad: Tensor<2, Bool>) -> Self {
        self.mask_pad = Some(mask_pad);
        self
    }

    /// Sets a mask that is true at pairs of a query and a key that it does not attend to, shape
    /// `[batch_size, seq_length_1, seq_length_2]`.
    pub fn mask_attn(mut self, mask_attn: Tensor<3, Bool>) -> Self {
        self.mask_attn = Some(mask_attn);
        self
    }
}

impl From<MhaInput> for attention::MhaInput {
    fn from(input: MhaInput) -> Self {
        let mut burns = Self::new(input.query, input.key, input.value);
        if let Some(mask) = input.mask_pad {
            burns = burns.mask_pad(mask);
        }
        if let Some(mask) = input.mask_attn {
            burns = burns.mask_attn(mask);
        }
        burns
    }
}

impl MemAopMultiHeadAttention {
    /// Takes the parameters of a [`MultiHeadAttention`], with their ids. The memories are empty.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn from_mha(mha: MultiHeadAttention, aop: AopConfig) -> Self {
        let layer = |linear, number| MemAopLinear::from_linear(linear, later(aop, number));
        Self {
            query: layer(mha.query, 0),
            key: layer(mha.key, 1),
            value: layer(mha.value, 2),
            output: layer(mha.output, 3),
            dropout: Dropout::from_dropout(mha.dropout, aop),
            activation: mha.activation,
            d_model: mha.d_model,
            n_heads: mha.n_heads,
            d_k: mha.d_k,
            min_float: mha.min_float,
            quiet_softmax: mha.quiet_softmax,
        }
    }

    /// Gives the parameters back, with their ids, and drops the memories.
    pub fn into_mha(self) -> MultiHeadAttention {
        self.to_mha()
    }

    /// Burn's module on the same parameters.
    pub(super) fn to_mha(&self) -> MultiHeadAttention {
        MultiHeadAttention {
            query: self.query.to_linear(),
            key: self.key.to_linear(),
            value: self.value.to_linear(),
            output: self.output.to_linear(),
            dropout: self.dropout.to_dropout(),
            activation: self.activation.clone(),
            d_model: self.d_model,
            n_heads: self.n_heads,
            d_k: self.d_k,
            min_float: self.min_float,
            quiet_softmax: self.quiet_softmax,
        }
    }

    /// Applies the forward pass on the input tensors.
    ///
    /// # Shapes
    ///
    /// - query: `[batch_size, seq_length_1, d_model]`
    /// - key: `[batch_size, seq_length_2, d_model]`
    /// - value: `[batch_size, seq_length_2, d_model]`
    /// - output: `[batch_size, seq_length_1, d_model]`
    ///
    /// # Panics
    ///
    /// Panics where [`MultiHeadAttention::forward`] does (if `query`, `key` and `value` do not fit
    /// each other or `d_model`), and where [`MemAopLinear::forward`] does.
    pub fn forward(&self, input: MhaInput) -> MhaOutput {
        let (query, key, value, masks) = self.projected(input);
        let (weights, context) = attend(query, key, value, masks, self.scaling(), &self.dropout);
        MhaOutput {
            weights,
            context: self.output.forward(context),
        }
    }

    /// The field `context` of [`forward`](Self::forward), which keeps no weights for the backward
    /// pass. It computes them again, unless the dropout [is Burn's](crate::nn::Dropout).
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_context(&self, input: MhaInput) -> Tensor<3> {
        let (query, key, value, masks) = self.projected(input);
        let attended = attended(query, key, value, masks, self.scaling(), &self.dropout);
        self.output.forward(attended)
    }

    fn scaling(&self) -> Scaling {
        Scaling {
            d_head: self.d_k,
            min_float: self.min_float,
            quiet_softmax: self.quiet_softmax,
        }
    }

    /// Queries, keys and values of each head, and the masks.
    fn projected(&self, input: MhaInput) -> (Tensor<4>, Tensor<4>, Tensor<4>, Masks) {
        let [batch_size, ..] = input.query.dims();
        let [_, seq_length_2, _] = input.key.dims();
        assert_shape!(input.query, [_, _, self.d_model]);
        assert_shape!(input.key, [batch_size, _, self.d_model]);
        assert_shape!(input.value, [batch_size, seq_length_2, self.d_model]);

        let shared = input.key_is_value.then(SharedInput::default);
        let shared_by_query = shared.as_ref().filter(|_| input.is_self);
        let project = |layer: &MemAopLinear, input, shared: Option<&SharedInput>| {
            heads(layer.forward_shared(input, shared), self.n_heads, self.d_k)
        };
        let query = project(&self.query, input.query, shared_by_query);
        let key = project(&self.key, input.key, shared.as_ref());
        let value = project(&self.value, input.value, shared.as_ref());

        let of_pairs = |mask: Tensor<3, Bool>| mask.unsqueeze_dim(1);
        let masks = [input.mask_pad.map(of_keys), input.mask_attn.map(of_pairs)];
        (query, key, value, masks)
    }

    /// Infers token by token, by [`MultiHeadAttention::forward_cache`] on the same parameters. A
    /// backward pass through it is exact.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_cache(&self, input: MhaInput, cache: &mut MhaCache) -> MhaOutput {
        self.to_mha().forward_cache(input.into(), cache)
    }
}

/// How scores become weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scaling {
    pub(super) d_head: usize,
    /// The value that masked scores get.
    pub(super) min_float: f64,
    pub(super) quiet_softmax: bool,
}

/// Masks that broadcast to the weights. They are true where a query does not attend to a key.
pub(super) type Masks = [Option<Tensor<4, Bool>>; 2];

/// The heads' outputs of [`attend`] side by side. Nothing is kept of the weights, unless the
/// dropout is Burn's.
pub(super) fn attended(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    masks: Masks,
    scaling: Scaling,
    dropout: &Dropout,
) -> Tensor<3> {
    let device = query.device();
    let supported = is_supported(device.as_dispatch());
    let dims = query.dims();
    // Flex takes no product without rows.
    if supported && dims.contains(&0) {
        return side_by_side(query, dims);
    }
    let drops = dropout.is_on(&device);
    let drawn = match supported && drops {
        true => dropout.next(&device, query.dtype()),
        false => None,
    };
    if !supported || drops && drawn.is_none() {
        return attend(query, key, value, masks, scaling, dropout).1;
    }
    // Burn's own attention may be fused on GPUs. It then computes in half precision, whatever the
    // type of its inputs is. It takes masked scores for minus infinity, so a query whose keys are all
    // masked would get no weights.
    let infers = !device.is_autodiff();
    let plain = masks.iter().all(Option::is_none) && !scaling.quiet_softmax;
    let half = matches!(query.dtype(), DType::F16 | DType::BF16);
    if infers && plain && half && !cost::is_cpu(device.as_dispatch()) {
        let context = fused_attention(query, key, value, None, None, Default::default());
        return side_by_side(context, dims);
    }
    let query = query / (scaling.d_head as f32).sqrt();
    let attention = Attention {
        min_float: scaling.min_float,
        quiet: scaling.quiet_softmax,
        dropout: drawn,
    };
    if infers {
        let [context, _] = blocks::forward([query, key, value], &masks, attention);
        return side_by_side(context, dims);
    }
    let [of_keys, of_pairs] = masks.map(|mask| match mask {
        None => Mask::<Dispatch>::None,
        Some(mask) => Mask::Some(mask.into_dispatch()),
    });
    let [query, key, value] = [query, key, value].map(Tensor::into_dispatch);
    let context = Dispatch::memaop_attention(query, key, value, of_keys, of_pairs, attention);
    side_by_side(Tensor::from_dispatch(context), dims)
}

/// The heads' outputs side by side, for queries of these dimensions.
fn side_by_side(context: Tensor<4>, queries: [usize; 4]) -> Tensor<3> {
    let [batch_size, n_heads, seq_length, d_head] = queries;
    context
        .swap_dims(1, 2)
        .reshape([batch_size, seq_length, n_heads * d_head])
}

/// Scaled dot-product attention. Returns the weights, `[batch_size, n_heads, seq_length_1,
/// seq_length_2]`, after dropout, and the heads' outputs side by side, `[batch_size, seq_length_1,
/// n_heads * d_head]`. Masks broadcast to the shape of the weights.
pub(super) fn attend(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    masks: Masks,
    scaling: Scaling,
    dropout: &Dropout,
) -> (Tensor<4>, Tensor<3>) {
    let dims = query.dims();
    let scores = query.matmul(key.transpose()) / (scaling.d_head as f32).sqrt();
    let masked = |scores: Tensor<4>, mask| scores.mask_fill(mask, scaling.min_float);
    let scores = masks.into_iter().flatten().fold(scores, masked);
    let weights = match scaling.quiet_softmax {
        true => quiet_softmax(scores, 3),
        false => softmax(scores, 3),
    };
    let weights = dropout.forward(weights);
    let context = side_by_side(weights.clone().matmul(value), dims);
    (weights, context)
}

/// The outputs of a layer for each head, `[batch_size, n_heads, seq_length, d_head]`.
pub(super) fn heads(projected: Tensor<3>, n_heads: usize, d_head: usize) -> Tensor<4> {
    let [batch_size, seq_length, _] = projected.dims();
    projected
        .reshape([batch_size, seq_length, n_heads, d_head])
        .swap_dims(1, 2)
}

/// A mask of keys, `[batch_size, seq_length]`, that broadcasts to the weights.
pub(super) fn of_keys(mask: Tensor<2, Bool>) -> Tensor<4, Bool> {
    let [batch_size, seq_length] = mask.dims();
    mask.reshape([batch_size, 1, 1, seq_length])
}
