//! Saving and loading: with the memory, without it, and what does not fit.

use burn::{
    module::{Module, ModuleVisitor, Param, ParamGroup, ParamId},
    nn::{Linear, LinearConfig, transformer::TransformerEncoderConfig},
    optim::{AdamConfig, GradientsParams, ModuleOptimizer},
    store::{
        BurnToPyTorchAdapter, HalfPrecisionAdapter, ModuleAdapter, ModuleRecord, ModuleSnapshot,
        PyTorchToBurnAdapter, SafetensorsStore,
    },
    tensor::{DType, Device, Int, Tensor, TensorData, activation::relu},
};
use burn_memaop::{
    AopConfig, AopObserver, MemAopLinear, MemAopLinearConfig, Memory, Method, OuterProducts,
    baseline::Baseline, reset, transformer::MemAopTransformerEncoder,
};

use ciborium::Value;

use crate::support::{Matrix, Random, bits, published};

#[derive(Module, Debug)]
struct Mlp {
    hidden: MemAopLinear,
    output: MemAopLinear,
}

fn device() -> Device {
    Device::flex().autodiff()
}

fn layer(d_input: usize, d_output: usize) -> MemAopLinear {
    let aop = published()
        .with_outer_products(OuterProducts::Ratio(0.8))
        .with_method(Method::Baseline(Baseline::WeightedK(Memory::Balanced {
            decay: 0.9,
        })));
    MemAopLinearConfig::new(d_input, d_output)
        .init(&device())
        .with_aop(aop)
}

fn model() -> Mlp {
    Mlp {
        hidden: layer(6, 8),
        output: layer(8, 3),
    }
}

fn bytes(record: ModuleRecord) -> ModuleRecord {
    ModuleRecord::from_bytes(record.into_bytes().unwrap()).unwrap()
}

fn train(mut model: Mlp, optimizer: &mut ModuleOptimizer, batches: &[Matrix]) -> Mlp {
    for batch in batches {
        let hidden = relu(model.hidden.forward(batch.tensor(&device(), DType::F32)));
        let output = model.output.forward(hidden);
        let loss = (output.clone() * output - 1.0).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(0.01, model, grads);
    }
    model
}

fn weights(model: &Mlp) -> Vec<u32> {
    [&model.hidden, &model.output]
        .into_iter()
        .flat_map(|layer| bits(layer.weight.val()))
        .collect()
}

#[test]
fn a_stopped_training_goes_on_to_the_same_weights() {
    let mut random = Random(40);
    // The batches grow after the stop, so that rows saved and rows new meet.
    let batches: Vec<_> = [10, 10, 7, 10, 12, 10]
        .into_iter()
        .map(|rows| random.matrix(rows, 6))
        .collect();
    let start = model();
    let (first, second) = batches.split_at(3);

    let mut optimizer = AdamConfig::new().init();
    let middle = train(reset(start.clone()), &mut optimizer, first);
    let record = || bytes(middle.clone().into_record());
    let resumed = model().load_record(record());
    let forgetful = reset(model().load_record(record()));
    assert_eq!(
        resumed.hidden.memory_stats(),
        middle.hidden.memory_stats(),
        "the memory is there"
    );
    assert_eq!(resumed.hidden.memory_stats().step, 3);
    let straight = train(middle, &mut optimizer.clone(), second);
    let resumed = train(resumed, &mut optimizer.clone(), second);
    assert_eq!(weights(&resumed), weights(&straight));

    // Without its memory, the training goes elsewhere: the test would notice a lost one.
    let forgetful = train(forgetful, &mut optimizer, second);
    assert_ne!(weights(&forgetful), weights(&straight));
}

#[test]
fn a_memory_in_double_precision_keeps_its_bits() {
    let device = device();
    let mut random = Random(41);
    let linear = LinearConfig::new(5, 3).with_bias(false).init(&device);
    let mut layer = MemAopLinear::from_linear(
        linear,
        published().with_outer_products(OuterProducts::Count(2)),
    );
    layer.weight = layer
        .weight
        .map(|weight| weight.cast(DType::F64).detach().require_grad());
    let input = random.matrix(7, 5).tensor(&device, DType::F64);
    layer.forward(input).square().sum().backward();
    let before = layer.memory_stats();
    assert_eq!((before.rows, before.pending), (7, 5));

    let target = reset(layer.clone());
    let target = target.load_record(bytes(layer.into_record()));
    assert_eq!(target.memory_stats(), before);
}

