//! How noisy the gradient of a layer is, and the K that makes the loss fall fastest by the clock.
//!
//! With the scores `s_m = |x_m| |g_m|` of a batch, `S = sum s_m^2` is the variance of the gradient of the batch, were
//! its rows independent, and `F - S` estimates the square of the true gradient, where F is the squared norm of
//! the batch's. Systematic sampling of K rows adds `V(K) = sum (1 / p_m - 1) s_m^2` to the variance, in F too. A step
//! on a gradient with the noise-to-signal ratio `nu = S / (F - S)` makes a progress in proportion to `1 / (1 + nu)`
//! (McCandlish and others, 2018, arXiv:1812.06162), one of K rows to `1 / (1 + nu (1 + V(K) / S))`. So K is chosen that
//! makes `(1 + nu (1 + V(K) / S)) time(K)` smallest.

use burn::tensor::Tensor;

/// M over the candidates for K, but for M itself.
pub(crate) const DIVISORS: [usize; 5] = [2, 4, 8, 16, 32];
/// What is measured of a gradient: the roots of F and S, and of V(K) for the K of the step and each candidate.
pub(crate) const FIGURES: usize = 3 + DIVISORS.len();

/// The share of a step's time that measuring may take, spread over the steps between.
const MEASURING: f64 = 0.005;
const INTERVALS: [f64; 2] = [10.0, 100.0];
/// What an average keeps from one measurement to the next: much of the signal, which a batch tells little of, less of
/// the variances of sampling, which its scores determine and which fall fast in the first steps.
const SIGNAL_KEPT: f64 = 0.9;
const ADDED_KEPT: f64 = 0.5;
/// The least gain for which K is changed.
const HYSTERESIS: f64 = 0.03;
/// The largest ratio that averages can tell from one without any signal.
const LARGEST: f64 = 1000.0;

/// The time of a training step of one layer, in any unit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepTime {
    /// What does not depend on K.
    pub(crate) fixed: f64,
    /// Choosing and gathering rows, where not all are taken.
    pub(crate) pass: f64,
    /// The product of all rows.
    pub(crate) product: f64,
    /// Measuring the noise.
    pub(crate) measure: f64,
}

impl StepTime {
    fn at(&self, ratio: f64) -> f64 {
        match ratio < 1.0 {
            true => self.fixed + self.pass + self.product * ratio,
            false => self.fixed + self.product,
        }
    }

    /// The number of steps from one measurement to the next.
    pub(crate) fn interval(&self) -> u64 {
        let steps = self.measure / (MEASURING * self.at(1.0));
        steps.ceil().clamp(INTERVALS[0], INTERVALS[1]) as u64
    }
}

/// The K that a measurement is about, for a batch of `rows` rows and a step with `k` of them.
pub(crate) fn measured_ks(rows: usize, k: usize) -> [usize; FIGURES - 2] {
    let mut ks = [k; FIGURES - 2];
    for (k, divisor) in ks[1..].iter_mut().zip(DIVISORS) {
        *k = (rows / divisor).max(1);
    }
    ks
}

/// The figures of one gradient, on the device.
#[derive(Debug, Clone)]
pub(crate) struct Reading(pub(crate) Tensor<1>);

impl Reading {
    /// Waits for the device, if it has not computed them yet.
    pub(crate) fn read(&self) -> [f64; FIGURES] {
        let data = self.0.clone().into_data();
        let mut values = data.iter::<f64>();
        std::array::from_fn(|_| values.next().unwrap_or(f64::NAN))
    }
}

/// Moving averages. Those of ratios to S, which a batch determines well: so they do not depend on the scale of the
/// gradient, which falls by orders of magnitude in the first steps and jumps with the scale of a loss.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Averages {
    /// The sum of the weights of all measurements of the signal; 0 before the first.
    pub(crate) weight: f64,
    /// Of `(F - V(K) - S) / S`: the signal-to-noise ratio, but for the weight.
    pub(crate) signal: f64,
    /// Of `V / S` of each candidate.
    pub(crate) added: [f64; DIVISORS.len()],
}

impl Averages {
    /// Adds a measurement, unless it is of zeros or not finite.
    pub(crate) fn add(&mut self, figures: [f64; FIGURES]) {
        let [gradient, batch, at_k, added @ ..] = figures.map(|root| root * root);
        if !(figures.iter().all(|figure| figure.is_finite()) && batch > 0.0) {
            return;
        }
        let kept = match self.weight > 0.0 {
            true => ADDED_KEPT,
            false => 0.0,
        };
        for (average, added) in self.added.iter_mut().zip(added) {
            *average = kept * *average + (1.0 - kept) * added / batch;
        }
        self.weight = SIGNAL_KEPT * self.weight + 1.0;
        self.signal = SIGNAL_KEPT * self.signal + (gradient - at_k - batch) / batch;
    }

