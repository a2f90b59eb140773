"""Does a run survive? Killed again and again, and left alone for 10,000 steps.

    python studies/survive.py kills --kills 20 --store     # results/survive/kills.json: SIGKILL at random moments, then the same command again
    python studies/survive.py memory --store               # results/survive/memory.json: the memory of one process over 10,000 steps
    python studies/survive.py kills --kills 3 --steps 40   # a quick look
    python studies/survive.py memory --steps 500

Every start of `kills` is a fresh interpreter. Half of the kills come after a random time, the others wait for a
moment of their kind, so that none is left out: while a checkpoint is being written, while an evaluation runs, in
tuning. Weights and losses have to be those of a run that nobody disturbed, bit for bit.
"""
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
import torch
from fastcore.script import call_parse
from safetensors.torch import load_file
from masking_pays import RESULTS, machine
from flip_nb.scale.checkpoint import checkpoint_step, latest_checkpoint
from flip_nb.files import write_json
from flip_nb.train import train

def options(steps):
    "A small run with much to interrupt: many checkpoints, evaluations beside training, tuning."
    return dict(preset='tiny', steps=steps, tune_steps=steps//3, batch_size=32, text_mask_ratio=.2, vocab_size=300, log_every=2, save_every=6, eval_every=12,
                eval_size=200, workers=1, threads=1, mixed_precision='no', track='none')

def start(run, given):
    "Give the command."
    words = [w for k,v in given.items() for w in (f'--{k}', str(v))]
    return subprocess.Popen([sys.executable, '-m', 'flip_nb.train', '--resume', str(run), *words, '--quiet'])

def lines(run, name='metrics.jsonl'):
    "The log so far; a line may be half written."
    path = run/name
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith('}\n')] if path.exists() else []

def done(run, steps):
    "Steps over all stages, as the log says, and the stage."
    log = lines(run)
    return (log[-1]['step'] + steps*(log[-1]['stage'] == 'tuning'), log[-1]['stage']) if log else (0, '')

def writing(run):
    "Whether a checkpoint is being written."
    return any((run/'checkpoints').glob('.step-*.part'))

def reach(process, ready, most=60):
    "Wait for a moment; False if the run is over before."
    end = time.monotonic() + most
    while process.poll() is None and time.monotonic() < end:
        if ready(): return True
        time.sleep(.0005)
    return False

def disturb(process, run, kind, chance, steps, start_up):
    "Wait for a moment of this kind, then some random time, then kill. Returns whether the moment came."
    before,evaluated = done(run, steps)[0],len(lines(run, 'evaluations.jsonl'))
    if kind == 'start-up': came,rest = True,chance.uniform(0, start_up)
    if kind == 'any time': came,rest = True,chance.uniform(0, start_up + 6)
    if kind == 'training': came,rest = reach(process, lambda: done(run, steps)[0] >= before + 2*chance.randint(1, 6)),chance.uniform(0, .2)
    if kind == 'saving': came,rest = reach(process, lambda: writing(run)),chance.uniform(0, .02)
    if kind == 'evaluation': came,rest = reach(process, lambda: (d := done(run, steps)[0]) > before and d % 12 == 0),chance.uniform(0, .3)
    if kind == 'tuning': came,rest = reach(process, lambda: (d := done(run, steps))[1] == 'tuning' and d[0] > before),chance.uniform(0, .3)
    time.sleep(rest)
    if process.poll() is None: process.kill()
    process.wait()
    return came

def log_of(run): return [[line[k] for k in ('stage', 'step', 'loss', 'grad_norm', 'lr')] for line in lines(run)]
def scores_of(run): return [[line[k] for k in ('stage', 'step', 'zero_shot', 'retrieval')] for line in lines(run, 'evaluations.jsonl')]

