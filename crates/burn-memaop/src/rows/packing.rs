//! How the rows of a layer's input are kept in few bits between the passes.
//!
//! A row is a run of 32-bit words: the scales of its groups of [`GROUP`] values, in single
//! precision, then the groups. A value v of a group with the scale s is kept as the integer
//! `v / s + levels`, rounded up or down at random with the distances as odds, so that the unpacked
//! value is v on average. A group with a value that is not finite is unpacked as NaN.
//!
//! In eight bits, neighbouring values lie in neighbouring bytes. In four bits, the first half of a
//! group has the lower halves of the bytes, and the second half the upper ones. In one bit a value
//! is above zero or not, and there are no scales.

use crate::config::StoredInput;

/// The values that share a scale. A very large value costs precision in its own group alone.
pub(crate) const GROUP: usize = 64;

/// A group of values below this is kept as zeros: its scale would not be a normal number.
pub(crate) const LEAST: f32 = 1e-35;

/// The layout of packed rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packing {
    pub(crate) bits: Bits,
    /// The number of values of a row.
    pub(crate) width: usize,
}

/// The number of bits of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bits {
    /// The bit says whether the value is above zero or NaN.
    One,
    Four,
    Eight,
}

impl Bits {
    /// The bits of a stored input, or none where the values are kept as they are.
    pub(crate) fn of(stored: StoredInput) -> Option<Self> {
        match stored {
            StoredInput::Full => None,
            StoredInput::Int8 => Some(Self::Eight),
            StoredInput::Int4 => Some(Self::Four),
        }
    }