    /// The noise-to-signal ratio nu of the gradient of a batch; none before the first measurement.
    pub(crate) fn noise(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| 1.0 / (self.signal / self.weight).max(1.0 / LARGEST))
    }

    /// The share of the rows to take from now on, after `ratio`.
    pub(crate) fn choose(&self, ratio: f64, time: &StepTime) -> f64 {
        let Some(noise) = self.noise() else {
            return ratio;
        };
        let candidate = |(divisor, added): (usize, f64)| {
            let ratio = 1.0 / divisor as f64;
            let noise = noise * (1.0 + added);
            (ratio, (1.0 + noise) * time.at(ratio))
        };
        let all = (1.0, (1.0 + noise) * time.at(1.0));
        let some = DIVISORS.into_iter().zip(self.added).map(candidate);
        let costs: Vec<_> = std::iter::once(all).chain(some).collect();
        let cost_of = |wanted: f64| costs.iter().find(|(ratio, _)| *ratio == wanted);
        let best = costs
            .iter()
            .copied()
            .reduce(|best, next| match next.1 < best.1 {
                true => next,
                false => best,
            });
        match (best, cost_of(ratio)) {
            (Some(best), Some(present)) if best.1 > (1.0 - HYSTERESIS) * present.1 => ratio,
            (Some(best), _) => best.0,
            (None, _) => ratio,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three equal products.
    const TIME: StepTime = StepTime {
        fixed: 2.0,
        pass: 0.05,
        product: 1.0,
        measure: 0.1,
    };

    /// A measurement at K = M, with V(M/d) = (d - 1) S, as of rows of one size.
    fn figures(gradient: f64, batch: f64) -> [f64; FIGURES] {
        let mut figures = [gradient, batch, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        for (figure, divisor) in figures[3..].iter_mut().zip(DIVISORS) {
            *figure = (divisor as f64 - 1.0) * batch;
        }
        figures.map(f64::sqrt)
    }

    fn after(measured: [f64; FIGURES]) -> Averages {
        let mut averages = Averages::default();
        averages.add(measured);
        averages
    }

    #[test]
    fn the_less_noise_the_fewer_rows() {
        // nu = S / (F - S); the best divisor d minimises (1 + nu d) (2.05 + 1 / d), d = 1 without the pass:
        // d is about the root of 1 / (2.05 nu).
        for (noise, divisor) in [
            (10.0, 1.0),
            (1.0, 1.0),
            (0.04, 4.0),
            (0.008, 8.0),
            (1e-5, 32.0),
        ] {
            let averages = after(figures(1.0 + 1.0 / noise, 1.0));
            assert!((averages.noise().unwrap() / noise - 1.0).abs() < 1e-9);
            assert_eq!(averages.choose(1.0, &TIME), 1.0 / divisor, "{noise}");
        }
        // No signal at all.
        assert_eq!(after(figures(0.5, 1.0)).choose(0.25, &TIME), 1.0);
    }

    #[test]
    fn a_small_gain_does_not_move_k() {
        let averages = after(figures(1.0 + 1.0 / 0.02, 1.0));
        let cost = |d: f64| (1.0 + 0.02 * d) * (2.05 + 1.0 / d);
        assert!(cost(4.0) < cost(8.0) && cost(4.0) > (1.0 - HYSTERESIS) * cost(8.0));
        assert_eq!(averages.choose(0.125, &TIME), 0.125);
        assert_eq!(averages.choose(1.0, &TIME), 0.25);
    }

    #[test]
    fn the_variance_of_the_sample_is_no_signal() {
        let [exact, sampled] = [0.0, 6.0].map(|at_k: f64| {
            let mut figures = figures(3.0 + at_k, 1.0);
            figures[2] = at_k.sqrt();
            after(figures).noise().unwrap()
        });
        assert!((exact - 0.5).abs() < 1e-9 && (sampled - 0.5).abs() < 1e-9);
    }

    #[test]
    fn averages_forget_and_skip_what_says_nothing() {
        let mut averages = Averages::default();
        assert_eq!((averages.noise(), averages.choose(0.5, &TIME)), (None, 0.5));
        for broken in [f64::NAN, f64::INFINITY, 0.0] {
            averages.add(figures(2.0, broken));
            assert_eq!(averages, Averages::default());
        }
        averages.add(figures(2.0, 1.0));
        assert!((averages.noise().unwrap() - 1.0).abs() < 1e-9);
        for _ in 0..60 {
            // Of another scale: only the ratio matters.
            averages.add(figures(11e-8, 1e-8));
        }
        assert!((averages.noise().unwrap() - 0.1).abs() < 1e-3);
    }

    #[test]
    fn measuring_takes_half_a_per_cent_at_most() {
        assert_eq!(TIME.interval(), 10);
        let dear = StepTime {
            measure: 0.89,
            ..TIME
        };
        assert_eq!(dear.interval(), 60);
    }

    #[test]
    fn candidates_have_a_row_at_least() {
        assert_eq!(measured_ks(64, 9), [9, 32, 16, 8, 4, 2]);
        assert_eq!(measured_ks(5, 5), [5, 2, 1, 1, 1, 1]);
    }
}
