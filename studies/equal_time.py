"""Five objectives at equal time: InfoNCE, sigmoid, words, nouns, and InfoNCE with words; 0 and 50% masking, two batch sizes, three seeds.

    python studies/equal_time.py scenes --measure_speed                         # results/equal_time/scenes-speed.json, on an idle machine
    python studies/equal_time.py scenes --seed 0                                # results/equal_time/scenes-seed0.json: train and score
    python studies/equal_time.py ../shared/data/flickr8k_64 --measure_speed   # the same for a folder of pairs
    python studies/equal_time.py ../shared/data/flickr8k_64 --seed 0

The step counts come from the measured speed, so the runs can share the machine with other work; nine tenths of the time go to
training, one tenth to tuning without masks. Rates depend on the batch alone and were not tuned for any objective. Scores come
from `flip_nb.evaluate`, with two strengths for the linear probe. A run that is stored is not repeated; `--kinds infonce,nouns` does a part.
"""
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock
import torch
from fastcore.script import call_parse
from masking_pays import RESULTS, machine
from torch import distributed as dist
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from flip_nb.evaluate import evaluate
from flip_nb.evaluation.probe import linear_probe
from flip_nb.evaluation.tasks import linear_probe_task
from flip_nb.files import write_json
from flip_nb.loop import training_steps
from flip_nb.model import FLIP, preset_config
from flip_nb.objectives.family import objective_loss, objective_of, split_objective
from flip_nb.scale.config import TrainConfig, resolve, stages_of
from flip_nb.scale.loader import deliver, open_train_data
from flip_nb.scale.options import build
from flip_nb.scale.trainer import Trainer
from flip_nb.text import CaptionTokenizer
from flip_nb.train import train

KINDS = 'infonce', 'sigmoid', 'words', 'nouns', 'infonce+words'
RATIOS,RATES = (0., .5),{32: 1e-3, 256: 2e-3}
SECONDS = dict(scenes=40., flickr8k_64=120., emoji64=60.)
SIZES = dict(scenes=dict(preset='tiny', patch_size=8, text_width=64), flickr8k_64=dict(preset='mini', patch_size=16, text_width=96),
             emoji64=dict(preset='mini', patch_size=16, text_width=96))      # 16 patches of an image; most of the work in the image tower
LABELLED,FOREIGN = ('cifar10', 'tiny_imagenet'),2000      # rows of each split of the sets that no model was trained on
STRENGTHS = (10., 100.)                                   # of the linear probe

def options(data, kind, mask_ratio, batch_size, seed=0):
    "What all runs share, and what tells them apart."
    return dict(data=data, objective=kind, mask_ratio=mask_ratio, batch_size=batch_size, lr=RATES[batch_size], seed=seed,
                threads=1, quiet=True)

def new_model(data, seed=0):
    "A small model with the vocabulary of the captions."
    sizes = SIZES[Path(data).name]
    captions = open_train_data(resolve(build(TrainConfig, dict(data=data, quiet=True))), preset_config(sizes['preset']).image_size).captions()
    tokenizer = CaptionTokenizer.train(captions, 4096)
    torch.manual_seed(seed)
    flip = FLIP.from_preset(sizes['preset'], vocab_size=tokenizer.vocab_size, **{k: v for k,v in sizes.items() if k != 'preset'})
    flip.tokenizer = tokenizer
    return flip

def kept_bytes(model, batch, stage, objective):
    "Bytes that autograd keeps between the passes of one step."
    kept = {}
    def note(x): kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(); return x
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): objective_loss(model, batch, stage, objective)
    return sum(n for where,n in kept.items() if where not in weights)

