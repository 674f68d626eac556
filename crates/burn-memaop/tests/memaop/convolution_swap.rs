//! Convolutions as a drop-in for Burn's: records, names, and what is refused.

use burn::{
    module::{Module, Param, Quantizer},
    nn::conv::{Conv2d, Conv2dConfig},
    store::ModuleRecord,
    tensor::{
        DType, Device, Tensor, Tolerance,
        quantization::{Calibration, QuantScheme},
    },
};
use burn_memaop::{
    AopConfig, AopConfigError, AopObserver, MemAopConv2d, MemAopConv2dConfig, Memory, Method,
    OuterProducts,
};

use crate::{
    convolution::{batch, usual},
    images::Images,
    support::{Random, bits, count},
};

#[derive(Module, Debug)]
struct Ours {
    first: MemAopConv2d,
    second: MemAopConv2d,
}

#[derive(Module, Debug)]
struct Burns {
    first: Conv2d,
    second: Conv2d,
}

fn models(device: &Device) -> (Ours, Burns) {
    let conv = |channels| Conv2dConfig::new(channels, [3, 3]).init(device);
    let burns = Burns {
        first: conv([1, 3]),
        second: conv([3, 2]),
    };
    let aop = count(5).with_saved_state(true);
    let ours = Ours {
        first: MemAopConv2d::from_conv2d(burns.first.clone(), aop),
        second: MemAopConv2d::from_conv2d(burns.second.clone(), aop),
    };
    (ours, burns)
}

#[test]
fn records_and_files_are_exchanged_with_burns() {
    let device = Device::flex().autodiff();
    let (ours, burns) = models(&device);
    let x = Images::random(&mut Random(79), [2, 1, 8, 8]).tensor(&device, DType::F32);
    let forward = |model: &Ours| model.second.forward(model.first.forward(x.clone()));
    forward(&ours).sum().backward();

    let bytes =
        |record: ModuleRecord| ModuleRecord::from_bytes(record.into_bytes().unwrap()).unwrap();
    let other = || models(&device);
    // Its own: the number of steps is there.
    let resumed = other().0.load_record(bytes(ours.clone().into_record()));
    assert_eq!(bits(forward(&resumed)), bits(forward(&ours)));
    let observer = AopObserver::new();
    let steps = |model: &Ours| {
        observer.observe(model);
        forward(model).sum().backward();
        let layers = observer.observe(model).layers;
        layers
            .iter()
            .map(|layer| (layer.name.clone(), layer.step))
            .collect::<Vec<_>>()
    };
    let expected = [("first".to_string(), 1), ("second".to_string(), 1)];
    assert_eq!(steps(&resumed), expected);

    let from_burns = other()
        .0
        .load_record(bytes(burns.clone().into_record()).allow_partial(true));
    assert_eq!(
        bits(from_burns.first.weight.val()),
        bits(burns.first.weight.val())
    );
    let to_burns = other()
        .1
        .load_record(bytes(ours.clone().into_record()).allow_unused(true));
    assert_eq!(
        bits(to_burns.second.weight.val()),
        bits(ours.second.weight.val())
    );

    let file = crate::record::exported(&burns, burn::store::BurnToPyTorchAdapter);
    assert!(crate::record::exported(&ours, burn::store::BurnToPyTorchAdapter) == file);
    let mut target = other().0;
    crate::record::imported(&mut target, file, burn::store::PyTorchToBurnAdapter);
    assert_eq!(
        bits(target.second.weight.val()),
        bits(ours.second.weight.val())
    );

    let back = ours.clone().first.into_conv2d();
    assert_eq!(back.weight.id, burns.first.weight.id);
    assert_eq!(Module::num_params(&ours), Module::num_params(&burns));
}

#[test]
fn a_model_is_configured_by_the_names_of_its_layers() {
    let (ours, _) = models(&Device::flex());
    let mut names = Vec::new();
    let ours = burn_memaop::with_aop(ours, |name, aop| {
        names.push(name.to_string());
        aop.with_seed(names.len() as u64)
    });
    assert_eq!(names, ["first", "second"]);
    assert_eq!((ours.first.aop().seed, ours.second.aop().seed), (1, 2));
}

#[test]
fn what_a_convolution_cannot_do_is_refused() {
    let memory = Method::TopK(Memory::Balanced { decay: 0.9 });
    let rows = OuterProducts::Ratio(0.5);
    let messages = [
        (
            AopConfig::new().with_method(memory),
            "AopConfig.method: in a convolution it must have no memory, but got TopK(Balanced { decay: 0.9 })",
        ),
        (
            AopConfig::new().with_input_gradient(rows),
            "AopConfig.input_gradient: in a convolution it must be All, but got Ratio(0.5)",
        ),
    ];
    for (aop, message) in messages {
        assert_eq!(aop.validate(), Ok(()));
        assert_eq!(aop.validate_convolution().unwrap_err().to_string(), message);
    }
    assert_eq!(
        AopConfig::new()
            .with_outer_products(OuterProducts::Count(0))
            .validate_convolution(),
        Err(AopConfigError::Count(0))
    );
}

#[test]
#[should_panic(expected = "AopConfig.method: in a convolution it must have no memory")]
fn a_memory_is_refused_at_once() {
    let aop = AopConfig::new().with_method(Method::TopK(Memory::Published { decay: 1.0 }));
    MemAopConv2dConfig::new([1, 2], [3, 3])
        .init(&Device::flex())
        .with_aop(aop);
}

