use std::{any::Any, collections::VecDeque};

use burn::{
    config::Config,
    module::{Flag, Module, ModuleMapper, ModuleVisitor, Param},
    nn::{
        DropoutConfig, Initializer, Linear, LinearConfig,
        attention::{CrossAttention, CrossAttentionCache, CrossAttentionConfig},
    },
    tensor::{Bool, Device, Tensor, assert_shape},
};

use super::attention::{Scaling, attended, heads, of_keys};
use crate::{
    backward::SharedInput,
    config::AopConfig,
    layers::{dropout::Dropout, later, linear::MemAopLinear},
};

/// Configuration to create a [`MemAopCrossAttention`] layer, with the fields of Burn's
/// [`CrossAttentionConfig`]. To set an [`AopConfig`], use [`with_aop`](crate::with_aop).
#[derive(Config, Debug)]
pub struct MemAopCrossAttentionConfig {
    /// The size of the query's features.
    pub d_model: usize,
    /// The size of the context's features.
    pub d_context: usize,
    /// The number of heads of the query.
    pub n_heads: usize,
    /// The number of heads of key and value, which divides `n_heads`.
    pub n_heads_kv: usize,
    /// The size of a head.
    pub d_head: usize,
    /// The dropout rate.
    #[config(default = 0.1)]
    pub dropout: f64,
    /// The value that masked attention scores get.
    #[config(default = -1.0e4)]
    pub min_float: f64,
    /// Use "quiet softmax" instead of regular softmax.
    #[config(default = false)]
    pub quiet_softmax: bool,
}

impl MemAopCrossAttentionConfig {
    /// Creates a [`MemAopCrossAttention`] with the parameters that
    /// [`CrossAttentionConfig::init`] gives from the same
    /// random state.
    ///
    /// # Panics
    ///
    /// Panics if `n_heads_kv` does not divide `n_heads`.
    pub fn init(&self, device: &Device) -> MemAopCrossAttention {
        self.init_with(AopConfig::new(), device)
    }

    fn init_with(&self, aop: AopConfig, device: &Device) -> MemAopCrossAttention {
        let (heads, of_keys) = (self.n_heads, self.n_heads_kv);
        assert!(
            of_keys > 0 && heads.is_multiple_of(of_keys),
            "MemAopCrossAttentionConfig.n_heads_kv: it must divide n_heads, which is {heads}, but got {of_keys}"
        );
        // The initializer of Burn's module.
        let initializer = Initializer::KaimingUniform {
            gain: 1.0 / (self.d_head as f64).sqrt(),
            fan_out_only: false,
        };
        let layer = |d_input, d_output, number| {
            let linear = LinearConfig::new(d_input, d_output)
                .with_initializer(initializer.clone())
                .init(device);
            MemAopLinear::from_linear(linear, later(aop, number))
        };
        MemAopCrossAttention {
            query: layer(self.d_model, heads * self.d_head, 0),
            key: layer(self.d_context, of_keys * self.d_head, 1),
            value: layer(self.d_context, of_keys * self.d_head, 2),
            output: layer(heads * self.d_head, self.d_model, 3),
            dropout: Dropout::from_dropout(DropoutConfig::new(self.dropout).init(), aop),
            n_heads: heads,
            n_heads_kv: of_keys,
            d_head: self.d_head,
            min_float: self.min_float,
            quiet_softmax: self.quiet_softmax,
        }
    }
}

/// [`CrossAttention`] whose four linear layers are [`MemAopLinear`].
///
/// Create it with [`MemAopCrossAttentionConfig`], or from a [`CrossAttention`] with
/// [`from_cross_attention`](Self::from_cross_attention).
#[derive(Module, Debug)]
pub struct MemAopCrossAttention {
    query: MemAopLinear,
    key: MemAopLinear,
    value: MemAopLinear,
    output: MemAopLinear,
    dropout: Dropout,
    n_heads: usize,
    n_heads_kv: usize,
    d_head: usize,
    min_float: f64,
    quiet_softmax: bool,
}

impl MemAopCrossAttention {
    /// Takes the parameters of a [`CrossAttention`] that was made by an equal configuration, with
    /// their ids. It must not have adapters (LoRA), which cannot be told from other parameters.
    ///
    /// # Panics
    ///
    /// Panics if parameters have other shapes than the configuration says, if
    /// [`AopConfig::validate`] rejects `aop`, and where [`MemAopCrossAttentionConfig::init`] does.
    pub fn from_cross_attention(
        attention: CrossAttention,
        config: &MemAopCrossAttentionConfig,
        aop: AopConfig,
    ) -> Self {
        let device = attention.devices().swap_remove(0);
        let mut parameters = Parameters(VecDeque::new());
        attention.visit(&mut parameters);
        config.init_with(aop, &device).map(&mut parameters)
    }