def exchanged(received):
    "Patches that write down the bytes that every exchange brings to this process; an all-reduce is counted as a ring makes it."
    def all_gather(out, x, **kw): return (len(out) - 1)*x.nbytes
    def all_reduce(x, *args, **kw): return 2*(dist.get_world_size() - 1)*x.nbytes//dist.get_world_size()
    def batch_isend_irecv(jobs): return sum(j.tensor.nbytes for j in jobs if j.op is dist.irecv)
    stack = ExitStack()
    for count in (all_gather, all_reduce, batch_isend_irecv):
        plain = getattr(dist, count.__name__)
        def noted(*args, plain=plain, count=count, **kw):
            received.append(count(*args, **kw))
            return plain(*args, **kw)
        stack.enter_context(mock.patch.object(dist, count.__name__, noted))
    return stack

def two_processes(rank, folder, model, batch, stage, kind):
    "Half of the batch in each of two processes: bytes of the features, and of the gradients."
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    gradients,features = [],[]
    def hook(_, bucket):
        gradients.append(2*bucket.buffer().nbytes//2)                       # a ring of two
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, hook)
    goal = objective_of(model, split_objective(kind))
    part = {k: v.chunk(2)[rank] for k,v in batch.items() if torch.is_tensor(v)}
    with exchanged(features): objective_loss(wrapped, part, stage, goal).backward()
    # the hook's own exchange went through the patched function, too
    if rank == 0: write_json(Path(folder)/'bytes.json', dict(features=sum(features) - sum(gradients), gradients=sum(gradients)))
    dist.destroy_process_group()

class Steps:
    "Training steps of one configuration, to be timed in turn."
    def __init__(self, data, kind, mask_ratio, batch_size, tmp):
        self.about = dict(objective=kind, mask_ratio=mask_ratio, batch_size=batch_size)
        given = options(data, kind, mask_ratio, batch_size) | dict(steps=1000, tune_steps=0, out=f'{tmp}/{kind}-{mask_ratio}-{batch_size}')
        parts = Trainer(resolve(build(TrainConfig, given)), model=new_model(data)).parts
        self.run,self.stage,self.seconds = parts.run,stages_of(parts.config)[0],[]
        self.run.begin(self.stage, .2)
        batches = deliver(parts.loader, self.run.accelerator.device, {}, parts.skipped)
        self.steps = training_steps(self.run.accelerator, self.run.wrapped, self.run.optimizer, self.run.schedule, batches, self.stage, parts.backward)

    def next(self):
        start = time.perf_counter()
        self.last = next(self.steps)
        self.seconds.append(time.perf_counter() - start)

    def row(self):
        "Speed, memory and exchange of a step."
        flip,batch,kind = self.run.model,self.last.batch,self.about['objective']
        goal,s = objective_of(flip, split_objective(kind)),self.seconds[1:]
        kept = kept_bytes(flip, batch, self.stage, goal)
        flip.zero_grad()
        with tempfile.TemporaryDirectory() as tmp:
            start_processes(two_processes, (tmp, flip, batch, self.stage, kind), 2, start_method='fork')
            there = json.loads((Path(tmp)/'bytes.json').read_text())
        return self.about | dict(seconds=statistics.median(s), quartiles=statistics.quantiles(s, n=4)[::2], steps=len(s),
                                 pairs_per_second=self.about['batch_size']/statistics.median(s), kept_bytes=kept, exchanged_bytes=there,
                                 parameters=sum(p.numel() for p in flip.parameters()), labels={k: len(v) for k,v in flip.labels.items()})

def measure(data, rounds):
    "Seconds of a training step of every configuration, reading included; the ten of a batch size take turns."
    rows,start = [],time.perf_counter()
    for batch_size in RATES:
        with tempfile.TemporaryDirectory() as tmp:
            runs = [Steps(data, kind, ratio, batch_size, tmp) for kind in KINDS for ratio in RATIOS]
            for k in range(rounds + 1):
                for i in range(len(runs)): runs[(i + k) % len(runs)].next()
            rows += [run.row() for run in runs]
    return dict(data=Path(data).name, sizes=SIZES[Path(data).name], rounds=rounds, machine=machine(), threads=1,
                wall_seconds=time.perf_counter() - start, rows=rows)

