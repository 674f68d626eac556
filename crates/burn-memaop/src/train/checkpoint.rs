use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use burn::{
    lr_scheduler::LrSchedulerRecord,
    optim::OptimizerRecord,
    store::ModuleRecord,
    train::checkpoint::{Checkpoint, Checkpointer, CheckpointerError},
};
use thiserror::Error;

/// The checkpoints of a training in a folder. The process can be killed at any moment.
///
/// burn-train saves a model, its optimizer and its scheduler to three files, each on a thread of
/// its own. Here a file gets its name when it is whole, so an epoch counts when all three have one.
///
/// ```no_run
/// # use burn_memaop::train::Checkpoints;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let checkpoints = Checkpoints::new("run/checkpoint");
/// let done = checkpoints.resumable()?.unwrap_or(0);
/// // training.with_custom_checkpointers(
/// //     checkpoints.model(), checkpoints.optimizer(), checkpoints.scheduler())
/// // and, if `done` is not 0, training.checkpoint(done)
/// # Ok(()) }
/// ```
///
/// A resumed training equals an uninterrupted one bit for bit only if its batches are the same: see
/// [`resume_loader`](super::resume_loader).
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
}

/// Why a training cannot be resumed.
#[derive(Debug, Error)]
pub enum CheckpointsError {
    /// The folder cannot be read.
    #[error("the folder of checkpoints {folder} cannot be read: {error}")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// The cause.
        error: io::Error,
    },
    /// A file of the last complete epoch cannot be read.
    #[error(
        "the checkpoint {file} cannot be read: {error}; remove the files of epoch {epoch} to resume \
         from an earlier one"
    )]
    File {
        /// The file.
        file: PathBuf,
        /// The epoch of the file.
        epoch: usize,
        /// The cause.
        error: CheckpointerError,
    },
}

const MODEL: &str = "model";
const OPTIMIZER: &str = "optim";
const SCHEDULER: &str = "scheduler";

impl Checkpoints {
    /// The checkpoints in a folder, which is made when the first one is saved.
    pub fn new(folder: impl AsRef<Path>) -> Self {
        Self {
            folder: folder.as_ref().to_path_buf(),
        }
    }

    /// The checkpointer for the module.
    pub fn model(&self) -> AtomicFileCheckpointer {
        AtomicFileCheckpointer::new(&self.folder, MODEL)
    }

    /// The checkpointer for the optimizer.
    pub fn optimizer(&self) -> AtomicFileCheckpointer {
        AtomicFileCheckpointer::new(&self.folder, OPTIMIZER)
    }

    /// The checkpointer for the scheduler.
    pub fn scheduler(&self) -> AtomicFileCheckpointer {
        AtomicFileCheckpointer::new(&self.folder, SCHEDULER)
    }

    /// The last epoch whose three files are all there, if there is one. They are loaded to see
    /// whether they are readable. Nothing is changed.
    ///
    /// # Errors
    ///
    /// A folder or a file that cannot be read.
    pub fn resumable(&self) -> Result<Option<usize>, CheckpointsError> {
        let folder = |error| CheckpointsError::Folder {
            folder: self.folder.clone(),
            error,
        };
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            entries => entries.map_err(folder)?,
        };
        let mut epochs = Vec::new();
        for entry in entries {
            let name = entry.map_err(folder)?.file_name();
            let epoch = name.to_str().and_then(|name| {
                let name = name.strip_prefix(MODEL)?.strip_prefix('-')?;
                name.strip_suffix(".bpk")?.parse::<usize>().ok()
            });
            epochs.extend(epoch);
        }
        epochs.sort_unstable();
        let files = [self.model(), self.optimizer(), self.scheduler()];
        let complete = |epoch: &usize| files.iter().all(|file| file.path(*epoch).is_file());
        let Some(epoch) = epochs.into_iter().rev().find(complete) else {
            return Ok(None);
        };
        readable::<ModuleRecord>(&files[0], epoch)?;
        readable::<OptimizerRecord>(&files[1], epoch)?;
        readable::<LrSchedulerRecord>(&files[2], epoch)?;
        Ok(Some(epoch))
    }
}

fn readable<R: Checkpoint>(
    checkpointer: &AtomicFileCheckpointer,
    epoch: usize,
) -> Result<(), CheckpointsError> {
    let file = checkpointer.path(epoch);
    match R::load(file.clone()).and_then(|record| {
        // Tensors are read only when they are needed. A file that ends too soon shows here.
        record
            .checkpoint_into_bytes()
            .map_err(CheckpointerError::Record)
    }) {
        Ok(_) => Ok(()),
        Err(error) => Err(CheckpointsError::File { file, epoch, error }),
    }
}

/// Saves records to `NAME-EPOCH.bpk`, like burn-train's
/// [`FileCheckpointer`](burn::train::checkpoint::FileCheckpointer), but under another name until
/// the file is whole and on the disk.
#[derive(Debug, Clone)]
pub struct AtomicFileCheckpointer {
    folder: PathBuf,
    name: String,
}

impl AtomicFileCheckpointer {
    /// A checkpointer for files of this name in a folder.
    pub fn new(folder: impl AsRef<Path>, name: &str) -> Self {
        Self {
            folder: folder.as_ref().to_path_buf(),
            name: name.to_string(),
        }
    }

    fn path(&self, epoch: usize) -> PathBuf {
        self.folder.join(format!("{}-{epoch}.bpk", self.name))
    }
}

impl<R: Checkpoint> Checkpointer<R> for AtomicFileCheckpointer {
    fn save(&self, epoch: usize, record: R) -> Result<(), CheckpointerError> {
        let partial = self
            .folder
            .join(format!("{}-{epoch}.partial.bpk", self.name));
        fs::create_dir_all(&self.folder).map_err(CheckpointerError::IOError)?;
        record.save(partial.clone())?;
        // Windows wants a file that can be written.
        File::options()
            .write(true)
            .open(&partial)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&partial, self.path(epoch)))
            .map_err(CheckpointerError::IOError)
    }

    fn delete(&self, epoch: usize) -> Result<(), CheckpointerError> {
        match fs::remove_file(self.path(epoch)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(CheckpointerError::IOError(error))
            }
            _ => Ok(()),
        }
    }

    fn restore(&self, epoch: usize) -> Result<R, CheckpointerError> {
        R::load(self.path(epoch))
    }
}
