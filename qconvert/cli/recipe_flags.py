"""The flags of `run`, `plan` and `compare`: a recipe file, and what overrides it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from qconvert.errors import UsageError
from qconvert.vocabulary import PLUGIN_SECONDS, RANGES, TIMING_SECONDS, KVCache, Layout, Prefill, Preset, TargetName

if TYPE_CHECKING:
    from qconvert.recipe import Recipe
    from qconvert.recipe.gates import Gate

Function = TypeVar("Function", bound=Callable[..., Any])

# Flags whose value is the field's.
PLAIN = (
    "model",
    "adapter",
    "merge_adapter",
    "output",
    "preset",
    "quantizer",
    "trained",
    "budget",
    "targets",
    "layout",
    "prefill",
    "kv_cache",
    "device",
    "allow_unverified",
    "force",
)
TARGETS = click.Choice(get_args(TargetName))

_FILE = (click.argument("recipe_file", metavar="[RECIPE.yaml]", required=False, type=click.Path(path_type=Path)),)
_PLACES = (
    click.option(
        "--model", metavar="SOURCE", help="A Hugging Face folder, pkg:PACKAGE/PATH, module:FACTORY, or what a plugin loads."
    ),
    click.option("--adapter", metavar="FOLDER", help="A LoRA adapter that peft saved; it stays in float beside the layers."),
    click.option("--merge-adapter", is_flag=True, help="Put the adapter into the weights before they are quantized."),
    click.option("--output", metavar="DIR", help="Folder to write; must not exist unless --force is given."),
    click.option("--plugin", "plugins", metavar="FILE", multiple=True, help="Python file with a plugin; may be repeated."),
    click.option(
        "--plugin-timeout",
        type=float,
        metavar="SECONDS",
        help=f"What one call of a plugin may take. Default: {PLUGIN_SECONDS}.",
    ),
)
_ALGORITHM = (
    click.option(
        "--preset",
        type=click.Choice(get_args(Preset)),
        help="Quantizer and scheme for what you want: seconds without data, good and quick, nearest to float, fast int8.",
    ),
    click.option(
        "--quantizer",
        metavar="NAME",
        help="Algorithm: absmax, zero-point, per-channel, hqq, nf4, awq, gptq, smoothquant, llm-int8, a plugin's, auto, "
        "with --budget, or cast.",
    ),
    click.option(
        "--scheme",
        metavar="S",
        help="int4 or int8, with -tensor, -channel or -gN, then -asym, then -a8 or -a8-static: int4-g32-asym. Or W4A16, W8A8 "
        "and the like; nf4 or fp4, with -gN, then -dq, for nf4; float16 or bfloat16 for cast.",
    ),
    click.option(
        "--budget",
        metavar="B",
        help="For auto: average bits per quantized weight, such as 4.5, or size of all weights: 90MB. For a scheme with "
        "-static: what the output may lose, 'cosine>=0.999' or 'kl<=0.05'.",
    ),
    click.option("--trained", metavar="FILE", help="What qconvert.save_trained wrote: codes are taken as they were trained."),
    click.option("--option", "options", metavar="K=V", multiple=True, help="Option of the quantizer."),
)
_REST = (
    click.option(
        "--rule",
        "rules",
        metavar="PATTERN=S",
        multiple=True,
        help="Scheme of the layers that match, or 'float'; first match wins.",
    ),
    click.option(
        "--calibration", metavar="SRC", help=".txt, .jsonl, .parquet or .npz file, 'builtin', or what a plugin finds."
    ),
    click.option("--evaluation", metavar="SRC", help="The same, for the comparison with the float model."),
    click.option("--target", "targets", type=TARGETS, multiple=True, help="Where the artifact is to run; may be repeated."),
    click.option("--layout", type=click.Choice(get_args(Layout)), help="Who must be able to read the weights."),
    click.option(
        "--prefill",
        type=click.Choice(get_args(Prefill)),
        help="How a decoder's packed weights run prompts: as int8, faster, or the same way as they decode.",
    ),
    click.option(
        "--kv-cache",
        type=click.Choice(get_args(KVCache)),
        help="What a decoder keeps of the tokens before: float, or int8, a quarter of that.",
    ),
    click.option(
        "--ranges",
        metavar="NAME",
        help="What chooses the ranges of static activations: min-max, moving-average, percentile, mse, kl or a plugin's.",
    ),
    click.option("--device", metavar="DEV", help="Where blocks run during calibration: cpu or cuda."),
    click.option(
        "--gate", "gates", metavar="'kl<=0.2'", multiple=True, help="Limit that the artifact must keep; may be repeated."
    ),
    click.option("--no-verify", is_flag=True, help="Do not run the artifact; the report then says that nothing is proven."),
    click.option(
        "--timing-seconds",
        type=float,
        metavar="SECONDS",
        help=f"What all timings may take on a target. Default: {TIMING_SECONDS}.",
    ),
    click.option("--allow-unverified", is_flag=True, help="Exit 0 although a target could not be run here."),
    click.option("--force", is_flag=True, help="Replace an existing output folder."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
)


def recipe_flags(function: Function) -> Function:
    """Give a command every flag of a recipe."""
    return _decorated(function, (*_FILE, *_PLACES, *_ALGORITHM, *_REST))


def shared_flags(function: Function) -> Function:
    """Give a command the flags of what several recipes have in common."""
    return _decorated(function, (*_PLACES, *_REST))


def _decorated(function: Function, decorators: tuple[Callable[[Function], Function], ...]) -> Function:
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def recipe_of(flags: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a file that the flags override.

    Raises what `settings_of` and Recipe raise.
    """
    from qconvert.recipe import Recipe

    return Recipe.from_settings(settings_of(flags))


