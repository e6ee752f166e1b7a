# SPDX-License-Identifier: MIT
"""What is in README.md and docs/: fences, headings, links, tables and inline code of each page.

Reads the Markdown that these pages are written in, not all that CommonMark has.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.support import ROOT

DOCS = ROOT / "docs"

_FENCE = re.compile(r"( *)(`{3,})(\w*)\s*")
_CODE = re.compile(r"(`+)(.+?)\1(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


@dataclass(frozen=True)
class Fence:
    """A fenced block. `line` is that of its first line of text, from 1."""

    language: str
    line: int
    text: str


@dataclass(frozen=True)
class Page:
    """A page, by its path from the root of the checkout."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @cached_property
    def _parted(self) -> tuple[list[Fence], list[str]]:
        fences: list[Fence] = []
        prose: list[str] = []
        opened: tuple[re.Match[str], int, list[str]] | None = None
        for number, line in enumerate(self.path.read_text().splitlines(), 1):
            match = _FENCE.fullmatch(line)
            if opened is None:
                if match:
                    opened = (match, number + 1, [])
                prose.append("" if match else line)
                continue
            fence, start, lines = opened
            if match and match[2] == fence[2] and not match[3]:
                fences.append(Fence(fence[3], start, "\n".join(lines) + "\n"))
                opened = None
            else:
                indent = len(fence[1])
                lines.append(line[indent:] if line[:indent].isspace() else line)
            prose.append("")
        assert opened is None, f"{self.name}: the fence before line {opened[1]} is not closed"
        return fences, prose

    @property
    def fences(self) -> list[Fence]:
        return self._parted[0]

    @property
    def prose(self) -> list[str]:
        """The lines of the page; those of fences are empty."""
        return self._parted[1]

    @property
    def code(self) -> list[str]:
        """Inline code."""
        return [match[2].strip() for match in _CODE.finditer(" ".join(self.prose))]

    @property
    def links(self) -> list[str]:
        """Targets of links."""
        text = "\n".join(self.prose)
        return [match[1] for match in _LINK.finditer(_CODE.sub("code", text))]

    @property
    def anchors(self) -> set[str]:
        """Anchors of headings that GitHub and, for docs/, mkdocs make alike."""
        github: dict[str, int] = {}
        found = set()
        for _, title in self._headings():
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            n = github[slug] = github.get(slug, -1) + 1
            plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
            built = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
            if n == 0 and (built == slug or self.path.parent == ROOT):
                found.add(slug)
        return found

    def _headings(self) -> Iterator[tuple[int, str]]:
        for i, line in enumerate(self.prose):
            if match := re.fullmatch(r"#{1,6} +(.+?) *#*", line):
                yield i, re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", match[1])

    def section(self, title: str) -> str:
        """The prose under a heading that has these words, up to the next one of its level or above."""
        lines = self.prose
        for i, found in self._headings():
            if title.lower() in found.lower():
                level = lines[i].index(" ")
                rest = "\n".join(lines[i + 1 :])
                return re.split(rf"(?m)^#{{1,{level}}} ", rest)[0]
        raise AssertionError(f"{self.name}: no heading with {title!r}")


def first_cells(text: str) -> list[str]:
    """The inline code in the first cells of tables' rows."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [match[2] for row in rows for match in _CODE.finditer(row.split("|")[1])]


def every() -> list[Page]:
    """README.md and all pages of docs/."""
    paths = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    return [Page(path.relative_to(ROOT).as_posix()) for path in paths]