    /// Gives the parameters back, with their ids, and drops the memories.
    pub fn into_cross_attention(self) -> CrossAttention {
        let [d_model, _] = self.query.weight.lazy_shape().dims();
        let [d_context, _] = self.key.weight.lazy_shape().dims();
        let config = CrossAttentionConfig {
            d_model,
            d_context,
            n_heads: self.n_heads,
            n_heads_kv: self.n_heads_kv,
            d_head: self.d_head,
            dropout: self.dropout.prob,
            min_float: self.min_float,
            quiet_softmax: self.quiet_softmax,
        };
        // The weights of this module are never made.
        let burns = config.init(&self.query.weight.lazy_device());
        let mut parameters = Parameters(VecDeque::new());
        for layer in [self.query, self.key, self.value, self.output] {
            let Linear { weight, bias } = layer.into_linear();
            parameters.0.push_back(Box::new(weight));
            parameters.0.extend(bias.map(|bias| Box::new(bias) as _));
        }
        parameters.0.push_back(Box::new(self.dropout.training));
        burns.map(&mut parameters)
    }

    /// Attends from each token of the query to the tokens of the context that the mask leaves.
    ///
    /// # Shapes
    ///
    /// - query: `[batch_size, seq_length_1, d_model]`
    /// - context: `[batch_size, seq_length_2, d_context]`
    /// - mask: `[batch_size, seq_length_2]`, true at tokens which no query attends to
    /// - output: `[batch_size, seq_length_1, d_model]`
    ///
    /// # Panics
    ///
    /// Panics if the batch size of `context` differs from that of `query`, and where
    /// [`MemAopLinear::forward`] does.
    pub fn forward(
        &self,
        query: Tensor<3>,
        context: Tensor<3>,
        mask: Option<Tensor<2, Bool>>,
    ) -> Tensor<3> {
        let [batch, ..] = query.dims();
        assert_shape!(context, [batch, _, _]);

        let shared = SharedInput::default();
        let query = heads(self.query.forward(query), self.n_heads, self.d_head);
        let [key, value] = [&self.key, &self.value].map(|layer| {
            let projected = layer.forward_shared(context.clone(), Some(&shared));
            self.for_each_query_head(heads(projected, self.n_heads_kv, self.d_head))
        });
        let scaling = Scaling {
            d_head: self.d_head,
            min_float: self.min_float,
            quiet_softmax: self.quiet_softmax,
        };
        let masks = [mask.map(of_keys), None];
        let attended = attended(query, key, value, masks, scaling, &self.dropout);
        self.output.forward(attended)
    }

    /// Infers with the keys and values of the first call, which the cache keeps, by
    /// [`CrossAttention::forward_cache`] on the same parameters. A backward pass through it is
    /// exact.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_cache(
        &self,
        query: Tensor<3>,
        context: Tensor<3>,
        mask: Option<Tensor<2, Bool>>,
        cache: &mut CrossAttentionCache,
    ) -> Tensor<3> {
        self.clone()
            .into_cross_attention()
            .forward_cache(query, context, mask, cache)
    }

    /// Repeats each head of keys or values for the heads of the query that it serves.
    fn for_each_query_head(&self, tensor: Tensor<4>) -> Tensor<4> {
        let repeats = self.n_heads / self.n_heads_kv;
        if repeats == 1 {
            return tensor;
        }
        let [batch_size, heads, length, d_head] = tensor.dims();
        tensor
            .reshape([batch_size, heads, 1, length, d_head])
            .expand([batch_size, heads, repeats, length, d_head])
            .reshape([batch_size, heads * repeats, length, d_head])
    }
}

/// The parameters of a cross-attention in the order of its fields. Those of Burn's module are
/// private, so a visitor and a mapper are the only way to them.
struct Parameters(VecDeque<Box<dyn Any>>);

impl ModuleVisitor for Parameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push_back(Box::new(param.clone()));
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        self.0.push_back(Box::new(flag.clone()));
    }
}

impl ModuleMapper for Parameters {
    fn map_flag(&mut self, before: Param<Flag>) -> Param<Flag> {
        let taken = self.0.pop_front();
        let taken = taken.and_then(|flag| flag.downcast::<Param<Flag>>().ok());
        taken.map_or(before, |flag| *flag)
    }

    fn map_float<const D: usize>(&mut self, before: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let taken = self.0.pop_front();
        let taken = taken.and_then(|param| param.downcast::<Param<Tensor<D>>>().ok());
        let taken = taken.filter(|taken| taken.lazy_shape() == before.lazy_shape());
        *taken.expect("cross-attention: the parameters must have the shapes of the configuration, and no adapters")
    }
}
