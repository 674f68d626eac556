use burn::{
    backend::Dispatch,
    config::Config,
    module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay, Param},
    nn::{Linear, LinearConfig, LinearLayout},
    tensor::{DType, Device, Tensor, assert_shape, module::linear},
};

use crate::{
    backends::assert_supported,
    config::AopConfig,
    cost,
    memory::{MemoryStats, RowMemoryModule},
    ops::{AopLayer, Bias, MemAopOps},
};

/// Configuration to create a [`MemAopLinear`] layer using the
/// [init function](MemAopLinearConfig::init): all of [`LinearConfig`], and [`AopConfig`].
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
    /// How the weight gradient is approximated.
    #[config(default = "AopConfig::new()")]
    pub aop: AopConfig,
}

impl MemAopLinearConfig {
    /// Initialize a new [`MemAopLinear`] module, with the same parameters as
    /// [`LinearConfig::init`] gives from the same random state.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn init(&self, device: &Device) -> MemAopLinear {
        let linear = LinearConfig::new(self.d_input, self.d_output)
            .with_bias(self.bias)
            .with_initializer(self.initializer.clone())
            .with_layout(self.layout)
            .init(device);
        MemAopLinear::from_linear(linear, self.aop)
    }
}

/// Applies a linear transformation to the input tensor, `O = IW + b`, and back-propagates to `W`
/// with K of the M outer products of the exact gradient.
///
/// Should be created with [`MemAopLinearConfig`], or from a [`Linear`] with
/// [`from_linear`](Self::from_linear).
///
/// The gradients of the input and the bias are exact. So is everything where K >= M, where the
/// weight is frozen and in inference: there this layer is [`Linear`]. K, the rows and what becomes
/// of the others are set by [`AopConfig`]; the method is Mem-AOP-GD (Hernandez, Rini, Duman, 2021,
/// arXiv:2110.09164).
///
/// # Memory
///
/// With a [`Memory`](crate::Memory) the layer keeps, for each position of the batch, the sum of the rows that were
/// left out since the position was last chosen: `rows * (d_input + d_output)` values, in single
/// precision (double for double-precision layers).
///
/// - Only a backward pass changes it, once for each forward pass that it goes through; a layer used
///   twice in a forward pass folds in twice. Inference, [`valid`](Module::valid) and the
///   recomputation of gradient checkpointing do not.
/// - It is allocated in the first backward pass. A smaller batch uses its first rows and leaves the
///   others alone; a larger one grows it with rows of zeros.
/// - A clone gets a memory of its own, with the present state. [`fork`](Module::fork), by which
///   burn-train hands a model to its workers at each step, finds the memory of the same thread's
///   last fork to that device.
/// - It moves with the layer to other devices, and is part of its record, under `memory`. The
///   record of a [`Linear`] has none and loads with
///   [`allow_partial(true)`](burn::store::ModuleRecord::allow_partial), the record of this layer
///   into a [`Linear`] with [`allow_unused(true)`](burn::store::ModuleRecord::allow_unused).
///
/// # Rows that are not finite
///
/// A row is left out of the weight gradient, and its position in the memory cleared, where the
/// norm of one of its factors is NaN, infinite or above 1.8e19 (the square overflows). The other
/// rows are not affected. The gradients of input and bias are those of [`Linear`] and do carry
/// such values on.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct MemAopLinear {
    /// Matrix of shape `[d_input, d_output]`, initialized as that of [`Linear`].
    pub weight: Param<Tensor<2>>,
    /// Vector of size `d_output`, initialized as that of [`Linear`].
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    aop: AopConfig,
    memory: RowMemoryModule,
}

impl MemAopLinear {
    /// Takes over the parameters of a [`Linear`], with their ids, so that the state of an
    /// optimizer stays with them. The memory is empty.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn from_linear(linear: Linear, aop: AopConfig) -> Self {
        if let Err(error) = aop.validate() {
            panic!("{error}");
        }
        let [d_input, d_output] = linear.weight.lazy_shape().dims();
        let device = linear.weight.lazy_device();
        Self {
            weight: linear.weight,
            bias: linear.bias,
            aop,
            memory: RowMemoryModule::new(d_input, d_output, &device),
        }
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
    /// The rows of the weight gradient are the elements of all leading dimensions. A tensor of
    /// rank 1 is one row, for which the gradient is always exact.
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `input` is not `d_input`, if `input` has no rows, and if the
    /// feature for the backend of `input` is not enabled; the message names the feature.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let weight = self.weight.val();
        let [d_input, _] = weight.dims();
        assert_shape!(input, [.., d_input]);
        let shape = input.shape();
        assert!(
            shape.num_elements() > 0,
            "MemAopLinear: the input must have at least 1 row, but its shape is {:?}",
            shape.as_slice()
        );
        let bias = self.bias.as_ref().map(Param::val);

        let device = input.device();
        assert_supported(device.as_dispatch());

        let rows = shape.num_elements() / d_input;
        let exact = self.is_exact(rows, &device);
        // A quantized weight has no gradient, and only Burn's own function keeps it quantized.
        if exact || matches!(weight.dtype(), DType::QFloat(_)) {
            if device.is_autodiff() && self.weight.is_require_grad() {
                self.memory.note_exact(rows);
            }
            return linear(input, weight, bias);
        }
        let layer = AopLayer {
            config: self.aop,
            memory: self.memory.handle(),
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

    /// Whether the weight gradient of a batch of `rows` rows on `device` is exact at every step:
    /// because K >= M, or by the [cost rule](AopConfig::cost_rule).
    pub fn is_exact(&self, rows: usize, device: &Device) -> bool {
        let [d_input, d_output] = self.weight.lazy_shape().dims();
        let device = device.as_dispatch();
        self.aop.is_exact(rows)
            || self.aop.cost_rule && !cost::pays(device, &self.aop, rows, d_input, d_output)
    }

    /// Reads the state of the memory. Waits for the device.
    pub fn memory_stats(&self) -> MemoryStats {
        self.memory.stats()
    }

    /// Forgets what the memory holds and starts counting steps from 0, as at the first step.
    pub fn reset_memory(&self) {
        self.memory.reset();
    }
}

impl ModuleDisplay for MemAopLinear {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [d_input, d_output] = self.weight.lazy_shape().dims();
        content
            .add("d_input", &d_input)
            .add("d_output", &d_output)
            .add("bias", &self.bias.is_some())
            .add_debug_attribute("outer_products", &self.aop.outer_products)
            .add_debug_attribute("policy", &self.aop.policy)
            .add_debug_attribute("memory", &self.aop.memory)
            .add_debug_attribute("schedule", &self.aop.schedule)
            .optional()
    }
}
