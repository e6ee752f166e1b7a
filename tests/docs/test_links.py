# SPDX-License-Identifier: MIT
"""Links between pages: none is broken, on GitHub or in the site that mkdocs builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.docs import pages
from tests.support import HANG_S, ROOT

PAGES = pages.every()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_relative_link_is_broken(page):
    by_path = {each.path: each for each in PAGES}
    for link in page.links:
        if re.match(r"[a-z]+:", link):
            continue
        where, _, anchor = link.partition("#")
        target = (page.path.parent / where).resolve() if where else page.path
        assert target.is_relative_to(ROOT) and target.is_file(), f"{page.name}: {link}: no such file"
        if page.path.is_relative_to(pages.DOCS):
            assert target.is_relative_to(pages.DOCS), f"{page.name}: {link}: not in docs/, so not in the site"
        if anchor:
            assert target in by_path, f"{page.name}: {link}: an anchor in what is no page"
            assert anchor in by_path[target].anchors, f"{page.name}: {link}: no such heading"


def test_every_page_is_in_the_navigation_once():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = sorted(re.findall(r"[\w/.-]+\.md", nav))
    there = sorted(path.relative_to(pages.DOCS).as_posix() for path in pages.DOCS.rglob("*.md"))
    assert named == there


@pytest.mark.slow
def test_mkdocs_builds_the_site_with_no_warning(tmp_path):
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed")
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert '<pre class="mermaid">' in (tmp_path / "how-it-works" / "index.html").read_text()
