//! A tiny model in the files of a real one.

use std::{fs, path::Path, sync::Mutex};

use burn::{
    store::{ModuleSnapshot, SafetensorsStore},
    tensor::{Tensor, TensorData},
};
use clap::Parser;
use serde_json::json;

use super::{
    Cli, Command, Data, Train,
    data::{Batch, Sentence},
    device,
    model::{Classifier, Config, Encoder},
};

/// Writes a model whose value number `i` of a tensor is `0.4 sin(0.7 i + length of its name)`, and
/// one more for the scales of norms.
fn write_model(folder: &Path) {
    let (width, inner, words) = (8, 12, 8);
    let mut tensors = vec![
        (
            "embeddings.word_embeddings.weight".to_string(),
            vec![words, width],
        ),
        (
            "embeddings.position_embeddings.weight".to_string(),
            vec![128, width],
        ),
        (
            "embeddings.token_type_embeddings.weight".to_string(),
            vec![2, width],
        ),
    ];
    let mut norms = vec!["embeddings.LayerNorm".to_string()];
    for layer in 0..2 {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        norms.extend(["attention.output.LayerNorm", "output.LayerNorm"].map(name));
        for (part, shape) in [
            ("attention.self.query", [width, width]),
            ("attention.self.key", [width, width]),
            ("attention.self.value", [width, width]),
            ("attention.output.dense", [width, width]),
            ("intermediate.dense", [inner, width]),
            ("output.dense", [width, inner]),
        ] {
            tensors.push((name(part) + ".weight", shape.to_vec()));
            tensors.push((name(part) + ".bias", vec![shape[0]]));
        }
    }
    for norm in norms {
        tensors.extend(["weight", "bias"].map(|part| (format!("{norm}.{part}"), vec![width])));
    }
    let (mut header, mut bytes) = (serde_json::Map::new(), Vec::new());
    for (name, shape) in tensors {
        let start = bytes.len();
        let offset = if name.ends_with("LayerNorm.weight") {
            1.0
        } else {
            0.0
        };
        for i in 0..shape.iter().product() {
            let value = 0.4 * (0.7 * i as f64 + name.len() as f64).sin() + offset;
            bytes.extend((value as f32).to_le_bytes());
        }
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, bytes.len()]});
        header.insert(name, entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(bytes);
    fs::write(folder.join("model.safetensors"), file).unwrap();
    let config = json!({
        "hidden_size": width, "intermediate_size": inner, "num_attention_heads": 2,
        "num_hidden_layers": 2, "layer_norm_eps": 1e-6, "max_position_embeddings": 128,
        "type_vocab_size": 2, "vocab_size": words, "model_type": "bert", "hidden_act": "gelu",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null, "decoder": null,
        "model": {
            "type": "WordLevel", "unk_token": "[UNK]",
            "vocab": {"[UNK]": 0, "a": 1, "good": 2, "bad": 3, "film": 4},
        },
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter().collect()
}

/// The values are those of transformers 4 and PyTorch for the same weights.
#[test]
fn embeddings_are_those_of_the_reference_implementation() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let device = device();
    let mut encoder = Encoder::new(&Config::read(folder.path()).unwrap(), 0.1, &device);
    encoder.load(folder.path()).unwrap();
    let sentence = |tokens: &[i64]| Sentence {
        tokens: tokens.to_vec(),
        class: 0,
    };
    let sentences = [sentence(&[1, 2, 4]), sentence(&[3])];
    for length in [None, Some(5)] {
        let batch = Batch::new(&sentences.iter().collect::<Vec<_>>(), length, &device);
        let found = values(encoder.forward(batch.tokens, batch.padding));
        let expected = [
            -1.12116, -1.093074, 1.664653, -0.578511, 0.07693, 1.353917, -0.329909, -0.405424,
            -0.920853, 0.12077, 2.08764, -1.068565, 0.030672, 0.835867, -0.748521, 0.23569,
        ];
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
    }
}

fn parse(options: &str) -> Train {
    let words = ["finetune", "train"].into_iter();
    match Cli::try_parse_from(words.chain(options.split_whitespace())) {
        Ok(Cli {
            command: Command::Train(train),
        }) => train,
        other => panic!("{other:?}"),
    }
}

fn options(folder: &Path, more: &str) -> Train {
    let (path, data) = (folder.display(), folder.join("data.tsv"));
    let lines = "good\ta good film\nbad\ta bad film\ngood\tgood\nbad\tbad\n".repeat(16);
    fs::write(&data, lines).unwrap();
    let data = data.display();
    parse(&format!(
        "--model {path} --data {data} --out {path}/run {more}"
    ))
}

/// All trainings of a process draw from one generator, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn the_loss_falls_and_the_weights_come_back() {
    let _turn = TURN.lock();
    for (lora, expected_loss) in [("", 0.5969), ("--lora 2", 0.6721)] {
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path());
        let more = format!("--train 48 --batch 8 --epochs 12 --lr 4e-3 --dropout 0 {lora}");
        let train = options(folder.path(), &more);
        let device = device();
        let (classes, [sentences, _]) = train.data.sentences().unwrap();
        assert_eq!(classes, ["bad", "good"]);
        let output = |model: &Classifier| {
            let batch = Batch::new(&sentences.iter().collect::<Vec<_>>(), None, &device);
            let output = model.forward(batch);
            (output.loss.into_scalar::<f32>(), values(output.output))
        };
        let before = train.data.classifier(2, &device).unwrap();
        let (first, _) = output(&before);
        let after = train.run().unwrap();
        let (last, expected) = output(&after);
        assert!(last < first, "{lora}: {first} {last}");
        // Both programs run this test, so without dropout they train alike.
        assert!((last - expected_loss).abs() < 1e-3, "{lora}: {last}");
        let words = |model: &Classifier| values(model.encoder.words());
        assert_eq!(words(&after) == words(&before), !lora.is_empty());

        let config = Config::read(folder.path()).unwrap();
        let encoder = Encoder::new(&config, 0.0, &device);
        let mut model = Classifier::new(encoder, config.hidden_size, 2, &device);
        let file = folder.path().join("run").join("classifier.safetensors");
        model
            .load_from(&mut SafetensorsStore::from_file(file))
            .unwrap();
        let found = output(&model).1;
        let pairs = found.iter().zip(&expected);
        let close = pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(close && found.len() == expected.len(), "{lora}");
    }
}

