//! MNIST from IDX files in a folder.

use std::{
    fs::File,
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use flate2::read::GzDecoder;

/// Pixels along each side of an image.
pub const SIDE: usize = 28;
/// Pixels of an image.
pub const PIXELS: usize = SIDE * SIDE;
/// A file that claims more items than MNIST has is refused before anything is allocated.
const MOST_ITEMS: usize = 60_000;

/// A split of MNIST.
#[derive(Clone, Copy)]
pub enum Split {
    /// 60,000 images.
    Train,
    /// 10,000 images.
    Test,
}

impl Split {
    fn prefix(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Test => "t10k",
        }
    }
}

/// The images of a split, [`PIXELS`] bytes each, and their labels, from 0 to 9.
pub struct Images {
    /// The pixels of one image after the other, row by row.
    pub pixels: Vec<u8>,
    /// The label of each image.
    pub labels: Vec<u8>,
}

/// Reads a split from `mnist/<prefix>-images-idx3-ubyte` and `mnist/<prefix>-labels-idx1-ubyte` in
/// a folder, each plain or with `.gz`. The prefix is `train` or `t10k`.
///
/// # Errors
///
/// Returns an error that names the file and what is wrong with it.
pub fn read(data: &Path, split: Split) -> Result<Images> {
    let folder = &data.join("mnist");
    let prefix = split.prefix();
    let pixels = read_idx(
        folder,
        &format!("{prefix}-images-idx3-ubyte"),
        &[SIDE, SIDE],
    )?;
    let labels = read_idx(folder, &format!("{prefix}-labels-idx1-ubyte"), &[])?;
    ensure!(
        pixels.len() == PIXELS * labels.len(),
        "{}: {} images, but {} labels",
        folder.display(),
        pixels.len() / PIXELS,
        labels.len()
    );
    if let Some(label) = labels.iter().find(|&&label| label > 9) {
        bail!(
            "{}: a label must be from 0 to 9, but got {label}",
            folder.display()
        );
    }
    Ok(Images { pixels, labels })
}

/// Reads an IDX file of unsigned bytes whose items have the dimensions `item`.
fn read_idx(folder: &Path, name: &str, item: &[usize]) -> Result<Vec<u8>> {
    let (path, reader) = open(folder, name)?;
    parse_idx(reader, item).with_context(|| format!("{}", path.display()))
}

fn open(folder: &Path, name: &str) -> Result<(PathBuf, Box<dyn Read>)> {
    let plain = folder.join(name);
    if plain.exists() {
        let file = File::open(&plain).with_context(|| format!("{}", plain.display()))?;
        return Ok((plain, Box::new(BufReader::new(file))));
    }
    let zipped = folder.join(format!("{name}.gz"));
    let file = File::open(&zipped)
        .with_context(|| format!("neither {} nor {0}.gz can be read", plain.display()))?;
    Ok((zipped, Box::new(GzDecoder::new(BufReader::new(file)))))
}

