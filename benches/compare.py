"""The benches beside PyTorch's exact training on the same cores, in turns, as one table.

    python3 -m venv torch && torch/bin/pip install torch
    python3 benches/compare.py --python torch/bin/python

Builds the benches, runs each case and its counterpart of torch_cpu.py alternately, and prints the medians over the
rounds. --json FILE keeps every round; tables.py makes the table of docs/benchmarks.md from it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import tables

HERE = Path(__file__).parent

# The bench, its options, those of torch_cpu.py.
SYSTEMATIC = ["--policy", "systematic"]
BALANCED = ["--policy", "topk", "--memory", "balanced"]


def layer(m, n, p, method):
    sizes = ["--m", m, "--n", n, "--p", p]
    return f"layer {m}, {n}, {p}", "layer", [*sizes, "--k", m // 8, *method], ["layer", *sizes]


def conv(images, inputs, outputs, size):
    sizes = ["--size", size, "--kernel", 3]
    options = ["--images", images, "--channels", f"{inputs},{outputs}", *sizes]
    torch = ["conv", "--batch", images, "--n", inputs, "--p", outputs, *sizes]
    return f"convolution 3 x 3, {images} x {inputs}-{outputs}, {size} x {size}", "conv", options, torch


def perceptron(dx):
    options = ["--width", 1024, "--m", 1024, "--k-ratio", 0.125, *SYSTEMATIC]
    name = "perceptron 1024-1024-1024-10, M = 1024"
    options += ["--dx-ratio", 0.25] if dx else []
    return name + (", dX M/4" if dx else ""), "step", options, ["perceptron"]


def transformer(width, heads, batch, length, ratio):
    sizes = ["--heads", heads, "--batch", batch, "--length", length]
    return (
        f"transformer, width {width}, {batch} x {length} tokens",
        "transformer",
        ["--width", width, *sizes, "--k-ratio", ratio, *SYSTEMATIC],
        ["transformer", "--n", width, *sizes],
    )


CASES = [
    layer(4096, 1024, 1024, SYSTEMATIC),
    layer(1024, 1024, 1024, SYSTEMATIC),
    layer(512, 784, 512, SYSTEMATIC),
    layer(512, 784, 512, BALANCED),
    layer(128, 128, 128, BALANCED),
    perceptron(False),
    perceptron(True),
    conv(64, 32, 64, 28),
    conv(64, 64, 64, 32),
    conv(32, 128, 128, 16),
    transformer(512, 8, 16, 64, 1),
    transformer(512, 8, 16, 64, 0.125),
]


def run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def built(features):
    """The binaries of the benches, by their names."""
    command = ["cargo", "bench", "--no-run", "--message-format", "json", *features]
    artifacts = (json.loads(line) for line in run(command).splitlines())
    return {a["target"]["name"]: a["executable"] for a in artifacts if a.get("executable")}


def ours(binary, options):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        run([binary, "--bench", *options, "--json", file])
        return json.loads(file.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-avx512", action="store_true", help="products of Flex in 256 bits")
    parser.add_argument("--json", help="keeps every round in this file")
    options = parser.parse_args()
    features = ["--no-default-features", "--features", "flex"] if options.no_avx512 else []
    binaries = built(features)

    rounds = []
    for number in range(options.rounds):
        for name, bench, arguments, torch in (case for case in CASES if case[0].startswith(options.only)):
            theirs = json.loads(run([options.python, HERE / "torch_cpu.py", *torch]))
            for row in ours(binaries[bench], arguments):
                rounds.append({"round": number, "case": name, "ours": row, "torch": theirs})
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine["avx512"] = not options.no_avx512
    machine["environment"] = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "rounds": rounds}, indent=1))

    print(tables.compare({"rounds": rounds}))


if __name__ == "__main__":
    main()
