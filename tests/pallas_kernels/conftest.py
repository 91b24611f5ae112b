"""The run's summary says whether the Mosaic kernels' numbers were checked."""

from tests.pallas_kernels.second_python import SUMMARY


def pytest_terminal_summary(terminalreporter):
    line = terminalreporter.config.stash.get(SUMMARY, None)
    if line is not None:
        terminalreporter.write_line(line)
