"""The conformance suite: our quantizers pass it, and for every check there is a seeded bug that it catches by name."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qconvert.ir.double_quant import nested
from qconvert.ir.layer import Layer, LinearGroup
from qconvert.ir.quantized import Outliers, QuantizedTensor
from qconvert.ir.scheme import PerGroup, QuantScheme
from qconvert.plugin.host.manager import BUILTINS
from qconvert.plugin.observer import AbsMax, Gram, Observer
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.testing import Check, CheckFailure, CheckResult, check_quantizer, checks, parametrize_with_checks

QUANTIZERS: list[Quantizer] = [kind() for module in BUILTINS for kind in import_module(module).register_quantizers()]
CHECKS = {check.name: check for check in checks()}


@dataclass(frozen=True)
class Nearest(Quantizer):
    """A correct quantizer, which all mutants differ from in one thing."""

    clip: float = 1.0

    name: ClassVar[str] = "nearest"
    default_scheme: ClassVar[QuantScheme] = QuantScheme.parse("int8-channel")
    observers: ClassVar[tuple[type[Observer], ...]] = (Gram,)

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        return round_to_nearest(layer.weight, scheme, self.clip)


@parametrize_with_checks([*QUANTIZERS, Nearest()])
def test_conforms(quantizer: Quantizer, check: Check) -> None:
    check(quantizer)


# --- one mutant per check ---


def mutant(**attributes: Any) -> Quantizer:
    """Nearest with other class attributes."""
    kind: type[Nearest] = dataclass(frozen=True)(type("Mutant", (Nearest,), attributes))
    return kind()


def returning(change: Callable[[QuantizedTensor, Layer, QuantScheme], Any], **attributes: Any) -> Quantizer:
    """Nearest, but `quantize` returns what `change` makes of the result."""

    def quantize(self: Nearest, layer: Layer, scheme: QuantScheme) -> Any:
        return change(Nearest.quantize(self, layer, scheme), layer, scheme)

    return mutant(quantize=quantize, **attributes)


def doing(act: Callable[[Layer], object]) -> Quantizer:
    """Nearest with a side effect."""

    def change(tensor: QuantizedTensor, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        act(layer)
        return tensor

    return returning(change)


def giving_up(condition: Callable[[Layer], bool]) -> Quantizer:
    """Nearest that raises for some layers."""

    def give_up(layer: Layer) -> None:
        if condition(layer):
            raise ZeroDivisionError("no such thing")

    return doing(give_up)


def clipping(ratio: Callable[[Layer, QuantScheme], float]) -> Quantizer:
    return returning(lambda tensor, layer, scheme: round_to_nearest(layer.weight, scheme, ratio(layer, scheme)))


def preparing(change: Callable[[LinearGroup], Any]) -> Quantizer:
    return mutant(prepare=lambda self, group, schemes: change(group))


def observing(**methods: Any) -> Quantizer:
    return mutant(observers=(type("Mutant", (AbsMax,), {"name": "mutant", **methods}),))


def outlying(tensor: QuantizedTensor, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
    return replace(tensor, outliers=Outliers(torch.tensor([3]), layer.weight[:, [3]]))


@dataclass(frozen=True)
class WithoutDefault(Nearest):
    bits: int = field(kw_only=True)


@dataclass(frozen=True)
class WithLambda(Nearest):
    function: Callable[[], int] = lambda: 0


class NoDataclass(Nearest):
    pass


SEEN: list[float] = []  # what a quantizer with a memory remembers


def remembering(layer: Layer, scheme: QuantScheme) -> float:
    SEEN.append(float(layer.weight[0, 0]))
    return 1.0 if SEEN[-1] == max(SEEN) else 0.9


def counting(layer: Layer, scheme: QuantScheme) -> float:
    SEEN.append(0.0)
    return 1 - 0.01 * (len(SEEN) % 7)


def mean_of_means(self: Any, other: Any) -> None:
    self.value = (self.value + other.value) / 2 if self.value is not None else other.value


def update_keeping(self: Any, rows: Tensor, importance: Tensor) -> None:
    self.value = rows


def merge_both(self: Any, other: Any) -> None:
    AbsMax.merge(self, other)
    other.value = self.value * 2


def update_last(self: Any, rows: Tensor, importance: Tensor) -> None:
    self.value = rows.abs().amax(0)


def without_other(self: Any, other: Any) -> None:
    return None


def only_full(self: Any, other: Any) -> None:
    self.value = torch.maximum(self.value, other.value)


def hungry(layer: Layer) -> None:
    copies = [layer.weight.clone() for _ in range(7)]
    assert len(copies) == 7


def gram(layer: Layer) -> Tensor:
    assert layer.stats is not None
    return layer.stats.values["gram"].diagonal()


def with_ones_for_zero_rows(tensor: QuantizedTensor, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
    return replace(tensor, q=tensor.q.masked_fill((layer.weight == 0).all(1, keepdim=True), 1))


MUTANTS: dict[str, Quantizer] = {
    "is-frozen-dataclass": NoDataclass(),
    "options-have-defaults": WithoutDefault(bits=4),
    "name-is-kebab-case": mutant(name="Nearest of all"),
    "default-scheme-is-accepted": mutant(refuses=lambda self, scheme: "it takes nothing at all"),
    "refusals-have-reasons": mutant(refuses=lambda self, scheme: None if scheme == self.default_scheme else "no"),
    "observers-are-declared": mutant(observers=(Gram, Gram)),
    "expected-failures-have-reasons": mutant(expected_failed_checks={"deterministic": "hm"}),
    "survives-pickling": WithLambda(),
    "returns-quantized-tensor": returning(lambda tensor, *_: tensor.q),
    "keeps-scheme": returning(lambda tensor, *_: replace(tensor, scheme=QuantScheme.parse("int4"))),
    "codes-have-shape": returning(lambda tensor, *_: replace(tensor, q=tensor.q.T.contiguous())),
    "codes-in-range": returning(lambda tensor, *_: replace(tensor, q=tensor.q - 1)),
    "scale-has-shape": returning(lambda tensor, *_: replace(tensor, scale=tensor.scale[:, 0])),
    "scale-is-usable": returning(lambda tensor, *_: replace(tensor, scale=tensor.scale * 0)),
    "scale-is-as-stored": returning(lambda tensor, *_: replace(tensor, scale=tensor.scale * 1.0001)),
    "nested-scale-fits-scheme": returning(lambda tensor, *_: replace(tensor, nested_scale=nested(tensor.scale))),
    "zero-point-fits-scheme": returning(lambda tensor, *_: replace(tensor, zero_point=tensor.scale.to(torch.int8))),
    "outliers-are-declared": returning(outlying),
    "prepare-keeps-layers": preparing(lambda group: replace(group, layers=group.layers[:1])),
    "smoothing-scale-is-usable": preparing(lambda group: replace(group, smoothing_scale=torch.zeros(64))),
    "deterministic": clipping(counting),
    "independent-of-random-state": clipping(lambda *_: 1 - 0.1 * random.random()),
    "leaves-random-state": doing(lambda layer: torch.manual_seed(0)),
    "independent-of-threads": clipping(lambda *_: 1 - 0.1 * torch.get_num_threads()),
    "independent-of-layer-order": clipping(remembering),
    "rows-apart": returning(
        lambda tensor, layer, scheme: round_to_nearest(layer.weight, scheme, 1 - len(layer.weight) / 100), by_rows=True
    ),
    "leaves-weight": doing(lambda layer: layer.weight.mul_(2)),
    "leaves-statistics": doing(lambda layer: gram(layer).add_(1)),
    "shares-no-memory": returning(lambda tensor, layer, _: replace(tensor, scale=layer.weight[:, :1])),
    "prints-nothing": doing(lambda layer: print(layer.name)),
    "leaves-process-settings": doing(lambda layer: torch.set_grad_enabled(False)),
    "results-have-no-gradients": returning(lambda tensor, *_: replace(tensor, scale=tensor.scale.requires_grad_())),
    "zero-weight": returning(lambda tensor, layer, _: tensor if layer.weight.any() else replace(tensor, q=tensor.q + 1)),
    "zero-row": returning(with_ones_for_zero_rows),
    "zero-group": giving_up(lambda layer: not layer.weight[:, :32].any()),
    "constant-weight": giving_up(lambda layer: bool((layer.weight == layer.weight[0, 0]).all())),
    "one-signed-weight": returning(lambda t, layer, _: replace(t, q=t.q // 2) if bool((layer.weight > 0).all()) else t),
    "single-row": giving_up(lambda layer: len(layer.weight) == 1),
    "single-column": giving_up(lambda layer: layer.weight.squeeze().ndim == 1),
    "ragged-width": giving_up(lambda layer: layer.weight.shape[1] % 16 > 0),
    "subnormal-weight": giving_up(lambda layer: not (1 / layer.weight.abs().max()).isfinite()),
    "tiny-weight": giving_up(lambda layer: not layer.weight.half().any()),
    "huge-weight": giving_up(lambda layer: not layer.weight.square().isfinite().all()),
    "one-huge-weight": clipping(lambda layer, _: 0.1 if layer.weight.abs().max() > 1e3 * layer.weight.abs().median() else 1),
    "strided-weight": doing(lambda layer: layer.weight.view(-1)),
    "every-kind-of-layer": giving_up(lambda layer: layer.kind == "conv2d"),
    "zero-inputs": giving_up(lambda layer: not gram(layer).any()),
    "dead-inputs": giving_up(lambda layer: bool((gram(layer) == 0).any())),
    "single-input": giving_up(lambda layer: layer.stats is not None and layer.stats.rows == 1),
    "huge-inputs": giving_up(lambda layer: bool(gram(layer).max() > 1e6 * gram(layer).median())),
    "error-within-bound": Nearest(clip=0.4),
    "no-worse-than-nearest": Nearest(clip=0.6),
    "more-bits-lose-less": clipping(lambda layer, scheme: 0.3 if scheme.bits == 8 else 1),
    "groups-lose-less": clipping(lambda layer, scheme: 0.3 if isinstance(scheme.granularity, PerGroup) else 1),
    "memory-within-bound": doing(hungry),
    "observers-take-any-batches": observing(update=update_last),
    "observers-merge-as-one": observing(merge=without_other),
    "observers-merge-associatively": observing(merge=mean_of_means),
    "observers-merge-with-empty": observing(merge=only_full),
    "observers-leave-each-other": observing(merge=merge_both),
    "observers-leave-rows": observing(update=update_keeping),
    "observers-divide": observing(divided=staticmethod(lambda statistic, scale: statistic * scale)),
    "observers-leave-the-statistic": observing(divided=staticmethod(lambda statistic, scale: statistic.div_(scale))),
    # Weights in float beside weight-only codes: no kernel reads them.
    "written-tensors-read-back": returning(outlying, has_outliers=True),
    "exported-graph-equals-dequantization": returning(lambda tensor, *_: replace(tensor, scale=tensor.scale.sign() * 3e38)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    """What mutants leave behind is put right."""
    state, enabled = torch.get_rng_state(), torch.is_grad_enabled()
    SEEN.clear()
    yield
    torch.set_rng_state(state)
    torch.set_grad_enabled(enabled)


def test_every_check_has_a_mutant() -> None:
    assert list(CHECKS) == list(MUTANTS)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_bug_is_caught_by_the_check_that_is_named_for_it(name: str) -> None:
    check = CHECKS[name]
    with pytest.raises(CheckFailure) as raised:
        check(MUTANTS[name])
    text = str(raised.value)
    assert text.startswith(f"{MUTANTS[name].name}, {name}: ")
    assert text.endswith(f"the rule: {check.doc}")


def test_a_scale_that_is_too_fine_for_a_bfloat16_model_is_caught() -> None:
    own = returning(lambda tensor, layer, scheme: round_to_nearest(layer.weight, QuantScheme.parse(str(scheme))))
    with pytest.raises(CheckFailure, match=r"scheme int8-channel of a bfloat16 model: storing moves a scale by .*e-03"):
        CHECKS["scale-is-as-stored"](own)


@pytest.mark.parametrize(
    ("name", "where", "what"),
    [
        ("codes-in-range", "layer 'typical.0' [48, 64], scheme int8-channel", "q holds -128..126, outside -127..127"),
        ("deterministic", "layer 'typical.0' [48, 64], scheme int8-channel", "the second time, q differs in"),
        ("single-column", "layer 'single-column.0' [6, 1], scheme int8-channel", "ZeroDivisionError: no such thing"),
        ("leaves-statistics", "layer 'typical.0', scheme int8-channel", "quantize changed 64 of 4096 numbers of gram"),
        ("memory-within-bound", "layer 'large.0' [4096, 256], scheme int8-channel", "at most 25,165,824 are allowed"),
        ("observers-merge-as-one", "observer 'mutant'", "off by 0.29 of the largest number, 3.8e-06 is rounding"),
    ],
)
def test_a_failure_says_what_where_and_why(name: str, where: str, what: str) -> None:
    with pytest.raises(CheckFailure) as raised:
        CHECKS[name](MUTANTS[name])
    found, _, why = str(raised.value).partition("\n  the rule: ")
    assert where in found
    assert what in found
    assert why == CHECKS[name].doc


# --- the suite itself ---


def results(quantizer: Quantizer) -> dict[str, CheckResult]:
    return {result.name: result for result in check_quantizer(quantizer)}


def test_checks_have_names_of_their_own_and_a_rule_in_one_line() -> None:
    assert len(CHECKS) == len(checks())
    for check in checks():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", check.name)
        assert check.doc.endswith(".")
        assert "\n" not in check.doc


def test_without_pytest_there_is_a_result_for_every_check_as_it_comes() -> None:
    seen: list[CheckResult] = []
    found = check_quantizer(Nearest(), seen.append)
    assert found == seen
    assert [(result.name, result.status, result.message) for result in found] == [(name, "passed", "") for name in CHECKS]


REASON = "it says what it does while it does it"


def test_a_failure_that_is_expected_has_its_reason() -> None:
    def talking(self: Nearest, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        print(layer.name)
        return Nearest.quantize(self, layer, scheme)

    silent, declared = mutant(quantize=talking), mutant(quantize=talking, expected_failed_checks={"prints-nothing": REASON})
    assert results(silent)["prints-nothing"].status == "failed"
    assert results(declared)["prints-nothing"] == CheckResult("prints-nothing", "expected", REASON)


def test_a_reason_for_a_check_that_passes_is_a_failure() -> None:
    result = results(mutant(expected_failed_checks={"prints-nothing": REASON}))["prints-nothing"]
    assert result == CheckResult("prints-nothing", "failed", f"it passes, though it is expected to fail: {REASON}")


def test_a_reason_for_no_check_is_a_failure() -> None:
    quantizer = mutant(expected_failed_checks={"prints-little": REASON})
    assert results(quantizer)["prints-little"].status == "failed"
    with pytest.raises(ValueError, match="expected_failed_checks of nearest names no check: prints-little"):
        parametrize_with_checks([quantizer])


def test_pytest_expects_what_the_quantizer_declares_and_no_more() -> None:
    parameters = parametrize_with_checks([mutant(expected_failed_checks={"prints-nothing": REASON})]).args[1]
    assert [parameter.id for parameter in parameters] == [f"nearest-{name}" for name in CHECKS]
    marked = {parameter.id: parameter.marks for parameter in parameters if parameter.marks}
    assert list(marked) == ["nearest-prints-nothing"]
    (mark,) = marked["nearest-prints-nothing"]
    assert (mark.name, mark.kwargs) == ("xfail", {"reason": REASON, "strict": True, "raises": CheckFailure})


def test_what_a_quantizer_raises_fails_the_check_with_its_type() -> None:
    def exits(self: Nearest, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        raise SystemExit(3)

    for name in ("codes-in-range", "deterministic", "leaves-weight"):
        with pytest.raises(CheckFailure, match="SystemExit: 3"):
            CHECKS[name](mutant(quantize=exits))


def test_the_suite_leaves_the_random_state_and_the_threads_as_they_are() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    check_quantizer(Nearest())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
