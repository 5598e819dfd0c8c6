"""Verification in a process of its own, so that nothing of the conversion's memory can prop up what is on disk.

The child gets a request (folder and recipe) on stdin, writes progress as JSON lines to stdout, and its report or its
error to a scratch file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from qconvert import errors
from qconvert.errors import NO_MEMORY, QConvertError, ResourceError, told
from qconvert.ir.progress import Progress
from qconvert.ir.report import Report
from qconvert.recipe import Recipe
from qconvert.supervision.child import become_watched, end_with_parent, import_path, watched_too
from qconvert.supervision.startup import importing

LARGER_MACHINE = (
    "free some and run the same command again, which resumes, or take --no-verify and run qconvert verify on a larger machine"
)
DONE = '{"done": true}\n'
# Torch's idle threads wait in a loop otherwise, which takes cores from those that work where other programs want them, too.
PASSIVE = {"OMP_WAIT_POLICY": "passive"}


def verify_in_fresh_process(recipe: Recipe, folder: Path, scratch: Path, progress: Progress) -> Report:
    """Measure the artifact in `folder`. scratch: a folder for the answer.

    Raises what the child raised, and ResourceError QC-VERIFY-002 if it died.
    """
    result = scratch / "report.json"
    request = {"recipe": recipe.model_dump(mode="json"), "folder": str(folder), "result": str(result)}
    with subprocess.Popen(
        [sys.executable, "-m", "qconvert.pipeline.verify_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**PASSIVE, **os.environ, **import_path(), **watched_too(), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that has died already is reported below
            json.dump(request, child.stdin)
        try:
            for line in child.stdout:
                if line == DONE:  # and not the end of stdout, which what a plugin has started may hold
                    break
                _pass_on(line, progress)
        except BaseException:  # Ctrl-C: nobody waits for the answer any more
            child.kill()
            raise
    if not result.exists():
        raise ResourceError(
            "QC-VERIFY-002",
            f"the verifying process ended with code {child.returncode} and no answer",
            hint=f"a negative code is a signal, -9 often a lack of memory: {LARGER_MACHINE}",
        )
    answer = json.loads(result.read_text(encoding="utf-8"))
    if "error" in answer:
        error = answer["error"]
        raise getattr(errors, error["class"])(error["code"], error["message"], hint=error["hint"])
    return Report.model_validate(answer["report"])


def _pass_on(line: str, progress: Progress) -> None:
    try:
        event = json.loads(line)
        if "stage" in event:
            progress.stage(event["stage"], event["total"])
        else:
            progress.advance(event["advance"])
    except (ValueError, TypeError, KeyError):
        sys.stderr.write(line)  # something printed by a library or a plugin


class _ToParent:
    """Progress as JSON lines."""

    def stage(self, name: str, total: int | None) -> None:
        self._send({"stage": f"verify: {name}", "total": total})

    def advance(self, n: int = 1) -> None:
        self._send({"advance": n})

    def _send(self, event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)


def main() -> None:
    """Answer one request."""
    become_watched()
    end_with_parent()
    # The parent has shown every warning already, and takes stdout for progress.
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    with importing():
        from qconvert.pipeline import verification

    request = json.load(sys.stdin)
    recipe = Recipe.model_validate(request["recipe"])
    answer: dict[str, Any]
    try:
        report = verification.measure(Path(request["folder"]), recipe, _ToParent())
        answer = {"report": report.model_dump(mode="json")}
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if os.environ.get("QCONVERT_DEBUG"):
            traceback.print_exc()
        found = told(error)
        if found is not error or found.code == NO_MEMORY:
            hint = LARGER_MACHINE if found.code == NO_MEMORY else found.hint
            found = type(found)(found.code, f"while verifying: {found.message}", hint=hint)
        answer = {"error": _document(found)}
    Path(request["result"]).write_text(json.dumps(answer), encoding="utf-8")


def _document(error: QConvertError) -> dict[str, str]:
    """Return what the parent raises an error from again; a plugin's own class is replaced by the one that it extends."""
    known = next(kind for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return {"class": known.__name__, "code": error.code, "message": error.message, "hint": error.hint}


if __name__ == "__main__":
    try:
        with contextlib.suppress(KeyboardInterrupt):  # the parent got it too, and says so
            main()
    finally:
        print(DONE, end="", flush=True)
        os._exit(0)  # the answer is there or not: what plugins have left behind in this process is not waited for
