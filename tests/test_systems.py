"""Linux, macOS and Windows: workers that are spawned, and everything that Windows lacks taken away.

On Windows the second part takes away what is missing anyway, so the same test runs there too.
"""
import os, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def python(code, folder):
    "Run code in a new process; what it prints."
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PYTHONUTF8': '1'}
    res = subprocess.run([sys.executable, '-c', code], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert res.returncode == 0, res.stderr[-5000:]
    return res.stdout


def test_workers_that_are_spawned(tmp_path):
    "A worker begins with nothing but what it is sent."
    code = '''
import multiprocessing, torch
from accelerate import Accelerator
from flip_nb.data.pairs import Collate
from flip_nb.scale.loader import make_loader
from flip_nb.scenes import Scenes
from flip_nb.text import CaptionTokenizer
if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    scenes = Scenes('train', 32)
    collate = Collate(CaptionTokenizer.train(scenes.batch(range(50))[1], 200))
    batches = lambda workers: list(make_loader(Accelerator(cpu=True), scenes, collate, 4, 0, dict(image_noise=9), range(3), workers))
    here,there = batches(0),batches(1)
    assert [b['rows'] for b in here] == [b['rows'] for b in there]
    assert all(torch.equal(a[k], b[k]) for a,b in zip(here, there, strict=True) for k in ('images', 'ids', 'image_noise'))
    assert not multiprocessing.active_children()
    print('the same')
'''
    assert python(code, tmp_path) == 'the same\n'


without = '''
import errno, os, signal, sys
import accelerate, datasets, matplotlib.figure, psutil, timm, torch, torchvision    # these know what each system has
sys.modules['fcntl'] = sys.modules['resource'] = None
for module,names in ((os, 'fork getloadavg sched_getaffinity killpg setsid'), (signal, 'SIGCHLD SIGALRM SIGHUP SIGKILL SIGUSR1 pthread_kill setitimer')):
    for name in names.split():
        if hasattr(module, name): delattr(module, name)
open_file,sync,reading = os.open,os.fsync,set()
def watched(path, flags, *args, **kw):
    if os.path.isdir(path): raise PermissionError(errno.EACCES, 'Permission denied', str(path))    # a folder is no file there
    handle = open_file(path, flags, *args, **kw)
    (reading.add if flags & 3 == os.O_RDONLY else reading.discard)(handle)
    return handle
def strict(handle):
    if handle in reading: raise OSError(errno.EBADF, 'Bad file descriptor')
    sync(handle)
os.open,os.fsync = watched,strict
'''


def test_a_run_needs_nothing_that_windows_lacks(tmp_path):
    code = without + f'''
import importlib, pathlib
for path in sorted(pathlib.Path({str(root/'flip_nb')!r}).rglob('*.py')):
    name = '.'.join(path.relative_to({str(root)!r}).with_suffix('').parts)
    if not path.stem.startswith('_'): importlib.import_module(name)
import flip_nb.scale.checkpoint as c, signal, time
from flip_nb.scale.loader import data_waiting
from flip_nb.scale.clock import machine
from flip_nb.train import train
from flip_nb.finetune import finetune
data = [(torch.full((3, 32, 32), 9*i, dtype=torch.uint8), f'image number {{i}}') for i in range(16)]
class Data(torch.utils.data.Dataset):
    def __len__(self): return 16
    def __getitem__(self, i): return data[i]
options = dict(preset='tiny', batch_size=8, steps=4, tune_steps=0, save_every=2, log_every=2, vocab_size=60, track='none', threads=1, quiet=True)
results = train(dataset=Data(), out='run', **options)
assert results['skipped_steps'] == 0 and pathlib.Path('run/checkpoints/step-00000004').is_dir()
assert train(dataset=Data(), resume='run', quiet=True) == results
assert machine(torch.device('cpu'))['cores'] >= 1
try:
    stop = c.StopRequest(grace=.2)
    with stop:
        signal.raise_signal(signal.SIGTERM)
        with data_waiting(stop)():
            for _ in range(600): time.sleep(.05)    # as a loader does, which looks up now and then
except c.Stalled as e: print('out of', e)
'''
    assert python(code, tmp_path).strip() == 'out of SIGTERM'
