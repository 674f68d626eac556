//! How noisy the gradient of a layer is, and the K that makes the loss fall fastest by the clock.
//!
//! The rows of a batch have the scores `s_m = |x_m| |g_m|`, and F is the squared norm of its
//! gradient. If rows are independent, `S = sum s_m^2` is the variance of the gradient, and `F - S`
//! estimates the square of the true gradient. A step with the noise-to-signal ratio
//! `nu = S / (F - S)` makes a progress in proportion to `1 / (1 + nu)` (McCandlish and others,
//! 2018, arXiv:1812.06162). Systematic sampling of K rows adds `V(K) = sum (1 / p_m - 1) s_m^2` to
//! the variance, and to F. The K with the smallest `(1 + nu (1 + V(K) / S)) time(K)` is chosen.
//!
//! Rows left out of the gradient of the input are missing in all layers below. The layer takes its
//! own nu for their noise, and `sum (1 / p_m - 1) |g_m|^2 / sum |g_m|^2` for the share by which it
//! grows. It weighs this against its own time alone, as if there were one layer below.

use serde::{Deserialize, Serialize};

/// M divided by each candidate for K other than M itself.
pub(crate) const DIVISORS: [usize; 5] = [2, 4, 8, 16, 32];
/// The figures of a gradient: the roots of F, S, and V(K) for the K of the step and each candidate.
pub(crate) const FIGURES: usize = 3 + DIVISORS.len();
pub(crate) type Figures = [f64; FIGURES];

/// The share of the time of steps that measuring may take, on average.
const MEASURING: f64 = 0.005;
const INTERVALS: [f64; 2] = [10.0, 100.0];
/// The interval at first. A K that falls to M/32 by halves is there after some twenty steps.
const EARLY_INTERVAL: u64 = 3;
/// The sum of the weights of six measurements, after which the interval is longer.
const EARLY_WEIGHT: f64 = 4.5;
/// What averages keep from one measurement to the next. They keep much of the noise, of which a
/// batch tells little, and less of the variances of sampling, which fall fast in the first steps.
const NOISE_KEPT: f64 = 0.9;
const ADDED_KEPT: f64 = 0.5;
/// The least gain for which K changes. From M/16 to M/32 the gain is 0.015 at the most.
const HYSTERESIS: f64 = 0.01;
/// The least gain for which rows are left out. The times are estimates, and an estimate of 0.92 was
/// measured as 0.98 (`docs/fine-tuning.md`).
const LEAST_GAIN: f64 = 0.05;
/// The noise-to-signal ratio from which on averages see no signal.
const LARGEST: f64 = 1000.0;
/// A measurement of nu that is more than so many times the average takes its place.
const JUMP: f64 = 4.0;
/// The share of K that one measurement leaves at least.
const LEAST_FALL: f64 = 0.5;
/// The largest `S / (F - V(K))` of one measurement. A gradient of noise alone has about 1.
const MOST_OF_ONE: f64 = 2.0;

/// The time of a training step of one layer, in any unit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepTime {
    /// The part that depends on no choice. Writing the gradient of the weight belongs to it.
    pub(crate) fixed: f64,
    pub(crate) weight: ProductTime,
    /// Zero if the gradient of the input is not asked for.
    pub(crate) input: ProductTime,
    /// The time of measuring the noise.
    pub(crate) measure: f64,
}

/// The time of a product of some rows.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ProductTime {
    /// The time of drawing rows, if not all are used.
    pub(crate) pass: f64,
    /// The time that copying all rows would take. As many as are drawn are copied.
    pub(crate) copy: f64,
    /// The time of the product of all rows.
    pub(crate) product: f64,
}

impl ProductTime {
    fn at(&self, ratio: f64) -> f64 {
        match ratio < 1.0 {
            true => self.pass + (self.copy + self.product) * ratio,
            false => self.product,
        }
    }
}

/// The rows that each gradient uses, as shares of the batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Shares {
    pub(crate) weight: f64,
    pub(crate) input: f64,
}

impl Shares {
    pub(crate) const ALL: Self = Self {
        weight: 1.0,
        input: 1.0,
    };
}

impl StepTime {
    /// The time of a step with these shares, relative to an exact one.
    pub(crate) fn relative(&self, shares: Shares) -> f64 {
        self.at(shares) / self.at(Shares::ALL)
    }

    fn at(&self, shares: Shares) -> f64 {
        self.fixed + self.weight.at(shares.weight) + self.input.at(shares.input)
    }

