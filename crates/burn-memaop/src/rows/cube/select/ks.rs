//! The K of several selections in one launch.

use burn_cubecl::cubecl;
use cubecl::prelude::*;

/// Up to six K: as many as a measurement is about.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct Ks {
    k0: u32,
    k1: u32,
    k2: u32,
    k3: u32,
    k4: u32,
    k5: u32,
}

/// Places behind the last of `ks` repeat it.
pub(super) fn arg(ks: &[usize]) -> KsLaunch {
    assert!(
        (1..=6).contains(&ks.len()),
        "one to six K, but {}",
        ks.len()
    );
    let at = |index: usize| ks[index.min(ks.len() - 1)] as u32;
    KsLaunch::new(at(0), at(1), at(2), at(3), at(4), at(5))
}

#[cube]
impl Ks {
    pub(super) fn at(&self, index: u32) -> u32 {
        let mut k = self.k0;
        if index == 1 {
            k = self.k1;
        } else if index == 2 {
            k = self.k2;
        } else if index == 3 {
            k = self.k3;
        } else if index == 4 {
            k = self.k4;
        } else if index == 5 {
            k = self.k5;
        }
        k
    }
}
