"""CLIP_benchmark's own command on local data, beside our metrics on the same run folder: the numbers must be equal.

    pip install clip_benchmark requests 'numpy<2.4'
    python studies/clip_benchmark.py ../shared/data/cifar10 runs/four_sets/cifar10/mask50-seed0   # results/clip_benchmark/cifar10-mask50-seed0.json

The data is a folder of parquet files with labels (zero-shot classification) or captions (zero-shot retrieval). Its test
pictures, with the bytes that the parquet file holds, become a WebDataset in CLIP_benchmark's layout under `--wds`. Both
sides use float32, the same names and templates, and the preprocessing of the run. Where scores tie they may differ: we
count a tie against the model, CLIP_benchmark lets `topk` decide; so the scores of ties won and of ties lost are stored too.
"""
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
import torch
from fastcore.script import call_parse
from masking_pays import RESULTS, machine
from PIL import Image
from flip_nb.data.folders import load_pairs
from flip_nb.zero_shot import (
    encode_captions, retrieval_recall, similarity, top_k_accuracy, zero_shot_classifier)
from flip_nb.evaluation.scores import encode_pairs
from flip_nb.model import FLIP
from flip_nb.files import write_json

TEMPLATES = ['{}', 'a {}', 'a photo of a {}']           # as in training's own evaluation of labels
KS,BATCH = (1, 5, 10),256

def add_file(tar, name, data):
    "Put bytes into a tar file; no clock and no user, so that the same data makes the same file."
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))

def write_webdataset(pairs, folder):
    "One shard in CLIP_benchmark's layout; a label is a number, captions are lines."
    (folder/'test').mkdir(parents=True, exist_ok=True)
    labels = pairs.label_names is not None
    with tarfile.open(folder/'test/0.tar', 'w') as tar:
        for i in range(len(pairs)):
            row = pairs.rows[i]
            data,text = row[pairs.image_column]['bytes'],row[pairs.caption_column]
            kind = Image.open(io.BytesIO(data)).format.lower().replace('jpeg', 'jpg')
            add_file(tar, f's{i:07}.{kind}', data)
            add_file(tar, f's{i:07}.{"cls" if labels else "txt"}', (str(text) if labels else '\n'.join(text)).encode())
    (folder/'test/nshards.txt').write_text('1\n')
    if not labels: return (folder/'dataset_type.txt').write_text('retrieval\n')
    (folder/'classnames.txt').write_text('\n'.join(pairs.label_names) + '\n')
    (folder/'zeroshot_classification_templates.txt').write_text('\n'.join(t.replace('{}', '{c}') for t in TEMPLATES) + '\n')

def run_benchmark(run, preset, folder, task):
    "Their command, with one option value of ours. Returns its metrics, its arguments and its seconds."
    with tempfile.TemporaryDirectory() as tmp:
        options = ['eval', '--model_type', 'flip_nb', '--model', preset, '--model_cache_dir', str(run.parent), '--pretrained', run.name,
                   '--dataset', f'wds/{folder.name}', '--dataset_root', str(folder), '--task', task, '--no_amp', '--num_workers', '0',
                   '--batch_size', str(BATCH), '--recall_k', *map(str, KS), '--quiet', '--output', f'{tmp}/out.json']
        start = time.perf_counter()
        done = subprocess.run([sys.executable, '-m', 'flip_nb.official.openclip', *options], capture_output=True, text=True)
        if done.returncode: raise SystemExit(f'CLIP_benchmark failed:\n{done.stderr[-3000:]}')
        seconds = time.perf_counter() - start
        metrics = json.loads(Path(f'{tmp}/out.json').read_text())['metrics']
    shown = [Path(o).name if '/' in o and Path(o).is_absolute() else o for o in options]
    return metrics, 'python -m flip_nb.official.openclip ' + ' '.join(shown), seconds

def readable_pairs(model, pairs):
    "Features of all pictures and their captions or labels; no picture may be broken, for CLIP_benchmark would stop there."
    features,texts,faults,_ = encode_pairs(model, pairs, batch_size=BATCH)
    if faults: raise SystemExit(f'a picture cannot be read: {faults[0]}')
    return features, texts

