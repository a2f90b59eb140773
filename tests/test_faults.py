"""What happens to a run when something goes wrong: kills, signals, full and read-only disks, crashes, two runs at once.

Every case goes through the command line, `python -m flip_nb.train ...`. To import PyTorch anew for each of them would take
minutes; so one process imports everything once, and forks itself for each command (`warm`). The first case uses none of that.
"""
import json, os, re, shutil, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest

if sys.platform != 'linux': pytest.skip('commands are forked from a warm process', allow_module_level=True)
root = Path(__file__).resolve().parent.parent

server = r'''
import contextlib, json, os, runpy, sys, threading, tqdm
import flip_nb.scale.trainer, flip_nb.transfer.tuner
from matplotlib.figure import Figure
Figure.savefig = lambda figure, path, **options: open(path, 'w').close()    # drawing takes as long as the training
print('ready', flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if 'first' in job:    # in this process, so that what it has imported and cached is there for all
        sys.argv,code = ['flip_nb.train', *job['first']],0
        with contextlib.redirect_stdout(sys.stderr):
            try: runpy.run_module('flip_nb.train', run_name='__main__', alter_sys=True)
            except SystemExit as e: code = e.code
        print(code, flush=True); continue
    if 'wait' in job: print(os.waitstatus_to_exitcode(os.waitpid(job['wait'], 0)[1]), flush=True); continue
    if pid := os.fork(): print(pid, flush=True); continue
    os.setsid()
    tqdm.tqdm.set_lock(threading.RLock())    # the usual one is shared by all forks
    out,null = os.open(job['log'], os.O_WRONLY|os.O_CREAT|os.O_TRUNC, 0o644),os.open(os.devnull, os.O_RDONLY)
    for n,file in enumerate((null, out, out)): os.dup2(file, n)
    os.chdir(job['cwd'])
    sys.argv = [job['module'], *job['args']]
    exec(job['before'], {})
    runpy.run_module(job['module'], run_name='__main__', alter_sys=True)
    break
'''


class Command:
    "A command that runs beside the tests."
    def __init__(self, warm, module, args, cwd, before):
        self.warm,self.log = warm,cwd/f'log-{time.monotonic_ns()}.txt'
        self.pid = warm.ask(module=module, args=[str(a) for a in args], cwd=str(cwd), log=str(self.log), before=before)

    def text(self): return self.log.read_text() if self.log.exists() else ''

    def until(self, words, seconds=60):
        "Wait for words in what it prints."
        end = time.monotonic() + seconds
        while not re.search(words, self.text()):
            assert time.monotonic() < end, f'{words!r} was not printed:\n{self.text()[-3000:]}'
            time.sleep(.01)

    def wait(self, seconds=120):
        "Its exit code; it is an error if it does not end."
        killer = threading.Timer(seconds, os.killpg, (self.pid, signal.SIGKILL))
        killer.start()
        code = self.warm.ask(wait=self.pid)
        assert killer.is_alive(), f'did not end within {seconds} seconds:\n{self.text()[-3000:]}'
        killer.cancel()
        assert not alive(self.pid), 'a worker was left behind'
        return code

    def kill(self, number): os.kill(self.pid, number)


class Warm:
    "The process that has imported everything."
    def __init__(self):
        env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_WAIT_POLICY': 'passive', 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
        self.process = subprocess.Popen([sys.executable, '-c', server], cwd=root, env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == 'ready\n'

    def ask(self, **job):
        "Give it a job; the number it answers."
        self.process.stdin.write(json.dumps(job) + '\n'); self.process.stdin.flush()
        return int(self.process.stdout.readline())


def alive(group):
    "Whether a process of this group is still there."
    end = time.monotonic() + 5    # orphans notice it after a second, and init has to collect them
    while time.monotonic() < end:
        try: os.killpg(group, 0)
        except ProcessLookupError: return False
        time.sleep(.05)
    return True


@pytest.fixture(scope='module')
def warm():
    w = Warm()
    yield w
    w.process.kill(); w.process.wait()


@pytest.fixture
def run(warm, whole, tmp_path):
    "Start a command in an empty folder."
    started = []
    def start(*args, module='flip_nb.train', before=''):
        started.append(Command(warm, module, args, tmp_path, before))
        return started[-1]
    yield start
    for c in started:
        try: os.killpg(c.pid, signal.SIGKILL)
        except ProcessLookupError: pass


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "24 images of one colour, in parquet: 16 to train on, 8 to evaluate."
    import datasets
    from PIL import Image
    folder = tmp_path_factory.mktemp('data')
    for split,n in (('train', 16), ('test', 8)):
        rows = [dict(image=Image.new('RGB', (32, 32), (7*i, 255 - 9*i, 99*(split == 'test'))), caption=f'image number {i}') for i in range(n)]
        rows = {k: [r[k] for r in rows] for k in ('image', 'caption')}
        datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), caption=datasets.Value('string'))).to_parquet(folder/f'{split}.parquet')
    return folder


