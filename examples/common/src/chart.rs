//! Line charts as SVG.

use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

/// A line: its name and its values at 1, 2, 3, ...
pub struct Series<'a> {
    /// The name in the legend.
    pub name: &'a str,
    /// The values.
    pub values: &'a [f64],
}

/// Writes a chart of the series with a logarithmic vertical axis.
///
/// # Errors
///
/// Where the file cannot be written.
pub fn lines(path: &Path, title: &str, x: &str, y: &str, series: &[Series<'_>]) -> Result<()> {
    let values = || {
        series
            .iter()
            .flat_map(|series| series.values.iter().copied())
    };
    let positive = || values().filter(|value| value.is_finite() && *value > 0.0);
    let low = positive().fold(f64::INFINITY, f64::min).min(1.0);
    let high = positive().fold(0.0, f64::max).max(low * 10.0);
    let longest = series.iter().map(|series| series.values.len()).max();

    let root = SVGBackend::new(path, (800, 500)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(
            1.0..longest.unwrap_or(1).max(2) as f64,
            (low * 0.9..high * 1.1).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .light_line_style(WHITE)
        .draw()?;
    for (index, series) in series.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        let points = (1..).map(f64::from).zip(series.values.iter().copied());
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))?
            .label(series.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}
