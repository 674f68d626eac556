//! A convolution as a product of matrices: a row is a position of the output and sees a patch.

use burn::backend::ops::ConvOptions;

/// The sizes of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Window {
    /// The numbers of channels of input and output.
    pub(crate) channels: [usize; 2],
    /// Height and width of the input.
    pub(crate) size: [usize; 2],
    pub(crate) kernel: [usize; 2],
    pub(crate) stride: [usize; 2],
    pub(crate) dilation: [usize; 2],
    /// The padding before and after, in height and width.
    pub(crate) padding: [(usize, usize); 2],
    pub(crate) groups: usize,
}

impl Window {
    /// Height and width of the output, or none where the kernel does not fit into the input.
    pub(crate) fn checked_output(&self) -> Option<[usize; 2]> {
        let size = |axis: usize| {
            let (before, after) = self.padding[axis];
            let padded = self.size[axis] + before + after;
            let places = padded.checked_sub(self.reach(axis) + 1)?;
            Some(places / self.stride[axis] + 1)
        };
        Some([size(0)?, size(1)?])
    }

    pub(crate) fn output(&self) -> [usize; 2] {
        self.checked_output()
            .expect("the layer has checked that the kernel fits")
    }

    /// The number of rows that an image has.
    pub(crate) fn positions(&self) -> usize {
        self.output().iter().product()
    }

    /// The numbers of input and output channels of a group.
    pub(crate) fn group(&self) -> [usize; 2] {
        self.channels.map(|channels| channels / self.groups)
    }

    /// The number of values of a patch, of one group.
    pub(crate) fn patch(&self) -> usize {
        self.group()[0] * self.taps()
    }

    /// The number of values of a patch in one channel.
    pub(crate) fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    pub(crate) fn options(&self) -> ConvOptions<2> {
        ConvOptions::new_with_padding(self.stride, self.padding, self.dilation, self.groups)
    }

    pub(crate) fn weight(&self) -> [usize; 4] {
        [
            self.channels[1],
            self.group()[0],
            self.kernel[0],
            self.kernel[1],
        ]
    }

    /// How far the last value of the kernel is from the first.
    fn reach(&self, axis: usize) -> usize {
        self.dilation[axis] * (self.kernel[axis] - 1)
    }

    /// The image of a position of the batch, and the row and column of the position in the output.
    pub(crate) fn place(&self, row: usize) -> (usize, [usize; 2]) {
        let [height, width] = self.output();
        let (image, position) = (row / (height * width), row % (height * width));
        (image, [position / width, position % width])
    }

    /// The index in its plane of what a place of the output sees through one value of the kernel.
    pub(crate) fn seen(&self, place: [usize; 2], [down, right]: [usize; 2]) -> Option<usize> {
        let at = |axis: usize, offset: usize| {
            let place = place[axis] * self.stride[axis] + offset * self.dilation[axis];
            let place = place.checked_sub(self.padding[axis].0)?;
            (place < self.size[axis]).then_some(place)
        };
        Some(at(0, down)? * self.size[1] + at(1, right)?)
    }

    /// The places of a kernel, row by row.
    pub(crate) fn offsets(&self) -> impl Iterator<Item = [usize; 2]> + use<> {
        let [height, width] = self.kernel;
        (0..height).flat_map(move |down| (0..width).map(move |right| [down, right]))
    }

    /// The convolution of the gradient with the mirrored kernel that is the gradient of the input.
    /// There is none with a stride, or with more padding than the kernel reaches.
    #[cfg(any(feature = "flex", feature = "ndarray"))]
    pub(crate) fn mirrored(&self) -> Option<Self> {
        let [input, output] = self.channels;
        let padding = |axis: usize| {
            let (before, after) = self.padding[axis];
            let reach = self.reach(axis);
            Some((reach.checked_sub(before)?, reach.checked_sub(after)?))
        };
        (self.stride == [1, 1]).then_some(())?;
        Some(Self {
            channels: [output, input],
            size: self.output(),
            padding: [padding(0)?, padding(1)?],
            ..*self
        })
    }
}
