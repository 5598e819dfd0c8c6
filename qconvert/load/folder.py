"""A checkpoint folder: which files belong to it, and that none of them lies elsewhere."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from qconvert.errors import InputError
from qconvert.ir.artifact import WEIGHTS, WEIGHTS_INDEX, is_code
from qconvert.storage.git_lfs import refuse_git_lfs_pointer
from qconvert.storage.json_text import parse_json

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Pickles, which can run code when they are opened.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Weights for other programs; what is converted here replaces them.
OTHER_WEIGHTS = (
    *(".safetensors", ".onnx", ".onnx_data", ".onnx.data", ".onnx_adapter", ".gguf", ".h5", ".msgpack", ".ot", ".tflite"),
    *(".xml", ".mlmodel", ".npz", ".pb", ".pdparams"),  # .xml: OpenVINO's graph, useless without its .bin
)
# config.json is rewritten with the output, and the source's model card describes the source: we write our own.
NOT_CARRIED = (CONFIG, WEIGHTS_INDEX, "README.md", ".gitattributes", ".gitignore")
NOT_CARRIED_SUFFIXES = (*PICKLES, *OTHER_WEIGHTS, ".index.json")
# The weights of what sentence-transformers computes behind the model, such as 2_Dense, in float as they are.
MODULE_WEIGHTS = re.compile(r"\d+_\w+/model\.safetensors")
MODULE_PICKLES = re.compile(r"\d+_\w+/pytorch_model\.bin")

_MERGE = "in peft: load both, then .merge_and_unload().save_pretrained(FOLDER)"

log = logging.getLogger("qconvert")


def contained(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`, followed through symlinks only inside the folder or into a Hugging Face cache.

    The cache keeps `snapshots/<revision>/<name>` as links to `blobs/<hash>` beside `snapshots`.
    Raises InputError QC-INPUT-009 for everything that leads elsewhere.
    """
    path = folder / name
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise InputError("QC-INPUT-009", f"{name!a} in {folder} can't be followed: {error}", hint="repair the link") from error
    in_cache = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if _points_outside(name) or not (target.is_relative_to(root) or in_cache):
        raise InputError(
            "QC-INPUT-009",
            f"{name!a} leads out of the folder {folder}",
            hint="put the file itself into the folder: files elsewhere are never read",
        )
    return path


def _points_outside(name: str) -> bool:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return posix.is_absolute() or bool(windows.anchor) or ".." in posix.parts or ".." in windows.parts


def no_folder(path: Path) -> InputError:
    """Return the error for a path that is no checkpoint folder, with the reason."""
    if not path.exists():
        return InputError(
            "QC-INPUT-001",
            f"source {str(path)!a} does not exist",
            hint="check the path; for ids of the Hugging Face Hub install the plugin qconvert-hub",
        )
    if path.suffix in PICKLES:
        return InputError(
            "QC-INPUT-003",
            f"{path} is a pickle: opening it can run code",
            hint="load it in an environment that you trust, and save it with save_pretrained or give it as module:FACTORY",
        )
    hint = {
        ".gguf": "install the plugin qconvert-gguf, which loads GGUF files",
        ".safetensors": f"give the folder that holds it, with its {CONFIG}",
    }
    return InputError(
        "QC-INPUT-002",
        f"{path} is a file, and no installed plugin loads it",
        hint=hint.get(path.suffix, "give a Hugging Face folder, or install a plugin that loads such files"),
    )


def read_weight_map(folder: Path) -> dict[str, str] | None:
    """Return the file name of every tensor of a sharded checkpoint, None for one that is a single file.

    No weight file is opened.

    Raises InputError QC-INPUT-002 where there are no weights, 003 for pickles only, 010 for an index that is no such
    map, 009 for one that names a path outside the folder.
    """
    if os.path.lexists(folder / WEIGHTS):  # the order in which transformers looks
        return None
    if not os.path.lexists(folder / WEIGHTS_INDEX):
        raise _no_weights(folder)
    weight_map = read_json(contained(folder, WEIGHTS_INDEX), "QC-INPUT-010").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(
            "QC-INPUT-010",
            f"{WEIGHTS_INDEX} in {folder} has no weight_map from tensor names to file names",
            hint="download the checkpoint again, or save it again with save_pretrained",
        )
    return weight_map


