//! Trainings through burn-train.

#![cfg(all(feature = "train", feature = "flex"))]

mod devices;
mod metrics;
mod resume;
mod support;
