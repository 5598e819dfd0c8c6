"""`logits: last`: a decoder that gives the logits of each row's last token alone, and is still compared at every position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_models import VOCABULARY, tiny_bert, tiny_llama

from qconvert import Recipe, convert
from qconvert.errors import ParityError, UsageError
from qconvert.graph.last_position import keep_last_position
from qconvert.ir.artifact import GRAPH
from qconvert.ir.report import Report
from qconvert.ort import session
from qconvert.ort.compare import largest_difference
from qconvert.ort.session import file_session

LENGTHS = (9, 6)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source") / "llama")


def converted(source: Path, output: Path, **settings: Any) -> Report:
    data = {"evaluation": {"samples": 4, "length": 32}}
    return convert(
        Recipe.from_settings({"model": str(source), "output": str(output), "scheme": "int4-g32", **data, **settings})
    )


def first_feeds(session: Any) -> dict[str, Any]:
    """Two rows of different length, padded on the right, without a cache."""
    ids = np.arange(2 * max(LENGTHS)).reshape(2, -1) * 7 % VOCABULARY
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    past = {v.name: np.zeros((2, v.shape[1], 0, v.shape[3]), np.float32) for v in session.get_inputs() if "past" in v.name}
    return {"input_ids": ids, "attention_mask": mask, **past}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel-a8"])
def test_each_row_gives_its_last_token_in_the_prompt_and_in_every_step_after_it(
    source: Path, scheme: str, tmp_path: Path
) -> None:
    rules = [{"pattern": "lm_head", "scheme": scheme}]
    outputs = {logits: tmp_path / logits for logits in ("all", "last")}
    for logits, output in outputs.items():
        converted(source, output, scheme=scheme, rules=rules, logits=logits, verify=False)
    every, last = (file_session(outputs[logits] / GRAPH) for logits in ("all", "last"))
    feeds = first_feeds(every)
    names = [value.name for value in every.get_outputs()]
    found, expected = (dict(zip(names, session.run(None, feeds), strict=True)) for session in (last, every))
    assert last.get_outputs()[0].shape == ["batch_size", 1, VOCABULARY]
    ends = np.array(LENGTHS) - 1
    assert largest_difference(found["logits"], expected["logits"][[0, 1], ends][:, None]) < 1e-6
    step = {
        "input_ids": np.array([[3], [4]]),
        "attention_mask": np.concatenate((feeds["attention_mask"], np.ones((2, 1), np.int64)), 1),
        **{name: expected[name.replace("past_key_values", "present")] for name in feeds if "past" in name},
    }
    assert largest_difference(last.run(["logits"], step)[0], every.run(["logits"], step)[0]) < 1e-6


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel-a8"])
def test_it_is_compared_at_every_position_and_measured_as_it_ships(source: Path, scheme: str, tmp_path: Path) -> None:
    settings = {"scheme": scheme, "rules": [{"pattern": "lm_head", "scheme": scheme}]}
    every = converted(source, tmp_path / "every", **settings)
    last = converted(source, tmp_path / "last", logits="last", **settings)
    assert last.passed
    assert last.fidelity == every.fidelity
    assert last.parity[0].max_relative_error == pytest.approx(every.parity[0].max_relative_error, rel=0.5)
    ops = [node.op_type for node in onnx.load(tmp_path / "last" / GRAPH, load_external_data=False).graph.node]
    assert ops.count("GatherND") == 2  # beside the one that moves padded rows back


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_graph_that_takes_the_wrong_token_is_found(
    source: Path, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(session.PROVIDERS, "cuda", session.PROVIDERS["cpu"])

    def take_the_first(graph: Any, head: str) -> None:
        keep_last_position(graph, head)
        next(node for node in graph if node.op_type == "ReduceMax").op_type = "ReduceMin"

    monkeypatch.setattr("qconvert.export.keep_last_position", take_the_first)
    with pytest.raises(ParityError, match="artifact is wrong"):
        converted(source, tmp_path / "out", logits="last", targets=[target])


@pytest.mark.usefixtures("quick")
def test_the_graph_for_cuda_gives_the_last_position_too(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU provider stands in for CUDA's; the plan has checked the graph against CUDA's kernels."""
    monkeypatch.setitem(session.PROVIDERS, "cuda", session.PROVIDERS["cpu"])
    report = converted(source, tmp_path / "out", logits="last", targets=["cuda"], layout="onnx")
    assert report.passed
    assert file_session(tmp_path / "out" / "model.cuda.onnx").get_outputs()[0].shape == ["batch_size", 1, VOCABULARY]


@pytest.mark.usefixtures("quick")
def test_onnxruntime_genai_writes_the_same_text(source: Path, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    texts = []
    for logits in ("all", "last"):
        converted(source, tmp_path / logits, logits=logits, verify=False)
        model = genai.Model(str(tmp_path / logits))
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=24, do_sample=False)
        generator = genai.Generator(model, settings)
        generator.append_tokens(np.arange(5, 12, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        texts.append(list(generator.get_sequence(0)))
    assert texts[0] == texts[1]


def test_only_decoders_have_a_last_position(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no decoder-only language model") as caught:
        converted(tiny_bert(tmp_path / "bert"), tmp_path / "out", scheme="int8-channel", logits="last")
    assert caught.value.code == "QC-PLAN-011"
