"""Repositories of the Hugging Face Hub, or of a folder that is laid out like it: models and data from it, artifacts to it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qconvert.plugin import InputError, hookimpl

if TYPE_CHECKING:
    from huggingface_hub import HfUri

    from qconvert.plugin import Model, Recipe, Report

ROOT = "QCONVERT_HUB"  # a folder of repositories, in place of the hub
PUBLISH = "QCONVERT_HUB_PUBLISH"  # the repository, or the owner, that finished conversions go to
PREFIX = "hf://"
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # at any depth; no pickle, no code
DATA_SUFFIXES = (".txt", ".jsonl", ".parquet", ".npz")
ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
MANIFEST = "qconvert.json"  # what every published artifact has
LEFT_ALONE = (".git", ".gitattributes")  # what makes a folder a repository of git

logger = logging.getLogger("qconvert")


@hookimpl
def load_model(source: str) -> Model | None:
    """OWNER/NAME[@REVISION], also with hf:// before it; None for everything else.

    Raises InputError QC-HUB-001 for what is no address of a model, 002 for a repository that can't be had.
    """
    address = parse(source, "model")
    if address is None:
        return None
    from qconvert.plugin import load_folder

    if address.path_in_repo:
        raise _no_address(source, "a model is a whole repository, without a path in it")
    return replace(load_folder(model_folder(address)), name=address.id.rpartition("/")[2])


@hookimpl
def find_data(source: str) -> Path | None:
    """OWNER/NAME[@REVISION] with one data file, or hf://datasets/OWNER/NAME[@REVISION]/PATH; None for everything else.

    Raises InputError QC-HUB-001 for what is no address of data, 002 for a repository that can't be had, 003 for one from
    which no single file can be chosen.
    """
    address = parse(source, "dataset")
    if address is None:
        return None
    if address.path_in_repo:
        return data_file(address, address.path_in_repo)
    found = sorted(name for name in file_names(address) if name.endswith(DATA_SUFFIXES))
    if len(found) != 1:
        listing = f": {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}" if found else ""
        raise InputError(
            "QC-HUB-003",
            f"{source!a} has {len(found)} files that qconvert reads as data, not one{listing}",
            hint=f"name one: {PREFIX}datasets/{source.removeprefix(PREFIX).removeprefix('datasets/')}/PATH, "
            f"ending in {', '.join(DATA_SUFFIXES)}",
        )
    return data_file(address, found[0])


@hookimpl
def conversion_finished(recipe: Recipe, report: Report) -> None:
    """Publishes an artifact that passed to the repository that QCONVERT_HUB_PUBLISH names, as it is, and nothing else.

    OWNER alone stands for OWNER/<name of the output folder>. Raises InputError QC-HUB-001, 002, or 004 for a repository with
    files that no conversion wrote.
    """
    repository = os.environ.get(PUBLISH)
    if not repository:
        return
    if "/" not in repository:
        repository = f"{repository}/{recipe.output.resolve().name}"
    if not ID.fullmatch(repository) or "@" in repository:
        raise _no_address(repository, f"{PUBLISH} is OWNER/NAME, or OWNER alone")
    if report.passed is not True:
        why = "it was not verified" if report.passed is None else "it did not pass"
        logger.warning("%s is not published to %s: %s", recipe.output, repository, why)
        return
    message = f"qconvert: {report.quantizer} {report.scheme}"
    if root := os.environ.get(ROOT):
        place = str(copy_to_folder(recipe.output, Path(root) / repository))
    else:
        place = upload(recipe.output, repository, message)
    logger.info("published to %s", place)


def parse(source: str, kind: Literal["model", "dataset"]) -> HfUri | None:
    """The address that a user means, None where a path or something else is meant. Raises InputError QC-HUB-001."""
    uri = source
    if not source.startswith(PREFIX):
        # What may be a path that does not exist is one, if anything beside it does.
        if not ID.fullmatch(source) or source.endswith(DATA_SUFFIXES) or Path(source).parent.exists():
            return None
        uri = f"{PREFIX}{'datasets/' if kind == 'dataset' else ''}{source}"
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        address = parse_hf_uri(uri)
    except HfUriError as error:
        raise _no_address(source, str(error)) from error
    if address.type != kind:
        raise _no_address(source, f"it names a {address.type}")
    if ".." in address.path_in_repo.split("/"):
        raise _no_address(source, "its path leads out of the repository")
    return address


def model_folder(address: HfUri) -> Path:
    """The files of a model repository, downloaded where they are not yet in the cache."""
    if (folder := _repository_folder(address)) is not None:
        return folder
    from huggingface_hub import snapshot_download

    with reachable(address):
        snapshot = Path(snapshot_download(address.id, revision=address.revision, allow_patterns=list(MODEL_FILES)))
    if address.revision is None:
        logger.info("%s is at commit %s; %s@%s names it for good", address.id, snapshot.name, address.id, snapshot.name)
    return snapshot


def file_names(address: HfUri) -> Sequence[str]:
    """All paths in a repository."""
    if (folder := _repository_folder(address)) is not None:
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    from huggingface_hub import HfApi

    with reachable(address):
        return HfApi().list_repo_files(address.id, repo_type=address.type, revision=address.revision)


def data_file(address: HfUri, name: str) -> Path:
    """One file of a repository, downloaded where it is not yet in the cache. Raises InputError QC-HUB-003 where it is none."""
    if (folder := _repository_folder(address)) is not None:
        path = folder / name
        if not path.is_file():
            raise InputError("QC-HUB-003", f"{folder} has no file {name!a}", hint="check the path")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with reachable(address):
        try:
            return Path(hf_hub_download(address.id, name, repo_type=address.type, revision=address.revision))
        except RemoteEntryNotFoundError as error:
            raise InputError("QC-HUB-003", f"repository {address.id} has no file {name!a}", hint="check the path") from error


def _repository_folder(address: HfUri) -> Path | None:
    """Where QCONVERT_HUB has a repository; None where it is not set. Raises InputError QC-HUB-002."""
    root = os.environ.get(ROOT)
    if not root:
        return None
    if address.revision is not None:
        raise InputError(
            "QC-HUB-002",
            f"the folder {root} has no revisions, and {address.revision!a} of {address.id} was asked for",
            hint=f"leave out the revision, or unset {ROOT} to ask the hub",
        )
    folder = Path(root, "datasets" if address.type == "dataset" else "", address.id)
    if not folder.is_dir():
        raise InputError("QC-HUB-002", f"there is no repository {folder}", hint=f"put it there, or unset {ROOT} to ask the hub")
    return folder.resolve()


@contextmanager
def reachable(address: HfUri) -> Iterator[None]:
    """What keeps a repository from being read is an InputError QC-HUB-002."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    hints: dict[type[Exception], str] = {
        GatedRepoError: "ask its owner for access on its page, and set HF_TOKEN",
        RepositoryNotFoundError: "check the name; for a private repository set HF_TOKEN",
        RevisionNotFoundError: "check the branch, tag or commit after @",
    }
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # huggingface_hub's own, its HTTP client's and the system's have no base in common
        hint = next((hint for kind, hint in hints.items() if isinstance(error, kind)), "check the connection, then try again")
        first = next(iter(str(error).strip().splitlines()), "")
        raise InputError(
            "QC-HUB-002", f"repository {address.id} can't be had: {type(error).__name__}: {first}", hint=hint
        ) from error


