"""The write stage: what lies where in model.safetensors and the sidecar, also after a kill or on a full disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from writing import DIGEST, MemorySource, all_linears, convert, net, plan_of, quantize_layer, quantized_blocks, write_blocks

from qconvert.errors import InputError, PluginError, QConvertError, ResourceError
from qconvert.ir.artifact import SIDECAR, WEIGHTS, StoredTensor
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.quantized import Outliers, QuantizedBlock
from qconvert.ir.write_result import WriteResult
from qconvert.storage import safetensors as write_safetensors
from qconvert.storage.reader import read_layer, read_tensor
from qconvert.storage.stage import open_stage

SCHEMES = [
    *("int4-g32", "int4-channel", "int4-tensor", "int4-g32-asym", "int4-tensor-asym"),
    *("int8-g16", "int8-channel", "int8-tensor-asym", "int8-g32-asym"),
    *("int8-channel-a8", "int8-tensor-a8", "int8-tensor-asym-a8", "int8-channel-asym-a8"),
]


def publish(model: Model, plan: Plan, output: Path) -> WriteResult:
    with open_stage(output, DIGEST) as stage:
        written = write_blocks(quantized_blocks(model, plan, stage.done_blocks()), model, plan, stage)
        stage.publish()
    return written


def published_bytes(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


class TestModelSafetensors:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("width", [64, 160], ids=["64-wide", "160-wide"])
    def test_every_layer_reads_back_as_it_was_quantized(self, tmp_path: Path, scheme: str, width: int) -> None:
        model = net(width)
        plan = plan_of(model, all_linears(scheme))
        written = publish(model, plan, tmp_path / "out")
        for layer in plan.layers.values():
            expected, found = quantize_layer(model, layer), read_layer(tmp_path / "out", layer, written.tensors)
            assert torch.equal(found.q, expected.q)
            assert torch.equal(found.scale, expected.scale)
            if expected.zero_point is None:
                assert found.zero_point is None
            else:
                assert found.zero_point is not None
                assert torch.equal(found.zero_point, expected.zero_point)

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_it_holds_exactly_the_planned_tensors_and_the_source_s_others(self, tmp_path: Path, scheme: str) -> None:
        model = net()
        plan = convert(model, all_linears(scheme), tmp_path / "out")
        tensors = load_file(tmp_path / "out" / WEIGHTS)
        expected = {
            f"{name}.{suffix}": (info.dtype, info.shape)
            for name, layer in plan.layers.items()
            for suffix, info in layer.disk_tensors.items()
        }
        for name, info in model.source.tensors.items():
            if name.removesuffix(".weight") not in plan.layers:
                expected[name] = (info.dtype, info.shape)
                assert torch.equal(tensors[name], model.read(name))
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == expected

    def test_widths_that_fill_no_word(self, tmp_path: Path) -> None:
        model = net(33)
        plan = plan_of(model, all_linears("int4-channel-asym"))
        written = publish(model, plan, tmp_path / "out")
        for layer in plan.layers.values():
            assert torch.equal(
                read_layer(tmp_path / "out", layer, written.tensors).dequantize(), quantize_layer(model, layer).dequantize()
            )
        assert load_file(tmp_path / "out" / WEIGHTS).keys() == {n for n, t in written.tensors.items() if t.file == WEIGHTS}

    def test_layers_of_a_block_are_adjacent_suffix_by_suffix(self, tmp_path: Path) -> None:
        model = net()
        written = publish(model, plan_of(model, all_linears("int4-g32-asym")), tmp_path / "out")
        ordered = sorted((t.offset, name) for name, t in written.tensors.items() if t.file == WEIGHTS)
        assert [name for _, name in ordered if name.startswith("blocks.1")] == [
            *("blocks.1.a.weight_packed", "blocks.1.b.weight_packed"),
            *("blocks.1.a.weight_scale", "blocks.1.b.weight_scale"),
            *("blocks.1.a.weight_zero_point", "blocks.1.b.weight_zero_point"),
            *("blocks.1.a.weight_shape", "blocks.1.b.weight_shape"),
            *("blocks.1.norm.weight", "blocks.1.norm.bias", "blocks.1.b.bias"),
        ]
        packed = written.tensors["blocks.1.a.weight_packed"]
        assert written.tensors["blocks.1.b.weight_packed"].offset == packed.offset + packed.nbytes

    def test_the_data_begins_at_a_multiple_of_8_and_one_metadata_key_is_there(self, tmp_path: Path) -> None:
        model = net()
        written = publish(model, plan_of(model, all_linears("int8")), tmp_path / "out")
        assert min(tensor.offset for tensor in written.tensors.values()) % 8 == 0
        with safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_a_scale_that_float16_cannot_hold_is_float32(self, tmp_path: Path) -> None:
        model = net()
        model.source.content["blocks.0.a.weight"].mul_(1e-6)  # type: ignore[attr-defined]
        plan = plan_of(model, all_linears("int4-g32"))
        written = publish(model, plan, tmp_path / "out")
        tensors = load_file(tmp_path / "out" / WEIGHTS)
        assert tensors["blocks.0.a.weight_scale"].dtype == torch.float32
        assert tensors["blocks.1.a.weight_scale"].dtype == torch.float16
        layer = plan.layers["blocks.0.a"]
        found = read_layer(tmp_path / "out", layer, written.tensors)
        assert torch.equal(found.scale, quantize_layer(model, layer).scale)

    def test_float_tensors_keep_their_stored_dtype_and_odd_shapes(self, tmp_path: Path) -> None:
        """Fault 27."""
        extra = {
            "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
            "empty": torch.empty(0, 3),
            "flags": torch.tensor([True, False, True]),
            "tiny": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
            "transposed": torch.arange(6.0).reshape(2, 3).T,
            'odd "name"\n\0../../x': torch.arange(3),
            "after": torch.arange(4),
        }
        model = net(extra=extra)
        convert(model, all_linears("int8"), tmp_path / "out")
        tensors = load_file(tmp_path / "out" / WEIGHTS)
        for name, tensor in extra.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name].float(), tensor.float())
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_parameter_that_is_not_finite_is_refused_by_name(self, tmp_path: Path) -> None:
        model = net(extra={"blocks.1.norm.bias": torch.zeros(64)})
        model.source.content["blocks.1.norm.bias"][5] = torch.nan  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=r"blocks\.1\.norm\.bias holds 1 NaN and 0 infinite") as raised:
            convert(model, all_linears("int8"), tmp_path / "out")
        assert raised.value.code == "QC-WEIGHT-001"

    def test_a_mask_that_is_no_parameter_may_be_infinite(self, tmp_path: Path) -> None:
        model = net(extra={"mask": torch.full((3,), -torch.inf)})
        convert(model, all_linears("int8"), tmp_path / "out")
        assert torch.isinf(load_file(tmp_path / "out" / WEIGHTS)["mask"]).all()

    def test_a_folded_tensor_is_written_in_the_source_s_dtype(self, tmp_path: Path) -> None:
        model = net()
        source = MemorySource({name: t.bfloat16() for name, t in model.source.content.items()})  # type: ignore[attr-defined]
        model = replace(model, source=source)
        plan = plan_of(model, all_linears("int8"))
        with open_stage(tmp_path / "out", DIGEST) as stage:
            changed = {"blocks.0.norm.weight": torch.full((64,), 0.3)}
            first, *rest = quantized_blocks(model, plan)
            write_blocks([replace(first, tensors=changed), *rest], model, plan, stage)
            stage.publish()
        tensors = load_file(tmp_path / "out" / WEIGHTS)
        assert torch.equal(tensors["blocks.0.norm.weight"], torch.full((64,), 0.3, dtype=torch.bfloat16))
        assert torch.equal(tensors["blocks.1.norm.weight"], model.read("blocks.1.norm.weight"))


class TestTiedTensors:
    """The head shares the embedding."""

    def tied(self, stored: str, alias: str) -> Model:
        model = net()
        content = dict(model.source.content)  # type: ignore[attr-defined]
        shared = content.pop("embed.weight")
        del content["head.weight"]
        return replace(model, source=MemorySource({**content, stored: shared}), tied={alias: stored})

    def head_names(self, model: Model, quantize_head: bool, output: Path) -> list[str]:
        convert(model, lambda name: "int8" if name != "head" or quantize_head else None, output)
        return sorted(name for name in load_file(output / WEIGHTS) if name.startswith(("embed", "head")))

    def test_kept_float_they_are_there_once(self, tmp_path: Path) -> None:
        assert self.head_names(self.tied("embed.weight", "head.weight"), False, tmp_path / "out") == ["embed.weight"]

    def test_a_quantized_head_leaves_the_embedding(self, tmp_path: Path) -> None:
        expected = ["embed.weight", "head.weight_packed", "head.weight_scale", "head.weight_shape"]
        assert self.head_names(self.tied("embed.weight", "head.weight"), True, tmp_path / "out") == expected

    def test_also_where_the_source_holds_it_under_the_head_s_name(self, tmp_path: Path) -> None:
        expected = ["embed.weight", "head.weight_packed", "head.weight_scale", "head.weight_shape"]
        assert self.head_names(self.tied("head.weight", "embed.weight"), True, tmp_path / "out") == expected


class TestSidecar:
    def outlier_blocks(self, model: Model, plan: Plan) -> Iterator[QuantizedBlock]:
        for block in quantized_blocks(model, plan):
            layers = []
            for layer in block.layers:
                weight = model.read(f"{layer.name}.weight")
                outliers = Outliers(torch.tensor([3, 17]), weight[:, [3, 17]])  # float32: not rounded to float16
                layers.append(replace(layer, tensor=replace(layer.tensor, outliers=outliers)))
            yield replace(block, layers=tuple(layers))

    def test_outliers_read_back_and_count_in_the_layer_s_bytes(self, tmp_path: Path) -> None:
        model = net()
        plan = plan_of(model, all_linears("int8-channel-a8"))
        with open_stage(tmp_path / "out", DIGEST) as stage:
            written = write_blocks(self.outlier_blocks(model, plan), model, plan, stage)
            stage.publish()
        layer = plan.layers["blocks.0.a"]
        found = read_layer(tmp_path / "out", layer, written.tensors)
        weight = model.read("blocks.0.a.weight")
        assert found.outliers is not None
        assert torch.equal(found.outliers.columns, torch.tensor([3, 17]))
        assert torch.equal(found.dequantize()[:, [3, 17]], weight[:, [3, 17]])
        # 48 x 64 codes, 48 float32 scales; 2 int64 columns, 48 x 2 float32 weights, 64 uint8 mask
        assert written.layers[0].bytes == 48 * 64 + 48 * 4 + 2 * 8 + 48 * 2 * 4 + 64
        assert written.layers[0].name == "blocks.0.a"
        assert written.layers[0].relative_error == 0.25
        assert written.layers[0].outlier_share == 2 / 64

    def test_layers_without_outliers_have_no_share_of_them(self, tmp_path: Path) -> None:
        model = net()
        written = publish(model, plan_of(model, all_linears("int8-channel-a8")), tmp_path / "out")
        assert {layer.outlier_share for layer in written.layers} == {None}

    def test_an_smoothing_scale_reads_back(self, tmp_path: Path) -> None:
        model = net()
        plan = plan_of(model, all_linears("int8-channel"))
        scale = 2.0 ** torch.arange(64).remainder(5)
        with open_stage(tmp_path / "out", DIGEST) as stage:
            blocks = [scaled(block, scale) for block in quantized_blocks(model, plan)]
            written = write_blocks(blocks, model, plan, stage, layout="onnx")
            stage.publish()
        found = read_layer(tmp_path / "out", plan.layers["blocks.0.a"], written.tensors)
        assert found.smoothing_scale is not None
        assert torch.equal(found.smoothing_scale, scale)

    def test_symmetric_groups_need_none(self, tmp_path: Path) -> None:
        convert(net(), all_linears("int4-g32"), tmp_path / "out")
        assert not (tmp_path / "out" / SIDECAR).exists()


def scaled(block: QuantizedBlock, scale: Tensor) -> QuantizedBlock:
    return replace(
        block, layers=tuple(replace(layer, tensor=replace(layer.tensor, smoothing_scale=scale)) for layer in block.layers)
    )


class TestResume:
    """Fault 22: a run that was interrupted anywhere ends in the bytes of one that was not."""

    SCHEME = "int4-g32-asym"  # fills the sidecar too

    @pytest.fixture
    def expected(self, tmp_path: Path) -> dict[str, bytes]:
        convert(net(), all_linears(self.SCHEME), tmp_path / "expected")
        return published_bytes(tmp_path / "expected")

    @pytest.mark.parametrize("finished", [0, 1, 2, 3])
    def test_after_an_exception(self, tmp_path: Path, expected: dict[str, bytes], finished: int) -> None:
        model = net()
        plan = plan_of(model, all_linears(self.SCHEME))

        def failing() -> Iterator[QuantizedBlock]:
            yield from islice(quantized_blocks(model, plan), finished)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), open_stage(tmp_path / "out", DIGEST) as stage:
            write_blocks(failing(), model, plan, stage)
        assert not (tmp_path / "out").exists()
        with open_stage(tmp_path / "out", DIGEST) as stage:
            assert stage.done_blocks() == ("blocks.0", "blocks.1", "")[:finished]
            if finished:  # what is on disk already can be read, e.g. to recompute the inputs of the next block
                layer = plan.layers["blocks.0.a"]
                assert torch.equal(read_layer(stage.folder, layer, stage.tensors()).q, quantize_layer(model, layer).q)
            written = write_blocks(quantized_blocks(model, plan, stage.done_blocks()), model, plan, stage)
            stage.publish()
        assert published_bytes(tmp_path / "out") == expected
        assert [layer.name for layer in written.layers] == list(plan.layers)

    def test_after_a_kill(self, tmp_path: Path, expected: dict[str, bytes]) -> None:
        script = (
            "import os, signal, sys\nfrom pathlib import Path\nfrom writing import *\n"
            f"model = net()\nplan = plan_of(model, all_linears({self.SCHEME!r}))\n"
            "def killed():\n    blocks = quantized_blocks(model, plan)\n    yield next(blocks)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "with open_stage(Path(sys.argv[1]), DIGEST) as stage:\n    write_blocks(killed(), model, plan, stage)\n"
        )
        tests = str(Path(__file__).parents[1] / "support")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, str(Path(tests).parent)])}
        killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], env=environment, check=False)
        assert killed.returncode == -9
        assert not (tmp_path / "out").exists()
        model = net()
        plan = plan_of(model, all_linears(self.SCHEME))
        with open_stage(tmp_path / "out", DIGEST) as stage:
            assert stage.done_blocks() == ("blocks.0",)
            with (stage.folder / WEIGHTS).open("r+b") as file:  # what the kill tore, behind the journalled block
                file.seek(max(t.offset + t.nbytes for t in stage.tensors_of(WEIGHTS).values()))
                file.write(b"\xff" * 100)
            write_blocks(quantized_blocks(model, plan, stage.done_blocks()), model, plan, stage)
            stage.publish()
        assert published_bytes(tmp_path / "out") == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]

    def test_two_runs_give_the_same_bytes(self, tmp_path: Path, expected: dict[str, bytes]) -> None:
        """Fault 28."""
        convert(net(), all_linears(self.SCHEME), tmp_path / "again")
        assert published_bytes(tmp_path / "again") == expected
        assert expected.keys() == {WEIGHTS, SIDECAR}


class TestFault21DiskFull:
    def run_until_full(self, output: Path) -> ResourceError:
        model = net()
        with pytest.raises(ResourceError) as caught:
            publish(model, plan_of(model, all_linears("int4-g32-asym")), output)
        assert not output.exists()
        return caught.value

    def test_known_before_the_first_block(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int, offset: int, size: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        error = self.run_until_full(tmp_path / "out")
        assert error.code == "QC-DISK-002"
        assert WEIGHTS in error.message
        assert list(tmp_path.iterdir()) == []

    def test_in_the_second_block_the_first_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        blocks = iter([False, True])

        def full(path: Path) -> None:
            if path.name == WEIGHTS and next(blocks):
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(write_safetensors, "fsync", full)
            assert self.run_until_full(tmp_path / "out").code == "QC-DISK-002"
        with open_stage(tmp_path / "out", DIGEST) as stage:
            assert stage.done_blocks() == ("blocks.0",)

    def test_a_file_system_that_cannot_preallocate_will_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(descriptor: int, offset: int, size: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(os, "posix_fallocate", unsupported)
        convert(net(), all_linears("int8"), tmp_path / "out")
        assert "head.weight" in load_file(tmp_path / "out" / WEIGHTS)


class TestContract:
    """The stage before must deliver what was planned."""

    def stage_with(self, tmp_path: Path, blocks: list[QuantizedBlock], model: Model, plan: Plan) -> QConvertError:
        with pytest.raises(QConvertError) as caught, open_stage(tmp_path / "out", DIGEST) as stage:
            write_blocks(blocks, model, plan, stage)
        return caught.value

    def test_blocks_in_another_order(self, tmp_path: Path) -> None:
        model = net()
        plan = plan_of(model, all_linears("int8"))
        blocks = list(quantized_blocks(model, plan))
        error = self.stage_with(tmp_path, blocks[::-1], model, plan)
        assert (error.code, error.exit_code) == ("QC-WRITE-004", 70)
        assert "'blocks.0'" in error.message

    def test_a_block_that_never_comes(self, tmp_path: Path) -> None:
        model = net()
        plan = plan_of(model, all_linears("int8"))
        error = self.stage_with(tmp_path, list(quantized_blocks(model, plan))[:1], model, plan)
        assert error.code == "QC-WRITE-004"
        assert "'blocks.1' never came" in error.message

    def test_a_layer_that_is_missing(self, tmp_path: Path) -> None:
        model = net()
        plan = plan_of(model, all_linears("int8"))
        first, *rest = quantized_blocks(model, plan)
        error = self.stage_with(tmp_path, [replace(first, layers=first.layers[:1]), *rest], model, plan)
        assert error.code == "QC-WRITE-004"
        assert "'blocks.0.b'" in error.message

    def test_a_fold_that_changes_a_shape(self, tmp_path: Path) -> None:
        model = net()
        plan = plan_of(model, all_linears("int8"))
        first, *rest = quantized_blocks(model, plan)
        error = self.stage_with(tmp_path, [replace(first, tensors={"blocks.0.norm.weight": torch.ones(3)}), *rest], model, plan)
        assert error.code == "QC-WRITE-004"
        assert "'blocks.0.norm.weight' was folded to (3,)" in error.message

    def test_a_unit_without_quantized_layers_may_be_skipped(self, tmp_path: Path) -> None:
        model = net()
        plan = plan_of(model, lambda name: "int8" if name.startswith("blocks.1") else None)
        with open_stage(tmp_path / "out", DIGEST) as stage:
            write_blocks([block for block in quantized_blocks(model, plan) if block.layers], model, plan, stage)
            assert stage.done_blocks() == ("blocks.0", "blocks.1", "")

    def test_an_smoothing_scale_that_no_loader_would_undo(self, tmp_path: Path) -> None:
        model = net(config={})
        plan = plan_of(model, all_linears("int8"))
        blocks = [scaled(block, torch.full((64,), 2.0)) for block in quantized_blocks(model, plan)]
        error = self.stage_with(tmp_path, blocks, model, plan)
        assert isinstance(error, PluginError)
        assert error.code == "QC-WRITE-001"
        assert "'blocks.0.a'" in error.message
        assert "--layout onnx" in error.hint


class TestReader:
    def test_a_missing_tensor_is_named(self, tmp_path: Path) -> None:
        plan = convert(net(), all_linears("int8"), tmp_path / "out")
        with pytest.raises(InputError, match=r"QC-READ-003.*'blocks\.0\.a\.weight_packed'"):
            read_layer(tmp_path / "out", plan.layers["blocks.0.a"], {})

    def test_a_cut_off_file_is_named_with_the_numbers(self, tmp_path: Path) -> None:
        save_file({"x": torch.ones(4)}, tmp_path / WEIGHTS)
        with pytest.raises(InputError, match=r"QC-READ-002.*model\.safetensors.*400 bytes at 8, but 72 bytes"):
            read_tensor(tmp_path, StoredTensor(WEIGHTS, torch.float32, (100,), 8, 400))
