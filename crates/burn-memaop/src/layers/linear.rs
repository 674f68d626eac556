use burn::{
    backend::Dispatch,
    config::Config,
    module::{
        Content, Devices, DisplaySettings, Initializer, Module, ModuleDisplay,
        ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
    },
    nn::{Linear, LinearConfig, LinearLayout},
    tensor::{Device, Tensor, assert_shape, module::linear},
};

use super::module::{is_replaced, layer_module};
use crate::{
    backward::{AopLayer, LayerOps, SharedInput, cost, is_supported},
    config::{AopConfig, StoredInput},
    rows::{Bias, random::Random},
    state::{
        LayerState,
        device::MemoryStats,
        offer::{self, Purpose, Wish},
    },
};

/// Configuration to create a [`MemAopLinear`] layer, with the fields of Burn's
/// [`LinearConfig`]. To set an [`AopConfig`], use [`with_aop`](crate::with_aop).
#[derive(Config, Debug)]
pub struct MemAopLinearConfig {
    /// The size of the input features.
    pub d_input: usize,
    /// The size of the output features.
    pub d_output: usize,
    /// If a bias should be applied during the linear transformation.
    #[config(default = true)]
    pub bias: bool,
    /// The type of function used to initialize neural network parameters.
    #[config(
        default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }"
    )]
    pub initializer: Initializer,
    /// The layout in which the linear parameters are stored.
    #[config(default = "LinearLayout::Row")]
    pub layout: LinearLayout,
}

impl MemAopLinearConfig {
    /// Creates a [`MemAopLinear`] with the parameters that [`LinearConfig::init`] gives from the
    /// same random state.
    pub fn init(&self, device: &Device) -> MemAopLinear {
        let linear = LinearConfig::new(self.d_input, self.d_output)
            .with_bias(self.bias)
            .with_initializer(self.initializer.clone())
            .with_layout(self.layout)
            .init(device);
        MemAopLinear::from_linear(linear, AopConfig::new())
    }
}

/// Applies a linear transformation to the input tensor, `O = IW + b`, and back-propagates to `W`
/// with K of the M outer products of the exact gradient.
///
/// Create it with [`MemAopLinearConfig`] or [`from_linear`](Self::from_linear).
///
/// The gradients of the bias and (unless [some rows](AopConfig::input_gradient) are asked for) of
/// the input are exact. So is everything where K >= M, with a frozen weight and in inference: there
/// this layer is [`Linear`], but for an input [kept in few bits](crate::StoredInput). [`AopConfig`]
/// sets K, the rows and what becomes of the others. The method is Mem-AOP-GD (Hernandez, Rini,
/// Duman, 2021, arXiv:2110.09164).
///
/// # Memory
///
/// A [`Memory`](crate::Memory) holds, for each position of the batch, the sum of the rows left out
/// since it was last drawn: `rows * (d_input + d_output)` values, in single precision (double for
/// double-precision layers).
///
/// - Only backward passes change it, once for each use of the layer in the forward pass. Inference,
///   [`valid`](Module::valid) and the recomputation of gradient checkpointing do not.
/// - The first backward pass allocates it. Smaller batches use its first rows, larger ones grow it
///   by rows of zeros.
/// - Passes that overlap each take a set of rows and return it. No row is lost, but the order of
///   the passes, and so the result, varies from run to run.
///
/// # State
///
/// The state of a layer is its memory, the number of steps and the chosen K. Clones and forks share
/// it, as those of Burn's [`BatchNorm`](burn::nn::BatchNorm) share its running state. Each device
/// has its own, so results with one worker for each device do not depend on the order of the
/// workers.
///
/// - [`load_record`](Module::load_record), [`with_aop`](Self::with_aop),
///   [`from_linear`](Self::from_linear) and [`reset`](crate::reset) give the layer its own state.
/// - [`to_device`](Module::to_device) takes the state along: the first step there goes on from the
///   last one on the old device.
/// - A [fork](Module::fork) uses the state of its device. A new device begins with the steps and
///   the K of the old one, and without its rows, which may be another worker's.
/// - A record is that of a [`Linear`], and loading one makes the state new. With
///   [`AopConfig::saved_state`] or a memory, it also holds the states of all devices under the name
///   `memory`, without the rows of a backward pass that runs meanwhile. Such a layer loads a
///   [`Linear`]'s record with
///   [`allow_partial(true)`](burn::store::ModuleRecord::allow_partial), and a [`Linear`] loads its
///   record with [`allow_unused(true)`](burn::store::ModuleRecord::allow_unused).
/// - burn-store, which exchanges weights with other frameworks, sees a [`Linear`] and no state.
///
/// # Values that are not finite
///
/// If K < M, a value of the batch that is NaN or infinite makes the whole gradient of the weight
/// NaN. Rows of the gradient of the input are not finite where those of the gradient of the output
/// are not. Such a step leaves memory and measurements as they were.
#[derive(Debug, Clone)]
pub struct MemAopLinear {
    /// Matrix of shape `[d_input, d_output]`, initialized as that of [`Linear`].
    pub weight: Param<Tensor<2>>,
    /// Vector of size `d_output`, initialized as that of [`Linear`].
    pub bias: Option<Param<Tensor<1>>>,
    aop: AopConfig,
    state: LayerState,
}

