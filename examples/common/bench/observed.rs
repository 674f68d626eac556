//! The kernels that work launches on a GPU, and the read-backs of their results.

use std::fmt::{self, Display};

use anyhow::Result;
use burn::tensor::Device;
use serde::Serialize;

/// What was counted while some work ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Observed {
    /// Kernels launched.
    pub kernels: usize,
    /// Read-backs by burn-memaop, for each of which the host waits.
    pub reads: usize,
}

impl Display for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} and {}", self.kernels, self.reads)
    }
}

/// Runs the work and counts. Returns none if no CubeCL backend is built in or in use.
///
/// # Errors
///
/// Returns an error if the device fails.
#[cfg(feature = "cubecl-backend")]
pub fn observe(device: &Device, work: impl FnOnce()) -> Result<Option<Observed>> {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use burn_cubecl::cubecl::logging::{LaunchObservation, LaunchObserver};

    #[derive(Default)]
    struct Kernels(AtomicUsize);

    impl LaunchObserver for Kernels {
        fn launched(&self, _kernel: &'static str) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    struct Reads(AtomicUsize);

    impl log::Log for Reads {
        fn enabled(&self, metadata: &log::Metadata) -> bool {
            metadata.target() == "burn_memaop::read"
        }

        fn log(&self, record: &log::Record) {
            if self.enabled(record.metadata()) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }

        fn flush(&self) {}
    }

    static READS: Reads = Reads(AtomicUsize::new(0));

    // From the second call on, the logger is set already.
    let _ = log::set_logger(&READS);
    device.sync()?;
    log::set_max_level(log::LevelFilter::Debug);
    let before = READS.0.load(Ordering::Relaxed);
    let kernels = Arc::new(Kernels::default());
    let observation = LaunchObservation::new(kernels.clone());
    work();
    device.sync()?;
    drop(observation);
    log::set_max_level(log::LevelFilter::Off);

    let kernels = kernels.0.load(Ordering::Relaxed);
    let reads = READS.0.load(Ordering::Relaxed) - before;
    Ok((kernels > 0).then_some(Observed { kernels, reads }))
}

/// Runs the work and counts. Returns none if no CubeCL backend is built in or in use.
///
/// # Errors
///
/// Returns an error if the device fails.
#[cfg(not(feature = "cubecl-backend"))]
pub fn observe(_device: &Device, _work: impl FnOnce()) -> Result<Option<Observed>> {
    Ok(None)
}
