"""Does masking in training buy robustness, and what does masking at inference cost? Models on scenes, at equal time.

    python studies/robustness.py --seed 0                    # results/robustness/mask0-seed0.json, mask50-..., mask75-...
    python studies/robustness.py --seed 0 --mask_ratio 0.5   # one of them

How many steps each mask ratio gets in the same time comes from results/scenes/speed.json (studies/masking_pays.py), so the
runs can share the machine with other work. The weights go to `--models` (a folder outside the repository is best): a run
that is found there is not trained again, only evaluated.
"""
import json
import time
from pathlib import Path
import torch
from fastcore.script import call_parse
from masking_pays import RATIOS, RESULTS, machine
from flip_nb.zero_shot import SCENE_NAMES, SCENE_TEMPLATES, zero_shot_classifier
from flip_nb.model import FLIP
from flip_nb.evaluation.views import masked_view_curve
from flip_nb.evaluation.robustness import ZeroShotTask, robustness_curve
from flip_nb.scenes import Scenes
from flip_nb.files import write_json
from flip_nb.train import train

COUNTS = (1, 2, 4, 8)

def train_both(folder, mask_ratio, seed, seconds):
    "Nine tenths of the time masked, one tenth of unmasked tuning; the model is kept after each. Returns the options."
    speed = json.loads((RESULTS/'scenes/speed.json').read_text())
    rate = {r['mask_ratio']: r['pairs_per_second']/speed['batch_size'] for r in speed['rows']}       # steps per second
    common = dict(data='scenes', preset=speed['preset'], batch_size=speed['batch_size'], threads=1, tune_steps=0, eval_size=500, log_every=50, quiet=True)
    steps,tune_steps = int(.9*seconds*rate[mask_ratio]),int(.1*seconds*rate[0.])
    first = dict(mask_ratio=mask_ratio, lr=2e-3, steps=steps, seed=seed)
    tuning = dict(mask_ratio=0., lr=2e-4, steps=tune_steps, warmup_steps=tune_steps//20 + 1, seed=seed + 100)  # other scenes
    if not (folder/'masked/results.json').exists(): train(**common, **first, out=str(folder/'masked'))
    if not (folder/'tuned/results.json').exists(): train(**common, **tuning, init=str(folder/'masked'), out=str(folder/'tuned'))
    return dict(common=common, masked=first, tuning=tuning)

def evaluate_both(folder, seed, pictures):
    "Damage for the tuned model; masked inference before and after tuning; zero-shot accuracy over the eighty names."
    images,_,labels = Scenes('val', seed=seed, num_objects=1).batch(range(pictures))
    out = dict(pictures=pictures, counts=COUNTS, views={})
    for state in ('masked', 'tuned'):
        model = FLIP.from_pretrained(folder/state).requires_grad_(False)
        classifier = zero_shot_classifier(model, model.tokenizer, SCENE_NAMES, SCENE_TEMPLATES)
        task = ZeroShotTask(classifier, images, labels)
        if state == 'tuned': out['curve'] = robustness_curve(model, task, seed=seed)
        whole = robustness_curve(model, task, [])['clean']
        curves = {f'{way}{r*100:.0f}': masked_view_curve(model, task, r, COUNTS, way == 'disjoint', seed)
                  for way in ('random', 'disjoint') for r in (.5, .75)}
        out['views'][state] = dict(whole=whole) | curves
    return out

@call_parse
def main(
    seed:int=0, # Seed of the run
    mask_ratio:float=None, # One ratio; default: 0, 0.5 and 0.75
    seconds:float=150., # Training time of each run at the measured speed
    pictures:int=1000, # Scenes of the evaluation
    models:str='runs/robustness', # Folder for the weights
):
    "Train at equal time, evaluate, and store the scores."
    torch.set_num_threads(1)
    (RESULTS/'robustness').mkdir(parents=True, exist_ok=True)
    for ratio in RATIOS if mask_ratio is None else (mask_ratio,):
        name = f'mask{ratio*100:.0f}-seed{seed}'
        options = train_both(Path(models)/name, ratio, seed, seconds)
        trained = {s: json.loads((Path(models)/name/s/'results.json').read_text()) for s in ('masked', 'tuned')}
        start = time.perf_counter()
        scores = evaluate_both(Path(models)/name, seed, pictures)
        wall = dict(train={s: r['wall_seconds'] for s,r in trained.items()}, evaluate=time.perf_counter() - start)
        write_json(RESULTS/'robustness'/f'{name}.json', dict(mask_ratio=ratio, seed=seed, seconds=seconds, config=options, machine=machine(),
                   mixed_precision=trained['masked']['mixed_precision'], wall_seconds=wall, pairs={s: r['pairs'] for s,r in trained.items()}, **scores))
