"""Recipe: all that a run needs, in one document (YAML in, JSON Schema out)."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from qconvert.errors import QConvertError, UsageError, in_one_line
from qconvert.ir.budget import Budget
from qconvert.ir.report import Size
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.task import Task
from qconvert.yaml_text import TooMuchError, read_yaml


def _parse_scheme(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return QuantScheme.parse(value)
    except QConvertError as error:  # pydantic collects ValueErrors and names the field
        raise ValueError(f"{error.message}; {error.hint}") from error


def _parse_rule_scheme(value: object) -> object:
    return None if value == "float" else _parse_scheme(value)


def _parse_budget(value: object) -> object:
    """YAML has 4.5 as a number. Raises UsageError QC-BUDGET-001."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(text, str):
        Budget.parse(text)
    return text


def _without_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


# A scheme is written as text, and the JSON schema says so.
_TEXT = WithJsonSchema({"type": "string"})
SchemeField = Annotated[QuantScheme, BeforeValidator(_parse_scheme), PlainSerializer(str), _TEXT]
RuleSchemeField = Annotated[
    QuantScheme | None,
    BeforeValidator(_parse_rule_scheme),
    PlainSerializer(lambda scheme: "float" if scheme is None else str(scheme)),
    _TEXT,
]
BudgetField = Annotated[str, BeforeValidator(_parse_budget)]
Target = Literal["cpu", "cuda"]
CudaDtype = Literal["float16", "bfloat16"]
Layout = Literal["transformers", "onnx"]
Logits = Literal["all", "last"]
Preset = Literal["fast", "balanced", "best", "int8"]
Metric = Literal["kl", "top1", "perplexity", "cosine", "max_abs", "ratio", "speedup", "weights_bytes", "average_bits"]


# What a preset sets where the recipe doesn't; chosen by measurement (docs/quantizers.md).
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"quantizer": "per-channel", "scheme": "int4-g32-asym", "options": {"clip": "mse"}},
    "balanced": {"quantizer": "awq", "scheme": "int4-g32-asym"},
    "best": {"quantizer": "gptq", "scheme": "int4-g32-asym", "sequential": True, "tuning": {"steps": 20}},
    "int8": {"quantizer": "smoothquant", "scheme": "int8-channel-a8", "options": {"max_outliers": 16}},
}

PLUGIN_SECONDS = 600  # what one call of a plugin may take, unless it is said

# The name that stands for "decide the schemes", and the quantizer that then does the work.
AUTO, AUTO_QUANTIZER = "auto", "gptq"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Rule(_Part):
    """Which scheme the layers that match `pattern` (fnmatch on the full module name) get; the first match wins."""

    pattern: str = Field(description="fnmatch on the full module name, e.g. '*.mlp.*'")
    scheme: RuleSchemeField = Field(description="a scheme, or 'float', which keeps the layer in float")

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern)

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the command line: 'PATTERN=SCHEME' or 'PATTERN=float'. Raises UsageError QC-RECIPE-002, QC-SCHEME-001."""
        pattern, separator, scheme = text.rpartition("=")
        if not separator or not pattern:
            raise UsageError(
                "QC-RECIPE-002", f"'{text}' is not a rule", hint="write --rule 'PATTERN=SCHEME' or --rule 'PATTERN=float'"
            )
        return cls(pattern=pattern, scheme=None if scheme == "float" else QuantScheme.parse(scheme))


class Gate(_Part):
    """A limit that the artifact must keep, e.g. kl <= 0.2 or cosine >= 0.99."""

    metric: Metric = Field(description="a number of report.json, which the task must have")
    comparison: Literal["<=", ">="]
    limit: float

    def __str__(self) -> str:
        """As on the command line: 'kl<=0.2'."""
        return f"{self.metric}{self.comparison}{self.limit:.12g}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`. Raises UsageError QC-RECIPE-003."""
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*([-+.\deE]+)\s*", text)
        try:
            if match is None:
                raise ValueError
            return cls(metric=match[1], comparison=match[2], limit=float(match[3]))
        except ValueError as error:  # pydantic's ValidationError is a ValueError
            metrics = ", ".join(cls.model_fields["metric"].annotation.__args__)  # type: ignore[union-attr]
            raise UsageError(
                "QC-RECIPE-003",
                f"'{text}' is not a gate",
                hint=f"write METRIC<=LIMIT or METRIC>=LIMIT, METRIC one of {metrics}",
            ) from error