    /// The number of passes of which one is measured.
    pub(crate) fn interval(&self, averages: &Averages) -> u64 {
        if averages.weight < EARLY_WEIGHT {
            return EARLY_INTERVAL;
        }
        let steps = self.measure / (MEASURING * self.at(Shares::ALL));
        steps.ceil().clamp(INTERVALS[0], INTERVALS[1]) as u64
    }

    /// Whether the noise of a pass is measured. It is in the first pass, and in one pass of each
    /// interval, `drawn` by the number of the interval. So all uses of a layer in one step are
    /// measured alike, although the layer does not know where a step begins.
    pub(crate) fn measures(
        &self,
        pass: u64,
        averages: &Averages,
        drawn: impl Fn(u64) -> u64,
    ) -> bool {
        let interval = self.interval(averages);
        pass == 0 || pass % interval == drawn(pass / interval) % interval
    }
}

/// K for a share of the rows.
pub(crate) fn k_of(ratio: f64, rows: usize) -> usize {
    ((ratio * rows as f64).round() as usize).clamp(1, rows)
}

/// The K that a measurement is about, for a batch of `rows` rows of which the step uses `k`.
pub(crate) fn measured_ks(rows: usize, k: usize) -> [usize; FIGURES - 2] {
    let mut ks = [k; FIGURES - 2];
    for (k, divisor) in ks[1..].iter_mut().zip(DIVISORS) {
        *k = k_of(1.0 / divisor as f64, rows);
    }
    ks
}

/// Moving averages of ratios. These do not depend on the scale of the gradient, which falls by
/// orders of magnitude in the first steps and jumps with the scale of a loss.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Averages {
    /// The sum of the weights of all measurements of the noise; 0 before the first.
    pub(crate) weight: f64,
    /// The weighted sum of `S / (F - V(K))`, the share of noise in the square of the gradient.
    /// Unlike nu it has bounds, so that no measurement outweighs those after it.
    pub(crate) noise: f64,
    /// The average of `V / S` of each candidate.
    pub(crate) added: [f64; DIVISORS.len()],
    /// The same for the gradient of the input. None before the first measurement.
    pub(crate) input_added: Option<[f64; DIVISORS.len()]>,
}

impl Averages {
    /// Whether measurements can lead to these averages.
    pub(super) fn is_sound(&self) -> bool {
        let all = [self.weight, self.noise].into_iter().chain(self.added);
        let mut all = all.chain(self.input_added.into_iter().flatten());
        all.all(|value| value >= 0.0 && value.is_finite())
    }

    /// Adds a measurement, unless it is of zeros or not finite.
    pub(crate) fn add(&mut self, figures: Figures) {
        let [gradient, batch, at_k, added @ ..] = figures.map(|root| root * root);
        if !(figures.iter().all(|figure| figure.is_finite()) && batch > 0.0) {
            return;
        }
        let noise = match gradient > at_k {
            true => (batch / (gradient - at_k)).min(MOST_OF_ONE),
            false => MOST_OF_ONE,
        };
        // The average says nothing of a gradient that has become much noisier.
        if self
            .noise()
            .is_some_and(|average| ratio(noise) > JUMP * average)
        {
            self.weight = 0.0;
            self.noise = 0.0;
        }
        let before = (self.weight > 0.0).then_some(self.added);
        self.added = averaged(before, added, batch);
        self.weight = NOISE_KEPT * self.weight + 1.0;
        self.noise = NOISE_KEPT * self.noise + noise;
    }

    /// Adds a measurement of the gradient of the input. A rise counts at once: rows that a layer
    /// above leaves out add nothing here, but they do as soon as that layer uses them.
    pub(crate) fn add_input(&mut self, figures: Figures) {
        let [_, batch, _, added @ ..] = figures.map(|root| root * root);
        if figures.iter().all(|figure| figure.is_finite()) && batch > 0.0 {
            let present = added.map(|added| added / batch);
            let average = averaged(self.input_added, added, batch);
            self.input_added = Some(std::array::from_fn(|i| average[i].max(present[i])));
        }
    }

