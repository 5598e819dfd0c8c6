"""What a KV cache in codes loses: the graph as it ships against the same graph with its caches in float, at long context."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from qconvert.execution.probes import position_limit
from qconvert.graph.cache_codes import drop_cache_codes
from qconvert.graph.last_position import restore_all_positions
from qconvert.ir.batch import Batch
from qconvert.ir.model import Model
from qconvert.ir.report import CacheLoss
from qconvert.ort.compare import feed, next_inputs
from qconvert.ort.session import SessionSettings, memory_session
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.verify.fidelity import TokenMeter
from qconvert.verify.last_position import session_at_all_positions

# Of a window, and how many are run at most; each goes through in runs of so many tokens, on the cache of those before.
CONTEXT, WINDOWS, RUN = 2048, 4, 256
# No window is begun after that.
BUDGET_SECONDS = 60.0


def measure_cache_loss(
    artifact: ArtifactReader, path: Path, samples: Sequence[Batch], settings: SessionSettings
) -> CacheLoss | None:
    """Run both graphs on windows of the evaluation samples, joined; None where these hold too few tokens to read a cache.

    path: the graph, with its cache in codes.
    """
    windows = _windows(artifact.model, samples)
    coded = session_at_all_positions(path, "cpu", settings)
    floats = float_cache_session(artifact, path, settings)
    begin, meter, done = time.monotonic(), TokenMeter(), 0
    for window in windows:
        if done and time.monotonic() - begin > BUDGET_SECONDS:
            break
        _follow(window, coded, floats, meter)
        done += 1
    if not done:
        return None
    found = meter.result("cpu")
    return CacheLoss(
        context=len(windows[0]),
        windows=done,
        kl=found.kl,
        top1=found.top1,
        perplexity=found.perplexity,
        perplexity_float_cache=found.perplexity_float,
    )


def float_cache_session(artifact: ArtifactReader, path: Path, settings: SessionSettings) -> Any:
    """Open a session over a graph at all positions, its caches in float."""
    model = onnx_ir.load(path)
    restore_all_positions(model.graph)
    drop_cache_codes(model.graph)
    return memory_session(model, artifact.read, settings, folder=path.parent)


def _windows(model: Model, samples: Sequence[Batch]) -> list[torch.Tensor]:
    """Windows of token ids of one length, as long as they may be: CONTEXT, the model's positions, or all that there is."""
    ids = torch.cat([row["input_ids"][0] for row in model.single_rows(samples)])
    length = min(CONTEXT, position_limit(model) or CONTEXT, len(ids))
    count = min(WINDOWS, len(ids) // length)
    return list(ids[: count * length].split(length)) if length > 1 else []


def _follow(window: torch.Tensor, coded: Any, floats: Any, meter: TokenMeter) -> None:
    """Run a window through both graphs, each on its own cache, and compare the logits."""
    inputs: list[dict[str, Any]] = []
    found: list[list[Any]] = []
    for part in _runs(window):
        batch = {"input_ids": part[None], "attention_mask": torch.ones_like(part)[None]}
        tokens = part[None].numpy()
        if not inputs:
            inputs = [feed(session, batch) for session in (coded, floats)]
        else:
            inputs = [next_inputs(*run, tokens) for run in zip((coded, floats), inputs, found, strict=True)]
        found = [session.run(None, each) for session, each in zip((coded, floats), inputs, strict=True)]
        logits = [torch.from_numpy(outputs[0]) for outputs in found]
        meter.update(logits[0], logits[1], batch)


def _runs(window: torch.Tensor) -> Iterator[torch.Tensor]:
    """The runs of a window, half of it at most: even a short one is read from the cache."""
    yield from window.split(min(RUN, -(-len(window) // 2)))
