"""qconvert: trained checkpoints into small, fast, portable artifacts that are proven to work.

Names are resolved at first use (PEP 562), so that importing qconvert imports neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qconvert.ir.report import Report
    from qconvert.pipeline.conversion import convert
    from qconvert.pipeline.training import prepare_qat
    from qconvert.plugin import hookimpl
    from qconvert.recipe import Recipe
    from qconvert.training import save_trained

    __version__: str

__all__ = ["Recipe", "Report", "__version__", "convert", "hookimpl", "prepare_qat", "save_trained"]

_HOMES = {
    "Recipe": "qconvert.recipe",
    "Report": "qconvert.ir.report",
    "convert": "qconvert.pipeline.conversion",
    "hookimpl": "qconvert.plugin",
    "prepare_qat": "qconvert.pipeline.training",
    "save_trained": "qconvert.training",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("qconvert")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qconvert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
