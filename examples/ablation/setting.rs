use anyhow::{Result, ensure};
use burn_memaop::AopConfig;
use clap::ValueEnum;
use memaop_examples::{
    InputGradientOptions, KRatio, MemoryOption, PolicyOption, StoredInputOption, check,
};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    Sgd,
    Adam,
}

/// All that a training depends on except the seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    pub optimizer: Optimizer,
    pub lr: f64,
    /// The momentum of SGD.
    pub momentum: f64,
    pub batch: usize,
    /// The number of units in each hidden layer.
    pub widths: Vec<usize>,
    pub epochs: usize,
    /// K as a share of the batch; 1 is the exact gradient.
    pub k_ratio: KRatio,
    pub policy: PolicyOption,
    pub memory: MemoryOption,
    pub decay: f64,
    #[serde(flatten)]
    pub input_gradient: InputGradientOptions,
    #[serde(default)]
    pub stored_input: StoredInputOption,
    /// Whether gradients are exact where that takes less time.
    pub cost_rule: bool,
    /// The number of first steps with exact gradients.
    #[serde(default)]
    pub exact_steps: usize,
}

impl Setting {
    /// The same training with exact gradients.
    pub fn exact(&self) -> Self {
        Self {
            k_ratio: KRatio::ALL,
            policy: PolicyOption::TopK,
            memory: MemoryOption::None,
            decay: 1.0,
            stored_input: StoredInputOption::Full,
            input_gradient: InputGradientOptions::default(),
            cost_rule: true,
            exact_steps: 0,
            ..self.clone()
        }
    }

    pub fn is_exact(&self) -> bool {
        self.k_ratio == KRatio::ALL
    }

    /// The configuration of a layer.
    ///
    /// # Errors
    ///
    /// Returns an error if options do not go together.
    pub fn aop(&self, seed: u64) -> Result<AopConfig> {
        ensure!(
            self.k_ratio.goes_with(self.policy),
            "--k-ratio auto is for --policy systematic, but got {}",
            self.policy
        );
        let config = AopConfig::new()
            .with_outer_products(self.k_ratio.outer_products())
            .with_method(self.policy.method(self.memory.memory(self.decay))?)
            .with_input_gradient(self.input_gradient.input_gradient())
            .with_stored_input(self.stored_input.stored_input())
            .with_cost_rule(self.cost_rule)
            .with_exact_steps(self.exact_steps)
            .with_seed(seed);
        config.validate()?;
        Ok(config)
    }

    pub fn validate(&self, images: usize) -> Result<()> {
        self.aop(0)?;
        check::positive("lr", self.lr)?;
        ensure!(
            (0.0..1.0).contains(&self.momentum),
            "--momentum must be from 0 to below 1, but got {}",
            self.momentum
        );
        ensure!(
            self.optimizer == Optimizer::Sgd || self.momentum == 0.0,
            "--momentum is for --optimizer sgd, but got {} with adam",
            self.momentum
        );
        ensure!(
            (1..=images).contains(&self.batch),
            "--batch must be from 1 to {images}, but got {}",
            self.batch
        );
        ensure!(self.epochs > 0, "--epochs must be at least 1, but got 0");
        ensure!(
            !self.widths.contains(&0),
            "--widths must be at least 1 each, but got {:?}",
            self.widths
        );
        Ok(())
    }

    /// The name of what compared settings have in common: all but the approximation.
    pub fn regime(&self) -> String {
        self.regime_at(&format!(" {}", self.lr))
    }

    /// The same without the learning rate, for methods with learning rates of their own.
    pub fn tuned_regime(&self) -> String {
        self.regime_at("")
    }

    fn regime_at(&self, lr: &str) -> String {
        let optimizer = match self.optimizer {
            Optimizer::Sgd if self.momentum > 0.0 => {
                format!("SGD{lr} momentum {}", self.momentum)
            }
            Optimizer::Sgd => format!("SGD{lr}"),
            Optimizer::Adam => format!("Adam{lr}"),
        };
        let widths: Vec<_> = self.widths.iter().map(usize::to_string).collect();
        format!(
            "{optimizer}, batch {}, hidden {}, {} epochs",
            self.batch,
            widths.join("-"),
            self.epochs
        )
    }

    /// The name of the approximation, without K.
    pub fn method(&self) -> String {
        if self.is_exact() {
            return "exact".to_string();
        }
        let policy = self.policy;
        let method = match self.memory {
            MemoryOption::None => policy.to_string(),
            MemoryOption::Published => format!("{policy}, published {}", self.decay),
            MemoryOption::Balanced => format!("{policy}, balanced {}", self.decay),
        };
        let method = method + &self.input_gradient.suffix();
        let method = method + &self.stored_input.suffix();
        let method = match self.cost_rule {
            true => method,
            false => format!("{method}, every layer"),
        };
        match self.exact_steps {
            0 => method,
            steps => format!("{method}, after {steps} exact steps"),
        }
    }

    /// A name for files.
    pub fn slug(&self) -> String {
        let k = match self.k_ratio {
            KRatio::Of(ratio) => ratio.to_string(),
            KRatio::Auto(_) => "auto".to_string(),
        };
        let name = format!("{} {} k {k}", self.regime(), self.method());
        let words = name.split(|c: char| !c.is_ascii_alphanumeric() && c != '.');
        let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
        words.join("-").to_lowercase()
    }
}