usual = ['--preset', 'tiny', '--steps', 8, '--tune_steps', 0, '--batch_size', 8, '--log_every', 2, '--save_every', 2, '--vocab_size', 60,
         '--track', 'none', '--threads', 1, '--mixed_precision', 'no']


def outcome(folder):
    "What has to be the same, to the last bit: weights, scores, losses."
    results = json.loads((folder/'results.json').read_text())
    losses = [json.loads(l)['loss'] for l in (folder/'metrics.jsonl').read_text().splitlines()]
    return (folder/'model.safetensors').read_bytes(), results['retrieval'], losses


@pytest.fixture(scope='module')
def whole(warm, data, tmp_path_factory):
    "A run that nobody disturbed."
    folder = tmp_path_factory.mktemp('whole')
    assert warm.ask(first=[str(a) for a in ('--data', data, '--out', folder/'run', *usual)]) == 0
    return folder/'run'



def resumes(run, whole, folder='run', **options):
    "Resume, and come to the end of the run that nobody disturbed."
    c = run('--resume', folder, **options)
    assert c.wait() == 0, c.text()
    assert outcome(c.log.parent/folder) == outcome(whole), 'the resumed run came to another end'


# slower steps, so that a signal comes between two of them
slow = """
import time, flip_nb.scale.loader as loader
send = loader.send_to_device
loader.send_to_device = lambda *args, **kw: (time.sleep(.1), send(*args, **kw))[1]
"""

# a disk that has room for logs, not for weights
full = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
"""

# storage that stops to answer after twenty images: a pipe into which nobody writes
stalled = """
import functools, itertools, os, flip_nb.data.pairs as pairs, flip_nb.scale.trainer as trainer
os.mkfifo('pipe')
load,count = pairs.load_image,itertools.count()
pairs.load_image = lambda *args: (open('pipe') if next(count) >= {} else None, load(*args))[1]
trainer.StopRequest = functools.partial(trainer.StopRequest, grace=1.)
"""


def test_a_killed_run_resumes(run, whole, data, tmp_path):
    "The command itself, from the first line on."
    command = [sys.executable, '-m', 'flip_nb.train', '--data', data, '--out', 'run', *map(str, usual)]
    env = {**os.environ, 'PYTHONPATH': str(root), 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    first = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path/'run'/'checkpoints'/'step-00000002').exists(): assert first.poll() is None; time.sleep(.005)
    first.kill()
    assert first.wait() == -signal.SIGKILL and not (tmp_path/'run'/'results.json').exists()
    resumes(run, whole)


def test_a_full_disk_is_waited_for(run, whole, data, tmp_path):
    room = """
import builtins, flip_nb.scale.run as saving
def print(*args, **kw):
    builtins.print(*args, **kw)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,)*2)
saving.print = print
"""
    c = run('--data', data, '--out', 'run', *usual, before=full + room)
    assert c.wait() == 0 and 'the checkpoint of step 2 could not be written' in c.text(), c.text()
    assert outcome(tmp_path/'run') == outcome(whole)


def test_a_full_disk_ends_the_run_where_it_shall(run, whole, data):
    c = run('--data', data, '--out', 'run', *usual, '--on_save_error', 'stop', before=full)
    assert c.wait() == 1 and 'Make room, then resume with --resume run' in c.text(), c.text()
    assert 'Traceback' not in c.text()
    resumes(run, whole)


def test_a_folder_that_becomes_read_only(run, whole, data):
    read_only = """
import errno, os, sys
writes = os.O_WRONLY|os.O_RDWR|os.O_CREAT
def refuse(event, args):
    if not (event == 'open' and (args[2] or 0) & writes or event in ('os.mkdir', 'os.rename', 'os.remove')): return
    if isinstance(args[0], (str, os.PathLike)) and 'run' in str(args[0]).split('/') and os.path.exists('run/model.safetensors'):
        raise OSError(errno.EROFS, 'Read-only file system', str(args[0]))
