//! The scores of the positions of a convolution: a pass over images and gradients, without unfolding.

use super::{
    images::{Images, Run, added},
    rows::{LANES, Real, RowWork, total},
};

/// Writes `|x| |g|` of every position; returns the sums of the channels of the gradient, if they are asked for.
pub(super) struct ScorePositions<'a, E> {
    pub(super) images: Images<'a, E>,
    pub(super) grad: &'a [E],
    pub(super) scores: &'a mut [E],
    pub(super) sum: bool,
}

impl<E: Real> RowWork for ScorePositions<'_, E> {
    type Output = Vec<E>;

    fn rows(&self) -> usize {
        self.scores.len() / self.images.positions()
    }

    fn width(&self) -> usize {
        let [input, output] = self.images.window.channels;
        input * self.images.plane() + output * self.images.positions()
    }

    fn split_at(self, image: usize) -> (Self, Self) {
        let at = image * self.images.positions();
        let images = self.images.split_at(image);
        let grad = self.grad.split_at(at * self.images.window.channels[1]);
        let scores = self.scores.split_at_mut(at);
        let work = |images, grad, scores| Self {
            images,
            grad,
            scores,
            sum: self.sum,
        };
        (
            work(images.0, grad.0, scores.0),
            work(images.1, grad.1, scores.1),
        )
    }

    #[inline(always)]
    fn run(self) -> Vec<E> {
        let Self { images, grad, .. } = self;
        let window = images.window;
        let (plane, positions) = (images.plane(), images.positions());
        let [channels, of_group] = [window.channels[1], window.group()[1]];
        let mut sums = vec![E::zero(); if self.sum { channels } else { 0 }];
        let mut squares = vec![E::zero(); plane];
        let mut patches = vec![E::zero(); positions];
        let mut grads = vec![E::zero(); positions];
        let mut idle = vec![true; positions];
        for (image, scores) in self.scores.chunks_exact_mut(positions).enumerate() {
            for group in 0..window.groups {
                let first = (image * channels + group * of_group) * positions;
                let grad = &grad[first..][..of_group * positions];
                grads.fill(E::zero());
                add_squares(&mut grads, grad);
                squares.fill(E::zero());
                add_squares(&mut squares, images.group(image, group));
                patches.fill(E::zero());
                images.add_windows(&mut patches, &squares);
                let factors = patches.iter().zip(&grads);
                for (score, (&patch, &grad)) in scores.iter_mut().zip(factors) {
                    let size = patch.sqrt() * grad.sqrt();
                    *score = match group {
                        0 => size,
                        _ => length(*score, size),
                    };
                }
                for (idle, grad) in idle.iter_mut().zip(&grads) {
                    *idle = (group == 0 || *idle) && grad.is_zero();
                }
                for (sum, channel) in sums
                    .iter_mut()
                    .skip(group * of_group)
                    .zip(grad.chunks_exact(positions))
                {
                    *sum = *sum + add_up(channel);
                }
            }
            // As a row of zeros, such a position adds nothing whatever its patch is.
            for (score, &idle) in scores.iter_mut().zip(&idle) {
                *score = match idle {
                    true => E::zero(),
                    false => *score,
                };
            }
        }
        sums
    }

    fn join(first: Vec<E>, second: Vec<E>) -> Vec<E> {
        added(first, second)
    }
}

impl<E: Real> Images<'_, E> {
    /// Adds to each position the values of a plane that its patch sees.
    #[inline(always)]
    fn add_windows(&self, to: &mut [E], plane: &[E]) {
        let stride = self.window.stride[1];
        for right in 0..self.window.kernel[1] {
            let run = Run::of(&self.window, right, &(0..self.width));
            for (row, to) in to.chunks_exact_mut(self.width).enumerate() {
                for down in 0..self.window.kernel[0] {
                    let Some(from) = self.input_row(plane, down, row) else {
                        continue;
                    };
                    let to = &mut to[run.before..][..run.inside];
                    let from = &from[run.first.min(from.len())..];
                    match stride {
                        1 => to.iter_mut().zip(from).for_each(|(to, &value)| {
                            *to = *to + value;
                        }),
                        stride => {
                            let from = from.iter().step_by(stride);
                            to.iter_mut().zip(from).for_each(|(to, &value)| {
                                *to = *to + value;
                            });
                        }
                    }
                }
            }
        }
    }
}

/// Adds the squares of each channel.
#[inline(always)]
fn add_squares<E: Real>(to: &mut [E], channels: &[E]) {
    for channel in channels.chunks_exact(to.len()) {
        for (to, &value) in to.iter_mut().zip(channel) {
            *to = *to + value * value;
        }
    }
}

#[inline(always)]
fn add_up<E: Real>(values: &[E]) -> E {
    let mut sums = [E::zero(); LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] = sums[lane] + chunk[lane];
        }
    }
    rest.iter().fold(total(sums), |sum, &value| sum + value)
}

/// The root of the sum of two squares, which could overflow.
#[inline(always)]
fn length<E: Real>(first: E, second: E) -> E {
    let (large, small) = match first > second {
        true => (first, second),
        false => (second, first),
    };
    match large.is_zero() {
        true => small,
        false => large * (E::one() + (small / large) * (small / large)).sqrt(),
    }
}
