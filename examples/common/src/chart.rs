//! Line charts as SVG or PNG.

use std::{path::Path, sync::Once};

use anyhow::{Context, Result, anyhow, bail};
use plotters::{
    coord::{Shift, ranged1d::ValueFormatter, types::RangedCoordf64},
    prelude::*,
    style::register_font,
};

/// A line.
pub struct Series<'a> {
    /// The name in the legend.
    pub name: &'a str,
    /// Where it goes through.
    pub points: Vec<(f64, f64)>,
    /// Which of the colors.
    pub color: usize,
    /// Dashes in place of a line.
    pub dashed: bool,
}

/// Values at 1, 2, 3, ...
pub fn numbered(values: &[f64]) -> Vec<(f64, f64)> {
    (1..).map(f64::from).zip(values.iter().copied()).collect()
}

/// What a chart shows.
pub struct Chart<'a> {
    /// Above the chart.
    pub title: &'a str,
    /// Under the horizontal axis.
    pub x: &'a str,
    /// Beside the vertical axis.
    pub y: &'a str,
    /// Whether the vertical axis is logarithmic.
    pub logarithmic: bool,
    /// The lines.
    pub series: &'a [Series<'a>],
}

const SIZE: (u32, u32) = (880, 540);

impl Chart<'_> {
    /// Writes the chart to a file that ends in `.svg` or `.png`.
    ///
    /// # Errors
    ///
    /// Another ending, and a file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        static FONT: Once = Once::new();
        FONT.call_once(|| {
            let font = dejavu::sans::regular();
            // The only error is a font that cannot be parsed, and this one is compiled in.
            let _ = register_font("sans-serif", FontStyle::Normal, font);
        });
        let drawn = match path.extension().and_then(|extension| extension.to_str()) {
            Some("svg") => self.draw(SVGBackend::new(path, SIZE).into_drawing_area()),
            Some("png") => self.draw(BitMapBackend::new(path, SIZE).into_drawing_area()),
            _ => bail!(
                "a chart must be an .svg or a .png file, but got {}",
                path.display()
            ),
        };
        drawn.with_context(|| format!("{}", path.display()))
    }

    fn draw<B: DrawingBackend>(&self, root: DrawingArea<B, Shift>) -> Result<()> {
        let points = self.series.iter().flat_map(|series| &series.points);
        let drawn = |&&(x, y): &&(f64, f64)| {
            x.is_finite() && y.is_finite() && (y > 0.0 || !self.logarithmic)
        };
        let points: Vec<_> = points.filter(drawn).collect();
        let range = |value: fn(&(f64, f64)) -> f64| {
            let values = points.iter().map(|point| value(point));
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                (low.min(value), high.max(value))
            })
        };
        let (low, high) = range(|point| point.1);
        if low > high {
            bail!("no value can be drawn");
        }
        let (first, last) = range(|point| point.0);
        let x_range = first..last.max(first + 1e-9);

        let failed = |error: DrawingAreaErrorKind<B::ErrorType>| anyhow!("{error}");
        root.fill(&WHITE).map_err(failed)?;
        let mut builder = ChartBuilder::on(&root);
        builder
            .caption(self.title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(72);
        match self.logarithmic {
            true => {
                let range = (low * 0.9..high * 1.1).log_scale();
                self.plot(builder.build_cartesian_2d(x_range, range).map_err(failed)?)
            }
            false => {
                let margin = (0.05 * (high - low)).max(1e-9);
                let range = low - margin..high + margin;
                self.plot(builder.build_cartesian_2d(x_range, range).map_err(failed)?)
            }
        }
        .map_err(failed)?;
        root.present().map_err(failed)
    }

    fn plot<'a, B: DrawingBackend + 'a, Y: Ranged<ValueType = f64> + ValueFormatter<f64>>(
        &self,
        mut chart: ChartContext<'a, B, Cartesian2d<RangedCoordf64, Y>>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .label_style(("sans-serif", 13))
            .x_label_formatter(&|x| format!("{}", (x * 1e2).round() / 1e2))
            .y_label_formatter(&|y| format!("{}", (y * 1e4).round() / 1e4))
            .light_line_style(WHITE)
            .draw()?;
        for series in self.series {
            let style = Palette99::pick(series.color).stroke_width(2);
            let points = series.points.iter().copied();
            let drawn = match series.dashed {
                true => chart.draw_series(DashedLineSeries::new(points, 6, 5, style))?,
                false => chart.draw_series(LineSeries::new(points, style))?,
            };
            if !series.name.is_empty() {
                drawn
                    .label(series.name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font(("sans-serif", 13))
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK)
            .draw()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_are_written_in_both_formats() {
        let folder = tempfile::tempdir().unwrap();
        let series = [Series {
            name: "loss",
            points: numbered(&[3.0, 1.0, 0.1]),
            color: 0,
            dashed: true,
        }];
        for logarithmic in [false, true] {
            let chart = Chart {
                title: "title",
                x: "epoch",
                y: "loss",
                logarithmic,
                series: &series,
            };
            for name in ["chart.svg", "chart.png"] {
                let path = folder.path().join(name);
                chart.save(&path).unwrap();
                assert!(std::fs::metadata(&path).unwrap().len() > 1000);
            }
            let error = chart.save(&folder.path().join("chart.gif")).unwrap_err();
            assert!(error.to_string().starts_with("a chart must be an .svg"));
        }
    }
}