fn parse_idx(mut reader: impl Read, item: &[usize]) -> Result<Vec<u8>> {
    let mut number = || -> Result<usize> {
        let mut bytes = [0; 4];
        reader
            .read_exact(&mut bytes)
            .context("the header is cut off")?;
        Ok(u32::from_be_bytes(bytes) as usize)
    };
    // The magic number is two zeros, 8 for unsigned bytes, and the number of dimensions.
    let magic = 0x0800 + item.len() + 1;
    let found = number()?;
    ensure!(
        found == magic,
        "the magic number must be {magic:#06x}, but got {found:#06x}"
    );
    let items = number()?;
    ensure!(
        items <= MOST_ITEMS,
        "the number of items must be at most {MOST_ITEMS}, but got {items}"
    );
    for &expected in item {
        let found = number()?;
        ensure!(
            found == expected,
            "a dimension must be {expected}, but got {found}"
        );
    }

    let expected = items * item.iter().product::<usize>();
    let mut bytes = Vec::new();
    reader.take(expected as u64 + 1).read_to_end(&mut bytes)?;
    ensure!(
        bytes.len() == expected,
        "{expected} bytes must follow the header, but there are {}{}",
        bytes.len().min(expected),
        if bytes.len() > expected {
            " and more"
        } else {
            ""
        }
    );
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, io::Write};

    fn idx(dimensions: &[u32], payload: &[u8]) -> Vec<u8> {
        let mut bytes = (0x0800 + dimensions.len() as u32).to_be_bytes().to_vec();
        for dimension in dimensions {
            bytes.extend(dimension.to_be_bytes());
        }
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn plain_and_zipped_files_are_read() {
        let data = tempfile::tempdir().unwrap();
        let folder = data.path().join("mnist");
        fs::create_dir(&folder).unwrap();
        let pixels: Vec<u8> = (0..2 * PIXELS).map(|index| (index % 251) as u8).collect();
        let images = idx(&[2, 28, 28], &pixels);
        let file = File::create(folder.join("t10k-images-idx3-ubyte.gz")).unwrap();
        let mut zip = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        zip.write_all(&images).unwrap();
        zip.finish().unwrap();
        let labels = folder.join("t10k-labels-idx1-ubyte");
        fs::write(&labels, idx(&[2], &[3, 9])).unwrap();

        let images = read(data.path(), Split::Test).unwrap();
        assert_eq!(images.pixels, pixels);
        assert_eq!(images.labels, [3, 9]);

        fs::write(&labels, idx(&[2], &[3, 10])).unwrap();
        let error = read(data.path(), Split::Test).err().unwrap().to_string();
        assert!(
            error.ends_with("a label must be from 0 to 9, but got 10"),
            "{error}"
        );
        fs::write(&labels, idx(&[1], &[3])).unwrap();
        let error = read(data.path(), Split::Test).err().unwrap().to_string();
        assert!(error.ends_with("2 images, but 1 labels"), "{error}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = read(folder.path(), Split::Train).err().unwrap().to_string();
        assert!(error.contains("train-images-idx3-ubyte nor"), "{error}");
    }

    #[test]
    fn malformed_files_are_refused() {
        for (bytes, item, message) in [
            (vec![0, 0, 8], &[][..], "the header is cut off"),
            (
                idx(&[1], &[0]),
                &[28, 28],
                "the magic number must be 0x0803, but got 0x0801",
            ),
            (
                idx(&[u32::MAX], &[]),
                &[],
                "the number of items must be at most 60000, but got 4294967295",
            ),
            (
                idx(&[1, 28, 27], &[0]),
                &[28, 28],
                "a dimension must be 28, but got 27",
            ),
            (
                idx(&[3], &[0, 1]),
                &[],
                "3 bytes must follow the header, but there are 2",
            ),
            (
                idx(&[1], &[0, 1]),
                &[],
                "1 bytes must follow the header, but there are 1 and more",
            ),
        ] {
            let error = parse_idx(bytes.as_slice(), item).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
    }

    use proptest::{collection::vec, prelude::*};

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Headers have any number of dimensions, true or false, and any bytes follow them.
        #[test]
        fn no_bytes_make_the_reader_panic(
            header in vec(prop_oneof![Just(0x0801), Just(0x0803), Just(28), 0..4u32, any::<u32>()], 0..5),
            payload in vec(any::<u8>(), 0..2000),
        ) {
            let mut bytes: Vec<u8> = header.iter().flat_map(|field| field.to_be_bytes()).collect();
            bytes.extend(payload);
            for item in [&[][..], &[28, 28]] {
                if let Ok(values) = parse_idx(bytes.as_slice(), item) {
                    prop_assert!(values.len() <= bytes.len());
                    prop_assert!(values.capacity() <= 64 * 1024);
                }
            }
        }
    }
}
