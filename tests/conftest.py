"What a run of the tests prints at its end."


def pytest_terminal_summary(terminalreporter):
    count = lambda kind: sum('test_notebooks.py::test_runs[' in r.nodeid for r in terminalreporter.stats.get(kind, []))
    if ran := count('passed') + count('failed'):
        terminalreporter.write_line(f"{ran} notebooks were run, {count('passed')} of them to their last line")
