"""What broken records cost a stream, and what it keeps in memory. CPU, no workers, noisy JPEG scenes made for it.

    python studies/stream.py --store           # results/stream/broken.json and memory.json, about 5 minutes
    python studies/stream.py --records 400     # a quick look

The seconds of the comparison are CPU seconds of this process, clean and broken in random turn,
so they mean something on a busy machine too.
"""
import io
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
import numpy as np
import torch
from fastcore.script import call_parse
from PIL import Image
from large_batch import machine, memory
from flip_nb.data.pairs import Collate
from flip_nb.data.decode import train_transform
from flip_nb.scenes import Scenes
from flip_nb.data.stream import PairStream, stream_loader
from flip_nb.data.sources import open_source
from flip_nb.data.shards import write_shard
from flip_nb.text import CaptionTokenizer

RESULTS = Path(__file__).parent.parent/'results'/'stream'
SIDE = 256

def jpeg(scene, rng):
    "A noisy JPEG, about as large as a photograph of its size."
    pixels = np.repeat(np.repeat(scene.permute(1, 2, 0).numpy(), SIDE//32, 0), SIDE//32, 1)
    pixels = pixels + rng.normal(0, 12, (SIDE, SIDE, 3))
    out = io.BytesIO(); Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, 'JPEG', quality=85)
    return out.getvalue()

BREAK = [lambda p, c: dict(jpg=b'', txt=c), lambda p, c: dict(jpg=p[:len(p)//2], txt=c),
         lambda p, c: dict(jpg=b'XX' + p[2:], txt=c), lambda p, c: dict(jpg=p),
         lambda p, c: dict(jpg=p, txt=c + b'\xe9'), lambda p, c: dict(txt=c)]

def write(folder, records, per_shard, share):
    "Shards in which a share of the records is broken, all kinds equally often."
    scenes,rng = Scenes('train', 32),np.random.default_rng(0)
    kinds = itertools.cycle(BREAK)
    broken = set(np.random.default_rng(1).permutation(records)[:int(share*records)].tolist())
    def pair(i):
        scene,caption,_ = scenes[i]
        image,text = jpeg(scene, rng),caption.encode()
        return f'{i:06}', next(kinds)(image, text) if i in broken else dict(jpg=image, txt=text)
    for first in range(0, records, per_shard):
        write_shard(folder/f'{first//per_shard:03}.tar', map(pair, range(first, min(records, first + per_shard))))

def stream_of(folder, buffer_size):
    "A stream of one folder."
    tokenizer = CaptionTokenizer.train([Scenes('train', 32)[i][1] for i in range(200)], vocab_size=300)
    source = open_source(sorted(map(str, folder.glob('*.tar'))))
    return PairStream([source], train_transform(64), Collate(tokenizer), 32, noise=dict(image_noise=16),
                      buffer_size=buffer_size)

def cost(batches, n):
    "CPU seconds and wall seconds for n batches, and how many records were broken."
    cpu,wall = time.process_time(),time.perf_counter()
    broken = sum(len(next(batches)['broken']) for _ in range(n))
    return dict(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall, broken=broken)

def compare(folder, records, rounds, batches=8):
    "Clean data, clean data again (how far chance reaches), and broken data, in random order in every round."
    streams,runs = {},{}
    for name,share in (('clean', 0.), ('clean again', 0.), ('broken', .1)):
        (folder/name).mkdir(); write(folder/name, records, max(1, records//4), share)
        streams[name],runs[name] = iter(stream_loader(stream_of(folder/name, 200))),[]
    for stream in streams.values(): cost(stream, 5)    # the first bad image makes Pillow load all its plugins
    for r in range(rounds):
        for name in random.Random(r).sample(list(streams), 3): runs[name].append(cost(streams[name], batches))
    cpu = {name: median(r['cpu'] for r in rs) for name,rs in runs.items()}
    return dict(pairs=32*batches, runs=runs, cpu_ratio=cpu['broken']/cpu['clean'],
                chance_ratio=cpu['clean again']/cpu['clean'])

def remember(folder, buffer_size, passes):
    "Memory of this process beyond its start, every 10 batches."
    stream = stream_of(Path(folder), int(buffer_size))
    batches,start,held = iter(stream_loader(stream)),memory('VmRSS'),[]
    source = stream.sources[0]
    pairs = int(passes)*sum(1 for s in range(len(source.shards)) for _ in source.records(s))
    for i in range(pairs//32):
        next(batches)
        if i % 10 == 0: held.append([32*(i + 1), memory('VmRSS') - start])
    print(json.dumps(held))

@call_parse
def main(
    records:int=1500, # Records of each folder
    rounds:int=40, # Comparisons of clean and broken; fewer leave more to chance than there is to see
    store:bool=False, # Write results/stream
    folder:str=None, # Used by the study itself: folder to read, in a process of its own
    buffer_size:int=0, # Used by the study itself
):
    "Measure both."
    torch.set_num_threads(1)
    if folder: return remember(folder, buffer_size, 2)
    with tempfile.TemporaryDirectory() as tmp:
        out = dict(broken=dict(machine=machine(), records=records, **compare(Path(tmp), records, rounds)))
        large = Path(tmp)/'large'; large.mkdir(); write(large, 2*records, records, 0.)
        curves = {}
        for size in (100, 500, 2*records):
            command = [sys.executable, __file__, '--folder', str(large), '--buffer_size', str(size)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            curves[size] = json.loads(run.stdout)
        data = sum(p.stat().st_size for p in large.glob('*.tar'))
        out['memory'] = dict(machine=machine(), records=2*records, records_per_shard=records, data_bytes=data,
                             held=curves)
    print(f"{out['broken']['cpu_ratio']:.3f} times the CPU seconds with broken records;",
          {k: f'{max(b for _,b in v)/1e6:.0f} MB' for k,v in curves.items()}, f'of {data/1e6:.0f} MB')
    if store:
        RESULTS.mkdir(parents=True, exist_ok=True)
        for name,value in out.items(): (RESULTS/f'{name}.json').write_text(json.dumps(value, indent=1) + '\n')
