//! A table of the weights of a model, and of how their gradients are computed.

use std::fmt;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, Device, Int, Tensor},
};

use crate::{
    backward::{cost, is_supported},
    config::{AopConfig, OuterProducts, StoredInput},
    state::offer::{self, Shown},
};

/// The modules of Burn whose weight is a factor of a matrix product or of a convolution.
const PRODUCTS: [&str; 8] = [
    "Linear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "DeformConv2d",
];

/// Lists all modules of a model that have weights: those whose gradient is computed from some of
/// the rows, and those whose gradient is exact, with the reason. Print it to see what a swap of
/// layers has reached. It names the modules that stayed Burn's, by the names of their types. It does
/// not show activations, which have no weights.
///
/// No weight is drawn for it. A weight that has not been drawn counts as trained and as single
/// precision. What a module leaves out of its records, such as a `SwiGlu` in a
/// `PositionWiseFeedForward`, is not seen.
///
/// ```
/// use burn::prelude::*;
///
/// #[derive(Module, Debug)]
/// struct Model {
///     hidden: burn_memaop::nn::Linear,
///     output: burn::nn::Linear, // forgotten
/// }
///
/// let device = Device::flex().autodiff();
/// let model = Model {
///     hidden: burn_memaop::nn::LinearConfig::new(784, 512).init(&device),
///     output: burn::nn::LinearConfig::new(512, 512).init(&device),
/// };
/// let summary = burn_memaop::summary(&model);
/// println!("{summary}");
/// assert_eq!(summary.burns(), ["output"]);
/// ```
pub fn summary<M: Module>(model: &M) -> Summary {
    let mut lister = Lister::default();
    model.visit(&mut lister);
    Summary {
        modules: lister.modules,
    }
}

/// What [`summary`] finds. Its [`Display`](fmt::Display) is a table, with a warning below it if
/// modules with matrix products stayed Burn's.
#[derive(Debug, Clone)]
pub struct Summary {
    modules: Vec<Listed>,
}

/// A module with weights.
#[derive(Debug, Clone)]
struct Listed {
    name: String,
    kind: String,
    parameters: usize,
    /// None in a module of Burn's.
    ours: Option<Ours>,
}

#[derive(Debug, Clone)]
struct Ours {
    k: String,
    gradient: String,
}

impl Summary {
    /// The names of the linear layers and convolutions that stayed Burn's.
    pub fn burns(&self) -> Vec<&str> {
        self.stayed().map(|module| module.name.as_str()).collect()
    }

    fn stayed(&self) -> impl Iterator<Item = &Listed> {
        let stayed =
            |module: &&Listed| module.ours.is_none() && PRODUCTS.contains(&module.kind.as_str());
        self.modules.iter().filter(stayed)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let modules = self.modules.iter().map(|module| {
            let (k, gradient) = match &module.ours {
                Some(ours) => (ours.k.as_str(), ours.gradient.as_str()),
                None if PRODUCTS.contains(&module.kind.as_str()) => {
                    ("", "exact: a module of Burn's")
                }
                None => ("", "exact"),
            };
            let parameters = module.parameters.to_string();
            [&module.name, &module.kind, &parameters, k, gradient].map(str::to_string)
        });
        let total: usize = self.modules.iter().map(|module| module.parameters).sum();
        let head = [
            "module",
            "type",
            "parameters",
            "K",
            "gradient of the weight",
        ];
        let foot = ["", "all", &total.to_string(), "", ""].map(str::to_string);
        let rows: Vec<_> = std::iter::once(head.map(str::to_string))
            .chain(modules)
            .chain([foot])
            .collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
        let [name, kind, parameters, k] = [0, 1, 2, 3].map(|column| width(column).unwrap_or(0));
        for row in &rows {
            let line = format!(
                "{:name$}  {:kind$}  {:>parameters$}  {:k$}  {}",
                row[0], row[1], row[2], row[3], row[4]
            );
            writeln!(f, "{}", line.trim_end())?;
        }
        let stayed: Vec<_> = self.stayed().collect();
        if stayed.is_empty() {
            return Ok(());
        }
        // The rest of a long list can be seen in the table.
        const NAMED: usize = 6;
        let named = stayed.iter().take(NAMED);
        let mut named: Vec<_> = named
            .map(|it| format!("{} ({})", it.name, it.kind))
            .collect();
        if stayed.len() > NAMED {
            named.push(format!("and {} more", stayed.len() - NAMED));
        }
        writeln!(
            f,
            "warning: Burn's own, which gain nothing: {}",
            named.join(", ")
        )
    }
}

#[derive(Default)]
struct Lister {
    /// The fields that lead to the present module, each with the type that it is a field of.
    path: Vec<(String, String)>,
    modules: Vec<Listed>,
    /// The weight that was visited last.
    weight: Option<Weight>,
}

/// What the summary needs to know of a weight.
#[derive(Clone)]
struct Weight {
    dims: usize,
    dtype: DType,
    device: Device,
    trained: bool,
}

