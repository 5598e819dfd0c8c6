"""Parts of a recipe, and how schemes and budgets are written in one."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from qconvert.errors import QConvertError, UsageError
from qconvert.ir.budget import parse_budget
from qconvert.ir.scheme import Cast, QuantScheme, parse_scheme
from qconvert.vocabulary import RANGES, TUNER


def _parse_scheme(value: object, parse: Callable[[str], object] = parse_scheme) -> object:
    if isinstance(value, QuantScheme | Cast):
        return value
    if not isinstance(value, str):
        raise ValueError("a scheme is written as text, such as int4-g32")  # pydantic collects these
    try:
        return parse(value)
    except QConvertError as error:  # pydantic collects ValueErrors and names the field
        raise ValueError(f"{error.message}; {error.hint}") from error


def _parse_rule_scheme(value: object) -> object:
    return None if value in ("float", None) else _parse_scheme(value, QuantScheme.parse)


def _parse_budget(value: object) -> object:
    """YAML has 4.5 as a number. Raises UsageError QC-BUDGET-001."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(text, str):
        parse_budget(text)
    return text


def without_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values in the order of their first appearance."""
    return tuple(dict.fromkeys(values))


# A scheme is written as text, and the JSON schema says so.
_TEXT = WithJsonSchema({"type": "string"})

SchemeField = Annotated[QuantScheme | Cast, BeforeValidator(_parse_scheme), PlainSerializer(str), _TEXT]

RuleSchemeField = Annotated[
    QuantScheme | None,
    BeforeValidator(_parse_rule_scheme),
    PlainSerializer(lambda scheme: "float" if scheme is None else str(scheme)),
    _TEXT,
]

BudgetField = Annotated[str, BeforeValidator(_parse_budget)]


class Part(BaseModel):
    """A frozen part of a recipe, which refuses fields that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Rule(Part):
    """A scheme for the layers that match `pattern` (fnmatch on the full module name); the first match wins."""

    pattern: str = Field(description="fnmatch on the full module name, e.g. '*.mlp.*'")
    scheme: RuleSchemeField = Field(description="a scheme, or 'float', which keeps the layer in float")
    reason: str | None = Field(
        None,
        exclude_if=lambda reason: reason is None,
        description="why a layer stays in float, as the report says it; a budget gives what it has measured",
    )

    def matches(self, name: str) -> bool:
        """Return whether the rule's pattern fits the layer `name`, case and all."""
        return fnmatchcase(name, self.pattern)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse 'PATTERN=SCHEME' or 'PATTERN=float' of the command line. Raises UsageError QC-RECIPE-002, QC-SCHEME-001."""
        pattern, separator, scheme = text.rpartition("=")
        if not separator or not pattern:
            raise UsageError(
                "QC-RECIPE-002", f"'{text}' is not a rule", hint="write --rule 'PATTERN=SCHEME' or --rule 'PATTERN=float'"
            )
        return cls(pattern=pattern, scheme=None if scheme == "float" else QuantScheme.parse(scheme))


class DataSpec(Part):
    """The source of samples, and how many of them are taken."""

    source: str | None = Field(
        None,
        description=".txt, .jsonl, .parquet or .npz file, 'builtin', or what a plugin finds; unset: evaluation takes what "
        "calibration has, calibration takes 'builtin', or a module's example inputs",
    )
    samples: int = Field(32, ge=1, description="how many samples: token windows, sentences or rows")
    length: int = Field(256, ge=8, description="tokens per sample, for text")


class Tuning(Part):
    """How each repeated block is moved towards the float block's output once its layers are quantized."""

    steps: int = Field(20, ge=1, description="steps of signed gradient descent, at most")
    seconds: float | None = Field(
        None, gt=0, description="time for each block, at most; what is reached in it depends on the machine"
    )
    tuner: str = Field(TUNER, description=f"algorithm: {TUNER}, which takes steps and seconds, or a plugin's")
    options: dict[str, Any] = Field({}, description="options of a plugin's tuner, by name")

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the tuner."""
        return {"steps": self.steps, "seconds": self.seconds} if self.tuner == TUNER else self.options

    @model_validator(mode="after")
    def _take_options_of_the_tuner(self) -> Self:
        foreign = {"options"} if self.tuner == TUNER else {"steps", "seconds"}
        if given := sorted(foreign & self.model_fields_set):
            own = "steps and seconds" if self.tuner == TUNER else "options"
            raise ValueError(f"the tuner {self.tuner} takes {own}, not {', '.join(given)}")
        return self

    @model_serializer(mode="wrap")
    def _without_foreign_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = ("steps", "seconds") if self.tuner == TUNER else ("tuner", "options")
        written: dict[str, Any] = handler(self)
        return {name: written[name] for name in fields}


class Ranges(Part):
    """How the ranges of activations are chosen from what calibration saw of them."""

    estimator: str = Field(
        RANGES, description="algorithm: min-max, moving-average, percentile, mse, kl, or the estimator of a plugin"
    )
    options: dict[str, Any] = Field({}, description="options of the estimator, by name")
