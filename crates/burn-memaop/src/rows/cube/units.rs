//! What the units of a cube compute together, by shared storage: not every device has planes.

use burn_cubecl::cubecl;
use cubecl::prelude::*;

/// The sums of the values of all units, lane by lane, which every unit gets. They are added up in
/// halves, so that their order depends on nothing but the number of units.
#[cube]
pub(super) fn cube_sums<N: Size>(
    value: Vector<f32, N>,
    shared: &mut Shared<[Vector<f32, N>]>,
    #[comptime] units: u32,
) -> Vector<f32, N> {
    let unit = UNIT_POS as usize;
    // What an earlier call left there must have been read.
    sync_cube();
    shared[unit] = value;
    sync_cube();
    #[unroll]
    for level in 1..comptime!(units.ilog2() + 1) {
        let half = comptime!((units >> level) as usize);
        if unit < half {
            let sum = shared[unit] + shared[unit + half];
            shared[unit] = sum;
        }
        sync_cube();
    }
    shared[0]
}

#[cube]
pub(super) fn cube_sum(
    value: f32,
    shared: &mut Shared<[Vector<f32, Const<1>>]>,
    #[comptime] units: u32,
) -> f32 {
    cube_sums::<Const<1>>(Vector::new(value), shared, units).extract(0usize)
}

pub(super) type Pair = Const<2>;
pub(super) type Four = Const<4>;

#[cube]
pub(super) fn pair(first: f32, second: f32) -> Vector<f32, Pair> {
    let mut pair = Vector::<f32, Pair>::new(first);
    pair.insert(1usize, second);
    pair
}

/// The largest of the values of all units, which every unit gets.
#[cube]
pub(super) fn cube_max(value: f32, shared: &mut Shared<[f32]>, #[comptime] units: u32) -> f32 {
    let unit = UNIT_POS as usize;
    sync_cube();
    shared[unit] = value;
    sync_cube();
    #[unroll]
    for level in 1..comptime!(units.ilog2() + 1) {
        let half = comptime!((units >> level) as usize);
        if unit < half {
            shared[unit] = f32::max(shared[unit], shared[unit + half]);
        }
        sync_cube();
    }
    shared[0]
}

/// The sum of the values of the units up to each unit, its own included.
#[cube]
pub(super) fn prefix_sum(value: u32, shared: &mut Shared<[u32]>, #[comptime] units: u32) -> u32 {
    let unit = UNIT_POS as usize;
    sync_cube();
    shared[unit] = value;
    sync_cube();
    let mut sum = value;
    #[unroll]
    for level in 0..comptime!(units.ilog2()) {
        let offset = comptime!(1usize << level);
        if unit >= offset {
            sum += shared[unit - offset];
        }
        sync_cube();
        shared[unit] = sum;
        sync_cube();
    }
    sum
}

/// A number from 0 in units of 2^-32, with an integer part. Sums of such numbers are exact in any
/// order.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Fixed {
    pub(super) whole: u32,
    pub(super) fraction: u32,
}

#[cube]
impl Fixed {
    pub(super) fn new(whole: u32, fraction: u32) -> Fixed {
        Fixed { whole, fraction }
    }

    pub(super) fn plus(&self, other: &Fixed) -> Fixed {
        let fraction = self.fraction + other.fraction;
        let carry = select(fraction < self.fraction, 1u32, 0u32);
        Fixed::new(self.whole + other.whole + carry, fraction)
    }

    pub(super) fn minus(&self, other: &Fixed) -> Fixed {
        let borrow = select(self.fraction < other.fraction, 1u32, 0u32);
        Fixed::new(
            self.whole - other.whole - borrow,
            self.fraction - other.fraction,
        )
    }

    /// The number as a float.
    pub(super) fn float(&self) -> f32 {
        f32::cast_from(self.whole) + f32::cast_from(self.fraction) * INVERSE_2_32
    }
}

pub(super) const TWO_32: f32 = 4_294_967_296.0;
pub(super) const INVERSE_2_32: f32 = 1.0 / TWO_32;

/// As [`prefix_sum`], for fixed-point numbers.
#[cube]
pub(super) fn fixed_prefix_sum(
    value: &Fixed,
    wholes: &mut Shared<[u32]>,
    fractions: &mut Shared<[u32]>,
    #[comptime] units: u32,
) -> Fixed {
    let unit = UNIT_POS as usize;
    sync_cube();
    wholes[unit] = value.whole;
    fractions[unit] = value.fraction;
    sync_cube();
    let mut whole = value.whole;
    let mut fraction = value.fraction;
    #[unroll]
    for level in 0..comptime!(units.ilog2()) {
        let offset = comptime!(1usize << level);
        if unit >= offset {
            let before = Fixed::new(wholes[unit - offset], fractions[unit - offset]);
            let sum = before.plus(&Fixed::new(whole, fraction));
            whole = sum.whole;
            fraction = sum.fraction;
        }
        sync_cube();
        wholes[unit] = whole;
        fractions[unit] = fraction;
        sync_cube();
    }
    Fixed::new(whole, fraction)
}

/// The sum of the fixed-point numbers of all units, which every unit gets.
#[cube]
pub(super) fn fixed_sum(
    value: &Fixed,
    wholes: &mut Shared<[u32]>,
    fractions: &mut Shared<[u32]>,
    #[comptime] units: u32,
) -> Fixed {
    let sum = fixed_prefix_sum(value, wholes, fractions, units);
    sync_cube();
    if UNIT_POS == comptime!(units - 1) {
        wholes[0] = sum.whole;
        fractions[0] = sum.fraction;
    }
    sync_cube();
    let total = Fixed::new(wholes[0], fractions[0]);
    // The next call may write there.
    sync_cube();
    total
}

/// Whether a number is neither infinite nor NaN. It is judged by its bits, because a shader
/// compiler may assume that all numbers are finite.
#[cube]
pub(super) fn is_finite(value: f32) -> bool {
    u32::reinterpret(value) & 0x7F80_0000 != 0x7F80_0000
}