impl MemAopLinear {
    /// Takes the parameters of a [`Linear`], with their ids, so that an optimizer's state
    /// stays with them. The memory is empty.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn from_linear(linear: Linear, aop: AopConfig) -> Self {
        let state = LayerState::new(&linear.weight.lazy_device());
        Self {
            weight: linear.weight,
            bias: linear.bias,
            aop: aop.valid(),
            state,
        }
    }

    /// The same layer, approximated in another way. For all layers of a model there is
    /// [`with_aop`](crate::with_aop).
    ///
    /// The layer goes on with the present state, but shares it no more. Rows are dropped if the new
    /// method has no memory, and a chosen K if `outer_products` changes.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn with_aop(mut self, aop: AopConfig) -> Self {
        let before = std::mem::replace(&mut self.aop, aop.valid());
        self.state = self.state.reconfigured(&before, &aop);
        self
    }

    /// Gives the parameters back, with their ids, and drops the memory.
    pub fn into_linear(self) -> Linear {
        self.to_linear()
    }

    /// A [`Linear`] on the same parameters.
    pub(crate) fn to_linear(&self) -> Linear {
        Linear {
            weight: self.weight.clone(),
            bias: self.bias.clone(),
        }
    }

    /// Applies the forward pass on the input tensor.
    ///
    /// # Shapes
    ///
    /// - input: `[..., d_input]`, of any rank
    /// - output: `[..., d_output]`
    ///
    /// All leading dimensions are flattened to rows, and each product is one over all rows. A
    /// tensor of rank 1 is one row, whose gradient is always exact.
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `input` is not `d_input`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        self.forward_shared(input, None)
    }

    /// As [`forward`](Self::forward), of an input that other layers have too.
    pub(in crate::layers) fn forward_shared<const D: usize>(
        &self,
        input: Tensor<D>,
        shared: Option<&SharedInput>,
    ) -> Tensor<D> {
        let weight = self.weight.val();
        let [d_input, d_output] = weight.dims();
        assert_shape!(input, [.., d_input]);
        let mut shape = input.shape();
        let rows = shape[..D - 1].iter().product();
        let bias = self.bias.as_ref().map(Param::val);
        // The gradient of a batch without rows is zeros.
        if rows == 0 || !is_supported(input.device().as_dispatch()) {
            if is_tracked(&weight) {
                self.state.note_exact(rows, is_tracked(&input));
            }
            return linear(input, weight, bias);
        }
        if D == 2 {
            let input = Tensor::from_dispatch(input.into_dispatch());
            let output = self.apply(input, weight, bias, shared);
            return Tensor::from_dispatch(output.into_dispatch());
        }
        // Burn takes longer: it makes a product and a weight gradient for each matrix.
        let output = self.apply(input.reshape([rows, d_input]), weight, bias, shared);
        shape[D - 1] = d_output;
        output.reshape(shape)
    }

    fn apply(
        &self,
        input: Tensor<2>,
        weight: Tensor<2>,
        bias: Option<Tensor<1>>,
        shared: Option<&SharedInput>,
    ) -> Tensor<2> {
        // Burn's own function will do without a gradient, and keeps a quantized weight.
        if !is_tracked(&weight) {
            return linear(input, weight, bias);
        }
        let [rows, _] = input.dims();
        let device = input.device();
        let with_input = is_tracked(&input);
        let pass = cost::Pass::of_linear(rows, self.widths(), input.dtype(), with_input);
        let aop = cost::ruled(&self.aop, device.as_dispatch(), pass);
        let exact = aop.is_exact(rows, with_input);
        // Packing draws random bits by the number of the pass.
        let counted = !exact || aop.stored_input != StoredInput::Full;
        if !counted {
            self.state.note_exact(rows, with_input);
        }
        let layer = AopLayer {
            config: aop,
            time: cost::step_time(&aop, device.as_dispatch(), pass),
            state: counted.then(|| self.state.clone()),
            shared: shared.cloned(),
        };
        let bias = match bias {
            Some(bias) => Bias::<Dispatch>::Some(bias.into_dispatch()),
            None => Bias::None,
        };
        Tensor::from_dispatch(Dispatch::memaop_linear(
            input.into_dispatch(),
            weight.into_dispatch(),
            bias,
            layer,
        ))
    }

    /// How the weight gradient is approximated.
    pub fn aop(&self) -> AopConfig {
        self.aop
    }

    /// Whether the gradients of a batch of `rows` rows on `device` are exact at every step, because
    /// K >= M or by the [cost rule](AopConfig::cost_rule). The input is assumed to have the
    /// weight's type and, as in all layers but the first, to need a gradient.
    pub fn is_exact(&self, rows: usize, device: &Device) -> bool {
        let pass = cost::Pass::of_linear(rows, self.widths(), self.weight.val().dtype(), true);
        let aop = cost::ruled(&self.aop, device.as_dispatch(), pass);
        rows == 0 || !is_supported(device.as_dispatch()) || aop.is_exact(rows, true)
    }

    /// The inputs and the outputs.
    fn widths(&self) -> [usize; 2] {
        self.weight.lazy_shape().dims()
    }

    /// Reads the state of the memory on the layer's device. Waits for the device.
    pub fn memory_stats(&self) -> MemoryStats {
        self.state.present().stats()
    }

    /// The random bits of a forward pass, for an activation beside this layer.
    pub(in crate::layers) fn pass_random(&self, device: &Device) -> Random {
        self.state.pass_random(self.aop.seed, device)
    }
}

/// Whether a backward pass asks for the gradient of a tensor.
pub(super) fn is_tracked<const D: usize>(tensor: &Tensor<D>) -> bool {
    #[cfg(feature = "autodiff")]
    return tensor.is_tracked();
    #[cfg(not(feature = "autodiff"))]
    return {
        let _ = tensor;
        false
    };
}

layer_module!(MemAopLinear, as "Struct:Linear", with AopConfig::validate);

impl ModuleDisplay for MemAopLinear {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [d_input, d_output] = self.weight.shape().dims();
        content
            .add("d_input", &d_input)
            .add("d_output", &d_output)
            .add("bias", &self.bias.is_some())
            .add_debug_attribute("outer_products", &self.aop.outer_products)
            .add_debug_attribute("method", &self.aop.method)
            .add("exact_steps", &self.aop.exact_steps)
            .add_debug_attribute("stored_input", &self.aop.stored_input)
            .optional()
    }
}
