//! Trainings that are killed and resumed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use burn::{
    data::dataloader::DataLoader,
    lr_scheduler::linear::LinearLrSchedulerConfig,
    optim::{SgdConfig, momentum::MomentumConfig},
    tensor::Device,
    train::Learner,
};
use burn_memaop::train::{Checkpoints, resume_loader};

use crate::support::{BATCH, Batch, Net, aop, finished, loader, training};

const EPOCHS: usize = 8;
const STEPS: usize = 12;

/// Trains up to an epoch, from the last checkpoint in the folder; returns what became of the model.
fn train(folder: &Path, epochs: usize) -> Vec<u32> {
    let checkpoints = Checkpoints::new(folder.join("checkpoint"));
    let done = checkpoints.resumable().unwrap().unwrap_or(0);
    let device = Device::flex().autodiff();
    let model = Net::new(aop(), None, &device);
    let scheduler = LinearLrSchedulerConfig::new(0.01, 0.001, EPOCHS * STEPS)
        .init()
        .unwrap();
    let optimizer = SgdConfig::new()
        .with_momentum(Some(MomentumConfig::new()))
        .init();

    let data = resume_loader(loader(BATCH * STEPS, true), done);
    let mut training = training(folder, data)
        .with_custom_checkpointers(
            checkpoints.model(),
            checkpoints.optimizer(),
            checkpoints.scheduler(),
        )
        .num_epochs(epochs);
    if done > 0 {
        training = training.checkpoint(done);
    }
    let learner = Learner::new(model, optimizer, scheduler);
    finished(training.launch(learner)).fingerprint()
}

#[test]
fn a_resumed_training_equals_an_uninterrupted_one_bit_for_bit() {
    let whole = tempfile::tempdir().unwrap();
    let expected = train(whole.path(), EPOCHS);
    let parts = tempfile::tempdir().unwrap();
    assert_ne!(train(parts.path(), EPOCHS / 2), expected);
    assert_eq!(train(parts.path(), EPOCHS), expected);
}

const FOLDER: &str = "MEMAOP_TEST_FOLDER";

/// The training of the test below, in a process of its own.
#[test]
#[ignore = "the test below runs it and kills it"]
fn child() {
    let folder = PathBuf::from(std::env::var_os(FOLDER).expect("the folder to train in"));
    let fingerprint = train(&folder, EPOCHS);
    let words: Vec<_> = fingerprint.iter().map(u32::to_string).collect();
    fs::write(folder.join("fingerprint"), words.join(" ")).unwrap();
}

fn spawn(folder: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "resume::child", "--ignored"])
        .env(FOLDER, folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// SIGKILL at 20 moments, spread over the time that a training takes.
#[test]
fn a_killed_training_resumes_from_the_last_complete_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let start = Instant::now();
    assert!(spawn(folder.path()).wait().unwrap().success());
    let whole = start.elapsed();
    let expected = fs::read_to_string(folder.path().join("fingerprint")).unwrap();

    let mut unfinished = 0;
    for kill in 0..20u32 {
        let folder = tempfile::tempdir().unwrap();
        let mut child = spawn(folder.path());
        // Golden-ratio steps are as even as random ones and hit no rhythm of the training.
        let share = (f64::from(kill) * 0.618_034).fract();
        thread::sleep(Duration::from_secs_f64(whole.as_secs_f64() * share));
        child.kill().unwrap();
        child.wait().unwrap();

        let fingerprint = folder.path().join("fingerprint");
        if !fingerprint.exists() {
            unfinished += 1;
        }
        let checkpoints = Checkpoints::new(folder.path().join("checkpoint"));
        let before = checkpoints.resumable().unwrap();
        assert!(
            spawn(folder.path()).wait().unwrap().success(),
            "{share} {before:?}"
        );
        let resumed = fs::read_to_string(&fingerprint).unwrap();
        assert!(
            resumed == expected,
            "killed at {share}, resumed from {before:?}"
        );
    }
    assert!(
        unfinished >= 10,
        "most are killed before the end, not {unfinished}"
    );
}

#[test]
fn broken_checkpoints_are_reported_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), 3);
    let checkpoints = Checkpoints::new(folder.path().join("checkpoint"));
    assert_eq!(checkpoints.resumable().unwrap(), Some(3));

    let file = |name: &str| folder.path().join("checkpoint").join(name);
    for name in ["model-3.bpk", "optim-3.bpk", "scheduler-3.bpk"] {
        let whole = fs::read(file(name)).unwrap();
        let foreign = b"P5 28 28 255 a picture, say".to_vec();
        // The file of a scheduler ends with padding, without which it is whole.
        let tensors = name != "scheduler-3.bpk";
        let late = [whole.len() / 2, whole.len() - 1]
            .into_iter()
            .filter(|_| tensors);
        let lengths: Vec<_> = [0, 1, 7, 40].into_iter().chain(late).collect();
        let broken = lengths.into_iter().map(|length| whole[..length].to_vec());
        for bytes in broken.chain([foreign]) {
            fs::write(file(name), &bytes).unwrap();
            let Err(error) = checkpoints.resumable() else {
                panic!("{name} {} of {}", bytes.len(), whole.len())
            };
            let message = error.to_string();
            assert!(message.contains(name), "{message}");
            assert!(message.contains("remove the files of epoch 3"), "{message}");
            assert_eq!(fs::read(file(name)).unwrap(), bytes);
        }
        fs::write(file(name), whole).unwrap();
    }
    // Half of an epoch is no epoch.
    fs::remove_file(file("scheduler-3.bpk")).unwrap();
    assert_eq!(checkpoints.resumable().unwrap(), Some(2));
    let nothing = Checkpoints::new(folder.path().join("elsewhere"));
    assert_eq!(nothing.resumable().unwrap(), None);
}

/// In a loop of one's own, and on a device, as burn-train does.
#[test]
fn a_resumed_loader_goes_on_with_the_shuffles() {
    let epoch = |loader: &Arc<dyn DataLoader<Batch>>| -> Vec<f32> {
        let batches = loader.iter().map(|batch| batch.unwrap().input);
        batches
            .flat_map(|input| input.into_data().iter::<f32>().collect::<Vec<_>>())
            .collect()
    };
    let device = Device::flex();
    for moved in [false, true] {
        let place = |loader: Arc<dyn DataLoader<Batch>>| match moved {
            false => loader,
            true => loader.to_device(&device),
        };
        let whole = place(loader(BATCH * STEPS, true));
        let epochs: Vec<_> = (0..4).map(|_| epoch(&whole)).collect();
        assert_ne!(epochs[0], epochs[2]);
        let resumed = place(resume_loader(loader(BATCH * STEPS, true), 2));
        assert_eq!([epoch(&resumed), epoch(&resumed)], epochs[2..]);
    }
}
