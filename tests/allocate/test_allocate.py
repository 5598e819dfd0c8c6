"""Schemes under a budget: the solver is exact, losses are measured where they arise, and the artifact keeps what was asked."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import calibrate_models
import pytest
import torch
from calibrate_models import plan_of, token_batch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import nn
from transformers.pytorch_utils import Conv1D

from qconvert.allocate.choices import Choice, choices
from qconvert.allocate.knapsack import Option, solve
from qconvert.allocate.sensitivity import _typical
from qconvert.allocate.wavefront import Wavefront, relative_square
from qconvert.errors import UsageError
from qconvert.ir.artifact import CARD, MANIFEST, REPORT, WEIGHTS
from qconvert.ir.budget import Budget
from qconvert.ir.report import Report
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import InputGroup
from qconvert.pipeline import conversion, preparation, verification
from qconvert.recipe import Recipe
from qconvert.storage.reader import read_index

# --- the solver ---


def instance(seed: int) -> tuple[list[list[Option]], int]:
    """Items with options in no order, with equal costs and losses among them, and a budget that may be too small."""
    random = Random(seed)
    items = [
        [
            Option(random.randint(1, 40), random.choice([random.random(), random.randint(0, 3)]))
            for _ in range(random.randint(1, 5))
        ]
        for _ in range(random.randint(1, 6))
    ]
    return items, random.randint(1, 200)


@pytest.mark.parametrize("seed", range(100))
def test_the_solver_is_as_good_as_trying_everything(seed: int) -> None:
    items, budget = instance(seed)
    every = [options for options in itertools.product(*items) if sum(option.cost for option in options) <= budget]
    chosen = solve(items, budget)
    if not every:
        assert chosen is None
        return
    assert chosen is not None
    taken = [options[index] for options, index in zip(items, chosen, strict=True)]
    assert sum(option.cost for option in taken) <= budget
    least = min(sum(option.loss for option in options) for options in every)
    assert sum(option.loss for option in taken) == pytest.approx(least, rel=1e-9, abs=1e-12)


def test_a_budget_that_fits_to_the_byte_is_used() -> None:
    items = [[Option(1, 1.0), Option(3, 0.0)], [Option(1, 1.0), Option(3, 0.0)]]
    assert solve(items, 6) == [1, 1]
    assert sorted(solve(items, 5) or []) == [0, 1]
    assert solve(items, 2) == [0, 0]
    assert solve(items, 1) is None


def test_a_thousand_layers_are_no_burden() -> None:
    random = Random(0)
    items = [
        [
            Option(round(4096 * bits), random.random() ** 3 * lost)
            for bits, lost in ((4.125, 1.7), (4.25, 1.3), (4.5, 1), (8.5, 0))
        ]
        for _ in range(1000)
    ]
    chosen = solve(items, sum(options[2].cost for options in items))
    assert chosen is not None
    assert len(set(chosen)) > 1


# --- budgets ---


@pytest.mark.parametrize(
    ("text", "weights", "other", "room"),
    [
        ("4.5", 16, 1000, 9),
        ("4.5 bits", 16, 0, 9),
        ("4.1", 80, 0, 41),  # as a binary fraction it would be 40
        ("90MB", 1, 0, 90_000_000),
        ("1.5 kB", 1, 500, 1000),
        ("2GB", 1, 0, 2_000_000_000),
        ("123B", 1, 23, 100),
    ],
)
def test_a_budget_is_bits_per_weight_or_a_size(text: str, weights: int, other: int, room: int) -> None:
    assert Budget.parse(text).quantized_bytes(weights, other) == room


@pytest.mark.parametrize("text", ["", "four", "-4", "4.5 bit", "90 MiB", "0", "0MB", "4,5", "1e3", "nan"])
def test_what_is_no_budget_is_an_error_that_says_how_to_write_one(text: str) -> None:
    with pytest.raises(UsageError, match="is not a budget") as raised:
        Budget.parse(text)
    assert raised.value.code == "QC-BUDGET-001"
    assert "90MB" in raised.value.hint


def test_a_number_in_a_file_is_a_budget_too() -> None:
    assert Recipe.from_settings({"model": "m", "output": "o", "quantizer": "auto", "budget": 4.5}).budget == "4.5"


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"quantizer": "auto"}, "QC-BUDGET-002"),
        ({"quantizer": "awq", "budget": "4.5"}, "QC-BUDGET-002"),
        ({"budget": "4.5"}, "QC-BUDGET-002"),
        ({"quantizer": "auto", "budget": "4.5", "scheme": "int4-g32"}, "QC-BUDGET-003"),
        ({"quantizer": "auto", "budget": "much"}, "QC-BUDGET-001"),
    ],
)
def test_a_budget_goes_with_auto_and_without_a_scheme(settings: dict[str, str], code: str) -> None:
    with pytest.raises(UsageError) as raised:
        Recipe.from_settings({"model": "m", "output": "o", **settings})
    assert raised.value.code == code


# --- choices ---


def auto(**settings: Any) -> Recipe:
    return Recipe.from_settings({"model": "m", "output": "o", "quantizer": "auto", "budget": "5", "layout": "onnx", **settings})


def schemes(choice: Choice) -> list[str]:
    return list(map(str, choice.schemes))


def test_layers_of_one_input_and_shape_choose_together_and_named_ones_not_at_all() -> None:
    _, model = calibrate_models.llama()
    q, k, v, o = (f"model.layers.0.self_attn.{part}_proj" for part in "qkvo")
    gate, up = (f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up"))
    groups = [InputGroup((q, k, v), None), InputGroup((gate, up), None)]
    found = [choice.layers for choice in choices(plan_of(model), groups, auto(), model)]
    assert [layers for layers in found if ".0." in layers[0]][:4] == [(q,), (k, v), (o,), (gate, up)]
    named = auto(rules=[{"pattern": k, "scheme": "int8-g16"}])
    assert [choice.layers for choice in choices(plan_of(model), groups, named, model)][:3] == [(q,), (v,), (o,)]


def test_a_scheme_whose_groups_do_not_divide_a_width_is_left_out_there() -> None:
    _, model = calibrate_models.llama()  # hidden 32, MLP 48
    by_name = {choice.layers[0]: choice for choice in choices(plan_of(model), [], auto(), model)}
    assert "int4-g32" in schemes(by_name["model.layers.0.mlp.up_proj"])
    down = schemes(by_name["model.layers.0.mlp.down_proj"])
    assert down == ["int4-g16", "int4-g16-asym"]


def test_a_width_that_no_group_divides_is_left_with_channels() -> None:
    model = calibrate_models.model_of(nn.Sequential(nn.Linear(10, 4)), example_inputs={"x": torch.ones(1, 10)})
    (choice,) = choices(plan_of(model), [], auto(), model)
    assert schemes(choice) == ["int4-channel", "int8-channel"]


@pytest.mark.parametrize("settings", [{"layout": "transformers"}, {"targets": ["cuda"]}])
def test_zero_points_are_chosen_only_where_they_can_be_read(settings: dict[str, Any]) -> None:
    _, model = calibrate_models.llama()
    found = choices(plan_of(model), [], auto(**settings), model)
    assert all(scheme.symmetric for choice in found for scheme in choice.schemes)


# --- losses ---


@pytest.mark.parametrize("make", [calibrate_models.llama, calibrate_models.bert, calibrate_models.t5, calibrate_models.gpt2])
def test_a_variant_loses_what_the_whole_model_loses_with_that_weight(make: Any) -> None:
    """Also where it is in the encoder, whose change reaches the decoder through its cross attention."""
    plain, model = make()
    batch = calibrate_models.source_batch((9, 6)) if model.task.reads_source else token_batch((9, 6))
    wavefront = Wavefront(model, batch, "cpu")
    expected = []
    generator = torch.Generator().manual_seed(0)
    for block in (*model.blocks, ""):
        wavefront.enter(block)
        for name in [
            f"{name}.weight"
            for name, part in plain.named_modules()
            if isinstance(part, nn.Linear | Conv1D) and model.block_of(name) == block and f"{name}.weight" not in model.tied
        ]:
            parameter = plain.get_parameter(name)
            before = parameter.detach().clone()
            changed = before + 0.1 * torch.randn(before.shape, generator=generator)
            wavefront.add({name: changed})
            with torch.no_grad():
                reference = output(plain, model.task.name, batch)
                parameter.copy_(changed)
                expected.append(loss(output(plain, model.task.name, batch), reference, model.task.name, batch))
                parameter.copy_(before)
    found = wavefront.losses()
    torch.testing.assert_close(found, torch.stack(expected).to(found.dtype), rtol=1e-3, atol=1e-6)
    assert (found.sum(1) > 0).sum() >= len(found) - 1  # BERT's pooler comes after the states that count


def output(plain: nn.Module, task: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found = plain(**batch, return_dict=True)
    return found.last_hidden_state if task == "encoder" else found.logits  # type: ignore[no-any-return]


def loss(found: torch.Tensor, reference: torch.Tensor, task: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of decoders, the latter half of the rows."""
    mask = batch["attention_mask"].bool()
    if task == "encoder":
        return relative_square(found[mask], reference[mask])
    late = mask.shape[1] // 2
    log_q, log_p = (logits[:, late:][mask[:, late:]].double().log_softmax(-1) for logits in (found, reference))
    return nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def test_a_few_tokens_on_the_edge_do_not_decide() -> None:
    losses = torch.full((2, 9), 0.1)
    losses[0, 4] = 100.0
    first, second = _typical(losses)
    assert second == pytest.approx(0.1, rel=0.12)
    assert first < 1.5 * second


