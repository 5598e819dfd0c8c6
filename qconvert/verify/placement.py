"""The places where ONNX Runtime ran the nodes of a graph, out of its own profile of one run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.ir.batch import Batch
from qconvert.ort.compare import feed
from qconvert.ort.session import PROVIDERS, file_session, joined

COPIES = ("MemcpyFromHost", "MemcpyToHost")
INTEGERS = frozenset({"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})


@dataclass(frozen=True, slots=True)
class Placement:
    """The places where the nodes of one run were computed. nodes: how many ran on the target's provider, copies left out.

    cpu_nodes: "OP NAME" of those that ran on the CPU instead; misplaced: those of them that compute with floats.
    copies: copies between device and host within one run.
    """

    nodes: int
    cpu_nodes: tuple[str, ...]
    misplaced: tuple[str, ...]
    copies: int


def measure_placement(files: Mapping[str, Path], target: str, batch: Batch) -> Placement:
    """Run the graphs once with a profile, in sessions of their own. files: part (see targets.graph_files) -> file."""
    with tempfile.TemporaryDirectory() as folder:
        parts = {part: file_session(file, target, profile=Path(folder) / part) for part, file in files.items()}
        session = joined(parts)
        session.run(None, feed(session, batch))
        profiles = [Path(part.end_profiling()).read_text(encoding="utf-8") for part in parts.values()]
    return placement((event for profile in profiles for event in json.loads(profile)), target)


def placement(events: Iterable[Mapping[str, Any]], target: str) -> Placement:
    """Return where the nodes of one run were computed, from the events of its profile."""
    ran = [event for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    work = [event for event in ran if event["args"]["op_name"] not in COPIES]
    elsewhere = [event for event in work if event["args"]["provider"] != PROVIDERS[target]]
    return Placement(
        nodes=len(work) - len(elsewhere),
        cpu_nodes=tuple(map(_named, elsewhere)),
        misplaced=tuple(_named(event) for event in elsewhere if not _on_integers(event["args"])),
        copies=len(ran) - len(work),
    )


def _named(event: Mapping[str, Any]) -> str:
    return f"{event['args']['op_name']} {event['name'].removesuffix('_kernel_time')}"


def _on_integers(args: Mapping[str, Any]) -> bool:
    types = {kind for key in ("input_type_shape", "output_type_shape") for entry in args[key] for kind in entry}
    return types <= INTEGERS
