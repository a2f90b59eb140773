"""What a large contrastive batch costs, and what the remedies save. CPU; each measurement in a process of its own.

    python studies/large_batch.py loss --store         # the loss alone, one matrix against blocks, up to 65,536 pairs
    python studies/large_batch.py step --store         # an optimiser step, one pass against cached features
    python studies/large_batch.py options --store      # recomputed activations, bf16 and compile on a step of `small`
    python studies/large_batch.py loss --largest 4096  # a quick look

They write results/large_batch/<study>.json. Seconds mean something on an idle machine only; CPU seconds, stored beside
them, and memory do on any. Memory is the kernel's peak of the process (VmHWM) less what it held just before (Linux
only), so the features or images themselves are not in it. Weights are fresh and features are random: neither speed nor
memory depends on their values.
"""
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
import torch
from fastcore.script import call_parse
from flip_nb.loop import parameter_groups
from flip_nb.loss import info_nce, normalize
from flip_nb.model import FLIP, preset_config
from flip_nb.scale.accumulate import cached_backward, checkpoint_blocks, compile_towers, split_batch
from flip_nb.scale.config import TrainConfig
from flip_nb.scale.trainer import make_fast
from flip_nb.scenes import Scenes
from flip_nb.text import CaptionTokenizer

RESULTS = Path(__file__).parent.parent/'results'

def machine():
    "What the numbers were measured on."
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, 'get_capabilities') else {}
    cpu = known.get('cpu_name', platform.processor())
    return dict(cpu=cpu, python=platform.python_version(), torch=version('torch'))

def memory(key):
    "Bytes of this process: 'VmRSS' now, 'VmHWM' at its peak. (`getrusage` would count the parent's memory too.)"
    line = next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key))
    return 1024*int(line.split()[1])

def measured(func):
    "Seconds of a call, and the bytes that it needed on top of what was there."
    gc.collect(); ctypes.CDLL(None).malloc_trim(0)      # free memory that the allocator kept would hide what is needed
    Path('/proc/self/clear_refs').write_text('5')       # the peak starts again from here
    before,start,cpu = memory('VmRSS'),time.perf_counter(),time.process_time()
    value = func()
    return dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu, held_bytes=before,
                extra_bytes=memory('VmHWM') - before, value=value)

def measure_loss(pairs, width, chunk_size, **_):
    "Loss and gradient of random features."
    gen = torch.Generator().manual_seed(0)
    v,t = (normalize(torch.randn(pairs, width, generator=gen)).requires_grad_() for _ in range(2))
    scale = torch.tensor([14.3], requires_grad=True)
    def work():
        loss = info_nce(v, t, scale, chunk_size)
        loss.backward()
        return loss.item()
    info_nce(v[:64], t[:64], scale, chunk_size).backward()                      # warm up
    v.grad = t.grad = scale.grad = None
    return measured(work)

def scene_batch(pairs, image_size):
    "Normalised images and ids of the first scenes, and the vocabulary's size."
    images,captions = [],[]
    for i in range(0, pairs, 1024):
        x,c,_ = Scenes('train', image_size).batch(range(i, min(pairs, i + 1024)))
        images.append(x.float()/127.5 - 1); captions += c
    tokenizer = CaptionTokenizer.train(captions[:2000], 1000)
    return dict(images=torch.cat(images), ids=tokenizer(captions, trim=True)), tokenizer.vocab_size

@dataclass(frozen=True)
class StepTask:
    "One optimiser step."
    pairs:int # Of the batch
    preset:str # Sizes of the model
    micro_batch:int # Pairs that are encoded at a time
    mask_ratio:float # Fraction of patches to drop
    chunk_size:int|None # Side of the blocks of the loss; None computes it whole
    checkpoint:bool = False # Recompute activations
    bf16:bool = False # Mixed precision
    compiled:bool = False # Compile both towers
    repeats:int = 1 # The fastest of so many counts