sys.addaudithook(refuse)
"""
    c = run('--data', data, '--out', 'run', *usual, before=read_only)
    assert c.wait() == 1, c.text()
    for words in ('step 4 could not be written (Read-only file system). Make room: training continues',
                  'metrics.jsonl cannot be written (Read-only file system): the run continues',
                  '3 lines are missing in', 'step 8 could not be written (Read-only file system). Make room, then resume with'):
        assert words in c.text(), c.text()
    assert 'Traceback' not in c.text(), c.text()
    resumes(run, whole)


def test_two_runs_and_two_signals(run, whole, data, tmp_path):
    first = run('--data', data, '--out', 'run', *usual, before=slow)
    while not (tmp_path/'run'/'metrics.jsonl').exists(): time.sleep(.01)
    first.kill(signal.SIGSTOP)
    for how in (['--data', data, '--out', 'run', *usual], ['--resume', 'run']):
        second = run(*how)
        assert second.wait() == 1 and f"'run' is in use by process {first.pid} on " in second.text(), second.text()
    first.kill(signal.SIGCONT)
    first.kill(signal.SIGTERM); time.sleep(.1); first.kill(signal.SIGTERM)
    assert first.wait() == 75 and 'SIGTERM; saved, resume with --resume run' in first.text(), first.text()
    resumes(run, whole)


def test_a_crash_with_workers_ends_at_once(run, data):
    crash = """
import flip_nb.scale.trainer as trainer
def backward(*args, **kw): raise RuntimeError('a cable was pulled')
trainer.objective_backward = backward
"""
    c = run('--data', data, '--out', 'run', *usual, '--workers', 2, before=crash)
    c.until('a cable was pulled'); began = time.monotonic()
    assert c.wait() == 1 and time.monotonic() - began < 30
    assert 'Traceback' in c.text() and '\nRuntimeError: a cable was pulled\n' in c.text(), c.text()


def until_stalled(folder):
    "Wait until four steps are done and saved, and the next batch does not come."
    while not (folder/'run'/'checkpoints'/'step-00000004').exists(): time.sleep(.01)
    time.sleep(1)


@pytest.mark.parametrize('workers', [0, 2])
def test_storage_that_does_not_answer(run, whole, data, workers, tmp_path):
    c = run('--data', data, '--out', 'run', *usual, '--workers', workers, before=stalled.format(20 if workers else 40))
    until_stalled(tmp_path)
    c.kill(signal.SIGTERM); began = time.monotonic()
    assert c.wait() == 75 and time.monotonic() - began < 30, c.text()
    (tmp_path/'pipe').unlink()
    resumes(run, whole)


def test_two_ctrl_c_while_storage_does_not_answer(run, data, tmp_path):
    c = run('--data', data, '--out', 'run', *usual, '--workers', 2, before=stalled.format(20).replace('grace=1.', 'grace=60.'))
    until_stalled(tmp_path)
    os.killpg(c.pid, signal.SIGINT); time.sleep(1.2); os.killpg(c.pid, signal.SIGINT); began = time.monotonic()
    assert c.wait() in (130, -signal.SIGINT) and time.monotonic() - began < 30, c.text()


def test_a_killed_run_leaves_no_worker_that_waits(run, data, tmp_path):
    c = run('--data', data, '--out', 'run', *usual, '--workers', 2, before=stalled.format(20))
    until_stalled(tmp_path)
    c.kill(signal.SIGKILL)
    assert c.wait() == -signal.SIGKILL    # and looks for workers


def test_data_that_shrank_are_refused(run, whole, data, tmp_path):
    import datasets
    shutil.copytree(whole, tmp_path/'run'); (tmp_path/'run'/'results.json').unlink()
    shutil.copytree(data, tmp_path/'data')
    file = tmp_path/'data'/'train.parquet'
    datasets.Dataset.from_parquet(str(file)).select(range(12)).to_parquet(file)
    c = run('--resume', 'run', '--data', 'data')
    assert c.wait() == 1 and 'trained on 16 rows, but the data have 12 now' in c.text(), c.text()


def test_finetuning_is_interrupted(run, whole, tmp_path):
    from PIL import Image
    for split,n in (('train', 8), ('test', 2)):
        for name in ('red', 'blue'):
            (tmp_path/'data'/split/name).mkdir(parents=True)
            for i in range(n): Image.new('RGB', (32, 32), name).save(tmp_path/'data'/split/name/f'{i}.png')
    c = run(whole, '--data', 'data', '--out', 'run', '--steps', 8, '--batch_size', 8, '--log_every', 2, '--threads', 1,
            '--workers', 1, module='flip_nb.finetune', before=slow)
    while not (tmp_path/'run'/'metrics.jsonl').exists(): time.sleep(.01)
    os.killpg(c.pid, signal.SIGINT)
    assert c.wait() == 75 and 'saved, resume with --resume run' in c.text(), c.text()
    again = run('--resume', 'run', module='flip_nb.finetune')
    assert again.wait() == 0, again.text()
    assert [json.loads(l)['step'] for l in (tmp_path/'run'/'metrics.jsonl').read_text().splitlines()] == [2, 4, 6, 8]


def test_an_evaluation_is_stopped(run, whole, data, tmp_path):
    "SIGTERM after one task; Ctrl-C while a worker waits on storage, before any."
    second = """
