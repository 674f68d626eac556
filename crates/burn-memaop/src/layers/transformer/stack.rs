//! What the encoder and the decoder have alike: their configuration, their fields, and the way from
//! Burn's module and back.

/// Defines a stack of blocks, with `$linear` linear layers each, and its configuration.
macro_rules! stack {
    (
        $module:ident of $layer:ident with $config:ident,
        from $burns:ident with $burns_config:ident,
        by $from:ident, $into:ident, $to:ident,
        $linear:literal linear layers, first $first:ident
    ) => {
        #[doc = concat!("Configuration to create a [`", stringify!($module), "`] layer, with the")]
        #[doc = concat!("fields of Burn's [`", stringify!($burns_config), "`]. To set an")]
        #[doc = "[`AopConfig`], use [`with_aop`](crate::with_aop)."]
        #[derive(Config, Debug)]
        pub struct $config {
            /// The size of the model.
            pub d_model: usize,
            /// The size of the position-wise feed-forward network.
            pub d_ff: usize,
            /// The number of attention heads.
            pub n_heads: usize,
            /// The number of layers.
            pub n_layers: usize,
            /// The dropout rate.
            #[config(default = 0.1)]
            pub dropout: f64,
            /// Whether layer norm is applied before the other modules instead of after them.
            #[config(default = false)]
            pub norm_first: bool,
            /// Use "quiet softmax" instead of regular softmax.
            #[config(default = false)]
            pub quiet_softmax: bool,
            /// The type of function used to initialize neural network parameters.
            #[config(
                default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }"
            )]
            pub initializer: Initializer,
            /// The activation function used in the position-wise feed-forward network.
            #[config(default = "ActivationConfig::Gelu")]
            pub activation: ActivationConfig,
            /// The epsilon value for layer normalization.
            #[config(default = 1e-5)]
            pub layer_norm_eps: f64,
        }

        impl $config {
            #[doc = concat!("Creates a [`", stringify!($module), "`] with the parameters that")]
            #[doc = concat!("[`", stringify!($burns_config), "::init`] gives from the same random")]
            #[doc = "state."]
            pub fn init(&self, device: &Device) -> $module {
                $module::$from(self.burns().init(device), AopConfig::new())
            }

            /// Burn's own configuration.
            fn burns(&self) -> $burns_config {
                $burns_config {
                    d_model: self.d_model,
                    d_ff: self.d_ff,
                    n_heads: self.n_heads,
                    n_layers: self.n_layers,
                    dropout: self.dropout,
                    norm_first: self.norm_first,
                    quiet_softmax: self.quiet_softmax,
                    initializer: self.initializer.clone(),
                    activation: self.activation.clone(),
                    layer_norm_eps: self.layer_norm_eps,
                }
            }
        }

        #[doc = concat!("[`", stringify!($burns), "`] whose linear layers are")]
        #[doc = "[`MemAopLinear`](crate::MemAopLinear)."]
        #[doc = ""]
        #[doc = concat!("Create it with [`", stringify!($config), "`], or from a")]
        #[doc = concat!("[`", stringify!($burns), "`] with")]
        #[doc = concat!("[`", stringify!($from), "`](Self::", stringify!($from), ").")]
        #[derive(Module, Debug)]
        #[module(custom_display)]
        pub struct $module {
            /// The layers, one above the other.
            pub layers: Vec<$layer>,
            /// The size of the model.
            pub d_model: usize,
            /// The size of the position-wise feed-forward network.
            pub d_ff: usize,
            /// The number of attention heads.
            pub n_heads: usize,
            /// The number of layers.
            pub n_layers: usize,
            /// The dropout rate.
            pub dropout: f64,
            /// Whether layer norm is applied before the other modules instead of after them.
            pub norm_first: bool,
            /// Use "quiet softmax" instead of regular softmax.
            pub quiet_softmax: bool,
        }

        impl ModuleDisplay for $module {
            fn custom_settings(&self) -> Option<DisplaySettings> {
                DisplaySettings::new()
                    .with_new_line_after_attribute(false)
                    .optional()
            }

            fn custom_content(&self, content: Content) -> Option<Content> {
                let content = content
                    .add("d_model", &self.d_model)
                    .add("d_ff", &self.d_ff)
                    .add("n_heads", &self.n_heads)
                    .add("n_layers", &self.n_layers)
                    .add("dropout", &self.dropout)
                    .add("norm_first", &self.norm_first)
                    .add("quiet_softmax", &self.quiet_softmax);
                match self.layers.first() {
                    None => content,
                    Some(layer) => content.add_debug_attribute("aop", &layer.$first.query.aop()),
                }
                .optional()
            }
        }

        impl $module {
            #[doc = concat!("Takes the parameters of a [`", stringify!($burns), "`], with their")]
            #[doc = "ids. The memories are empty."]
            #[doc = ""]
            #[doc = "# Panics"]
            #[doc = ""]
            #[doc = "Panics if [`AopConfig::validate`] rejects `aop`."]
            pub fn $from(stack: $burns, aop: AopConfig) -> Self {
                let layers = (0..).zip(stack.layers).map(|(number, layer)| {
                    $layer::from_layer(layer, later(aop, $linear * number))
                });
                Self {
                    layers: layers.collect(),
                    d_model: stack.d_model,
                    d_ff: stack.d_ff,
                    n_heads: stack.n_heads,
                    n_layers: stack.n_layers,
                    dropout: stack.dropout,
                    norm_first: stack.norm_first,
                    quiet_softmax: stack.quiet_softmax,
                }
            }

            /// Gives the parameters back, with their ids, and drops the memories.
            pub fn $into(self) -> $burns {
                self.$to()
            }

            /// Burn's module on the same parameters.
            fn $to(&self) -> $burns {
                $burns {
                    layers: self.layers.iter().map($layer::to_layer).collect(),
                    d_model: self.d_model,
                    d_ff: self.d_ff,
                    n_heads: self.n_heads,
                    n_layers: self.n_layers,
                    dropout: self.dropout,
                    norm_first: self.norm_first,
                    quiet_softmax: self.quiet_softmax,
                }
            }
        }
    };
}

pub(super) use stack;
