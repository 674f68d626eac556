"""What one layer costs on a GPU, by its bytes, operations and launches: predictions of the ratios that the bench `layer` measures.

    python3 benches/gpu_model.py                          # the table of docs/gpu.md
    python3 benches/gpu_model.py layer-f32.json H100 f32  # beside what was measured

The figures of a device are those of its data sheet, of which kernels reach a part.
"""

import json
import sys

# Operations and bytes a second that kernels reach (three quarters of the data sheet's operations, 85 % of its bandwidth),
# seconds for a launch in a queue that is never empty.
DEVICES = {
    "H100": {"f32": 0.75 * 67e12, "tf32": 0.7 * 494e12, "bf16": 0.7 * 989e12, "bytes": 0.85 * 3.35e12, "launch": 3e-6},
    "H200": {"f32": 0.75 * 67e12, "tf32": 0.7 * 494e12, "bf16": 0.7 * 989e12, "bytes": 0.85 * 4.8e12, "launch": 3e-6},
    # 96 units, 1.3 GHz, two channels of LPDDR4X; half precision at twice the rate. Launches through Vulkan.
    "laptop, integrated": {"f32": 0.5 * 2.1e12, "bf16": 0.5 * 4.2e12, "bytes": 0.8 * 68e9, "launch": 10e-6},
}
SIZES = [(4096, 1024, 1024), (16384, 1024, 4096), (8192, 4096, 4096)]
WIDTHS = {"f32": 4, "tf32": 4, "bf16": 2}


def product(device, kind, m, n, p):
    """Seconds of a product of matrices m x n and n x p."""
    moved = WIDTHS[kind] * (m * n + n * p + m * p) / device["bytes"]
    return max(2 * m * n * p / device[kind], moved) + device["launch"]


def selection_launches(m):
    """Systematic sampling: one cube up to 2048 rows, else the largest score, six searches, the places and the draw."""
    return 1 if m <= 2048 else 9


def gradient(device, kind, m, n, p, k):
    """Seconds of the weight gradient of k rows."""
    if k >= m:
        return product(device, kind, n, m, p)
    score = WIDTHS[kind] * m * (n + p) / device["bytes"] + device["launch"]
    gather = 2 * WIDTHS[kind] * k * (n + p) / device["bytes"] + device["launch"]
    select = selection_launches(m) * device["launch"]
    return score + select + gather + product(device, kind, n, k, p)


def step(device, kind, m, n, p, k):
    """Seconds of forward and backward, with the gradients of input and bias."""
    others = product(device, kind, m, n, p) + product(device, kind, m, p, n)
    bias = WIDTHS[kind] * m * p / device["bytes"] + device["launch"]
    return others + bias + gradient(device, kind, m, n, p, k)


def ratios(device, kind, m, n, p, k):
    exact, some = ((f(device, kind, m, n, p, m), f(device, kind, m, n, p, k)) for f in (gradient, step))
    return exact[1] / exact[0], some[1] / some[0]


def least(device, kind):
    """The least width of a square layer, in steps of 128, at 4096 rows from which K = M/8 takes less time than all rows."""
    for width in range(128, 8193, 128):
        if ratios(device, kind, 4096, width, width, 512)[0] < 1:
            return width
    return None


def predictions():
    names = [f"{letter}, {what}" for letter in "ABC" for what in ("ms", "dW", "step")]
    print("| GPU | type | " + " | ".join(names) + " | width |")
    print("|---|---|" + "---|" * (len(names) + 1))
    for name, device in DEVICES.items():
        for kind in (kind for kind in WIDTHS if kind in device):
            cells = []
            for m, n, p in SIZES:
                dw, all_of_it = ratios(device, kind, m, n, p, m // 8)
                exact = 1e3 * gradient(device, kind, m, n, p, m)
                cells += [f"{exact:.3g}", f"{dw:.2f}", f"{all_of_it:.2f}"]
            print(f"| {name} | {kind} | " + " | ".join(cells) + f" | {least(device, kind)} |")


def compare(file, name, kind):
    print("| M, N, P | K | dW, predicted | measured | step, predicted | measured |\n|---|---|---|---|---|---|")
    for row in json.load(open(file)):
        if row["policy"] != "systematic":
            continue
        m, n, p, k = (row[key] for key in "mnpk")
        dw, all_of_it = ratios(DEVICES[name], kind, m, n, p, m if row["exact_by_rule"] else k)
        measured = f"{row['dw_ratio']:.2f} | {all_of_it:.2f} | {row['step_ratio']:.2f}"
        print(f"| {m}, {n}, {p} | {k} | {dw:.2f} | {measured} |")


if __name__ == "__main__":
    compare(*sys.argv[1:]) if len(sys.argv) > 1 else predictions()
