//! With `DOCS_RS` LLVM is missing, so the linker must leave its symbols unresolved. CubeCL's CUDA
//! runtime refers to them, but calls none of them for CUDA C++.

use std::env;

fn main() {
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    let cuda = env::var_os("CARGO_FEATURE_CUDA").is_some();
    if cuda && env::var_os("DOCS_RS").is_some() {
        println!("cargo::rustc-link-arg-tests=-Wl,--unresolved-symbols=ignore-all");
    }
}
