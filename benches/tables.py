"""Writes the tables of five documents anew from the raw results in benches/results.

A table stands between the lines `<!-- begin NAME FILE -->` and `<!-- end NAME -->`.
"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = ("activation-memory", "benchmarks", "convolutions", "fine-tuning", "results")
DOCUMENTS = [ROOT / "docs" / f"{name}.md" for name in NAMES]
# The 97.5 % points of Student's t for 1, 2, ... degrees of freedom.
STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


# How the rows of a table call the cases of compare.py; the documents say the rest.
SHORT = [
    (r"^layer ", ""),
    (r"^perceptron [^d]*M = 1024", "perceptron"),
    (r"^transformer.*", "transformer"),
    (r"^convolution 3 x 3, ", ""),
]


def method(row):
    return row["policy"] if row["memory"] == "none" else f"{row['policy']}, {row['memory']}"


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def layer(rows):
    """The rows of the bench `layer`, a line for each size and K: the times of the exact side, and after each the ratios of the methods."""
    methods = {"systematic": "systematic", "topk": "topk", "topk, balanced": "balanced"}
    of = {(row["m"], row["n"], row["p"], row["k"], method(row)): row for row in rows if not row["exact_by_rule"]}
    cells = []
    for m, n, p, k in dict.fromkeys(key[:4] for key in of):
        found = [of[m, n, p, k, name] for name in methods]
        line = [f"{m}, {n}, {p}", divisor(k / m)]
        for time, digits, ratio in [("exact_dw_ms", 3, "dw_ratio"), ("exact_step_ms", 4, "step_ratio")]:
            line += [f"{found[0][time]:.{digits}g}", *(f"{row[ratio]:.2f}" for row in found)]
        cells.append(line)
    return markdown(["M, N, P", "K", "dW, ms", *methods.values(), "step, ms", *methods.values()], cells)


def sides(row):
    """K/M, the method, and the times of Burn and of this crate, of a row of a bench."""
    if "burn_step_ms" in row:
        burn = row["burn_step_ms"]
        return [(1, "", burn, row["exact_step_ms"]), (row["k_ratio"], "systematic", burn, row["aop_step_ms"])]
    burn = row.get("exact_step_ms") or row["exact_ms"]
    ours = row.get("aop_step_ms") or row["aop_ms"]
    return [(row.get("k_ratio") or row["k"] / row["m"], method(row), burn, ours)]


def conv(rows):
    """The rows of the bench `conv`."""
    some = divisor(rows[0]["k_ratio"])
    head = ["input", "kernel", "forward, Burn", "forward", "step, Burn", "K = M", some, "ratio, M", f"ratio, {some}"]

    def cells(row):
        times = ["burn_forward_ms", "forward_ms", "burn_step_ms", "exact_step_ms", "aop_step_ms"]
        ratios = [row[name] / row["burn_step_ms"] for name in times[3:]]
        return [
            f"{row['images']}, {row['inputs']}-{row['outputs']}, {row['size']}",
            f"{row['kernel']}, {row['stride']}, {row['groups']}" + (" *" if row["exact_by_rule"] else ""),
            *(f"{row[name]:.3g}" for name in times),
            *(f"{ratio:.2f}" for ratio in ratios),
        ]

    return markdown(head, [cells(row) for row in rows])


def compare(results):
    """The rounds of compare.py: medians, ratios of medians, and the least and the largest ratio of a round."""
    cases = {}
    for entry in results["rounds"]:
        for share, name, burn, ours in sides(entry["ours"]):
            entries = cases.setdefault((entry["case"], share, name), [])
            entries.append((burn, ours, entry["torch"]["step_ms"], entry["ours"].get("dw_ratio")))

    head = ["", "Burn, ms", "ours, ms", "PyTorch, ms", "to Burn", "to PyTorch"]
    # Where a case has rows of several K, or a method that is not the default, its name says so.
    several = {case for case, *_ in cases if len({share for other, share, _ in cases if other == case}) > 1}
    with_products = all(entries[0][3] is not None for (case, *_), entries in cases.items() if case.startswith("layer"))
    with_products = with_products and any(case.startswith("layer") for case, *_ in cases)
    rows = []
    for (case, share, name), entries in cases.items():
        exact, aop, torch, products = zip(*entries)
        products = [product for product in products if product is not None]

        def ratio(others):
            each = [mine / other for mine, other in zip(aop, others)]
            middle = statistics.median(aop) / statistics.median(others)
            return f"{middle:.2f} ({min(each):.2f}-{max(each):.2f})"

        times = [f"{statistics.median(times):.4g}" for times in (exact, aop, torch)]
        product = f"{statistics.median(products):.2f}" if products else ""
        for pattern, short in SHORT:
            label = re.sub(pattern, short, case)
            if label != case:
                break
        if case in several:
            label += f", {'K = M' if share == 1 else divisor(share)}"
        if ", " in name:
            label += f", {name.split(', ')[1]}"
        row = [label, *times, ratio(exact), ratio(torch)]
        rows.append([*row, product] if with_products else row)
    return markdown([*head, "dW"] if with_products else head, rows)


def interval(values, sign="", digits=2):
    """The mean and half the width of its 95 % confidence interval."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}".replace("-", "−")
    if len(values) < 2:
        return mean
    width = STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {width:.{digits}f}"


