"""calibrate/data.py and records.py: what a run calibrates on never judges it."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from calibrate_models import VOCABULARY, bert, llama, model_of, t5
from torch import Tensor, nn

from qconvert.calibrate import read_samples
from qconvert.calibrate.records import read_records
from qconvert.errors import InputError, UsageError
from qconvert.ir.batch import Batch
from qconvert.ir.model import Model
from qconvert.recipe import Recipe


@pytest.fixture(scope="module")
def decoder() -> Model:
    return llama()[1]


@pytest.fixture(scope="module")
def encoder() -> Model:
    return bert()[1]


@pytest.fixture
def module() -> Model:
    generator = torch.Generator().manual_seed(0)
    return model_of(nn.Linear(3, 2), input_names=("input",), example_inputs={"input": torch.randn(20, 3, generator=generator)})


def recipe(samples: int = 4, length: int = 8, source: Any = None, evaluation: Any = None, **fields: Any) -> Recipe:
    spec = {"samples": samples, "length": length}
    return Recipe.from_settings(
        {
            "model": "m",
            "output": "o",
            "calibration": {**spec, "source": source and str(source)},
            "evaluation": {**spec, "source": evaluation and str(evaluation)},
            **fields,
        }
    )


def write(path: Path, records: list[str]) -> Path:
    path.write_text("\n".join(records), encoding="utf-8")
    return path


def numbers(count: int, words: int, seed: int = 0) -> list[str]:
    """Different records of numbers, which `encode_numbers` takes as token ids."""
    rng = random.Random(seed)
    return [" ".join(str(rng.randrange(1, VOCABULARY)) for _ in range(words)) for _ in range(count)]


def sequences(batches: tuple[Batch, ...]) -> list[tuple[int, ...]]:
    """The token ids of every sample, padding left out."""
    return [
        tuple(row[kept].tolist())
        for batch in batches
        for row, kept in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    ]


def touched(batches: tuple[Batch, ...], records: list[str]) -> set[str]:
    """The records of which at least three consecutive tokens are in some sample."""
    windows = {sequence[i : i + 3] for sequence in sequences(batches) for i in range(len(sequence) - 2)}
    ids = {record: tuple(map(int, record.split())) for record in records}
    return {record for record, tokens in ids.items() if any(tokens[i : i + 3] in windows for i in range(len(tokens) - 2))}


# What samples look like


def test_a_decoder_gets_full_windows_cut_from_the_joined_records(decoder: Model, tmp_path: Path) -> None:
    records = numbers(40, words=5)
    samples = read_samples(decoder, recipe(source=write(tmp_path / "a.txt", records)), calibrated=True)
    stream = [int(word) for record in records for word in record.split()]
    for batch in (*samples.calibration, *samples.evaluation):
        assert batch["input_ids"].dtype == torch.int64
        assert batch["attention_mask"].all()
    assert [len(sequence) for sequence in sequences(samples.calibration)] == [8] * 4
    for sequence in sequences(samples.evaluation):  # drawn first, so from the unbroken text
        assert any(tuple(stream[start : start + 8]) == sequence for start in range(0, len(stream), 8))


def test_an_encoder_gets_one_record_per_sample_truncated_and_padded(encoder: Model, tmp_path: Path) -> None:
    records = [*numbers(8, words=3), *numbers(8, words=20, seed=1), "", "   "]
    samples = read_samples(encoder, recipe(samples=8, source=write(tmp_path / "a.txt", records)), calibrated=True)
    found = sequences((*samples.calibration, *samples.evaluation))
    assert sorted(found) == sorted(tuple(map(int, record.split()))[:8] for record in records if record.strip())
    assert any(not batch["attention_mask"].all() for batch in samples.calibration)


def test_inputs_beside_ids_and_mask_are_zeros(encoder: Model, tmp_path: Path) -> None:
    model = replace(encoder, input_names=("input_ids", "attention_mask", "token_type_ids"))
    samples = read_samples(model, recipe(source=write(tmp_path / "a.txt", numbers(8, 9))), calibrated=False)
    (batch,) = samples.evaluation
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert not batch["token_type_ids"].any()


def test_the_decoder_of_an_encoder_decoder_is_given_the_text_behind_its_start_token(tmp_path: Path) -> None:
    model = t5()[1]
    source = write(tmp_path / "a.txt", ["11 12 13", "14 15", "16", "17 18 19 20"])
    (batch,) = read_samples(model, recipe(source=source), calibrated=False).evaluation
    assert not batch["attention_mask"].all()
    for ids, mask, given in zip(batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"], strict=True):
        length = int(mask.sum())
        assert given[:length].tolist() == [model.decoder_start, *ids[: length - 1].tolist()]


def test_batches_hold_at_most_eight_rows(encoder: Model, tmp_path: Path) -> None:
    samples = read_samples(encoder, recipe(samples=10, source=write(tmp_path / "a.txt", numbers(20, 9))), calibrated=True)
    assert [len(batch["input_ids"]) for batch in samples.calibration] == [8, 2]


@pytest.mark.parametrize("task", ["decoder", "encoder"])
def test_the_seed_decides_and_nothing_else(task: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model, source = request.getfixturevalue(task), write(tmp_path / "a.txt", numbers(60, 9))

    def drawn(**fields: Any) -> list[tuple[int, ...]]:
        samples = read_samples(model, recipe(source=source, **fields), calibrated=True)
        return sequences((*samples.calibration, *samples.evaluation))

    assert drawn() == drawn()
    assert drawn(seed=1) != drawn(seed=0)


def test_evaluation_is_the_same_whether_or_not_the_quantizer_calibrates(decoder: Model, tmp_path: Path) -> None:
    settings = recipe(source=write(tmp_path / "a.txt", numbers(60, 9)))
    with_calibration, without = (read_samples(decoder, settings, calibrated) for calibrated in (True, False))
    assert without.calibration == ()
    assert sequences(without.evaluation) == sequences(with_calibration.evaluation)


def test_nothing_is_read_where_nothing_is_needed(decoder: Model) -> None:
    samples = read_samples(decoder, recipe(source="missing.txt", verify=False), calibrated=False)
    assert (samples.calibration, samples.evaluation) == ((), ())


def test_the_builtin_text_needs_no_file_and_is_prose(decoder: Model) -> None:
    word_hashes = replace(decoder, encode_text=lambda text: [sum(map(ord, word)) % VOCABULARY for word in text.split()])
    samples = read_samples(word_hashes, recipe(samples=24, length=64), calibrated=True)
    assert len(sequences(samples.calibration)) == len(sequences(samples.evaluation)) == 24
    paragraphs = list(read_records("builtin"))
    assert len(paragraphs) > 300
    assert all(len(paragraph.split()) >= 8 and "\n" not in paragraph for paragraph in paragraphs)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_formats_hold_the_same_records(kind: str, decoder: Model, tmp_path: Path) -> None:
    records = numbers(60, 9)
    text = write(tmp_path / "a.txt", records)
    other = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(other, [json.dumps({"text": record, "id": 1}) for record in records])
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": range(60), "text": records}), other)
    expected, found = (read_samples(decoder, recipe(source=source), True) for source in (text, other))
    assert sequences(found.calibration) == sequences(expected.calibration)


# Disjointness


@pytest.mark.parametrize("task", ["decoder", "encoder"])
@pytest.mark.parametrize("seed", range(5))
def test_one_source_is_split_even_if_its_text_is_heavily_duplicated(
    task: str, seed: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    records = numbers(60, words=7)
    duplicated = random.Random(seed).choices(records, k=600) + records
    settings = recipe(samples=8, source=write(tmp_path / "a.txt", duplicated), seed=seed)
    samples = read_samples(request.getfixturevalue(task), settings, calibrated=True)
    calibrated, judged = (touched(part, records) for part in (samples.calibration, samples.evaluation))
    assert len(calibrated) >= 8
    assert len(judged) >= 8
    assert not calibrated & judged


@pytest.mark.parametrize("task", ["decoder", "encoder"])
def test_two_files_that_overlap_are_kept_apart(task: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    records = numbers(60, words=7)
    source, evaluation = write(tmp_path / "a.txt", records[:50]), write(tmp_path / "b.txt", records[10:])
    samples = read_samples(request.getfixturevalue(task), recipe(samples=12, source=source, evaluation=evaluation), True)
    assert not touched(samples.calibration, records) & touched(samples.evaluation, records)


def test_a_copy_of_the_calibration_file_is_no_way_round(encoder: Model, tmp_path: Path) -> None:
    records = numbers(20, words=7)
    source, evaluation = write(tmp_path / "a.txt", records), write(tmp_path / "b.txt", records)
    samples = read_samples(encoder, recipe(samples=10, source=source, evaluation=evaluation), True)
    assert not set(sequences(samples.calibration)) & set(sequences(samples.evaluation))
    with pytest.raises(UsageError, match="gives 9 different samples that are not used for evaluation, but 11"):
        read_samples(encoder, recipe(samples=11, source=source, evaluation=evaluation), True)


def test_a_plugin_is_asked_for_what_the_recipe_names(encoder: Model, tmp_path: Path) -> None:
    records = numbers(20, words=7)
    found = {"acme/train": write(tmp_path / "a.txt", records), "acme/test": write(tmp_path / "b.txt", numbers(9, 7, seed=1))}
    theirs, plain = (
        read_samples(encoder, recipe(source=train, evaluation=test), True, found.get) for train, test in (found, found.values())
    )
    assert sequences(theirs.calibration) == sequences(plain.calibration)
    assert sequences(theirs.evaluation) == sequences(plain.evaluation)
    asked: list[str] = []
    read_samples(encoder, recipe(source="acme/train", evaluation=found["acme/test"]), False, lambda name: asked.append(name))
    assert asked == [str(found["acme/test"])]  # what is not needed is not fetched


def test_one_long_record_is_split_too(decoder: Model, tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", numbers(1, words=16 * 8))
    samples = read_samples(decoder, recipe(samples=8, source=source), True)
    assert not set(sequences(samples.calibration)) & set(sequences(samples.evaluation))


def test_records_that_are_equal_after_truncation_count_once(encoder: Model, tmp_path: Path) -> None:
    head = "1 2 3 4 5 6 7 8"
    source = write(tmp_path / "a.txt", [f"{head} {number}" for number in range(10, 30)])
    with pytest.raises(UsageError, match="gives 1 different samples"):
        read_samples(encoder, recipe(samples=2, source=source), False)


# Faults


@pytest.mark.parametrize(("records", "found"), [([], 0), (numbers(4, 9), 4)], ids=["empty", "short"])
def test_too_few_samples_name_the_file_and_both_numbers(records: list[str], found: int, decoder: Model, tmp_path: Path) -> None:
    source = write(tmp_path / "small.txt", records)
    with pytest.raises(UsageError, match=rf"small.txt' gives {found} windows of 8 tokens .*but 5 are requested") as caught:
        read_samples(decoder, recipe(samples=5, source=source), calibrated=False)
    assert caught.value.code == "QC-DATA-004"
    assert caught.value.exit_code == 2


def test_what_is_enough_to_evaluate_may_be_too_little_to_calibrate(encoder: Model, tmp_path: Path) -> None:
    settings = recipe(samples=6, source=write(tmp_path / "a.txt", numbers(10, 9)))
    assert len(sequences(read_samples(encoder, settings, calibrated=False).evaluation)) == 6
    with pytest.raises(UsageError, match=r"calibration: .* gives 4 different samples that are not used for evaluation, but 6"):
        read_samples(encoder, settings, calibrated=True)


def test_samples_longer_than_the_models_positions_are_refused_with_both_numbers(decoder: Model) -> None:
    with pytest.raises(UsageError, match=r"calibration.length is 65 tokens, but 'tiny' has 64 positions") as caught:
        read_samples(decoder, recipe(length=65), calibrated=True)
    assert caught.value.code == "QC-DATA-005"


def test_token_ids_outside_the_embedding_are_named(decoder: Model, tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", [*numbers(60, 9), "5 100 7 250 100"])
    with pytest.raises(InputError, match=r"a.txt': token ids 100, 250 .*100 rows of the embedding") as caught:
        read_samples(decoder, recipe(source=source), calibrated=False)
    assert caught.value.code == "QC-DATA-006"


def test_text_without_a_tokenizer_is_refused(decoder: Model) -> None:
    with pytest.raises(UsageError, match="'tiny' came without a tokenizer") as caught:
        read_samples(replace(decoder, encode_text=None), recipe(), calibrated=False)
    assert caught.value.code == "QC-DATA-007"


@pytest.mark.parametrize(
    ("name", "content", "code", "text"),
    [
        ("none.txt", None, "QC-DATA-001", "no such file"),
        ("latin.txt", b"caf\xe9", "QC-DATA-001", "can't decode byte 0xe9"),
        ("bad.jsonl", b'{"text": "1 2"}\n\n{"text": ', "QC-DATA-003", "line 3 is not JSON"),
        ("deep.jsonl", b"[" * 100_000, "QC-DATA-003", "line 1 is not JSON"),
        ("other.jsonl", b'{"text": "1 2"}\n{"body": "x"}', "QC-DATA-003", 'line 2 has no string field "text"'),
        ("list.jsonl", b"[1]", "QC-DATA-003", 'line 1 has no string field "text"'),
        ("bad.parquet", b"PAR1", "QC-DATA-001", "bad.parquet"),
        ("bad.npz", b"PK", "QC-DATA-001", "bad.npz"),
        ("empty.npz", b"", "QC-DATA-001", "empty.npz"),
    ],
)
def test_damaged_data_names_the_file_and_the_place(
    name: str, content: bytes | None, code: str, text: str, decoder: Model, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_samples(decoder, recipe(source=tmp_path / name), calibrated=False)
    assert caught.value.code == code
    assert name in caught.value.message
    assert text in caught.value.message


def test_a_parquet_file_without_a_text_column_is_refused(decoder: Model, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no column \"text\" of strings, but \{'body': 'string'\}") as caught:
        read_samples(decoder, recipe(source=tmp_path / "a.parquet"), calibrated=False)
    assert caught.value.code == "QC-DATA-003"


def test_an_unknown_kind_of_file_is_a_usage_error(decoder: Model, module: Model) -> None:
    for model, source in ((decoder, "data.csv"), (module, "data.txt")):
        with pytest.raises(UsageError, match=source) as caught:
            read_samples(model, recipe(source=source), calibrated=False)
        assert caught.value.code == "QC-DATA-002"


# Arrays


def test_ready_made_token_ids_are_samples_as_they_are(decoder: Model, tmp_path: Path) -> None:
    ids = np.arange(1, 81, dtype=np.int32).reshape(10, 8)
    mask = np.ones_like(ids)
    mask[:, :3] = 0  # padded on the left, which qconvert undoes
    np.savez(tmp_path / "ids.npz", input_ids=ids, attention_mask=mask)
    samples = read_samples(decoder, recipe(samples=5, source=tmp_path / "ids.npz"), calibrated=True)
    found = sequences((*samples.calibration, *samples.evaluation))
    assert sorted(found) == [tuple(row[3:].tolist()) for row in ids]


@pytest.mark.parametrize(
    "arrays",
    [
        {"tokens": np.ones((9, 8), np.int64)},
        {"input_ids": np.ones((9, 8), np.float32)},
        {"input_ids": np.ones(9, np.int64)},
        {"input_ids": np.ones((9, 8), np.int64), "attention_mask": np.ones((9, 7), np.int64)},
        {"input_ids": np.ones((9, 8), np.int64), "pixels": np.ones((9, 7))},
    ],
    ids=["other name", "floats", "rank", "mask shape", "surplus array"],
)
def test_arrays_that_are_no_token_ids_are_refused(arrays: dict[str, Any], decoder: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", **arrays)
    with pytest.raises(InputError, match=r"ids.npz' holds \{'") as caught:
        read_samples(decoder, recipe(source=tmp_path / "ids.npz"), calibrated=False)
    assert caught.value.code == "QC-DATA-008"


def rows_of(batches: tuple[Batch, ...]) -> set[tuple[float, ...]]:
    return {tuple(row) for batch in batches for row in batch["input"].tolist()}


def test_a_module_is_fed_with_its_example_inputs(module: Model) -> None:
    samples = read_samples(module, recipe(samples=10), calibrated=True)
    calibrated, judged = rows_of(samples.calibration), rows_of(samples.evaluation)
    assert calibrated | judged == {tuple(row) for row in module.example_inputs["input"].tolist()}
    assert not calibrated & judged
    with pytest.raises(UsageError, match='"the factory\'s example inputs" gives 20 different samples, but 21'):
        read_samples(module, recipe(samples=21), calibrated=False)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size_too", [False, True], ids=["shape", "shape and size"])
def test_an_array_that_claims_more_than_the_file_holds_is_refused(
    size_too: bool, compression: int, decoder: Model, tmp_path: Path
) -> None:
    """Before the memory is asked for: numpy would ask for all of it at once."""
    rows = 2**28
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        array, {"descr": "<i8", "fortran_order": False, "shape": (rows if size_too else 2**45,)}
    )
    with zipfile.ZipFile(tmp_path / "ids.npz", "w", compression) as archive:
        archive.writestr("input_ids.npy", array.getvalue())
    if size_too:
        honest, claimed = (struct.pack("<I", size) for size in (len(array.getvalue()), 8 * rows + len(array.getvalue())))
        directory = (tmp_path / "ids.npz").read_bytes().rindex(b"PK\1\2")
        content = bytearray((tmp_path / "ids.npz").read_bytes())
        assert content[directory + 24 : directory + 28] == honest
        content[directory + 24 : directory + 28] = claimed
        (tmp_path / "ids.npz").write_bytes(content)
    with pytest.raises(
        InputError, match=r"ids.npz' can't be read: 'input_ids.npy' claims \d+ bytes, of which the file holds \d+ at most"
    ) as caught:
        read_samples(decoder, recipe(source=tmp_path / "ids.npz"), calibrated=False)
    assert caught.value.code == "QC-DATA-001"


def test_arrays_may_be_compressed(module: Model, tmp_path: Path) -> None:
    """A million zeros become a thousand bytes, which is as far as that goes."""
    np.savez_compressed(tmp_path / "x.npz", input=np.zeros((400_000, 3)))
    (batch,) = read_samples(module, recipe(samples=1, source=tmp_path / "x.npz"), calibrated=False).evaluation
    assert not batch["input"].any()


def test_a_module_is_fed_from_arrays_in_its_own_dtype(module: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", input=np.random.default_rng(0).normal(size=(10, 3)))
    samples = read_samples(module, recipe(samples=5, source=tmp_path / "x.npz"), calibrated=True)
    assert samples.calibration[0]["input"].dtype == torch.float32
    assert samples.calibration[0]["input"].shape == (5, 3)


@pytest.mark.parametrize("step", [torch.tensor(0.5), torch.tensor([0.5])], ids=["scalar", "one row"])
def test_what_all_rows_share_goes_with_every_batch_as_it_is(step: Tensor, tmp_path: Path) -> None:
    examples = {"step": step, "x": torch.arange(60.0).reshape(20, 3)}
    model = model_of(nn.Linear(3, 2), input_names=("step", "x"), example_inputs=examples)
    assert model.shared_inputs == {"step"}
    samples = read_samples(model, recipe(samples=10), calibrated=True)
    for part in (samples.calibration, samples.evaluation):
        assert [batch["x"].shape for batch in part] == [(8, 3), (2, 3)]
    assert all(torch.equal(batch["step"], step) for batch in (*samples.evaluation, *samples.calibration))
    np.savez(tmp_path / "data.npz", step=step.numpy() * 3, x=np.arange(30.0).reshape(10, 3))
    (batch,) = read_samples(model, recipe(samples=5, source=tmp_path / "data.npz"), calibrated=False).evaluation
    assert torch.equal(batch["step"], step * 3)
    np.savez(tmp_path / "data.npz", step=np.ones(10), x=np.arange(30.0).reshape(10, 3))
    with pytest.raises(
        InputError, match=rf"'step' is torch.float64 \[10\], but 'tiny' takes torch.float32 \{list(step.shape)}"
    ):
        read_samples(model, recipe(source=tmp_path / "data.npz"), calibrated=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.ones((9, 4), np.float32), "float32 [9, 4]"),
        (np.ones((9, 3), np.int64), "int64 [9, 3]"),
        (np.full((9, 3), np.nan, np.float32), "with NaN or Inf"),
    ],
    ids=["shape", "dtype", "nan"],
)
def test_arrays_that_do_not_fit_the_module_are_refused(value: Any, text: str, module: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", input=value)
    with pytest.raises(InputError) as caught:
        read_samples(module, recipe(source=tmp_path / "x.npz"), calibrated=False)
    assert caught.value.code == "QC-DATA-008"
    assert text in caught.value.message
    assert "'input'" in caught.value.message


def test_arrays_of_another_name_or_length_are_refused(tmp_path: Path) -> None:
    examples: dict[str, Tensor] = {"a": torch.ones(4, 2), "b": torch.ones(4, 2)}
    model = model_of(nn.Bilinear(2, 2, 1), input_names=("a", "b"), example_inputs=examples)
    np.savez(tmp_path / "c.npz", c=np.ones((4, 2)))
    with pytest.raises(InputError, match=r"holds the arrays \['c'\], but 'tiny' takes \['a', 'b'\]"):
        read_samples(model, recipe(source=tmp_path / "c.npz"), calibrated=False)
    np.savez(tmp_path / "ab.npz", a=np.ones((4, 2)), b=np.ones((3, 2)))
    with pytest.raises(InputError, match=r"different numbers of rows: \{'a': 4, 'b': 3\}"):
        read_samples(model, recipe(source=tmp_path / "ab.npz"), calibrated=False)