def classification(model, pairs):
    "CLIP_benchmark's three numbers from our functions."
    features,names = readable_pairs(model, pairs)
    labels = torch.tensor([pairs.label_names.index(n) for n, in names])
    scores = similarity(features, zero_shot_classifier(model, model.tokenizer, pairs.label_names, TEMPLATES))
    right = scores.argmax(1) == labels
    recalls = [right[labels == c].double().mean() for c in labels.unique()]
    return dict(acc1=top_k_accuracy(scores, labels, 1), acc5=top_k_accuracy(scores, labels, 5), mean_per_class_recall=torch.stack(recalls).mean().item()), None

def hits(scores, right):
    "Whether a right answer is among the k best of each row, if all ties are lost, and if all are won."
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    ahead = dict(lost=((scores >= best) & ~right).sum(1), won=((scores > best) & ~right).sum(1))
    return {way: {k: (n < k).double().mean().item() for k in KS} for way,n in ahead.items()}

def retrieval(model, pairs):
    "CLIP_benchmark's names for our recalls, and the recalls if all ties are won."
    features,captions = readable_pairs(model, pairs)
    owners = torch.tensor([i for i,several in enumerate(captions) for _ in several])
    texts = encode_captions(model, model.tokenizer, [c for several in captions for c in several])
    ours = retrieval_recall(features, texts, owners, KS)
    right = owners[:, None] == torch.arange(len(features))                                   # (captions, pictures)
    both = dict(image=(hits(similarity(texts, features), right), 't2i'), text=(hits(similarity(features, texts), right.T), 'i2t'))
    for found,way in both.values(): assert all(abs(found['lost'][k] - ours[way][f'R@{k}']) < 1e-9 for k in KS)
    rename = lambda get: {f'{kind}_retrieval_recall@{k}': get(kind, k) for k in KS for kind in both}
    return rename(lambda kind, k: ours[both[kind][1]][f'R@{k}']), rename(lambda kind, k: both[kind][0]['won'][k])

@call_parse
def main(
    data:str, # Folder of parquet files
    run:str, # Run folder
    wds:str='runs/clip_benchmark', # Folder for the WebDatasets; outside the repository is best
):
    "Run both, and store both."
    torch.set_num_threads(1)
    run,name = Path(run).resolve(),Path(data).name
    config = json.loads((run/'train_config.json').read_text())
    model = FLIP.from_pretrained(run).requires_grad_(False)
    splits = load_pairs(data, model.config.image_size)
    split = next(s for s in ('test', 'val') if s in splits)
    pairs,folder = splits[split],Path(wds).resolve()/name
    task = 'zeroshot_classification' if pairs.label_names else 'zeroshot_retrieval'
    if not (folder/'test/nshards.txt').exists(): write_webdataset(pairs, folder)
    theirs,command,wall = run_benchmark(run, config['preset'], folder, task)
    start = time.perf_counter()
    ours,ties_won = (classification if pairs.label_names else retrieval)(model, pairs)
    seconds = dict(clip_benchmark=wall, ours=time.perf_counter() - start)
    trained = json.loads((run/'results.json').read_text())
    keep = {k: config[k] for k in ('preset', 'mask_ratio', 'steps', 'tune_steps', 'batch_size', 'lr', 'tune_lr', 'seed')}
    versions = {p: version(p) for p in ('clip_benchmark', 'open_clip_torch', 'webdataset', 'numpy', 'torchvision', 'pillow', 'datasets')}
    out = dict(data=name, split=split, run=run.name, task=task, pictures=len(pairs), classes=pairs.label_names and len(pairs.label_names),
               templates=TEMPLATES if pairs.label_names else None, command=command, clip_benchmark=theirs, ours=ours, ours_if_ties_are_won=ties_won,
               training_said={k: trained[k] for k in ('images', 'zero_shot', 'retrieval')}, config=keep, machine=machine() | versions, wall_seconds=seconds)
    (RESULTS/'clip_benchmark').mkdir(parents=True, exist_ok=True)
    write_json(RESULTS/'clip_benchmark'/f'{name}-{run.name}.json', out)
    for k,v in theirs.items(): print(f'{name} {k:28} {v:.6f} {ours[k]:.6f} {"" if abs(v - ours[k]) < 1e-6 else "DIFFERENT"}')
