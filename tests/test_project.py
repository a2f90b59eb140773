"The package, its notebooks and its papers agree with each other."
import ast, importlib, inspect, re, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from execnb.nbio import read_nb
from fastcore.docments import docments
from nbdev.doclinks import nbglob

root = Path(__file__).resolve().parent.parent
settings = ConfigParser(delimiters=['='])
settings.read(root/'settings.ini')
settings = settings['DEFAULT']
package = settings['lib_path']
modules = sorted(p.stem for p in (root/package).glob('*.py') if not p.stem.startswith('_'))
notebooks = sorted((root/'nbs').glob('[0-9]*.ipynb'))
every_module = pytest.mark.parametrize('module', modules)


def exported(path):
    "Name of the module that a notebook exports, if any."
    for cell in read_nb(path).cells:
        if cell.cell_type == 'code' and (m := re.search(r'^#\|\s*default_exp\s+(\S+)', cell.source, re.M)): return m.group(1)


number = {exported(p): p.name.split('_')[0] for p in notebooks if exported(p)}    # module -> '01', in reading order


def flip_imports(tree):
    "Every `(module, names)` of this package that some code imports, wherever it does so."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.split('.')[0] == package: yield a.name.partition('.')[2], []
        if isinstance(node, ast.ImportFrom):
            mod,names = node.module or '', [a.name for a in node.names]
            if not node.level:
                if mod.split('.')[0] != package: continue
                mod = mod.partition('.')[2]
            if mod: yield mod, names
            else: yield from ((n, []) for n in names if not n.startswith('__'))    # from flip_nb import masking


def test_every_module_has_its_notebook():
    stale = set(modules) - set(number)
    assert not stale, f'no notebook exports {sorted(stale)}: delete the stale module or restore its notebook'
    assert not set(number) - set(modules), f'not exported yet: {sorted(set(number) - set(modules))}; run nbdev_export'


def test_a_notebook_and_its_module_share_a_name():
    exporting = {p: exported(p) for p in nbglob(root/'nbs', as_path=True) if exported(p)}
    assert len(set(exporting.values())) == len(exporting), f'two notebooks export one module: {exporting}'
    for p,name in exporting.items(): assert re.fullmatch(rf'\d+[a-z]?_{name}\.ipynb', p.name), f'{p.name} exports {name}'


def test_notebook_numbers_are_used_once():
    numbers = [p.name.split('_')[0] for p in notebooks]
    assert len(set(numbers)) == len(numbers), numbers


@every_module
def test_imports_go_one_way(module):
    assert module in number, f'no notebook exports {module}'
    tree = ast.parse((root/package/f'{module}.py').read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom): assert '*' not in [a.name for a in node.names], f'{module} has `from {node.module} import *`'
    for other,_ in flip_imports(tree):
        assert other in number, f'{module} imports {package}.{other}, which no notebook exports'
        assert number[other] < number[module], f'{number[module]}_{module} imports from the later {number[other]}_{other}'


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebooks_import_from_earlier_ones(path):
    for cell in read_nb(path).cells:
        for node in cell.parsed_() or []:
            for other,names in flip_imports(node):
                assert '*' not in names, f'{path.name} has `from {package}.{other} import *`'
                assert number.get(other, '') <= path.name.split('_')[0], f'{path.name} imports from the later {number[other]}_{other}'


@every_module
def test_public_names_are_documented(module):
    mod = importlib.import_module(f'{package}.{module}')
    assert hasattr(mod, '__all__'), f'{module} was not made by nbdev_export'
    for name in mod.__all__:
        obj = getattr(mod, name)
        if not (inspect.isfunction(obj) or inspect.isclass(obj)): continue
        assert obj.__module__ == mod.__name__, f'{module}.__all__ names {name}, which is made in {obj.__module__}'
        assert (vars(obj).get('__doc__') if inspect.isclass(obj) else obj.__doc__), f'{module}.{name} has no docstring'
        if inspect.isclass(obj) and '__init__' not in vars(obj): continue
        kinds = inspect.signature(obj).parameters    # without `self`; docments cannot read the comment of a `**kw`
        for p,doc in docments(obj, full=True, returns=False).items():
            if p not in kinds or kinds[p].kind == inspect.Parameter.VAR_KEYWORD: continue
            known = doc['docment'] or doc['anno'] is not inspect.Parameter.empty
            assert known, f'{module}.{name}: parameter `{p}` has neither a comment nor a type'


def test_importing_has_no_side_effects(tmp_path):
    code = f'''
import os, sys, torch
sys.path.insert(0, {str(root)!r})
seed,threads,state = torch.initial_seed(), torch.get_num_threads(), torch.get_rng_state()
for m in sys.argv[1:]: __import__('{package}.'+m)
heavy = [m for m in ('matplotlib', 'datasets', 'timm') if m in sys.modules]
assert not heavy, f'importing the modules imports {{heavy}}: import them where they are used'
assert (seed, threads) == (torch.initial_seed(), torch.get_num_threads()), 'importing sets the seed or the number of threads'
assert torch.equal(state, torch.get_rng_state()), 'importing draws random numbers'
assert not torch.cuda.is_initialized(), 'importing starts CUDA'
assert not os.listdir('.'), f'importing writes files: {{os.listdir(".")}}'
'''
    res = subprocess.run([sys.executable, '-c', code, *modules], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert res.returncode == 0, res.stderr
    assert not res.stdout, f'importing prints {res.stdout!r}'


def test_readme_is_up_to_date():
    res = subprocess.run([sys.executable, root/'tools'/'make_readme.py', '--check'], cwd=root, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr


def test_versions_agree():
    want = settings['version']
    assert importlib.import_module(package).__version__ == want, 'run nbdev_export'
    assert re.search(r'^## (\S+)', (root/'CHANGELOG.md').read_text(), re.M).group(1) == want, 'CHANGELOG.md has another newest version'
    try: assert version(package) == want, "run pip install -e '.[dev]' again"
    except PackageNotFoundError: pass    # not installed: run from the source tree


def test_the_overview_repeats_the_results():
    "The table of results in the index is the one that the notebook of results prints."
    printed = [''.join(o['data']['text/markdown']) for c in read_nb(root/'nbs/1_method/10_does_it_pay.ipynb').cells for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]
    rows = [line.strip() for line in printed[-1].splitlines() if line.startswith('| ') and '---' not in line]
    overview = '\n'.join(c.source for c in read_nb(root/'nbs/index.ipynb').cells)
    assert len(rows) == 5 and not [r for r in rows if r not in overview], 'nbs/index.ipynb shows other results than nbs/1_method/10_does_it_pay.ipynb'
