"""Distributions over a vocabulary, compared, against the definition written out."""

from __future__ import annotations

import math

import pytest
import torch

from qconvert.execution import divergence
from qconvert.execution.divergence import compare_logits, kl_divergence


@pytest.mark.parametrize("at_once", [1, 3000, 10**9], ids=["a row at a time", "three rows", "all rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_compared_as_the_definition_says(at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    expected = (3 * torch.randn(7, 1000, generator=generator)).to(dtype)
    found = (expected + torch.randn(7, 1000, generator=generator)).to(dtype)
    compared = compare_logits(expected, found)
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (expected, found))
    torch.testing.assert_close(compared.kl, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(expected - compared.expected_norm[:, None], log_p, rtol=1e-12, atol=0)
    torch.testing.assert_close(found - compared.found_norm[:, None], log_q, rtol=1e-12, atol=0)
    assert torch.equal(compared.largest, (found.double() - expected.double()).abs().amax(-1))


def test_two_outcomes_worked_out_by_hand() -> None:
    """KL of (3/4, 1/4) from (1/2, 1/2) is 3/4 log 3/2 + 1/4 log 1/2."""
    expected = torch.tensor([[[math.log(3.0), 0.0]]])
    assert kl_divergence(expected, torch.zeros(1, 1, 2)).shape == (1, 1)
    assert float(kl_divergence(expected, torch.zeros(1, 1, 2))) == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))


def test_equal_logits_have_no_distance_and_nearly_equal_ones_none_below_zero() -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(kl_divergence(logits, logits), torch.zeros(64, dtype=torch.float64))
    near = kl_divergence(logits, logits + 1e-6 * torch.randn(64, 5000, generator=torch.Generator().manual_seed(2)))
    assert float(near.min()) >= 0
    assert float(near.max()) < 1e-11
