"What is typed: paths in every spelling, switches, commands that are shown, and errors that name their file."
import os, re, subprocess, sys
from pathlib import Path
from unittest import mock

import pytest
from execnb.nbio import read_nb
from nbdev.doclinks import nbglob

from flip_nb.bench import ReportOptions
from flip_nb.evaluate import EvaluateConfig, trained_on
from flip_nb.scale.config import TrainConfig
from flip_nb.scale.resume import resume_config
from flip_nb.scale.options import build, command_line, defaults, flatten, given, options_of
from flip_nb.transfer.tuner import FinetuneConfig

root = Path(__file__).resolve().parent.parent
paths = {TrainConfig: {'data', 'init', 'vocab', 'nouns', 'out', 'resume'}, EvaluateConfig: {'runs', 'data', 'out', 'features'},
         FinetuneConfig: {'run', 'data', 'out', 'resume'}, ReportOptions: {'out'}}
every_path = [(Config, name) for Config,names in paths.items() for name in sorted(names)]


@pytest.mark.parametrize('Config', paths)
def test_every_option_that_is_a_path_has_a_door(Config):
    assert {name for name,(f,_) in options_of(Config).items() if f.metadata.get('path')} == paths[Config]


def typed(Config, name, value):
    "What an option is after it was typed, given in Python as text and as a path, and stood in a file."
    more = {} if name in ('runs', 'run') or Config is not EvaluateConfig else dict(runs='x')
    words = [value] if options_of(Config)[name][0].metadata['positional'] else [*more.values(), f'--{name}={value}']
    yield command_line(Config, 'x', '', args=words)[0][name]
    for v in (value, Path(value)): yield given(Config, None, more | {name: v})[0][name]
    for v in (value, Path(value)): yield flatten(build(Config, more | {name: v}))[name]


