"""Training: modules whose layers compute with codes while they are trained, and the file of what they have become."""

from torch.nn import Module

from qconvert.training.prepare import prepare
from qconvert.training.saved import save_trained

__all__ = ["Module", "prepare", "save_trained"]
