//! The norms of rows, right also where squares overflow or underflow.

/// The number of sums that are added up side by side: enough for several of the widest registers.
pub(super) const LANES: usize = 32;

/// The sums of squares that neither overflow nor lose what underflows.
pub(super) const SAFE: std::ops::RangeInclusive<f32> = 1e-20..=1e30;

/// The norm of a row. It is not finite if a value of the row is not.
#[inline(always)]
pub(super) fn norm(row: &[f32]) -> f32 {
    root(square_sum(row), row)
}

/// The norms of two rows of one width, in one pass over both.
#[inline(always)]
pub(super) fn norms(first: &[f32], second: &[f32]) -> [f32; 2] {
    let mut sums = [[0.0; LANES]; 2];
    let (chunks, rest) = first.as_chunks::<LANES>();
    let (second_chunks, second_rest) = second.as_chunks::<LANES>();
    for (first, second) in chunks.iter().zip(second_chunks) {
        for lane in 0..LANES {
            sums[0][lane] += first[lane] * first[lane];
            sums[1][lane] += second[lane] * second[lane];
        }
    }
    let of_rest = |rest: &[f32]| rest.iter().fold(0.0, |sum, v| sum + v * v);
    let [of_first, of_second] = sums.map(total);
    [
        root(of_first + of_rest(rest), first),
        root(of_second + of_rest(second_rest), second),
    ]
}

/// The norm of a row whose squares have this sum.
#[inline(always)]
pub(super) fn root(sum: f32, row: &[f32]) -> f32 {
    match SAFE.contains(&sum) {
        true => sum.sqrt(),
        false => norm_by_the_largest(row),
    }
}

/// The norm of a row whose squares overflow or underflow.
#[inline(always)]
fn norm_by_the_largest(row: &[f32]) -> f32 {
    let largest = largest(row);
    if largest == 0.0 || !largest.is_finite() {
        return largest;
    }
    let parts = row.iter().map(|value| value / largest);
    parts.map(|part| part * part).sum::<f32>().sqrt() * largest
}

/// The largest of absolute values. It is not finite if a value is not.
#[inline(always)]
pub(super) fn largest(values: &[f32]) -> f32 {
    // Without the sign, the bits of numbers are in their order, then come infinity and NaN.
    let sizes = values.iter().map(|value| value.to_bits() & 0x7FFF_FFFF);
    f32::from_bits(sizes.fold(0, u32::max))
}

#[inline(always)]
fn square_sum(row: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += chunk[lane] * chunk[lane];
        }
    }
    total(sums) + rest.iter().fold(0.0, |sum, v| sum + v * v)
}

/// The sums are added in halves, so that the lanes stay in registers.
#[inline(always)]
pub(super) fn total(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::norm;

    #[test]
    fn norms_are_right_where_squares_are_not() {
        for scale in [1e-38, 1e-25, 1e-10, 1.0, 1e20, 5e37] {
            for width in [1, 31, 32, 100] {
                let mut row = vec![0.0; width];
                (row[0], row[width - 1]) = (3.0 * scale, 3.0 * scale);
                let expected = 3.0 * scale * if width == 1 { 1.0 } else { 2f32.sqrt() };
                let found = norm(&row);
                assert!(
                    (found / expected - 1.0).abs() < 1e-5,
                    "{scale} {width}: {found}"
                );
            }
        }
        assert_eq!((norm(&[]), norm(&[0.0; 40])), (0.0, 0.0));
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!norm(&[broken]).is_finite() && !norm(&[1.0, broken, 0.0]).is_finite());
        }
    }
}
