"""The network that a quantizer is exported with; `module:qconvert.testing.network:network` to qconvert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qconvert.testing.samples import normal

WIDTH, HIDDEN, CLASSES, ROWS = 64, 96, 5, 48


class Network(nn.Module):
    """Two linears that share the output of a norm, and one behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.value = nn.Linear(WIDTH, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of x [rows, WIDTH], [rows, CLASSES]."""
        x = self.norm(x)
        logits: Tensor = self.head(torch.relu(self.gate(x)) + self.value(x))
        return logits


def network() -> tuple[nn.Module, Tensor]:
    """Return the network with fixed weights, and example inputs [48, 64] of which two columns are large."""
    with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global generator
        made = Network()
    with torch.no_grad():
        for seed, parameter in enumerate(made.parameters(), 60):
            parameter.copy_(normal(*parameter.shape, seed=seed) / 8)
        made.norm.weight.add_(1)
    inputs = normal(ROWS, WIDTH, seed=70)
    inputs[:, [3, 50]] *= 10
    return made, inputs
