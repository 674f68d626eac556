//! NVRTC compiles every kernel of the crate from CUDA C++ to PTX. `checks/cuda.sh` runs these tests
//! with a driver that needs no GPU.

#![cfg(feature = "cuda")]

use std::collections::BTreeSet;

use burn::tensor::{Device, Tensor};
use burn_memaop::{AopConfig, MemAopLinearConfig};
use memaop_checks::{KERNELS, compiled_by, run_every_kernel};

/// A test below runs this in a process of its own, which logs what it compiles.
#[test]
#[ignore = "kernels_are_valid_cuda runs it"]
fn run_on_cuda() {
    let device = Device::cuda(0);
    run_every_kernel(&device);
    device.sync().unwrap();
}

/// Takes steps of a layer, and exits without waiting for the device. The layer measures the noise
/// of its gradient at the first step, and again by the sixth.
fn step(steps: usize) {
    let device = Device::cuda(0).autodiff();
    let aop = AopConfig::new().with_cost_rule(false);
    let layer = MemAopLinearConfig::new(32, 16).init(&device).with_aop(aop);
    for _ in 0..steps {
        let input = Tensor::<2>::ones([64, 32], &device);
        layer.forward(input).sum().backward();
    }
    std::process::exit(0);
}

#[test]
#[ignore = "figures_are_waited_for_when_the_next_are_measured runs it"]
fn one_step() {
    step(1);
}

#[test]
#[ignore = "figures_are_waited_for_when_the_next_are_measured runs it"]
fn six_steps() {
    step(6);
}

#[test]
#[ignore = "needs NVRTC: checks/cuda.sh"]
fn figures_are_waited_for_when_the_next_are_measured() {
    let waits = |test| {
        let compiled = compiled_by(test);
        let message = String::from_utf8_lossy(&compiled.output.stderr);
        assert!(compiled.output.status.success(), "{message}");
        compiled.ptx.matches("// waited").count()
    };
    assert_eq!(waits("one_step"), 0);
    // Which passes are measured is random, so there are one or two waits.
    assert!((1..=2).contains(&waits("six_steps")));
}

#[test]
#[ignore = "needs NVRTC: checks/cuda.sh"]
fn kernels_are_valid_cuda() {
    let compiled = compiled_by("run_on_cuda");
    let message = String::from_utf8_lossy(&compiled.output.stderr);
    assert!(compiled.output.status.success(), "{message}");
    let kernels = compiled.kernels;
    let seen: BTreeSet<_> = kernels.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(seen, BTreeSet::from(KERNELS));
    // CubeCL reports a kernel that does not compile only where results are read.
    for (name, source) in &kernels {
        let (head, _) = source.split_once("__global__").expect("a kernel");
        let after = &source[head.len()..];
        let entry = after.split('(').find_map(|part| {
            let word = part.split_whitespace().last()?;
            word.contains("_kernel_").then_some(word)
        });
        let entry = entry.expect("a named kernel");
        let line = format!(".entry {entry}(");
        assert!(compiled.ptx.contains(&line), "{name}: {message}\n{source}");
    }
    println!("{} variants of {} kernels", kernels.len(), seen.len());
}
