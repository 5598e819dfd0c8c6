"""What compare says: the front, the picture, the table, and what it is told by a file and by flags."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from comparisons import comparison, entry, failed
from matplotlib import rcParams
from PIL import Image
from rich.console import Console

from qconvert.cli import main
from qconvert.errors import UsageError
from qconvert.ir.comparison import Comparison, pareto_front
from qconvert.ir.report import GateResult
from qconvert.pipeline import comparison as comparing
from qconvert.recipe import Recipe
from qconvert.recipe.comparison import SHARED, named_recipes, tried
from qconvert.recipe.file import read_recipe
from qconvert.report.comparison import table
from qconvert.report.plot import plot

ROOT = Path(__file__).parents[2]

# --- the front ---


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ({}, ""),
        ({"a": (1, 1)}, "a"),
        ({"a": (1, 3), "b": (2, 2), "c": (3, 1)}, "abc"),
        ({"a": (1, 3), "b": (2, 2), "c": (3, 2.5)}, "ab"),  # b is smaller and better than c
        ({"a": (1, 1), "b": (1, 2), "c": (2, 1)}, "a"),  # as small, but worse; as good, but larger
        ({"a": (1, 1), "b": (1, 1), "c": (2, 2)}, "ab"),  # equals do not beat each other
        ({"a": (0, float("inf")), "b": (1, 0)}, "ab"),
        ({"a": (1, 1, 2), "b": (1, 2, 1), "c": (2, 2, 2)}, "ab"),  # in any number of coordinates
    ],
)
def test_the_front_is_what_no_other_point_beats(points: dict[str, tuple[float, ...]], front: str) -> None:
    assert pareto_front(points) == set(front)


def test_what_was_not_measured_is_no_point() -> None:
    found = comparison(entry("a", kl=0.1), entry("unverified"), failed("b", 5), entry("large", kl=0.2, weights_bytes=2000))
    assert found.points == {"a": (1000, 0.1), "large": (2000, 0.2)}
    assert found.front == {"a"}


def test_encoders_are_judged_by_their_cosine() -> None:
    found = comparison(entry("a", cosine=0.75, task="encoder"), entry("b", cosine=1 + 1e-7, task="encoder"), task="encoder")
    assert found.points == {"a": (1000, 0.25), "b": (1000, 0.0)}
    assert found.front == {"b"}


# --- the picture ---

PICTURES = {
    "one": comparison(entry("a", kl=0.1)),
    "equal points": comparison(entry("a", kl=0.1), entry("b", kl=0.1), entry("c", kl=0.1)),
    "no loss": comparison(entry("a", kl=0.0), entry("b", kl=0.1, weights_bytes=500)),
    "some without speed": comparison(entry("a", kl=0.1, decode=None), entry("b", kl=0.2)),
    "none with speed": comparison(entry("a", kl=0.1, decode=None)),
    "encoder": comparison(entry("a", cosine=0.9, task="encoder", decode=None), failed("b", 2), task="encoder"),
    "crowd": comparison(*(entry(f"a-rather-long-name-{n}", kl=0.1 + n / 1e4, weights_bytes=1000 + n) for n in range(15))),
    "odd name": comparison(entry("a", kl=0.1), model="$x^{2$ \\n"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("made", PICTURES.values(), ids=PICTURES.keys())
def test_the_picture_is_a_png(made: Comparison) -> None:
    with Image.open(io.BytesIO(plot(made))) as image:
        assert image.format == "PNG"
        assert image.size == (1350, 825)
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 20  # something is drawn


def test_the_picture_is_not_drawn_with_the_settings_of_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plot(PICTURES["one"])
    monkeypatch.setitem(rcParams, "text.usetex", True)  # as a matplotlibrc there can: labels would run LaTeX
    monkeypatch.setitem(rcParams, "axes.facecolor", "black")
    assert plot(PICTURES["one"]) == expected


# --- the table ---


def shown(made: Comparison, width: int = 150) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(table(made))
    return str(console.file.getvalue()).splitlines()  # type: ignore[attr-defined]


GATE = GateResult(metric="kl", comparison="<=", limit=0.2, value=0.25, passed=False)


def test_the_table_has_a_row_per_recipe_and_a_star_for_the_front() -> None:
    large = entry("large", kl=0.25, weights_bytes=2000, passed=False, gates=(GATE,))
    good = entry("good", kl=0.1, gates=(GATE.model_copy(update={"value": 0.1, "passed": True}),))
    header, *lines = shown(comparison(good, large, failed("odd", 2)))
    assert " ".join(header.split()) == "recipe quantizer, scheme result size bits KL prefill decode seconds"
    assert [" ".join(line.split()) for line in lines] == [
        "* good absmax int8-tensor passed 1.0 kB 8 0.1 50 1.5",
        "large absmax int8-tensor failed 2.0 kB 8 0.25 50 1.5",
        "odd absmax int8-tensor QC-TEST-001",
        "",
        "large: kl <= 0.2: 0.25, MISSED",
        "odd: [QC-TEST-001] [it] broke",
        "next: mend it",
        "* no other recipe is as small and has as little loss",
        "prefill and decode: tokens/s; seconds: to quantize and write, without the shared calibration",
    ]


def test_the_table_of_an_encoder_has_cosines_and_milliseconds() -> None:
    header, row, *_ = shown(comparison(entry("a", cosine=0.98765, task="encoder"), task="encoder"))
    assert " ".join(header.split()) == "recipe quantizer, scheme result size bits cosine p50 ms seconds"
    assert " ".join(row.split()) == "* a absmax int8-tensor no limits 1.0 kB 8 0.98765 20 1.5"


def test_speeds_of_a_busy_machine_are_marked() -> None:
    made = comparison(entry("calm", kl=0.1, others_share=0.02), entry("busy", kl=0.2, others_share=0.4))
    _, calm, busy, *notes = shown(made)
    assert calm.split()[-3:] == ["0.1", "50", "1.5"]
    assert busy.split()[-3:] == ["0.2", "50?", "1.5"]
    assert "? measured while the machine was busy: not to be compared" in notes
    assert [recipe["others_share"] for recipe in made.document()["recipes"]] == [0.02, 0.4]
    assert plot(made) != plot(comparison(entry("calm", kl=0.1), entry("busy", kl=0.2)))  # white in the picture


def test_on_a_narrow_terminal_names_are_folded_and_numbers_are_not() -> None:
    text = "\n".join(shown(comparison(entry("a-rather-long-name", kl=0.123, passed=None), failed("b", 2)), width=80))
    assert "a-rather" in text
    assert all(word in text for word in ("not verified", "QC-TEST-001", "1.0 kB", "0.123", "seconds"))


# --- what to compare ---


def settings(*recipes: Any, **common: Any) -> dict[str, Any]:
    return {"model": "M", "output": "DIR", "recipes": list(recipes), **common}


def test_a_recipe_is_what_all_share_with_its_own_fields_on_top() -> None:
    own = {"quantizer": "awq", "scheme": "int4-g32", "layout": "onnx"}
    found = named_recipes(settings({"name": "a", **own}, {"name": "b"}, quantizer="absmax", seed=3))
    assert found == {
        "a": Recipe.from_settings({"model": "M", "output": "DIR/a", "seed": 3, **own}),
        "b": Recipe.from_settings({"model": "M", "output": "DIR/b", "seed": 3, "quantizer": "absmax"}),
    }


@pytest.mark.parametrize(
    ("recipes", "code", "words"),
    [
        (None, "QC-COMPARE-001", "there is nothing to compare"),
        ([], "QC-COMPARE-001", "there is nothing to compare"),
        ({"a": {}}, "QC-COMPARE-001", "'recipes' is {'a': {}}"),
        (["awq"], "QC-COMPARE-001", "'recipes' is ['awq']"),
        ([{"quantizer": "awq"}], "QC-COMPARE-002", "{'quantizer': 'awq'} has no name"),
        ([{"name": 3}], "QC-COMPARE-002", "the name 3"),
        ([{"name": "../a"}], "QC-COMPARE-002", "the name '../a'"),
        ([{"name": ".a"}], "QC-COMPARE-002", "the name '.a'"),
        ([{"name": "Compare.json"}], "QC-COMPARE-002", "the name 'Compare.json'"),
        ([{"name": "a"}, {"name": "A"}], "QC-COMPARE-002", "two recipes have the name 'A'"),
        ([{"name": "a", "scheme": "int5"}], "QC-RECIPE-001", "recipe 'a': the recipe is not valid: scheme"),
        ([{"name": "a", "quantiser": "awq"}], "QC-RECIPE-001", "quantiser"),
        *(([{"name": "a", field: 1}], "QC-COMPARE-003", f"recipe 'a' has its own '{field}'") for field in SHARED),
    ],
)
def test_a_wrong_list_is_a_usage_error_that_quotes_it(recipes: Any, code: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        named_recipes({"model": "M", "output": "DIR", "recipes": recipes})
    assert caught.value.code == code
    assert words in caught.value.message


def test_a_try_is_a_quantizer_with_or_without_a_scheme() -> None:
    assert tried("awq") == {"name": "awq", "quantizer": "awq"}
    assert tried("awq:int4-g32") == {"name": "awq-int4-g32", "quantizer": "awq", "scheme": "int4-g32"}


@pytest.mark.parametrize("text", ["", ":int4", "awq:"])
def test_a_malformed_try_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        tried(text)
    assert caught.value.code == "QC-COMPARE-004"


def test_the_documented_files_are_valid() -> None:
    text = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block.partition("```")[0]) for block in text.split("```yaml\n")[1:]]
    assert blocks
    for block in [*blocks, read_recipe(ROOT / "examples" / "compare.yaml")]:
        assert len(named_recipes(block)) > 1


def test_the_document_names_every_shared_field() -> None:
    text = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    assert ", ".join(f"`{field}`" for field in SHARED if field != "output") in text.replace("\n", " ")


# --- the command ---


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Recipe]:
    """What the command asked for; the answer has one recipe that failed."""
    asked: dict[str, Recipe] = {}

    def compare(recipes: dict[str, Recipe], progress: object, plugins: object) -> Comparison:
        asked.update(recipes)
        print("chatter")
        return comparison(entry("good", kl=0.1), failed("odd", 2))

    monkeypatch.setattr(comparing, "compare", compare)
    monkeypatch.chdir(tmp_path)
    return asked


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["compare", "--output", "DIR", *arguments])


def test_flags_and_tries_need_no_file(given: dict[str, Recipe]) -> None:
    command("--model", "M", "--try", "awq:int4-g32", "--try", "llm-int8", "--rule", "lm_head=float", "--gate", "kl<=0.2")
    common = {"model": "M", "rules": [{"pattern": "lm_head", "scheme": "float"}]}
    common |= {"gates": [{"metric": "kl", "comparison": "<=", "limit": 0.2}]}
    assert given == named_recipes(
        {**common, "output": "DIR", "recipes": [tried("awq:int4-g32"), tried("llm-int8")]},
    )


def test_tries_come_after_the_recipes_of_the_file(given: dict[str, Recipe], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: M\nlayout: onnx\nrecipes: [{name: mine, quantizer: awq, options: {grid: 5}}]")
    command("c.yaml", "--try", "absmax")
    assert list(given) == ["mine", "absmax"]
    assert [recipe.layout for recipe in given.values()] == ["onnx", "onnx"]
    assert given["mine"].options == {"grid": 5}


def test_the_table_is_on_stdout_and_the_exit_code_is_that_of_the_worst(given: dict[str, Recipe]) -> None:
    result = command("--model", "M", "--try", "awq")
    assert result.exit_code == 2
    assert result.stdout.splitlines()[1].startswith("* good")
    assert "chatter" not in result.stdout


def test_with_json_only_the_document_is_on_stdout(given: dict[str, Recipe]) -> None:
    result = command("--model", "M", "--try", "awq", "--json")
    assert json.loads(result.stdout) == comparison(entry("good", kl=0.1), failed("odd", 2)).document()
    assert "good" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--model", "M"], "QC-COMPARE-001"),
        (["--try", "awq"], "QC-USAGE-003"),
        (["--model", "M", "--try", "awq:int5"], "QC-RECIPE-001"),
        (["--model", "M", "--try", "awq", "--try", "awq"], "QC-COMPARE-002"),
        (["--model", "M", "--try", ":"], "QC-COMPARE-004"),
        (["--model", "M", "odd.yaml", "--try", "awq"], "QC-USAGE-004"),
        (["--model", "M", "--quantizer", "awq"], "QC-USAGE-001"),
    ],
)
def test_a_wrong_command_is_a_usage_error(given: dict[str, Recipe], tmp_path: Path, arguments: list[str], code: str) -> None:
    (tmp_path / "odd.yaml").write_text("recipes: all")
    result = command(*arguments, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["code"] == code
    assert given == {}
