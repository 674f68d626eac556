"""PyTorch's exact training on CPUs at the sizes of the benches: one layer, a convolution, a perceptron, a transformer
encoder.

Needs PyTorch, in an environment of its own: python3 -m venv torch && torch/bin/pip install torch
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn


def time_ms(work, repeats):
    """The median of `repeats` runs after three that are not counted."""
    times = []
    for repeat in range(repeats + 3):
        start = time.perf_counter()
        work()
        if repeat >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def layer(options):
    """Forward and backward of nn.Linear, the gradient of the input included."""
    linear = nn.Linear(options.n, options.p)
    x = torch.randn(options.m, options.n, requires_grad=True)
    ones = torch.ones(options.m, options.p)

    def step():
        linear.zero_grad(set_to_none=True)
        x.grad = None
        linear(x).backward(ones)

    with torch.no_grad():
        product = time_ms(lambda: x.t() @ ones, options.repeats)
    return {"dw_ms": product, "step_ms": time_ms(step, options.repeats)}


def conv(options):
    """Forward and backward of nn.Conv2d, padded to the size of the images, the gradient of the input included."""
    convolution = nn.Conv2d(options.n, options.p, options.kernel, padding=options.kernel // 2)
    x = torch.randn(options.batch, options.n, options.size, options.size, requires_grad=True)
    ones = torch.ones(options.batch, options.p, options.size, options.size)

    def step():
        convolution.zero_grad(set_to_none=True)
        x.grad = None
        convolution(x).backward(ones)

    return {"step_ms": time_ms(step, options.repeats)}


def training(model, optimizer, loss, repeats):
    def step():
        optimizer.zero_grad(set_to_none=True)
        loss(model).backward()
        optimizer.step()

    return {"step_ms": time_ms(step, repeats)}


def perceptron(options):
    """A training step, forward to plain SGD, of width-...-width-10 with ReLU."""
    widths = [options.n] * (options.hidden + 1)
    layers = [part for pair in zip(widths, widths[1:]) for part in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(options.n, 10))
    x, labels = torch.randn(options.m, options.n), torch.randint(0, 10, (options.m,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return training(
        model, optimizer, lambda model: nn.functional.cross_entropy(model(x), labels), options.repeats
    )


class Classifier(nn.Module):
    def __init__(self, options):
        super().__init__()
        block = nn.TransformerEncoderLayer(
            options.n, options.heads, 4 * options.n, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(block, options.hidden, enable_nested_tensor=False)
        self.output = nn.Linear(options.n, 10)

    def forward(self, tokens):
        return self.output(self.encoder(tokens).mean(1))


def transformer(options):
    """A training step, forward to Adam, of a pre-norm encoder with GELU and no dropout, and a classifier."""
    model = Classifier(options)
    x, labels = torch.randn(options.batch, options.length, options.n), torch.randint(0, 10, (options.batch,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return training(
        model, optimizer, lambda model: nn.functional.cross_entropy(model(x), labels), options.repeats
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=["layer", "conv", "perceptron", "transformer"])
    parser.add_argument("--m", type=int, default=1024, help="rows")
    parser.add_argument("--n", type=int, default=1024, help="inputs, width, channels")
    parser.add_argument("--p", type=int, default=1024, help="outputs, channels")
    parser.add_argument("--hidden", type=int, default=2, help="hidden layers, blocks")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="height and width of images")
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = {"layer": layer, "conv": conv, "perceptron": perceptron, "transformer": transformer}
    case = cases[options.case]
    print(json.dumps({"torch": torch.__version__, "threads": options.threads, **case(options)}))


if __name__ == "__main__":
    main()
