//! Charts of lines and of bars, as SVG.

use std::{io, iter, path::Path};

use anyhow::{Context, Result, anyhow, bail, ensure};
use plotters::{
    coord::{Shift, ranged1d::ValueFormatter, types::RangedCoordf64},
    prelude::*,
};

/// A line of a chart.
pub struct Series<'a> {
    /// The name in the legend; a line without a name is not listed there.
    pub name: Option<&'a str>,
    /// The points of the line.
    pub points: Vec<(f64, f64)>,
    /// Half the length of the error bar at each point; empty for a line without bars.
    pub intervals: Vec<f64>,
    /// The number of the color; none for a grey line in the background.
    pub color: Option<usize>,
    /// Whether the line is dashed.
    pub dashed: bool,
}

impl<'a> Series<'a> {
    /// A solid line with a name and a color.
    pub fn new(name: &'a str, points: Vec<(f64, f64)>, color: usize) -> Self {
        Self {
            name: Some(name),
            points,
            intervals: Vec::new(),
            color: Some(color),
            dashed: false,
        }
    }
}

/// The points of values at 1, 2, 3, ...
pub fn numbered(values: &[f64]) -> Vec<(f64, f64)> {
    (1..).map(f64::from).zip(values.iter().copied()).collect()
}

/// A chart of lines.
pub struct Chart<'a> {
    /// The title above the chart.
    pub title: &'a str,
    /// The label of the horizontal axis.
    pub x: &'a str,
    /// The label of the vertical axis.
    pub y: &'a str,
    /// Whether the vertical axis is logarithmic.
    pub logarithmic: bool,
    /// The text for a value of the horizontal axis.
    pub x_label: fn(f64) -> String,
    /// The lines.
    pub series: &'a [Series<'a>],
}

/// A chart of one bar for each of some names.
pub struct Bars<'a> {
    /// The title above the chart.
    pub title: &'a str,
    /// The unit of the values.
    pub unit: &'a str,
    /// The names and values. Their colors are those of lines with the same numbers.
    pub bars: &'a [(&'a str, f64)],
}