def score(run, data, kind, folder):
    "Scores of one run by `flip_nb.evaluate`."
    pairs,name = set(split_objective(kind)) & {'infonce', 'sigmoid'},Path(data).name
    asked = {}
    if name == 'scenes': asked['scenes'] = ['zero_shot', 'knn', *['retrieval']*bool(pairs)],1000
    elif pairs: asked[data] = ['retrieval'],0
    for other in LABELLED:
        tasks = [*['zero_shot']*(name == 'flickr8k_64'), 'knn', *['linear_probe']*((name, other) != ('scenes', 'tiny_imagenet'))]
        asked[f'{other}={folder/other}'] = tasks,FOREIGN                    # a model of scenes tells 200 kinds of photographs hardly apart
    scores,few = {},partial(linear_probe, strengths=STRENGTHS)              # the whole search takes minutes for each set
    for i,(source,(tasks,limit)) in enumerate(asked.items()):
        with mock.patch.dict(linear_probe_task.__globals__, linear_probe=few):
            record = evaluate(str(run), data=source, tasks=tasks, limit=limit, pictures=8, threads=1, out=f'{run}-scores{i}', quiet=True)
        scores |= {f"{r['data']}, {r['task']} {r['metric']}": {k: r[k] for k in ('score', 'n', 'chance')} for r in record['rows']}
    return scores

def equal_time_run(data, kind, mask_ratio, batch_size, seed, seconds, speed, folder):
    "Train for as many steps as fit into `seconds` at the measured speed, and score."
    step = {(r['mask_ratio']): r['seconds'] for r in speed if (r['objective'], r['batch_size']) == (kind, batch_size)}
    given = options(data, kind, mask_ratio, batch_size, seed) | dict(steps=int(.9*seconds/step[mask_ratio]), tune_steps=int(.1*seconds/step[0.]))
    with tempfile.TemporaryDirectory() as tmp:
        start = time.perf_counter()
        results = train(model=new_model(data, seed), **given, log_every=10, eval_size=50, out=f'{tmp}/run')
        trained = time.perf_counter()
        scores = score(Path(tmp)/'run', data, kind, folder)
    return dict(objective=kind, mask_ratio=mask_ratio, batch_size=batch_size, lr=given['lr'], steps=given['steps'], tune_steps=given['tune_steps'],
                pairs=results['pairs'], scores=scores, wall_seconds=dict(train=trained - start, evaluate=time.perf_counter() - trained))

@call_parse
def main(
    data:str, # 'scenes', or the folder flickr8k_64 or emoji64
    measure_speed:bool=False, # Measure and stop
    seed:int=0, # Seed of the runs
    kinds:str=','.join(KINDS), # Objectives, with commas
    folder:str='../shared/data', # Where the folders cifar10 and tiny_imagenet are
    rounds:int=8, # Timed steps of each configuration
):
    "Measure speed, memory and exchange, or train at equal time and score."
    torch.set_num_threads(1)
    name = Path(data).name
    place = RESULTS/'equal_time'
    place.mkdir(parents=True, exist_ok=True)
    if measure_speed: return write_json(place/f'{name}-speed.json', measure(data, rounds))
    speed,path = json.loads((place/f'{name}-speed.json').read_text()),place/f'{name}-seed{seed}.json'
    about = dict(data=name, seed=seed, seconds=SECONDS[name], sizes=SIZES[name], threads=1, foreign_rows=FOREIGN, strengths=STRENGTHS, machine=machine())
    rows = json.loads(path.read_text())['rows'] if path.exists() else []
    key = lambda r: (r['objective'], r['mask_ratio'], r['batch_size'])
    for kind in kinds.split(','):
        for batch_size in RATES:
            for ratio in RATIOS:
                if (kind, ratio, batch_size) in map(key, rows): continue
                rows.append(equal_time_run(data, kind, ratio, batch_size, seed, SECONDS[name], speed['rows'], Path(folder)))
                write_json(path, about | dict(rows=rows))
                print(kind, ratio, batch_size, rows[-1]['wall_seconds'], flush=True)
