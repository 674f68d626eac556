"""Writes the tables of docs/benchmarks.md, docs/choosing.md, docs/convolutions.md and docs/memory.md
anew from the raw results in benches/results.

A table stands between the lines `<!-- begin NAME FILE -->` and `<!-- end NAME -->`.
"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "docs" / name for name in ("benchmarks.md", "choosing.md", "convolutions.md", "memory.md")]
# The 97.5 % points of Student's t for 1, 2, ... degrees of freedom.
STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


def method(row):
    return row["policy"] if row["memory"] == "none" else f"{row['policy']}, {row['memory']}"


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def layer(rows):
    """The rows of the bench `layer`."""
    head = ["M, N, P", "K", "method", "exact dW", "aop dW", "limit dW", "dW ratio", "limit ratio"]
    head += ["exact", "aop", "step ratio"]

    def cells(row):
        exact = row["exact_by_rule"]
        times = [f"{row[name]:.3g}" for name in ("exact_dw_ms", "aop_dw_ms", "limit_dw_ms")]
        return [
            f"{row['m']}, {row['n']}, {row['p']}",
            row["k"],
            method(row) + (" *" if exact else ""),
            *times,
            f"{row['dw_ratio']:.2f}",
            "" if exact else f"{row['limit_ratio']:.2f}",
            f"{row['exact_step_ms']:.4g}",
            f"{row['aop_step_ms']:.4g}",
            f"{row['step_ratio']:.2f}",
        ]

    return markdown(head, [cells(row) for row in rows])


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
    some = f"K = {divisor(rows[0]['k_ratio'])}"
    head = ["images, channels, size", "kernel, stride, groups", "Burn, forward", "ours", "Burn, step", "K = M"]
    head += [some, "K = M to Burn", f"{some} to Burn"]

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


def cnn(courses, target=0.985):
    """The race of `cargo cnn`: the mean accuracy of the second half of the tests, all times to those of Burn's modules."""
    names = list(dict.fromkeys(course["name"] for course in courses))
    seeds = sorted({course["seed"] for course in courses})
    of = {(course["name"], course["seed"]): course for course in courses}

    def accuracy(course):
        half = course["accuracy"][len(course["accuracy"]) // 2 :]
        return 100 * statistics.mean(half)

    rows = []
    for name in names:
        pairs = [(of[name, seed], of[names[0], seed]) for seed in seeds]
        cells = [f"{statistics.mean(accuracy(mine) for mine, _ in pairs):.2f}"]
        finishes = [[finish(course, course["accuracy"], target)[0] for course in pair] for pair in pairs]
        seconds = statistics.mean(mine for mine, _ in finishes)
        if name == names[0]:
            cells += ["", "", f"{seconds:.0f}", ""]
        else:
            cells.append(interval([accuracy(mine) - accuracy(burn) for mine, burn in pairs], "+"))
            cells.append(interval([mine["seconds"][-1] / burn["seconds"][-1] for mine, burn in pairs]))
            cells += [f"{seconds:.0f}", interval([mine / burn for mine, burn in finishes])]
        rows.append([name, *cells])
    head = ["", "accuracy, %", "to Burn's, points", "time to Burn's", f"seconds to {100 * target} %", "to Burn's"]
    return markdown(head, rows)


def compare(results):
    """The rounds of compare.py: medians, ratios of medians, and the least and the largest ratio of a round."""
    cases = {}
    for entry in results["rounds"]:
        for share, name, burn, ours in sides(entry["ours"]):
            entries = cases.setdefault((entry["case"], share, name), [])
            entries.append((burn, ours, entry["torch"]["step_ms"], entry["ours"].get("dw_ratio")))

    head = ["", "K/M", "method", "Burn, ms", "this crate, ms", "PyTorch, ms", "to Burn", "to PyTorch", "dW ratio"]
    rows = []
    for (case, share, name), entries in cases.items():
        exact, aop, torch, products = zip(*entries)
        products = [product for product in products if product is not None]

        def ratio(others):
            each = [mine / other for mine, other in zip(aop, others)]
            middle = statistics.median(aop) / statistics.median(others)
            return f"{middle:.2f} ({min(each):.2f} to {max(each):.2f})"

        times = [f"{statistics.median(times):.4g}" for times in (exact, aop, torch)]
        product = f"{statistics.median(products):.2f}" if products else ""
        rows.append([case, share if isinstance(share, str) else f"{share:.3g}", name, *times, ratio(exact), ratio(torch), product])
    return markdown(head, rows)


def interval(values, sign=""):
    """The mean and half the width of its 95 % confidence interval."""
    width = STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):{sign}.2f} ± {width:.2f}".replace("-", "−")


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


def regime(row):
    return {"sgd": "SGD", "adam": "Adam"}[row["optimizer"]] + f", batch {row['batch']}, {row['epochs']} epochs"


