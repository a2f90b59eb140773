"The package, its notebooks and its papers agree with each other, and the house keeps its order."
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
notebooks = sorted(p for p in nbglob(root/'nbs', as_path=True) if 'solutions' not in p.parts)
solutions = sorted(nbglob(root/'nbs'/'solutions', as_path=True))


def module_name(path):
    "Name of a module inside the package: 'data.pairs'."
    return '.'.join(path.relative_to(root/package).with_suffix('').parts)


modules = sorted(module_name(p) for p in (root/package).rglob('*.py') if not p.stem.startswith('_'))
every_module = pytest.mark.parametrize('module', modules)
every_notebook = pytest.mark.parametrize('path', notebooks, ids=lambda p: p.relative_to(root/'nbs').as_posix())

# Who stands on whom: a module imports from lower layers, and from earlier notebooks of its own part.
method = 'core masking transformer vision text loss card model scenes zero_shot loop'.split()
layers = {**dict.fromkeys(method, 0), 'files': 1, 'distributed': 1, 'data': 2, 'objectives': 3, 'strategies': 3, 'official': 3,
          'evaluation': 4, 'scale': 5, 'transfer': 6}
commands = 'train evaluate finetune bench nouns plan search'.split()
layers |= dict.fromkeys(commands, 7)
longer = {}    # module -> why it may have more than 350 lines


def cells_of(path, kind='code'): return [c for c in read_nb(path).cells if c.cell_type == kind]


def exported(path):
    "Name of the module that a notebook exports, if any."
    for cell in cells_of(path):
        if m := re.search(r'^#\|\s*default_exp\s+(\S+)', cell.source, re.M): return m.group(1)


home = {exported(p): p for p in notebooks if exported(p)}    # module -> its notebook


def layer(module): return layers[module.split('.')[0]]


def place(module): return home[module].relative_to(root/'nbs').as_posix()


def flip_imports(tree, own=''):
    "Every `(module, names)` of this package that some code imports, wherever it does so; `own` is the importing module."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.split('.')[0] == package: yield a.name.partition('.')[2], []
        if isinstance(node, ast.ImportFrom):
            mod,names = node.module or '', [a.name for a in node.names]
            if node.level:
                base = own.split('.')[:-node.level] if own else []
                mod = '.'.join(base + ([mod] if mod else []))
            elif mod.split('.')[0] == package: mod = mod.partition('.')[2]
            else: continue
            if mod in modules: yield mod, names
            else: yield from ((f'{mod}.{n}'.strip('.'), []) for n in names if not n.startswith('__'))    # from flip_nb import masking


def tree_of(module): return ast.parse((root/package/f"{module.replace('.', '/')}.py").read_text())


def test_every_module_has_its_notebook():
    stale = set(modules) - set(home)
    assert not stale, f'no notebook exports {sorted(stale)}: delete the stale module or restore its notebook'
    assert not set(home) - set(modules), f'not exported yet: {sorted(set(home) - set(modules))}; run nbdev_export'


def test_a_notebook_and_its_module_share_a_name():
    exporting = {p: exported(p) for p in nbglob(root/'nbs', as_path=True) if exported(p)}
    assert len(set(exporting.values())) == len(exporting), f'two notebooks export one module: {exporting}'
    for p,name in exporting.items():
        part,_,stem = name.rpartition('.')
        assert re.fullmatch(rf'\d+[a-z]?_{stem}\.ipynb', p.name), f'{p.name} exports {name}'
        assert not part or p.parent.name.endswith(f'_{part}'), f'{p.parent.name}/{p.name} exports {name}'


def test_numbers_are_used_once_in_every_part():
    for part in {p.parent for p in notebooks}:
        numbers = [p.name.split('_')[0] for p in notebooks if p.parent == part and p.name[0].isdigit()]
        assert len(set(numbers)) == len(numbers), f'{part.name}: {numbers}'


def test_solutions_mirror_the_notebooks():
    known = {p.relative_to(root/'nbs') for p in notebooks}
    for p in solutions: assert p.relative_to(root/'nbs'/'solutions') in known, f'{p.relative_to(root)} solves no notebook'


@every_module
def test_imports_go_one_way(module):
    assert module in home, f'no notebook exports {module}'
    tree = tree_of(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom): assert '*' not in [a.name for a in node.names], f'{module} has `from {node.module} import *`'
    for other,_ in flip_imports(tree, module):
        assert other in home, f'{module} imports {package}.{other}, which no notebook exports'
        if layer(other) == layer(module) and other not in commands:
            assert home[other].parent == home[module].parent or layer(module) == 1, f'{module} imports {other} of another part on the same layer'
            assert place(other) < place(module), f'{place(module)} imports from the later {place(other)}'
        else: assert layer(other) <= layer(module), f'{module} imports {other}, which stands above it'


@every_notebook
def test_notebooks_import_what_stands_below(path):
    "The method shows nothing but itself; other notebooks may also call a command, as a user would."
    own,part = exported(path),path.parent.name
    for cell in cells_of(path):
        for node in cell.parsed_() or []:
            for other,names in flip_imports(node, own or ''):
                assert '*' not in names, f'{path.name} has `from {package}.{other} import *`'
                if part == '1_method': assert layer(other) == 0, f'{path.name} of the method imports {other}'
                if own and other in home and other not in commands: assert layer(other) <= layer(own), f'{path.name} imports {other}, which stands above it'


