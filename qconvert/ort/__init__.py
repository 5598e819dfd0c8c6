"""ONNX Runtime: sessions over graphs, what goes into them, and how their outputs compare."""