# What verification does not measure of each kind of model.
UNMEASURED: dict[Task, tuple[Metric, ...]] = {
    "causal-lm": ("cosine",),
    "seq2seq-lm": ("cosine",),
    "encoder": ("kl", "top1", "perplexity"),
    "module": ("kl", "perplexity"),
}


def refuse_gates(gates: Sequence[Gate], task: Task | None) -> None:
    """Raises UsageError QC-GATE-002 for gates on a metric that a task does not have. task: None where it is not known yet."""
    lacking = [str(gate) for gate in gates if task is not None and gate.metric in UNMEASURED[task]]
    if task is not None and lacking:
        measured = [metric for metric in get_args(Metric) if metric not in UNMEASURED[task]]
        raise UsageError(
            "QC-GATE-002",
            f"{', '.join(lacking)}: that is not measured of a model whose task is {task}",
            hint=f"take one of {', '.join(measured)}",
        )


class DataSpec(_Part):
    """Where samples come from and how many are taken."""

    source: str | None = Field(
        None,
        description=".txt, .jsonl, .parquet or .npz file, 'builtin', or what a plugin finds; unset: evaluation takes what "
        "calibration has, calibration takes 'builtin', or a module's example inputs",
    )
    samples: int = Field(32, ge=1, description="how many samples: token windows, sentences or rows")
    length: int = Field(256, ge=8, description="tokens per sample, for text")


class Tuning(_Part):
    """How long the scales and roundings of each repeated block are moved towards the float block's output."""

    steps: int = Field(20, ge=1, description="steps of signed gradient descent, at most")
    seconds: float | None = Field(
        None, gt=0, description="time for each block, at most; what is reached in it depends on the machine"
    )


