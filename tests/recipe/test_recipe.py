"""Recipe: what a run needs, from YAML and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert.errors import UsageError
from qconvert.ir.scheme import QuantScheme
from qconvert.recipe import Recipe
from qconvert.recipe.fields import DataSpec, Rule
from qconvert.recipe.file import read_recipe
from qconvert.recipe.gates import Gate
from qconvert.vocabulary import PRESETS

MINIMAL = {"model": "M", "output": "O"}


def code(error: pytest.ExceptionInfo[UsageError]) -> str:
    return error.value.code


# --- the whole recipe ---


def test_model_and_output_are_enough() -> None:
    recipe = Recipe.from_settings(MINIMAL)
    assert recipe.output == Path("O")
    assert (recipe.quantizer, recipe.targets, recipe.layout, recipe.verify) == ("per-channel", ("cpu",), "transformers", True)
    assert recipe.scheme is None  # the quantizer's default


def test_yaml_and_json_mean_the_same(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: M\noutput: O\nscheme: int4-g32-asym\n"
        "rules:\n- {pattern: lm_head, scheme: float}\n- {pattern: '*', scheme: int8}\n"
    )
    recipe = Recipe.from_settings(read_recipe(path))
    assert recipe.rules == (Rule(pattern="lm_head", scheme=None), Rule(pattern="*", scheme=QuantScheme.parse("int8")))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert '"scheme":"int4-g32-asym"' in recipe.model_dump_json()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_it_stands_for_written_out(preset: str) -> None:
    short = Recipe.from_settings(MINIMAL | {"preset": preset})
    long = Recipe.from_settings(MINIMAL | PRESETS[preset])
    assert short.model_copy(update={"preset": None}) == long
    assert Recipe.model_validate_json(short.model_dump_json()) == short


def test_what_is_set_beside_a_preset_goes_before_it() -> None:
    settings = MINIMAL | {"preset": "int8", "scheme": "int8-tensor-a8", "options": {"grid": 5}}
    recipe = Recipe.from_settings(settings)
    assert str(recipe.scheme) == "int8-tensor-a8"
    assert recipe.options == {"max_outliers": 16, "grid": 5}
    assert Recipe.from_settings(MINIMAL | {"preset": "best", "tuning": None}).tuning is None


def test_ranges_are_written_only_where_they_are_set() -> None:
    assert "ranges" not in Recipe.from_settings(MINIMAL).model_dump(mode="json")
    for ranges in ({}, {"estimator": "kl"}, {"estimator": "percentile", "options": {"percentile": 99}}):
        made = Recipe.from_settings(MINIMAL | {"ranges": ranges})
        assert made.model_dump(mode="json")["ranges"] == {"estimator": "mse", "options": {}, **ranges}
        assert Recipe.from_settings(made.model_dump(mode="json")) == made
        assert Recipe.model_validate_json(made.model_dump_json()) == made
    with pytest.raises(UsageError, match=r"ranges\.percentile: Extra inputs are not permitted"):
        Recipe.from_settings(MINIMAL | {"ranges": {"percentile": 99}})


def test_timings_have_some_seconds() -> None:
    assert "timing_seconds" not in Recipe.from_settings(MINIMAL).model_dump()  # as before there was such a field
    made = Recipe.from_settings(MINIMAL | {"timing_seconds": 30})
    assert Recipe.model_validate_json(made.model_dump_json()) == made
    for wrong in (0, -1, "long", float("inf"), float("nan")):
        with pytest.raises(UsageError, match="timing_seconds: Input should be") as raised:
            Recipe.from_settings(MINIMAL | {"timing_seconds": wrong})
        assert code(raised) == "QC-RECIPE-001"


def test_a_preset_and_another_quantizer_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="preset best uses the quantizer gptq, not awq") as raised:
        Recipe.from_settings(MINIMAL | {"preset": "best", "quantizer": "awq"})
    assert code(raised) == "QC-RECIPE-001"
    with pytest.raises(UsageError, match="preset: Input should be 'fast', 'balanced', 'best' or 'int8'"):
        Recipe.from_settings(MINIMAL | {"preset": "worst"})


def test_a_recipe_has_a_json_schema() -> None:
    properties = Recipe.model_json_schema()["properties"]
    assert set(properties) == set(Recipe.model_fields)


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.from_settings(MINIMAL).model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"output": "O"}, "model: Field required"),
        (MINIMAL | {"quantiser": "awq"}, "quantiser: Extra inputs are not permitted"),
        (MINIMAL | {"scheme": "int5"}, "scheme: Value error, 'int5' is not a scheme"),
        (MINIMAL | {"scheme": 4}, "scheme: "),
        (MINIMAL | {"targets": ["tpu"]}, "targets.0: Input should be 'cpu' or 'cuda'"),
        (MINIMAL | {"calibration": {"samples": 0}}, "calibration.samples: Input should be greater than or equal to 1"),
        (MINIMAL | {"rules": [{"pattern": "*", "scheme": "int3"}]}, "rules.0.scheme: Value error, 'int3' is not a scheme"),
    ],
)
def test_a_wrong_field_is_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as raised:
        Recipe.from_settings(settings)
    assert code(raised) == "QC-RECIPE-001"
    assert words in raised.value.message
    assert "fields are model, output, preset, quantizer" in raised.value.hint


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"(?s)model: .*output: .*seed: "):
        Recipe.from_settings({"seed": -1})


# --- rules ---


def test_the_first_rule_that_matches_wins() -> None:
    rules = ("*.0.*=float", "*.q_proj=int8", "*=int4-g32")
    recipe = Recipe(model="M", output=Path("O"), scheme=QuantScheme.parse("int4"), rules=tuple(map(Rule.parse, rules)))
    default = QuantScheme.parse("int8-tensor")
    chosen = [str(recipe.scheme_of(name, default)) for name in ("layers.0.q_proj", "layers.1.q_proj", "layers.1.k_proj")]
    assert chosen == ["None", "int8-channel", "int4-g32"]


def test_without_a_rule_the_recipes_scheme_holds_and_else_the_default() -> None:
    default = QuantScheme.parse("int8-tensor")
    assert Recipe(model="M", output=Path("O"), scheme=QuantScheme.parse("int4")).scheme_of("x", default) == QuantScheme.parse(
        "int4"
    )
    assert Recipe(model="M", output=Path("O")).scheme_of("x", default) == default


def test_patterns_are_case_sensitive_and_match_the_whole_name() -> None:
    recipe = Recipe(model="M", output=Path("O"), rules=(Rule.parse("head=float"),))
    default = QuantScheme.parse("int8")
    assert [recipe.scheme_of(name, default) for name in ("head", "Head", "lm.head")] == [None, default, default]


def test_a_pattern_may_hold_an_equals_sign() -> None:
    assert Rule.parse("a=b=int8") == Rule(pattern="a=b", scheme=QuantScheme.parse("int8"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("lm_head", "QC-RECIPE-002"), ("=int8", "QC-RECIPE-002"), ("x=int5", "QC-SCHEME-001"), ("x=", "QC-SCHEME-001")],
)
def test_what_is_no_rule_is_refused(text: str, expected: str) -> None:
    with pytest.raises(UsageError) as raised:
        Rule.parse(text)
    assert code(raised) == expected


# --- gates ---


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("kl<=0.2", Gate(metric="kl", comparison="<=", limit=0.2)),
        (" cosine >= .99 ", Gate(metric="cosine", comparison=">=", limit=0.99)),
        ("weights_bytes<=1e8", Gate(metric="weights_bytes", comparison="<=", limit=1e8)),
        ("weights_bytes<=123456789", Gate(metric="weights_bytes", comparison="<=", limit=123456789)),
    ],
)
def test_a_gate_is_written_as_it_is_said(text: str, gate: Gate) -> None:
    assert Gate.parse(text) == gate
    assert Gate.parse(str(gate)) == gate


@pytest.mark.parametrize("text", ["kl", "kl<0.2", "kl<=", "kl<=e", "kl<=nan", "loss<=1", "<=1"])
def test_what_is_no_gate_is_refused_and_the_metrics_are_listed(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        Gate.parse(text)
    assert code(raised) == "QC-RECIPE-003"
    assert f"'{text}'" in raised.value.message
    assert "kl, kl_decode, top1, perplexity, cosine" in raised.value.hint


# --- files ---


@pytest.mark.parametrize(
    "content",
    ["- a\n- b\n", "model: [", "", "\x00", "!!python/object/apply:os.system ['true']"],
    ids=["a-list", "unclosed", "empty", "binary", "code"],
)
def test_what_is_no_recipe_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as raised:
        read_recipe(path)
    assert code(raised) == "QC-RECIPE-004"
    assert "recipe.yaml" in raised.value.message


def test_a_missing_recipe_file_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    for name in ("no.yaml", "latin.yaml"):
        with pytest.raises(UsageError, match=name):
            read_recipe(tmp_path / name)


NESTED = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGED = "".join(f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"b0: &b0 [x]\n{NESTED}", "more than 10000 values"),
        (f"b0: &b0 {{x: 1}}\n{MERGED}", "more than 10000 values"),
        ("options: {x: [" + "1, " * 10_000 + "]}", "more than 10000 values"),
        ("model: " + "[" * 200_000, "more than 20 deep"),
        ("- " * 100_000, "more than 20 deep"),
        ("a: &a " + "[" * 15 + "]" * 15 + "\nb: " + "[" * 15 + "*a" + "]" * 15, "more than 20 deep"),
        ("model: " + "x" * 300_000, "larger than 262144 bytes"),
    ],
    ids=["aliases", "merged", "wide", "deep", "deep-block", "deep-by-alias", "long"],
)
def test_what_stands_for_too_much_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, words: str
) -> None:
    monkeypatch.setattr("yaml.safe_load", None)
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as raised:
        read_recipe(path)
    assert code(raised) == "QC-RECIPE-005"
    assert f"recipe.yaml: it is {words}" in raised.value.message.replace("it holds", "it is").replace("it is nested", "it is")


def test_a_file_that_never_ends_is_not_read_to_its_end() -> None:
    with pytest.raises(UsageError) as raised:
        read_recipe(Path("/dev/zero"))
    assert code(raised) == "QC-RECIPE-005"


def test_aliases_are_what_they_stand_for(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: M\noutput: O\ncalibration: &text {source: a.txt, samples: 4}\nevaluation: {<<: *text, length: 64}\n"
    )
    recipe = Recipe.from_settings(read_recipe(path))
    assert (recipe.evaluation.source, recipe.evaluation.samples, recipe.evaluation.length) == ("a.txt", 4, 64)


def test_an_alias_of_what_it_lies_in_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("options: &o {x: *o}")
    with pytest.raises(UsageError, match=r"the alias \*o stands for nothing") as raised:
        read_recipe(path)
    assert code(raised) == "QC-RECIPE-004"


def test_data_defaults() -> None:
    assert DataSpec() == DataSpec(source=None, samples=32, length=256)


def test_targets_are_some_and_each_once() -> None:
    with pytest.raises(UsageError, match="targets"):
        Recipe.from_settings({"model": "m", "output": "o", "targets": []})
    assert Recipe.from_settings({"model": "m", "output": "o", "targets": ["cpu", "cuda", "cpu"]}).targets == ("cpu", "cuda")