/// A training whose second epoch is repeated from the checkpoint of the first has the same weights,
/// bit for bit.
pub fn resumes(more: &str) {
    let _turn = TURN.lock();
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let more = format!("--train 45 --batch 8 --epochs 2 --lr 2e-3 {more}");
    let weights = |more: &str| -> Vec<_> {
        let model = options(folder.path(), more).run().unwrap();
        let tensors = model.collect(None, None, false).into_iter();
        tensors
            .map(|tensor| tensor.to_bytes().unwrap().to_vec())
            .collect()
    };
    let expected = weights(&more);
    let of_another_seed = weights(&format!("{more} --seed 1"));
    assert!(of_another_seed != expected);
    assert!(weights(&more) == expected);
    assert!(weights(&format!("{more} --resume 1")) == expected);
}

#[test]
fn an_epoch_has_every_sentence_once_in_batches_of_like_lengths() {
    let sentence = |length: usize| Sentence {
        tokens: vec![1; length],
        class: length as i64,
    };
    let folder = tempfile::tempdir().unwrap();
    let data: Data = options(folder.path(), "--batch 4").data;
    let sentences: Vec<_> = (1..=30).map(sentence).collect();
    let loader = data.loader(sentences, true, &device());
    let epoch = || -> Vec<Vec<i64>> {
        let batches = burn::data::dataloader::DataLoader::iter(&loader);
        let classes = batches.map(|batch| batch.unwrap().classes.into_data().iter().collect());
        classes.collect()
    };
    let (first, second) = (epoch(), epoch());
    assert_ne!(first, second);
    for epoch in [first, second] {
        let mut all = epoch.concat();
        all.sort_unstable();
        assert_eq!(all, (1..=30).collect::<Vec<_>>());
        assert!(
            epoch
                .iter()
                .all(|batch| batch.last().unwrap() - batch[0] < 4)
        );
    }
    let padded = Batch::new(&[&sentence(2)], Some(3), &device());
    let padding: Vec<bool> = padded.padding.into_data().iter().collect();
    assert_eq!(padding, [false, false, true]);
    let expected = TensorData::from([[1i64, 1, 0]]);
    padded.tokens.into_data().assert_eq(&expected, false);
}

#[test]
fn bad_input_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let message = |train: &Train| format!("{:#}", train.run().err().unwrap());
    let train = options(folder.path(), "--train 10");
    assert!(
        message(&train).contains("config.json"),
        "{}",
        message(&train)
    );
    write_model(folder.path());
    let error = message(&options(folder.path(), "--train 64"));
    assert!(
        error.contains("--train must leave sentences for the test, but got 64 of 64"),
        "{error}"
    );
    let train = options(folder.path(), "--train 10");
    fs::write(folder.path().join("data.tsv"), "good\tfilm\nno tab\n").unwrap();
    let error = message(&train);
    assert!(
        error.contains("line 2 must have a class, a tab and a sentence"),
        "{error}"
    );
    fs::write(folder.path().join("data.tsv"), "good\tfilm\nbad\t \n").unwrap();
    assert!(message(&train).contains("line 2 must have a class, a tab and a sentence"));
    for (more, expected) in [
        ("--longest 129", "--longest must be 3 to 128"),
        ("--pad 127", "--pad must be 128 (--longest) to 128"),
        ("--lora 0", "--lora must be at least 1, but got 0"),
        (
            "--dropout 1",
            "--dropout must be 0 to less than 1, but got 1",
        ),
        (
            "--resume 2",
            "--resume must be less than --epochs (2), but got 2",
        ),
    ] {
        let error = message(&options(folder.path(), &format!("--train 10 {more}")));
        assert!(error.contains(expected), "{error}");
    }
    let train = options(folder.path(), "--train 10");
    fs::create_dir(folder.path().join("run")).unwrap();
    fs::write(folder.path().join("run/options.txt"), train.options()).unwrap();
    // What is refused leaves the options of the training as they were.
    message(&options(folder.path(), "--train 64"));
    let error = message(&options(folder.path(), "--train 10 --resume 1 --batch 3"));
    assert!(
        error.contains("--resume: the training had batch: 32, but got batch: 3"),
        "{error}"
    );
    fs::write(folder.path().join("data.tsv"), "good\tfilm\n").unwrap();
    assert!(message(&train).contains("at least two classes, but has 1"));
}
