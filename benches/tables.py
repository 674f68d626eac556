"""Writes the tables of docs/benchmarks.md anew from the raw results in benches/results.

A table stands between the lines `<!-- begin NAME FILE -->` and `<!-- end NAME -->`.
"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"


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


def compare(results):
    """The rounds of compare.py: medians, ratios of medians, and the least and the largest ratio of a round."""
    cases = {}
    for entry in results["rounds"]:
        row = entry["ours"]
        share = row.get("k_ratio") or row["k"] / row["m"]
        cases.setdefault((entry["case"], share, method(row)), []).append(entry)

    head = ["", "K/M", "method", "Burn, ms", "this crate, ms", "PyTorch, ms", "to Burn", "to PyTorch", "dW ratio"]
    rows = []
    for (case, share, name), entries in cases.items():
        exact = [e["ours"].get("exact_step_ms") or e["ours"]["exact_ms"] for e in entries]
        aop = [e["ours"].get("aop_step_ms") or e["ours"]["aop_ms"] for e in entries]
        torch = [e["torch"]["step_ms"] for e in entries]
        products = [e["ours"]["dw_ratio"] for e in entries if "dw_ratio" in e["ours"]]

        def ratio(others):
            each = [mine / other for mine, other in zip(aop, others)]
            middle = statistics.median(aop) / statistics.median(others)
            return f"{middle:.2f} ({min(each):.2f} to {max(each):.2f})"

        times = [f"{statistics.median(times):.4g}" for times in (exact, aop, torch)]
        product = f"{statistics.median(products):.2f}" if products else ""
        rows.append([case, share if isinstance(share, str) else f"{share:.3g}", name, *times, ratio(exact), ratio(torch), product])
    return markdown(head, rows)


TABLES = {"layer": layer, "compare": compare}


def main():
    def table(match):
        results = json.loads((ROOT / "benches" / "results" / match["file"]).read_text())
        return f"{match['begin']}\n\n{TABLES[match['name']](results)}\n\n{match['end']}"

    pattern = r"(?P<begin><!-- begin (?P<name>\w+) (?P<file>\S+) -->).*?(?P<end><!-- end (?P=name) -->)"
    DOCUMENT.write_text(re.sub(pattern, table, DOCUMENT.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