/// A memory that was saved in double precision goes on in a layer of single precision on a GPU, whether or not that has the
/// type; and what a GPU saves is not copied back to it.
#[cfg(feature = "wgpu")]
#[test]
fn a_memory_in_double_precision_goes_on_on_a_gpu() {
    struct OnHost(usize);
    impl ModuleVisitor for OnHost {
        fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
            assert_eq!(param.val().device(), Device::flex());
            self.0 += 1;
        }
    }
    let Some(gpu) = crate::backends::wgpu() else {
        return;
    };
    let aop = published().with_outer_products(OuterProducts::Count(2));
    let on = |device: &Device| {
        MemAopLinear::from_linear(LinearConfig::new(5, 3).with_bias(false).init(device), aop)
    };
    let mut layer = on(&device());
    layer.weight = layer
        .weight
        .map(|weight| weight.cast(DType::F64).detach().require_grad());
    let input = Random(41).matrix(7, 5).tensor(&device(), DType::F64);
    layer.forward(input).square().sum().backward();
    let before = layer.memory_stats();

    let gpu = gpu.autodiff();
    let record = bytes(layer.into_record()).cast_to_module_dtype();
    let loaded = on(&gpu).load_record(record);
    let after = loaded.memory_stats();
    assert_eq!((after.step, after.rows, after.pending), (1, 7, 5));
    assert!((after.grad_norm - before.grad_norm).abs() < 1e-6 * before.grad_norm);
    let input = Tensor::<2>::ones([7, 5], &gpu);
    loaded.forward(input).square().sum().backward();
    assert_eq!(loaded.memory_stats().step, 2);
    let mut host = OnHost(0);
    loaded.visit(&mut host);
    assert!(host.0 > 0);
}

#[test]
fn an_empty_memory_is_saved_and_loaded() {
    let mut random = Random(42);
    let record = bytes(layer(6, 8).into_record());
    let target = layer(6, 8);
    let input = random.matrix(10, 6).tensor(&device(), DType::F32);
    target.forward(input).square().sum().backward();
    assert_eq!(target.memory_stats().step, 1);
    let target = target.load_record(record);
    assert_eq!(
        (target.memory_stats().step, target.memory_stats().rows),
        (0, 0)
    );
}

#[test]
fn records_of_linear_load_and_ours_load_into_linear() {
    let mut random = Random(43);
    let linear = LinearConfig::new(6, 8).init(&device());
    let weight = bits(linear.weight.val());
    let ours = layer(6, 8).load_record(bytes(linear.into_record()).allow_partial(true));
    assert_eq!(bits(ours.weight.val()), weight);
    assert_eq!(ours.memory_stats().rows, 0);

    let input = random.matrix(10, 6).tensor(&device(), DType::F32);
    ours.forward(input).square().sum().backward();
    let record = bytes(ours.into_record());
    let linear: Linear = LinearConfig::new(6, 8)
        .init(&device())
        .load_record(record.allow_unused(true));
    assert_eq!(bits(linear.weight.val()), weight);
}

/// Without a memory, and unless it is asked for, a record has nothing that Burn's has not.
#[test]
fn a_layer_saves_its_state_where_it_is_asked_to() {
    let linear = LinearConfig::new(6, 8).init(&device());
    let of = |aop| MemAopLinear::from_linear(linear.clone(), aop);
    let drawn = AopConfig::new()
        .with_outer_products(OuterProducts::Count(3))
        .with_cost_rule(false);
    let input = Random(49).matrix(10, 6).tensor(&device(), DType::F32);
    let trained = |aop| {
        let layer = of(aop);
        layer.forward(input.clone()).square().sum().backward();
        assert_eq!(layer.memory_stats().step, 1);
        layer
    };
    let plain = || bytes(trained(drawn).into_record());
    assert_eq!(plain().len(), linear.clone().into_record().len());
    LinearConfig::new(6, 8).init(&device()).load_record(plain());
    // The weight was loaded, so the state of the old one goes.
    assert_eq!(trained(drawn).load_record(plain()).memory_stats().step, 0);

    let saving = drawn.with_saved_state(true);
    let whole = || bytes(trained(saving).into_record());
    assert_eq!(of(saving).load_record(whole()).memory_stats().step, 1);
    let error = of(drawn).try_load_record(whole()).unwrap_err().to_string();
    assert!(
        error.contains("Unused tensors: [\"memory.content\", \"memory.header\"]"),
        "{error}"
    );
    let without = of(drawn).load_record(whole().allow_unused(true));
    assert_eq!(without.memory_stats().step, 0);
    let error = of(saving).try_load_record(plain()).unwrap_err().to_string();
    assert!(
        error.contains("Missing tensors: [\"memory.header\"]"),
        "{error}"
    );
    assert_eq!(
        of(saving)
            .load_record(plain().allow_partial(true))
            .memory_stats()
            .step,
        0
    );
}

