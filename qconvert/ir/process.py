"""What a process is to the one that started it.

Nothing heavy is imported: the process that watches over a command starts with this.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

WATCH = "QCONVERT_WATCH"  # descriptor of the pipe on which a watched process says what its plugins do
# Plugins that ended the process when they were imported or asked for quantizers (JSON); only who watches has seen that.
SET_ASIDE = "QCONVERT_SET_ASIDE"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def import_path() -> dict[str, str]:
    """Environment variables with which a process, and all that it starts, finds no modules in the current folder by itself.

    That folder may be a checkpoint, or hold a script named as a library is. An empty entry of PYTHONPATH means it as well
    (`PYTHONPATH=$PYTHONPATH:/more` leaves one); what the user names stays.
    """
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(named)}


def end_with_parent() -> None:
    """When the process that started this one is killed, this one is too (Linux; elsewhere it runs to its end)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
