"""The output folder: it is the old one or the complete new one, and one run at a time works on it."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from qconvert.errors import ResourceError, UsageError
from qconvert.ir.artifact import MANIFEST, SIDECAR
from qconvert.storage import stage as stage_module
from qconvert.storage.output import recover
from qconvert.storage.reader import read_tensor, tensor_record
from qconvert.storage.stage import Stage, open_stage

DIGEST = "0123456789abcdef" * 4


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def publish(output: Path, content: str, digest: str = DIGEST, *, force: bool = False) -> None:
    with open_stage(output, digest, force=force) as stage:
        (stage.folder / MANIFEST).write_text(content)
        stage.publish()


def interrupt(output: Path, digest: str = DIGEST) -> Path:
    """Leave a stage behind that has journalled something; returns its folder."""
    with open_stage(output, digest) as stage:
        stage.journal.append({"block": "a"})
    return stage.root


class TestPublish:
    def test_a_new_output_appears_complete_and_nothing_else_is_left(self, tmp_path: Path) -> None:
        with open_stage(tmp_path / "out", DIGEST) as stage:
            (stage.folder / "sub").mkdir()
            (stage.folder / "sub" / "file").write_text("new")
            (stage.scratch / "notes").write_text("not for others")
            stage.journal.append({"block": "a"})
            assert not (tmp_path / "out").exists()
            stage.publish()
        assert names(tmp_path) == ["out"]
        assert [path.relative_to(tmp_path / "out").as_posix() for path in sorted((tmp_path / "out").rglob("*"))] == [
            "sub",
            "sub/file",
        ]

    @pytest.mark.parametrize("swaps", [True, False], ids=["exchange", "two-renames"])
    def test_force_replaces_the_whole_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool) -> None:
        publish(tmp_path / "out", "old")
        (tmp_path / "out" / "stale").write_text("old")
        if not swaps:
            monkeypatch.setattr("qconvert.storage.output._exchange", lambda one, other: False)
        publish(tmp_path / "out", "new", force=True)
        assert names(tmp_path) == ["out"]
        assert names(tmp_path / "out") == [MANIFEST]
        assert (tmp_path / "out" / MANIFEST).read_text() == "new"

    def test_files_get_the_permissions_of_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            with open_stage(tmp_path / "out", DIGEST) as stage:
                (stage.folder / "private").touch(0o600)
                stage.publish()
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "out" / "private").stat().st_mode) == 0o640
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750

    def test_a_symlink_to_the_output_stays_one(self, tmp_path: Path) -> None:
        publish(tmp_path / "real", "old")
        (tmp_path / "link").symlink_to("real")
        publish(tmp_path / "link", "new", force=True)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / MANIFEST).read_text() == "new"

    def test_missing_parents_are_made(self, tmp_path: Path) -> None:
        publish(tmp_path / "a" / "b" / "out", "new")
        assert (tmp_path / "a" / "b" / "out" / MANIFEST).read_text() == "new"


class TestFault25OutputThatCannotBeTaken:
    def refused(self, code: str, output: Path, *, force: bool = False, inputs: tuple[Path, ...] = ()) -> str:
        with pytest.raises(UsageError) as caught, open_stage(output, DIGEST, force=force, inputs=inputs):
            pytest.fail("the stage was opened")
        assert caught.value.code == code
        assert str(output.resolve()) in caught.value.message
        return caught.value.hint

    def test_it_exists(self, tmp_path: Path) -> None:
        publish(tmp_path / "out", "old")
        assert "--force" in self.refused("QC-OUTPUT-004", tmp_path / "out")
        assert (tmp_path / "out" / MANIFEST).read_text() == "old"
        assert names(tmp_path) == ["out"]

    def test_it_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("precious")
        self.refused("QC-OUTPUT-003", tmp_path / "out", force=True)
        assert (tmp_path / "out").read_text() == "precious"

    def test_force_does_not_delete_what_qconvert_did_not_write(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("precious")
        self.refused("QC-OUTPUT-005", tmp_path / "out", force=True)
        assert names(tmp_path / "out") == ["thesis.tex"]

    @pytest.mark.parametrize("output", ["model", "model/out", ".", "link", "link/out"])
    def test_it_is_contains_or_lies_inside_an_input(self, tmp_path: Path, output: str) -> None:
        (tmp_path / "in" / "model").mkdir(parents=True)
        (tmp_path / "in" / "link").symlink_to("model")
        self.refused("QC-OUTPUT-001", tmp_path / "in" / output, force=True, inputs=(tmp_path / "in" / "model",))

    def test_it_contains_a_data_file(self, tmp_path: Path) -> None:
        publish(tmp_path / "out", "old")
        (tmp_path / "out" / "corpus.txt").write_text("words")
        self.refused("QC-OUTPUT-001", tmp_path / "out", force=True, inputs=(tmp_path / "out" / "corpus.txt",))

    def test_it_lies_beside_an_input_with_a_longer_name(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        with open_stage(tmp_path / "model-int4", DIGEST, inputs=[tmp_path / "model"]) as stage:
            stage.publish()
        assert (tmp_path / "model-int4").is_dir()

    def test_it_is_a_mount_point(self) -> None:
        assert "/proc/model" in self.refused("QC-OUTPUT-002", Path("/proc"), force=True)

    def test_its_parent_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ResourceError, match="QC-DISK-003") as caught, open_stage(tmp_path / "file" / "out", DIGEST):
            pytest.fail("the stage was opened")
        assert str(tmp_path / "file") in caught.value.message


class TestFault21DiskFull:
    def test_too_little_space_is_refused_with_both_numbers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2000, 1000, 1000))
        with open_stage(tmp_path / "out", DIGEST) as stage:
            stage.require_space(1000)
            with pytest.raises(ResourceError, match=r"QC-DISK-001.* 1500 .* 1000 ") as caught:
                stage.require_space(1500)
        assert "500 bytes" in caught.value.hint

    def test_what_a_resumed_stage_holds_already_is_not_asked_for_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage(200_000, 200_000, 0))
        with open_stage(tmp_path / "out", DIGEST) as stage:
            (stage.folder / "weights").write_bytes(b"x" * 100_000)
            os.sync()
            stage.require_space(100_000)

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["full", "quota"])
    def test_a_full_disk_leaves_the_old_output(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        def full(path: Path) -> None:
            raise OSError(number, os.strerror(number))

        publish(tmp_path / "out", "old")
        with open_stage(tmp_path / "out", DIGEST, force=True) as stage:
            (stage.folder / MANIFEST).write_text("new")
            monkeypatch.setattr(stage_module, "fsync", full)
            with pytest.raises(ResourceError, match="QC-DISK-002") as caught:
                stage.publish()
        assert str(tmp_path / "out") in caught.value.message
        assert (tmp_path / "out" / MANIFEST).read_text() == "old"


class TestFault22Kill:
    def test_a_stage_is_resumed_by_its_own_digest_only(self, tmp_path: Path) -> None:
        interrupt(tmp_path / "out")
        with open_stage(tmp_path / "out", DIGEST) as stage:
            assert stage.done_blocks() == ("a",)
        with open_stage(tmp_path / "out", "f" * 64) as stage:
            assert stage.done_blocks() == ()

    def test_a_stage_without_a_journalled_block_goes_away(self, tmp_path: Path) -> None:
        with open_stage(tmp_path / "out", DIGEST) as stage:
            (stage.folder / "half").touch()
        assert names(tmp_path) == []

    def test_files_without_a_journal_are_not_resumed(self, tmp_path: Path) -> None:
        root = interrupt(tmp_path / "out")
        (root / "files" / "half").touch()
        (root / "journal").unlink()
        with open_stage(tmp_path / "out", DIGEST) as stage:
            assert names(stage.folder) == []

    def test_a_torn_record_is_ignored_and_overwritten(self, tmp_path: Path) -> None:
        root = interrupt(tmp_path / "out")
        with (root / "journal").open("a") as file:
            file.write('{"block": "b"')
        with open_stage(tmp_path / "out", DIGEST) as stage:
            assert stage.done_blocks() == ("a",)
            stage.journal.append({"block": "c"})
        with open_stage(tmp_path / "out", DIGEST) as stage:
            assert stage.done_blocks() == ("a", "c")

    def test_a_stage_that_lost_data_starts_again(self, tmp_path: Path) -> None:
        with open_stage(tmp_path / "out", DIGEST) as stage:
            tensor = stage.sidecar.append("x", torch.arange(100))
            stage.journal.append({"block": "a", "tensors": {SIDECAR: {"x": tensor_record(tensor)}}})
        os.truncate(stage.folder / SIDECAR, 10)
        with open_stage(tmp_path / "out", DIGEST) as stage:
            assert stage.done_blocks() == ()
            assert names(stage.folder) == []

    def test_killed_between_the_two_renames(self, tmp_path: Path) -> None:
        publish(tmp_path / "out", "old")
        (tmp_path / "out").rename(tmp_path / ".out.qconvert-old")
        with pytest.raises(UsageError, match="QC-OUTPUT-004"), open_stage(tmp_path / "out", DIGEST):
            pytest.fail("the stage was opened")
        assert names(tmp_path) == ["out"]
        assert (tmp_path / "out" / MANIFEST).read_text() == "old"

    def test_who_only_reads_the_name_finds_the_old_folder_too(self, tmp_path: Path) -> None:
        publish(tmp_path / "out", "old")
        (tmp_path / "link").symlink_to("out")
        (tmp_path / "out").rename(tmp_path / ".out.qconvert-old")
        recover(tmp_path / "link")
        assert names(tmp_path) == ["link", "out"]
        assert (tmp_path / "link" / MANIFEST).read_text() == "old"

    def test_a_run_between_its_two_renames_is_not_disturbed(self, tmp_path: Path) -> None:
        with open_stage(tmp_path / "out", DIGEST):
            (tmp_path / ".out.qconvert-old").mkdir()
            with pytest.raises(ResourceError, match=f"QC-LOCK-001.*process {os.getpid()}\n"):
                recover(tmp_path / "out")
        assert ".out.qconvert-old" in names(tmp_path)

    def test_killed_after_the_two_renames(self, tmp_path: Path) -> None:
        publish(tmp_path / "out", "new")
        publish(tmp_path / ".out.qconvert-old", "old")
        with pytest.raises(UsageError, match="QC-OUTPUT-004"), open_stage(tmp_path / "out", DIGEST):
            pytest.fail("the stage was opened")
        assert names(tmp_path) == ["out"]
        assert (tmp_path / "out" / MANIFEST).read_text() == "new"

    def test_killed_after_the_exchange_the_old_output_is_not_resumed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(tmp_path / "out", "old")
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "discard", lambda stage: None)
            publish(tmp_path / "out", "new", force=True)
        assert (tmp_path / "out" / MANIFEST).read_text() == "new"
        with open_stage(tmp_path / "out", DIGEST, force=True) as stage:
            assert names(stage.folder) == []
            assert stage.journal.records() == ()

    def test_other_stages_go_after_a_day(self, tmp_path: Path) -> None:
        fresh, stale = interrupt(tmp_path / "out", "a" * 64), interrupt(tmp_path / "out", "b" * 64)
        others = [interrupt(tmp_path / "out2", "c" * 64), tmp_path / ".out.qconvert-notes"]
        others[1].mkdir()
        yesterday = time.time() - stage_module.KEEP_SECONDS - 60
        for root in (stale, *others):
            for path in (root, *root.iterdir()):
                os.utime(path, (yesterday, yesterday))
        publish(tmp_path / "out", "new")
        assert not stale.exists()
        assert fresh.exists()
        assert all(other.exists() for other in others)


class TestFault23TwoRuns:
    def test_the_second_is_told_the_process_of_the_first(self, tmp_path: Path) -> None:
        with open_stage(tmp_path / "out", DIGEST) as stage:
            with (
                pytest.raises(ResourceError, match=f"QC-LOCK-001.*process {os.getpid()}\n"),
                open_stage(tmp_path / "out", "f" * 64),
            ):
                pytest.fail("the stage was opened")
            stage.publish()

    def test_a_killed_run_holds_no_lock(self, tmp_path: Path) -> None:
        script = (
            "import os, signal, sys\nfrom pathlib import Path\nfrom qconvert.storage.stage import open_stage\n"
            f"with open_stage(Path(sys.argv[1]), {DIGEST!r}) as stage:\n"
            "    stage.journal.append({'block': 'a'})\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
        assert killed.returncode == -9
        assert ".out.qconvert.lock" in names(tmp_path)
        with open_stage(tmp_path / "out", DIGEST) as stage:
            assert stage.done_blocks() == ("a",)
            stage.publish()
        assert names(tmp_path) == ["out"]


class TestSidecar:
    def test_tensors_begin_at_multiples_of_64_and_read_back(self, tmp_path: Path) -> None:
        tensors = {
            "bytes": torch.arange(5, dtype=torch.uint8),
            "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
            "scalar": torch.tensor(7),
            "empty": torch.empty(0, 3),
            "transposed": torch.arange(6.0).reshape(2, 3).T,
            "expanded": torch.tensor([[2.0]]).expand(3, 2),
        }
        with open_stage(tmp_path / "out", DIGEST) as stage:
            stored = {name: stage.sidecar.append(name, tensor) for name, tensor in tensors.items()}
            assert stage.sidecar.tensors == stored
            for name, tensor in tensors.items():
                assert stored[name].offset % 64 == 0
                assert torch.equal(read_tensor(stage.folder, stored[name]), tensor)

    def test_no_tensor_no_file(self, tmp_path: Path) -> None:
        with open_stage(tmp_path / "out", DIGEST) as stage:
            stage.sidecar.sync()
            assert names(stage.folder) == []

    def test_what_was_not_journalled_is_cut_off(self, tmp_path: Path) -> None:
        with open_stage(tmp_path / "out", DIGEST) as stage:
            first = stage.sidecar.append("first", torch.ones(3))
            stage.journal.append({"block": "a", "tensors": {SIDECAR: {"first": tensor_record(first)}}})
            stage.sidecar.append("second", torch.ones(100))
        with open_stage(tmp_path / "out", DIGEST) as stage:
            assert stage.sidecar.tensors == {"first": first}
            assert (stage.folder / SIDECAR).stat().st_size == 12
            assert stage.sidecar.append("third", torch.ones(1)).offset == 64


def test_the_journal_holds_one_json_document_per_line(tmp_path: Path) -> None:
    with open_stage(tmp_path / "out", DIGEST) as stage:
        stage.journal.append({"block": 'odd "name"\n\ud800'})
        stage.journal.append({"block": ""})
        lines = stage.journal.path.read_text().splitlines()
        assert [json.loads(line)["block"] for line in lines] == ['odd "name"\n\ud800', ""]
