"""Every notebook runs from top to bottom, and what is stored in it is fit to be read.

`nbdev_test` reports success for a notebook of which it ran nothing. So each one is run by itself here, has to end
with the line `Success.`, and is searched for the ways in which cells are left out without a word.
"""
import multiprocessing, os, re, signal
from pathlib import Path
from unittest import mock

import pytest
from execnb.nbio import read_nb
from execute_notebooks import is_skipped, kernelspec, machine_paths, root
from fresh import run_notebook
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

timeout = 900    # seconds for one notebook
notebooks = sorted((p.relative_to(root).as_posix() for p in nbglob(root/'nbs', as_path=True)),
                   key=lambda name: (name.count('/'), name))    # the two pages at the top are long: nobody waits for them at the end
every_notebook = pytest.mark.parametrize('name', notebooks)
bypasses = {
    r'\bos\._exit\b': 'ends the test process, and with it every later test',
    r'^\s*%%script\b|--no-raise-error': 'goes on whatever its script does',
    r'\bIN_TEST\b': 'does something else under test; use the flags `slow`, `gpu` or `notest`',
}
odd_words = re.compile(r'\b(go(?:es|ing)? on with|gone on|examined?|by luck|whose word counts)\b', re.I)


def code_cells(name): return [c for c in read_nb(root/name).cells if c.cell_type == 'code']


def test_there_are_notebooks(): assert 'nbs/index.ipynb' in notebooks


@pytest.fixture(scope='session')
def fresh_process():
    """A source of fresh processes in which the slow libraries are imported already: that takes up to ten seconds, for each of
    more than a hundred notebooks. What belongs to this project is not among them."""
    if 'forkserver' not in multiprocessing.get_all_start_methods(): return multiprocessing.get_context('spawn')    # Windows
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload('nbdev.test torch torchvision.transforms.v2 timm accelerate matplotlib.pyplot tokenizers'.split())
    return context


@every_notebook
def test_runs(name, fresh_process, tmp_path):
    output = tmp_path/'output'
    process = fresh_process.Process(target=run_notebook, args=(name, root, output))
    # Notebooks run side by side: one thread each, or they take the processors from one another.
    with mock.patch.dict(os.environ, OMP_WAIT_POLICY='passive', OMP_NUM_THREADS='1'): process.start()
    process.join(timeout)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, 'killpg') else process.kill()
        pytest.fail(f'{name} ran for more than {timeout} seconds')
    text = output.read_text()
    assert process.exitcode == 0, f'{name} failed\n{text[-10000:]}'
    assert text.strip().split('\n')[-1] == 'Success.', f'{name}: nbdev_test ended without `Success.`\n{text[-2000:]}'


@every_notebook
def test_nothing_is_skipped_silently(name):
    nb = NBProcessor(root/name, procs=FrontmatterProc, rm_directives=False, process=True).nb
    assert nb.metadata.get('kernelspec') == kernelspec, f'{name}: run tools/execute_notebooks.py, which writes {kernelspec}'
    assert 'skip_exec' not in nb.frontmatter_, f'{name}: its front matter leaves the whole notebook out'
    cells = code_cells(name)
    for cell in cells:
        for pattern,why in bypasses.items():
            assert not re.search(pattern, cell.source, re.M), f'{name}: this cell {why}:\n{cell.source}'
        alone = re.fullmatch(r'(#\|.*\n|import nbdev\n|import nbdev; *)*nbdev\.nbdev_export\(\)', cell.source.strip())
        assert 'nbdev_export(' not in cell.source or alone, f'{name}: cells that call nbdev_export are not tested:\n{cell.source}'
    flags = set(get_config().tst_flags.split())
    assert not cells or not all(is_skipped(c, flags) for c in cells), f'{name}: every code cell is marked not to be run'


@every_notebook
def test_outputs_are_stored(name):
    cells = code_cells(name)
    if len(cells) > 3: assert any(c.outputs for c in cells), f'{name}: no outputs; run tools/execute_notebooks.py {name}'


@every_notebook
def test_outputs_are_fit_to_read(name):
    for i,cell in enumerate(read_nb(root/name).cells, 1):
        for o in cell.get('outputs', []): assert o.output_type != 'error', f"{name}, cell {i} shows {o.ename}: {o.evalue}"
        assert not machine_paths(cell), f'{name}, cell {i} shows a path of one machine: {machine_paths(cell)[0]}'


@every_notebook
def test_cells_are_fit_to_read(name):
    for i,cell in enumerate(read_nb(root/name).cells, 1):
        if cell.cell_type != 'code':
            assert not (m := odd_words.search(cell.source)), f'{name}, cell {i}: "{m.group()}" is not how the field says it'
            continue
        lines = [l for l in cell.source.splitlines() if not re.match(r'#\|\s*(fig-cap|fig-alt|label):', l)]
        wide = [l for l in lines if len(l) > 100]
        assert not wide, f'{name}, cell {i}: {len(wide)} lines over 100 characters:\n' + '\n'.join(wide)
        assert len([l for l in lines if l.strip()]) <= 40, f'{name}, cell {i} has more than 40 lines'


@every_notebook
def test_comparisons_run_in_a_plain_clone(name):
    if not re.match(r'nbs/(00_|(solutions/)?(1_method|6_official)/)', name): return
    for cell in code_cells(name): assert 'shared/' not in cell.source, f'{name} reads files that a clone does not have:\n{cell.source}'