def copy_to_folder(output: Path, folder: Path) -> Path:
    """Make `folder` a copy of `output`. The one that is replaced goes only when the new one is complete."""
    _refuse_foreign(str(folder), [path.name for path in folder.iterdir()] if folder.is_dir() else [])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        fresh, old = Path(scratch, "new"), Path(scratch, "old")
        shutil.copytree(output, fresh)
        if folder.exists():
            folder.rename(old)
            for name in LEFT_ALONE:
                if (old / name).exists():
                    (old / name).rename(fresh / name)
        fresh.rename(folder)
    return folder


def upload(output: Path, repository: str, message: str) -> str:
    """Make a repository of the hub a copy of `output` in one commit, and return its address. A new one is private."""
    from huggingface_hub import HfApi, parse_hf_uri

    api = HfApi()
    with reachable(parse_hf_uri(f"{PREFIX}{repository}")):
        url = api.create_repo(repository, private=True, exist_ok=True)
        _refuse_foreign(repository, api.list_repo_files(repository))
        api.upload_folder(repo_id=repository, folder_path=output, commit_message=message, delete_patterns="*")
    return str(url)


def _refuse_foreign(repository: str, files: Sequence[str]) -> None:
    others = sorted(set(files) - set(LEFT_ALONE))
    if others and MANIFEST not in others:
        raise InputError(
            "QC-HUB-004",
            f"{repository} holds {', '.join(others[:3])} and no {MANIFEST}: no conversion wrote it, and nothing was published",
            hint=f"name another repository in {PUBLISH}, or empty this one",
        )


def _no_address(source: str, problem: str) -> InputError:
    return InputError(
        "QC-HUB-001",
        f"{source!a}: {problem}",
        hint=f"models are OWNER/NAME or OWNER/NAME@REVISION, data {PREFIX}datasets/OWNER/NAME/PATH",
    )
