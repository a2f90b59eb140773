"A notebook in a process of its own, for test_notebooks.py. Imports nothing slow: each process has to import this module."
import multiprocessing, os, sys
from contextlib import redirect_stderr, redirect_stdout


def run_notebook(name, root, output):
    "`nbdev_test` for one notebook; what it prints goes into a file."
    from nbdev.test import nbdev_test
    os.chdir(root)
    if hasattr(os, 'setsid'): os.setsid()    # its processes can be ended with it
    multiprocessing.set_start_method(None, force=True)    # as Python starts processes by itself, not as this one was started
    sys.argv = ['nbdev_test']
    with open(output, 'w', buffering=1) as f, redirect_stdout(f), redirect_stderr(f):
        nbdev_test(path=name, n_workers=0, do_print=True)
