"""Fidelity numbers against their definitions, worked out sample by sample in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qconvert.errors import InputError
from qconvert.execution import divergence
from qconvert.ir.progress import silent
from qconvert.ir.report import Fidelity
from qconvert.ir.task import TASKS
from qconvert.verify.fidelity import measure_fidelity

VOCABULARY = 11
LENGTHS = ((172, 7), (1, 12))


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample is longer than what is compared at once."""
    monkeypatch.setattr(divergence, "AT_ONCE", 50 * VOCABULARY)


class FakeSession:
    """Answers with `table`[token ids] plus its position, or for modules with x @ table; padding gets rubbish."""

    def __init__(self, seed: int, width: int = VOCABULARY) -> None:
        self.table = np.random.default_rng(seed).normal(size=(VOCABULARY, width)).astype(np.float32)

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="input_ids")]

    def run(self, _: None, inputs: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        if "x" in inputs:
            return [inputs["x"] @ self.table]
        positions = np.arange(inputs["input_ids"].shape[1], dtype=np.float32)
        output = self.table[inputs["input_ids"]] * np.cos(positions + self.table[0, 0])[None, :, None]
        output[inputs["attention_mask"] == 0] = 1e4 * self.table[0, 0]
        return [output]


ARTIFACT, FLOAT = FakeSession(0), FakeSession(1)


def batches() -> list[dict[str, Tensor]]:
    made = []
    for seed, lengths in enumerate(LENGTHS):
        generator = torch.Generator().manual_seed(seed)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(1, VOCABULARY, mask.shape, generator=generator) * mask
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def measured(task: str, artifact: FakeSession = ARTIFACT, data: list[dict[str, Tensor]] | None = None) -> Fidelity:
    return measure_fidelity(artifact, FLOAT, batches() if data is None else data, TASKS[task], "cpu", silent)


def samples() -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ids, artifact's outputs, float outputs) of every sample, without padding, in float64."""
    found = []
    for batch in batches():
        fed = {name: value.numpy() for name, value in batch.items()}
        outputs = [torch.from_numpy(session.run(None, fed)[0]).double() for session in (ARTIFACT, FLOAT)]
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            found.append((batch["input_ids"][row, :length], outputs[0][row, :length], outputs[1][row, :length]))
    return found


def test_decoders_by_hand() -> None:
    kl, same, losses, float_losses, largest = [], [], [], [], 0.0
    for ids, found, expected in samples():
        p, q = expected.softmax(-1), found.softmax(-1)
        kl += (p * (p / q).log()).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
        losses += [-float(q[t, ids[t + 1]].log()) for t in range(len(ids) - 1)]
        float_losses += [-float(p[t, ids[t + 1]].log()) for t in range(len(ids) - 1)]
        largest = max(largest, float((found - expected).abs().max()))
    result = measured("causal-lm")
    assert result.status == "passed"
    assert result.kl == pytest.approx(np.mean(kl), rel=1e-5)
    assert result.top1 == pytest.approx(np.mean(same))
    assert result.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert result.perplexity_float == pytest.approx(np.exp(np.mean(float_losses)), rel=1e-5)
    assert result.max_abs == pytest.approx(largest, rel=1e-5)
    assert result.cosine is None


def test_encoder_decoders_by_what_the_decoder_is_given() -> None:
    """Its tokens are those of the source behind a start token, so that each is to be followed by the next one's."""

    class Echo(FakeSession):
        def run(self, _: None, inputs: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
            return super().run(None, {**inputs, "input_ids": inputs["decoder_input_ids"]})

    data = [{**batch, "decoder_input_ids": batch["input_ids"], "input_ids": batch["input_ids"] * 0} for batch in batches()]
    found = measure_fidelity(Echo(0), Echo(1), data, TASKS["seq2seq-lm"], "cpu", silent)
    assert found == measured("causal-lm")


@pytest.mark.parametrize("task", ["causal-lm", "encoder"])
def test_samples_that_are_compared_at_once_give_the_same_numbers(task: str) -> None:
    one_by_one = measured(task)
    threads = torch.get_num_threads()
    assert measure_fidelity(ARTIFACT, FLOAT, batches(), TASKS[task], "cpu", silent, at_once=3) == one_by_one
    assert torch.get_num_threads() == threads


def test_encoders_by_the_cosine_of_mean_pooled_vectors() -> None:
    cosines, largest = [], 0.0
    for _, found, expected in samples():
        one, other = found.mean(0), expected.mean(0)
        cosines.append(float(one @ other / (one.norm() * other.norm())))
        largest = max(largest, float((found - expected).abs().max()))
    result = measured("encoder")
    assert result.cosine == pytest.approx(np.mean(cosines), rel=1e-4)
    assert result.max_abs == pytest.approx(largest, rel=1e-5)
    assert result.kl is result.top1 is result.perplexity is None


def test_modules_by_rows() -> None:
    x = torch.randn(9, VOCABULARY, generator=torch.Generator().manual_seed(3))
    found, expected = (x.double() @ torch.from_numpy(session.table).double() for session in (ARTIFACT, FLOAT))
    result = measured("module", data=[{"x": x[:6]}, {"x": x[6:]}])
    assert result.cosine == pytest.approx(float(torch.cosine_similarity(found, expected).mean()), rel=1e-5)
    assert result.top1 == pytest.approx(float((found.argmax(1) == expected.argmax(1)).double().mean()))
    assert result.max_abs == pytest.approx(float((found - expected).abs().max()), rel=1e-5)


def test_a_module_with_one_output_has_no_top1() -> None:
    x = torch.randn(4, VOCABULARY)
    result = measure_fidelity(FakeSession(0, width=1), FakeSession(1, width=1), [{"x": x}], TASKS["module"], "cpu", silent)
    assert result.top1 is None


@pytest.mark.parametrize("task", ["causal-lm", "encoder", "module"])
def test_the_float_model_agrees_with_itself(task: str) -> None:
    data = [{"x": torch.randn(4, VOCABULARY)}] if task == "module" else None
    result = measured(task, FLOAT, data)
    assert result.max_abs == 0
    if task == "causal-lm":
        assert (result.kl, result.top1) == (0, 1)
        assert result.perplexity == result.perplexity_float
    else:
        assert result.cosine == pytest.approx(1)


def test_what_is_almost_equal_has_no_kl_below_zero_where_float32_gives_one() -> None:
    exact, near = FakeSession(1, width=4000), FakeSession(1, width=4000)
    near.table *= 1 + 1e-7
    fed = {name: value.numpy() for name, value in batches()[0].items()}
    p, q = (torch.from_numpy(session.run(None, fed)[0]).log_softmax(-1) for session in (exact, near))
    assert ((p.exp() * (p - q)).sum(-1) < 0).any()
    found = measure_fidelity(near, exact, batches(), TASKS["causal-lm"], "cpu", silent)
    assert found.kl is not None
    assert 0 <= found.kl < 1e-12


def test_no_cosine_is_above_one() -> None:
    x = torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(0))
    plain = (x @ torch.from_numpy(FLOAT.table)).double()
    assert (torch.nn.functional.cosine_similarity(plain, plain) > 1).any()
    found = measured("module", FLOAT, [{"x": row[None]} for row in x]).cosine
    assert found is not None
    assert 1 - 1e-12 < found <= 1


@pytest.mark.parametrize("task", ["causal-lm", "encoder", "module"])
def test_outputs_that_are_not_finite_are_a_failure_with_its_reason(task: str) -> None:
    broken = FakeSession(0)
    broken.table[:] = np.nan
    result = measured(task, broken, [{"x": torch.ones(2, VOCABULARY)}] if task == "module" else None)
    assert result == Fidelity(target="cpu", status="failed", reason=result.reason)  # NaN is no JSON
    assert result.reason == "NaN or infinity comes out of it for evaluation sample 1, and not of the float model"


@pytest.mark.parametrize("task", ["causal-lm", "encoder"])
def test_padding_may_be_nan_and_the_sample_that_is_not_finite_is_named(task: str) -> None:
    class Breaks(FakeSession):
        """NaN at padding, and wherever the token 0 is none."""

        def run(self, _: None, inputs: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
            (found,) = super().run(None, inputs)
            found[inputs["input_ids"] == 0] = np.nan
            return [found]

    plain, broken = measured(task), measure_fidelity(Breaks(0), Breaks(1), batches(), TASKS[task], "cpu", silent)
    assert broken == plain
    data = batches()
    data[1]["input_ids"][0, 0] = 0  # the only token of the third sample
    assert measure_fidelity(Breaks(0), FLOAT, data, TASKS[task], "cpu", silent).reason == (
        "NaN or infinity comes out of it for evaluation sample 3, and not of the float model"
    )
    with pytest.raises(InputError, match="float model for evaluation sample 3, though the weights are finite") as caught:
        measure_fidelity(ARTIFACT, Breaks(1), data, TASKS[task], "cpu", silent)
    assert caught.value.code == "QC-FLOAT-001"


def test_a_module_may_return_one_number_or_truth_value_per_row() -> None:
    class PerRow(FakeSession):
        def run(self, _: None, inputs: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
            return [(inputs["x"] @ self.table)[:, 0] > 0]

    result = measure_fidelity(PerRow(0), PerRow(0), [{"x": torch.ones(4, VOCABULARY)}], TASKS["module"], "cpu", silent)
    assert (result.status, result.max_abs, result.top1) == ("passed", 0, None)