#[test]
#[should_panic(
    expected = "MemAopConv2d: Number of channels in input tensor and input channels of convolution must be equal. got: 3, expected: 2"
)]
fn other_channels_are_refused() {
    let device = Device::flex();
    MemAopConv2dConfig::new([2, 2], [3, 3])
        .init(&device)
        .forward(Tensor::zeros([1, 3, 5, 5], &device));
}

#[test]
#[should_panic(
    expected = "the padded input must be at least as large as the kernel [3, 3] (dilation [2, 1]), but the \
                           input is 4 x 3 and the padding Valid"
)]
fn an_input_smaller_than_the_kernel_is_refused() {
    let device = Device::flex();
    let config = MemAopConv2dConfig::new([2, 2], [3, 3]).with_dilation([2, 1]);
    config
        .init(&device)
        .forward(Tensor::zeros([1, 2, 4, 3], &device));
}

#[test]
#[should_panic(
    expected = "with_aop: the layer \"second\": AopConfig.input_gradient: in a convolution it must be All"
)]
fn what_a_layer_of_a_model_cannot_do_is_refused_by_its_name() {
    let (ours, _) = models(&Device::flex());
    burn_memaop::with_aop(ours, |name, aop| match name {
        "second" => aop.with_input_gradient(OuterProducts::Auto),
        _ => aop,
    });
}

/// What is trained of a layer, and what is not.
#[test]
fn frozen_parameters_get_no_gradient() {
    let device = Device::flex().autodiff();
    let sizes = usual();
    let mut random = Random(80);
    let conv = sizes.conv2d(&mut random, &device, DType::F32);
    let [x, g] = batch(&mut random, &sizes).map(|images| images.tensor(&device, DType::F32));
    let run = |conv: &Conv2d, k| {
        let layer = MemAopConv2d::from_conv2d(conv.clone(), count(k));
        let x = x.clone().require_grad();
        let grads = (layer.forward(x.clone()) * g.clone()).sum().backward();
        let weight = layer.weight.grad(&grads).map(Images::of);
        let bias = layer.bias.as_ref().and_then(|bias| bias.grad(&grads));
        (Images::of(x.grad(&grads).unwrap()), weight, bias)
    };
    let (dx, weight, bias) = run(&conv, 9);
    let (weight, bias) = (weight.unwrap(), bits(bias.unwrap()));

    let mut without_weight = conv.clone();
    without_weight.weight = without_weight.weight.no_grad();
    let (found, none, found_bias) = run(&without_weight, 9);
    assert!(none.is_none() && found.distance(&dx) < 1e-5);
    let tolerance = Tolerance::<f32>::relative(1e-4).set_absolute(1e-4);
    let expected = conv.bias.as_ref().unwrap().val().dims();
    assert_eq!(found_bias.as_ref().unwrap().dims(), expected);
    let all = run(&conv, sizes.rows()).2.unwrap().into_data();
    found_bias
        .unwrap()
        .into_data()
        .assert_approx_eq(&all, tolerance);

    let mut without_bias = conv.clone();
    without_bias.bias = without_bias.bias.map(Param::no_grad);
    let (found, found_weight, none) = run(&without_bias, 9);
    assert!(none.is_none() && found.distance(&dx) < 1e-6);
    assert_eq!(found_weight.unwrap().distance(&weight), 0.0);

    let mut no_bias = conv.clone();
    no_bias.bias = None;
    assert_eq!(run(&no_bias, 9).1.unwrap().distance(&weight), 0.0);
    assert_eq!(bias.len(), sizes.channels[1]);
}

#[test]
fn quantized_parameters_are_burns() {
    let device = Device::flex();
    let (ours, burns) = models(&device);
    let quantizer = || Quantizer::new(Calibration::MinMax, QuantScheme::default());
    let ours = ours.quantize_weights(&mut quantizer());
    let burns = burns.quantize_weights(&mut quantizer());
    assert!(!ours.first.weight.val().dtype().is_float());
    let x = Images::random(&mut Random(81), [2, 1, 8, 8]).tensor(&device, DType::F32);
    let expected = burns.second.forward(burns.first.forward(x.clone()));
    let found = ours.second.forward(ours.first.forward(x));
    assert_eq!(bits(found), bits(expected));
}

#[test]
fn small_convolutions_are_exact_and_large_ones_are_not() {
    let device = Device::flex();
    let exact = |channels, kernel, groups, size: [usize; 2]| {
        let aop = AopConfig::new().with_outer_products(OuterProducts::Ratio(0.125));
        let layer = MemAopConv2dConfig::new(channels, [kernel; 2])
            .with_groups(groups)
            .init(&device)
            .with_aop(aop);
        layer.is_exact([64, channels[0], size[0], size[1]], &device)
    };
    assert!(exact([1, 32], 3, 1, [28, 28]));
    assert!(exact([64, 64], 3, 64, [16, 16]));
    assert!(!exact([64, 64], 3, 1, [32, 32]));
    assert!(!exact([128, 128], 3, 1, [16, 16]));
}

/// The choice of K takes rows for independent, which positions of one image are not.
#[test]
fn convolutions_do_not_choose_their_rows() {
    let device = Device::flex();
    for aop in [AopConfig::new(), AopConfig::new().with_cost_rule(false)] {
        let layer = MemAopConv2dConfig::new([64, 64], [3, 3])
            .init(&device)
            .with_aop(aop);
        assert!(layer.is_exact([64, 64, 32, 32], &device));
    }
}
