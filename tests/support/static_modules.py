"""Modules that take static activations, as module:FILE:FACTORY takes them: what stands between layers of real networks."""

from __future__ import annotations

import functools
from collections.abc import Callable

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


class VisionBlock(nn.Module):
    """A block of a vision transformer, its attention written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first_norm(x)
        parts = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        seen = nn.functional.scaled_dot_product_attention(*parts)
        x = x + self.output(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second_norm(x))))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """A tiny one for digits of 8 x 8 pixels, in patches of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.positions = nn.Conv2d(1, 32, 2, 2), nn.Parameter(0.02 * torch.randn(1, 16, 32))
        self.blocks = nn.Sequential(*(VisionBlock(32, 4) for _ in range(2)))
        self.norm, self.classes = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels.unflatten(1, (1, 8, 8))).flatten(2).transpose(1, 2) + self.positions
        return self.classes(self.norm(self.blocks(x)).mean(1))  # type: ignore[no-any-return]


def trained(make: Callable[[], nn.Module], steps: int, rows: int = 1200) -> nn.Module:
    """Return a network that knows the first 1200 of scikit-learn's digits, of which each step sees so many `rows`."""
    pixels, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make()
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for step in range(steps):
            seen = slice(start := step * rows % 1200, start + rows)
            loss = nn.functional.cross_entropy(network(pixels[seen]), labels[seen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


@functools.cache
def trained_digits() -> nn.Module:
    """Return a network of 64-100-100-10 that knows digits."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))

    return trained(make, 150)


@functools.cache
def trained_transformer() -> nn.Module:
    """Return a vision transformer that knows digits."""
    return trained(VisionTransformer, 400, rows=100)


def digits() -> tuple[Tensor, Tensor]:
    """Return all digits: pixels [1797, 64] from 0 to 1, and labels [1797]."""
    found = load_digits()
    return torch.from_numpy((found.data / 16).astype(np.float32)), torch.from_numpy(found.target.astype(np.int64))


def classifier() -> tuple[nn.Module, Tensor]:
    """Return the network that was trained, and the digits that it was trained on."""
    return trained_digits(), digits()[0][:1200]


def transformer() -> tuple[nn.Module, Tensor]:
    """Return the vision transformer that was trained, and the digits that it was trained on."""
    return trained_transformer(), digits()[0][:1200]


class Outliers(nn.Module):
    """Two outputs of one state. `fine` reads it with a huge channel, at which it does not look, and which takes most codes."""

    factors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden = nn.Linear(16, 32), nn.Linear(32, 32)
        self.coarse, self.fine = nn.Linear(32, 8), nn.Linear(32, 8)
        self.register_buffer("factors", torch.tensor([30.0, *[1.0] * 31]))
        self.fine.weight.data[:, 0] = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.hidden(torch.relu(self.first(x)))
        return self.coarse(y), self.fine(y * self.factors)


def outliers() -> tuple[nn.Module, Tensor]:
    """Return a network with random weights, and rows for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Outliers().eval(), torch.randn(64, 16)
