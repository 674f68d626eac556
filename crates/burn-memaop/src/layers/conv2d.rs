use burn::{
    backend::Dispatch,
    config::Config,
    module::{
        Content, Devices, DisplaySettings, Initializer, Module, ModuleDisplay,
        ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
    },
    nn::{
        PaddingConfig2d,
        conv::{Conv2d, Conv2dConfig},
    },
    tensor::{DType, Device, Tensor, module::conv2d},
};

use super::{
    linear::is_tracked,
    module::{is_replaced, layer_module},
};
use crate::{
    backward::{AopLayer, LayerOps, cost, is_supported},
    config::{AopConfig, OuterProducts, StoredInput},
    rows::{Bias, ExactOps, window::Window},
    state::{
        LayerState,
        offer::{self, Purpose, Wish},
    },
};

/// Configuration to create a [`MemAopConv2d`] layer, with the fields of Burn's
/// [`Conv2dConfig`]. To set an [`AopConfig`], use [`with_aop`](crate::with_aop).
#[derive(Config, Debug)]
pub struct MemAopConv2dConfig {
    /// The numbers of channels of input and output.
    pub channels: [usize; 2],
    /// The size of the kernel.
    pub kernel_size: [usize; 2],
    /// The stride of the convolution.
    #[config(default = "[1, 1]")]
    pub stride: [usize; 2],
    /// Spacing between kernel elements.
    #[config(default = "[1, 1]")]
    pub dilation: [usize; 2],
    /// Controls the connections between input and output channels.
    #[config(default = "1")]
    pub groups: usize,
    /// The padding configuration.
    #[config(default = "PaddingConfig2d::Valid")]
    pub padding: PaddingConfig2d,
    /// If bias should be added to the output.
    #[config(default = true)]
    pub bias: bool,
    /// The type of function used to initialize neural network parameters.
    #[config(
        default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }"
    )]
    pub initializer: Initializer,
}

impl MemAopConv2dConfig {
    /// Creates a [`MemAopConv2d`] with the parameters that [`Conv2dConfig::init`] gives from the
    /// same random state.
    ///
    /// # Panics
    ///
    /// Panics if `groups` does not divide both numbers of channels.
    pub fn init(&self, device: &Device) -> MemAopConv2d {
        let conv2d = Conv2dConfig::new(self.channels, self.kernel_size)
            .with_stride(self.stride)
            .with_dilation(self.dilation)
            .with_groups(self.groups)
            .with_padding(self.padding.clone())
            .with_bias(self.bias)
            .with_initializer(self.initializer.clone())
            .init(device);
        MemAopConv2d::from_conv2d(conv2d, AopConfig::new())
    }
}

/// Applies a 2D convolution over input tensors, and back-propagates to its weight with K of the M
/// outer products of the exact gradient.
///
/// Create it with [`MemAopConv2dConfig`] or [`from_conv2d`](Self::from_conv2d).
///
/// A row is a position of the output (M is images times height times width), and its input is the
/// patch of the image that the position sees. A position is drawn by the norms of its patch and its
/// gradient (with several groups, by the root of the sum of the squares of their products), and
/// only drawn patches are unfolded. With [`OuterProducts::Auto`], the default, all are used,
/// because the rule that chooses K takes rows for independent, and positions of an image are not.
///
/// The gradients of input and bias are exact, and so is that of the weight if K >= M, or if the
/// [cost rule](AopConfig::cost_rule) finds that nothing is saved (on CPUs mostly with few
/// channels). In single precision on CPUs this crate has products of its own, for K = M too, unless
/// Burn's are as fast (`docs/convolutions.md`). They differ from Burn's by rounding alone.
///
/// There is no [memory](crate::Memory), which would be as large as the unfolded input. The
/// [state](crate::MemAopLinear#state) of the layer is the number of its steps. If K < M, a value
/// that is not finite makes the whole gradient of the weight NaN.
#[derive(Debug, Clone)]
pub struct MemAopConv2d {
    /// Tensor of shape `[channels_out, channels_in / groups, kernel_size_1, kernel_size_2]`,
    /// initialized as that of [`Conv2d`].
    pub weight: Param<Tensor<4>>,
    /// Tensor of shape `[channels_out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// Stride of the convolution.
    pub stride: [usize; 2],
    /// Size of the kernel.
    pub kernel_size: [usize; 2],
    /// Spacing between kernel elements.
    pub dilation: [usize; 2],
    /// Controls the connections between input and output channels.
    pub groups: usize,
    /// The padding configuration.
    pub padding: PaddingConfig2d,
    aop: AopConfig,
    state: LayerState,
}

