//! Rules that many options share.

use anyhow::{Result, ensure};

/// Checks that all of these options are at least 1.
///
/// # Errors
///
/// Returns an error that names the first option which is 0.
pub fn at_least_one(options: &[(&str, usize)]) -> Result<()> {
    for (name, value) in options {
        ensure!(*value > 0, "--{name} must be at least 1, but got 0");
    }
    Ok(())
}

/// Checks that the value of an option is positive and finite.
///
/// # Errors
///
/// Returns an error with the name and the value of the option if it is not.
pub fn positive(name: &str, value: f64) -> Result<()> {
    ensure!(
        value.is_finite() && value > 0.0,
        "--{name} must be positive and finite, but got {value}"
    );
    Ok(())
}

/// Checks that the heads of a transformer can share its width evenly.
///
/// # Errors
///
/// Returns an error with both values if they cannot.
pub fn heads(width: usize, heads: usize) -> Result<()> {
    at_least_one(&[("width", width), ("heads", heads)])?;
    ensure!(
        width.is_multiple_of(heads),
        "--width must be a multiple of --heads {heads}, but got {width}"
    );
    Ok(())
}
