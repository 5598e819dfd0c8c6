"""What a finished conversion leaves in an MLflow store."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import mlflow
import pytest
import qconvert_mlflow
from mlflow import MlflowClient
from mlflow.entities import Run

import qconvert
from qconvert.plugin import Fidelity, GateResult, Latency, Parity, Recipe, Report, SampleCounts, Size
from qconvert.testing import plugin_manager

REPORT = Report(
    passed=False,
    task="causal-lm",
    quantizer="awq",
    scheme="int4-g32-asym",
    samples=SampleCounts(calibration=8, evaluation=4),
    size=Size(source_bytes=1000, weights_bytes=300, graph_bytes=7, ratio=0.3, average_bits=4.6),
    parity=(Parity(target="cpu", status="passed", max_relative_error=1e-6),),
    fidelity=(Fidelity(target="cpu", status="passed", kl=0.02, top1=0.9),),
    latency=(
        Latency(target="cpu", status="passed", p50_ms=2.5, spinning=True),
        Latency(target="cuda", status="not-run", reason="no GPU"),
    ),
    gates=(
        GateResult(metric="kl", comparison="<=", limit=0.1, value=0.02, passed=True),
        GateResult(metric="top1", comparison=">=", limit=0.95, value=0.9, passed=False),
    ),
)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    output = tmp_path / "tiny-awq"
    output.mkdir()
    for name in ("report.json", "README.md", "qconvert.json", "model.safetensors"):
        (output / name).write_text(name)
    return Recipe.from_settings(
        {
            "model": "tiny",
            "output": output,
            "quantizer": "awq",
            "options": {"grid": 5},
            "rules": [{"pattern": "*.mlp.*", "scheme": "float"}],
            "targets": ["cpu", "cuda"],
            "gates": [{"metric": "kl", "comparison": "<=", "limit": 0.1}],
        }
    )


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """A SQLite store with the experiment "tiny", named by the environment; whatever else is written goes to tmp_path."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tiny")
    client = MlflowClient(uri)
    client.create_experiment("tiny", artifact_location=(tmp_path / "artifacts").as_uri())
    yield client
    while mlflow.active_run():
        mlflow.end_run()


def runs(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_a_conversion_becomes_a_run(recipe: Recipe, store: MlflowClient) -> None:
    qconvert_mlflow.conversion_finished(recipe, REPORT)
    (run,) = runs(store)
    assert run.info.run_name == "tiny-awq"
    assert run.info.status == "FINISHED"
    assert mlflow.active_run() is None
    expected = {
        "task": "causal-lm",
        "model": "tiny",
        "quantizer": "awq",
        "scheme": "int4-g32-asym",
        "options.grid": "5",
        "rules": "*.mlp.*=float",
        "targets": "cpu, cuda",
        "gates": "kl<=0.1",
        "layout": "transformers",
        "calibration.samples": "32",
    }
    assert expected.items() <= run.data.params.items()
    assert run.data.params.keys().isdisjoint({"budget", "preset", "output", "force"})
    assert run.data.metrics == {
        "size.source_bytes": 1000,
        "size.weights_bytes": 300,
        "size.graph_bytes": 7,
        "size.ratio": 0.3,
        "size.average_bits": 4.6,
        "parity.cpu.max_relative_error": 1e-6,
        "fidelity.cpu.kl": 0.02,
        "fidelity.cpu.top1": 0.9,
        "latency.cpu.p50_ms": 2.5,
        "gates.passed": 1,
        "gates.total": 2,
    }
    assert run.data.tags["qconvert.passed"] == "false"
    assert run.data.tags["qconvert.version"] == qconvert.__version__
    files = {file.path for file in store.list_artifacts(run.info.run_id)}
    assert files == {"report.json", "README.md", "qconvert.json"}


def test_the_active_run_is_used_and_stays_active(recipe: Recipe, store: MlflowClient) -> None:
    with mlflow.start_run(run_name="mine") as mine:
        qconvert_mlflow.conversion_finished(recipe, REPORT)
        active = mlflow.active_run()
        assert active is not None
        assert active.info.run_id == mine.info.run_id
    (run,) = runs(store)
    assert (run.info.run_name, run.data.metrics["size.ratio"]) == ("mine", 0.3)


def test_the_run_that_the_environment_names_is_used(
    recipe: Recipe, store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = store.get_experiment_by_name("tiny")
    assert experiment is not None
    created = store.create_run(experiment.experiment_id, run_name="theirs")
    monkeypatch.setenv("MLFLOW_RUN_ID", created.info.run_id)
    qconvert_mlflow.conversion_finished(recipe, REPORT)
    (run,) = runs(store)
    assert (run.info.run_name, run.data.params["quantizer"]) == ("theirs", "awq")


def test_without_a_store_nothing_is_logged(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    qconvert_mlflow.conversion_finished(recipe, REPORT)
    assert set(tmp_path.iterdir()) == before


def test_a_store_that_fails_is_a_warning(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonesuch://store")
    if not any(entry_point.name == "mlflow" for entry_point in entry_points(group="qconvert")):
        info = tmp_path / "qconvert_mlflow-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qconvert-mlflow\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text("[qconvert]\nmlflow = qconvert_mlflow\n")
        monkeypatch.syspath_prepend(str(tmp_path))
    plugin_manager().conversion_finished(recipe, REPORT)
    warnings = [text for text in map(str, (record.getMessage() for record in caplog.records)) if "after the conversion" in text]
    assert len(warnings) == 1
    assert "plugin qconvert-mlflow 0.1.0 failed" in warnings[0]
    assert "nonesuch" in warnings[0]
