//! The backends that supply [`MemAopOps`], all by its default bodies so far.

use burn::backend::DispatchDevice;

#[cfg(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "cubecl-backend"
))]
use crate::ops::MemAopOps;

#[cfg(feature = "flex")]
impl MemAopOps for burn::backend::Flex {}

#[cfg(feature = "ndarray")]
impl MemAopOps for burn::backend::NdArray {}

#[cfg(feature = "tch")]
impl MemAopOps for burn::backend::LibTorch {}

#[cfg(feature = "cubecl-backend")]
impl MemAopOps for burn_cubecl::CubeBackend {}

// The default bodies compose lazy operations, so nothing is flushed. Implemented with and without
// the feature `fusion` of this crate: Burn's own features can turn Fusion on as well.
#[cfg(feature = "cubecl-backend")]
impl<B: burn_fusion::FusionBackend> MemAopOps for burn_fusion::Fusion<B> {}

/// Stops with the feature to enable when the device's backend is compiled into Burn, but not into
/// this crate.
pub(crate) fn assert_supported(device: &DispatchDevice) {
    match device {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => {}
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => {}
        #[cfg(feature = "tch")]
        DispatchDevice::LibTorch(_) => {}
        #[cfg(feature = "cubecl-backend")]
        DispatchDevice::Cube(_) => {}
        #[cfg(feature = "autodiff")]
        DispatchDevice::Autodiff(device) => assert_supported(device),
        #[allow(unreachable_patterns)]
        device => panic!("{}", unsupported(&format!("{device:?}"))),
    }
}

/// The message for an unsupported device, from its debug form (its variants are only there when
/// Burn's features are).
fn unsupported(device: &str) -> String {
    let features = [
        ("Flex", "flex"),
        ("NdArray", "ndarray"),
        ("LibTorch", "tch"),
        ("Cube(Cuda", "cuda"),
        ("Cube(Hip", "rocm"),
        ("Cube(Metal", "metal"),
        ("Cube(Cpu", "cpu"),
        ("Cube", "wgpu"),
    ];
    let device = device.strip_prefix("Autodiff { device: ").unwrap_or(device);
    match features.iter().find(|(name, _)| device.starts_with(name)) {
        Some((_, feature)) => format!(
            "MemAopLinear does not support the device {device} in this build: enable the feature \
             `{feature}` of burn-memaop"
        ),
        None => format!(
            "MemAopLinear does not support the device {device}: burn-memaop has no implementation \
             for its backend"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_the_feature() {
        for (device, feature) in [
            ("Flex(Cpu)", "`flex`"),
            ("NdArray(Cpu)", "`ndarray`"),
            ("LibTorch(Cpu)", "`tch`"),
            ("Cube(Cuda(CudaDevice { index: 0 }))", "`cuda`"),
            ("Cube(Hip(AmdDevice { index: 0 }))", "`rocm`"),
            ("Cube(Cpu(CpuDevice))", "`cpu`"),
            ("Cube(Wgpu(DefaultDevice))", "`wgpu`"),
            ("Autodiff { device: Cube(Wgpu(DefaultDevice))", "`wgpu`"),
        ] {
            let message = unsupported(device);
            assert!(message.contains(feature), "{message}");
            assert!(message.contains("of burn-memaop"), "{message}");
        }
        assert!(unsupported("Remote(0)").contains("has no implementation"));
    }
}
