"""The calibrate stage: draws samples, and hands over the model block by block with statistics of every layer's input."""

from qconvert.calibrate.cache_scales import cache_scales
from qconvert.calibrate.data import read_samples
from qconvert.calibrate.participant import Participant
from qconvert.calibrate.ranges import static_ranges, value_codes
from qconvert.calibrate.walk import calibrate

__all__ = ["Participant", "cache_scales", "calibrate", "read_samples", "static_ranges", "value_codes"]
