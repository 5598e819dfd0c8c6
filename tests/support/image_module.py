"""A module for images, as module:FILE:FACTORY takes it."""

from __future__ import annotations

import torch
from torch import nn


class Images(nn.Module):
    """A convolution, an activation and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 16)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.conv(image)).flatten(1))  # type: ignore[no-any-return]


def images() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """What module: takes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Images().eval(), {"image": torch.randn(4, 3, 8, 8)}
