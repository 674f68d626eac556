use anyhow::{Result, bail};
use burn::tensor::Device;
use clap::ValueEnum;
use serde::Serialize;

/// A backend, by the name of the cargo feature that builds it in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Backend {
    Flex,
    Ndarray,
    Wgpu,
    Vulkan,
    Webgpu,
    Metal,
    Cuda,
    Rocm,
    Cpu,
    Tch,
}

impl Backend {
    /// Whether the backend runs on the CPU.
    pub fn is_cpu(self) -> bool {
        matches!(self, Self::Flex | Self::Ndarray | Self::Cpu | Self::Tch)
    }

    /// The default device of the backend.
    ///
    /// # Errors
    ///
    /// Returns an error that names the feature if the backend is not built in.
    #[allow(deprecated)] // Burn deprecates NdArray and LibTorch.
    pub fn device(self) -> Result<Device> {
        Ok(match self {
            #[cfg(feature = "flex")]
            Self::Flex => Device::flex(),
            #[cfg(feature = "ndarray")]
            Self::Ndarray => Device::ndarray(),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Device::wgpu(Default::default()),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => Device::vulkan(Default::default()),
            #[cfg(feature = "webgpu")]
            Self::Webgpu => Device::webgpu(Default::default()),
            #[cfg(feature = "metal")]
            Self::Metal => Device::metal(Default::default()),
            #[cfg(feature = "cuda")]
            Self::Cuda => Device::cuda(0),
            #[cfg(feature = "rocm")]
            Self::Rocm => Device::rocm(0),
            #[cfg(feature = "cpu")]
            Self::Cpu => Device::cpu(),
            #[cfg(feature = "tch")]
            Self::Tch => Device::libtorch(),
            #[allow(unreachable_patterns)]
            backend => {
                let value = backend.to_possible_value().expect("no backend is skipped");
                let name = value.get_name();
                bail!("the backend {name} is not in this build: add `--features {name}`")
            }
        })
    }
}
