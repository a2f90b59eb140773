"""What is pre-training worth? The linear probe, fine-tuning and training from scratch on a few labelled scenes.

    python studies/finetune.py --sizes 64                                                     # about six minutes of one core
    python studies/finetune.py --sizes 512 --tasks background --methods zeros scratch --out FILE  # about three

writes results/finetune/scenes.json, or FILE; the stored file holds the rows of both.

Each of three seeds has a FLIP, labelled images and fine-tuning of its own. One question is about what captions
mention (the colour), one about what they never do (whether the background is dark or light). Settings are the same
for all, the learning rate was chosen once by looking at seed 0's FLIP with other images; nothing else was tuned.
"""
import argparse, io, json, platform, tempfile, time
from pathlib import Path
import accelerate, datasets, timm, torch
from torchvision.transforms.functional import to_pil_image
from flip_nb.finetune import finetune
from flip_nb.model import FLIP
from flip_nb.evaluation.features import class_numbers, extract_features
from flip_nb.evaluation.probe import linear_probe
from flip_nb.evaluation.datasets import open_test_set
from flip_nb.scenes import COLOURS, Scenes
from flip_nb.files import write_json
from flip_nb.train import train

TEST = 1000
SETTINGS = dict(steps=100, batch_size=32, lr=3e-3, drop_path=.1, label_smoothing=.1, weight_decay=.05, threads=1, mixed_precision='no', quiet=True)
METHODS = dict(zeros=dict(head='zeros', layer_decay=.75), zero_shot=dict(head='zero_shot', layer_decay=.75), scratch=dict(head='zeros', scratch=True, layer_decay=1.))


def png(image):
    "Encode an image."
    to_pil_image(image).save(file := io.BytesIO(), 'png')
    return file.getvalue()


def write_sets(folder, seed, sizes):
    "The same labelled images with two kinds of labels, as parquet files."
    n = max(sizes) + TEST
    scenes = Scenes('val', size=n, seed=100 + seed, num_objects=1)
    images,drawn = [png(x) for x in scenes.batch(range(n))[0]],scenes.draw(range(n))
    light = (drawn['ground'].mean((1, 2)) > .5).long().tolist()
    for task,labels,names in (('colour', drawn['colour'][:, 0].tolist(), [f'{c} shape' for c in COLOURS]), ('background', light, ['dark background', 'light background'])):
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
        table = datasets.Dataset.from_dict(dict(image=images, label=labels), features=features)
        for size in sizes:
            table.select(range(size)).to_parquet(folder/f'{task}-{size}/train.parquet')
            table.select(range(max(sizes), n)).to_parquet(folder/f'{task}-{size}/test.parquet')


def probe(flip, data):
    "A linear probe; the last quarter of the training rows chooses its strength."
    data = open_test_set(str(data), flip.config.image_size)
    found = {s: extract_features(flip, data.splits[s], quiet=True) for s in ('train', 'test')}
    x,y,tx,ty = [t for s,f in found.items() for t in (f.features, class_numbers(data.splits[s], f.rows))]
    k = len(x)*3//4
    found = linear_probe(x[:k], y[:k], x[k:], y[k:], tx, ty, strengths=[.1, 1., 10., 100.])
    return dict(top_1=found['accuracy'], chance=found['chance'])


parser = argparse.ArgumentParser()
parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
parser.add_argument('--sizes', type=int, nargs='+', default=[64])
parser.add_argument('--tasks', nargs='+', default=['colour', 'background'])
parser.add_argument('--methods', nargs='+', default=list(METHODS))
parser.add_argument('--pretraining_steps', type=int, default=150)
parser.add_argument('--out', default=str(Path(__file__).resolve().parent.parent/'results'/'finetune'/'scenes.json'))
args = parser.parse_args()
torch.set_num_threads(1)
datasets.disable_progress_bars()
start,cpu,rows = time.perf_counter(),time.process_time(),[]
with tempfile.TemporaryDirectory() as tmp:
    tmp = Path(tmp)
    datasets.config.HF_DATASETS_CACHE = tmp/'cache'
    for seed in args.seeds:
        train(steps=args.pretraining_steps, tune_steps=0, eval_size=200, seed=seed, threads=1, mixed_precision='no', quiet=True, out=str(tmp/f'flip-{seed}'))
        flip = FLIP.from_pretrained(tmp/f'flip-{seed}')
        write_sets(tmp/f'sets-{seed}', seed, args.sizes)
        for task in args.tasks:
            for size in args.sizes:
                data = tmp/f'sets-{seed}'/f'{task}-{size}'
                found = probe(flip, data)
                rows.append(dict(seed=seed, task=task, labelled=size, method='probe') | found)
                for method in args.methods:
                    r = finetune(str(tmp/f'flip-{seed}'), str(data), seed=seed, out=str(tmp/f'{task}-{size}-{seed}-{method}'), **SETTINGS, **METHODS[method])
                    rows.append(dict(seed=seed, task=task, labelled=size, method=method, before=r['before']['top_1'], top_1=r['after']['top_1'], chance=r['after']['chance']['top_1']))
                for row in rows[-1 - len(args.methods):]: print(row, flush=True)
        write_json(Path(args.out), dict(rows=rows, test_rows=TEST, settings=SETTINGS, methods=METHODS, pretraining=dict(steps=args.pretraining_steps, batch_size=128, mask_ratio=.5, preset='tiny'),
                   seeds=args.seeds, wall_seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu, threads=1,
                   versions=dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__, accelerate=accelerate.__version__, datasets=datasets.__version__)))
