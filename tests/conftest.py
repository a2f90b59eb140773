"What a run of the tests prints at its end, and which checks the move into the new house has not reached yet."
from pathlib import Path

import pytest

unfinished = set((Path(__file__).parent/'unfinished.txt').read_text().split())    # ids of tests; delete a line when it passes


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.removeprefix('tests/') in unfinished:
            item.add_marker(pytest.mark.xfail(reason='listed in tests/unfinished.txt', raises=AssertionError))


def pytest_terminal_summary(terminalreporter):
    count = lambda kind: sum('test_notebooks.py::test_runs[' in r.nodeid for r in terminalreporter.stats.get(kind, []))
    if ran := count('passed') + count('failed'):
        terminalreporter.write_line(f"{ran} notebooks were run, {count('passed')} of them to their last line")
    for r in terminalreporter.stats.get('xpassed', []): terminalreporter.write_line(f'delete from tests/unfinished.txt: {r.nodeid}')