#[test]
fn loading_leaves_clones_of_the_target_alone() {
    let mut random = Random(44);
    let target = layer(6, 8);
    let input = random.matrix(10, 6).tensor(&device(), DType::F32);
    target.forward(input).square().sum().backward();
    let other = target.clone();
    let before = other.memory_stats();
    let loaded = target.load_record(bytes(layer(6, 8).into_record()));
    assert_eq!(loaded.memory_stats().step, 0);
    assert_eq!(other.memory_stats(), before);
}

#[test]
fn a_record_of_other_widths_is_refused_and_changes_nothing() {
    let mut random = Random(45);
    let target = layer(6, 8);
    let input = random.matrix(10, 6).tensor(&device(), DType::F32);
    target.forward(input.clone()).square().sum().backward();
    let before = (bits(target.weight.val()), target.memory_stats());

    let other = layer(5, 8);
    other
        .forward(random.matrix(10, 5).tensor(&device(), DType::F32))
        .square()
        .sum()
        .backward();
    let error = target
        .clone()
        .try_load_record(bytes(other.into_record()))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "Record validation error: Apply errors: [\"weight: shape mismatch, expected Shape { dims: \
         [6, 8] } but record has Shape { dims: [5, 8] }\"]"
    );
    assert_eq!((bits(target.weight.val()), target.memory_stats()), before);
}

/// The weight fits, but the rows of the memory are those of another weight before it.
#[test]
fn a_memory_of_other_widths_is_refused() {
    let mut other = layer(5, 8);
    let input = Random(46).matrix(10, 5).tensor(&device(), DType::F32);
    other.forward(input).square().sum().backward();
    other.weight = layer(6, 8).weight;
    let error = layer(6, 8).try_load_record(bytes(other.into_record()));
    let error = error.unwrap_err().to_string();
    let rule = "a memory of the shapes [[10, 6], [10, 8], [10, 1]], as the layer has them: the record has \
                [[10, 5], [10, 8], [10, 1]]";
    assert!(error.contains(rule), "{error}");
}

/// The tensors of a layer, for records that the crate would not write.
#[derive(Module, Debug)]
struct Written {
    weight: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
    memory: WrittenState,
}

#[derive(Module, Debug)]
struct WrittenState {
    header: Param<Tensor<1, Int>>,
    content: Param<Tensor<1, Int>>,
}

/// The record of a layer 6 -> 8 with a state of this version and these bytes.
fn written(version: i32, mut content: Vec<u8>) -> ModuleRecord {
    let device = device();
    let ints = |values: Vec<i32>| {
        let data = TensorData::new(values.clone(), [values.len()]);
        let tensor = Tensor::<1, Int>::from_data(data, (&device, DType::I32));
        Param::initialized(ParamId::new(), tensor)
    };
    content.resize(content.len().next_multiple_of(4), 0);
    let header = vec![version, content.len() as i32 / 4, 0];
    let (words, _) = content.as_chunks::<4>();
    let layer = Written {
        weight: Param::from_tensor(Tensor::zeros([6, 8], &device)),
        bias: Param::from_tensor(Tensor::zeros([8], &device)),
        memory: WrittenState {
            header: ints(header),
            content: ints(words.iter().map(|&word| i32::from_le_bytes(word)).collect()),
        },
    };
    bytes(layer.into_record())
}

/// One state with these entries beside the number of its steps, 5.
fn state(entries: &[(&str, Value)]) -> Vec<u8> {
    let mut map = vec![(Value::from("step"), Value::from(5))];
    map.extend(
        entries
            .iter()
            .map(|(name, value)| (Value::from(*name), value.clone())),
    );
    let mut content = Vec::new();
    ciborium::into_writer(&Value::Array(vec![Value::Map(map)]), &mut content).unwrap();
    content
}

#[test]
fn entries_that_are_not_known_are_skipped() {
    let content = state(&[("of a later version", Value::from("any"))]);
    let loaded = layer(6, 8).load_record(written(2, content));
    assert_eq!(loaded.memory_stats().step, 5);
}

