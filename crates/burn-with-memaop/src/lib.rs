#![warn(missing_docs)]
#![cfg_attr(docsrs, feature(doc_cfg))]

//! [Burn](https://burn.dev), with the layers of [burn-memaop](memaop) in the places of its own.
//!
//! One line of `Cargo.toml` swaps the layers of a whole project, whose sources stay as they are:
//!
//! ```toml
//! [dependencies]
//! # was: burn = { version = "0.22", features = ["flex", "train"] }
//! burn = { package = "burn-with-memaop", version = "0.1", features = ["flex", "train"] }
//! ```
//!
//! The crate has all features and all items of burn. [`nn`] is [`memaop::nn`], where `Linear`,
//! `Conv2d`, `Dropout`, `LayerNorm`, `Relu`, `Gelu`, `SwiGlu` and the modules of attention and
//! transformers are those of burn-memaop. So is `nn` in the [`prelude`]. [`memaop`] has what only
//! burn-memaop has.
//!
//! By default a linear layer computes the gradient of its weight from some rows of the batch. It
//! draws these rows at random, and the expected gradient is the exact one. For exact gradients, set
//! [`OuterProducts::All`](memaop::OuterProducts::All):
//!
//! ```
//! use burn::{memaop, prelude::*};
//!
//! #[derive(Module, Debug)]
//! struct Model {
//!     hidden: nn::Linear,
//!     output: nn::Linear,
//! }
//!
//! let device = Device::flex().autodiff();
//! let model = Model {
//!     hidden: nn::LinearConfig::new(784, 512).init(&device),
//!     output: nn::LinearConfig::new(512, 512).init(&device),
//! };
//! let model = memaop::with_aop(model, |_, aop| {
//!     aop.with_outer_products(memaop::OuterProducts::All) // exact gradients
//!         .with_stored_input(memaop::StoredInput::Int8) // inputs in 8 bits
//! });
//! println!("{}", memaop::summary(&model)); // all modules with weights
//! # assert!(memaop::summary(&model).burns().is_empty());
//! ```
//!
//! Configuration files load before and after the swap. So do records, unless a model saves the
//! [state](memaop::AopConfig::saved_state) of its layers.
//!
//! # What does not compile any more
//!
//! | What a source has | What to write instead |
//! |---|---|
//! | `Linear { weight, bias }` | `Linear::from_linear(memaop::burn::nn::Linear { weight, bias }, memaop::AopConfig::new())` |
//! | a literal of a `Conv2d` | the same with `Conv2d::from_conv2d` |
//! | `Dropout { prob, training }` | `DropoutConfig::new(prob).init()` |
//! | a literal of a module of transformers | the same with `from_mha`, `from_pwff`, `from_layer`, `from_encoder` |
//! | `Gelu { approximate: true }` | `Gelu::new_approximate()` |
//! | `Activation::Gelu(Gelu::new())`, and likewise `Relu` and `SwiGlu` | `Gelu::new().into()`, which is Burn's module |
//! | `ActivationConfig::SwiGlu(config)`, `NormalizationConfig::Layer(config)` | `config.into()`, which is Burn's configuration |
//! | a `Linear` for code of others that takes Burn's | `linear.into_linear()`, and likewise `into_dropout`, `into_layer_norm` |
//! | `forward_autoregressive_inference` of one layer of a decoder | the same of the decoder |
//!
//! [`memaop::burn`] is Burn itself, with its own layers. The feature `std` is always on. A printed
//! model shows names such as `MemAopLinear`.

pub use burn_memaop as memaop;
pub use burns::*;

/// [`burn::nn`](burns::nn) with the layers of burn-memaop in the places of Burn's.
pub mod nn {
    pub use burn_memaop::nn::*;
}

/// [`burn::prelude`](burns::prelude), whose [`nn`] has the layers of burn-memaop.
pub mod prelude {
    pub use burns::prelude::*;

    pub use crate::nn;
}
