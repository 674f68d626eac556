//! Burn's own tests with our layers, as `burn_tests.py` writes them.

#![allow(unused_imports, dead_code)]

include!(env!("BURN_TESTS"));