# --- end to end ---


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    (root / "text.txt").write_text("".join(f"Sentence {n} has {n * n} words, {n % 7} of them short.\n" for n in range(60)))
    tiny_llama(root / "llama")
    tiny_bert(root / "bert")
    tiny_gpt2(root / "gpt2")
    tiny_t5(root / "t5")
    return root


def recipe(source: Path, output: Path, budget: str, **settings: Any) -> Recipe:
    data = {"source": str(source.parent / "text.txt"), "samples": 4, "length": 32}
    return Recipe.from_settings(
        {
            "model": str(source),
            "output": str(output),
            "quantizer": "auto",
            "budget": budget,
            "calibration": data,
            "evaluation": data,
            **settings,
        }
    )


def weights_bytes(folder: Path) -> int:
    """Of all tensors in model.safetensors."""
    return sum(tensor.nbytes for tensor in read_index(folder).values() if tensor.file == WEIGHTS)


def loads_in_transformers(report: Report) -> bool:
    return ("transformers", "passed") in [(part.target, part.status) for part in report.parity]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "budget"), [("llama", "4.4"), ("llama", "5.5"), ("bert", "5")])
def test_the_artifact_keeps_the_budget_and_loads_with_its_several_schemes(
    name: str, budget: str, sources: Path, tmp_path: Path
) -> None:
    report = conversion.convert(recipe(sources / name, tmp_path / "out", budget))
    assert report.passed
    assert loads_in_transformers(report)
    assert float(budget) - 0.1 < report.size.average_bits <= float(budget)
    assert report.assignment is not None
    assert report.assignment.budget == budget
    assert report.assignment.average_bits == pytest.approx(report.size.average_bits, rel=1e-12)
    assert len(report.assignment.schemes) > 1
    counted = {scheme: sum(layer.scheme == scheme for layer in report.layers) for scheme in report.assignment.schemes}
    assert counted == report.assignment.schemes
    by_name = {layer.name: layer.scheme for layer in report.layers}
    for key in [each for each in by_name if each.endswith("k_proj")]:
        assert by_name[key] == by_name[key.replace("k_proj", "v_proj")]


