"""Modules that take static activations, as module:FILE:FACTORY takes them: what stands between layers of real networks."""

from __future__ import annotations

import functools

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions and what goes around them."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        out = channels * stride
        self.first, self.first_norm = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.second, self.second_norm = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.around = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(torch.relu(self.first_norm(self.first(x)))))
        return torch.relu(y + self.around(x))


class ResidualNetwork(nn.Module):
    """Convolutions with batch norms before and behind activation functions, sums, pools, padding and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(3, 16, 7, 2, bias=False), nn.BatchNorm2d(16), nn.MaxPool2d(2)
        self.blocks = nn.Sequential(Residual(16), Residual(16, 2))
        self.depthwise, self.cut = nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.ReLU6()
        self.late_norm, self.pointwise = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 1)
        self.hidden, self.classes = nn.Linear(32, 40), nn.Linear(40, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(nn.functional.pad(image, (2, 3, 2, 3))))))
        x = self.late_norm(self.cut(self.depthwise(self.blocks(x))))
        x = torch.relu(self.pointwise(x)).mean((2, 3))
        return self.classes(torch.relu(self.hidden(x)))  # type: ignore[no-any-return]


def residual() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network with random weights and 48 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ResidualNetwork()
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2)
                part.weight.data.uniform_(-1, 1.5)
                part.bias.data.normal_(0, 0.2)
        return network.eval(), {"image": torch.randn(48, 3, 32, 32)}


@functools.cache
def trained_digits() -> nn.Module:
    """Return a network of 64-100-100-10 that knows the first 1200 of scikit-learn's digits."""
    pixels, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(150):
            loss = nn.functional.cross_entropy(network(pixels[:1200]), labels[:1200])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def digits() -> tuple[Tensor, Tensor]:
    """Return all digits: pixels [1797, 64] from 0 to 1, and labels [1797]."""
    found = load_digits()
    return torch.from_numpy((found.data / 16).astype(np.float32)), torch.from_numpy(found.target.astype(np.int64))


def classifier() -> tuple[nn.Module, Tensor]:
    """Return the network that was trained, and the digits that it was trained on."""
    return trained_digits(), digits()[0][:1200]
