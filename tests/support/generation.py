"""Greedy text of tiny language models: in torch on the dequantized weights, in ONNX Runtime and in onnxruntime-genai."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from qconvert.execution.materialize import materialize
from qconvert.ir.artifact import GRAPH
from qconvert.ort.session import file_session
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.targets import graph_files

PROMPT, NEW = [5, 17, 3, 60, 8, 2, 33, 41, 12], 24


def keep_activations_float(artifact: ArtifactReader) -> None:
    """Set accuracy level 1: MatMulNBits then rounds no activations, and computes what torch does."""
    for file in graph_files(artifact.model.task).values():
        keep_activations_of_graph_float(artifact.folder / file)


def keep_activations_of_graph_float(path: Path) -> None:
    graph = onnx.load(path, load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(graph, path)


def torch_tokens(artifact: ArtifactReader, prompt: list[int] = PROMPT, new: int = NEW) -> list[int]:
    """Greedy, on the dequantized weights, without a cache."""
    model, tokens = artifact.model, list(prompt)
    with torch.no_grad(), ExitStack() as weights:
        for unit in ("", *model.blocks):
            weights.enter_context(materialize(model, unit, artifact.read))
        for _ in range(new):
            ids = torch.tensor([tokens])
            logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def onnxruntime_tokens(
    artifact: ArtifactReader, prompt: list[int] = PROMPT, new: int = NEW, piece: int | None = None
) -> list[int]:
    """Greedy, with the KV cache going out of one step and into the next.

    piece: how many tokens of the prompt are read at once; None for all.
    """
    session = file_session(artifact.folder / GRAPH)
    names = [output.name for output in session.get_outputs()]
    past = _empty_cache(session)
    tokens, read = list(prompt), 0
    while len(tokens) < len(prompt) + new:
        fed = tokens[read:][:piece]
        read += len(fed)
        feeds = {"input_ids": np.array([fed]), "attention_mask": np.ones((1, read), np.int64), **past}
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        if read == len(tokens):
            tokens.append(int(outputs["logits"][0, -1].argmax()))
    return tokens[len(prompt) :]


def torch_logits(artifact: ArtifactReader, tokens: list[int]) -> np.ndarray[Any, Any]:
    """[tokens, vocabulary] on the dequantized weights, without a cache."""
    ids = torch.tensor([tokens])
    with torch.no_grad(), ExitStack() as weights:
        for unit in ("", *artifact.model.blocks):
            weights.enter_context(materialize(artifact.model, unit, artifact.read))
        return artifact.model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].numpy()  # type: ignore[no-any-return]


def onnxruntime_logits(folder: Path, tokens: list[int], prompt: int, step: int = 1) -> np.ndarray[Any, Any]:
    """[tokens, vocabulary]: the first `prompt` tokens at once, `step` of the others at a time, through the KV cache."""
    session = file_session(folder / GRAPH)
    names = [output.name for output in session.get_outputs()]
    past = _empty_cache(session)
    found = []
    for start, end in pairwise([0, *range(prompt, len(tokens), step), len(tokens)]):
        feeds = {"input_ids": np.array([tokens[start:end]]), "attention_mask": np.ones((1, end), np.int64), **past}
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        found.append(outputs["logits"][0])
    return np.concatenate(found)


def _empty_cache(session: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {
        each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.int8 if each.type == "tensor(int8)" else np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past")
    }


def genai_tokens(artifact: ArtifactReader, prompt: list[int] = PROMPT, new: int = NEW, piece: int | None = None) -> list[int]:
    return genai_batch(artifact, np.array([prompt], np.int32), new, piece)[0]


def genai_batch(
    artifact: ArtifactReader, prompts: np.ndarray[Any, Any], new: int = NEW, piece: int | None = None
) -> list[list[int]]:
    """What follows each row of `prompts` [rows, tokens]. piece: how many of these tokens are read at once; None for all."""
    genai = pytest.importorskip("onnxruntime_genai")
    rows, length = prompts.shape
    model = genai.Model(str(artifact.folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=length + new, do_sample=False, batch_size=rows)
    generator = genai.Generator(model, settings)
    for start in range(0, length, piece or length):
        generator.append_tokens(prompts[:, start:][:, :piece])
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)][length:] for row in range(rows)]


def torch_answer(
    artifact: ArtifactReader, tokens: list[int], new: int, source: list[int] = PROMPT
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """An encoder-decoder without a cache: `new` greedy tokens behind `tokens`, and the logits of all that it was given."""
    model, given = artifact.model, list(tokens)
    with torch.no_grad(), ExitStack() as weights:
        for unit in ("", *model.blocks):
            weights.enter_context(materialize(model, unit, artifact.read))
        for _ in range(new + 1):
            ids = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([given])}
            logits = model.module(**ids, use_cache=False).logits[0]
            given.append(int(logits[-1].argmax()))
    return given[len(tokens) : -1], logits.numpy()


def onnxruntime_answer(
    artifact: ArtifactReader, tokens: list[int], new: int, steps: tuple[int, ...] = (), source: list[int] = PROMPT
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """The same with the graphs alone: the source is read once, then `steps` of the tokens at a time, on the cache.

    steps: how many of `tokens` each run is given; () for all at once.
    """
    encoder, decoder = (file_session(artifact.folder / file) for file in graph_files(artifact.model.task).values())
    ids = np.array([source])
    encoded = zip(
        (each.name for each in encoder.get_outputs()),
        encoder.run(None, {"input_ids": ids, "attention_mask": ids * 0 + 1}),
        strict=True,
    )
    kept = {name: value for name, value in encoded if name.startswith("cross_key_values.")} | {
        "encoder_attention_mask": ids * 0 + 1
    }
    names, past = [each.name for each in decoder.get_outputs()], _empty_cache(decoder)
    found: list[np.ndarray[Any, Any]] = []
    waiting, answer = list(tokens), []
    for count in (*(steps or (len(tokens),)), *[1] * new):
        fed, waiting = waiting[:count], waiting[count:]
        outputs = dict(zip(names, decoder.run(None, {"input_ids": np.array([fed]), **kept, **past}), strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        found.append(outputs["logits"][0])
        if not waiting:
            answer.append(int(found[-1][-1].argmax()))
            waiting = answer[-1:]
    return answer[:new], np.concatenate(found)