/// One of the charts of a file.
pub enum Panel<'a> {
    /// A chart of lines.
    Lines(Chart<'a>),
    /// A chart of bars.
    Bars(Bars<'a>),
}

/// A number with at most two decimals.
pub fn number(value: f64) -> String {
    format!("{}", (value * 1e2).round() / 1e2)
}

/// The width and height of one chart, in pixels.
const SIZE: (u32, u32) = (880, 540);

/// Writes charts side by side to an SVG file.
///
/// # Errors
///
/// Returns an error for another ending than `.svg`, a chart without values, and a file that cannot
/// be written.
pub fn save(panels: &[Panel<'_>], path: &Path) -> Result<()> {
    ensure!(
        path.extension().is_some_and(|extension| extension == "svg"),
        "a chart must be an .svg file, but got {}",
        path.display()
    );
    let size = (SIZE.0 * panels.len() as u32, SIZE.1);
    let drawn = draw(panels, &SVGBackend::new(path, size).into_drawing_area());
    drawn.with_context(|| format!("{}", path.display()))
}

/// A part of the picture.
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Failure = DrawingAreaErrorKind<io::Error>;

fn draw(panels: &[Panel<'_>], root: &Area<'_>) -> Result<()> {
    let failed = |error: Failure| anyhow!("{error}");
    root.fill(&WHITE).map_err(failed)?;
    for (panel, area) in panels.iter().zip(root.split_evenly((1, panels.len()))) {
        match panel {
            Panel::Lines(chart) => chart.draw(&area)?,
            Panel::Bars(bars) => bars.draw(&area).map_err(failed)?,
        }
    }
    root.present().map_err(failed)
}

impl Bars<'_> {
    fn draw(&self, area: &Area<'_>) -> Result<(), Failure> {
        let most = self.bars.iter().map(|bar| bar.1).fold(0.0, f64::max);
        let most = most.max(f64::MIN_POSITIVE);
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d(0.0..self.bars.len() as f64, 0.0..1.2 * most)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(0)
            .y_desc(self.unit)
            .label_style(("sans-serif", 13))
            .light_line_style(WHITE)
            .draw()?;
        for (index, &(name, value)) in self.bars.iter().enumerate() {
            let (left, color) = (index as f64, Palette99::pick(index).filled());
            let corners = [(left + 0.15, 0.0), (left + 0.85, value)];
            chart.draw_series([Rectangle::new(corners, color)])?;
            let texts = [(0.1, name.to_string()), (0.04, format!("{value:.1}"))];
            chart.draw_series(texts.map(|(above, text)| {
                let place = (left + 0.15, value + above * most);
                Text::new(text, place, ("sans-serif", 15))
            }))?;
        }
        Ok(())
    }
}

impl Chart<'_> {
    fn draw(&self, area: &Area<'_>) -> Result<()> {
        let ends = self.series.iter().flat_map(|series| {
            let intervals = series.intervals.iter().copied().chain(iter::repeat(0.0));
            let ends = |(&(x, y), width): (&(f64, f64), f64)| [(x, y - width), (x, y + width)];
            series.points.iter().zip(intervals).flat_map(ends)
        });
        let drawn =
            |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite() && (y > 0.0 || !self.logarithmic);
        let ends: Vec<_> = ends.filter(drawn).collect();
        let range = |value: fn(&(f64, f64)) -> f64| {
            let values = ends.iter().map(value);
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

        let failed = |error: Failure| anyhow!("{error}");
        let mut builder = ChartBuilder::on(area);
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
        .map_err(failed)
    }

    /// The corner on the right where the lines do not end.
    fn free_corner(&self) -> SeriesLabelPosition {
        let lines = || self.series.iter().map(|series| &series.points);
        let first: f64 = lines()
            .filter_map(|line| line.first())
            .map(|end| end.1)
            .sum();
        let last: f64 = lines()
            .filter_map(|line| line.last())
            .map(|end| end.1)
            .sum();
        match last > first {
            true => SeriesLabelPosition::LowerRight,
            false => SeriesLabelPosition::UpperRight,
        }
    }

    fn plot<'a, Y: Ranged<ValueType = f64> + ValueFormatter<f64>>(
        &self,
        mut chart: ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, Y>>,
    ) -> Result<(), Failure> {
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .label_style(("sans-serif", 13))
            .x_label_formatter(&|&x| (self.x_label)(x))
            // Adding 0 turns -0 into 0.
            .y_label_formatter(&|y| format!("{}", (y * 1e4).round() / 1e4 + 0.0))
            .light_line_style(WHITE)
            .draw()?;
        // The lines of the background are drawn first.
        let (colored, others): (Vec<_>, Vec<_>) =
            (self.series.iter()).partition(|series| series.color.is_some());
        for series in others.into_iter().chain(colored) {
            let color = match series.color {
                Some(color) => Palette99::pick(color).to_rgba(),
                None => RGBColor(200, 200, 200).to_rgba(),
            };
            let style = color.stroke_width(2);
            let points = series.points.iter().copied();
            let bars = points.clone().zip(&series.intervals);
            chart.draw_series(bars.map(|((x, y), width)| {
                ErrorBar::new_vertical(x, y - width, y, y + width, style, 8)
            }))?;
            let drawn = match series.dashed {
                true => chart.draw_series(DashedLineSeries::new(points, 6, 5, style))?,
                false => chart.draw_series(LineSeries::new(points, style))?,
            };
            if let Some(name) = series.name {
                drawn
                    .label(name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
            }
        }
        chart
            .configure_series_labels()
            .position(self.free_corner())
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
    fn charts_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let line = Series::new("loss", numbered(&[3.0, 1.0, 0.1]), 0);
        let series = [
            Series {
                intervals: vec![0.5, 0.2, 0.05],
                dashed: true,
                ..line
            },
            Series {
                color: None,
                ..Series::new("", numbered(&[2.0, 1.5]), 1)
            },
        ];
        for logarithmic in [false, true] {
            let chart = || Chart {
                title: "title",
                x: "epoch",
                y: "loss",
                logarithmic,
                x_label: number,
                series: &series,
            };
            let bars = Bars {
                title: "memory",
                unit: "MiB",
                bars: &[("one", 3.0), ("two", 0.0)],
            };
            let charts = [
                Panel::Lines(chart()),
                Panel::Lines(chart()),
                Panel::Bars(bars),
            ];
            let path = folder.path().join("chart.svg");
            save(&charts, &path).unwrap();
            let drawn = std::fs::read_to_string(&path).unwrap();
            for text in ["title", "epoch", "memory", "two", "3.0"] {
                assert!(drawn.contains(text), "{text}");
            }
            let error = save(&charts, &folder.path().join("chart.gif")).unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with("a chart must be an .svg file")
            );
        }
    }
}
