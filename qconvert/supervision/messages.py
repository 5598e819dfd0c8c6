"""The messages from a watched process to the one that watches."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

WATCH = "QCONVERT_WATCH"  # path of the channel on which a watched process says what its plugins do

# Plugins that ended the process when they were imported or asked for quantizers (JSON); only who watches has seen that.
SET_ASIDE = "QCONVERT_SET_ASIDE"


class Channel:
    """A note of what a watched process is doing, in memory that it shares with the one that watches.

    A pipe would be one of the process's files, and plugins close and write to files that they did not open.
    """

    SIZE = 1 << 16
    HEAD = struct.Struct("<II")  # length and crc32 of the JSON that follows: it may be read while it is written

    def __init__(self, path: Path) -> None:
        """path: a file of SIZE bytes. Raises OSError if it is gone."""
        self.path = path
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.SIZE)

    def tell(self, state: Mapping[str, Any]) -> None:
        """Replace what was told before; the JSON of `state` has to fit into SIZE."""
        data = json.dumps(state).encode()
        self._memory[: self.HEAD.size + len(data)] = self.HEAD.pack(len(data), crc32(data)) + data

    def state(self) -> dict[str, Any] | None:
        """Return what was told last, None before that and while it is being written.

        call: the call that a plugin is in (plugin/host/calls.py), or None. exit: the exit code of a command that is done, and
        left: what still runs. until: when that call, or the process, has to be over, in seconds of time.monotonic.
        """
        size, check = self.HEAD.unpack_from(self._memory)
        data = self._memory[self.HEAD.size : self.HEAD.size + size]
        return json.loads(data) if data and crc32(data) == check else None
