#!/usr/bin/env python3
"""Runs Burn's own tests with the layers of burn-memaop in the places of Burn's.

The tests come from the sources of Burn's crates that cargo has fetched, and are written to the
target folder. The arguments are those of `cargo test` that choose packages and features.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

# The number of tests. Another one means that Burn has changed, and that this script misses tests.
TESTS = 110

# The tests that may fail, and why.
EXCUSED = {
    name: "compares the printed name and fields of the module"
    for name in [
        "linear::tests::display",
        "conv2d::tests::display",
        "mha::tests::display",
        "pwff::tests::display",
        "encoder::tests::display",
        "decoder::tests::display",
    ]
}

OPTIMIZERS = "use burn::optim::{*, decay::WeightDecayConfig, momentum::MomentumConfig}; use burn::tensor::{Device, Tensor};"

# An entry has a name, the crate and the file of the tests, what the module around them imports,
# what `crate` becomes, and the functions left out because they name private parts of Burn.
# Of burn-store's round trips, those of safetensors and burnpack are here. The others use private
# functions, or files that the published crate does not hold.
SOURCES = [
    (
        "linear", "burn-nn", "src/modules/linear.rs",
        "use crate::nn::*; use burn::{module::Param, tensor::{Device, Tensor}};", "crate::nn", [],
    ),
    (
        "conv2d", "burn-nn", "src/modules/conv/conv2d.rs",
        "use crate::nn::{*, conv::*}; use burn::tensor::{Device, Tensor};", "crate::nn", [],
    ),
    (
        "mha", "burn-nn", "src/modules/attention/mha.rs",
        "use crate::nn::{*, attention::*}; use burn::tensor::{Device, Tensor};", "crate::nn",
        ["attention_dropout_applies_after_softmax"],
    ),
    (
        "pwff", "burn-nn", "src/modules/transformer/pwff.rs",
        "use crate::nn::transformer::*; use burn::tensor::Tensor;", "crate::nn", [],
    ),
    (
        "encoder", "burn-nn", "src/modules/transformer/encoder.rs",
        "use crate::nn::transformer::*; use burn::tensor::Tensor;", "crate::nn", [],
    ),
    (
        "decoder", "burn-nn", "src/modules/transformer/decoder.rs",
        "use crate::nn::transformer::*; use burn::tensor::{Device, Tensor};", "crate::nn", [],
    ),
    (
        "cross_attention", "burn-nn", "src/modules/attention/cross_attention.rs",
        "use crate::nn::attention::*; use burn::tensor::{Bool, Device, Tensor};", "crate::nn", [],
    ),
    (
        "swiglu", "burn-nn", "src/activation/swiglu.rs",
        "use crate::nn::*; use burn::tensor::{Device, Tensor};", "crate::nn", [],
    ),
    ("gelu", "burn-nn", "src/activation/gelu.rs", "use crate::nn::*; use burn::tensor::Tensor;", "crate::nn", []),
    (
        "dropout", "burn-nn", "src/modules/dropout.rs",
        "use crate::nn::*; use burn::{module::Module, tensor::Tensor};", "crate::nn", [],
    ),
    (
        "layer_norm", "burn-nn", "src/modules/norm/layer.rs",
        "use crate::nn::*; use burn::tensor::Tensor;", "crate::nn", [],
    ),
    ("relu", "burn-nn", "src/activation/relu.rs", "use crate::nn::*;", "crate::nn", []),
    ("quantize", "burn-nn", "tests/quantize.rs", "", "crate", []),
    ("adam", "burn-optim", "src/optim/adam.rs", OPTIMIZERS, "crate::optimizers", []),
    ("adamw", "burn-optim", "src/optim/adamw.rs", OPTIMIZERS, "crate::optimizers", []),
    ("adagrad", "burn-optim", "src/optim/adagrad.rs", OPTIMIZERS, "crate::optimizers", []),
    ("rmsprop", "burn-optim", "src/optim/rmsprop.rs", OPTIMIZERS, "crate::optimizers", []),
    ("adan", "burn-optim", "src/optim/adan.rs", OPTIMIZERS, "crate::optimizers", []),
    ("accumulation", "burn-optim", "src/optim/grad_accum.rs", OPTIMIZERS, "crate::optimizers", []),
    (
        "lbfgs", "burn-optim", "src/optim/lbfgs.rs", OPTIMIZERS, "crate::optimizers",
        ["test_cubic_interpolate", "test_strong_wolfe_direct_comparison"],
    ),
    (
        "sgd", "burn-optim", "src/optim/sgd.rs", OPTIMIZERS, "crate::optimizers",
        [
            "with_updated_params_should_have_state", "without_updated_params_should_not_have_state",
            "can_attach_gradient_clipping", "should_load_state", "sgd_with_all",
        ],
    ),
    ("file_io", "burn-store", "src/safetensors/tests/file_io.rs", "", "burn::store", []),
    ("burnpack", "burn-store", "tests/burnpack_store.rs", "", "crate", []),
]

ROOT = """
mod nn { pub use burn_memaop::nn::*; }
mod optimizers {
    pub use burn::{grad_clipping, optim::*};
    pub mod optim {
        pub use burn::optim::*;
        pub mod test_utils { %s }
    }
}
/// A layer, as a literal of Burn's.
macro_rules! linear {
    ($($fields:tt)*) => {
        burn_memaop::MemAopLinear::from_linear(
            burn::nn::Linear { $($fields)* },
            burn_memaop::AopConfig::new(),
        )
    };
}
"""


def sources(cargo, arguments):
    """The folders of Burn's crates."""
    features = [a for a in arguments if a.startswith("--features=") or a == "--no-default-features"]
    if "--features" in arguments:
        features += ["--features", arguments[arguments.index("--features") + 1]]
    command = [cargo, "metadata", "--format-version", "1", *features]
    packages = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["packages"]
    return {p["name"]: pathlib.Path(p["manifest_path"]).parent for p in packages if p["name"].startswith("burn-")}


