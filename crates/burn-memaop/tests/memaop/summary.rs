//! The table of a model's weights.

use burn::{
    module::{Lora, Module, Param},
    nn::{
        EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, Lstm, LstmConfig,
        conv::{Conv1d, Conv1dConfig},
    },
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{
    AopConfig, MemAopConv2d, MemAopConv2dConfig, MemAopLinear, MemAopLinearConfig, Method,
    OuterProducts, StoredInput, summary, with_aop,
};

use crate::support::Random;

#[derive(Module, Debug)]
struct Model {
    embedding: burn::nn::Embedding,
    stem: Conv1d,
    images: MemAopConv2d,
    blocks: Vec<Block>,
    recurrent: Lstm,
    scale: Param<Tensor<1>>,
    head: Linear,
}

#[derive(Module, Debug)]
struct Block {
    norm: LayerNorm,
    wide: MemAopLinear,
    narrow: MemAopLinear,
}

fn model(device: &Device) -> Model {
    let block = || Block {
        norm: LayerNormConfig::new(256).init(device),
        wide: MemAopLinearConfig::new(256, 512).init(device),
        narrow: MemAopLinearConfig::new(512, 4).init(device),
    };
    Model {
        embedding: EmbeddingConfig::new(10, 8).init(device),
        stem: Conv1dConfig::new(3, 4, 3).init(device),
        images: MemAopConv2dConfig::new([2, 4], [3, 3]).init(device),
        blocks: vec![block(), block()],
        recurrent: LstmConfig::new(4, 5, true).init(device),
        scale: Param::from_tensor(Tensor::ones([7], device)),
        head: LinearConfig::new(512, 10).init(device),
    }
}

/// The cells of the row of a module, without the spaces between them.
fn row(table: &str, module: &str) -> String {
    let row = table
        .lines()
        .find(|line| line.split_whitespace().next() == Some(module));
    let row = row.unwrap_or_else(|| panic!("{module} is not in\n{table}"));
    row.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn every_module_with_weights_has_its_row_and_its_reason() {
    let device = Device::flex().autodiff();
    let mut model = model(&device);
    let wide = &mut model.blocks[1].wide;
    // A weight that is not drawn counts as trained.
    wide.weight.val();
    wide.weight = wide.weight.clone().set_require_grad(false);
    let text = summary(&model).to_string();
    let exact = "exact: a module of Burn's";
    assert_eq!(row(&text, "embedding"), "embedding Embedding 80 exact");
    assert_eq!(row(&text, "stem"), format!("stem Conv1d 40 {exact}"));
    assert_eq!(row(&text, "images"), "images MemAopConv2d 76 M all rows");
    assert_eq!(
        row(&text, "blocks.0.norm"),
        "blocks.0.norm LayerNorm 512 exact"
    );
    assert_eq!(
        row(&text, "blocks.1.wide"),
        "blocks.1.wide MemAopLinear 131584 auto none: frozen"
    );
    assert_eq!(
        row(&text, "blocks.0.narrow"),
        "blocks.0.narrow MemAopLinear 2052 auto all rows, by the cost rule"
    );
    // A parameter of the model itself.
    assert!(
        text.lines()
            .any(|line| line.split_whitespace().nth(1) == Some("7")),
        "{text}"
    );
    assert_eq!(row(&text, "all"), format!("all {}", model.num_params()));
}

/// The number of rows in the table is where the layer says that it stops to be exact.
#[test]
fn the_least_batch_is_that_of_the_layer() {
    let device = Device::flex().autodiff();
    let layer = MemAopLinearConfig::new(256, 512).init(&device);
    for aop in [
        AopConfig::new(),
        AopConfig::new().with_outer_products(OuterProducts::Count(40)),
        AopConfig::new().with_outer_products(OuterProducts::Ratio(0.5)),
        AopConfig::new().with_cost_rule(false),
    ] {
        let layer = layer.clone().with_aop(aop);
        let text = summary(&layer).to_string();
        let (_, least) = text
            .split_once("K of the M rows, if M is at least ")
            .unwrap();
        let least: usize = least.lines().next().unwrap().parse().unwrap();
        assert!(layer.is_exact(least - 1, &device), "{aop:?} {least}");
        assert!(!layer.is_exact(least, &device), "{aop:?} {least}");
    }
}

/// The gradients of an adapter come from that of the frozen weight below it.
#[test]
fn a_layer_with_an_adapter_is_one_row() {
    let device = Device::flex().autodiff();
    for bias in [false, true] {
        let layer = MemAopLinearConfig::new(256, 512)
            .with_bias(bias)
            .init(&device);
        let layer = layer.apply_lora(Lora::new(4, 1.0));
        let found = summary(&layer);
        assert!(found.burns().is_empty(), "{found}");
        let text = found.to_string();
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.contains("K of the M rows"), "{text}");
        assert_eq!(
            row(&text, "all"),
            format!(
                "all {}",
                256 * 512 + 4 * (256 + 512) + 512 * usize::from(bias)
            )
        );
    }
}

/// A summary before a seeded training must not change its weights.
#[test]
fn no_weight_is_drawn_for_a_summary() {
    let device = Device::flex().autodiff();
    let layer = MemAopLinearConfig::new(3, 4).init(&device);
    assert!(summary(&layer).to_string().contains("MemAopLinear"));
    assert!(!layer.weight.is_initialized());
}

#[test]
fn modules_that_stayed_burns_are_named() {
    let device = Device::flex().autodiff();
    let found = summary(&model(&device));
    let burns = found.burns();
    assert!(
        burns.contains(&"stem") && burns.contains(&"head"),
        "{burns:?}"
    );
    // An LSTM has two linear layers for each of its four gates.
    assert_eq!(burns.len(), 10, "{burns:?}");
    let text = found.to_string();
    let warning = text.lines().last().unwrap();
    assert!(
        warning.starts_with("warning: Burn's own, which gain nothing: stem (Conv1d), recurrent."),
        "{warning}"
    );
    assert!(warning.ends_with("and 4 more"), "{warning}");

    let ours = MemAopLinearConfig::new(3, 4).init(&device);
    let found = summary(&ours);
    assert!(found.burns().is_empty());
    assert!(!found.to_string().contains("warning"));
}

/// An input is kept in few bits where the layer has a gradient to compute from it.
#[test]
fn inputs_in_few_bits_are_shown_where_they_are_kept() {
    let device = Device::flex().autodiff();
    let mut layer = MemAopLinearConfig::new(64, 64).init(&device);
    let with = |layer: &MemAopLinear, stored| {
        let aop = AopConfig::new()
            .with_outer_products(OuterProducts::All)
            .with_stored_input(stored);
        summary(&layer.clone().with_aop(aop)).to_string()
    };
    assert!(!with(&layer, StoredInput::Full).contains("bits"));
    assert!(with(&layer, StoredInput::Int8).contains("all rows, input in 8 bits"));
    assert!(with(&layer, StoredInput::Int4).contains("all rows, input in 4 bits"));
    layer.weight.val();
    layer.weight = layer.weight.set_require_grad(false);
    let text = with(&layer, StoredInput::Int8);
    assert!(
        text.contains("none: frozen") && !text.contains("bits"),
        "{text}"
    );
}

#[test]
fn k_is_shown_as_it_was_set_and_as_it_was_chosen() {
    let device = Device::flex().autodiff();
    let k = |aop: AopConfig| {
        let layer = MemAopLinearConfig::new(64, 64).init(&device).with_aop(aop);
        let text = summary(&layer).to_string();
        let row = text.lines().nth(1).unwrap().split("  ");
        row.filter(|cell| !cell.is_empty())
            .nth(2)
            .unwrap()
            .trim()
            .to_string()
    };
    let fixed = |outer_products| AopConfig::new().with_outer_products(outer_products);
    assert_eq!(k(AopConfig::new()), "auto");
    assert_eq!(k(fixed(OuterProducts::All)), "M");
    assert_eq!(k(fixed(OuterProducts::Count(12))), "12");
    assert_eq!(k(fixed(OuterProducts::Ratio(0.25))), "M/4");
    assert_eq!(k(fixed(OuterProducts::Ratio(0.3))), "0.3 M");
    let top = Method::TopK(burn_memaop::Memory::None);
    assert_eq!(k(AopConfig::new().with_method(top)), "M/8");

    // Rows that differ little leave a small noise, so K falls.
    let layer = MemAopLinearConfig::new(64, 64).init(&device);
    let layer = with_aop(layer, |_, aop| aop.with_cost_rule(false));
    let input = Random(3).matrix(1, 64).tensor(&device, DType::F32);
    for _ in 0..30 {
        let input = input.clone().expand([128, 64]);
        layer.forward(input).sum().backward();
    }
    let text = summary(&layer).to_string();
    assert!(text.contains("auto (M/"), "{text}");
}
