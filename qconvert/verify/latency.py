"""Latency: artifact and float graph take turns in one process, so that both meet the same machine.

Where other programs want the cores, that is not enough: how long a run waits for them is chance. Its processor time is not:
beside 16 others on two cores, that of MiniLM moved by 5 %, where the time on the clock was four times what it should be.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from qconvert.execution.probes import position_limit, vocabulary_size
from qconvert.ir.batch import Batch
from qconvert.ir.model import Model
from qconvert.ir.report import Latency, Trial
from qconvert.ort.compare import feed, next_inputs
from qconvert.ort.pieces import PieceTimes, piece_count, seconds_in_pieces
from qconvert.ort.session import SessionSettings
from qconvert.targets import TARGETS
from qconvert.targets.cpu import CPU
from qconvert.verify.cores import CoreTimes, others_share

PROMPT, NEW_TOKENS = 128, 32
ENCODER_BATCH, ENCODER_LENGTH = 16, 128
REPEATS, TURNS, PAUSE_SECONDS = 10, 2, 0.05
# To choose session settings takes fewer; they differ by more than this share of the time, or the default is kept.
TRIAL_REPEATS, TRIAL_TOKENS, NOISE = 4, 8, 0.05
# Of a piece of a float model that is too large to be run whole.
PIECE_REPEATS = 4
# A slow machine or a large model gets fewer repeats rather than a long wait; the second is for the choice of settings.
BUDGET_SECONDS, TRIAL_SECONDS = 30.0, 8.0

OpenSession = Callable[[SessionSettings], Any]


def measure_latency(
    model: Model, artifact: OpenSession, baseline: OpenSession | None, batches: Sequence[Batch], target: str
) -> Latency:
    """Measure p50 and p95 of one run: a prefill of 128 tokens for decoders (of an encoder-decoder: a source of 128 tokens and
    the decoder's first), 16 x 128 tokens for encoders, a batch for modules. With the session settings that are fastest here.

    Decoders also report tokens per second of prefill and of greedy decoding (32 tokens after the prompt). A model that
    takes fewer tokens is given fewer. Without a baseline, nothing is said about float; one that runs in pieces is timed
    piece by piece, after the artifact.

    On a busy machine (Latency.busy) the speedup is that of the processor time, and no settings are said to be the fastest.
    """
    before = CoreTimes.now()
    inputs, prompt, new_tokens = workload(model, batches)
    decoder = model.task.generates
    settings, trials = _fastest(artifact, inputs, new_tokens if decoder else 0, _candidates(target))
    # Float gets these settings and the default: it is as fast as the better of the two.
    settings_of_float = dict.fromkeys((settings, _candidates(target)[0])) if baseline is not None else ()
    floats = [baseline(each) for each in settings_of_float if baseline is not None]
    in_pieces = any(piece_count(session) for session in floats)
    sessions = [artifact(settings), *([] if in_pieces else floats)]
    times = _in_turns([partial(session.run, None, feed(session, inputs)) for session in sessions], REPEATS, time.perf_counter)
    p50 = median(times[0])
    step_seconds = _step_seconds(sessions[0], inputs, new_tokens) if decoder else None
    del sessions  # those that follow take as much memory
    float_times = _piece_times(floats[-1], inputs, time.perf_counter) if in_pieces else None
    float_p50 = min(map(median, times[1:]), default=float_times.seconds if float_times else None)
    measured = Latency(
        target=target,
        status="passed",
        threads=settings.threads,
        spinning=settings.spinning,
        prefill_tokens_per_s=prompt / p50 if decoder else None,
        decode_tokens_per_s=None if step_seconds is None else 1 / step_seconds,
        p50_ms=1e3 * p50,
        p95_ms=1e3 * float(np.percentile(times[0], 95)),
        float_p50_ms=None if float_p50 is None else 1e3 * float_p50,
        float_pieces=float_times and float_times.pieces,
        float_pieces_measured=float_times and float_times.measured,
        speedup=None if float_p50 is None else float_p50 / p50,
        trials=trials if len(trials) > 1 else None,
        spread=float(np.subtract(*np.percentile(times[0], (75, 25)))) / p50,
        others_share=others_share(before),
    )
    if not measured.busy:
        return measured
    return measured.model_copy(update={"trials": None, **_processor_times(artifact, baseline, settings, inputs)})


def _processor_times(
    artifact: OpenSession, baseline: OpenSession | None, settings: SessionSettings, inputs: Batch
) -> dict[str, float | None]:
    """Milliseconds of processor time of one run, on all threads together. None of them spins: it would count."""
    if baseline is None:
        return {}
    waiting = dataclasses.replace(settings, spinning=False)
    float_session = baseline(waiting)
    sessions = [artifact(waiting), *([] if piece_count(float_session) else [float_session])]
    # The mean, of a clock that may tick once in several runs.
    times = _in_turns([partial(session.run, None, feed(session, inputs)) for session in sessions], REPEATS, time.process_time)
    own, *others = map(fmean, times)
    del sessions  # the artifact, before pieces are opened
    float_own = others[0] if others else _piece_times(float_session, inputs, time.process_time).seconds
    return {"processor_ms": 1e3 * own, "float_processor_ms": 1e3 * float_own, "speedup": float_own / own if own else None}


def _piece_times(session: Any, inputs: Batch, clock: Callable[[], float]) -> PieceTimes:
    """How long a run of the float model takes, each of its pieces by itself."""
    return seconds_in_pieces(session, feed(session, inputs), lambda run: fmean(_in_turns([run], PIECE_REPEATS, clock)[0]))


def _candidates(target: str) -> list[SessionSettings]:
    """The settings that are worth a try: all cores or half of them (the real ones, where two threads share one)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if TARGETS[target] is not CPU or cores == 1:
        return [SessionSettings(cores)]
    return [SessionSettings(cores), SessionSettings(cores, spinning=False), SessionSettings(cores // 2)]


def _fastest(
    open_session: OpenSession, inputs: Batch, new_tokens: int, candidates: Sequence[SessionSettings]
) -> tuple[SessionSettings, tuple[Trial, ...]]:
    """The fastest settings, and how long all took: the first, unless another saves more than the noise of a machine."""
    trials = []
    for settings in candidates if len(candidates) > 1 else ():
        session = open_session(settings)
        call = partial(session.run, None, feed(session, inputs))
        seconds = median(_in_turns([call], TRIAL_REPEATS, time.perf_counter, TRIAL_SECONDS)[0])
        if new_tokens:
            seconds += new_tokens * _step_seconds(session, inputs, min(new_tokens, TRIAL_TOKENS))
        trials.append(Trial(threads=settings.threads, spinning=settings.spinning, ms=1e3 * seconds))
        del session, call  # two at once would be twice the memory
    best = min(range(len(trials)), key=lambda index: trials[index].ms, default=0)
    if trials and trials[best].ms > (1 - NOISE) * trials[0].ms:
        best = 0
    return candidates[best], tuple(trials)


def workload(model: Model, batches: Sequence[Batch]) -> tuple[Batch, int, int]:
    """Return (what one run is given, tokens of the prompt, tokens to decode after it)."""
    limit = position_limit(model) or PROMPT + NEW_TOKENS
    new_tokens = min(NEW_TOKENS, limit // 4)
    prompt, length = min(PROMPT, limit - new_tokens), min(ENCODER_LENGTH, limit)
    if model.task.continues_prompts:
        ids = (torch.arange(prompt)[None] * 7919 + 5) % vocabulary_size(model)
        inputs: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif model.task.reads_source:
        ids = (torch.arange(prompt)[None] * 7919 + 5) % vocabulary_size(model)
        start = torch.tensor([[model.decoder_start]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": start}
    elif model.task.takes_text:
        ids = (torch.arange(ENCODER_BATCH * length).reshape(ENCODER_BATCH, -1) * 7919 + 5) % vocabulary_size(model)
        inputs = {name: torch.zeros_like(ids) for name in model.input_names}
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        inputs = batches[0]
    return inputs, prompt, new_tokens


def _in_turns(
    calls: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float], budget: float = BUDGET_SECONDS
) -> list[list[float]]:
    """Seconds of each call by a clock, after one that warms up; a few of one, then a few of the other, and the same again.

    In between is a pause: until the idle threads of one session stop spinning, they take cores from the other.
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    for turn in range(TURNS):
        for taken, call in zip(times, calls, strict=True):
            time.sleep(PAUSE_SECONDS)
            for _ in range(turn, repeats, TURNS):
                start = clock()
                call()
                taken.append(clock() - start)
                if time.perf_counter() - begin > budget:
                    break
    return times


def _step_seconds(session: Any, prompt: Batch, new_tokens: int) -> float:
    """Seconds per token of greedy decoding after the prompt."""
    inputs = feed(session, prompt)
    taken = []
    for _ in range(new_tokens + 1):
        start = time.perf_counter()
        found = session.run(None, inputs)
        taken.append(time.perf_counter() - start)
        inputs = next_inputs(session, inputs, found, found[0][:, -1:].argmax(-1))
    return median(taken[1:])
