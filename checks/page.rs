//! The functions that `page/index.html` calls.

use burn::tensor::{Device, Tensor};
use wasm_bindgen::prelude::*;

use crate::{KERNELS, run_every_kernel};

/// The names of all kernels, without their modules.
#[wasm_bindgen]
pub fn kernels() -> Vec<String> {
    let names = KERNELS.iter().filter_map(|name| name.rsplit("::").next());
    names.map(str::to_string).collect()
}

/// Runs all kernels, and waits for the last one.
///
/// # Errors
///
/// Returns an error if the browser has no WebGPU.
#[wasm_bindgen]
pub async fn run() -> Result<(), JsError> {
    console_error_panic_hook::set_once();
    let device = Device::wgpu_options().init_async().await?;
    run_every_kernel(&device);
    Tensor::<1>::zeros([1], &device).into_data_async().await?;
    Ok(())
}