    /// The noise-to-signal ratio nu of the gradient of a batch. None before the first measurement.
    pub(crate) fn noise(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| ratio(self.noise / self.weight))
    }

    /// The variance that drawing these shares adds, relative to that of a batch with independent
    /// rows. None before the first measurement.
    pub(crate) fn added_at(&self, shares: Shares) -> Option<f64> {
        if shares == Shares::ALL {
            return Some(0.0);
        }
        self.noise()?;
        let of_input = self.input_added.filter(|_| shares.input < 1.0);
        let of_input = of_input.map_or(0.0, |added| at_share(added, shares.input));
        Some(at_share(self.added, shares.weight) + of_input)
    }

    /// The share of the rows to use for the gradient of the weight, for batches of `rows` rows.
    pub(crate) fn choose(&self, present: Shares, rows: usize, time: &StepTime) -> f64 {
        let Some(noise) = self.noise() else {
            return present.weight;
        };
        cheapest(self.added, present.weight, |weight, added| {
            let weight = k_of(weight, rows) as f64 / rows as f64;
            (1.0 + noise * (1.0 + added)) * time.at(Shares { weight, ..present })
        })
    }

    /// The same for the gradient of the input.
    pub(crate) fn choose_input(&self, present: Shares, rows: usize, time: &StepTime) -> f64 {
        let (Some(noise), Some(added)) = (self.noise(), self.input_added) else {
            return present.input;
        };
        cheapest(added, present.input, |input, added| {
            let input = k_of(input, rows) as f64 / rows as f64;
            (1.0 + noise * (1.0 + added)) * time.at(Shares { input, ..present })
        })
    }
}

/// nu from the share of noise in the square of a gradient.
fn ratio(share: f64) -> f64 {
    share / (1.0 - share).max(1.0 / LARGEST)
}

/// `V / S` at a share of the rows, on the line between the candidates beside it in `1 / share`, in
/// which it is nearly straight.
fn at_share(added: [f64; DIVISORS.len()], share: f64) -> f64 {
    let mut before = (1.0, 0.0);
    for (divisor, added) in DIVISORS.into_iter().zip(added) {
        let next = (divisor as f64, added);
        if next.0 * share >= 1.0 {
            return before.1 + (next.1 - before.1) * (1.0 / share - before.0) / (next.0 - before.0);
        }
        before = next;
    }
    // Fewer rows than the last candidate has.
    before.1 * (1.0 / share - 1.0) / (before.0 - 1.0)
}

/// The averages of `V / S` after a measurement, one for each candidate.
fn averaged(
    before: Option<[f64; DIVISORS.len()]>,
    added: [f64; DIVISORS.len()],
    batch: f64,
) -> [f64; DIVISORS.len()] {
    let present = added.map(|added| added / batch);
    let Some(before) = before else {
        return present;
    };
    std::array::from_fn(|i| ADDED_KEPT * before[i] + (1.0 - ADDED_KEPT) * present[i])
}