@pytest.mark.usefixtures("quick")
def test_a_size_is_kept_to_the_byte(sources: Path, tmp_path: Path) -> None:
    conversion.convert(recipe(sources / "llama", tmp_path / "out", "145kB", verify=False))
    assert 144_000 < weights_bytes(tmp_path / "out") <= 145_000


@pytest.mark.usefixtures("quick")
def test_more_bits_lose_less_and_the_prediction_is_near(sources: Path, tmp_path: Path) -> None:
    lost = []
    for budget in ("4.3", "5.3", "8.2"):
        report = conversion.convert(recipe(sources / "llama", tmp_path / budget, budget))
        assert report.assignment is not None
        assert report.assignment.predicted_kl is not None
        lost.append((report.assignment.predicted_kl, report.fidelity[0].kl))
    assert lost == sorted(lost, reverse=True)
    predicted, measured = lost[0]
    assert 0.5 < predicted / measured < 2  # type: ignore[operator]


@pytest.mark.usefixtures("quick")
def test_encoder_decoders_and_models_for_onnx_runtime_alone_take_part(sources: Path, tmp_path: Path) -> None:
    for name in ("t5", "gpt2"):
        report = conversion.convert(recipe(sources / name, tmp_path / name, "4.6", layout="onnx"))
        assert report.passed
        assert 4.3 < report.size.average_bits <= 4.6


