//! The model of the quickstart in a browser, by WebGPU. `checks/browser.sh examples/browser` builds
//! and runs it headless. Any server of files can serve its page, `index.html`.

#![cfg(target_family = "wasm")]

#[allow(dead_code)]
#[path = "../quickstart/data.rs"]
mod data;
#[allow(dead_code)]
#[path = "../quickstart/perceptron/model.rs"]
mod model;

use burn::{
    module::Module,
    nn::loss::{CrossEntropyLoss, CrossEntropyLossConfig},
    optim::{GradientsParams, ModuleOptimizer, SgdConfig},
    tensor::{Device, Tensor, TensorData},
};
use burn_memaop::{
    AopConfig, AopObserver, Memory, Method, OuterProducts,
    op::{AopStep, weight_gradient},
};
use serde::Serialize;
use wasm_bindgen::prelude::*;
use web_time::Instant;

use crate::{
    data::{Batch, Digits},
    model::{Dense, Mlp},
};

/// The number of layers of the model.
const LAYERS: usize = 3;
const BATCH: usize = 128;
const LEARNING_RATE: f64 = 0.1;

#[derive(Serialize)]
struct Report {
    gradients: Vec<Gradient>,
    runs: Vec<Run>,
}

/// How far a weight gradient by WebGPU is from the same one on the CPU.
#[derive(Serialize)]
struct Gradient {
    method: String,
    rows: usize,
    /// The norm of the difference, divided by the norm of the gradient on the CPU.
    distance: f64,
}

#[derive(Serialize)]
struct Run {
    layer: &'static str,
    test_accuracy: f64,
    loss: f64,
    outer_products: u64,
    seconds: f64,
}

/// Compares gradients, trains, and returns the results as JSON. Calls `say` after each epoch.
///
/// # Errors
///
/// Returns an error if the browser has no WebGPU, or a computation fails.
#[wasm_bindgen]
pub async fn run(epochs: usize, width: usize, say: js_sys::Function) -> Result<String, JsError> {
    console_error_panic_hook::set_once();
    let device = Device::wgpu_options().init_async().await?;
    let gradients = gradients(&device).await?;

    let device = device.autodiff();
    let digits = Digits::load();
    device.seed(0);
    let exact = Mlp::new(width, &device);
    let all = AopConfig::new().with_cost_rule(false);
    let memory = Method::TopK(Memory::Balanced { decay: 1.0 });
    let eighth = all.with_outer_products(OuterProducts::Ratio(0.125));
    let layers = [
        ("MemAopLinear", AopConfig::new()),
        ("MemAopLinear, on every layer", all),
        ("MemAopLinear, M/8", eighth),
        ("MemAopLinear, M/8 and memory", eighth.with_method(memory)),
    ];
    let mut runs = Vec::new();
    for (layer, aop) in layers {
        let training = Training::new(layer, exact.clone().with_memaop(aop), &device);
        runs.push(training.run(&digits, epochs, &device, &say).await?);
    }
    let training = Training::new("Linear", exact, &device);
    runs.push(training.run(&digits, epochs, &device, &say).await?);
    Ok(serde_json::to_string(&Report { gradients, runs })?)
}

async fn gradients(device: &Device) -> Result<Vec<Gradient>, JsError> {
    let values = |rows: usize, columns: usize, phase: f64| {
        let size = |row: usize| 1.0 + 3.0 * ((row / 5) % 4) as f64;
        let values = (0..rows * columns).map(|i| {
            let wave = (phase + 0.7 * i as f64 + 0.01 * (i * i % 977) as f64).sin();
            (size(i / columns) * wave) as f32
        });
        TensorData::new(values.collect(), [rows, columns])
    };
    let methods = [
        Method::Systematic,
        Method::TopK(Memory::Balanced { decay: 1.0 }),
    ];
    let mut found = Vec::new();
    for method in methods {
        for rows in [300, 5000] {
            let (x, g) = (values(rows, 64, 0.0), values(rows, 12, 0.5));
            let gradient = |device: &Device, step: AopStep| {
                let on = |data: &TensorData| Tensor::<2>::from_data(data.clone(), device);
                weight_gradient(on(&x), on(&g), None, step).weight
            };
            let step = AopStep {
                k: rows / 8,
                method,
                seed: 1,
                step: 0,
            };
            let here = gradient(device, step).into_data_async().await?;
            let there = gradient(&Device::flex(), step).into_data_async().await?;
            let pairs = here.iter::<f64>().zip(there.iter::<f64>());
            let (difference, norm) = pairs.fold((0.0, 0.0), |(difference, norm), (a, b)| {
                (difference + (a - b) * (a - b), norm + b * b)
            });
            found.push(Gradient {
                method: format!("{method:?}"),
                rows,
                distance: (difference / norm).sqrt(),
            });
        }
    }
    Ok(found)
}

struct Training<L: Dense> {
    layer: &'static str,
    model: Mlp<L>,
    optimizer: ModuleOptimizer,
    loss: CrossEntropyLoss,
    outer_products: u64,
}

impl<L: Dense> Training<L> {
    fn new(layer: &'static str, model: Mlp<L>, device: &Device) -> Self {
        Self {
            layer,
            model,
            optimizer: SgdConfig::new().init(),
            loss: CrossEntropyLossConfig::new().init(device),
            outer_products: 0,
        }
    }

    async fn run(
        mut self,
        digits: &Digits,
        epochs: usize,
        device: &Device,
        say: &js_sys::Function,
    ) -> Result<Run, JsError> {
        let start = Instant::now();
        let mut loss = f64::NAN;
        for epoch in 0..epochs {
            let mut losses = Vec::new();
            for batch in digits.epoch(BATCH, epoch as u64, device) {
                let of_batch;
                (self, of_batch) = self.step(batch);
                losses.push(of_batch);
            }
            // An epoch waits for the device only here.
            let losses = Tensor::cat(losses, 0).mean().into_data_async().await?;
            loss = losses.iter::<f64>().sum();
            let line = format!("{}: epoch {}, loss {loss:.4}", self.layer, epoch + 1);
            let _ = say.call1(&JsValue::NULL, &line.into());
        }
        let seconds = start.elapsed().as_secs_f64();
        let test = digits.test(device);
        let count = test.labels.dims()[0] as f64;
        let answers = self.model.valid().forward(test.images.inner());
        let right = answers
            .argmax(1)
            .squeeze_dim::<1>(1)
            .equal(test.labels.inner());
        let right = right.int().sum().into_data_async().await?;
        Ok(Run {
            layer: self.layer,
            test_accuracy: right.iter::<f64>().sum::<f64>() / count,
            loss,
            outer_products: self.outer_products,
            seconds,
        })
    }

    fn step(mut self, batch: Batch) -> (Self, Tensor<1>) {
        let rows = batch.images.dims()[0];
        let loss = self
            .loss
            .forward(self.model.forward(batch.images), batch.labels);
        let grads = GradientsParams::from_grads(loss.backward(), &self.model);
        self.model = self.optimizer.step(LEARNING_RATE, self.model, grads);
        let report = AopObserver::new().observe(&self.model);
        let seen = report.layers.iter().map(|layer| layer.outer_products);
        let exact = (LAYERS - report.layers.len()) * rows;
        self.outer_products += (seen.sum::<usize>() + exact) as u64;
        (self, loss.inner())
    }
}