#[test]
fn a_later_version_is_refused_by_its_number() {
    let error = layer(6, 8).try_load_record(written(3, state(&[])));
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("the record has version 3, and 2 is the latest known"),
        "{error}"
    );
}

#[test]
fn damaged_states_are_refused() {
    let cut = state(&[("passes", Value::from(3))]);
    let cut = cut[..cut.len() - 5].to_vec();
    let negative = state(&[("k", Value::from(-3))]);
    let few = state(&[("figures", Value::Array(vec![Value::from(1.0)]))]);
    for content in [vec![0xFF; 8], cut, negative, few] {
        let error = layer(6, 8).try_load_record(written(2, content.clone()));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("a sound state"), "{content:?}: {error}");
    }
}

/// Rows with fewer bytes than their shape needs, and rows that are no floats.
#[test]
fn damaged_rows_are_refused() {
    let tensor =
        |width: usize| Value::serialized(&TensorData::zeros::<f32, _>([4, width])).unwrap();
    let memory = |input| {
        let rows = vec![input, tensor(8), tensor(1)];
        state(&[("rows", Value::Array(vec![Value::Array(rows)]))])
    };
    let loaded = layer(6, 8).load_record(written(2, memory(tensor(6))));
    assert_eq!(loaded.memory_stats().rows, 4);

    let mut short = tensor(6);
    let Value::Map(fields) = &mut short else {
        panic!("a tensor is a map");
    };
    let bytes = fields
        .iter_mut()
        .find_map(|(_, value)| value.as_bytes_mut());
    bytes.expect("the values are bytes").truncate(92);
    let ints = Value::serialized(&TensorData::zeros::<i32, _>([4, 6])).unwrap();
    for (input, rule) in [
        (short, "a sound state"),
        (ints, "a memory in single or double precision"),
    ] {
        let error = layer(6, 8).try_load_record(written(2, memory(input)));
        let error = error.unwrap_err().to_string();
        assert!(error.contains(rule), "{error}");
    }
}

/// Visitors and mappers that are neither Burn's nor burn-store's see no state, and change none.
#[test]
fn what_is_no_record_leaves_the_state_alone() {
    struct Other(Vec<usize>);
    impl ModuleVisitor for Other {
        fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
            self.0.extend(
                param
                    .val()
                    .into_data()
                    .iter::<i64>()
                    .map(|value| value as usize),
            );
        }
    }
    let trained = layer(6, 8);
    let input = Random(47).matrix(10, 6).tensor(&device(), DType::F32);
    trained.forward(input).square().sum().backward();
    let mut other = Other(Vec::new());
    trained.visit(&mut other);
    assert_eq!(other.0, [0, 0, 0], "a version that stands for no state");
}

/// What no measurement gives is as none: the layer begins anew.
#[test]
fn measurements_that_cannot_be_are_left_out() {
    let numbers = |first: f64| Value::Array([first, 0.0, 0.0, 0.0, 0.0].map(Value::from).to_vec());
    let of_input = |first: f64| {
        let noise = Value::Map(vec![(Value::from("input_added"), numbers(first))]);
        state(&[("noise", noise), ("input_chosen", Value::from(0.25))])
    };
    for (first, rows) in [(0.5, 16), (-1.0, 64)] {
        let aop = AopConfig::new()
            .with_input_gradient(OuterProducts::Auto)
            .with_saved_state(true)
            .with_cost_rule(false);
        let layer = MemAopLinearConfig::new(6, 8).init(&device()).with_aop(aop);
        let layer = layer.load_record(written(2, of_input(first)));
        let observer = AopObserver::new();
        observer.observe(&layer);
        let x = Random(48).matrix(64, 6).tensor(&device(), DType::F32);
        layer.forward(x.require_grad()).sum().backward();
        let found = observer.observe(&layer).layers[0].input_rows;
        assert_eq!(found, Some(rows));
    }
}

