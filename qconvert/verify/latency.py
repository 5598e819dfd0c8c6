"""Latency: artifact and float graph alternate in one process, so that both meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from qconvert.ir.agreement import feed, next_inputs, position_limit, vocabulary_size
from qconvert.ir.layer import Batch
from qconvert.ir.model import Model
from qconvert.ir.report import Latency

PROMPT, NEW_TOKENS = 128, 32
ENCODER_BATCH, ENCODER_LENGTH = 16, 128
REPEATS = 10
# A slow machine or a large model gets fewer repeats rather than a long wait.
BUDGET_SECONDS = 30.0


def measure_latency(
    model: Model, artifact: Any, baseline: Any | None, batches: Sequence[Batch], target: str, threads: int
) -> Latency:
    """p50 and p95 of one run: a prefill of 128 tokens for decoders (of an encoder-decoder: a source of 128 tokens and the
    decoder's first), 16 x 128 tokens for encoders, a batch for modules.

    Decoders also report tokens per second of prefill and of greedy decoding (32 tokens after the prompt). A model that
    takes fewer tokens is given fewer. Without a baseline, nothing is said about float.
    """
    inputs, prompt, new_tokens = workload(model, batches)
    sessions = [artifact] if baseline is None else [artifact, baseline]
    times = _alternate([partial(session.run, None, feed(session, inputs)) for session in sessions])
    p50, float_p50 = median(times[0]), median(times[1]) if baseline is not None else None
    decoder = model.task in ("causal-lm", "seq2seq-lm")
    return Latency(
        target=target,
        status="passed",
        threads=threads,
        prefill_tokens_per_s=prompt / p50 if decoder else None,
        decode_tokens_per_s=_decode_speed(artifact, inputs, new_tokens) if decoder else None,
        p50_ms=1e3 * p50,
        p95_ms=1e3 * float(np.percentile(times[0], 95)),
        float_p50_ms=None if float_p50 is None else 1e3 * float_p50,
        speedup=None if float_p50 is None else float_p50 / p50,
    )


def workload(model: Model, batches: Sequence[Batch]) -> tuple[Batch, int, int]:
    """(what one run is given, tokens of the prompt, tokens to decode after it)."""
    limit = position_limit(model) or PROMPT + NEW_TOKENS
    new_tokens = min(NEW_TOKENS, limit // 4)
    prompt, length = min(PROMPT, limit - new_tokens), min(ENCODER_LENGTH, limit)
    if model.task == "causal-lm":
        ids = (torch.arange(prompt)[None] * 7919 + 5) % vocabulary_size(model)
        inputs: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif model.task == "encoder":
        ids = (torch.arange(ENCODER_BATCH * length).reshape(ENCODER_BATCH, -1) * 7919 + 5) % vocabulary_size(model)
        inputs = {name: torch.zeros_like(ids) for name in model.input_names}
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif model.task == "seq2seq-lm":
        ids = (torch.arange(prompt)[None] * 7919 + 5) % vocabulary_size(model)
        start = torch.tensor([[model.decoder_start]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": start}
    else:
        inputs = batches[0]
    return inputs, prompt, new_tokens


def _alternate(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each call, taken in turns after one warm-up each."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    for _ in range(REPEATS):
        for taken, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        if time.perf_counter() - begin > BUDGET_SECONDS:
            break
    return times


def _decode_speed(session: Any, prompt: Batch, new_tokens: int) -> float:
    """Tokens per second of greedy decoding after the prompt."""
    inputs = feed(session, prompt)
    taken = []
    for _ in range(new_tokens + 1):
        start = time.perf_counter()
        found = session.run(None, inputs)
        taken.append(time.perf_counter() - start)
        inputs = next_inputs(session, inputs, found, found[0][:, -1:].argmax(-1))
    return 1 / median(taken[1:])
