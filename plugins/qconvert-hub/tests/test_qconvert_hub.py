"""Models and data from repositories, artifacts to them: of a folder, and of a hub on this machine."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import qconvert_hub
import torch
import transformers
from local_hub import COMMIT, LocalHub
from tokenizers import Tokenizer, models, pre_tokenizers

import qconvert
from qconvert.plugin import InputError, Recipe, Report, SampleCounts, Size

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
REPORT = Report(
    passed=True,
    task="causal-lm",
    quantizer="awq",
    scheme="int4-g32-asym",
    samples=SampleCounts(calibration=8, evaluation=4),
    size=Size(source_bytes=1000, weights_bytes=300, graph_bytes=7, ratio=0.3, average_bits=4.6),
    parity=(),
    fidelity=(),
    latency=(),
    gates=(),
)


@dataclass
class Repositories:
    """Where the plugin finds repositories: a folder, or a hub. Both are read and written by whole repositories here."""

    root: Path
    hub: LocalHub | None

    def write(self, name: str, files: dict[str, bytes]) -> None:
        """name: "models/OWNER/NAME" or "datasets/OWNER/NAME"."""
        if self.hub:
            self.hub.repositories[name] = files
            return
        for path, content in files.items():
            target = self.root / name.removeprefix("models/") / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def read(self, name: str) -> dict[str, bytes]:
        if self.hub:
            return {path: content for path, content in self.hub.repositories[name].items() if path != ".gitattributes"}
        return contents(self.root / name.removeprefix("models/"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub that huggingface_hub asks in place of the real one, and a cache of its own."""
    with LocalHub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.delenv(qconvert_hub.ROOT, raising=False)
        pages = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", pages)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        # For the process that verifies an artifact.
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["folder", "hub"])
def repositories(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repositories:
    """Every test that takes it runs twice. It works in an empty folder: ids are no paths there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv(qconvert_hub.PUBLISH, raising=False)
    if request.param == "hub":
        return Repositories(tmp_path, request.getfixturevalue("hub"))
    (tmp_path / "mirror").mkdir()
    monkeypatch.setenv(qconvert_hub.ROOT, str(tmp_path / "mirror"))
    return Repositories(tmp_path / "mirror", None)


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qconvert finds the plugin, whether or not the distribution is installed."""
    if any(entry_point.name == "hub" for entry_point in entry_points(group="qconvert")):
        return
    info = tmp_path / "qconvert_hub-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qconvert-hub\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[qconvert]\nhub = qconvert_hub\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folders = [str(tmp_path), str(Path(qconvert_hub.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))  # artifacts are verified in another process


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a Llama of one layer with random weights and a tokenizer of single bytes."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return contents(folder)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-int4"
    folder.mkdir()
    for name in ("qconvert.json", "model.safetensors", "README.md"):
        (folder / name).write_text(f"new {name}\n")
    return folder


def publish(output: Path, repository: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setenv(qconvert_hub.PUBLISH, repository)
    recipe = Recipe.from_settings({"model": "tiny", "output": output})
    qconvert_hub.conversion_finished(recipe, REPORT.model_copy(update=changes))


def rejected(function: Any, source: str, code: str) -> str:
    with pytest.raises(InputError) as caught:
        function(source)
    assert caught.value.code == code
    return f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("source", ["acme/tiny", "hf://acme/tiny"])
def test_a_model_is_loaded_by_its_id(repositories: Repositories, llama: dict[str, bytes], source: str) -> None:
    repositories.write("models/acme/tiny", {**llama, "pytorch_model.bin": b"a pickle", "code.py": b"raise SystemExit"})
    model = qconvert_hub.load_model(source)
    assert model is not None
    assert model.name == "tiny"
    assert model.encode_text is not None
    (matched,) = {tuple(model.read(name).shape) for name in model.parameter_shapes if name.endswith("embed_tokens.weight")}
    assert matched == (256, 64)
    assert model.folder is not None
    if repositories.hub:
        assert not {"pytorch_model.bin", "code.py"} & contents(model.folder).keys()


@pytest.mark.usefixtures("repositories")
@pytest.mark.parametrize(
    "source", ["tiny", "./acme/tiny", "/acme/tiny", "a/b/c", "module:a.b:c", "x.gguf", "data/missing.txt", "builtin", "a b/c"]
)
def test_what_may_be_a_path_is_left_to_others(source: str) -> None:
    assert qconvert_hub.find_data(source) is None
    if source != "data/missing.txt":
        assert qconvert_hub.load_model(source) is None


@pytest.mark.usefixtures("repositories")
def test_a_name_in_a_folder_that_is_there_is_a_path() -> None:
    Path("acme").mkdir()
    assert qconvert_hub.load_model("acme/tiny") is None
    assert qconvert_hub.find_data("acme/tiny") is None


@pytest.mark.parametrize("source", ["acme/prose", "hf://datasets/acme/prose", "hf://datasets/acme/prose/train/all.txt"])
def test_data_is_found_by_its_id(repositories: Repositories, source: str) -> None:
    repositories.write("datasets/acme/prose", {"README.md": b"#", "train/all.txt": TEXT.encode()})
    path = qconvert_hub.find_data(source)
    assert path is not None
    assert path.suffix == ".txt"
    assert path.read_text() == TEXT


def test_of_several_files_one_has_to_be_named(repositories: Repositories) -> None:
    repositories.write("datasets/acme/prose", {"train.parquet": b"", "test.parquet": b"", "notes.md": b""})
    said = rejected(qconvert_hub.find_data, "acme/prose", "QC-HUB-003")
    assert "2 files" in said
    assert "test.parquet, train.parquet" in said
    assert "hf://datasets/acme/prose/PATH" in said


@pytest.mark.parametrize("source", ["acme/prose", "hf://datasets/acme/prose/nonesuch.txt", "hf://datasets/acme/prose/../x.txt"])
def test_a_file_that_is_not_there_is_an_error(repositories: Repositories, tmp_path: Path, source: str) -> None:
    (tmp_path / "mirror" / "datasets" / "acme" / "x.txt").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "mirror" / "datasets" / "acme" / "x.txt").write_text("not in the repository")
    repositories.write("datasets/acme/prose", {"README.md": b"#"})
    assert "acme/prose" in rejected(qconvert_hub.find_data, source, "QC-HUB-003" if ".." not in source else "QC-HUB-001")


@pytest.mark.usefixtures("repositories")
@pytest.mark.parametrize("function", [qconvert_hub.load_model, qconvert_hub.find_data])
def test_a_repository_that_is_not_there_is_an_error(function: Any) -> None:
    assert "acme/nonesuch" in rejected(function, "acme/nonesuch", "QC-HUB-002")


@pytest.mark.usefixtures("repositories")
@pytest.mark.parametrize(
    "source", ["hf://", "hf://tiny", "hf://datasets/acme/prose", "hf://spaces/acme/x", "hf://acme/tiny/a.bin"]
)
def test_what_is_no_address_of_a_model_is_an_error(source: str) -> None:
    assert "OWNER/NAME" in rejected(qconvert_hub.load_model, source, "QC-HUB-001")


@pytest.mark.usefixtures("repositories")
def test_a_model_is_no_data() -> None:
    assert "a model" in rejected(qconvert_hub.find_data, "hf://acme/tiny/data.txt", "QC-HUB-001")


def test_a_folder_has_no_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(qconvert_hub.ROOT, str(tmp_path))
    assert "'v1'" in rejected(qconvert_hub.load_model, "acme/tiny@v1", "QC-HUB-002")


def test_a_revision_is_asked_for(hub: LocalHub, llama: dict[str, bytes]) -> None:
    hub.repositories["models/acme/tiny"] = llama
    model = qconvert_hub.load_model(f"acme/tiny@{COMMIT}")
    assert model is not None
    assert model.folder is not None
    assert model.folder.name == COMMIT
    assert "after @" in rejected(qconvert_hub.load_model, "acme/tiny@v1", "QC-HUB-002")


def test_a_gated_repository_says_what_to_do(hub: LocalHub) -> None:
    hub.repositories["models/acme/tiny"] = {}
    hub.gated.add("models/acme/tiny")
    assert "HF_TOKEN" in rejected(qconvert_hub.load_model, "acme/tiny", "QC-HUB-002")


def test_what_was_downloaded_once_loads_without_the_hub(
    hub: LocalHub, llama: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["models/acme/tiny"] = llama
    assert qconvert_hub.load_model("acme/tiny") is not None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert qconvert_hub.load_model("acme/tiny") is not None
    rejected(qconvert_hub.load_model, "acme/other", "QC-HUB-002")


@pytest.mark.parametrize("target", ["acme/tiny-int4", "acme"])
def test_an_artifact_becomes_a_repository(
    repositories: Repositories, output: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(output)
    publish(output, target, monkeypatch)
    assert repositories.read("models/acme/tiny-int4") == before == contents(output)
    if repositories.hub:
        assert [each["visibility"] for each in repositories.hub.created] == ["private"]
        assert repositories.hub.commits == ["qconvert: awq int4-g32-asym"]


def test_an_artifact_replaces_the_one_before(repositories: Repositories, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repositories.write("models/acme/tiny", {"qconvert.json": b"old", "model.cuda.onnx": b"old"})
    publish(output, "acme/tiny", monkeypatch)
    assert repositories.read("models/acme/tiny") == contents(output)


def test_what_makes_a_folder_a_repository_of_git_stays(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(qconvert_hub.ROOT, str(tmp_path))
    (tmp_path / "acme" / "tiny" / ".git").mkdir(parents=True)
    (tmp_path / "acme" / "tiny" / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    publish(output, "acme/tiny", monkeypatch)
    assert contents(tmp_path / "acme" / "tiny") == contents(output) | {".git/HEAD": b"ref: refs/heads/main\n"}
    assert [path.name for path in (tmp_path / "acme").iterdir()] == ["tiny"]


def test_files_that_no_conversion_wrote_are_not_touched(
    repositories: Repositories, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repositories.write("models/acme/tiny", {"model.safetensors": b"the only copy"})
    with pytest.raises(InputError, match=r"model\.safetensors") as caught:
        publish(output, "acme/tiny", monkeypatch)
    assert caught.value.code == "QC-HUB-004"
    assert repositories.read("models/acme/tiny") == {"model.safetensors": b"the only copy"}


@pytest.mark.parametrize(("passed", "why"), [(False, "did not pass"), (None, "was not verified")])
def test_only_what_passed_is_published(
    repositories: Repositories,
    output: Path,
    passed: bool | None,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "qconvert"):
        publish(output, "acme/tiny", monkeypatch, passed=passed)
    assert why in caplog.text
    assert not (repositories.root / "acme").exists()
    assert not repositories.hub or not repositories.hub.repositories


def test_nothing_is_published_unless_asked(repositories: Repositories, output: Path) -> None:
    qconvert_hub.conversion_finished(Recipe.from_settings({"model": "tiny", "output": output}), REPORT)
    assert not list(repositories.root.glob("*/tiny*"))
    assert not repositories.hub or not repositories.hub.repositories


@pytest.mark.parametrize("target", ["a/b/c", "acme/tiny@v1", "/acme", "acme/"])
def test_a_target_that_is_no_repository_is_an_error(output: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="QCONVERT_HUB_PUBLISH") as caught:
        publish(output, target, monkeypatch)
    assert caught.value.code == "QC-HUB-001"


@pytest.mark.usefixtures("found")
def test_a_conversion_from_ids_to_a_repository(
    repositories: Repositories, llama: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the hooks: the manifest keeps the ids, the process that verifies finds them again, and what is published is
    the output."""
    repositories.write("models/acme/tiny", llama)
    repositories.write("datasets/acme/prose", {"all.txt": TEXT.encode()})
    monkeypatch.setenv(qconvert_hub.PUBLISH, "acme/tiny-int8")
    data = {"source": "acme/prose", "samples": 2, "length": 32}
    output = tmp_path / "out"
    settings = {"model": "acme/tiny", "output": output, "quantizer": "per-channel", "calibration": data, "evaluation": data}
    report = qconvert.convert(Recipe.from_settings(settings))
    assert report.passed
    assert repositories.read("models/acme/tiny-int8") == contents(output)
    manifest = json.loads((output / "qconvert.json").read_text())
    assert manifest["recipe"]["model"] == "acme/tiny"
    assert manifest["recipe"]["evaluation"]["source"] == "acme/prose"
