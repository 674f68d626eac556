"""Trains by both programs in turns, measures steps of both in turns, and prints two tables.

Every training has a folder in --out. One whose result is there is not repeated, so a call that was
stopped goes on.

    python3 examples/finetune/compare.py --model MODEL --data reviews.tsv --out finetune-runs
"""

import argparse
import json
import pathlib
import subprocess
import sys

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benches"))
import tables

# A name, its program, and its options. The others are compared with the first.
RUNS = {
    "burn": ("finetune-burn", []),
    "exact": ("finetune-memaop", ["--exact"]),
    "default": ("finetune-memaop", []),
    "int8": ("finetune-memaop", ["--exact", "--int8"]),
    "half-of-rows": ("finetune-memaop", ["--k-ratio", "0.5"]),
    "exact-batch-16": ("finetune-memaop", ["--exact", "--batch", "16"]),
    "lora-burn": ("finetune-burn", ["--lora", "8"]),
    "lora-exact": ("finetune-memaop", ["--exact", "--lora", "8"]),
}
# The rate of adapters is higher.
LORA_RATE = ["--lr", "1e-3"]

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


def trained(folder, command):
    """What a training wrote, or writes now."""
    path, note = folder / "result.json", folder / "command.txt"
    words = " ".join(command[1:])
    if path.exists():
        if note.read_text() != words:
            sys.exit(f"{folder} is of another command: {note.read_text()}")
        return json.loads(path.read_text())
    print(words, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(words)
    output_of(command + ["--out", str(folder)])
    return json.loads(path.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--rounds", type=int, default=3, help="of steps; 0 for none")
    parser.add_argument("--pad", help="length of the sentences of steps")
    options = parser.parse_args()
    most = len(tables.STUDENT) + 1
    if len(options.seeds) > most:
        parser.error(f"--seeds must be at most {most}, but got {len(options.seeds)}")
    if "burn" not in options.runs:
        parser.error("--runs must contain burn, with which the others are compared")
    programs = {name: program(name) for name in ["finetune-burn", "finetune-memaop"]}
    where = ["--model", options.model, "--data", options.data]
    results = {name: {} for name in options.runs}
    for seed in options.seeds:
        for name in options.runs:
            which, more = RUNS[name]
            rate = LORA_RATE if "--lora" in more else []
            command = [programs[which], "train", *where, "--seed", str(seed), *more, *rate]
            results[name][str(seed)] = trained(options.out / f"{name}-{seed}", command)
    pad = ["--pad", options.pad] if options.pad else []
    steps = {name: [] for name in options.runs if "--batch" not in RUNS[name][1]}
    for _ in range(options.rounds):
        for name, rounds in steps.items():
            which, more = RUNS[name]
            output = output_of([programs[which], "step", *where, *more, *pad])
            rounds.append(json.loads(output.splitlines()[-1]))
    losses = [f"{kind}_losses" for kind in ["train", "test"]]
    for runs in results.values():
        for run in runs.values():
            for key in losses:
                run.pop(key, None)
    kept = {"trainings": results, "steps": steps}
    (options.out / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
    if options.seeds:
        print(tables.trainings(kept))
    if options.rounds:
        print(tables.steps(kept))


if __name__ == "__main__":
    main()
