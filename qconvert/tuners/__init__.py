"""The built-in tuners of blocks: one algorithm, one file. They register through the hook that third parties use."""
