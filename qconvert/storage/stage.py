"""The stage of a run: an output folder in the making, beside its final place, with a journal to resume from.

PARENT/
  OUT/                            see qconvert.storage.output
  .OUT.qconvert-<digest>/         the stage of one recipe, input and version
    files/                        what becomes OUT
    scratch/                      what doesn't
    journal                       what is safely on disk
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from qconvert.errors import ResourceError
from qconvert.ir.artifact import SIDECAR, StoredTensor
from qconvert.ir.large_tensors import large_tensors_made_by
from qconvert.storage.disk import disk_errors, fsync
from qconvert.storage.journal import Journal
from qconvert.storage.lock import Lock
from qconvert.storage.output import check_free, check_place, finish_publish, publish
from qconvert.storage.reader import stored_tensor
from qconvert.storage.sidecar import Sidecar
from qconvert.storage.tensor_file import tensor_in_file

# Stages of other recipes are kept this long, so that their runs can be resumed.
KEEP_SECONDS = 24 * 3600


class Stage:
    """A run's work on one output folder; made by `open_stage`.

    output: the resolved folder that will appear.
    folder: what becomes `output`.
    scratch: a folder for what is not published.
    """

    def __init__(self, output: Path, root: Path) -> None:
        self.output = output
        self.root = root
        self.folder = root / "files"
        self.scratch = root / "scratch"
        self._open()
        if self._is_damaged():
            shutil.rmtree(root)
            self._open()
        self.sidecar = Sidecar(self.folder / SIDECAR, self.tensors_of(SIDECAR))

    def _open(self) -> None:
        self.journal = Journal(self.root / "journal")
        if not self.journal.records():
            shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        for folder in (self.folder, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)

    def _is_damaged(self) -> bool:
        """Return whether `folder` is not what the journal says: published already (then it is the old output), or cut off."""
        for record in self.journal.records():
            if record.get("publishing", self._inode()) != self._inode():
                return True
        ends: dict[str, int] = {}
        for tensor in self.tensors().values():
            ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.offset + tensor.nbytes)
        sizes = {name: path.stat().st_size if path.is_file() else -1 for name in ends for path in [self.folder / name]}
        return any(sizes[name] < end for name, end in ends.items())

    def _inode(self) -> int:
        return self.folder.stat().st_ino

    def done_blocks(self) -> tuple[str, ...]:
        """Return the names of the blocks that an earlier run of the same digest has written; "" is what lies outside blocks."""
        return tuple(record["block"] for record in self.journal.records() if "block" in record)

    def tensors(self) -> dict[str, StoredTensor]:
        """Return where each tensor of the done blocks lies in `folder`, by name."""
        return {
            name: stored_tensor(file, entry)
            for record in self.journal.records()
            for file, entries in record.get("tensors", {}).items()
            for name, entry in entries.items()
        }

    def tensors_of(self, file: str) -> dict[str, StoredTensor]:
        """Return the tensors of the done blocks that lie in `file`, by name."""
        return {name: tensor for name, tensor in self.tensors().items() if tensor.file == file}

    def require_space(self, needed_bytes: int) -> None:
        """Raise ResourceError QC-DISK-001 if the disk can't take `needed_bytes`, less what the stage holds already."""
        held = sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.root).free
        if needed_bytes - held > free:
            raise ResourceError(
                "QC-DISK-001",
                f"{self.output} needs {needed_bytes - held} more bytes, but {free} are free on that disk",
                hint=f"free {needed_bytes - held - free} bytes or give an --output on another disk",
            )

    def publish(self) -> None:
        """Make `folder` the output, once all of it is safely on disk."""
        with disk_errors(self.output):
            _make_durable(self.folder)
        self.journal.append({"publishing": self._inode()})
        with disk_errors(self.output):
            publish(self.folder, self.output)
        self.discard()

    def discard(self) -> None:
        """Remove the stage. The journal goes first: what is left after a kill is never taken for a stage to resume."""
        self.journal.path.unlink(missing_ok=True)
        shutil.rmtree(self.root, ignore_errors=True)


@contextmanager
def open_stage(output: Path, digest: str, *, force: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Stage]:
    """Lock `output` and open the stage of `digest`, resuming what an earlier run has left. Large tensors lie in its scratch
    folder within the context.

    digest: hex sha256 of recipe, inputs and versions; 12 characters name the stage.
    inputs: files and folders that are read, and must not be written.

    Leaving without `publish`, by an exception or not, keeps a stage that has journalled something. Raises UsageError
    QC-OUTPUT-001..005 for an output that can't be taken, ResourceError QC-DISK-003 where it can't be written,
    QC-LOCK-001 where another run works on it.
    """
    output = output.resolve()
    check_place(output, inputs)
    with disk_errors(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
    with Lock(output):
        finish_publish(output)
        check_free(output, force)
        with disk_errors(output.parent):
            _remove_old_stages(output, keep=_stage_root(output, digest))
            stage = Stage(output, _stage_root(output, digest))
        try:
            with large_tensors_made_by(partial(tensor_in_file, stage.scratch)):
                yield stage
        finally:
            if not stage.journal.records():
                stage.discard()


def _stage_root(output: Path, digest: str) -> Path:
    return output.parent / f".{output.name}.qconvert-{digest[:12]}"


def _remove_old_stages(output: Path, keep: Path) -> None:
    """Remove stages of this output that nobody resumed for a day. No run works on them: we hold the output's lock."""
    name = re.compile(re.escape(f".{output.name}.qconvert-") + "[0-9a-f]{12}")
    for path in output.parent.iterdir():
        if path == keep or not name.fullmatch(path.name):
            continue
        used = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
        if time.time() - used > KEEP_SECONDS:
            shutil.rmtree(path)


def _make_durable(folder: Path) -> None:
    """Give every file the permissions of the user's umask (safetensors and tempfile write 0600), and fsync it all."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in (*sorted(folder.rglob("*")), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        fsync(path)
