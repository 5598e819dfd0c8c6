"""An int8 KV cache beside a float one, on SmolLM2 in int4: how fast, how large, and what is lost at 2048 tokens.

Both with one body for all runs, and with another one for prompts. Everything is measured in one process, all taking turns,
one thread each. Processor time, least of several.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qconvert import Recipe, convert
from qconvert.ir.artifact import GRAPH
from qconvert.ort.compare import feed, next_inputs
from qconvert.ort.session import SessionSettings, file_session

KINDS: dict[str, dict[str, str]] = {
    "float": {"kv_cache": "float"},
    "int8": {"kv_cache": "int8"},
    "float, int8 prompts": {"kv_cache": "float", "prefill": "int8"},
    "int8, int8 prompts": {"kv_cache": "int8", "prefill": "int8"},
}
CONTEXTS = (128, 1024, 2048)
STEPS, PROMPTS = 12, 2
PIECE = 128  # of a prompt, that is read on the cache of what was before it
VOCABULARY = 49152


@pytest.fixture(scope="module")
def folders(models: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The artifact of each kind; head and embedding are quantized too. What they lose is printed on the way."""
    found = {}
    for kind, settings in KINDS.items():
        output = tmp_path_factory.mktemp("caches") / kind
        report = convert(
            Recipe.from_settings(
                {
                    "model": str(models / "smollm2-offgrid"),
                    "output": output,
                    "scheme": "int4-g32",
                    "layout": "onnx",
                    **settings,
                    "rules": [{"pattern": name, "scheme": "int4-g32"} for name in ("lm_head", "model.embed_tokens")],
                    "calibration": {"source": str(data / "calibration.txt")},
                    "evaluation": {"source": str(data / "evaluation.txt"), "samples": 4, "length": 2048},
                }
            )
        )
        (measured,) = report.fidelity
        print(f"\n{kind}: against the float model at 2048 tokens KL {measured.kl:.4f}, perplexity {measured.perplexity:.2f}")
        if report.kv_cache is not None:
            print(f"{kind}: {report.kv_cache}")
        found[kind] = output
    return found


def test_speed(folders: dict[str, Path]) -> None:
    """In plain ONNX Runtime, which copies the cache in every step."""
    settings = SessionSettings(threads=1, spinning=False)
    sessions = {kind: file_session(folder / GRAPH, settings=settings) for kind, folder in folders.items()}
    for context in CONTEXTS:
        ids = (torch.arange(context)[None] * 7919 + 5) % VOCABULARY
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs = {kind: feed(session, batch) for kind, session in sessions.items()}
        found: dict[str, Any] = {}

        def prompt(kind: str, inputs: Any = inputs, found: Any = found) -> None:
            found[kind] = sessions[kind].run(None, inputs[kind])

        prompts = _least(prompt, PROMPTS)
        later = []
        for count, repeats in ((1, STEPS), (PIECE, PROMPTS)):
            new = np.arange(count)[None] + 7
            steps = {kind: next_inputs(session, inputs[kind], found[kind], new) for kind, session in sessions.items()}
            later.append(_least(lambda kind, steps=steps: sessions[kind].run(None, steps[kind]), repeats))  # type: ignore[misc]
        nbytes = {kind: sum(value.nbytes for value in outputs[1:]) for kind, outputs in found.items()}
        _print("onnxruntime", context, {"prompt": prompts, "step": later[0], f"piece of {PIECE}": later[1]})
        print(f"{context} tokens: the cache is {nbytes['int8'] / nbytes['float']:.3f} of {nbytes['float'] / 1e6:.1f} MB")


def test_speed_in_genai(folders: dict[str, Path]) -> None:
    """In onnxruntime-genai, where a step writes into the cache that it reads."""
    genai = pytest.importorskip("onnxruntime_genai")
    options = '{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}'
    opened = {}
    for kind, folder in folders.items():
        config = genai.Config(str(folder))
        config.overlay(options)
        opened[kind] = genai.Model(config)
    for context in CONTEXTS:
        ids = ((np.arange(context) * 7919 + 5) % VOCABULARY).astype(np.int32)
        generators: dict[str, Any] = {}

        def prompt(kind: str, ids: Any = ids, generators: Any = generators) -> None:
            settings = genai.GeneratorParams(opened[kind])
            settings.set_search_options(max_length=len(ids) + 3 * STEPS, do_sample=False)
            generators[kind] = genai.Generator(opened[kind], settings)
            generators[kind].append_tokens(ids)

        prompts = _least(prompt, PROMPTS)
        tokens = _least(lambda kind, generators=generators: generators[kind].generate_next_token(), STEPS)  # type: ignore[misc]
        _print("onnxruntime-genai", context, {"prompt": prompts, "step": tokens})


def _least(call: Callable[[str], object], repeats: int) -> dict[str, float]:
    """The least processor seconds of a call for each kind, after one that warms up."""
    least = dict.fromkeys(KINDS, float("inf"))
    for repeat in range(repeats + 1):
        for kind in KINDS:
            start = time.process_time()
            call(kind)
            if repeat:
                least[kind] = min(least[kind], time.process_time() - start)
    return least


def _print(what: str, context: int, measured: dict[str, dict[str, float]]) -> None:
    """measured: seconds of each kind, by what takes them."""
    print(f"\n{what}, {context} tokens, ms and speed beside a float cache and one body")
    for kind in KINDS:
        words = (f"{name} {1e3 * of[kind]:.1f}, {of['float'] / of[kind]:.2f} x" for name, of in measured.items())
        print(f"{kind}: {'; '.join(words)}")
