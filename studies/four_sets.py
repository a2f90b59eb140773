"""Four real sets: Flickr8k and emoji with captions, CIFAR-10 and Tiny-ImageNet with class names, each trained for minutes.

    python studies/four_sets.py ../shared/data/cifar10 --measure     # results/four_sets/speed-cifar10.json, on an idle machine
    python studies/four_sets.py ../shared/data/cifar10 --seed 0      # a masked and an unmasked model at equal time, kept under --models
    python studies/four_sets.py ../shared/data/cifar10 --seed 0 --score_only    # results/four_sets/cifar10-mask50-seed0.json, ...

The step counts come from the measured speed, so the runs can share the machine with other work. A run whose folder has
results is not trained again. Scores come from `flip_nb.evaluate`; the models of Flickr8k, which know photographs and
sentences, are also asked about CIFAR-10 and Tiny-ImageNet, which they have never seen.
"""
import json
import tempfile
from pathlib import Path
import torch
from fastcore.script import call_parse
from masking_pays import RESULTS, machine, measure_speed
from flip_nb.evaluate import evaluate
from flip_nb.files import write_json
from flip_nb.scale.config import TrainConfig, resolve
from flip_nb.scale.options import build
from flip_nb.train import train

RATIOS = (0.5, 0.)
PRESETS = dict(cifar10='tiny', flickr8k_64='mini', emoji64='mini', tiny_imagenet='mini')

LIMIT = 10_000 # rows of every split: all test rows, and as many training rows for the probes
FOREIGN = 2000 # rows of a set that a model was not trained on

LABELLED = ('cifar10', 'tiny_imagenet')

def questions(data):
    "Data sets, with tasks and number of rows for each, for the models trained on `data`."
    folder,known = Path(data),lambda name: f'{name}={Path(data).parent/name}'
    probes = ['knn', 'linear_probe'] if folder.name == 'cifar10' else []   # the pictures of Tiny-ImageNet would keep a core busy for minutes
    if folder.name in LABELLED: return {known(folder.name): (['zero_shot', *probes], LIMIT)}
    return {data: (['retrieval'], LIMIT)} | ({known(name): (['zero_shot'], FOREIGN) for name in LABELLED} if folder.name == 'flickr8k_64' else {})

def score(run, data):
    "Rows of `flip_nb.evaluate` for one run, and the seconds that they took."
    with tempfile.TemporaryDirectory() as tmp:
        common = dict(pictures=8, threads=1, features=f'{tmp}/features', quiet=True)
        records = [evaluate(str(run), data=name, tasks=tasks, limit=limit, out=f'{tmp}/{i}', **common) for i,(name,(tasks,limit)) in enumerate(questions(data).items())]
    return [row | dict(model=run.name) for r in records for row in r['rows']], sum(r['wall_seconds'] for r in records)

def store(run, data, mask_ratio, seed, seconds, folder):
    "Write the scores of a run with all that is needed to repeat it."
    trained,config = (json.loads((run/f'{f}.json').read_text()) for f in ('results', 'train_config'))
    rows,wall = score(run, data)
    name = Path(data).name
    write_json(folder/f'{name}-{run.name}.json', dict(data=name, mask_ratio=mask_ratio, seed=seed, seconds=seconds, config=config | dict(data=name, out=None), machine=machine(),
               mixed_precision=trained['mixed_precision'], pairs=trained['pairs'], wall_seconds=dict(train=trained['wall_seconds'], evaluate=wall), rows=rows))

@call_parse
def main(
    data:str, # Folder of one of the four sets
    measure:bool=False, # Measure the speed and stop
    seed:int=0, # Seed of the runs
    mask_ratio:float=None, # One ratio; default: 0.5 and 0
    score_only:bool=False, # Score the models that are there instead of training
    seconds:float=120., # Training time of each run at the measured speed
    models:str='runs/four_sets', # Folder for the run folders; outside the repository is best
):
    "Measure the speed, train at equal time, or score what was trained."
    torch.set_num_threads(1)
    name,folder = Path(data).name,RESULTS/'four_sets'
    given = dict(data=data, seed=seed, threads=1, batch_size=128, preset=PRESETS[name])
    folder.mkdir(parents=True, exist_ok=True)
    if measure:
        return write_json(folder/f'speed-{name}.json', measure_speed(resolve(build(TrainConfig, given))))
    speed = json.loads((folder/f'speed-{name}.json').read_text())
    rate = {r['mask_ratio']: r['pairs_per_second']/speed['batch_size'] for r in speed['rows']}       # steps per second
    for ratio in RATIOS if mask_ratio is None else (mask_ratio,):
        out = Path(models)/name/f'mask{ratio*100:.0f}-seed{seed}'
        if score_only: store(out, data, ratio, seed, seconds, folder); continue
        if (out/'results.json').exists(): continue
        train(**given, mask_ratio=ratio, steps=int(.9*seconds*rate[ratio]), tune_steps=int(.1*seconds*rate[0.]), out=str(out), quiet=True)
        print(out.name, name, json.loads((out/'results.json').read_text())['wall_seconds'], flush=True)
