//! The kernels that CubeCL compiles in another process.

use std::{
    collections::BTreeSet,
    env, fs,
    process::{Command, Output},
};

/// The output of another process, and what it compiled.
pub struct Compiled {
    pub output: Output,
    /// The names and sources of the kernels of the crate.
    pub kernels: BTreeSet<(String, String)>,
    /// The PTX that `driver.c` was given.
    pub ptx: String,
}

/// Runs an ignored test of this executable in a process of its own.
pub fn compiled_by(test: &str) -> Compiled {
    let folder = tempfile::tempdir().unwrap();
    let [log, ptx] = ["kernels.txt", "kernels.ptx"].map(|name| folder.path().join(name));
    let logger = "[compilation]\nlogger = { level = \"full\", file = \"kernels.txt\" }\n";
    fs::write(folder.path().join("cubecl.toml"), logger).unwrap();
    let output = Command::new(env::current_exe().unwrap())
        .args([test, "--ignored", "--exact", "--nocapture"])
        .env("PTX", &ptx)
        .current_dir(&folder)
        .output()
        .unwrap();
    let [log, ptx] = [log, ptx].map(|path| fs::read_to_string(path).unwrap_or_default());
    Compiled {
        output,
        kernels: sources(&log),
        ptx,
    }
}

/// The names and sources of the kernels of the crate in a log of CubeCL.
fn sources(log: &str) -> BTreeSet<(String, String)> {
    let blocks = log.split("[START_KERNEL_COMPILATION]").skip(1);
    blocks
        .filter_map(|block| {
            let name = block.split_once("name: burn_memaop::rows::cube::")?.1;
            let name = name.split(|c: char| c.is_whitespace() || c == '<').next()?;
            // The last part of the path is the type of the kernel.
            let name = name.rsplit_once("::").map_or(name, |(name, _)| name);
            // The first line names the language.
            let (_, source) = block.split_once("```")?.1.split_once('\n')?;
            let (source, _) = source.split_once("```")?;
            Some((name.to_string(), source.to_string()))
        })
        .collect()
}
