"""What takes minutes in a second Python is begun early; the summary says whether Mosaic's numbers were checked."""

import gc
import os
import sys
from pathlib import Path

import jax
import pytest

from tests.pallas_kernels import early, second_python

MODULE = Path(__file__).with_name("test_ahead.py")


@pytest.fixture(scope="module", autouse=True)
def programs_of_others_are_let_go():
    """Every compiled program takes a few mappings of memory, of which a process may have 65,530."""
    jax.clear_caches()
    gc.collect()


def pytest_collection_finish(session):
    wanted = [item for item in session.items if item.path == MODULE]
    if (
        os.environ.get("CI") == "true"
        and sys.platform == "linux"
        and wanted
        and not session.config.option.collectonly
    ):
        early.begin(session.config, wanted[0].module.JOBS)


def pytest_terminal_summary(terminalreporter):
    line = terminalreporter.config.stash.get(second_python.SUMMARY, None)
    if line is not None:
        terminalreporter.write_line(line)
