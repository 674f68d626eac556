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
//! `Conv2d`, `Relu`, `Gelu`, `SwiGlu` and the modules of attention and transformers are those of
//! burn-memaop. So is `nn` in the [`prelude`]. [`memaop`] has what only burn-memaop has:
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
//! let model = memaop::with_aop(model, |_, aop| aop.with_stored_input(memaop::StoredInput::Int8));
//! println!("{}", memaop::summary(&model)); // what the swap has reached
//! # assert!(memaop::summary(&model).burns().is_empty());
//! ```
//!
//! Records and configuration files of a project load before and after the swap.
//!
//! # What does not compile any more
//!
//! | What a source has | What to write instead |
//! |---|---|
//! | `Linear { weight, bias }` | `Linear::from_linear(memaop::burn::nn::Linear { weight, bias }, AopConfig::new())` |
//! | `Gelu { approximate: true }` | `Gelu::new_approximate()` |
//! | `Activation::Gelu(Gelu::new())`, also of `Relu`, `SwiGlu` and in `ActivationConfig` | `Gelu::new().into()` |
//! | a `Linear` for code outside of the project that takes Burn's | `linear.into_linear()` |
//! | a decoder's layer that infers with a cache | the decoder |
//!
//! [`memaop::burn`] is Burn itself, with its own layers. The standard library is always used. Models
//! print the names of burn-memaop's layers.

pub use burn_memaop as memaop;
pub use burns::*;

/// [`burn::nn`](burns::nn) with the layers of burn-memaop in the places of Burn's.
pub mod nn {
    pub use burn_memaop::nn::*;
}

/// [`burn::prelude`](burns::prelude), whose [`nn`](crate::nn) has the layers of burn-memaop.
pub mod prelude {
    pub use burns::prelude::*;

    pub use crate::nn;
}