@pytest.mark.usefixtures("quick")
def test_a_module_without_blocks_is_judged_by_its_outputs(tmp_path: Path) -> None:
    (tmp_path / "wide.py").write_text(
        "import torch\nfrom torch import nn\n\ndef factory():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), "
        "torch.randn(64, 64)\n"
    )
    samples = {"evaluation": {"samples": 16}, "calibration": {"samples": 16}}
    settings = {"model": f"module:{tmp_path / 'wide.py'}:factory", "quantizer": "auto", "budget": "6", **samples}
    report = conversion.convert(Recipe.from_settings({**settings, "output": str(tmp_path / "out")}))
    assert report.passed
    assert report.assignment is not None
    assert report.assignment.predicted_kl is None
    assert 0 < (report.assignment.predicted_error or 0) < 0.2
    assert report.size.average_bits <= 6


@pytest.mark.usefixtures("quick")
def test_the_manifest_holds_what_was_decided_and_the_card_what_was_asked(sources: Path, tmp_path: Path) -> None:
    """So that `verify` decides nothing, and the command of the card makes the same again."""
    named = [{"pattern": "*.0.mlp.up_proj", "scheme": "int8-g16"}, {"pattern": "*.1.mlp.up_proj", "scheme": "float"}]
    first = conversion.convert(recipe(sources / "llama", tmp_path / "out", "5.2", rules=named))
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (manifest["recipe"]["quantizer"], manifest["recipe"]["budget"]) == ("gptq", None)
    assert manifest["recipe"]["rules"][-2:] == named
    assert json.loads((tmp_path / "out" / REPORT).read_text())["assignment"] == manifest["assignment"]
    card = (tmp_path / "out" / CARD).read_text()
    assert "--quantizer auto --budget 5.2 --rule '*.0.mlp.up_proj=int8-g16'" in card
    assert "predicted KL" in card
    again = verification.verify(tmp_path / "out")
    assert again.assignment == first.assignment
    assert again.layers == first.layers
    by_name = {layer.name: layer.scheme for layer in first.layers}
    assert by_name["model.layers.0.mlp.up_proj"] == "int8-g16"
    assert "model.layers.1.mlp.up_proj" not in by_name
    assert first.size.average_bits <= 5.2


@pytest.mark.usefixtures("quick")
def test_the_same_run_decides_the_same_and_plan_tells_it_beforehand(sources: Path, tmp_path: Path) -> None:
    asked = recipe(sources / "llama", tmp_path / "out", "4.9", verify=False)
    planned = preparation.plan(asked)
    report = conversion.convert(asked)
    assert planned.assignment == report.assignment
    assert {name: str(layer.scheme) for name, layer in planned.layers.items()} == {
        layer.name: layer.scheme for layer in report.layers
    }
    assert planned.weights_bytes == weights_bytes(tmp_path / "out")
    manifest = (tmp_path / "out" / MANIFEST).read_bytes()
    shutil.rmtree(tmp_path / "out")
    conversion.convert(asked)
    assert (tmp_path / "out" / MANIFEST).read_bytes() == manifest


# --- errors ---


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "settings", "code", "words"),
    [
        ("llama", {"budget": "4"}, "QC-BUDGET-006", r"from 4\.\d+, all layers in their smallest scheme, to 8\.\d+"),
        ("llama", {"budget": "100kB"}, "QC-BUDGET-006", r"from 138720B, .* to \d+B"),
        ("llama", {"rules": [{"pattern": "*", "scheme": "int8-g16"}]}, "QC-BUDGET-004", "no layer"),
        ("llama", {"rules": [{"pattern": "lm_head", "scheme": "int4-g32"}]}, "QC-BUDGET-005", "embedding"),
        ("gpt2", {}, "QC-BUDGET-005", "conv1d"),
        ("t5", {}, "QC-BUDGET-005", "looks at"),
    ],
)
def test_what_can_not_be_decided_is_an_error(
    name: str, settings: dict[str, Any], code: str, words: str, sources: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        conversion.convert(recipe(sources / name, tmp_path / "out", **{"budget": "5", **settings}))
    assert raised.value.code == code
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused_before_anything_is_measured(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "allocate", lambda *_: pytest.fail("it measures"))
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError) as raised:
        conversion.convert(recipe(sources / "llama", tmp_path / "out", "5"))
    assert raised.value.code == "QC-OUTPUT-004"


def test_what_is_undecided_fits_every_width() -> None:
    assert QuantScheme.parse("int4-channel") == preparation.UNDECIDED