class Recipe(_Part):
    """One conversion. The command line has flags for most fields, which override the file."""

    model: str = Field(description="a Hugging Face folder, pkg:PACKAGE/PATH, module:FACTORY, or what a plugin loads")
    output: Path = Field(description="folder to write; must not exist unless force is set")
    preset: Preset | None = Field(
        None,
        description="quantizer, scheme, sequential and tuning for what you want: seconds without data, a good and quick one, "
        "the nearest to float, or int8 activations; what the recipe sets itself goes before",
    )
    quantizer: str = Field("per-channel", description="algorithm: a built-in quantizer, a plugin's, or auto, with a budget")
    scheme: SchemeField | None = Field(None, description="number format, e.g. int4-g32-asym; unset: the quantizer's default")
    budget: BudgetField | None = Field(
        None, description="for auto: average bits per quantized weight, e.g. 4.5, or size of all weights, e.g. 90MB"
    )
    options: dict[str, Any] = Field({}, description="options of the quantizer, by name")
    plugins: tuple[Path, ...] = Field((), description="Python files with plugins that are tried without being installed")
    plugin_timeout: float = Field(PLUGIN_SECONDS, gt=0, description="seconds that one call of a plugin may take")
    rules: tuple[Rule, ...] = Field((), description="layers that get another scheme, or stay in float; the first match wins")
    calibration: DataSpec = Field(DataSpec(), description="data on which quantizers observe the inputs of layers")
    evaluation: DataSpec = Field(DataSpec(), description="data on which the artifact is compared with the float model")
    seed: int = Field(0, ge=0, description="which samples are drawn from the data")
    targets: Annotated[tuple[Target, ...], AfterValidator(_without_repeats)] = Field(
        ("cpu",), min_length=1, description="where the artifact is to run"
    )
    cuda_dtype: CudaDtype = Field(
        "float16", description="type of activations and caches on CUDA; bfloat16 has float32's range, but fewer digits"
    )
    logits: Logits = Field(
        "all",
        description="whose logits a decoder gives: all positions, or the last of each row alone, which spares the head the "
        "rest of a prompt",
    )
    layout: Layout = Field(
        "transformers", description="who must be able to read model.safetensors: transformers too, or model.onnx alone"
    )
    sequential: bool = Field(
        False, description="quantize each block for what the quantized blocks before it put out; for quantizers that use data"
    )
    tuning: Tuning | None = Field(
        None, description="move scales and roundings of each block until its output is closest to the float one; unset: don't"
    )
    device: str = Field("cpu", description="where blocks run during calibration: cpu or cuda")
    gates: tuple[Gate, ...] = Field((), description="limits that the artifact must keep; a missed one is exit code 1")
    verify: bool = Field(True, description="run the artifact; without that, the report says that nothing is proven")
    allow_unverified: bool = Field(False, description="succeed although a target could not be run here")
    force: bool = Field(False, description="replace the output folder of an earlier run")

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, settings: Any) -> Any:
        preset = PRESETS.get(str(settings.get("preset"))) if isinstance(settings, dict) else None
        if preset is None:  # none, or one that the field itself refuses
            return settings
        if settings.get("quantizer", preset["quantizer"]) != preset["quantizer"]:
            raise ValueError(
                f"preset {settings['preset']} uses the quantizer {preset['quantizer']}, not {settings['quantizer']}: "
                "give one of preset and quantizer"
            )
        return {**preset, **settings, "options": {**preset.get("options", {}), **(settings.get("options") or {})}}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """Validate what a file and the command line gave. Raises UsageError QC-RECIPE-001 with every wrong field."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'recipe'}: {item['msg']}" for item in error.errors())
            known = ", ".join(cls.model_fields)
            raise UsageError("QC-RECIPE-001", f"the recipe is not valid: {problems}", hint=f"fields are {known}") from error

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        """Raises UsageError QC-BUDGET-002 and -003."""
        if (self.budget is not None) != (self.quantizer == AUTO):
            given, missing = ("a budget", f"the quantizer {AUTO}") if self.budget else (f"the quantizer {AUTO}", "a budget")
            raise UsageError(
                "QC-BUDGET-002",
                f"{given} is given without {missing}",
                hint=f"schemes are chosen with both: --quantizer {AUTO} --budget 4.5",
            )
        if self.budget is not None and self.scheme is not None:
            raise UsageError(
                "QC-BUDGET-003",
                f"the budget {self.budget} decides the schemes, but the recipe wants {self.scheme}",
                hint="leave out the scheme; a rule may name those of single layers",
            )
        return self

    @model_validator(mode="after")
    def _check_gates(self) -> Self:
        """Raises UsageError QC-GATE-001."""
        unjudged = [str(gate) for gate in self.gates if gate.metric not in Size.model_fields]
        if unjudged and not self.verify:
            raise UsageError(
                "QC-GATE-001",
                f"without verification nobody measures what these gates limit: {', '.join(unjudged)}",
                hint="verify, or leave them out here and give them to qconvert verify OUT, each with --gate",
            )
        return self

    @property
    def worker(self) -> str:
        """The quantizer that makes the tensors."""
        return AUTO_QUANTIZER if self.quantizer == AUTO else self.quantizer

    def decided(self, scheme: QuantScheme, rules: Sequence[Rule] = ()) -> Self:
        """What a recipe with a budget comes down to, once it is known that layers get `scheme` unless `rules` say otherwise."""
        changes = {"quantizer": self.worker, "budget": None, "scheme": scheme, "rules": (*rules, *self.rules)}
        return self.model_copy(update=changes)

    def scheme_of(self, name: str, default: QuantScheme) -> QuantScheme | None:
        """The scheme of the layer `name`: the first rule that matches, else the recipe's, else `default`."""
        rule = self.rule_for(name)
        return rule.scheme if rule else self.scheme or default

    def rule_for(self, name: str) -> Rule | None:
        """The first rule that matches the layer `name`."""
        return next((rule for rule in self.rules if rule.matches(name)), None)


