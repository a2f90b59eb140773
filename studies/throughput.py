"""Where the time of feature extraction goes: reading, decoding, transform, to_float, the model; then the whole, with workers.

    python studies/throughput.py ../shared/data/tiny_imagenet --store                         # results/throughput/tiny_imagenet-small.json
    python studies/throughput.py ../shared/data/tiny_imagenet --limit 500 --sample 100        # a quick look
    python studies/throughput.py ../shared/data/tiny_imagenet --sample 1000 --show_profile    # cProfile's longest functions

Steps and settings are compared on `--sample` pictures; the fastest setting then runs over all of them. Measure on an
idle machine; CPU seconds, which are stored beside, mean something on a busy one too. Weights are fresh: speed does not
depend on their values.
"""
import cProfile
import os
import pstats
import time
from copy import copy
from importlib.metadata import version
from pathlib import Path
import torch
from fastcore.script import call_parse
from masking_pays import RESULTS, machine
from flip_nb.data.decode import decode_image, eval_transform
from flip_nb.data.folders import load_pairs
from flip_nb.model import to_float
from flip_nb.zero_shot import evaluating
from flip_nb.model import FLIP
from flip_nb.evaluation.features import extract_features
from flip_nb.files import write_json

def timed(func):
    "Wall and CPU seconds of this process, and what the function returned."
    start,cpu = time.perf_counter(),time.process_time()
    out = func()
    return dict(wall=time.perf_counter() - start, cpu=time.process_time() - cpu), out

def first_rows(pairs, n):
    "The same pairs, cut short."
    pairs = copy(pairs)
    pairs.rows = pairs.rows.select(range(min(n, len(pairs))))
    return pairs

def stages(flip, pairs, batch=256):
    "Each step alone on one thread, and the model on two threads and in smaller batches."
    torch.set_num_threads(1)
    transform,column,out = eval_transform(flip.config.image_size),pairs.image_column,{}
    out['read'],rows = timed(lambda: [pairs.rows[i] for i in range(len(pairs))])
    out['decode'],images = timed(lambda: [decode_image(row[column]) for row in rows])
    out['transform'],tensors = timed(lambda: [transform(image) for image in images])
    out['stack'],batches = timed(lambda: [torch.stack(tensors[i:i+batch]) for i in range(0, len(tensors), batch)])
    out['to_float'],floats = timed(lambda: [to_float(x) for x in batches])
    for threads,size in ((1, 256), (2, 256), (1, 64), (2, 64), (1, 32), (2, 32)):
        torch.set_num_threads(threads)
        parts = torch.cat(floats).split(size)
        with evaluating(flip):
            flip.image_encoder(parts[0])                                        # warm up
            out[f'model, {threads} threads, batches of {size}'],_ = timed(lambda: [flip.image_encoder(x) for x in parts])
    return out

def whole(flip, pairs, workers, threads, batch_size):
    "One call of `extract_features`."
    torch.set_num_threads(threads)
    seconds,_ = timed(lambda: extract_features(flip, pairs, batch_size=batch_size, workers=workers, quiet=True))
    row = dict(workers=workers, threads=threads, batch_size=batch_size, pictures=len(pairs), seconds=seconds, pictures_per_second=len(pairs)/seconds['wall'])
    print(f"extract_features of {len(pairs)}, {workers} workers, {threads} threads, batches of {batch_size:3}: {seconds['wall']:6.2f} s, {row['pictures_per_second']:6.0f} pictures a second", flush=True)
    return row

def profile(flip, pairs):
    "cProfile's longest functions, by their own time."
    torch.set_num_threads(1)
    p = cProfile.Profile()
    p.runcall(extract_features, flip, pairs, quiet=True)
    pstats.Stats(p).sort_stats('tottime').print_stats(25)

@call_parse
def main(
    data:str, # Folder of parquet files
    preset:str='small', # Model
    limit:int=10_000, # Pictures of the last, whole run
    sample:int=500, # Pictures of everything before
    show_profile:bool=False, # Print cProfile's list and stop
    store:bool=False, # Write results/throughput/<data>-<preset>.json
):
    "Measure, print, store."
    torch.manual_seed(0)
    flip = FLIP.from_preset(preset, vocab_size=1000).eval()
    splits,load = load_pairs(data, flip.config.image_size),os.getloadavg()[0]
    pairs = splits.get('val', splits.get('test'))
    few = first_rows(pairs, sample)
    if show_profile: return profile(flip, few)
    steps = stages(flip, few)
    for k,v in steps.items(): print(f"{k:36}{1000*v['wall']/len(few):8.3f} ms a picture, CPU {1000*v['cpu']/len(few):7.3f} ms")
    settings = [(w, t, 256) for w in (0, 1, 2) for t in (1, 2)] + [(0, 2, 64), (1, 2, 64), (0, 2, 32), (1, 2, 32)]
    rows = [whole(flip, few, *s) for s in settings]
    best = max(rows, key=lambda r: r['pictures_per_second'])
    last = whole(flip, first_rows(pairs, limit), best['workers'], best['threads'], best['batch_size'])
    if not store: return
    (RESULTS/'throughput').mkdir(parents=True, exist_ok=True)
    versions = {p: version(p) for p in ('torchvision', 'pillow', 'datasets', 'pyarrow')}
    write_json(RESULTS/'throughput'/f'{Path(data).name}-{preset}.json', dict(data=Path(data).name, preset=preset, image_size=flip.config.image_size, device='cpu',
               cores=os.cpu_count(), load_before=load, machine=machine() | versions, sample=len(few), stages=steps, settings=rows, whole=last))