def settings_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Merge flags, as click hands them over (None, () or False where one is unset), into what the recipe file holds.

    Rules go before the file's (the first match wins), a gate replaces the file's for the same metric, options are merged
    by name, a data source keeps the file's sample counts, a range estimator the file's options for it; all else is replaced.

    Raises UsageError QC-USAGE-002 for a K=V that isn't, QC-USAGE-003 without model or output, and what Rule, Gate and
    `read_recipe` raise.
    """
    from qconvert.ir.scheme import parse_scheme
    from qconvert.recipe.fields import Rule
    from qconvert.recipe.file import read_recipe
    from qconvert.recipe.gates import Gate

    settings = read_recipe(flags["recipe_file"]) if flags["recipe_file"] else {}
    settings |= {key: flags[key] for key in PLAIN if flags.get(key)}
    if flags["plugins"]:
        settings["plugins"] = [*part_of(settings, "plugins", list), *flags["plugins"]]
    settings |= {key: flags[key] for key in ("plugin_timeout", "timing_seconds") if flags[key] is not None}
    if flags.get("scheme"):
        settings["scheme"] = parse_scheme(flags["scheme"])
    if flags["no_verify"]:
        settings["verify"] = False
    if flags.get("options"):
        settings["options"] = part_of(settings, "options", dict) | dict(map(_option, flags["options"]))
    if flags["rules"]:
        settings["rules"] = [*map(Rule.parse, flags["rules"]), *part_of(settings, "rules", list)]
    if flags["gates"]:
        settings["gates"] = _gates(part_of(settings, "gates", list), [Gate.parse(text) for text in flags["gates"]])
    for key in (key for key in ("calibration", "evaluation") if flags[key]):
        settings[key] = part_of(settings, key, dict) | {"source": flags[key]}
    if flags["ranges"]:
        kept = part_of(settings, "ranges", dict)
        is_same = kept.get("estimator", RANGES) == flags["ranges"]
        settings["ranges"] = {**(kept if is_same else {}), "estimator": flags["ranges"]}
    _require_places(settings)
    return settings


def _gates(kept: list[Any], gates: list[Gate]) -> list[Any]:
    """The file's gates, but for metrics that a flag has a gate for, and those of the flags."""
    replaced = {gate.metric for gate in gates}
    return [*(gate for gate in kept if not (isinstance(gate, dict) and gate.get("metric") in replaced)), *gates]


def _require_places(settings: Mapping[str, Any]) -> None:
    flag = {"model": "--model SOURCE", "output": "--output DIR"}
    missing = [key for key in flag if key not in settings]
    if missing:
        raise UsageError(
            "QC-USAGE-003",
            f"no {' and no '.join(missing)} given",
            hint=f"add {' '.join(flag[key] for key in missing)}, or name it in a recipe file",
        )


def part_of(settings: dict[str, Any], key: str, kind: type[Any]) -> Any:
    """Return what the file holds under `key`, empty if nothing."""
    value = settings.get(key) or kind()
    if not isinstance(value, kind):
        expected = "a mapping" if kind is dict else "a list"
        raise UsageError("QC-USAGE-004", f"the recipe's '{key}' is {reprlib.repr(value)}", hint=f"write {expected} there")
    return value


def _option(text: str) -> tuple[str, object]:
    """'K=V' -> (K, V as a YAML scalar): 'bits=4' is an int, 'clip=true' a bool, 'name=x' a text."""
    import yaml

    from qconvert.recipe.yaml_text import parse_yaml

    key, separator, value = text.partition("=")
    try:
        if not separator or not key:
            raise ValueError
        return key, parse_yaml(value)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(
            "QC-USAGE-002", f"{reprlib.repr(text)} is not an option", hint="write --option NAME=VALUE, e.g. --option grid=20"
        ) from error
