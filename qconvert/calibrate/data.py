"""Drawing the samples: which data calibrates the model and which judges it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import cast

import torch
from torch import Tensor

from qconvert.calibrate.records import read_arrays, read_records
from qconvert.errors import InputError, UsageError
from qconvert.execution.probes import position_limit
from qconvert.ir.batch import BATCH_ROWS, BATCH_TOKENS, Batch, row_count
from qconvert.ir.data_source import ARRAYS_SUFFIX, BUILTIN
from qconvert.ir.model import Model
from qconvert.ir.samples import Samples
from qconvert.recipe import Recipe
from qconvert.recipe.fields import DataSpec

MIN_CHARACTERS = 4_000_000  # of a long text only the beginning is read, about a million tokens
CHARACTERS_PER_TOKEN = 16  # generous, so that a request for very many tokens reads on

# One sample without its batch axis, by input name, and what all samples share as it is.
Row = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Pool:
    """The rows that one source offers, without repetitions.

    origin: the source, for messages.
    rows: what tells rows apart -> row, in the source's order. Two rows with the same key are never told apart: at most one of
        them is used, on one side of the split.
    windowed: rows are pieces of running text, to be joined and cut into windows.
    """

    origin: str
    rows: Mapping[bytes, Row]
    windowed: bool


def read_samples(
    model: Model, recipe: Recipe, calibrated: bool, third_party: Callable[[str], Path | None] = lambda source: None
) -> Samples:
    """Draw the calibration and evaluation samples of a run; the same recipe and data always give the same.

    The evaluation samples are drawn first, so that they are the same whatever is calibrated; what they were drawn from
    (a record of text, a row) is then left out of calibration, even where it occurs again in another file.
    Running text is tokenized record by record, joined and cut into windows of `length` tokens; for an encoder or an
    encoder-decoder, which is to give its source again, each record is one sample, truncated to `length`.

    calibrated: whether calibration samples are needed. Where neither they nor a verification are, nothing is read.
    third_party: asked first for every source that the recipe names; returns None for one that is not its own.

    Raises UsageError QC-DATA-002 (source not of a kind that the model can use), QC-DATA-004 (fewer samples than
    requested), QC-DATA-005 (samples longer than the model's positions), QC-DATA-007 (text, but no tokenizer); InputError
    QC-DATA-001 and -003 (damaged data), QC-DATA-006 (token ids that the model does not have), QC-DATA-008 (arrays that
    are not the model's inputs).
    """
    if not (calibrated or recipe.verify):
        return Samples((), ())
    if model.task.takes_text:
        _check_lengths(model, recipe)

    def resolved(source: str | None) -> str | None:
        return source and str(third_party(source) or source)

    judging = resolved(recipe.evaluation.source or recipe.calibration.source)
    pool = _read_pool(model, recipe, judging)
    evaluation, used = _draw(pool, recipe.evaluation, "evaluation", recipe.seed, frozenset())
    sources, calibration = {"evaluation": judging}, list[Row]()
    if calibrated:
        sources["calibration"] = resolved(recipe.calibration.source)
        if sources["calibration"] != judging:
            pool = _read_pool(model, recipe, sources["calibration"])
        calibration, _ = _draw(pool, recipe.calibration, "calibration", recipe.seed, used)
    files = {role: Path(source) for role, source in sources.items() if source not in (None, BUILTIN)}
    return Samples(tuple(_batches(model, calibration)), tuple(_batches(model, evaluation)), files)


def _check_lengths(model: Model, recipe: Recipe) -> None:
    positions = position_limit(model)
    for role, spec in (("calibration", recipe.calibration), ("evaluation", recipe.evaluation)):
        if positions and spec.length > positions:
            raise UsageError(
                "QC-DATA-005",
                f"{role}.length is {spec.length} tokens, but {model.name!r} has {positions} positions",
                hint=f"set {role}.length to at most {positions} in the recipe",
            )


def _read_pool(model: Model, recipe: Recipe, source: str | None) -> _Pool:
    origin = source or ("the factory's example inputs" if not model.task.takes_text else BUILTIN)
    if source is not None and source.endswith(ARRAYS_SUFFIX):
        rows = _module_rows(model, source) if not model.task.takes_text else _token_rows(model, source)
        windowed = False
    elif not model.task.takes_text:
        if source is not None:
            raise UsageError(
                "QC-DATA-002",
                f"{source!r} can't feed a module",
                hint=f"give a {ARRAYS_SUFFIX} file with {', '.join(model.input_names)}",
            )
        rows, windowed = _split_rows(model, model.example_inputs), False
    else:
        windowed = model.task.continues_prompts
        rows = _text_rows(model, recipe, origin, windowed)
    unique: dict[bytes, Row] = {}
    compared = min(recipe.calibration.length, recipe.evaluation.length)
    for row in rows:
        # A text sample may be truncated, so what lies beyond makes no difference.
        content = [row["input_ids"][:compared]] if "input_ids" in row else list(row.values())
        unique.setdefault(b"".join(value.numpy().tobytes() for value in content), row)
    return _Pool(origin, unique, windowed)


def _text_rows(model: Model, recipe: Recipe, origin: str, windowed: bool) -> Iterator[Row]:
    if model.encode_text is None:
        raise UsageError(
            "QC-DATA-007",
            f"{model.name!r} came without a tokenizer, so the text of {origin!r} can't be used",
            hint=f"put the tokenizer's files beside the checkpoint, or give a {ARRAYS_SUFFIX} file with 'input_ids'",
        )
    specs = (recipe.calibration, recipe.evaluation)
    piece = min(spec.length for spec in specs)
    room = max(MIN_CHARACTERS, CHARACTERS_PER_TOKEN * sum(spec.samples * spec.length for spec in specs))
    for record in read_records(origin):
        # Line ends are part of running text; records are where it may be cut.
        text = f"{record.strip()}\n" if windowed else record.strip()
        ids = _checked_ids(model, torch.tensor(model.encode_text(text[:room]), dtype=torch.int64), origin)
        if windowed:
            yield from ({"input_ids": part} for part in torch.split(ids, piece) if len(part))
        elif len(ids):
            yield {"input_ids": ids}
        room -= len(text)
        if room <= 0:
            return


def _token_rows(model: Model, source: str) -> Iterator[Row]:
    """Rows of ready-made token ids, what the attention mask leaves out removed."""
    arrays = read_arrays(source)
    shapes = {name: f"{value.dtype} {list(value.shape)}".removeprefix("torch.") for name, value in arrays.items()}
    ids = arrays.get("input_ids")
    mask = arrays.get("attention_mask", torch.ones_like(ids) if ids is not None else None)
    known = arrays.keys() <= {"input_ids", "attention_mask"}
    if ids is None or mask is None or not known or ids.dim() != 2 or ids.is_floating_point() or mask.shape != ids.shape:
        raise InputError(
            "QC-DATA-008",
            f"{source!r} holds {shapes}, which are not inputs of {model.name!r}",
            hint="give 'input_ids' [rows, tokens] of integers and, optionally, 'attention_mask' of the same shape",
        )
    for row, kept in zip(ids.to(torch.int64), mask.bool(), strict=True):
        if kept.any():
            yield {"input_ids": _checked_ids(model, row[kept], source)}


def _checked_ids(model: Model, ids: Tensor, origin: str) -> Tensor:
    embedding = model.module.get_input_embeddings()  # type: ignore[operator]
    rows = cast(int, embedding.weight.shape[0])
    outside = sorted(set(ids[(ids < 0) | (ids >= rows)].tolist()))
    if outside:
        raise InputError(
            "QC-DATA-006",
            f"{origin!r}: token ids {', '.join(map(str, outside[:5]))} ({len(outside)} different ones in one record) "
            f"are not among the {rows} rows of the embedding of {model.name!r}",
            hint="use the tokenizer that the checkpoint was trained with",
        )
    return ids


def _module_rows(model: Model, source: str) -> Iterator[Row]:
    arrays = read_arrays(source)
    examples = model.example_inputs
    if arrays.keys() != examples.keys():
        raise InputError(
            "QC-DATA-008",
            f"{source!r} holds the arrays {sorted(arrays)}, but {model.name!r} takes {sorted(examples)}",
            hint="name the arrays as the inputs of the module's forward",
        )
    for name, value in arrays.items():
        example, shared = examples[name], name in model.shared_inputs
        shape = value.shape if shared else value.shape[1:]
        expected = example.shape if shared else example.shape[1:]
        fits = shape == expected and value.is_floating_point() == example.is_floating_point() and bool(shared or value.dim())
        if not fits or not value.isfinite().all():
            raise InputError(
                "QC-DATA-008",
                f"{source!r}: the array {name!r} is {value.dtype} {list(value.shape)}{' with NaN or Inf' if fits else ''}, "
                f"but {model.name!r} takes {example.dtype} {list(expected) if shared else ['rows', *expected]}",
                hint="give one row per sample, finite and of the same shape as the factory's example inputs",
            )
    counts = {name: len(value) for name, value in arrays.items() if name not in model.shared_inputs}
    if len(set(counts.values())) > 1:
        raise InputError(
            "QC-DATA-008", f"{source!r}: the arrays have different numbers of rows: {counts}", hint="give one row per sample"
        )
    return _split_rows(model, {name: arrays[name].to(example.dtype) for name, example in examples.items()})


def _split_rows(model: Model, inputs: Mapping[str, Tensor]) -> Iterator[Row]:
    for row in range(row_count(inputs)):
        yield {name: value if name in model.shared_inputs else value[row] for name, value in inputs.items()}


def _draw(pool: _Pool, spec: DataSpec, role: str, seed: int, excluded: frozenset[bytes]) -> tuple[list[Row], frozenset[bytes]]:
    """`spec.samples` rows of the pool and the keys of all that they were made of; `excluded` keys are not used."""
    rows = {key: row for key, row in pool.rows.items() if key not in excluded}
    keys = list(rows)
    stream = torch.cat([row["input_ids"] for row in rows.values()]) if pool.windowed and rows else torch.empty(0)
    found = len(stream) // spec.length if pool.windowed else len(rows)
    if found < spec.samples:
        kind = f"windows of {spec.length} tokens ({len(stream)} tokens)" if pool.windowed else "different samples"
        left = " that are not used for evaluation" if excluded else ""
        raise UsageError(
            "QC-DATA-004",
            f"{role}: {pool.origin!r} gives {found} {kind}{left}, but {spec.samples} are requested",
            hint=f"give more data with --{role}"
            + (f", or write '{role}: {{samples: {found}}}' in the recipe" if found else ""),
        )
    # random.Random is the same on every platform and in every version of Python, for a text seed too.
    chosen = Random(f"{role} {seed}").sample(range(found), spec.samples)
    if not pool.windowed:
        text = "input_ids" in next(iter(rows.values()))
        drawn = [rows[keys[index]] for index in chosen]
        samples = [{"input_ids": row["input_ids"][: spec.length]} if text else row for row in drawn]
        return list(samples), frozenset(keys[index] for index in chosen)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows.values()])
    owners = torch.arange(len(keys)).repeat_interleave(lengths)  # of each token: the piece that it comes from
    windows = [slice(index * spec.length, (index + 1) * spec.length) for index in chosen]
    used = {owner for window in windows for owner in owners[window].tolist()}
    return [{"input_ids": stream[window]} for window in windows], frozenset(keys[owner] for owner in used)


def _batches(model: Model, rows: list[Row]) -> Iterator[Batch]:
    longest = max((len(row["input_ids"]) for row in rows), default=1) if model.task.takes_text else 1
    size = min(BATCH_ROWS, max(1, BATCH_TOKENS // longest))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        if not model.task.takes_text:
            shared = {name: part[0][name] for name in model.shared_inputs}
            yield {name: torch.stack([row[name] for row in part]) for name in part[0] if name not in shared} | shared
        else:
            batch = _padded([row["input_ids"] for row in part], (model.config or {}).get("pad_token_id") or 0)
            # What else the model takes (token types) is zero for plain text.
            inputs = {name: torch.zeros_like(batch["input_ids"]) for name in model.input_names} | batch
            if model.task.reads_source:  # the decoder is given the text itself, behind its start token
                inputs["decoder_input_ids"] = batch["input_ids"].roll(1, 1)
                inputs["decoder_input_ids"][:, 0] = model.decoder_start
            yield inputs


def _padded(sequences: list[Tensor], pad: int) -> Batch:
    """Token ids of different lengths -> input_ids and attention_mask, [rows, longest], padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}
