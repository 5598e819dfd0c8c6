"""Recipe: all that a run needs, in one document (YAML in, JSON Schema out)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import AfterValidator, Field, ValidationError, model_validator

from qconvert.errors import UsageError
from qconvert.ir.budget import LossBudget, parse_budget
from qconvert.ir.report import Size
from qconvert.ir.scheme import Cast, QuantScheme
from qconvert.recipe.budget import check_budget
from qconvert.recipe.fields import BudgetField, DataSpec, Part, Ranges, Rule, SchemeField, Tuning, without_repeats
from qconvert.recipe.gates import Gate
from qconvert.vocabulary import (
    AUTO,
    AUTO_QUANTIZER,
    CAST,
    CAST_SCHEME,
    PLUGIN_SECONDS,
    PRESETS,
    TIMING_SECONDS,
    TRAINED,
    HalfType,
    KVCache,
    Layout,
    Logits,
    Prefill,
    Preset,
    TargetName,
)


class Recipe(Part):
    """One conversion. The command line has flags for most fields, which override the file."""

    model: str = Field(description="a Hugging Face folder, pkg:PACKAGE/PATH, module:FACTORY, or what a plugin loads")
    output: Path = Field(description="folder to write; must not exist unless force is set")
    preset: Preset | None = Field(
        None,
        description="quantizer, scheme, sequential and tuning for what you want: seconds without data, a good and quick one, "
        "the nearest to float, or int8 activations; what the recipe sets itself goes before",
    )
    quantizer: str = Field(
        "per-channel",
        description="algorithm: a built-in quantizer, a plugin's, auto, with a budget, or cast, to floats of half the width",
    )
    scheme: SchemeField | None = Field(
        None,
        description="number format, e.g. int4-g32-asym, or W4A16, W8A8 and the like; float16 or bfloat16 for cast; "
        "unset: the quantizer's default",
    )
    trained: Path | None = Field(
        None,
        exclude_if=lambda trained: trained is None,  # written where it is set: recipes of before mean what they meant
        description="file that save_trained wrote after quantization-aware training: weights and codes are taken as they are",
    )
    adapter: Path | None = Field(
        None,
        exclude_if=lambda adapter: adapter is None,  # written where it is set: recipes of before mean what they meant
        description="folder of a LoRA adapter that peft saved: it stays in float beside the quantized layers of the model",
    )
    merge_adapter: bool = Field(
        False,
        exclude_if=lambda merged: not merged,
        description="put the adapter into the weights before they are quantized",
    )
    budget: BudgetField | None = Field(
        None,
        description="for auto: average bits per quantized weight, e.g. 4.5, or size of all weights, e.g. 90MB; for schemes "
        "with -static: what the output may lose, e.g. cosine>=0.999",
    )
    options: dict[str, Any] = Field({}, description="options of the quantizer, by name")
    plugins: tuple[Path, ...] = Field((), description="Python files with plugins that are tried without being installed")
    plugin_timeout: float = Field(PLUGIN_SECONDS, gt=0, description="seconds that one call of a plugin may take")
    rules: tuple[Rule, ...] = Field((), description="layers that get another scheme, or stay in float; the first match wins")
    calibration: DataSpec = Field(DataSpec(), description="data on which quantizers observe the inputs of layers")
    evaluation: DataSpec = Field(DataSpec(), description="data on which the artifact is compared with the float model")
    seed: int = Field(0, ge=0, description="which samples are drawn from the data")
    targets: Annotated[tuple[TargetName, ...], AfterValidator(without_repeats)] = Field(
        ("cpu",), min_length=1, description="where the artifact is to run"
    )
    cuda_dtype: HalfType = Field(
        "float16", description="type of activations and caches on CUDA; bfloat16 has float32's range, but fewer digits"
    )
    logits: Logits = Field(
        "all",
        description="whose logits a decoder gives: all positions, or the last of each row alone, which spares the head the "
        "rest of a prompt",
    )
    prefill: Prefill = Field(
        "same",
        exclude_if=lambda prefill: prefill == "same",  # written where it is set: recipes of before mean what they meant
        description="how a decoder's packed weights run prompts on the CPU: the same way as they decode, or as int8 weights "
        "that are derived from them when the model is loaded, with int8 activations: faster, and a little less faithful",
    )
    kv_cache: KVCache = Field(
        "float",
        exclude_if=lambda cache: cache == "float",  # written where it is not: recipes of before mean what they meant
        description="what a decoder keeps of the tokens before: keys and values in float, or in int8 with scales that "
        "calibration finds, a quarter of the memory",
    )
    layout: Layout = Field(
        "transformers", description="who must be able to read the weights: transformers too, or model.onnx alone"
    )
    sequential: bool = Field(
        False, description="quantize each block for what the quantized blocks before it put out; for quantizers that use data"
    )
    tuning: Tuning | None = Field(
        None, description="move scales and roundings of each block until its output is closest to the float one; unset: don't"
    )
    ranges: Ranges | None = Field(
        None,
        exclude_if=lambda ranges: ranges is None,  # written where it is set: recipes of before mean what they meant
        description="how the ranges of activations are chosen, for schemes with -static; unset: the least squared error",
    )
    device: str = Field("cpu", description="where blocks run during calibration: cpu or cuda")
    gates: tuple[Gate, ...] = Field((), description="limits that the artifact must keep; a missed one is exit code 1")
    verify: bool = Field(True, description="run the artifact; without that, the report says that nothing is proven")
    timing_seconds: float = Field(
        TIMING_SECONDS,
        gt=0,
        allow_inf_nan=False,
        exclude_if=lambda seconds: seconds == TIMING_SECONDS,  # recipes of before mean what they meant
        description="seconds that all timings may take on a target; they end sooner where they are steady, and each thing is "
        "timed once in any case",
    )
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

    @model_validator(mode="before")
    @classmethod
    def _cast_alike(cls, settings: Any) -> Any:
        """On CUDA, a cast model computes in the type that it is cast to, unless the recipe says otherwise."""
        if not isinstance(settings, dict) or settings.get("quantizer") != CAST:
            return settings
        scheme = str(settings.get("scheme") or CAST_SCHEME)
        return {"cuda_dtype": scheme, **settings} if scheme in get_args(HalfType) else settings

    @model_validator(mode="before")
    @classmethod
    def _take_trained_codes(cls, settings: Any) -> Any:
        """What was trained has its codes: no other quantizer chooses some."""
        if not isinstance(settings, dict) or settings.get("trained") is None:
            return settings
        return {"quantizer": TRAINED, **settings}

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
        """Raises UsageError QC-BUDGET-002, -003 and -007."""
        check_budget(self.budget, self.quantizer, self.scheme)
        return self

    @model_validator(mode="after")
    def _check_cast(self) -> Self:
        """Raises UsageError QC-CAST-001 and -002."""
        if self.quantizer != CAST:
            if isinstance(self.scheme, Cast):
                raise UsageError(
                    "QC-CAST-001",
                    f"{self.scheme} has no codes, and the quantizer {self.quantizer} makes codes",
                    hint=f"take --quantizer {CAST}, or a scheme such as int8-channel",
                )
            return self
        if isinstance(self.scheme, QuantScheme):
            raise UsageError(
                "QC-CAST-001",
                f"the quantizer {CAST} makes no codes, and {self.scheme} is made of them",
                hint=f"give --scheme float16 or bfloat16, or another quantizer than {CAST}",
            )
        unused = [name for name in ("rules", "options", "tuning", "sequential") if getattr(self, name)]
        unused += ["layout: onnx"] if self.layout == "onnx" else []  # whoever reads floats reads the weights
        unused += ["prefill: int8"] if self.prefill == "int8" else []  # there are no codes to derive int8 weights from
        if unused:
            raise UsageError(
                "QC-CAST-002",
                f"the quantizer {CAST} rounds every float in the same way, and has no use for {', '.join(unused)}",
                hint="leave that out",
            )
        return self

    @model_validator(mode="after")
    def _check_trained(self) -> Self:
        """Raises UsageError QC-TRAIN-002."""
        if (self.trained is not None) != (self.quantizer == TRAINED):
            raise UsageError(
                "QC-TRAIN-002",
                f"the quantizer {TRAINED} takes codes from a file, and none is given"
                if self.trained is None
                else f"{self.trained} has the codes that were trained, and the quantizer {self.quantizer} chooses others",
                hint="give --trained FILE and no quantizer",
            )
        unused = [name for name in ("options", "tuning", "sequential", "ranges", "budget") if getattr(self, name)]
        if self.trained is not None and unused:
            raise UsageError(
                "QC-TRAIN-002",
                f"{self.trained} has the codes that were trained: there is no use for {', '.join(unused)}",
                hint="leave that out",
            )
        return self

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        """Raises UsageError QC-ADAPTER-006."""
        if self.adapter is not None and self.trained is not None:
            raise adapter_beside_codes(self.adapter)
        if self.merge_adapter and self.adapter is None:
            raise UsageError("QC-ADAPTER-006", "merge_adapter is set without an adapter", hint="add --adapter FOLDER")
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
    def keeps_adapter(self) -> bool:
        """Whether an adapter stays beside the layers."""
        return self.adapter is not None and not self.merge_adapter

    @property
    def cast(self) -> Cast | None:
        """The float type of half the width that everything is stored in; None where layers are quantized."""
        if self.quantizer != CAST:
            return None
        return self.scheme if isinstance(self.scheme, Cast) else Cast(CAST_SCHEME)

    @property
    def quantized_scheme(self) -> QuantScheme | None:
        """The scheme of layers that are quantized; None where the recipe names none."""
        return self.scheme if isinstance(self.scheme, QuantScheme) else None

    @property
    def loss_budget(self) -> LossBudget | None:
        """The budget, where it limits what is lost."""
        budget = None if self.budget is None else parse_budget(self.budget)
        return budget if isinstance(budget, LossBudget) else None

    @property
    def worker(self) -> str:
        """The quantizer that makes the tensors."""
        return AUTO_QUANTIZER if self.quantizer == AUTO else self.quantizer

    def decided(self, scheme: QuantScheme, rules: Sequence[Rule] = ()) -> Self:
        """Return what a recipe with a budget comes down to, in which layers get `scheme` unless `rules` say otherwise."""
        changes = {"quantizer": self.worker, "budget": None, "scheme": scheme, "rules": (*rules, *self.rules)}
        return self.model_copy(update=changes)

    def scheme_of(self, name: str, default: QuantScheme) -> QuantScheme | None:
        """Return the scheme of the layer `name`: that of the first rule that matches, else the recipe's, else `default`."""
        rule = self.rule_for(name)
        return rule.scheme if rule else self.quantized_scheme or default

    def rule_for(self, name: str) -> Rule | None:
        """Return the first rule that matches the layer `name`."""
        return next((rule for rule in self.rules if rule.matches(name)), None)


def adapter_beside_codes(adapter: Path) -> UsageError:
    """Return the error QC-ADAPTER-006 for an adapter of a model that comes with codes of its own."""
    return UsageError(
        "QC-ADAPTER-006",
        f"the adapter {adapter} is given beside codes that were trained, and these were trained without it",
        hint="give one of the two: the base with its adapter, by the schemes that it was prepared with, or what was trained",
    )
