"""Writes quantized blocks as they come: the files of weights, the sidecar, config.json and the files that travel along."""

from __future__ import annotations

from qconvert.write.blocks import Writer, write
from qconvert.write.manifest import run_digest, write_manifest

__all__ = ["Writer", "run_digest", "write", "write_manifest"]