def divisor(k_ratio):
    if k_ratio == "auto":
        return "auto"
    return "M" if k_ratio == 1 else f"M/{round(1 / k_ratio, 2):g}"


def name(row):
    if row["k_ratio"] == 1:
        return "exact"
    method = row["policy"] if row["memory"] == "none" else f"{row['policy']}, {row['memory']} {row['decay']:g}"
    rows = row.get("dx_ratio")
    return method if rows is None else f"{method}, dX {rows}"


REGIMES = {
    "SGD, 128": ("sgd", 128),
    "Adam, 128": ("adam", 128),
    "SGD, 512": ("sgd", 512),
    "Adam, 512": ("adam", 512),
}


def tuned(rows):
    """Of each method the learning rate with the highest mean accuracy, and the difference to exact training at its own."""

    def accuracies(row):
        return [100 * run["test_accuracy"][-1] for run in row["runs"]]

    best = {}
    for row in rows:
        key = (row["optimizer"], row["batch"], name(row), divisor(row["k_ratio"]))
        if key not in best or statistics.mean(accuracies(best[key])) < statistics.mean(accuracies(row)):
            best[key] = row
    lines = []
    for label, regime in REGIMES.items():
        exact = accuracies(best[*regime, "exact", "M"])
        cells = [interval(exact)]
        for k in ("auto", "M/4", "M/8", "M/16"):
            ours = accuracies(best[*regime, "systematic", k])
            cells.append(interval([a - b for a, b in zip(ours, exact)], "+"))
        lines.append([label, *cells])
    return markdown(["", "exact, %", "auto", "M/4", "M/8", "M/16"], lines)


def finish(course, target):
    """The seconds until the accuracy first reaches the target, on the line between two tests."""
    before = (0.0, 0.0)
    for seconds, value in zip(course["seconds"], course["accuracy"]):
        if value >= target:
            way = (target - before[1]) / (value - before[1])
            return before[0] + way * (seconds - before[0])
        before = (seconds, value)
    return None


def race(courses):
    """Times to 97 % to those of exact training with its best batch, accuracies, and the prediction f (1 + R)."""
    lines = {}
    for optimizer in ("sgd", "adam"):
        found = {}
        for course in courses:
            if course["optimizer"] == optimizer:
                key = (course["batch"], divisor(course["k_ratio"]) + (", dX auto" if course["dx_ratio"] else ""))
                found.setdefault(key, []).append(course)
        times = {key: [finish(course, 0.97) for course in of] for key, of in found.items()}
        whole = [key for key in times if key[1] == "M" and None not in times[key]]
        exact = min(whole, key=lambda key: statistics.mean(times[key]))

        def step(key):
            return statistics.mean(course["seconds"][-1] / course["steps"] for course in found[key])

        for key, of in found.items():
            accuracy = interval([100 * course["accuracy"][-1] for course in of])
            if None in times[key]:
                ratios = f"{sum(time is not None for time in times[key])} of {len(of)} reach it"
            else:
                ratios = interval([time / best for time, best in zip(times[key], times[exact])])
            added = [value for course in of for value in course["added"] if value is not None]
            predicted = step(key) / step((key[0], "M")) * (1 + statistics.mean(added))
            cells = [ratios, "" if key[1] == "M" else f"{predicted:.2f}", accuracy]
            lines.setdefault(key, [f"{key[0]}, {key[1]}"]).extend(cells)
    head = ["batch, K", "SGD: time", "f (1 + R)", "accuracy, %", "Adam: time", "f (1 + R)", "accuracy, %"]
    return markdown(head, lines.values())


def memory(rows):
    """The rows of the bench `memory`: a row for each model and figure, a column for each side."""
    head = ["", "Burn's", "full", "inputs", "int8", "int4", "Burn's, gc", "full, gc"]

    def column(row):
        side = row["side"]
        if side in ("Linear", "Burn's encoder"):
            side = "Burn's"
        elif side.startswith("int8, Burn's"):
            side = "inputs"
        return side + (", gc" if row["checkpointing"] else "")

    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of = {column(row): row for row in rows if row["model"] == model}
        for title, name in (("kept MiB", "kept_mib"), ("peak MiB", "peak_mib"), ("step ms", "ms")):
            cells = [f"{of[side][name]:.1f}" if side in of else "" for side in head[1:]]
            lines.append([f"{model}, {title}", *cells])
    return markdown(head, lines)


