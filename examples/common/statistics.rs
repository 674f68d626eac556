//! The mean of a few runs, and its confidence interval.

/// The mean and its standard error.
pub fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares = values.iter().map(|value| (value - mean).powi(2));
    let variance = squares.sum::<f64>() / (count - 1.0).max(1.0);
    (mean, (variance / count).sqrt())
}

/// Half the width of the 95 % confidence interval of the mean, by Student's t; none for one value.
pub fn confidence(values: &[f64]) -> Option<f64> {
    // The 97.5 % points of Student's t for 1, 2, ... degrees of freedom.
    const STUDENT: [f64; 10] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    ];
    let degrees = values.len().checked_sub(2)?;
    let factor = STUDENT.get(degrees).copied().unwrap_or(2.228);
    Some(factor * mean_and_error(values).1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_values_have_the_interval_of_the_textbook() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0];
        let (mean, error) = mean_and_error(&values);
        assert!((mean - 3.0).abs() < 1e-12 && (error - 0.5f64.sqrt()).abs() < 1e-12);
        assert!((confidence(&values).unwrap() - 1.963).abs() < 1e-3);
        assert_eq!(confidence(&[1.0]), None);
    }
}