def measure_step(**task):
    "One optimiser step; with `repeats`, the fastest of so many."
    t = StepTask(**{k: v for k,v in task.items() if k != 'way'})
    torch.manual_seed(0)
    batch,vocab_size = scene_batch(t.pairs, preset_config(t.preset).image_size)
    model = FLIP.from_preset(t.preset, vocab_size=vocab_size)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-4, fused=True)
    make_fast(model, TrainConfig())                     # as a run does
    if t.checkpoint: checkpoint_blocks(model)
    if t.compiled: compile_towers(model)
    loss = partial(info_nce, chunk_size=t.chunk_size)
    def encode(**kw):
        with torch.autocast('cpu', torch.bfloat16, enabled=t.bf16): return model(**kw, mask_ratio=t.mask_ratio)
    def step(batch):
        value = cached_backward(encode, split_batch(batch, t.micro_batch), loss, torch.Tensor.backward)
        optimizer.step(); optimizer.zero_grad()
        return value.item()
    start = time.perf_counter()
    step(batch if t.compiled else {k: v[:64] for k,v in batch.items()})      # warm up; a compiled model compiles here
    warm_up = time.perf_counter() - start
    runs = [measured(lambda: step(batch)) for _ in range(t.repeats)]
    fastest = min(runs, key=lambda r: r['seconds'])
    return fastest | dict(value=runs[0]['value'], warm_up_seconds=warm_up)   # the loss before the weights have moved

WORK = dict(loss=measure_loss, step=measure_step, options=measure_step)

def tasks(study, largest):
    "What is measured, in this order."
    sizes = [n for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536) if n <= largest]
    if study == 'loss':
        ways = [('one matrix', None, 16384), ('blocks', 1024, 65536)]
        return [dict(way=way, pairs=n, width=512, chunk_size=c) for way,c,most in ways for n in sizes if n <= most]
    if study == 'step':
        common = dict(preset='tiny', mask_ratio=.5)
        once = [dict(way='one pass', pairs=n, micro_batch=n, chunk_size=None, repeats=2, **common)
                for n in sizes if n <= 8192]            # the first of the two allocates
        cached = [dict(way='cached', pairs=n, micro_batch=1024, chunk_size=1024, repeats=1 + (n <= 8192), **common)
                  for n in sizes]
        return once + cached
    common = dict(preset='small', pairs=256, micro_batch=256, mask_ratio=.5, chunk_size=None, repeats=3)
    ways = {'plain': {}, 'cached, 64 at a time': dict(micro_batch=64), 'recomputed activations': dict(checkpoint=True),
            'bf16': dict(bf16=True), 'compiled': dict(compiled=True),
            'cached and recomputed': dict(micro_batch=64, checkpoint=True)}
    return [common | dict(way=way) | options for way,options in ways.items()]

def in_process(study, task):
    "Run one measurement in a fresh process."
    words = [sys.executable, __file__, study, '--task', json.dumps(task)]
    out = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if out.returncode: raise SystemExit(f"{task} ended with code {out.returncode}, perhaps for want of memory")
    row = task | json.loads(out.stdout.splitlines()[-1])
    print(f"{row['way']:24}{row['pairs']:7,} pairs: {row['extra_bytes']/2**30:6.2f} GB on top of "
          f"{row['held_bytes']/2**30:.2f}, {row['seconds']:7.2f} s, loss {row['value']:.4f}", flush=True)
    return row

@call_parse
def main(
    study:str, # loss, step or options
    largest:int=65536, # Most pairs
    task:str=None, # One measurement as JSON, made in this process
    store:bool=False, # Write results/large_batch/<study>.json
):
    "Measure, print, store."
    if study not in WORK: raise SystemExit(f"there is no study {study!r}; known: {', '.join(WORK)}")
    if task:
        print(json.dumps(WORK[study](**json.loads(task))))
        return
    load,start = os.getloadavg()[0],time.perf_counter()
    rows = [in_process(study, t) for t in tasks(study, largest)]
    if not store: return
    (RESULTS/'large_batch').mkdir(parents=True, exist_ok=True)
    stored = dict(device='cpu', cores=os.cpu_count(), threads=torch.get_num_threads(), load_before=load,
                  machine=machine(), wall_seconds=time.perf_counter() - start, rows=rows)
    (RESULTS/'large_batch'/f'{study}.json').write_text(json.dumps(stored, indent=2) + '\n')