impl MemAopConv2d {
    /// Takes the parameters of a [`Conv2d`], with their ids, so that an optimizer's state stays
    /// with them.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate_convolution`] rejects `aop`.
    pub fn from_conv2d(conv2d: Conv2d, aop: AopConfig) -> Self {
        let state = LayerState::new(&conv2d.weight.lazy_device());
        Self {
            weight: conv2d.weight,
            bias: conv2d.bias,
            stride: conv2d.stride,
            kernel_size: conv2d.kernel_size,
            dilation: conv2d.dilation,
            groups: conv2d.groups,
            padding: conv2d.padding,
            aop: valid(aop),
            state,
        }
    }

    /// The same layer, approximated in another way; [`with_aop`](crate::with_aop) is for whole
    /// models. The layer goes on with the present state, but shares it no more.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate_convolution`] rejects `aop`.
    pub fn with_aop(mut self, aop: AopConfig) -> Self {
        let before = std::mem::replace(&mut self.aop, valid(aop));
        self.state = self.state.reconfigured(&before, &aop);
        self
    }

    /// Gives the parameters back, with their ids.
    pub fn into_conv2d(self) -> Conv2d {
        Conv2d {
            weight: self.weight,
            bias: self.bias,
            stride: self.stride,
            kernel_size: self.kernel_size,
            dilation: self.dilation,
            groups: self.groups,
            padding: self.padding,
        }
    }

    /// Applies the forward pass on the input tensor.
    ///
    /// # Shapes
    ///
    /// - input: `[batch_size, channels_in, height_in, width_in]`
    /// - output: `[batch_size, channels_out, height_out, width_out]`
    ///
    /// # Panics
    ///
    /// Panics if the input has other channels or, padded, is smaller than the kernel.
    pub fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        let device = input.device();
        let weight = self.weight.val();
        let [images, channels, height, width] = input.dims();
        let expected = weight.dims()[1] * self.groups;
        assert!(
            channels == expected,
            "MemAopConv2d: Number of channels in input tensor and input channels of convolution must be equal. \
             got: {channels}, expected: {expected}"
        );
        let window = self.window([height, width]);
        let Some(output) = window.checked_output() else {
            panic!(
                "MemAopConv2d: the padded input must be at least as large as the kernel {:?} (dilation {:?}), but the \
                 input is {height} x {width} and the padding {:?}",
                self.kernel_size, self.dilation, self.padding
            );
        };
        let bias = self.bias.as_ref().map(Param::val);
        let rows = images * output[0] * output[1];
        let (dtype, with_input) = (input.dtype(), is_tracked(&input));
        // Without anything to multiply, the gradients are zeros.
        let empty = [rows, window.patch(), height, width, weight.dims()[0]].contains(&0);
        // Burn's own function keeps what is quantized.
        let quantized = |dtype: DType| !dtype.is_float();
        let tracked = is_tracked(&weight);
        if empty
            || !is_supported(device.as_dispatch())
            || quantized(weight.dtype())
            || bias.as_ref().is_some_and(|bias| quantized(bias.dtype()))
            || !tracked && device.is_autodiff()
        {
            if tracked {
                self.state.note_exact(rows, with_input);
            }
            return conv2d(input, weight, bias, window.options());
        }
        let bias = match bias {
            Some(bias) => Bias::<Dispatch>::Some(bias.into_dispatch()),
            None => Bias::None,
        };
        let (input, weight) = (input.into_dispatch(), weight.into_dispatch());
        if !tracked {
            return Tensor::from_dispatch(Dispatch::memaop_convolve(input, weight, bias, window));
        }

