//! Independent trainings on all cores.

use std::{
    fs,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

/// A progress bar that counts `steps` steps.
///
/// # Errors
///
/// Returns no error that a caller could cause.
pub fn progress_bar(steps: u64) -> Result<ProgressBar> {
    let style = "{wide_bar} {percent:>3} % of {len} steps, {elapsed} so far, {eta} left";
    let bar = ProgressBar::new(steps).with_style(ProgressStyle::with_template(style)?);
    bar.enable_steady_tick(Duration::from_secs(1));
    Ok(bar)
}

/// Calls `work` for every job, with as many jobs at a time as there are cores. Parallel work of
/// rayon, which Burn's CPU backends use, stays on the thread of its job.
///
/// # Errors
///
/// Returns the first error of a job. Jobs that have not started by then are not run.
pub fn for_each<J: Sync>(jobs: &[J], work: impl Fn(&J) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let worker = || {
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = work(job) {
                next.store(jobs.len(), Ordering::Relaxed);
                failed.lock().expect("no panic here").get_or_insert(error);
            }
        }
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let pools = (0..cores)
        .map(|_| rayon::ThreadPoolBuilder::new().num_threads(1).build())
        .collect::<Result<Vec<_>, _>>()?;
    thread::scope(|scope| {
        for pool in &pools {
            scope.spawn(|| pool.install(worker));
        }
    });
    match failed.into_inner().expect("no panic above") {
        None => Ok(()),
        Some(error) => Err(error),
    }
}

/// Writes a file atomically: an interruption leaves the old file or the new one.
///
/// # Errors
///
/// Returns an error if the file cannot be written.
pub fn write(path: &Path, content: &str) -> Result<()> {
    let partial = path.with_extension("partial");
    fs::write(&partial, content)
        .and_then(|()| fs::rename(&partial, path))
        .with_context(|| format!("{}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_is_done_once_on_one_core() {
        let done = Mutex::new(Vec::new());
        let jobs: Vec<usize> = (0..100).collect();
        for_each(&jobs, |&job| {
            assert_eq!(rayon::current_num_threads(), 1);
            done.lock().unwrap().push(job);
            Ok(())
        })
        .unwrap();
        let mut done = done.into_inner().unwrap();
        done.sort_unstable();
        assert_eq!(done, jobs);
    }

    #[test]
    fn the_first_error_stops_the_work() {
        let started = AtomicUsize::new(0);
        let error = for_each(&[(); 1000], |()| {
            started.fetch_add(1, Ordering::Relaxed);
            anyhow::bail!("broken")
        });
        assert_eq!(error.unwrap_err().to_string(), "broken");
        assert!(started.into_inner() < 1000);
    }
}
