# SPDX-License-Identifier: MIT
"""The logger of the package: silent when imported, as verbose as the model, the application's to configure.

In processes of their own, which configure logging as applications do.
"""

from __future__ import annotations

import pytest

from tests.support.processes import python

pytestmark = pytest.mark.model

CHOSEN = "slots per layer"  # in the line that says what was chosen
BEGIN = """
import logging, sys
import rotary_llamacpp
from rotary_llamacpp import Llama

def load(verbose, rotary="min", **options):
    Llama(MODEL, rotary=rotary, verbose=verbose, n_ctx=64, **options).close()
"""


@pytest.fixture
def said(native, tiny_model):
    """Runs a program; what it writes to standard error, of our lines."""

    def run(*lines):
        ran = python("\n".join([f"MODEL = {str(tiny_model)!r}", BEGIN, *lines]))
        assert ran.stdout == ""
        return [
            line for line in ran.stderr.splitlines() if "tiny-moe-q8_0.gguf:" in line or "use_mlock" in line
        ]

    return run


def test_importing_adds_a_null_handler_and_nothing_else(native):
    python(
        "import logging, rotary_llamacpp\n"
        "logger = logging.getLogger('rotary_llamacpp')\n"
        "assert [type(each) for each in logger.handlers] == [logging.NullHandler]\n"
        "assert (logger.level, logger.propagate) == (logging.NOTSET, True)\n"
        "root = logging.getLogger()\n"
        "assert (root.level, root.handlers) == (logging.WARNING, [])"
    )


def test_verbose_is_followed_model_by_model(said):
    (line,) = said("load(False); load(True); load(False)")
    assert CHOSEN in line
    assert said("load(False)") == []


def test_the_configurations_verbose_counts_more_than_the_models(said):
    assert len(said("load(False, {'budget': 'min', 'verbose': True})")) == 1
    assert said("load(True, {'budget': 'min', 'verbose': False})") == []


def test_warnings_are_shown_whatever_verbose_is(said):
    (line,) = said("load(False, use_mlock=True)")
    assert "use_mlock" in line
    assert len(said("load(True, use_mlock=True)")) == 2


def test_a_fallback_is_a_warning_and_is_shown(said):
    (line,) = said(
        "from rotary_llamacpp.native import binding",
        "binding.library_path = lambda: binding.Path('/no/such/library.so')",
        "load(False, 'auto')",
    )
    assert "runs without paging: " in line and "/no/such/library.so" in line


@pytest.mark.parametrize("level", ["WARNING", "INFO", "DEBUG"])
def test_an_applications_handlers_get_each_line_once(said, level):
    # verbose=True shows them whatever the root's level is, as it shows llama.cpp's own.
    (line,) = said(
        f"logging.basicConfig(level=logging.{level}, format='%(levelname)s %(message)s')", "load(True)"
    )
    assert line.startswith("INFO tiny-moe") and CHOSEN in line


def test_an_application_that_wants_all_gets_what_verbose_false_hides(said):
    (line,) = said(
        "logging.basicConfig(level=logging.DEBUG, format='%(levelname)s %(message)s')",
        "load(False)",
        "assert logging.getLogger('rotary_llamacpp').level == logging.NOTSET",
    )
    assert line.startswith("DEBUG tiny-moe") and CHOSEN in line


@pytest.mark.parametrize("level", ["WARNING", "DEBUG"])
def test_the_level_that_an_application_sets_stays(said, level):
    lines = said(
        f"logging.getLogger('rotary_llamacpp').setLevel(logging.{level})",
        "load(True, use_mlock=True)",
        f"assert logging.getLogger('rotary_llamacpp').level == logging.{level}",
    )
    assert len(lines) == (1 if level == "WARNING" else 2)
    assert any("use_mlock" in line for line in lines)


@pytest.mark.parametrize("propagate", [True, False])
def test_a_handler_on_our_logger_takes_the_place_of_standard_error(said, propagate):
    lines = said(
        "logger, got = logging.getLogger('rotary_llamacpp'), []",
        "class Mine(logging.Handler):",
        "    def emit(self, record): got.append(record.getMessage())",
        f"logger.addHandler(Mine()); logger.propagate = {propagate}",
        "load(True)",
        f"assert len(got) == 1 and {CHOSEN!r} in got[0]",
    )
    assert lines == []


def test_no_propagation_leaves_the_roots_handlers_out(said):
    (line,) = said(
        "logging.basicConfig(format='root: %(message)s')",
        "logging.getLogger('rotary_llamacpp').propagate = False",
        "load(True)",
    )
    assert line.startswith("tiny-moe"), "nobody else shows it"


def test_without_standard_error_nothing_is_raised(said):
    assert said("load(True)", "sys.stderr.close()", "load(False, use_mlock=True)")
    assert said("load(True)", "sys.stderr = None", "load(False, {'budget': 'min', 'verbose': True})")