def tuned(rows):
    """Of each method the learning rate with the highest mean accuracy, and the difference to exact training at its own."""

    def accuracies(row):
        return [100 * run["test_accuracy"][-1] for run in row["runs"]]

    best = {}
    for row in rows:
        key = (regime(row), name(row), divisor(row["k_ratio"]))
        if key not in best or statistics.mean(accuracies(best[key])) < statistics.mean(accuracies(row)):
            best[key] = row
    order = ["M", "auto", "M/4", "M/8", "M/16"]
    regimes = sorted({key[0] for key in best}, key=lambda text: (int(text.split()[2][:-1]), text.startswith("Adam")))
    tables = []
    for wanted in regimes:
        exact = accuracies(best[wanted, "exact", "M"])
        found = [(key, row) for key, row in best.items() if key[0] == wanted]
        cells = []
        for (_, method, k), row in sorted(found, key=lambda pair: (pair[0][1] == "topk, balanced 0.9", order.index(pair[0][2]))):
            ours = accuracies(row)
            differences = [a - b for a, b in zip(ours, exact)]
            cells.append([method, k, row["lr"], interval(ours), "" if k == "M" else interval(differences, "+")])
        head = ["method", "K", "learning rate", "accuracy, %", "minus exact"]
        tables.append(f"{wanted}\n\n{markdown(head, cells)}")
    return "\n\n".join(tables)


def finish(course, values, target):
    """Seconds and epochs until values that rise reach a target, on the line between two tests (five an epoch)."""
    before = (0.0, None)
    for turn, (seconds, value) in enumerate(zip(course["seconds"], values)):
        if value >= target:
            way = 1.0 if before[1] is None else (target - before[1]) / (value - before[1])
            return before[0] + way * (seconds - before[0]), (turn + way) / 5
        before = (seconds, value)
    raise ValueError(f"seed {course['seed']} does not reach {target}")


def race(courses, to_loss=False):
    """The times of `cargo ablation race`, each to exact training of the same seed and batch size."""

    def key(course):
        return (course["batch"], name(course), divisor(course["k_ratio"]))

    finishes = {}
    for course in courses:
        batch, seed = course["batch"], course["seed"]
        exact = next(c for c in courses if (c["batch"], c["seed"], c["k_ratio"]) == (batch, seed, 1))
        target = -exact["loss"][-1] if to_loss else 0.97
        values = [-loss for loss in course["loss"]] if to_loss else course["accuracy"]
        finishes.setdefault((key(course), course["lr"]), {})[seed] = finish(course, values, target)
    rows = []
    for ((batch, method, k), lr), found in finishes.items():
        exact = next(seeds for (other, _), seeds in finishes.items() if other == (batch, "exact", "M"))
        seconds, epochs = zip(*found.values())
        ratios = [found[seed][0] / exact[seed][0] for seed in found]
        rows.append([batch, lr, method, k, interval(seconds), interval(epochs), interval(ratios)])
    return markdown(["batch", "learning rate", "method", "K", "seconds", "epochs", "to exact"], rows)


def final_loss(courses):
    return race(courses, to_loss=True)


def memory(rows):
    """The rows of the bench `memory`, each to the first of its model."""
    first = {}
    cells = []
    # The kept runs also have inputs in half precision, which the crate no longer has.
    for row in (row for row in rows if row["side"] != "half"):
        key = (row["model"], row["checkpointing"])
        base = first.setdefault(key, row)

        def cell(name):
            return f"{row[name]:.1f} ({row[name] / base[name]:.2f})"

        again = ", gradient checkpointing" if row["checkpointing"] else ""
        cells.append([row["model"] + again, row["side"], cell("kept_mib"), cell("peak_mib"), cell("ms")])
    return markdown(["model", "layers", "kept, MiB", "peak, MiB", "step, ms"], cells)


def stored(outcomes):
    """Accuracies of `cargo ablation --stored-input`, each against the same with inputs as they are, seed by seed."""

    def last(outcome):
        return [100 * run["test_accuracy"][-1] for run in outcome["runs"]]

    regimes = {}
    for outcome in outcomes:
        key = (outcome["optimizer"], outcome["lr"], outcome["batch"])
        regimes.setdefault(key, []).append(outcome)
    cells = []
    for (optimizer, lr, batch), found in regimes.items():
        exact = next(outcome for outcome in found if outcome["k_ratio"] == 1)
        for k_ratio in dict.fromkeys(o["k_ratio"] for o in found if o["k_ratio"] != 1):
            of = {o["stored_input"]: last(o) for o in found if o["k_ratio"] == k_ratio}

            def difference(name):
                return interval([a - b for a, b in zip(of[name], of["full"])], "+")

            name = f"{'SGD' if optimizer == 'sgd' else 'Adam'} {lr}, batch {batch}"
            means = [f"{statistics.mean(values):.2f}" for values in (last(exact), of["full"])]
            cells.append([name, divisor(k_ratio), *means, difference("int8"), difference("int4")])
    return markdown(["", "K", "exact, %", "full, %", "int8 − full", "int4 − full"], cells)


def parts(rows):
    """The rows of the bench `memory` with --parts."""
    rows = [row for row in rows if row["part"] != "MemAopLinear, half"]
    cells = [[row["part"], f"{row['bytes_a_row']:.0f}"] for row in rows]
    return markdown(["module", "bytes a row"], cells)


TABLES = {"layer": layer, "cnn": cnn, "conv": conv, "compare": compare, "tuned": tuned, "race": race, "final_loss": final_loss, "memory": memory, "parts": parts, "stored": stored}


def main():
    def table(match):
        results = json.loads((ROOT / "benches" / "results" / match["file"]).read_text())
        return f"{match['begin']}\n\n{TABLES[match['name']](results)}\n\n{match['end']}"

    pattern = r"(?P<begin><!-- begin (?P<name>\w+) (?P<file>\S+) -->).*?(?P<end><!-- end (?P=name) -->)"
    for document in DOCUMENTS:
        document.write_text(re.sub(pattern, table, document.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
