"""Digits in float, quantized after training, and trained with 4 bits: size and accuracy side by side.

    python examples/train_digits.py out/digits

Needs scikit-learn, for its 1797 digits of 8 x 8 pixels. The network has 64, 100, 100 and 10 units. It learns from 1200 digits,
and is judged by the other 597, which other people have written, in ONNX Runtime. What is trained with codes learns from the
network in float, which says more of a digit than its label does.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qconvert import Recipe, Report, convert, prepare_qat

LEARNED = 1200


def digits() -> tuple[Tensor, Tensor]:
    """Return pixels [1797, 64], 0 to 1, and labels [1797]."""
    found = load_digits()
    return torch.from_numpy((found.data / 16).astype(np.float32)), torch.from_numpy(found.target.astype(np.int64))


def train(network: nn.Module, targets: Tensor, steps: int) -> None:
    """Teach a network the first digits. targets: their labels [1200], or a probability for each [1200, 10]."""
    pixels, _ = digits()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(network(pixels[:LEARNED]), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


def float_network() -> tuple[nn.Module, Tensor]:
    """The factory that recipes name: the network, trained in float, and examples of its input."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    pixels, labels = digits()
    train(network, labels[:LEARNED], steps=150)
    return network, pixels[:LEARNED]


def accuracy(folder: Path) -> float:
    """The share of the other digits that an artifact knows."""
    pixels, labels = digits()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: pixels[LEARNED:].numpy()})
    return float((scores.argmax(1) == labels[LEARNED:].numpy()).mean())


def recipe(output: Path, scheme: str) -> Recipe:
    """Return the recipe of one artifact. Every layer has the scheme, the last one too."""
    return Recipe.from_settings(
        {
            "model": f"module:{Path(__file__).resolve()}:float_network",
            "output": output,
            "scheme": scheme,
            "calibration": {"samples": 256},
            "evaluation": {"samples": 64},
            "force": True,
        }
    )


def compare(output: Path, scheme: str) -> dict[str, tuple[float, int]]:
    """Return accuracy and bytes of weights: in float, quantized after training, and trained with the scheme."""
    network, _ = float_network()
    pixels, labels = digits()
    with torch.no_grad():
        right = float((network(pixels[LEARNED:]).argmax(1) == labels[LEARNED:]).float().mean())
        taught = network(pixels[:LEARNED]).softmax(1)

    after: Report = convert(recipe(output / "after", scheme))

    trained_recipe = recipe(output / "trained", scheme)
    trained = prepare_qat(copy.deepcopy(network), trained_recipe, learned_steps=True)
    train(trained, taught, steps=600)
    report: Report = convert(trained_recipe, module=trained)

    return {
        "float": (right, after.size.source_bytes),
        f"{scheme}, after training": (accuracy(output / "after"), after.size.weights_bytes),
        f"{scheme}, trained with it": (accuracy(output / "trained"), report.size.weights_bytes),
    }


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--scheme", default="int4-channel-a4-static")
    given = parser.parse_args()
    for name, (right, size) in compare(given.output, given.scheme).items():
        print(f"{name:45} {right:6.1%} {size / 1000:7.1f} kB")


if __name__ == "__main__":
    main()