def parameters(node):
    "Named parameters of a function, without self, cls and ctx."
    a = node.args
    return [x.arg for x in a.posonlyargs + a.args + a.kwonlyargs if x.arg not in ('self', 'cls', 'ctx')]


@every_module
def test_modules_are_small(module):
    text = (root/package/f"{module.replace('.', '/')}.py").read_text()
    lines = text.splitlines()
    assert len(lines) <= 350 or module in longer, f'{module} has {len(lines)} lines: give a part of it a module of its own'
    wide = [f'{module}:{i}: {len(l)}' for i,l in enumerate(lines, 1) if len(l) > 120 and not l.startswith(('"""', '__all__'))]    # nbdev writes these two
    assert not wide, f'lines over 120 characters: {wide}'
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert len(parameters(node)) <= 8, f'{module}.{node.name} has {len(parameters(node))} parameters: group them in a dataclass'
        if isinstance(node, (ast.Name, ast.alias)) and getattr(node, 'id', getattr(node, 'name', '')) == 'SimpleNamespace':
            raise AssertionError(f'{module} keeps something in a SimpleNamespace: use a dataclass')


def patched_class(node):
    "Name of the class that a method is patched onto, if it is."
    for d in node.decorator_list:
        name = d.func.id if isinstance(d, ast.Call) and isinstance(d.func, ast.Name) else getattr(d, 'id', '')
        if name == 'patch' and node.args.args and node.args.args[0].annotation: return ast.unparse(node.args.args[0].annotation)


@every_notebook
def test_patched_methods_stand_beside_their_class(path):
    section,where = '',{}
    for cell in read_nb(path).cells:
        if cell.cell_type == 'markdown' and (m := re.findall(r'^## (.*)', cell.source, re.M)): section = m[-1]
        if cell.cell_type != 'code' or not re.search(r'^#\|\s*export', cell.source, re.M): continue
        for node in cell.parsed_() or []:
            if isinstance(node, ast.ClassDef): where[node.name] = section
            if isinstance(node, ast.FunctionDef) and (name := patched_class(node)):
                assert where.get(name) == section, f'{path.name}: {node.name} is patched onto {name} in another section'


def has_a_doc(obj): return vars(obj).get('__doc__') if inspect.isclass(obj) else obj.__doc__


@every_module
def test_public_names_are_documented(module):
    mod = importlib.import_module(f'{package}.{module}')
    assert hasattr(mod, '__all__'), f'{module} was not made by nbdev_export'
    for name in mod.__all__:
        obj = getattr(mod, name)
        if not (inspect.isfunction(obj) or inspect.isclass(obj)): continue
        assert obj.__module__ == mod.__name__, f'{module}.__all__ names {name}, which is made in {obj.__module__}'
        assert has_a_doc(obj), f'{module}.{name} has no docstring'
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


def test_the_package_is_imported_at_once():
    code = f'''
import sys
sys.path.insert(0, {str(root)!r})
import {package}
assert 'torch' not in sys.modules, 'import {package} imports torch'
for name in {package}.__all__: getattr({package}, name)
assert {package}.FLIP.__module__ == '{package}.model' and {package}.random_mask and {package}.info_nce
try: {package}.flipp
except AttributeError as e: assert 'flipp' in str(e)
else: raise AssertionError('a name that does not exist')
'''
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert res.returncode == 0, res.stderr


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
    cells = read_nb(root/'nbs/1_method/10_does_it_pay.ipynb').cells
    printed = [''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]
    rows = [line.strip() for line in printed[-1].splitlines() if line.startswith('| ') and '---' not in line]
    overview = '\n'.join(c.source for c in read_nb(root/'nbs/index.ipynb').cells)
    assert len(rows) == 5 and not [r for r in rows if r not in overview], 'nbs/index.ipynb shows other results than 10_does_it_pay'


def test_the_method_is_short():
    part = [p for p in notebooks if p.parent.name == '1_method']
    cells = sum(len(read_nb(p).cells) for p in part)
    words = sum(len(c.source.split()) for p in part for c in cells_of(p, 'markdown'))
    assert cells <= 600 and words <= 16_000, f'the method has {cells} cells and {words} words'


links = re.compile(r'\]\(([^)\s]+)\)')
papers = [root/n for n in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'fixtures/README.md')]


@pytest.mark.parametrize('path', [*notebooks, *solutions, *papers], ids=lambda p: p.relative_to(root).as_posix())
def test_links_lead_somewhere(path):
    text = path.read_text() if path.suffix == '.md' else '\n'.join(c.source for c in cells_of(path, 'markdown'))
    for link in links.findall(re.sub(r'```.*?```|`[^`\n]+`', '', text, flags=re.S)):
        if re.match(r'[a-z]+:|#', link): continue
        assert (path.parent/link.partition('#')[0]).exists(), f'{path.relative_to(root)} links to {link}'
