//! Random bits of a counter-based generator: a pure function of seed, step and row. They need no
//! state but the number of the step, and every device computes the same ones.

use super::packing::mixed;

pub(crate) const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
pub(crate) const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011).
pub(crate) fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let wide = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    for _ in 0..10 {
        let (high0, low0) = wide(MULTIPLIERS[0], counter[0]);
        let (high1, low1) = wide(MULTIPLIERS[1], counter[2]);
        counter = [
            high1 ^ counter[1] ^ key[0],
            low1,
            high0 ^ counter[3] ^ key[1],
            low0,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The key of a stream of random bits that is independent of the bits of the seed itself.
///
/// - The place of a layer in its model is the stream that rounds an activation's derivative, 0 unless
///   `with_aop` has named it. The layer beside it rounds its input by the seed itself.
/// - The number of an interval is the stream that draws which pass of the interval is measured.
/// - The place of a layer in the autodiff graph is the stream that draws rows of the gradient of
///   its input. Rows that are left out are missing in all layers below. If these drew by the same
///   bits, they would know the draw that shaped their gradient, and their estimates would be
///   biased.
pub(crate) fn stream(seed: u64, number: u64) -> u64 {
    let [low, high] = [number as u32, (number >> 32) as u32];
    let key = [seed as u32, (seed >> 32) as u32];
    let [first, second, ..] = philox4x32([low, high, u32::MAX, 0], key);
    u64::from(first) | u64::from(second) << 32
}

/// The random words of one step. Those of a row are the Philox block with the counter
/// `(row, 0, step)` and the seed as key: the first is for the draw, the second for the sign of a
/// balanced memory, the fourth for rounding.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Random {
    pub(crate) seed: u64,
    pub(crate) step: u64,
}

impl Random {
    /// Seed and step, the lower half of each first.
    pub(crate) fn halves(&self) -> [[u32; 2]; 2] {
        [self.seed, self.step].map(|value| [value as u32, (value >> 32) as u32])
    }

    fn block(&self, row: usize) -> [u32; 4] {
        let [seed, [low, high]] = self.halves();
        philox4x32([row as u32, 0, low, high], seed)
    }

    /// The key of the bits that round the values of `row`, independent of its other words.
    pub(crate) fn rounding(&self, row: usize) -> u32 {
        self.block(row)[3]
    }

    /// The rows in a random order.
    pub(crate) fn permutation(&self, rows: usize) -> Permutation {
        let [seed, [low, high]] = self.halves();
        Permutation::new(rows, philox4x32([0, 1, low, high], seed))
    }

    /// A uniform 32-bit word for `row`.
    pub(crate) fn word(&self, row: usize) -> u32 {
        self.block(row)[0]
    }

    /// A uniform number for `row`, in `(0, 1)`.
    pub(crate) fn uniform(&self, row: usize) -> f64 {
        (f64::from(self.word(row)) + 0.5) / f64::from(1u32 << 16).powi(2)
    }

    /// A number of the standard Gumbel distribution for `row`, from the upper 23 bits of its word.
    /// With the half added, these are exact in an `f32` and stay clear of 0 and 1.
    pub(crate) fn gumbel(&self, row: usize) -> f64 {
        let uniform = (f64::from(self.word(row) >> 9) + 0.5) / f64::from(1u32 << 23);
        -(-uniform.ln()).ln()
    }

    /// 1 or -1 for `row`, independent of its word.
    pub(crate) fn sign(&self, row: usize) -> f64 {
        match self.block(row)[1] >> 31 {
            0 => 1.0,
            _ => -1.0,
        }
    }
}

/// A dropout by random bits of a pass, which a backward pass can draw again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout {
    pub(crate) random: Random,
    /// The probability that a value becomes zero.
    pub(crate) prob: f64,
    /// The number of the first row.
    pub(crate) first: usize,
}

impl Dropout {
    /// The number of upper bits of a random word that decide on a value.
    pub(crate) const BITS: u32 = 24;

    /// A value becomes zero if these bits of its word are below this number.
    pub(crate) fn threshold(&self) -> u32 {
        let all = 1u32 << Self::BITS;
        ((self.prob * f64::from(all)).round() as u32).min(all - 1)
    }

    /// What the other values are multiplied by, so that the expected value stays.
    pub(crate) fn scale(&self) -> f32 {
        let all = 1u32 << Self::BITS;
        (f64::from(all) / f64::from(all - self.threshold())) as f32
    }

    /// The factors of the values of a row, which is counted from the first one.
    #[inline(always)]
    pub(crate) fn factors(&self, row: usize) -> impl Fn(usize) -> f32 + use<> {
        let key = self.random.rounding(self.first + row);
        let (threshold, scale) = (self.threshold(), self.scale());
        move |column| match mixed(key, column as u32) >> (32 - Self::BITS) < threshold {
            true => 0.0,
            false => scale,
        }
    }
}

