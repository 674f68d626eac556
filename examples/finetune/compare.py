"""Trains by both programs in turns, measures a step of each, and prints a table.

Every run has a folder in --out. A run whose result is there is not repeated, so a call that was
stopped goes on.

    python3 examples/finetune/compare.py --model MODEL --data reviews.tsv --out finetune-runs
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess

# A name, its program, and its options. The first is what the others are compared with.
RUNS = {
    "burn": ("finetune-burn", []),
    "exact": ("finetune-memaop", ["--exact"]),
    "default": ("finetune-memaop", []),
    "int8": ("finetune-memaop", ["--exact", "--int8"]),
    "half of the rows": ("finetune-memaop", ["--k-ratio", "0.5"]),
    "exact, batch of 16": ("finetune-memaop", ["--exact", "--batch", "16"]),
    "LoRA, burn": ("finetune-burn", ["--lora", "8", "--lr", "1e-3"]),
    "LoRA, exact": ("finetune-memaop", ["--exact", "--lora", "8", "--lr", "1e-3"]),
}

# Quantiles 0.975 of Student's t by the number of seeds.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def program(name):
    """The path of a program, built if need be."""
    command = ["cargo", "build", "--release", "-p", "memaop-finetune", "--bin", name]
    output = subprocess.run(
        command + ["--message-format", "json"], check=True, stdout=subprocess.PIPE, text=True
    )
    messages = map(json.loads, output.stdout.splitlines())
    return [it["executable"] for it in messages if it.get("executable")][-1]


def output_of(command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def result(folder, command):
    """What a training wrote, or writes now."""
    path = folder / "result.json"
    if not path.exists():
        print(" ".join(command), flush=True)
        output_of(command + ["--out", str(folder)])
    return json.loads(path.read_text())


def interval(values):
    """Mean and 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--only-show", action="store_true", help="show the results that are there")
    options = parser.parse_args()
    programs = {name: program(name) for name in ["finetune-burn", "finetune-memaop"]}
    where = ["--model", options.model, "--data", options.data]
    results = {name: [] for name in options.runs}
    for seed in options.seeds:
        for name in options.runs:
            which, more = RUNS[name]
            folder = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            if options.only_show and not (folder / "result.json").exists():
                continue
            command = [programs[which], "train", *where, "--seed", str(seed), *more]
            results[name].append(result(folder, command))
    results = {name: runs for name, runs in results.items() if runs}
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    first = next(iter(results.values()))
    print("| | accuracy, % | loss | difference | seconds | | peak, MiB |")
    print("|---|---|---|---|---:|---:|---:|")
    for name, runs in results.items():
        accuracy, loss = ([run[key] for run in runs] for key in ["accuracy", "loss"])
        # Runs with one seed have the same sentences in the same order.
        difference = [run["accuracy"] - other["accuracy"] for run, other in zip(runs, first)]
        seconds = statistics.median(run["seconds"] for run in runs)
        ratios = [run["seconds"] / other["seconds"] for run, other in zip(runs, first)]
        peak = statistics.median(run["peak_mib"] for run in runs)
        print(
            f"| {name} | {interval(accuracy)} | {interval(loss)} | {interval(difference)} "
            f"| {seconds:.0f} | {statistics.median(ratios):.2f} | {peak:.0f} |"
        )


if __name__ == "__main__":
    main()