    pub(crate) fn count(self) -> usize {
        match self {
            Self::One => 1,
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// The number of steps from zero to the largest value of a group.
    pub(crate) fn levels(self) -> u32 {
        match self {
            Self::Four => 7,
            Self::Eight => 127,
            Self::One => 0,
        }
    }

    fn has_scales(self) -> bool {
        self.levels() > 0
    }
}

impl Packing {
    pub(crate) fn groups(self) -> usize {
        self.width.div_ceil(GROUP)
    }

    /// The number of words of the scales of a row.
    pub(crate) fn scales(self) -> usize {
        match self.bits.has_scales() {
            true => self.groups(),
            false => 0,
        }
    }

    /// The number of words of a whole group.
    pub(crate) fn group_words(self) -> usize {
        GROUP * self.bits.count() / 32
    }

    /// The number of words of a row.
    pub(crate) fn words(self) -> usize {
        self.scales() + (self.width * self.bits.count()).div_ceil(32)
    }
}

/// Packs a row with the key of its random bits. Without a key, values are rounded to the nearest.
#[inline(always)]
pub(crate) fn pack_row<E: Copy>(
    packing: Packing,
    row: &[E],
    single: impl Fn(E) -> f32 + Copy,
    key: Option<u32>,
    words: &mut [i32],
) {
    let (scales, words) = words.split_at_mut(packing.scales());
    let groups = row
        .chunks(GROUP)
        .zip(words.chunks_mut(packing.group_words()));
    for (number, (group, words)) in groups.enumerate() {
        let mut values = [0.0; GROUP];
        for (value, &given) in values.iter_mut().zip(group) {
            *value = single(given);
        }
        let dither = dithers(key, number * GROUP);
        match packing.bits {
            Bits::One => pack_bits(&values, words),
            Bits::Four | Bits::Eight => {
                let (scale, codes) = quantized(&values, &dither, packing.bits.levels());
                scales[number] = scale.to_bits() as i32;
                match packing.bits {
                    Bits::Four => pack_nibbles(&codes, words),
                    _ => pack_bytes(&codes, words),
                }
            }
        }
    }
}

/// Gives the groups of a packed row, in order, each with the number of its first value.
#[inline(always)]
pub(crate) fn unpack_row(packing: Packing, words: &[i32], mut take: impl FnMut(usize, &[f32])) {
    let (scales, words) = words.split_at(packing.scales());
    let starts = (0..packing.width).step_by(GROUP);
    for (number, (first, words)) in starts.zip(words.chunks(packing.group_words())).enumerate() {
        let count = GROUP.min(packing.width - first);
        let mut values = [0.0; GROUP];
        match packing.bits {
            Bits::One => unpack_bits(words, &mut values),
            Bits::Four | Bits::Eight => {
                let mut codes = [0; GROUP];
                match packing.bits {
                    Bits::Four => unpack_nibbles(words, &mut codes),
                    _ => unpack_bytes(words, &mut codes),
                }
                let scale = f32::from_bits(scales[number] as u32);
                let levels = packing.bits.levels() as f32;
                for (value, code) in values.iter_mut().zip(codes) {
                    *value = (f32::from(code) - levels) * scale;
                }
            }
        }
        take(first, &values[..count]);
    }
}

/// What is added to values before they are cut off, in units of 2^-16: a half without a key.
#[inline(always)]
fn dithers(key: Option<u32>, first: usize) -> [u32; GROUP] {
    let mut dithers = [1 << 15; GROUP];
    if let Some(key) = key {
        for (offset, dither) in dithers.iter_mut().enumerate() {
            *dither = mixed(key, (first + offset) as u32) >> 16;
        }
    }
    dithers
}

pub(crate) const COLUMN: u32 = 0x9E37_79B9;
pub(crate) const MIX: [u32; 2] = [0x85EB_CA6B, 0xC2B2_AE35];

/// A random word for a column, by the last steps of MurmurHash3 (Appleby, 2011).
#[inline(always)]
pub(super) fn mixed(key: u32, column: u32) -> u32 {
    let word = key.wrapping_add(column.wrapping_mul(COLUMN));
    let word = (word ^ word >> 16).wrapping_mul(MIX[0]);
    let word = (word ^ word >> 13).wrapping_mul(MIX[1]);
    word ^ word >> 16
}

/// The scale of a group, and its values as integers from 0, in units of the scale.
#[inline(always)]
fn quantized(values: &[f32; GROUP], dithers: &[u32; GROUP], levels: u32) -> (f32, [u8; GROUP]) {
    // Without the sign, the bits of numbers are in their order, then come infinity and NaN.
    let sizes = values.iter().map(|value| value.to_bits() & 0x7FFF_FFFF);
    let largest = f32::from_bits(sizes.fold(0, u32::max));
    let top = levels as f32;
    let (scale, inverse) = match largest {
        size if !size.is_finite() => (f32::NAN, 0.0),
        size if size < LEAST => (0.0, 0.0),
        size => (size / top, top / size),
    };
    let mut codes = [0; GROUP];
    let least = top + 0.5 / 65_536.0;
    for ((code, &value), &dither) in codes.iter_mut().zip(values).zip(dithers) {
        // The random bits become the upper bits behind the point of a number from 1, and the level
        // is added to 2^23. Neither takes a conversion.
        let dither = f32::from_bits(0x3F80_0000 | dither << 7) - 1.0;
        let level = (value * inverse + (least + dither)).floor();
        let level = level.max(0.0).min(2.0 * top);
        *code = (level + 8_388_608.0).to_bits() as u8;
    }
    (scale, codes)
}

#[inline(always)]
fn pack_bytes(codes: &[u8; GROUP], words: &mut [i32]) {
    let (bytes, _) = codes.as_chunks::<4>();
    for (word, &bytes) in words.iter_mut().zip(bytes) {
        *word = i32::from_le_bytes(bytes);
    }
}

#[inline(always)]
fn unpack_bytes(words: &[i32], codes: &mut [u8; GROUP]) {
    let (bytes, _) = codes.as_chunks_mut::<4>();
    for (bytes, word) in bytes.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
}

#[inline(always)]
fn pack_nibbles(codes: &[u8; GROUP], words: &mut [i32]) {
    let half = 4 * words.len();
    let mut both = [0; GROUP];
    let (low, high) = codes.split_at(half);
    for ((both, low), high) in both.iter_mut().zip(low).zip(high) {
        *both = low | high << 4;
    }
    pack_bytes(&both, words);
}

#[inline(always)]
fn unpack_nibbles(words: &[i32], codes: &mut [u8; GROUP]) {
    let mut both = [0; GROUP];
    unpack_bytes(words, &mut both);
    let (low, high) = codes.split_at_mut(4 * words.len());
    for ((low, high), both) in low.iter_mut().zip(high).zip(both) {
        *low = both & 15;
        *high = both >> 4;
    }
}

#[inline(always)]
fn pack_bits(values: &[f32; GROUP], words: &mut [i32]) {
    let (chunks, _) = values.as_chunks::<32>();
    for (word, chunk) in words.iter_mut().zip(chunks) {
        let bits = chunk.iter().enumerate();
        *word = bits.fold(0, |word, (place, &value)| {
            word | i32::from(value > 0.0 || value.is_nan()) << place
        });
    }
}

#[inline(always)]
fn unpack_bits(words: &[i32], values: &mut [f32; GROUP]) {
    let (chunks, _) = values.as_chunks_mut::<32>();
    for (chunk, word) in chunks.iter_mut().zip(words) {
        for (place, value) in chunk.iter_mut().enumerate() {
            *value = (word >> place & 1) as f32;
        }
    }
}
