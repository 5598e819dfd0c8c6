"""What need not be computed twice: entries in the user's cache folder, which may be lost at any moment.

An entry is one file: the sha256 of the rest, the lengths of its parts as a line of JSON, the parts. It is written under another
name and then renamed, so processes that run at once see a complete entry or none. Nothing of this ever fails: without a folder
that can be written, all is computed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

# Names a folder to use instead of the user's; empty: no cache at all.
FOLDER = "QCONVERT_CACHE"
# Of all entries of one kind together; those that were not used for longest go first.
MAX_BYTES = 512 * 2**20

logger = logging.getLogger("qconvert")


def cache_folder(kind: str) -> Path | None:
    """Where entries of a kind lie, None where nothing is to be cached.

    Source: https://specifications.freedesktop.org/basedir-spec/latest/
    """
    named = os.environ.get(FOLDER)
    if named is not None:
        return Path(named, kind) if named else None
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # a user without a home
            return None
    return base / "qconvert" / kind


class Cache:
    """Entries of one kind: key (hex) -> parts by name."""

    def __init__(self, kind: str) -> None:
        self.folder = cache_folder(kind)

    def get(self, key: str) -> dict[str, bytes] | None:
        """The parts of an entry, None where there is none, or only a damaged one."""
        if self.folder is None:
            return None
        path = self.folder / key
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError as error:
            logger.debug("no cached %s: %s", path, error.strerror)
            return None
        digest, body = content[:32], memoryview(content)[32:]
        if hashlib.sha256(body).digest() != digest:
            logger.debug("the cached %s is damaged", path)
            return None
        lengths, _, rest = content[32:].partition(b"\n")
        parts, start = {}, 0
        for name, length in json.loads(lengths).items():
            parts[name] = rest[start : start + length]
            start += length
        return parts

    def put(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Keep the parts under a key, in place of what was there."""
        lengths = json.dumps({name: len(content) for name, content in parts.items()})
        body = b"".join((lengths.encode(), b"\n", *parts.values()))
        if self.folder is None or len(body) > MAX_BYTES:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, new = tempfile.mkstemp(dir=self.folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(body).digest() + body)
                Path(new).replace(self.folder / key)
            finally:
                Path(new).unlink(missing_ok=True)
            self._prune()
        except OSError as error:
            logger.debug("nothing is cached in %s: %s", self.folder, error.strerror)

    def _prune(self) -> None:
        """Keep to MAX_BYTES; what a killed process left behind under another name goes like all that is old."""
        assert self.folder is not None
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process does the same
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        size = sum(length for _, length, _ in found)
        for _, length, path in sorted(found):
            if size <= MAX_BYTES:
                break
            path.unlink(missing_ok=True)
            size -= length
