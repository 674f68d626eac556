//! The random bits of `rows/random.rs` on the device: the same words, and so the same rows.

use burn_cubecl::cubecl;
use cubecl::prelude::*;

use crate::rows::random::{MULTIPLIERS, Permutation, Random, WEYL};

#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct RandomBits {
    seed_low: u32,
    seed_high: u32,
    step_low: u32,
    step_high: u32,
}

pub(super) fn arg(random: Random) -> RandomBitsLaunch {
    let [seed, step] = random.halves();
    RandomBitsLaunch::new(seed[0], seed[1], step[0], step[1])
}

#[cube]
impl RandomBits {
    /// The Philox block of a row: words for the draw, for the sign, for no use, and for rounding.
    fn words(&self, row: u32) -> (u32, u32, u32, u32) {
        let mut c0 = row;
        let mut c1 = 0u32;
        let mut c2 = self.step_low;
        let mut c3 = self.step_high;
        let mut k0 = self.seed_low;
        let mut k1 = self.seed_high;
        #[unroll]
        for _ in 0..10u32 {
            let high0 = c0.mul_hi(comptime!(MULTIPLIERS[0]).runtime());
            let low0 = c0 * comptime!(MULTIPLIERS[0]);
            let high1 = c2.mul_hi(comptime!(MULTIPLIERS[1]).runtime());
            let low1 = c2 * comptime!(MULTIPLIERS[1]);
            c0 = high1 ^ c1 ^ k0;
            c1 = low1;
            c2 = high0 ^ c3 ^ k1;
            c3 = low0;
            k0 += comptime!(WEYL[0]);
            k1 += comptime!(WEYL[1]);
        }
        (c0, c1, c2, c3)
    }

    pub(super) fn word(&self, row: u32) -> u32 {
        self.words(row).0
    }

    pub(super) fn rounding(&self, row: u32) -> u32 {
        self.words(row).3
    }

    pub(super) fn sign(&self, row: u32) -> f32 {
        select(self.words(row).1 >> 31 == 0, 1.0f32, -1.0f32)
    }

    pub(super) fn gumbel(&self, row: u32) -> f32 {
        let uniform = (f32::cast_from(self.word(row) >> 9) + 0.5) * comptime!(1.0f32 / 8_388_608.0);
        -ln(-ln(uniform))
    }
}

/// The permutation of `rows/random.rs`.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct Order {
    rows: u32,
    mask: u32,
    first_shift: u32,
    second_shift: u32,
    key_0: u32,
    key_1: u32,
    key_2: u32,
    key_3: u32,
}

pub(super) fn order(permutation: Permutation) -> OrderLaunch {
    let Permutation {
        rows,
        mask,
        shifts: [first_shift, second_shift],
        keys: [key_0, key_1, key_2, key_3],
    } = permutation;
    OrderLaunch::new(
        rows,
        mask,
        first_shift,
        second_shift,
        key_0,
        key_1,
        key_2,
        key_3,
    )
}

#[cube]
impl Order {
    pub(super) fn row(&self, place: u32) -> u32 {
        let mut row = self.sent_on(place);
        while row >= self.rows {
            row = self.sent_on(row);
        }
        row
    }

    fn sent_on(&self, row: u32) -> u32 {
        let row = self.mixed(row, self.key_0);
        let row = self.mixed(row, self.key_1);
        let row = self.mixed(row, self.key_2);
        self.mixed(row, self.key_3)
    }

    fn mixed(&self, row: u32, key: u32) -> u32 {
        let row = (row * (key | 1) + (key >> 16)) & self.mask;
        let row = row ^ (row >> self.first_shift);
        let row = (row * ((key >> 8) | 1) + (key >> 24)) & self.mask;
        row ^ (row >> self.second_shift)
    }
}

/// The natural logarithm of a positive normal number, to about one unit in the last place. A
/// device's own may be off by 2^-21 near 1, where the tail of the Gumbel numbers comes from.
#[cube]
pub(super) fn ln(value: f32) -> f32 {
    let bits = u32::reinterpret(value);
    // The mantissa is in [sqrt(1/2), sqrt(2)).
    let exponent = i32::cast_from(bits - 0x3F35_04F3) >> 23;
    let mantissa = f32::reinterpret(bits - (u32::cast_from(exponent) << 23));
    // ln m = 2 artanh((m - 1) / (m + 1)), |s| < 0.172.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let z = s * s;
    let series = z * comptime!(2.0f32 / 9.0) + comptime!(2.0f32 / 7.0);
    let series = z * series + comptime!(2.0f32 / 5.0);
    let series = z * series + comptime!(2.0f32 / 3.0);
    let series = z * series + 2.0;
    f32::cast_from(exponent) * core::f32::consts::LN_2 + s * series
}
