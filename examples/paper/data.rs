use std::{fs::File, io::Read, path::Path};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use memaop_examples::mnist::{self, Images, PIXELS, Split};
use serde::{Deserialize, Serialize};

/// One of the two experiments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dataset {
    Energy,
    Mnist,
}

impl Dataset {
    pub fn name(self) -> &'static str {
        match self {
            Self::Energy => "energy",
            Self::Mnist => "mnist",
        }
    }

    pub fn batch(self) -> usize {
        match self {
            Self::Energy => 144,
            Self::Mnist => 64,
        }
    }

    /// The number of epochs in the paper.
    pub fn epochs(self) -> usize {
        match self {
            Self::Energy => 100,
            Self::Mnist => 30,
        }
    }

    /// The values of K that the paper compares.
    pub fn ks(self) -> [usize; 3] {
        match self {
            Self::Energy => [18, 9, 3],
            Self::Mnist => [32, 16, 8],
        }
    }

    pub fn outputs(self) -> usize {
        match self {
            Self::Energy => 1,
            Self::Mnist => 10,
        }
    }
}

/// Rows of inputs, each with a target: a value, or the number of a class.
#[derive(Debug, PartialEq)]
pub struct Rows {
    pub width: usize,
    pub inputs: Vec<f32>,
    pub targets: Vec<f32>,
}

impl Rows {
    pub fn len(&self) -> usize {
        self.targets.len()
    }
}

/// The rows that a run is trained on, and those that it is validated on.
pub struct Data {
    pub dataset: Dataset,
    pub train: Rows,
    pub validation: Rows,
}

impl Data {
    /// Reads `energy/energy_efficiency.csv` or `mnist/*` in `folder`.
    ///
    /// # Errors
    ///
    /// Returns an error that names the file and what is wrong with it.
    pub fn load(dataset: Dataset, folder: Option<&Path>) -> Result<Self> {
        let (train, validation) = match (dataset, folder) {
            (Dataset::Energy, Some(folder)) => {
                let path = folder.join("energy/energy_efficiency.csv");
                let read = || parse_energy(File::open(&path)?);
                read().with_context(|| format!("{}", path.display()))?
            }
            (Dataset::Energy, None) => bail!(
                "the Energy data must be downloaded by hand: get Energy Efficiency (UCI dataset 242), save \
                 it as DIR/energy/energy_efficiency.csv (comma separated, a header line, 768 rows: \
                 eight inputs, heating load, cooling load), and add --data DIR"
            ),
            (Dataset::Mnist, Some(folder)) => {
                let read = |split| mnist::read(folder, split).map(scaled);
                (read(Split::Train)?, read(Split::Test)?)
            }
            (Dataset::Mnist, None) => bail!(
                "add --data DIR for MNIST: DIR/mnist must have its four IDX files, plain or with .gz \
                 (train-images-idx3-ubyte and so on)"
            ),
        };
        Ok(Self {
            dataset,
            train,
            validation,
        })
    }
}

/// Pixels scaled to `[-1, 1]`.
fn scaled(images: Images) -> Rows {
    let pixels = images.pixels.iter();
    Rows {
        width: PIXELS,
        inputs: pixels
            .map(|&pixel| f32::from(pixel) / 127.5 - 1.0)
            .collect(),
        targets: images.labels.into_iter().map(f32::from).collect(),
    }
}

const ENERGY_ROWS: usize = 768;
const ENERGY_TRAIN: usize = 576;
/// The input columns that are standardised. Those in `ONE_HOT` are one-hot encoded.
const STANDARDISED: [usize; 6] = [0, 1, 2, 3, 4, 6];
const ONE_HOT: [usize; 2] = [5, 7];
const HEATING_LOAD: usize = 8;

/// The most bytes of the table that are read; it has some 40,000.
const MOST_BYTES: u64 = 1 << 20;

fn parse_energy(file: impl Read) -> Result<(Rows, Rows)> {
    let mut reader = csv::Reader::from_reader(file.take(MOST_BYTES));
    let mut table: Vec<Vec<f64>> = Vec::new();
    for (index, record) in reader.records().enumerate() {
        let record = record?;
        ensure!(
            record.len() > HEATING_LOAD,
            "a row must have at least {} columns, but row {} has {}",
            HEATING_LOAD + 1,
            index + 1,
            record.len()
        );
        let values = record.iter().take(HEATING_LOAD + 1).map(|field| {
            let value: f64 = field
                .trim()
                .parse()
                .with_context(|| format!("row {}: not a number: {field:?}", index + 1))?;
            ensure!(value.is_finite(), "row {}: not finite: {value}", index + 1);
            Ok(value)
        });
        table.push(values.collect::<Result<_>>()?);
        ensure!(
            table.len() <= ENERGY_ROWS,
            "there must be {ENERGY_ROWS} rows, but there are more"
        );
    }
    ensure!(
        table.len() == ENERGY_ROWS,
        "there must be {ENERGY_ROWS} rows, but got {}",
        table.len()
    );

    let mut columns: Vec<Vec<f32>> = Vec::new();
    for column in STANDARDISED {
        let values: Vec<f64> = table.iter().map(|row| row[column]).collect();
        let train = &values[..ENERGY_TRAIN];
        let mean = train.iter().sum::<f64>() / train.len() as f64;
        let squares = train.iter().map(|value| (value - mean).powi(2));
        let deviation = (squares.sum::<f64>() / train.len() as f64).sqrt();
        ensure!(deviation > 0.0, "column {} is constant", column + 1);
        let standardised = values.iter().map(|value| (value - mean) / deviation);
        columns.push(standardised.map(|value| value as f32).collect());
    }
    for column in ONE_HOT {
        let mut categories: Vec<f64> = table.iter().map(|row| row[column]).collect();
        categories.sort_by(f64::total_cmp);
        categories.dedup();
        for category in categories {
            let is = |row: &Vec<f64>| f32::from(u8::from(row[column] == category));
            columns.push(table.iter().map(is).collect());
        }
    }

    let rows = |range: std::ops::Range<usize>| Rows {
        width: columns.len(),
        inputs: range
            .clone()
            .flat_map(|row| columns.iter().map(move |column| column[row]))
            .collect(),
        targets: range.map(|row| table[row][HEATING_LOAD] as f32).collect(),
    };
    Ok((rows(0..ENERGY_TRAIN), rows(ENERGY_TRAIN..ENERGY_ROWS)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*, sample::Index};

    fn table() -> String {
        let mut text = String::from("X1,X2,X3,X4,X5,X6,X7,X8,Y1,Y2\n");
        for row in 0..ENERGY_ROWS {
            let (a, b) = (row % 7, row % 5);
            text += &format!(
                "{a},{b},{a},{b},{a},{},{b},{},{a}.5,1\n",
                2 + row % 4,
                row % 6
            );
        }
        text
    }

    #[test]
    fn a_whole_table_is_read() {
        parse_energy(table().as_bytes()).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_text_makes_the_reader_panic(text in "[0-9.,eE\"\r\n -]{0,400}", bytes in vec(any::<u8>(), 0..400)) {
            let _refused = parse_energy(text.as_bytes());
            let _refused = parse_energy(bytes.as_slice());
        }

        #[test]
        fn a_damaged_table_is_refused_or_read(changes in vec((any::<Index>(), any::<u8>()), 0..6)) {
            let mut bytes = table().into_bytes();
            for (index, byte) in changes {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok((train, validation)) = parse_energy(bytes.as_slice()) {
                prop_assert_eq!(train.len() + validation.len(), ENERGY_ROWS);
            }
        }
    }
}