        let pass = pass(images, &window, dtype, with_input);
        let aop = cost::ruled(&self.applied(), device.as_dispatch(), pass);
        // Packing draws random bits by the number of the pass.
        let counted = !aop.is_exact(rows, with_input) || aop.stored_input != StoredInput::Full;
        if !counted {
            self.state.note_exact(rows, with_input);
        }
        let layer = AopLayer {
            config: aop,
            time: cost::step_time(&aop, device.as_dispatch(), pass),
            state: counted.then(|| self.state.clone()),
            shared: None,
        };
        Tensor::from_dispatch(Dispatch::memaop_conv2d(input, weight, bias, window, layer))
    }

    /// How the weight gradient is approximated.
    pub fn aop(&self) -> AopConfig {
        self.aop
    }

    /// Whether the weight gradient of a batch of this shape
    /// (`[batch_size, channels_in, height_in, width_in]`) on `device` is exact at every step,
    /// because K >= M or by the [cost rule](AopConfig::cost_rule). The input is assumed to have the
    /// weight's type and to need a gradient, as in all layers but the first.
    pub fn is_exact(&self, input: [usize; 4], device: &Device) -> bool {
        let [images, _, height, width] = input;
        let window = self.window([height, width]);
        let Some([height, width]) = window.checked_output() else {
            return true;
        };
        let rows = images * height * width;
        let pass = pass(images, &window, self.weight.val().dtype(), true);
        let aop = cost::ruled(&self.applied(), device.as_dispatch(), pass);
        rows == 0 || !is_supported(device.as_dispatch()) || aop.is_exact(rows, true)
    }

    /// The configuration, with all rows where a linear layer would choose K.
    fn applied(&self) -> AopConfig {
        match self.aop.outer_products {
            OuterProducts::Auto => self.aop.with_outer_products(OuterProducts::All),
            _ => self.aop,
        }
    }

    fn window(&self, size: [usize; 2]) -> Window {
        let [channels, of_group, kernel @ ..] = self.weight.lazy_shape().dims::<4>();
        Window {
            channels: [of_group * self.groups, channels],
            size,
            kernel,
            stride: self.stride,
            dilation: self.dilation,
            padding: self.pairs(size),
            groups: self.groups,
        }
    }

    /// The padding before and after, in height and width. With `Same` an odd one is after.
    fn pairs(&self, size: [usize; 2]) -> [(usize, usize); 2] {
        match self.padding {
            PaddingConfig2d::Valid => [(0, 0); 2],
            PaddingConfig2d::Explicit(top, left, bottom, right) => [(top, bottom), (left, right)],
            PaddingConfig2d::Same => std::array::from_fn(|axis| {
                let stride = self.stride[axis];
                let last = size[axis].div_ceil(stride).saturating_sub(1) * stride;
                let padding = (last + self.kernel_size[axis]).saturating_sub(size[axis]);
                (padding / 2, padding - padding / 2)
            }),
        }
    }

    /// The values of a patch in one group, and the channels of the output.
    fn widths(&self) -> [usize; 2] {
        let [channels, of_group, height, width] = self.weight.lazy_shape().dims();
        [of_group * height * width, channels]
    }
}

/// A backward pass, for the cost rule.
fn pass(images: usize, window: &Window, dtype: DType, with_input: bool) -> cost::Pass {
    let rows = images * window.positions();
    let read = images * window.channels[0] * window.size[0] * window.size[1];
    cost::Pass {
        rows,
        d_input: window.patch(),
        d_output: window.channels[1],
        read: window.channels[1] + read.div_ceil(rows.max(1)),
        gathered: window.groups * window.patch(),
        dtype,
        with_input,
    }
}

fn valid(aop: AopConfig) -> AopConfig {
    if let Err(error) = aop.validate_convolution() {
        panic!("{error}");
    }
    aop
}

layer_module!(MemAopConv2d, as "Struct:Conv2d", with AopConfig::validate_convolution);

impl ModuleDisplay for MemAopConv2d {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [channels, of_group, _, _] = self.weight.lazy_shape().dims();
        content
            .add("ch_in", &(of_group * self.groups))
            .add("ch_out", &channels)
            .add_debug_attribute("stride", &self.stride)
            .add_debug_attribute("kernel_size", &self.kernel_size)
            .add_debug_attribute("dilation", &self.dilation)
            .add("groups", &self.groups)
            .add_debug_attribute("padding", &self.padding)
            .add_debug_attribute("outer_products", &self.aop.outer_products)
            .add_debug_attribute("method", &self.aop.method)
            .add("exact_steps", &self.aop.exact_steps)
            .add_debug_attribute("stored_input", &self.aop.stored_input)
            .optional()
    }
}
