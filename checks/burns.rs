//! Burn's own tests with the layers of burn-memaop, as `burn_tests.py` writes them.

#![allow(unused_imports, dead_code)]

include!(env!("BURN_TESTS"));