def block(text, start):
    """The text from `start` to the brace that closes the first one after it, and where that is."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : match.end()], match.end()
    raise SystemExit("unbalanced braces")


def without(text, names):
    """The text without some functions."""
    for name in names:
        found = re.search(r"(?:[ \t]*#\[[^\n]*\n)*[ \t]*fn %s\b" % name, text)
        if not found:
            raise SystemExit(f"Burn's tests have no function {name}: change {__file__}")
        _, end = block(text, found.start())
        text = text[: found.start()] + text[end:]
    return text


def ours(text, own):
    """The text with the layers of burn-memaop; `own` is what it calls `crate`."""
    text = re.sub(r"\bcrate::", own + "::", text)
    text = re.sub(r"^\s*use burn_core as burn;\n", "", text, flags=re.M)
    text = re.sub(r"\bburn_core::", "burn::", text)
    text = re.sub(r"\bburn_store::", "burn::store::", text)
    text = re.sub(r"\bburn_pack::", "burn::store::burn_pack::", text)
    text = re.sub(r"\bburn_nn::", "crate::nn::", text)
    text = re.sub(r"\balloc::", "std::", text)
    return re.sub(r"^(\s*(?:let \w+ = )?)Linear \{$", r"\1linear! {", text, flags=re.M)


def generated(folders):
    utils = (folders["burn-optim"] / "src/optim/mod.rs").read_text()
    utils, _ = block(utils, utils.index("mod test_utils"))
    utils = utils[utils.index("{") + 1 : -1].replace("pub(super)", "pub")
    parts = [ROOT % ours(utils, "crate::optimizers")]
    for name, crate, file, imports, own, private in SOURCES:
        text = (folders[crate] / file).read_text()
        if "mod tests {" in text:
            text, _ = block(text, text.index("mod tests {"))
        else:
            text = re.sub(r"^(//!|#!\[).*\n", "", text, flags=re.M)
        parts.append(f"mod {name} {{ {imports}\n{ours(without(text, private), own)}\n}}\n")
    return "\n".join(parts)


def main():
    cargo = os.environ.get("CARGO", "cargo")
    arguments = sys.argv[1:] or ["--workspace"]
    command = [cargo, "metadata", "--format-version", "1", "--no-deps"]
    target = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["target_directory"]
    file = pathlib.Path(target) / "burn_tests.rs"
    text = generated(sources(cargo, arguments))
    if not file.exists() or file.read_text() != text:
        file.write_text(text)

    environment = {**os.environ, "BURN_TESTS": str(file), "BURN_DEVICE": "flex"}
    command = [cargo, "test", *arguments, "--test", "burns", "--no-fail-fast", "--", "--format=pretty"]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    results = dict(re.findall(r"^test (\S+)(?: - should panic)? \.\.\. (ok|FAILED)$", run.stdout, flags=re.M))
    failed = {name for name, result in results.items() if result == "FAILED"}
    unexpected = sorted(failed - EXCUSED.keys())
    passing = sorted(EXCUSED.keys() - failed)
    if unexpected:
        print(run.stdout)
    for name in sorted(failed & EXCUSED.keys()):
        print(f"allowed to fail: {name} {EXCUSED[name]}")
    print(f"{len(results) - len(failed)} of {len(results)} of Burn's tests pass with the layers of burn-memaop")
    # libtest returns 101 if tests fail. Anything else is a process that did not end by itself.
    if run.returncode not in (0, 101) or "test result:" not in run.stdout:
        raise SystemExit(f"the tests did not run to their end: {run.returncode}")
    if len(results) != TESTS:
        raise SystemExit(f"{TESTS} tests must run, but {len(results)} did")
    if unexpected:
        raise SystemExit(f"failed: {', '.join(unexpected)}")
    if passing:
        raise SystemExit(f"these are allowed to fail, but pass: {', '.join(passing)}")


if __name__ == "__main__":
    main()
