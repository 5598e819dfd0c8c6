"""The calibrate stage: draws samples, and hands over the model block by block with statistics of every layer's input."""

from qconvert.calibrate.data import read_samples
from qconvert.calibrate.observe import calibrate
from qconvert.calibrate.shared import Share, calibrate_together

__all__ = ["Share", "calibrate", "calibrate_together", "read_samples"]
