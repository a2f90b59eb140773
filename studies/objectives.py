"""How fast is a step of each objective, with the same image tower and batch?

    python studies/objectives.py results/objectives/speed.json

Steps of each objective take turns on one thread, so that a busy machine slows all of them alike; the median counts. The text
tower of `small` costs a quarter of the unmasked work, as in no model of the paper: the share of FLOPs stands beside the times.
"""
import json, platform, statistics, sys, time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from flip_nb.loop import Stage, loss_backward, make_optimizer, training_steps
from flip_nb.masking import encoder_flops, num_kept
from flip_nb.model import FLIP
from flip_nb.objectives.family import Objective, model_parts, objective_loss, split_objective

KINDS = 'infonce', 'sigmoid', 'words', 'nouns', 'infonce+words'
PRESET,VOCAB,NOUNS,BATCH,LENGTH = 'small', 4096, 1500, 64, 16


def work(config, kind, mask_ratio):
    "Forward multiplications and additions of a pair, in GFLOPs: towers and head."
    n = num_kept((config.image_size//config.patch_size)**2, mask_ratio)
    total = encoder_flops(1 + n, config.image_width, config.image_depth, config.mlp_ratio)['total']
    if config.text_tower:
        total += encoder_flops(LENGTH, config.text_width, config.text_depth, config.mlp_ratio)['total']
        total += 2*config.embed_dim*BATCH    # its row of similarities
    total += sum(2*config.image_width*n for n in (config.heads or {}).values())
    return total/1e9


def steps_of(kind, mask_ratio, batch, weights):
    torch.manual_seed(0)
    names = split_objective(kind)
    flip = FLIP.from_preset(PRESET, vocab_size=VOCAB, **model_parts(names, VOCAB, NOUNS))
    accelerator,stage = Accelerator(cpu=True),Stage('masked', 10**6, mask_ratio, 1e-4, 5)
    optimizer,schedule = make_optimizer(accelerator, flip, stage)
    loss = partial(objective_loss, objective=Objective(names, weights))
    batches = iter(lambda: batch, None)
    return flip.config, training_steps(accelerator, flip, optimizer, schedule, batches, stage, partial(loss_backward, loss=loss))


def main(out, rounds=12):
    torch.set_num_threads(1)
    gen = torch.Generator().manual_seed(0)
    batch = dict(images=torch.randint(0, 255, (BATCH, 3, 64, 64), dtype=torch.uint8, generator=gen),
                 ids=torch.randint(5, VOCAB, (BATCH, LENGTH), generator=gen),
                 nouns=torch.randint(0, NOUNS, (BATCH, 4), generator=gen))
    weights,rows = torch.rand(VOCAB, generator=gen),[]
    for mask_ratio in (0., .5):
        runs = {kind: steps_of(kind, mask_ratio, batch, weights) for kind in KINDS}
        seconds = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind,(_,steps) in runs.items():
                since = time.process_time(); next(steps); seconds[kind].append(time.process_time() - since)
        for kind,(config,_) in runs.items():
            s = statistics.median(seconds[kind][2:])
            rows.append(dict(objective=kind, mask_ratio=mask_ratio, seconds=s, pairs_per_second=BATCH/s,
                             spread=[min(seconds[kind][2:]), max(seconds[kind][2:])], gflops=work(config, kind, mask_ratio)))
            print(rows[-1], flush=True)
    about = dict(preset=PRESET, batch=BATCH, vocab_size=VOCAB, nouns=NOUNS, caption_length=LENGTH, rounds=rounds, threads=1,
                 clock='processor seconds', torch=torch.__version__, python=platform.python_version(), machine=platform.machine())
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(dict(about=about, rows=rows), indent=1) + '\n')


if __name__ == '__main__': main(sys.argv[1])