impl Lister {
    /// The fields that lead to a module, separated by dots, and its type. `depth` is their number.
    fn module(&self, depth: usize) -> (String, String) {
        let fields = self.path[..depth].iter().map(|(field, _)| field.as_str());
        let kind = self.path.get(depth).map_or("", |(_, kind)| kind);
        let kind = kind.strip_prefix("Struct:").unwrap_or(kind);
        (fields.collect::<Vec<_>>().join("."), kind.to_string())
    }

    /// The row of a module, which its later parameters may come back to.
    fn row(&mut self, name: &str) -> Option<&mut Listed> {
        self.modules.iter_mut().rev().find(|row| row.name == name)
    }
}

impl ModuleVisitor for Lister {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path
            .push((name.to_string(), container_type.to_string()));
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // An adapter of a weight (LoRA) lies below the weight.
        let adapter = self.path.iter().position(|it| it.1 == "Reparameterization");
        let depth = adapter.unwrap_or(self.path.len()).saturating_sub(1);
        let (name, kind) = self.module(depth);
        let drawn = param.is_initialized().then(|| param.val());
        match (adapter, &mut self.weight) {
            // Its gradient comes from that of the weight, which may be frozen and quantized.
            (Some(_), Some(weight)) => {
                weight.trained = true;
                weight.dtype = drawn.map_or(weight.dtype, |value| value.dtype());
            }
            _ if D > 1 => {
                let device = param.lazy_device();
                let frozen = drawn
                    .as_ref()
                    .is_some_and(|value| device.is_autodiff() && !value.is_require_grad());
                self.weight = Some(Weight {
                    dims: D,
                    dtype: drawn.map_or(DType::F32, |value| value.dtype()),
                    trained: !frozen,
                    device,
                });
            }
            _ => {}
        }
        let parameters = param.lazy_shape().num_elements();
        match self.row(&name) {
            Some(row) => row.parameters += parameters,
            None => self.modules.push(Listed {
                name,
                kind,
                parameters,
                ours: None,
            }),
        }
    }

    /// The state of a layer of this crate comes after its weight.
    fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {
        let Some(shown) = offer::shown() else {
            return;
        };
        let (name, kind) = self.module(self.path.len().saturating_sub(2));
        let weight = self.weight.take();
        if let (Some(row), Some(weight)) = (self.row(&name), weight) {
            row.kind = kind;
            row.ours = Some(ours(&shown, &weight));
        }
    }
}

fn ours(shown: &Shown, weight: &Weight) -> Ours {
    let linear = weight.dims == 2;
    let state = shown.state.present();
    let k = match shown.aop.outer_products {
        // Only linear layers choose K.
        OuterProducts::Auto if linear && shown.aop.chooses_k() => match state.progress.chosen {
            Some(chosen) => format!("auto ({})", share(chosen)),
            None => "auto".to_string(),
        },
        OuterProducts::Auto if linear => share(OuterProducts::UNCHOSEN),
        OuterProducts::Auto | OuterProducts::All => "M".to_string(),
        OuterProducts::Count(k) => k.to_string(),
        OuterProducts::Ratio(ratio) => share(ratio),
    };
    let gradient = if !weight.trained {
        "none: frozen".to_string()
    } else if !is_supported(weight.device.as_dispatch()) {
        "exact: no code for this device".to_string()
    } else {
        let rows = if k == "M" {
            "all rows".to_string()
        } else if !linear {
            "K of the M positions, unless the cost rule makes it exact".to_string()
        } else {
            match least_rows(&shown.aop, shown.widths, weight) {
                None => "all rows, by the cost rule".to_string(),
                Some(rows) => format!("K of the M rows, if M is at least {rows}"),
            }
        };
        // A gradient of all rows is exact but for an input in few bits.
        let pass = cost::Pass::of_linear(1, shown.widths, weight.dtype, true);
        match cost::ruled(&shown.aop, weight.device.as_dispatch(), pass).stored_input {
            StoredInput::Full => rows,
            StoredInput::Int8 => format!("{rows}, input in 8 bits"),
            StoredInput::Int4 => format!("{rows}, input in 4 bits"),
        }
    };
    Ours { k, gradient }
}

/// A share of the M rows.
fn share(ratio: f64) -> String {
    let inverse = 1.0 / ratio;
    match (ratio == 1.0, inverse.fract() == 0.0) {
        (true, _) => "M".to_string(),
        (false, true) => format!("M/{inverse}"),
        (false, false) => format!("{ratio} M"),
    }
}

/// The smallest batch whose gradient is not exact, if there is one.
fn least_rows(aop: &AopConfig, widths: [usize; 2], weight: &Weight) -> Option<usize> {
    let is_exact = |rows: usize| {
        let pass = cost::Pass::of_linear(rows, widths, weight.dtype, true);
        cost::ruled(aop, weight.device.as_dispatch(), pass).is_exact(rows, false)
    };
    // What large batches share grows with the batch, so a power of two is found first.
    let mut high = (1..=24)
        .map(|bits| 1 << bits)
        .find(|&rows| !is_exact(rows))?;
    let mut low = high / 2;
    while low + 1 < high {
        let middle = (low + high) / 2;
        match is_exact(middle) {
            true => low = middle,
            false => high = middle,
        }
    }
    Some(high)
}