def kill_often(kills, steps, seed, folder):
    "One run undisturbed, one killed again and again."
    chance,given,whole,run = random.Random(seed),options(steps),folder/'whole',folder/'killed'
    began = time.perf_counter()
    process = start(whole, given)
    reach(process, lambda: lines(whole))
    start_up = time.perf_counter() - began                                      # until the first log line
    if process.wait(): raise SystemExit('the undisturbed run failed')
    seconds = time.perf_counter() - began
    kinds = ['start-up', 'training', 'saving', 'evaluation', 'any time']
    kinds = (kinds*kills)[:kills - kills//5]
    chance.shuffle(kinds)
    rows = []
    for kind in kinds + ['tuning']*(kills//5):
        began,from_step,log = time.perf_counter(),latest_checkpoint(run)[0],lines(run)
        from_step,process = checkpoint_step(from_step) if from_step else 0,start(run, given)
        came = disturb(process, run, kind, chance, steps, start_up)
        newest,faults = latest_checkpoint(run)
        step,stage = done(run, steps) if lines(run) != log else (from_step, '')  # killed before its first line: the log is that of the life before
        rows.append(dict(kind=kind, came=came, code=process.returncode, seconds=time.perf_counter() - began, started_from=from_step, step=step, stage=stage,
                         checkpoint=checkpoint_step(newest) if newest else 0, half_written=writing(run), faults=len(faults)))
        print(f"{len(rows):3} {kind:10} after {rows[-1]['seconds']:5.1f} s: from step {rows[-1]['started_from']:3} to {step:3} {stage:7}, newest checkpoint {rows[-1]['checkpoint']:3}{', one half written' if writing(run) else ''}", flush=True)
        if process.returncode == 0: break
    code = start(run, given).wait()
    a,b = load_file(whole/'model.safetensors'),load_file(run/'model.safetensors')
    same = dict(weights=a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), losses=log_of(whole) == log_of(run), scores=scores_of(whole) == scores_of(run),
                largest_difference=max((a[k].double() - b[k].double()).abs().max().item() for k in a))
    digest = {p.name: hashlib.sha256((p/'model.safetensors').read_bytes()).hexdigest()[:16] for p in (whole, run)}
    print(same, flush=True)
    return dict(options=given, seed=seed, undisturbed_seconds=seconds, start_up_seconds=start_up, last_code=code, killed=sum(r['code'] == -9 for r in rows),
                lost_steps=sum(max(0, r['step'] - r['checkpoint']) for r in rows), same=same, digest=digest, rows=rows)

def run_long(steps, seed, folder):
    "One long run, in this process."
    given = options(steps) | dict(tune_steps=0, batch_size=16, log_every=20, save_every=1000, eval_every=1000, eval_size=200, workers=0, seed=seed)
    results = train(**given, out=str(folder/'run'), quiet=True)
    rows = [[line['step'], round(line['memory_gb'], 5), round(line['seconds'], 2)] for line in lines(folder/'run')]
    return dict(options=given, train_seconds=results['train_seconds'], wall_seconds=results['wall_seconds'], columns=['step', 'memory_gb', 'seconds'], rows=rows)

@call_parse
def main(
    study:str, # kills or memory
    kills:int=20, # How often to kill
    steps:int=None, # Masked steps of the run; default: 90 for kills, 10,000 for memory
    seed:int=0, # Seed of the moments
    store:bool=False, # Write results/survive/<study>.json
):
    "Run, print, store."
    if study not in ('kills', 'memory'): raise SystemExit(f"there is no study {study!r}; known: kills, memory")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as tmp:
        out = kill_often(kills, steps or 90, seed, Path(tmp)) if study == 'kills' else run_long(steps or 10_000, seed, Path(tmp))
    if study == 'memory':
        late = torch.tensor([r[:2] for r in out['rows'] if r[0] > out['rows'][-1][0]/10], dtype=torch.float64)
        x,y = late[:, 0] - late[:, 0].mean(),late[:, 1] - late[:, 1].mean()
        print(f"{out['rows'][-1][1]:.3f} GB at the end, {1024*1000*(x @ y/(x @ x)).item():+.3f} MB per 1,000 steps after the first tenth, {out['wall_seconds']:.0f} seconds")
    if not store: return
    (RESULTS/'survive').mkdir(parents=True, exist_ok=True)
    write_json(RESULTS/'survive'/f'{study}.json', dict(cores=os.cpu_count(), load_before=load, machine=machine()) | out)
