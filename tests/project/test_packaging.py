"""pyproject.toml and constraints.txt: honest ranges, and the exact set that is tested."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECTS = [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]
OURS = {tomllib.loads(path.read_text(encoding="utf-8"))["project"]["name"] for path in PROJECTS}


def requirements(path: Path) -> list[Requirement]:
    """What a project needs from others, with all its extras."""
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in project.get("optional-dependencies", {}).values() for text in extra)]
    return [requirement for requirement in map(Requirement, texts) if requirement.name not in OURS]


def pins() -> dict[str, Version]:
    """Distribution -> the one version that constraints.txt allows."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(pinned) for name, pinned in pairs}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.parent.name)
def test_every_requirement_is_pinned_to_a_version_within_its_range(project: Path) -> None:
    pinned = pins()
    outside = [
        str(requirement)
        for requirement in requirements(project)
        if not requirement.specifier.contains(pinned.get(canonicalize_name(requirement.name), Version("0")))
    ]
    assert outside == []


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.parent.name)
def test_every_requirement_has_a_lower_bound(project: Path) -> None:
    assert [str(each) for each in requirements(project) if not any(s.operator in (">=", "==") for s in each.specifier)] == []


def test_pins_are_sorted_exact_and_without_build_tags() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert lines == sorted(lines, key=str.lower)
    assert [name for name, pinned in pins().items() if pinned.local] == []


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "qconvert" / "py.typed").is_file()
