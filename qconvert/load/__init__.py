"""The load stage: a source as the user wrote it becomes a Model that is described in full and read lazily."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.errors import InputError
from qconvert.load import package

if TYPE_CHECKING:
    from qconvert.ir.model import Model


def load(source: str, third_party: Callable[[str], Model | None]) -> Model:
    """Load `source`: a Hugging Face folder, pkg:PACKAGE/PATH, module:FACTORY, or what a plugin knows.

    third_party: asked first, with `pkg:` already resolved to a path; returns None for a source that is not its own.
    Only headers and configuration are read here. Raises InputError (QC-INPUT-...) for a source that is missing,
    damaged, unsafe or of a kind that qconvert does not convert.
    """
    # torch and transformers take seconds, and folder.py and package.py are asked without them.
    from qconvert.load import factory, hugging_face

    if not source.strip() or "\0" in source:
        raise InputError(
            "QC-INPUT-001", f"{source!r} is no source", hint="give --model a folder, pkg:PACKAGE/PATH or module:FACTORY"
        )
    if source.startswith(package.SCHEME):
        source = str(package.resolve(source))
    if (model := third_party(source)) is not None:
        return model
    if source.startswith(factory.SCHEME):
        return factory.load_factory(source)
    try:
        return hugging_face.load_folder(Path(source))
    except OSError as error:
        raise InputError(
            "QC-INPUT-019", f"{source!a} can't be read: {error}", hint="check the permissions of the folder and its files"
        ) from error
