"""Logs every finished conversion to MLflow: parameters, metrics, tags, and the files that describe the artifact."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from qconvert.plugin import hookimpl

if TYPE_CHECKING:
    from qconvert.plugin import Recipe, Report

ARTIFACTS = ("report.json", "README.md", "qconvert.json")
LONGEST_PARAMETER = 6000  # characters, MLflow's own limit
VERDICTS = {True: "true", False: "false", None: "not run"}


@hookimpl
def conversion_finished(recipe: Recipe, report: Report) -> None:
    """Logs to the active run, else to MLFLOW_RUN_ID's, else to a new one; to none where MLFLOW_TRACKING_URI is not set."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return  # MLflow would make a store in the working directory
    import mlflow  # takes a second

    name = None if os.environ.get("MLFLOW_RUN_ID") else recipe.output.name  # a run that exists keeps its name
    with nullcontext() if mlflow.active_run() else mlflow.start_run(run_name=name):
        mlflow.set_tags({"qconvert.version": version("qconvert"), "qconvert.passed": VERDICTS[report.passed]})
        mlflow.log_params(parameters(recipe, report))
        mlflow.log_metrics(metrics(report))
        for path in (recipe.output / name for name in ARTIFACTS):
            if path.is_file():
                mlflow.log_artifact(str(path))


def parameters(recipe: Recipe, report: Report) -> dict[str, str]:
    """What was asked for, by the recipe's names ("options.grid"), and the scheme that it came to; what is unset is left out."""
    settings = recipe.model_dump(mode="json", exclude={"output", "force"})
    settings["scheme"] = report.scheme
    settings["rules"] = ", ".join(f"{rule['pattern']}={rule['scheme']}" for rule in settings["rules"])
    settings["gates"] = ", ".join(f"{gate['metric']}{gate['comparison']}{gate['limit']}" for gate in settings["gates"])
    settings["targets"] = ", ".join(settings["targets"])
    return {"task": report.task, **{name: str(value)[:LONGEST_PARAMETER] for name, value in _leaves(settings)}}


def metrics(report: Report) -> dict[str, float]:
    """Every number of the report that is one of the whole artifact: "size.ratio", "fidelity.cpu.kl", "gates.passed"."""
    document: dict[str, Any] = {"size": report.size.model_dump()}
    for part in ("parity", "fidelity", "latency"):
        document[part] = {entry.target: entry.model_dump() for entry in getattr(report, part)}
    if report.gates:
        document["gates"] = {"passed": sum(gate.passed for gate in report.gates), "total": len(report.gates)}
    numbers = ((name, value) for name, value in _leaves(document) if isinstance(value, int | float))
    return {name: float(value) for name, value in numbers if not isinstance(value, bool)}


def _leaves(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("outer.inner", value) of nested mappings, without those that are None or empty text."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        elif value is not None and value != "":
            yield f"{prefix}{name}", value
