//! The backward pass of a layer: what it registers with autodiff, what a step is to do, and the
//! recipe of the gradients.

#[cfg(feature = "autodiff")]
mod activation;
pub(crate) mod attention;
#[cfg(feature = "autodiff")]
mod autodiff;
pub(crate) mod cost;
#[cfg(feature = "autodiff")]
mod plan;
pub(crate) mod recipe;
#[cfg(feature = "autodiff")]
mod recomputed;

use std::sync::{Arc, Once, OnceLock};

use burn::backend::{Dispatch, DispatchDevice, backend_extension, tensor::FloatTensor};

use crate::{
    config::AopConfig,
    rows::{
        Attention, Bias, ExactOps, Mask, Packed, RowOps,
        random::{Dropout, Random},
        window::Window,
    },
    state::{LayerState, choice::StepTime},
};

/// What a backward pass needs to know of its layer.
#[derive(Debug, Clone)]
pub(crate) struct AopLayer {
    pub(crate) config: AopConfig,
    /// The time of a step, for the choice of K.
    pub(crate) time: StepTime,
    /// None if all gradients are exact and the input is kept as it is. Steps are not counted then.
    pub(crate) state: Option<LayerState>,
    /// The place for the packed input, if other layers have the same input.
    pub(crate) shared: Option<SharedInput>,
}

/// The packed input of several layers. The first layer that needs it packs it.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedInput(pub(self) Arc<OnceLock<Packed<Dispatch>>>);

/// The operations with a backward pass of this crate. Without autodiff they are Burn's.
// Without a backend the macro has no use for the arguments.
#[allow(unused_variables)]
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl-backend"),
    LibTorch: cfg(feature = "tch"),
    Autodiff: cfg(feature = "autodiff"),
)]
pub(crate) trait LayerOps: RowOps + ExactOps {
    /// Burn's `linear` of a matrix.
    fn memaop_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: Bias<Self>,
        layer: AopLayer,
    ) -> FloatTensor<Self> {
        Self::linear(input, weight, bias.into_option())
    }

    /// Burn's `conv2d`.
    fn memaop_conv2d(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: Bias<Self>,
        window: Window,
        layer: AopLayer,
    ) -> FloatTensor<Self> {
        Self::memaop_convolve(input, weight, bias, window)
    }

    /// Burn's `relu` of a matrix. The backward pass keeps one bit of each value.
    fn memaop_relu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::relu(input)
    }

    /// Scaled dot-product attention of `[batch, heads, length, d_head]`, whose queries are scaled
    /// already.
    fn memaop_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        #[extension_type] of_keys: Mask<Self>,
        #[extension_type] of_pairs: Mask<Self>,
        attention: Attention,
    ) -> FloatTensor<Self> {
        unreachable!("layers ask for it where a gradient is asked for")
    }

    /// Burn's `gelu` of a matrix.
    fn memaop_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::memaop_exact_gelu(input)
    }

    /// Burn's `gelu` of a matrix, whose derivative is kept in 8 bits, rounded by random bits.
    fn memaop_packed_gelu(input: FloatTensor<Self>, random: Random) -> FloatTensor<Self> {
        Self::memaop_exact_gelu(input)
    }

    /// A dropout of a matrix.
    fn memaop_dropout(input: FloatTensor<Self>, dropout: Dropout) -> FloatTensor<Self> {
        Self::memaop_drop_values(input, dropout)
    }

    /// Burn's `layer_norm` of a matrix.
    fn memaop_layer_norm(
        input: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        #[extension_type] beta: Bias<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        Self::layer_norm(input, gamma, beta.into_option(), epsilon)
    }
}

macro_rules! layer_ops {
    ($(#[$attribute:meta] $backend:ty;)*) => {
        $(#[$attribute] impl LayerOps for $backend {})*
    };
}

layer_ops! {
    #[cfg(feature = "flex")] burn::backend::Flex;
    #[cfg(feature = "ndarray")] burn::backend::NdArray;
    #[cfg(feature = "tch")] burn::backend::LibTorch;
    #[cfg(feature = "cubecl-backend")] burn_cubecl::CubeBackend;
}

#[cfg(feature = "cubecl-backend")]
impl<B: burn_fusion::FusionBackend + LayerOps> LayerOps for burn_fusion::Fusion<B> {}

/// Whether this crate has code for the device. Where it has none, layers run Burn's own functions.
/// The first time that happens, a warning is logged.
pub(crate) fn is_supported(device: &DispatchDevice) -> bool {
    match device {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => true,
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => true,
        #[cfg(feature = "tch")]
        DispatchDevice::LibTorch(_) => true,
        #[cfg(feature = "cubecl-backend")]
        DispatchDevice::Cube(_) => true,
        #[cfg(feature = "autodiff")]
        DispatchDevice::Autodiff(device) => is_supported(device),
        // Variants that only Burn's features enable cannot be named here.
        #[allow(unreachable_patterns)]
        device => {
            static WARNING: Once = Once::new();
            WARNING.call_once(|| {
                log::warn!(
                    "burn-memaop: on the device {device:?} layers are Burn's own. If it is the device of a backend \
                     on this machine, enable the feature of burn-memaop that has the name of the backend, and \
                     its feature autodiff."
                );
            });
            false
        }
    }
}
