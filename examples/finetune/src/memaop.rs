//! Fine-tunes a pre-trained encoder with the layers of burn-memaop. The sources in `app` are those of
//! `burn.rs`. Only the crate that is called `burn` is another one.

extern crate swapped_burn as burn;

mod app;

use burn::{
    memaop::{OuterProducts, StoredInput, summary, with_aop},
    module::Module,
};

/// What only the layers of burn-memaop have.
#[derive(clap::Args, Debug)]
struct Layers {
    /// Takes all rows, so that gradients are exact
    #[arg(long)]
    exact: bool,
    /// Takes this share of the rows, more than 0 and at most 1
    #[arg(long, conflicts_with = "exact", value_parser = ratio)]
    k_ratio: Option<f64>,
    /// Keeps inputs and activations in 8 bits
    #[arg(long)]
    int8: bool,
}

fn ratio(text: &str) -> Result<f64, String> {
    let ratio = text.parse().map_err(|error| format!("{error}"))?;
    match 0.0 < ratio && ratio <= 1.0 {
        true => Ok(ratio),
        false => Err("it must be more than 0 and at most 1".into()),
    }
}

impl Layers {
    fn configured<M: Module>(&self, model: M) -> M {
        let model = with_aop(model, |_, aop| {
            // A training that is resumed drops the values that it would have dropped.
            let aop = aop.with_saved_state(true);
            let aop = match (self.exact, self.k_ratio) {
                (true, _) => aop.with_outer_products(OuterProducts::All),
                (false, Some(ratio)) => aop.with_outer_products(OuterProducts::Ratio(ratio)),
                (false, None) => aop,
            };
            match self.int8 {
                true => aop.with_stored_input(StoredInput::Int8),
                false => aop,
            }
        });
        println!("{}", summary(&model));
        model
    }
}

fn main() -> anyhow::Result<()> {
    app::main()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_resumed_training_is_the_same() {
        crate::app::tests::resumes("--dropout 0.3 --int8");
    }
}