def weight_files(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Return the paths of weight files by name: all of them are in the folder, and none has been opened.

    Raises InputError QC-INPUT-009 for one that lies elsewhere, 010 for one that is missing.
    """
    paths = {name: contained(folder, name) for name in names}
    for name, path in paths.items():
        if not path.is_file():
            raise InputError(
                "QC-INPUT-010",
                f"weight file {name!a} is missing in {folder} ({len(paths)} expected)",
                hint="download the checkpoint again, complete",
            )
    return paths


def _no_weights(folder: Path) -> InputError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return InputError(
            "QC-INPUT-003",
            f"{folder} holds pickled weights only ({', '.join(map(ascii, pickles[:3]))}): opening a pickle can run code",
            hint="in an environment that you trust, load the model with transformers' from_pretrained and call "
            "save_pretrained(FOLDER): that writes model.safetensors",
        )
    return InputError(
        "QC-INPUT-002",
        f"{folder} holds no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}",
        hint="give the folder of a complete checkpoint",
    )


def refuse_adapter(folder: Path) -> None:
    """Raise InputError QC-INPUT-023 for a folder with an adapter: transformers, where peft is installed, computes with it."""
    if not os.path.lexists(folder / ADAPTER):
        for name in ADAPTER_WEIGHTS:
            if os.path.lexists(folder / name):
                raise InputError(
                    "QC-INPUT-023",
                    f"{folder} holds the weights of an adapter, {name}, without the {ADAPTER} that says how to apply them",
                    hint=f"give a folder with adapter and model merged ({_MERGE}); or remove {name} for the model without it",
                )
        return
    config = read_json(contained(folder, ADAPTER), "QC-INPUT-023")
    base = config.get("base_model_name_or_path")
    kind = f"an adapter (peft_type {config.get('peft_type')!a}) of {base!a}"
    if (folder / CONFIG).is_file():
        raise InputError(
            "QC-INPUT-023",
            f"{folder} holds {kind} beside a model: transformers with peft applies it, the weights are without it",
            hint=f"move the adapter into a folder of its own, and give that as --adapter; or remove {ADAPTER} for the model "
            f"without it; or give a folder with the two merged ({_MERGE})",
        )
    raise InputError(
        "QC-INPUT-023",
        f"{folder} holds {kind}, and not the model itself",
        hint="give that model as --model, and this folder as --adapter",
    )


def read_json(path: Path, code: str) -> dict[str, Any]:
    """Return the JSON object in a file. Raises InputError `code` with the reason if there is none."""
    refuse_git_lfs_pointer(path)
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            code, f"{path} can't be read as a JSON object: {error}", hint="download the file again, complete"
        ) from error


def carried_files(folder: Path) -> dict[str, Path]:
    """Return every file that travels with the model (tokenizer, generation config, ...), by its path relative to the folder.

    Sub-folders such as 1_Pooling count, hidden ones do not. Of weights only those of modules behind the model travel.
    Raises InputError QC-INPUT-009 for a link out of the folder.
    """
    return dict(sorted(_walk(folder)))


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for parent, subfolders, names in os.walk(folder):
        here = Path(parent)
        for name in [*subfolders]:
            if name.startswith("."):
                subfolders.remove(name)
            elif (here / name).is_symlink():  # os.walk does not descend into it
                log.warning("the linked folder %s is not carried over", ascii(str((here / name).relative_to(folder))))
        for name in names:
            relative = (here / name).relative_to(folder).as_posix()
            if MODULE_PICKLES.fullmatch(relative) and WEIGHTS not in names:
                log.warning(
                    "%s is a pickle, and not carried over: load and save the model with sentence-transformers", ascii(relative)
                )
            left_out = relative in NOT_CARRIED or name.endswith(NOT_CARRIED_SUFFIXES) or is_code(relative)
            if (not left_out or MODULE_WEIGHTS.fullmatch(relative)) and (here / name).is_file():
                yield relative, contained(folder, relative)
