"""The built-in estimators of ranges: one algorithm, one file. They register through the hook that third parties use."""
