//! The scores of the positions of a convolution, in a pass that unfolds nothing.

use super::{
    NewScores,
    images::{Images, Run},
    norm::SAFE,
    passes::{RowWork, balance, in_parallel},
};

pub(super) fn score(images: Images<'_>, grad: &[f32], scores: &mut NewScores) {
    in_parallel(ScorePositions {
        images,
        grad,
        score: &mut scores.score,
        tilt: &mut scores.tilt,
    });
}

/// Writes the scores of every position. With several groups, the score is the root of the sum of
/// the squares of the scores of its groups.
struct ScorePositions<'a> {
    images: Images<'a>,
    grad: &'a [f32],
    score: &'a mut [f32],
    tilt: &'a mut [f32],
}

impl RowWork for ScorePositions<'_> {
    type Output = ();

    fn rows(&self) -> usize {
        self.score.len() / self.images.positions()
    }

    fn width(&self) -> usize {
        let [input, output] = self.images.window.channels;
        input * self.images.plane() + output * self.images.positions()
    }

    fn split_at(self, image: usize) -> (Self, Self) {
        let at = image * self.images.positions();
        let images = self.images.split_at(image);
        let grad = self.grad.split_at(at * self.images.window.channels[1]);
        let (score, tilt) = (self.score.split_at_mut(at), self.tilt.split_at_mut(at));
        let work = |images, grad, score, tilt| Self {
            images,
            grad,
            score,
            tilt,
        };
        (
            work(images.0, grad.0, score.0, tilt.0),
            work(images.1, grad.1, score.1, tilt.1),
        )
    }

    #[inline(always)]
    fn run(self) {
        let positions = self.images.positions();
        let of_image = self.images.window.channels[1] * positions;
        let mut squares = Squares::of(&self.images);
        let scores = self.score.chunks_exact_mut(positions);
        let scores = scores.zip(self.tilt.chunks_exact_mut(positions));
        for (image, (score, tilt)) in scores.enumerate() {
            let grad = &self.grad[image * of_image..][..of_image];
            let mut by = [1.0; 2];
            squares.add_up(&self.images, image, grad, by, score);
            let most = [&squares.inputs, &squares.grads].map(|sums| largest(sums));
            if most.iter().any(|most| !SAFE.contains(most)) {
                // The plain squares overflow or underflow. Those of values up to 1 do not.
                by = [largest(self.images.image(image)), largest(grad)];
                by = by.map(|most| 1.0 / most.max(f32::MIN_POSITIVE));
                squares.add_up(&self.images, image, grad, by, score);
            }
            let sums = squares.inputs.iter().zip(&squares.grads);
            for ((score, tilt), (x, g)) in score.iter_mut().zip(tilt).zip(sums) {
                *tilt = balance(x.sqrt() / by[0], g.sqrt() / by[1]);
                *score = *score / by[0] / by[1];
            }
        }
    }

    fn join((): (), (): ()) {}
}

/// Sums of squares, for one image at a time.
struct Squares {
    /// At each place of the image, over the channels of a group.
    plane: Vec<f32>,
    /// At each position: of the patch and the gradient of a group, then of those of all groups.
    patches: Vec<f32>,
    of_group: Vec<f32>,
    inputs: Vec<f32>,
    grads: Vec<f32>,
}

impl Squares {
    fn of(images: &Images<'_>) -> Self {
        let positions = || vec![0.0; images.positions()];
        Self {
            plane: vec![0.0; images.plane()],
            patches: positions(),
            of_group: positions(),
            inputs: positions(),
            grads: positions(),
        }
    }

    /// Adds up the squares of an image and its gradient, each value times the number of its side in
    /// `by`, and writes the scores.
    #[inline(always)]
    fn add_up(
        &mut self,
        images: &Images<'_>,
        image: usize,
        grad: &[f32],
        by: [f32; 2],
        scores: &mut [f32],
    ) {
        let window = images.window;
        self.inputs.fill(0.0);
        self.grads.fill(0.0);
        let of_group = grad.chunks_exact(window.group()[1] * images.positions());
        for (group, grad) in of_group.enumerate() {
            self.of_group.fill(0.0);
            add_squares(&mut self.of_group, grad, by[1]);
            self.plane.fill(0.0);
            add_squares(&mut self.plane, images.group(image, group), by[0]);
            self.patches.fill(0.0);
            images.add_windows(&mut self.patches, &self.plane);
            let sums = self.patches.iter().zip(&self.of_group);
            for (score, (&patch, &grad)) in scores.iter_mut().zip(sums) {
                let size = patch.sqrt() * grad.sqrt();
                *score = match group {
                    0 => size,
                    _ => length(*score, size),
                };
            }
            add(&mut self.inputs, &self.patches);
            add(&mut self.grads, &self.of_group);
        }
    }
}

impl Images<'_> {
    /// Adds to each position the values of a plane that its patch sees.
    #[inline(always)]
    fn add_windows(&self, to: &mut [f32], plane: &[f32]) {
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
                        1 => add(to, from),
                        stride => {
                            let from = from.iter().step_by(stride);
                            to.iter_mut()
                                .zip(from)
                                .for_each(|(to, &value)| *to += value);
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut()
        .zip(from)
        .for_each(|(to, &value)| *to += value);
}

/// Adds the squares of each channel, whose values are multiplied by a number first.
#[inline(always)]
fn add_squares(to: &mut [f32], channels: &[f32], by: f32) {
    for channel in channels.chunks_exact(to.len()) {
        for (to, &value) in to.iter_mut().zip(channel) {
            let value = by * value;
            *to += value * value;
        }
    }
}

/// The largest absolute value that is a number.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    values
        .iter()
        .fold(0.0, |most: f32, value| most.max(value.abs()))
}

/// The root of the sum of two squares, which could overflow.
#[inline(always)]
fn length(first: f32, second: f32) -> f32 {
    let (large, small) = match first > second {
        true => (first, second),
        false => (second, first),
    };
    match large == 0.0 {
        true => small,
        false => large * (1.0 + (small / large) * (small / large)).sqrt(),
    }
}