/// The candidate with the least `cost` of its share and what it adds to the noise, but at least
/// half of the present share. Where the gain is small, it is the present share.
fn cheapest(added: [f64; DIVISORS.len()], present: f64, cost: impl Fn(f64, f64) -> f64) -> f64 {
    let some = DIVISORS.into_iter().zip(added);
    let some = some.map(|(divisor, added)| (1.0 / divisor as f64, added));
    let mut best = (1.0, (1.0 - LEAST_GAIN) * cost(1.0, 0.0));
    let mut at_present = best.1;
    for (ratio, added) in some {
        let cost = cost(ratio, added);
        if cost < best.1 {
            best = (ratio, cost);
        }
        if ratio == present {
            at_present = cost;
        }
    }
    match best.1 > (1.0 - HYSTERESIS) * at_present {
        true => present,
        false => best.0.max(LEAST_FALL * present),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: usize = 1024;

    /// Three equal products.
    const TIME: StepTime = StepTime {
        fixed: 1.0,
        weight: PART,
        input: PART,
        measure: 0.1,
    };
    const PART: ProductTime = ProductTime {
        pass: 0.05,
        copy: 0.0,
        product: 1.0,
    };

    /// A measurement at K = M, with V(M/d) = (d - 1) S, as rows of one size have it.
    fn figures(gradient: f64, batch: f64) -> [f64; FIGURES] {
        let mut figures = [gradient, batch, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        for (figure, divisor) in figures[3..].iter_mut().zip(DIVISORS) {
            *figure = (divisor as f64 - 1.0) * batch;
        }
        figures.map(f64::sqrt)
    }

    /// All rows of the gradient of the input.
    fn of(weight: f64) -> Shares {
        Shares { weight, input: 1.0 }
    }

    fn after(measured: [f64; FIGURES]) -> Averages {
        let mut averages = Averages::default();
        averages.add(measured);
        averages
    }

    /// The share of the rows that repeated choices end at, from all rows on.
    fn settled(averages: &Averages) -> f64 {
        let choices = (0..8).scan(1.0, |share, _| {
            *share = averages.choose(of(*share), M, &TIME);
            Some(*share)
        });
        choices.last().unwrap()
    }

    #[test]
    fn the_less_noise_the_fewer_rows() {
        // nu is S / (F - S). The best divisor d minimises (1 + nu d) (2.05 + 1 / d), without the
        // pass if d = 1. So d is about the root of 1 / (2.05 nu).
        for (noise, divisor) in [
            (10.0, 1.0),
            (1.0, 1.0),
            (0.04, 4.0),
            (0.008, 8.0),
            (1e-5, 32.0),
        ] {
            let averages = after(figures(1.0 + 1.0 / noise, 1.0));
            assert!((averages.noise().unwrap() / noise - 1.0).abs() < 1e-9);
            assert_eq!(settled(&averages), 1.0 / divisor, "{noise}");
        }
        // Here is no signal at all.
        assert_eq!(after(figures(0.5, 1.0)).choose(of(0.25), M, &TIME), 1.0);
    }

    #[test]
    fn drawing_rows_of_one_size_adds_as_much_as_a_smaller_batch() {
        let averages = after(figures(3.0, 1.0));
        assert_eq!(Averages::default().added_at(of(0.5)), None);
        assert_eq!(Averages::default().added_at(of(1.0)), Some(0.0));
        // Also between the candidates and below them.
        for share in [1.0, 0.75, 0.5, 0.25, 0.1, 0.01] {
            let added = averages.added_at(of(share)).unwrap();
            assert!(
                (share * (1.0 + added) - 1.0).abs() < 1e-9,
                "{share} {added}"
            );
        }
        assert!((TIME.relative(of(0.5)) - 2.55 / 3.0).abs() < 1e-9);
    }

    /// Half of the rows carry all of the gradient, but copying them takes nearly what they save.
    #[test]
    fn no_rows_are_left_out_for_a_small_gain() {
        let mut measured = figures(3.0, 1.0);
        measured[3] = 0.0;
        let averages = after(measured);
        for (copy, chosen) in [(0.0, 0.5), (0.5, 0.5), (0.7, 1.0), (1.0, 1.0)] {
            let weight = ProductTime { copy, ..PART };
            let time = StepTime { weight, ..TIME };
            assert_eq!(averages.choose(of(1.0), M, &time), chosen, "{copy}");
            let half = (2.55 + copy / 2.0) / 3.0;
            assert!((time.relative(of(0.5)) - half).abs() < 1e-9);
            assert_eq!(half < 1.0 - LEAST_GAIN, chosen < 1.0);
        }
    }

    #[test]
    fn a_small_gain_does_not_move_k() {
        let averages = after(figures(1.0 + 1.0 / 0.016, 1.0));
        let cost = |d: f64| (1.0 + 0.016 * d) * (2.05 + 1.0 / d);
        assert!(cost(4.0) < cost(8.0) && cost(4.0) > (1.0 - HYSTERESIS) * cost(8.0));
        assert_eq!(averages.choose(of(0.125), M, &TIME), 0.125);
        assert_eq!(settled(&averages), 0.25);
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
        assert_eq!(
            (averages.noise(), averages.choose(of(0.5), M, &TIME)),
            (None, 0.5)
        );
        for broken in [f64::NAN, f64::INFINITY, 0.0] {
            averages.add(figures(2.0, broken));
            assert_eq!(averages, Averages::default());
        }
        averages.add(figures(2.0, 1.0));
        assert!((averages.noise().unwrap() - 1.0).abs() < 1e-9);
        for _ in 0..60 {
            // The scale is another one, but only the ratio matters.
            averages.add(figures(11e-8, 1e-8));
        }
        assert!((averages.noise().unwrap() - 0.1).abs() < 1e-2);
    }

    #[test]
    fn rows_of_the_gradient_of_the_input_go_by_their_own_variance() {
        let mut averages = after(figures(11.0, 1.0));
        let all = of(1.0);
        assert_eq!(averages.choose_input(all, M, &TIME), 1.0);
        // The first rows are of one size. Of the second ones few carry all.
        averages.add_input(figures(0.0, 1.0));
        let alike = averages.choose_input(all, M, &TIME);
        assert_eq!(alike, 0.5);
        let mut few = after(figures(1e4, 1.0));
        few.add_input([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(few.choose_input(all, M, &TIME), 0.5);
        let sixteenth = Shares {
            input: 1.0 / 16.0,
            ..all
        };
        assert_eq!(few.choose_input(sixteenth, M, &TIME), 1.0 / 32.0);
        // A gradient of noise alone takes all rows, if they are alike.
        let mut noisy = after(figures(0.5, 1.0));
        noisy.add_input(figures(0.0, 1.0));
        assert_eq!(noisy.choose_input(all, M, &TIME), 1.0);
        // A rise counts at once, and half of a fall.
        few.add_input(figures(0.0, 1.0));
        assert_eq!(few.input_added, averages.input_added);
        few.add_input([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(few.input_added.unwrap()[0], 0.5);
        // Nothing can be saved if the gradient of the input is not asked for.
        let without = StepTime {
            input: ProductTime::default(),
            ..TIME
        };
        assert_eq!(averages.choose_input(all, M, &without), 1.0);
    }

    /// Equal rows, as in the first step of many models, are followed by noise.
    #[test]
    fn one_measurement_takes_k_up_at_once_and_down_by_two() {
        let mut averages = Averages::default();
        for _ in 0..50 {
            averages.add(figures(4096.0, 1.0));
        }
        assert_eq!(settled(&averages), 1.0 / 32.0);
        let mut noisy = averages;
        noisy.add(figures(2.0, 1.0));
        assert_eq!(noisy.choose(of(1.0 / 32.0), M, &TIME), 1.0);
        assert_eq!(noisy.choose_input(of(1.0), M, &TIME), 1.0);

        let mut ks = vec![1.0];
        while let Some(&k) = ks.last()
            && ks.len() < 7
        {
            averages.add(figures(4096.0, 1.0));
            ks.push(averages.choose(of(k), M, &TIME));
        }
        assert_eq!(ks, [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]);
        // Noise that rises less is averaged.
        let before = averages.noise().unwrap();
        averages.add(figures(1.0 + 4095.0 / 3.0, 1.0));
        assert!(averages.noise().unwrap() < 1.3 * before);
    }

    #[test]
    fn equal_k_cost_the_same() {
        // M/16 and M/32 of 16 rows are both one row, and M/16 comes first.
        let averages = after(figures(1e6, 1.0));
        assert_eq!(averages.choose(of(1.0 / 8.0), 16, &TIME), 1.0 / 16.0);
    }

    /// One pass of each interval is measured, and all uses of a layer alike.
    #[test]
    fn passes_are_measured_as_they_are_drawn() {
        let drawn = |interval: u64| crate::rows::random::stream(3, interval);
        let mut averages = Averages::default();
        assert!(TIME.measures(0, &averages, drawn));
        averages.weight = 1.0;
        let early = (3..300).filter(|&pass| TIME.measures(pass, &averages, drawn));
        assert_eq!(early.count(), 99);
        averages.weight = EARLY_WEIGHT;
        for uses in [2, 10, 11, 20, 33] {
            let mut of_use = vec![0; uses];
            for pass in 10..20_000 {
                if TIME.measures(pass, &averages, drawn) {
                    of_use[pass as usize % uses] += 1;
                }
            }
            assert_eq!(of_use.iter().sum::<u32>(), 1999);
            let expected = 1999.0 / uses as f64;
            let apart = |&count: &u32| (f64::from(count) - expected).abs();
            let most = of_use.iter().map(apart).fold(0.0, f64::max);
            assert!(most < 5.0 * expected.sqrt(), "{uses}: {of_use:?}");
        }
    }

    #[test]
    fn measuring_takes_half_a_per_cent_at_most() {
        let settled = Averages {
            weight: EARLY_WEIGHT,
            ..Averages::default()
        };
        assert_eq!(TIME.interval(&settled), 10);
        let nothing = Averages::default();
        assert_eq!(TIME.interval(&nothing), EARLY_INTERVAL);
        let dear = StepTime {
            measure: 0.89,
            ..TIME
        };
        assert_eq!(dear.interval(&settled), 60);
    }

    #[test]
    fn candidates_have_a_row_at_least() {
        assert_eq!(measured_ks(64, 9), [9, 32, 16, 8, 4, 2]);
        assert_eq!(measured_ks(60, 60), [60, 30, 15, 8, 4, 2]);
        assert_eq!(measured_ks(5, 5), [5, 3, 1, 1, 1, 1]);
    }
}