/// What is pending belongs to the weights that it was left by.
#[test]
fn weights_without_a_memory_empty_it() {
    let mut random = Random(46);
    let trained = || {
        let layer = layer(6, 8);
        let input = Random(47).matrix(10, 6).tensor(&device(), DType::F32);
        layer.forward(input).square().sum().backward();
        assert_eq!(layer.memory_stats().step, 1);
        layer
    };
    let empty = |layer: MemAopLinear| {
        let stats = layer.memory_stats();
        assert_eq!((stats.step, stats.rows), (0, 0));
    };
    let linear = LinearConfig::new(6, 8).init(&device());
    empty(trained().load_record(bytes(linear.clone().into_record()).allow_partial(true)));

    // A record with the ids of the layer's own parameters too.
    let layer = trained();
    let own = layer.clone().into_linear();
    empty(layer.load_record(bytes(own.into_record()).allow_partial(true)));

    // A record of other layers changes nothing here, and neither does an optimizer.
    let model = Mlp {
        hidden: trained(),
        output: self::layer(8, 3),
    };
    let record = model
        .clone()
        .into_record_group(ParamGroup::from_path("output"));
    let model = model.load_record(bytes(record).allow_partial(true));
    assert_eq!(model.hidden.memory_stats().step, 1);
    let batches = [random.matrix(10, 6)];
    let model = train(model, &mut AdamConfig::new().init(), &batches);
    assert_eq!(model.hidden.memory_stats().step, 2);
}

pub fn exported(module: &impl Module, adapter: impl ModuleAdapter + 'static) -> Vec<u8> {
    let store = SafetensorsStore::from_bytes(None).clear_metadata();
    let mut store = store.with_to_adapter(adapter);
    module.save_into(&mut store).unwrap();
    store.get_bytes().unwrap()
}

pub fn imported(module: &mut impl Module, file: Vec<u8>, adapter: impl ModuleAdapter + 'static) {
    let mut store = SafetensorsStore::from_bytes(Some(file)).with_from_adapter(adapter);
    let result = module.load_from(&mut store).unwrap();
    assert!(result.is_success(), "{result:?}");
}

/// To PyTorch's layout and back, as a model with Burn's own layers.
#[test]
fn models_are_exchanged_as_those_with_linear() {
    #[derive(Module, Debug)]
    struct Burns {
        hidden: Linear,
        output: Linear,
    }
    // Square, so that a weight that is not transposed is not noticed by its shape.
    let burns = Burns {
        hidden: LinearConfig::new(6, 6).init(&device()),
        output: LinearConfig::new(6, 3).init(&device()),
    };
    let ours = |burns: &Burns| {
        let aop = published().with_outer_products(OuterProducts::Count(4));
        let model = Mlp {
            hidden: MemAopLinear::from_linear(burns.hidden.clone(), aop),
            output: MemAopLinear::from_linear(burns.output.clone(), aop),
        };
        let input = Random(48).matrix(10, 6).tensor(&device(), DType::F32);
        let hidden = relu(model.hidden.forward(input));
        model.output.forward(hidden).square().sum().backward();
        assert!(model.hidden.memory_stats().pending > 0);
        model
    };
    let model = ours(&burns);
    let file = exported(&burns, BurnToPyTorchAdapter);
    assert!(exported(&model, BurnToPyTorchAdapter) == file);

    let other = Burns {
        hidden: LinearConfig::new(6, 6).init(&device()),
        output: LinearConfig::new(6, 3).init(&device()),
    };
    let mut target = ours(&other);
    imported(&mut target, file, PyTorchToBurnAdapter);
    assert_eq!(
        bits(target.hidden.weight.val()),
        bits(burns.hidden.weight.val())
    );
    assert_eq!(
        bits(target.output.weight.val()),
        bits(burns.output.weight.val())
    );
    // The memory was that of other weights.
    assert_eq!(target.hidden.memory_stats().step, 0);

    let half = exported(&burns, HalfPrecisionAdapter::new());
    assert!(exported(&model, HalfPrecisionAdapter::new()) == half);
    imported(&mut target, half, HalfPrecisionAdapter::new());
    let weight = Matrix::from_tensor(target.hidden.weight.val().inner());
    let rounded = Matrix::from_tensor(burns.hidden.weight.val().inner()).rounded(DType::F16);
    assert_eq!(weight, rounded);
}

#[test]
fn transformers_are_exchanged_as_burns() {
    let config = TransformerEncoderConfig::new(8, 8, 2, 1);
    let burns = config.init(&device());
    let model = MemAopTransformerEncoder::from_encoder(burns.clone(), published());
    let file = exported(&burns, BurnToPyTorchAdapter);
    assert!(exported(&model, BurnToPyTorchAdapter) == file);

    let mut target = MemAopTransformerEncoder::from_encoder(config.init(&device()), published());
    imported(&mut target, file.clone(), PyTorchToBurnAdapter);
    assert!(exported(&target.into_encoder(), BurnToPyTorchAdapter) == file);
}
