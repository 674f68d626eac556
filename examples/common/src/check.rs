//! Rules that many options share.

use anyhow::{Result, ensure};

/// Whether all of these are at least 1.
///
/// # Errors
///
/// The first option that is 0.
pub fn at_least_one(options: &[(&str, usize)]) -> Result<()> {
    for (name, value) in options {
        ensure!(*value > 0, "--{name} must be at least 1, but got 0");
    }
    Ok(())
}

/// Whether a value is positive and finite, as a learning rate is.
///
/// # Errors
///
/// The option and its value, if it is not.
pub fn positive(name: &str, value: f64) -> Result<()> {
    ensure!(
        value.is_finite() && value > 0.0,
        "--{name} must be positive and finite, but got {value}"
    );
    Ok(())
}

/// Whether the width of a transformer can be shared out to its heads.
///
/// # Errors
///
/// Both values, if it cannot.
pub fn heads(width: usize, heads: usize) -> Result<()> {
    at_least_one(&[("width", width), ("heads", heads)])?;
    ensure!(
        width.is_multiple_of(heads),
        "--width must be a multiple of --heads {heads}, but got {width}"
    );
    Ok(())
}