# What all recipes of a comparison have in common: they are calibrated, and judged, on the same data.
SHARED = (
    *("model", "output", "calibration", "evaluation", "seed", "device", "verify", "allow_unverified", "force"),
    *("plugins", "plugin_timeout"),
)
# Of a recipe's folder; compare.json and compare.png lie beside it.
NAME = re.compile(r"(?!compare\.)[a-z0-9][a-z0-9._+-]{0,99}", re.IGNORECASE)


def named_recipes(settings: dict[str, Any]) -> dict[str, Recipe]:
    """Name -> recipe, of settings whose 'recipes' lists several: each has a 'name', and what differs from the rest.

    A recipe's output is the folder of its name in 'output'.

    Raises UsageError QC-COMPARE-001 without such a list, QC-COMPARE-002 for a name that is missing, twice there or no name
    of a folder, QC-COMPARE-003 for a field that can't differ, and QC-RECIPE-001.
    """
    common = {key: value for key, value in settings.items() if key != "recipes"}
    entries = settings.get("recipes")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(
            "QC-COMPARE-001",
            "there is nothing to compare" if not entries else f"'recipes' is {reprlib.repr(entries)}, not a list of recipes",
            hint="list them in the file, 'recipes: [{name: a, quantizer: awq}, ...]', or give --try QUANTIZER:SCHEME for each",
        )
    recipes: dict[str, Recipe] = {}
    for entry in entries:
        name = _name(entry, {known.lower() for known in recipes})
        fixed = [key for key in SHARED if key in entry]
        if fixed:
            raise UsageError(
                "QC-COMPARE-003",
                f"recipe {name!r} has its own {', '.join(map(repr, fixed))}, which all recipes of a comparison share",
                hint="write it beside 'recipes', or run that recipe by itself",
            )
        own = {key: value for key, value in entry.items() if key != "name"}
        try:
            recipes[name] = Recipe.from_settings({**common, **own, "output": f"{common['output']}/{name}"})
        except UsageError as error:
            raise UsageError(error.code, f"recipe {name!r}: {error.message}", hint=error.hint) from error
    return recipes


def _name(entry: dict[str, Any], taken: set[str]) -> str:
    """The name of an entry of 'recipes': that of a folder, also where the file system ignores case."""
    name = entry.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        given = f"a recipe has the name {reprlib.repr(name)}"
        problem = given if "name" in entry else f"the recipe {reprlib.repr(entry)} has no name"
    elif name.lower() in taken:
        problem = f"two recipes have the name {name!r}"
    else:
        return name
    raise UsageError(
        "QC-COMPARE-002",
        problem,
        hint="give each a 'name' of its own, of letters, digits, '.', '_', '+' and '-': a folder gets it",
    )


def tried(text: str) -> dict[str, Any]:
    """From the command line: 'QUANTIZER' or 'QUANTIZER:SCHEME' -> an entry of 'recipes'. Raises UsageError QC-COMPARE-004."""
    quantizer, separator, scheme = text.partition(":")
    if not quantizer or (separator and not scheme):
        raise UsageError(
            "QC-COMPARE-004", f"'{text}' is no recipe to try", hint="write --try QUANTIZER or --try QUANTIZER:SCHEME"
        )
    return {"name": text.replace(":", "-"), "quantizer": quantizer} | ({"scheme": scheme} if scheme else {})


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, paths relative to the working directory.

    Raises UsageError QC-RECIPE-004 if it can't be read or is no mapping, QC-RECIPE-005 if it is too large or deep.
    """
    try:
        settings = read_yaml(path)
        if not isinstance(settings, dict):
            raise ValueError("it holds no mapping of fields")
    except TooMuchError as error:
        raise UsageError(
            "QC-RECIPE-005", f"recipe {path}: {error}", hint="write out what is meant, without aliases of aliases"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(
            "QC-RECIPE-004",
            f"recipe {path}: {in_one_line(error)}",
            hint="give a YAML file with at least 'model:' and 'output:'",
        ) from error
    return settings
