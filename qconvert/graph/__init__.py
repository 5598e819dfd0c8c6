"""Graphs as onnx_ir holds them: made plain or narrow, cut at the last position, and checked against a provider's kernels."""
