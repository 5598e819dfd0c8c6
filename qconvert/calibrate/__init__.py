"""The calibrate stage: draws samples, and hands over the model block by block with statistics of every layer's input."""

from qconvert.calibrate.data import read_samples
from qconvert.calibrate.observe import calibrate

__all__ = ["calibrate", "read_samples"]
