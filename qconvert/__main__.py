"""`python -m qconvert`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the current folder, which may be a checkpoint: before anything is imported that a file there may shadow

from qconvert.cli import main

if __name__ == "__main__":
    main(prog_name="qconvert")
