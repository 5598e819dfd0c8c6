"""The built-in quantizers: one algorithm, one file. They register through the hook that third parties use."""