/// A permutation of `0..rows` that is a pure function of the place, so that any device can compute
/// it. Multiplications by odd numbers, additions and shifts permute the numbers below the next
/// power of two. What falls outside is sent on until it falls inside, on average less than once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Permutation {
    pub(crate) rows: u32,
    /// As many bits as the last row needs, 1 at least.
    pub(crate) mask: u32,
    pub(crate) shifts: [u32; 2],
    pub(crate) keys: [u32; 4],
}

impl Permutation {
    fn new(rows: usize, keys: [u32; 4]) -> Self {
        let rows = rows as u32;
        let bits = rows.saturating_sub(1).max(1).ilog2() + 1;
        Self {
            rows,
            mask: u32::MAX >> (32 - bits),
            shifts: [bits.div_ceil(2), (bits / 3).max(1)],
            keys,
        }
    }

    /// The row at a place.
    pub(crate) fn row(&self, place: usize) -> usize {
        let mut row = place as u32;
        loop {
            for key in self.keys {
                row = row.wrapping_mul(key | 1).wrapping_add(key >> 16) & self.mask;
                row ^= row >> self.shifts[0];
                row = row.wrapping_mul(key >> 8 | 1).wrapping_add(key >> 24) & self.mask;
                row ^= row >> self.shifts[1];
            }
            if row < self.rows {
                return row as usize;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_known_answers() {
        let known = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in known {
            assert_eq!(philox4x32(counter, key), expected);
        }
    }

    #[test]
    fn permutations_hold_every_row_once_and_are_all_different() {
        for rows in [1, 2, 3, 4, 5, 31, 32, 33, 1000, 4097] {
            let permutation = |step| {
                let permutation = Random { seed: 3, step }.permutation(rows);
                (0..rows)
                    .map(|place| permutation.row(place))
                    .collect::<Vec<_>>()
            };
            let mut sorted = permutation(7);
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..rows), "{rows}");
            assert!(rows < 5 || permutation(7) != permutation(8), "{rows}");
        }
    }

    /// Every row is as often at every place, and every pair as often at neighbouring places.
    #[test]
    fn permutations_are_even() {
        let (rows, draws) = (12, 12_000);
        let mut at = vec![vec![0.0; rows]; rows];
        let mut next = vec![vec![0.0; rows]; rows];
        for step in 0..draws {
            let permutation = Random { seed: 3, step }.permutation(rows);
            for place in 0..rows {
                let row = permutation.row(place);
                at[place][row] += 1.0;
                next[row][permutation.row((place + 1) % rows)] += 1.0;
            }
        }
        let chi_square = |counts: &[Vec<f64>], expected: f64| -> f64 {
            let cells = counts.iter().flatten().filter(|&&count| count > 0.0);
            cells
                .map(|count| (count - expected).powi(2) / expected)
                .sum()
        };
        // The 99.9 % points of chi-square with 121 and 120 degrees of freedom.
        let expected = draws as f64 / rows as f64;
        assert!(chi_square(&at, expected) < 175.0, "{at:?}");
        let expected = draws as f64 / (rows - 1) as f64;
        assert!(chi_square(&next, expected) < 174.0, "{next:?}");
    }

    #[test]
    fn every_part_of_the_counter_matters() {
        let word = |seed, step, row| Random { seed, step }.word(row);
        let base = word(1, 1, 1);
        for other in [
            word(2, 1, 1),
            word(1 << 32 | 1, 1, 1),
            word(1, 2, 1),
            word(1, 1 << 32 | 1, 1),
            word(1, 1, 2),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn gumbel_numbers_have_their_mean_and_variance() {
        let noise = Random { seed: 3, step: 9 };
        let draws = 100_000;
        let values: Vec<f64> = (0..draws).map(|row| noise.gumbel(row)).collect();
        let mean = values.iter().sum::<f64>() / draws as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / draws as f64;
        // Five standard errors around Euler's constant and pi^2 / 6.
        assert!((mean - 0.577_216).abs() < 0.02, "mean {mean}");
        assert!((variance - 1.644_934).abs() < 0.06, "variance {variance}");
    }

    #[test]
    fn signs_are_even_and_independent_of_the_words() {
        let noise = Random { seed: 3, step: 9 };
        let draws = 100_000;
        let sum = |value: &dyn Fn(usize) -> f64| (0..draws).map(value).sum::<f64>();
        // Five standard errors.
        assert!(sum(&|row| noise.sign(row)).abs() < 5.0 * f64::from(draws as u32).sqrt());
        let product = sum(&|row| noise.sign(row) * (noise.uniform(row) - 0.5) * 12f64.sqrt());
        assert!(product.abs() < 5.0 * f64::from(draws as u32).sqrt());
    }
}
