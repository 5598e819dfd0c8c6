"""Latency: artifact and float graph take turns in one process, so that both meet the same machine.

All of it together has some seconds, the recipe's: repeats end when they are steady or the time is over (verify/repeats.py).

Where other programs want the cores, that is not enough: how long a run waits for them is chance. Its processor time is not:
beside 16 others on two cores, that of MiniLM moved by 5 %, where the time on the clock was four times what it should be.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from qconvert.execution.probes import position_limit, vocabulary_size
from qconvert.ir.batch import Batch
from qconvert.ir.model import Model
from qconvert.ir.report import MOST_OF_OTHERS, Latency, Trial
from qconvert.ir.timing import Timing
from qconvert.ort.compare import feed, next_inputs
from qconvert.ort.pieces import PieceTimes, piece_count, times_in_pieces
from qconvert.ort.session import SessionSettings
from qconvert.targets import TARGETS
from qconvert.targets.cpu import CPU
from qconvert.verify.cores import CoreTimes, core_count, others_share
from qconvert.verify.repeats import Budget, in_turns, is_steady

PROMPT, NEW_TOKENS = 128, 32
ENCODER_BATCH, ENCODER_LENGTH = 16, 128
# To choose session settings takes fewer; they differ by more than this share of the time, or the default is kept.
TRIAL_REPEATS, TRIAL_TOKENS, NOISE = 3, 8, 0.05
# Shares of the time that is left: for the choice of settings; for the artifact before a float model in pieces, for the tokens
# that a decoder writes, and for the pieces.
TRIAL_SHARE, OWN_SHARE, TOKENS_SHARE, PIECES_SHARE = 0.3, 0.3, 0.2, 0.8
# How long it is looked what other programs do, before anything is timed.
LOOK_SECONDS = 0.2

OpenSession = Callable[[SessionSettings], Any]


@dataclass(frozen=True, slots=True)
class _Found:
    """What runs of the artifact took, and of the float model with the better of its settings, if there is one.

    steps: seconds of each token after a prompt. pieces, measured: of a float model that runs in pieces.
    """

    own: Timing
    other: Timing | None
    steps: list[float]
    pieces: int | None = None
    measured: int | None = None


def measure_latency(
    *, model: Model, artifact: OpenSession, baseline: OpenSession | None, batches: Sequence[Batch], target: str, seconds: float
) -> Latency:
    """Measure one run: a prefill of 128 tokens for decoders (of an encoder-decoder: a source of 128 tokens and the decoder's
    first), 16 x 128 tokens for encoders, a batch for modules. With the session settings that are fastest here.

    Decoders also report tokens per second of prefill and of greedy decoding (up to 32 tokens after the prompt). A model that
    takes fewer tokens is given fewer. Without a baseline, nothing is said about float.

    seconds: for all of it; each thing is measured once, even if that takes longer.

    On a busy machine (Latency.busy) the speedup is that of the processor time, and no settings are said to be the fastest.
    """
    begin, before, budget = time.perf_counter(), CoreTimes.now(), Budget.of(seconds)
    inputs, prompt, new_tokens = workload(model, batches)
    new_tokens = new_tokens if model.task.generates else 0
    candidates = _candidates(target)
    if _is_busy():  # no settings are the fastest then, and threads that spin take time from all
        candidates = [dataclasses.replace(candidates[0], spinning=False)]
    settings, trials = _fastest(artifact, inputs, new_tokens, candidates, budget.part(TRIAL_SHARE))
    measure = partial(_measured, artifact, baseline, inputs, new_tokens)
    found = measure(settings, budget)
    measured = Latency(
        target=target,
        status="passed",
        threads=settings.threads,
        spinning=settings.spinning,
        trials=trials if len(trials) > 1 else None,
        others_share=others_share(before),
        **_times(found),
        **(_rates(found, prompt) if new_tokens else {}),
    )
    if measured.busy:
        # Threads that spin would count.
        waiting = measure(dataclasses.replace(settings, spinning=False), budget) if settings.spinning and baseline else found
        measured = measured.model_copy(update={"trials": None, **_processor_times(waiting)})
    return measured.model_copy(update={"timing_seconds": time.perf_counter() - begin})


def _measured(
    artifact: OpenSession,
    baseline: OpenSession | None,
    inputs: Batch,
    new_tokens: int,
    settings: SessionSettings,
    budget: Budget,
) -> _Found:
    """Time artifact and float. Float gets these settings and the default: it is as fast as the better of the two."""
    choices = dict.fromkeys((settings, SessionSettings(core_count(), spinning=settings.spinning)))
    floats = [baseline(each) for each in choices] if baseline is not None else []
    measure = _in_pieces if any(map(piece_count, floats)) else _side_by_side
    return measure(partial(artifact, settings), floats, inputs, new_tokens, budget)


def _times(found: _Found) -> Mapping[str, Any]:
    """The fields of a Latency that say how long a run takes."""
    own, other = found.own, found.other
    fields: dict[str, Any] = {
        "repeats": own.repeats,
        "p25_ms": 1e3 * own.p25,
        "p50_ms": 1e3 * own.p50,
        "p75_ms": 1e3 * own.p75,
        "p95_ms": 1e3 * own.p95,
        "spread": (own.p75 - own.p25) / own.p50,
        "steady": is_steady(own) and (other is None or is_steady(other)),
    }
    if other is not None:
        fields |= {
            "float_repeats": other.repeats,
            "float_p25_ms": 1e3 * other.p25,
            "float_p50_ms": 1e3 * other.p50,
            "float_p75_ms": 1e3 * other.p75,
            "float_pieces": found.pieces,
            "float_pieces_measured": found.measured,
            "speedup": other.p50 / own.p50,
        }
    return fields


def _processor_times(found: _Found) -> Mapping[str, float | None]:
    """The fields of a Latency that say how long the cores work for a run, on all threads together."""
    if found.other is None:
        return {}
    own, other = found.own.worked, found.other.worked
    return {"processor_ms": 1e3 * own, "float_processor_ms": 1e3 * other, "speedup": other / own if own else None}


def _rates(found: _Found, prompt: int) -> Mapping[str, Any]:
    """The fields of a Latency that say how many tokens a decoder takes and gives in a second."""
    slow, middle, fast = np.percentile(found.steps, (75, 50, 25))
    return {
        "prefill_tokens_per_s": prompt / found.own.p50,
        "decode_tokens_per_s": 1 / float(middle),
        "decode_p25_tokens_per_s": 1 / float(slow),
        "decode_p75_tokens_per_s": 1 / float(fast),
        "decode_repeats": len(found.steps),
    }


def _side_by_side(artifact: Callable[[], Any], floats: Sequence[Any], inputs: Batch, new_tokens: int, budget: Budget) -> _Found:
    """Let artifact and float take turns, and the artifact then write tokens."""
    sessions = [artifact(), *floats]
    turns = budget.part(1 - TOKENS_SHARE if new_tokens else 1.0)
    own, *others = (each.timing for each in in_turns([_run_of(session, inputs) for session in sessions], turns))
    return _Found(
        own, min(others, key=lambda timing: timing.p50, default=None), _steps(sessions[0], inputs, new_tokens, budget)
    )


def _in_pieces(artifact: Callable[[], Any], floats: Sequence[Any], inputs: Batch, new_tokens: int, budget: Budget) -> _Found:
    """Time the artifact, then each piece of the float model, then the artifact again, as there is time: sessions of both at
    once would be twice the memory, and a machine may get busier meanwhile.
    """
    session = artifact()
    (own,) = in_turns([_run_of(session, inputs)], budget.part(OWN_SHARE))
    steps = _steps(session, inputs, new_tokens, budget.part(TOKENS_SHARE))
    del session
    float_times = _piece_times(floats[-1], inputs, budget.part(PIECES_SHARE))
    if not budget.is_over:
        own += in_turns([_run_of(artifact(), inputs)], budget, len(own.passed))[0]
    return _Found(own.timing, float_times.timing, steps, float_times.pieces, float_times.measured)


def _piece_times(session: Any, inputs: Batch, budget: Budget) -> PieceTimes:
    """How long a run of the float model takes, each of its pieces by itself. All have as much time, to be opened and run."""
    count = piece_count(session) or 1
    parts = iter([budget.part(number / count) for number in range(1, count + 1)])
    return times_in_pieces(session, feed(session, inputs), lambda run: in_turns([run], next(parts))[0].timing)


def _run_of(session: Any, inputs: Batch) -> Callable[[], object]:
    return partial(session.run, None, feed(session, inputs))


def _is_busy() -> bool:
    """Return whether other programs are at work now, as far as the system tells."""
    before = CoreTimes.now()
    time.sleep(LOOK_SECONDS)
    return (others_share(before) or 0.0) > MOST_OF_OTHERS


def _candidates(target: str) -> list[SessionSettings]:
    """The settings that are worth a try: all cores or half of them (the real ones, where two threads share one)."""
    cores = core_count()
    default = SessionSettings(cores, spinning=True)
    if TARGETS[target] is not CPU or cores == 1:
        return [default]
    return [default, SessionSettings(cores, spinning=False), SessionSettings(cores // 2, spinning=True)]


def _fastest(
    open_session: OpenSession,
    inputs: Batch,
    new_tokens: int,
    candidates: Sequence[SessionSettings],
    budget: Budget,
) -> tuple[SessionSettings, tuple[Trial, ...]]:
    """The fastest settings, and how long those took that were tried within the budget: the first, unless others save more
    than the noise of a machine.
    """
    trials: list[Trial] = []
    for settings in candidates if len(candidates) > 1 else ():
        if trials and budget.is_over:
            break
        session = open_session(settings)
        part = budget.part(1 / (len(candidates) - len(trials)))
        seconds = in_turns([_run_of(session, inputs)], part, TRIAL_REPEATS)[0].timing.p50
        if new_tokens:
            seconds += new_tokens * median(_steps(session, inputs, min(new_tokens, TRIAL_TOKENS), part))
        trials.append(Trial(threads=settings.threads, spinning=settings.spinning, ms=1e3 * seconds))
        del session  # two at once would be twice the memory
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


def _steps(session: Any, prompt: Batch, new_tokens: int, budget: Budget) -> list[float]:
    """Seconds of each token of greedy decoding after the prompt: of one, if there are any, whatever the budget."""
    inputs = feed(session, prompt)
    taken: list[float] = []
    for _ in range(new_tokens + 1 if new_tokens else 0):
        start = time.perf_counter()
        found = session.run(None, inputs)
        taken.append(time.perf_counter() - start)
        if len(taken) > 1 and budget.is_over:
            break
        inputs = next_inputs(session, inputs, found, found[0][:, -1:].argmax(-1))
    return taken[1:]