@pytest.mark.parametrize('Config,name', every_path, ids=lambda x: getattr(x, '__name__', x))
def test_paths_in_every_spelling(Config, name, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.chdir(tmp_path)
    (tmp_path/'a [1],b').mkdir(); (tmp_path/'link').symlink_to('a [1],b'); (tmp_path/'cars').mkdir()
    (tmp_path/'run.yaml').write_text('out: ~/a\n')
    for value,wanted in {'~/a [1],b': 'a [1],b', 'a [1],b': 'a [1],b', './a [1],b/../link': 'link', f'{tmp_path}/cars': 'cars'}.items():
        for found in typed(Config, name, value):
            assert found in (str(tmp_path/wanted), [str(tmp_path/wanted)]), f'{name} {value!r} became {found!r}'
    if name == 'out':
        with mock.patch('sys.argv', ['x']): values = command_line(Config, 'x', '', args=['x']*(Config is EvaluateConfig) + ['--config', '~/run.yaml'])[0]
        assert values['out'] == str(tmp_path/'a')


@pytest.mark.parametrize('Config,name', [e for e in every_path if e[1] in ('data', 'init', 'vocab', 'runs', 'run')], ids=lambda x: getattr(x, '__name__', x))
def test_names_stay_names(Config, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in ('facebook/flip', 'bert-base-uncased'):
        for found in typed(Config, name, value):
            if not isinstance(found, str): found = found[0]
            assert found in (value, str(tmp_path/value)), found    # a Path is a path
        assert given(Config, None, {name: value})[0][name] in (value, [value])
    if name != 'data': return
    for folder in ('scenes', 'cars', 'cifar10', 'mine'): (tmp_path/folder).mkdir()
    for value in ['scenes', 's3://bucket/a.tar', 'hf://datasets/a/b', *['cifar10']*(Config is not TrainConfig)]:
        assert given(Config, None, {name: value})[0][name] in (value, [value])
    found = given(Config, None, {name: './cifar10'})[0][name]
    assert found in (str(tmp_path/'cifar10'), [str(tmp_path/'cifar10')]), 'a folder beside a name that is known'
    if Config is EvaluateConfig:
        assert given(Config, None, dict(data='scenes,cifar10=mine,mine'))[0]['data'] == ['scenes', f"cifar10={tmp_path/'mine'}", str(tmp_path/'mine')]
    if Config is TrainConfig:
        assert given(Config, None, dict(data='cars,s/{00..09}.tar,cifar10/*.tar'))[0]['data'] == f"{tmp_path/'cars'},{tmp_path/'s/{00..09}.tar'},{tmp_path/'cifar10/*.tar'}"


def test_an_empty_path_is_refused():
    for Config,name in every_path:
        with pytest.raises(ValueError, match=f'--{name} is empty'): given(Config, None, {name: ''})


@pytest.mark.parametrize('Config', [TrainConfig, FinetuneConfig])
def test_every_switch_can_be_switched_off(Config, capsys):
    switches = [name for name,(_,kind) in options_of(Config).items() if kind is bool]
    with pytest.raises(SystemExit): command_line(Config, 'x', '', args=['--help'])
    help_text = capsys.readouterr().out
    for name in switches:
        assert f'--{name}, --no_{name}' in help_text, f'--help does not show how to switch off --{name}'
        for words,wanted in (([f'--no_{name}'], False), ([f'--{name}', f'--no_{name}'], False), ([f'--{name}'], True)):
            values,chosen = command_line(Config, 'x', '', args=words)
            assert values[name] is wanted and name in chosen


def test_a_switch_is_switched_off_on_resume(tmp_path):
    (tmp_path/'train_config.json').write_text('{"compile": true, "fast": true, "grad_checkpointing": true, "data": "scenes"}')
    words = ['--no_compile', '--no_fast', '--no_grad_checkpointing', f'--resume={tmp_path}']
    machine = resume_config(*command_line(TrainConfig, 'x', '', args=words)).machine
    assert not (machine.compile or machine.fast or machine.grad_checkpointing)


@pytest.mark.parametrize('text', ['', '{', '[1]', b'\xff\xfe'])
def test_a_broken_file_is_named(tmp_path, text):
    reads = {'train_config.json': [lambda: resume_config(defaults(TrainConfig) | dict(resume=str(tmp_path)), set()), lambda: trained_on(tmp_path)],
             'finetune_config.json': [lambda: resume_config(defaults(FinetuneConfig) | dict(resume=str(tmp_path)), set(), FinetuneConfig, 'finetune_config.json')]}
    for name,calls in reads.items():
        (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
        for call in calls:
            with pytest.raises(ValueError, match=re.escape(str(tmp_path/name))): call()


def shown_commands():
    for path in [*nbglob(root/'nbs', as_path=True), root/'README.md', *(root/'configs').glob('*.yaml')]:
        text = path.read_text() if path.suffix != '.ipynb' else '\n'.join(c.source for c in read_nb(path).cells if c.cell_type == 'markdown')
        for line in text.splitlines():
            if re.match(r'[#\s]*(\w+=\S* )*accelerate launch .*-m flip_nb', line): yield path.name, line


def test_commands_that_are_shown_name_a_configuration():
    "A bare `accelerate launch` prints six lines of warning first."
    bare = [(name, line) for name,line in shown_commands() if '--config_file configs/' not in line]
    assert not bare, bare
    from accelerate.commands import launch
    for path in (root/'configs').glob('*.yaml'):
        args = launch.launch_command_parser().parse_args(['--config_file', str(path), '-m', 'flip_nb.train'])
        with mock.patch.object(launch.logger, 'warning') as warning: launch._validate_launch_command(args)
        assert not warning.called, f'{path.name}: {warning.call_args}'


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path):
    code = '''
import sys, torch
from flip_nb import train
if sys.argv.pop(1) == 'fault': train.begin = lambda *args: torch.optim.SGD([])
train.main()
'''
    def end(kind, *words):
        return subprocess.run([sys.executable, '-c', code, kind, *words], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | dict(PYTHONPATH=str(root), PYTHONIOENCODING='ascii'), timeout=300)
    fault,answer = end('fault'),end('answer', '--steps', '5', '--epochs', '2')
    assert 'Traceback' in fault.stderr and 'empty parameter list' in fault.stderr and fault.returncode == 1
    assert answer.stderr == 'flip_nb.train: give either --steps or --epochs, not both (got 5 and 2.0)\n' and answer.returncode == 1
