use crate::grid::Outcome;
use anyhow::Result;
use std::path::Path;
pub fn table(outcomes: &[Outcome]) -> String {
    let mut table = String::new();
    for outcome in outcomes {
        let a = outcome.final_accuracy();
        let mean = 100.0 * a.iter().sum::<f64>() / a.len() as f64;
        let secs: f64 = outcome
            .runs
            .iter()
            .flat_map(|r| &r.train_seconds)
            .sum::<f64>()
            / a.len() as f64;
        table += &format!(
            "{} | {} | {} | {mean:.2} | {secs:.1} s | {a:?}\n",
            outcome.setting.regime(),
            outcome.setting.method(),
            outcome.setting.k_ratio
        );
    }
    table
}
pub fn figures(_: &[Outcome], _: &Path) -> Result<()> {
    Ok(())
}
