"""Every document: its relative links lead to files that are there, and to headings that these have."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "plugins/*/*.md", "tests/**/*.md", "examples/*.md") for path in ROOT.glob(pattern)
)


def without_code(path: Path) -> str:
    """The text without blocks and spans of code: what looks like a link there is none."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!\[)`[^`\n]*`", "", text)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a document."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number = 1
        while (again := anchor if number == 1 else f"{anchor}-{number - 1}") in found:
            number += 1
        found.add(again)
    return found


def links(path: Path) -> list[str]:
    text = without_code(path)
    named = re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.MULTILINE)
    return [link for link in [*re.findall(r"\]\(([^)\s]+)\)", text), *named] if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for link in links(document):
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_there_are_links_and_anchors() -> None:
    found = [link for document in DOCUMENTS for link in links(document)]
    assert len(found) > 50
    assert any("#" in link for link in found)


def test_headings_become_what_github_makes_of_them(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("# Where do I find ...\n\n## A `b` [c](d.md), e-f!\n\n## Same\n\n## Same\n\n```sh\n# no heading\n```\n")
    assert anchors(document) == {"where-do-i-find-", "a-b-c-e-f", "same", "same-1"}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/extending.md"])
def test_the_readme_leads_there(page: str) -> None:
    assert page in links(ROOT / "README.md")


def test_the_changelog_has_the_version_of_the_package_and_what_comes_next() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]


def test_hooks_of_commits_run_what_is_installed() -> None:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [each["repo"] for each in settings["repos"]] == ["local"]
    assert {hook["language"] for each in settings["repos"] for hook in each["hooks"]} == {"system"}


def test_the_paths_that_contributors_are_given_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w/])((?:tests|examples|docs|plugins|\.ci)/[\w./-]*\w)", text)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
