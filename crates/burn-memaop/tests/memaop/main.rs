//! One binary for all integration tests of the crate.

#![cfg(all(feature = "flex", feature = "autodiff"))]
#![allow(clippy::needless_range_loop)] // The oracle is written index by index, as the formulas are.

mod activation;
mod attention;
mod auto;
mod backends;
mod broken_values;
mod convolution;
mod convolution_swap;
mod dropout;
mod errors;
mod exact_steps;
mod images;
mod input_gradient;
mod layer;
mod memory;
mod norm;
mod observe;
mod operation;
mod optim;
mod oracle;
mod packed;
mod record;
mod selection;
mod sharing;
mod summary;
mod support;
mod threads;
mod transformer;
mod unbiased;