import time, flip_nb.evaluation.report as report
first = report.TASKS['retrieval']
report.TASKS['retrieval'] = lambda job: (print('begins', flush=True), time.sleep(1e6)) if job.data.name == 'again' else first(job)
"""
    shutil.copytree(data, tmp_path/'again')
    words = whole, '--threads', 1, '--quiet', '--data'
    c = run(*words, f"{data},{tmp_path/'again'}", '--out', 'one', module='flip_nb.evaluate', before=second)
    c.until('begins'); c.kill(signal.SIGTERM)
    assert c.wait() == 143 and c.text().endswith('begins\nflip_nb.evaluate: stopped by SIGTERM; 1 task done, the results are in one\n'), c.text()
    assert json.loads((tmp_path/'one'/'results.json').read_text())['finished'] is False
    c = run(*words, data, '--out', 'two', '--workers', 2, module='flip_nb.evaluate', before=stalled.format(2))
    while not (tmp_path/'two').exists(): time.sleep(.01)
    time.sleep(1); os.killpg(c.pid, signal.SIGINT)
    assert c.wait(30) == 130 and 'flip_nb.evaluate: stopped by Ctrl-C; no task was done yet\n' in c.text(), c.text()
    assert 'Traceback' not in c.text(), c.text()
    assert not (tmp_path/'two').exists()


def test_shards_are_taken_away_by_sigterm(run, data, tmp_path):
    slow = """
import time, flip_nb.data.shards as shards
write = shards.write_shard
shards.write_shard = lambda *args: (write(*args), time.sleep(.2))
"""
    c = run(data, 'out', '--pairs_per_shard', 1, module='flip_nb.data.shards', before=slow)
    while not (tmp_path/'out'/'train-000001.tar').exists(): time.sleep(.01)
    c.kill(signal.SIGTERM)
    assert c.wait() == 143 and 'stopped by SIGTERM; the series it was writing was taken away' in c.text(), c.text()
    assert '16 rows to train on (train), 8 rows to evaluate on (test)' in c.text(), 'what was found is not printed'
    assert not list((tmp_path/'out').iterdir())


def test_more_workers_than_shards(run, data):
    c = run('--data', data, '--out', 'run', *usual, '--stream', '--workers', 8, '--buffer_size', 4, '--steps', 2)
    assert c.wait() == 0, c.text()


def test_interrupted_cells_leave_no_workers(run):
    "Three cells of a notebook over a loader that waits, each interrupted."
    cells = """
import multiprocessing, os, signal, sys, threading, time
from IPython.core.interactiveshell import InteractiveShell
from accelerate import Accelerator
from flip_nb.scale.loader import make_loader
class Slow:
    def __len__(self): return 8
    def __getitem__(self, i): time.sleep(1e6)
shell = InteractiveShell()
shell.user_ns['loader'] = make_loader(Accelerator(cpu=True), Slow(), list, 4, 0, {}, range(2), workers=2)
signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(3):
    threading.Timer(.5, os.killpg, (os.getpid(), signal.SIGINT)).start()
    result = shell.run_cell('for batch in loader: pass')
    assert isinstance(result.error_in_exec, KeyboardInterrupt), result
    assert not multiprocessing.active_children()
print('three times'); sys.exit(0)
"""
    c = run(before=cells)
    assert c.wait() == 0 and 'three times' in c.text(), c.text()


def test_few_open_files(run):
    "Four workers read 2,048 images ahead, and the process may have 128 files open."
    many = """
import resource, sys, torch
from flip_nb.data.pairs import Pairs
from flip_nb.evaluation.features import extract_features
from flip_nb.evaluation.scores import encode_pairs
from flip_nb.model import FLIP
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
torch.set_num_threads(1)
image = torch.zeros(3, 8, 8, dtype=torch.uint8)
rows = [dict(image=image, caption=f'number {i}') for i in range(2048)]
import flip_nb.data.pairs as pairs
pairs.load_image = lambda value, transform: value
data,flip = Pairs(rows, 'image', 'caption', None),FLIP.from_preset('tiny', image_size=8, vocab_size=300).eval()
assert len(encode_pairs(flip, data, workers=4, batch_size=256)[0]) == 2048
assert len(extract_features(flip, data, workers=4, batch_size=256, quiet=True).features) == 2048
print('all of them'); sys.exit(0)
"""
    c = run(before=many)
    assert c.wait() == 0 and 'all of them' in c.text(), c.text()