def stored(outcomes):
    """Accuracies of `cargo ablation --stored-input`: exact training, and for each K inputs in full and the differences."""

    def last(outcome):
        return [100 * run["test_accuracy"][-1] for run in outcome["runs"]]

    regimes = {}
    for outcome in outcomes:
        regimes.setdefault((outcome["optimizer"], outcome["lr"], outcome["batch"]), []).append(outcome)
    head, lines = ["", "exact"], []
    for (optimizer, _, batch), found in regimes.items():
        exact = next(outcome for outcome in found if outcome["k_ratio"] == 1)
        cells = [f"{statistics.mean(last(exact)):.2f}"]
        for k_ratio in dict.fromkeys(o["k_ratio"] for o in found if o["k_ratio"] != 1):
            of = {o["stored_input"]: last(o) for o in found if o["k_ratio"] == k_ratio}
            cells.append(f"{statistics.mean(of['full']):.2f}")
            for name in ("int8", "int4"):
                cells.append(interval([a - b for a, b in zip(of[name], of["full"])], "+"))
            if not lines:
                head += [divisor(k_ratio), "int8", "int4"]
        lines.append([f"{'SGD' if optimizer == 'sgd' else 'Adam'}, {batch}", *cells])
    return markdown(head, lines)


def trainings(kept):
    """Trainings of examples/finetune/compare.py. Differences are of runs with one seed, which have the same batches."""
    results = kept["trainings"]
    lines = []
    for name, runs in results.items():
        pairs = [(run, results["burn"][seed]) for seed, run in runs.items() if seed in results["burn"]]
        accuracy, loss = (
            [
                interval([run[key] for run, _ in pairs], digits=digits),
                interval([run[key] - burn[key] for run, burn in pairs], "+", digits),
            ]
            for key, digits in (("accuracy", 2), ("loss", 3))
        )
        seconds = statistics.median(run["seconds"] for run, _ in pairs)
        ratio = statistics.median(run["seconds"] / burn["seconds"] for run, burn in pairs)
        lines.append([name, len(pairs), *accuracy, *loss, f"{seconds:.0f}", f"{ratio:.2f}"])
    head = ["", "seeds", "accuracy, %", "to burn", "test loss", "to burn", "seconds", "to burn"]
    return markdown(head, lines)


def steps(kept):
    """Steps of examples/finetune/compare.py: medians over the rounds, and their ratios to those of burn."""
    sums = {
        "forward, ms": ["forward_ms"],
        "backward, ms": ["backward_ms"],
        "optimizer, ms": ["optimizer_ms"],
        "step, ms": ["forward_ms", "backward_ms", "optimizer_ms"],
        "encoder, ms": ["encoder_forward_ms", "encoder_backward_ms"],
        "kept, MiB": ["kept_mib"],
        "peak, MiB": ["peak_mib"],
    }
    of = {
        name: [statistics.median(sum(step[key] for key in keys) for step in rounds) for keys in sums.values()]
        for name, rounds in kept["steps"].items()
    }
    lines = []
    for name, values in of.items():
        ratios = [f"{value:.0f} ({value / burn:.2f})" for value, burn in zip(values, of["burn"])]
        lines.append([name, *(ratios if name != "burn" else [f"{value:.0f}" for value in values])])
    sentences, tokens = kept["steps"]["burn"][0]["tokens"]
    return markdown([f"{sentences} x {tokens} tokens", *sums], lines)


TABLES = {
    "layer": layer,
    "conv": conv,
    "compare": compare,
    "tuned": tuned,
    "race": race,
    "memory": memory,
    "stored": stored,
    "trainings": trainings,
    "steps": steps,
}


def main():
    def table(match):
        files = re.fullmatch(r"(.*?)(?:\{(.*)\}(.*))?", match["file"])
        parts = [files[1]] if files[2] is None else [files[1] + part + files[3] for part in files[2].split(",")]
        results = [json.loads((ROOT / "benches" / "results" / part).read_text()) for part in parts]
        return f"{match['begin']}\n\n{TABLES[match['name']](*results)}\n\n{match['end']}"

    pattern = r"(?P<begin><!-- begin (?P<name>\w+) (?P<file>\S+) -->).*?(?P<end><!-- end (?P=name) -->)"
    for document in DOCUMENTS:
        document.write_text(re.sub(pattern, table, document.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
