"""Forward and backward of PyTorch's nn.Linear, eager, at the GPU sizes of the bench `layer`."""

import argparse
import json
import statistics

import torch

SIZES = [(4096, 1024, 1024), (16384, 1024, 4096), (8192, 4096, 4096)]
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def time_ms(work, repeats):
    """The median of `repeats` runs, each timed on the device, after two that are not."""
    times = []
    for repeat in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(m, n, p, dtype, repeats):
    layer = torch.nn.Linear(n, p, device="cuda", dtype=dtype)
    x = torch.randn(m, n, device="cuda", dtype=dtype, requires_grad=True)
    ones = torch.ones(m, p, device="cuda", dtype=dtype)

    def step():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(ones)

    with torch.no_grad():
        product_ms = time_ms(lambda: x.t() @ ones, repeats)
    return {"m": m, "n": n, "p": p, "dw_ms": product_ms, "step_ms": time_ms(step, repeats)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=TYPES, default="f32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tf32", action="store_true", help="products of f32 in TF32")
    parser.add_argument("--json", help="writes the rows to this file")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = options.tf32

    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {options.dtype}")
    rows = [measure(*size, TYPES[options.dtype], options.repeats) for size in SIZES]
    for row in rows:
        print("{m:>6} {n:>5} {p:>5}  dW {dw_ms:.3f} ms  forward and backward {step_ms:.3f} ms".format(**row))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
