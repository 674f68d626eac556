"""PyTorch's side of examples/finetune: the same model, optimizer and schedule, batches of like shapes.

Its seconds have no checkpoints in them, which those of the example have.

Needs an environment of its own: python3 -m venv torch && torch/bin/pip install torch transformers

    torch/bin/python benches/torch_finetune.py step --model MODEL --data reviews.tsv --length 47
    torch/bin/python benches/torch_finetune.py train --model MODEL --data reviews.tsv
"""

import argparse
import json
import random
import statistics
import time

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

# The number of batches that are sorted by length together, as in the example.
BUCKET = 50


class Classifier(nn.Module):
    def __init__(self, path, dropout, classes):
        super().__init__()
        self.bert = AutoModel.from_pretrained(
            path,
            add_pooling_layer=False,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            attn_implementation="sdpa",
            dtype=torch.float32,
        )
        # Burn's encoder also drops values after the activation.
        for layer in self.bert.encoder.layer:
            layer.intermediate = nn.Sequential(layer.intermediate, nn.Dropout(dropout))
        self.head = nn.Linear(self.bert.config.hidden_size, classes)

    def forward(self, tokens, mask):
        encoded = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        return self.head((encoded * weights).sum(1) / weights.sum(1))


def read(options):
    """Sentences as tokens, with the numbers of their classes."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.data, encoding="utf-8") as file:
        pairs = [line.rstrip("\n").split("\t", 1) for line in file if line.strip()]
    names = sorted({name for name, _ in pairs})
    tokens = tokenizer([text for _, text in pairs], truncation=True, max_length=128)["input_ids"]
    return names, [(it, names.index(name)) for it, (name, _) in zip(tokens, pairs)]


def batch_of(sentences, length=None):
    length = length or max(len(tokens) for tokens, _ in sentences)
    tokens = torch.zeros(len(sentences), length, dtype=torch.long)
    mask = torch.zeros(len(sentences), length, dtype=torch.long)
    for row, (values, _) in enumerate(sentences):
        values = values[:length]
        tokens[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = 1
    return tokens, mask, torch.tensor([label for _, label in sentences])


def batches(sentences, size, shuffled):
    order = list(range(len(sentences)))
    if shuffled:
        random.shuffle(order)
    step = BUCKET * size
    for start in range(0, len(order), step):
        order[start : start + step] = sorted(
            order[start : start + step], key=lambda index: len(sentences[index][0])
        )
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    if shuffled:
        random.shuffle(parts)
    for part in parts:
        yield batch_of([sentences[index] for index in part])


def step(model, optimizer, sentences, options):
    """Medians of the parts of a step, in milliseconds."""
    chosen = sentences[: options.batch]
    tokens, mask, labels = batch_of(chosen, options.length)
    attended = mask[:, None, None, :].bool().expand(-1, -1, tokens.shape[1], -1)
    times = {}

    def note(name, start):
        times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
        return time.perf_counter()

    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(model(tokens, mask), labels)
        start = note("forward_ms", start)
        loss.backward()
        start = note("backward_ms", start)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        note("optimizer_ms", start)

        embedded = model.bert.embeddings(input_ids=tokens).detach().requires_grad_()
        start = time.perf_counter()
        encoded = model.bert.encoder(embedded, attention_mask=attended).last_hidden_state
        start = note("encoder_forward_ms", start)
        encoded.sum().backward()
        note("encoder_backward_ms", start)
        model.zero_grad(set_to_none=True)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {"tokens": list(tokens.shape), **medians}


def train(model, optimizer, sentences, options):
    """Accuracy in percent, loss, and the seconds of training and tests."""
    split = sentences[: options.train], sentences[options.train :]
    steps = options.epochs * -(-len(split[0]) // options.batch)
    warm_up = max(1, steps // 10)

    def factor(done):
        return min(1.0, max(1e-3, done / warm_up)) * max(1e-3, 1 - done / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    start = time.perf_counter()
    for _ in range(options.epochs):
        model.train()
        for tokens, mask, labels in batches(split[0], options.batch, True):
            nn.functional.cross_entropy(model(tokens, mask), labels).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        model.eval()
        right, loss = 0, 0.0
        with torch.no_grad():
            for tokens, mask, labels in batches(split[1], options.batch, False):
                output = model(tokens, mask)
                loss += nn.functional.cross_entropy(output, labels, reduction="sum").item()
                right += (output.argmax(1) == labels).sum().item()
        count = len(split[1])
        result = {"accuracy": 100 * right / count, "loss": loss / count}
    return {**result, "seconds": time.perf_counter() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", choices=["step", "train"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--train", type=int, default=7000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, help="tokens of a sentence in a step")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    names, sentences = read(options)
    random.shuffle(sentences)
    model = Classifier(options.model, options.dropout, len(names)).train()
    weights = model.parameters()
    optimizer = torch.optim.AdamW(weights, lr=options.lr, weight_decay=0.01, fused=True)
    result = (step if options.case == "step" else train)(model, optimizer, sentences, options)
    print(json.dumps({"torch": torch.__version__, "threads": options.threads, **result}))


if __name__ == "__main__":
    main()
