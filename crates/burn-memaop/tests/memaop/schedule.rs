//! K from step to step, in the layer.

use burn::{
    module::Module,
    nn::LinearConfig,
    store::ModuleRecord,
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{AopConfig, MemAopLinear, Memory, Method, OuterProducts, Schedule};

use crate::oracle::Policy;
use crate::support::{Matrix, Random, bits, published};

const M: usize = 40;
const N: usize = 6;
const P: usize = 4;

fn device() -> Device {
    Device::flex().autodiff()
}

fn aop(policy: Policy) -> AopConfig {
    published()
        .with_outer_products(OuterProducts::Ratio {
            ratio: 0.1,
            minimum: 1,
        })
        .with_method(policy.method(Memory::None))
}

fn step(
    forward: impl Fn(Tensor<2>) -> Tensor<2>,
    x: &Matrix,
    g: &Matrix,
) -> burn::tensor::Gradients {
    let output = forward(x.tensor(&device(), DType::F32));
    (output * g.tensor(&device(), DType::F32)).sum().backward()
}

#[test]
fn exact_steps_are_those_of_linear_and_then_k_falls() {
    let linear = LinearConfig::new(N, P).init(&device());
    let schedule = Schedule::Linear {
        exact_steps: 3,
        steps: 4,
    };
    let method = Method::TopK(Memory::Balanced { decay: 1.0 });
    let aop = aop(Policy::TopK)
        .with_schedule(schedule)
        .with_method(method);
    let layer = MemAopLinear::from_linear(linear.clone(), aop);
    let mut random = Random(50);
    for (number, k) in [40, 40, 40, 40, 31, 22, 13, 4, 4].into_iter().enumerate() {
        let (x, g) = (random.matrix(M, N), random.matrix(M, P));
        let ours = step(|x| layer.forward(x), &x, &g);
        let exact = step(|x| linear.forward(x), &x, &g);
        let (ours, exact) = (layer.weight.grad(&ours), linear.weight.grad(&exact));
        let equal = bits(ours.unwrap()) == bits(exact.unwrap());
        assert_eq!(equal, k == M, "step {number}");

        let stats = layer.memory_stats();
        assert_eq!((stats.step, stats.k), (number as u64 + 1, k));
        assert_eq!(stats.rows == 0, k == M, "an exact step needs no memory");
    }

    // The schedule goes on where it was saved.
    let bytes = layer.clone().into_record().into_bytes().unwrap();
    let other = MemAopLinear::from_linear(linear, aop);
    let other = other.load_record(ModuleRecord::from_bytes(bytes).unwrap());
    let (x, g) = (random.matrix(M, N), random.matrix(M, P));
    step(|x| other.forward(x), &x, &g);
    assert_eq!((other.memory_stats().step, other.memory_stats().k), (10, 4));
}

#[test]
fn adaptive_k_holds_the_share_of_the_score_mass() {
    let (target, interval) = (0.7, 4);
    for policy in [Policy::TopK, Policy::Systematic, Policy::RandK] {
        let share = OuterProducts::Share {
            share: target,
            interval,
        };
        let linear = LinearConfig::new(N, P).init(&device());
        let aop = aop(policy).with_outer_products(share);
        let layer = MemAopLinear::from_linear(linear, aop);
        let mut random = Random(51);
        let (x, g) = (random.matrix(M, N), random.matrix(M, P));
        let mut ks = Vec::new();
        for _ in 0..160 {
            step(|x| layer.forward(x), &x, &g);
            ks.push(layer.memory_stats().k);
        }
        assert_eq!(ks[0], (target * M as f64).round() as usize);
        for block in ks.chunks(interval) {
            assert!(
                block.iter().all(|k| k == &block[0]),
                "adjusted between: {ks:?}"
            );
        }

        // What K carries, by the definition of the share: for TopK exactly, for draws on average.
        let norm = |row: &[f64]| row.iter().map(|v| v * v).sum::<f64>().sqrt();
        let mut sizes: Vec<f64> = (0..M).map(|i| norm(&x.0[i]) * norm(&g.0[i])).collect();
        sizes.sort_by(|a, b| b.total_cmp(a));
        let total: f64 = sizes.iter().sum();
        let share = |k: usize| sizes[..k].iter().sum::<f64>() / total;
        let least = (1..M).find(|&k| share(k) >= target).unwrap();
        let mean = ks[80..].iter().sum::<usize>() as f64 / 80.0;
        match policy {
            Policy::TopK => {
                let moved = ks[0].abs_diff(least);
                assert!(
                    moved > 3,
                    "the test would not notice a K that stays: {least}"
                );
                // Never below the target, at most a row above.
                let held = |&k: &usize| k == least || k == least + 1;
                assert!(ks[80..].iter().all(held), "{least}: {ks:?}");
            }
            Policy::RandK => {
                assert!((mean / M as f64 - target).abs() < 0.1, "{mean}");
            }
            _ => {
                // Better than blind, no better than the largest.
                assert!(
                    mean >= least as f64 - 1.0 && mean < 0.7 * M as f64,
                    "{mean}"
                );
            }
        }
    }
}
