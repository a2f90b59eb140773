"""Does masking pay? Speed, and accuracy at equal training time, for 0, 50 and 75%.

    python studies/masking_pays.py scenes --measure                          # results/scenes/speed.json
    python studies/masking_pays.py scenes --seed 0                           # results/scenes/mask0-seed0.json, ... at equal time
    python studies/masking_pays.py ../shared/data/flickr8k_64 --measure      # the same for a folder of pairs
    python studies/masking_pays.py ../shared/data/flickr8k_64 --seed 0

`--measure` belongs on an idle machine: it says how many steps each mask ratio gets in the same time, so that the
runs themselves can share the machine with other work.
"""
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
import torch
from fastcore.script import call_parse
from flip_nb.data.pairs import Collate
from flip_nb.model import to_float
from flip_nb.files import read_lines, write_json
from flip_nb.loop import parameter_groups
from flip_nb.loss import info_nce
from flip_nb.masking import encoder_flops, num_kept
from flip_nb.model import preset_config
from flip_nb.scale.config import TrainConfig, default_preset, resolve
from flip_nb.scale.loader import make_loader, new_model, noise_sizes, open_train_data
from flip_nb.scale.options import build, flatten
from flip_nb.scale.setup import make_accelerator
from flip_nb.scale.trainer import make_fast
from flip_nb.train import train

RATIOS = (0., .5, .75)
RESULTS = Path(__file__).parent.parent/'results'

def machine():
    "What the numbers were measured on."
    cpu = torch.cpu.get_capabilities().get('cpu_name', platform.processor()) if hasattr(torch.cpu, 'get_capabilities') else platform.processor()
    return dict(cpu=cpu, python=platform.python_version(), **{p: version(p) for p in ('torch', 'accelerate', 'tokenizers')})

def step_flops(config, mask_ratio, text_length):
    "Forward FLOPs of both towers for one pair; backward is twice that for every ratio."
    n = (config.image_size//config.patch_size)**2
    k = num_kept(n, mask_ratio)
    embed = 2*k*3*config.patch_size**2*config.image_width
    return embed + encoder_flops(k + 1, config.image_width, config.image_depth)['total'] + encoder_flops(text_length, config.text_width, config.text_depth)['total']

def measure_speed(config, rounds=15):
    "Seconds of a training step, reading included, at each mask ratio, taking turns."
    c,o = config,flatten(config)
    accelerator = make_accelerator('auto', c.machine.threads)
    data = open_train_data(c, preset_config(c.model.preset).image_size)
    model = new_model(c.model, data.captions)
    make_fast(model, c)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-4, fused=True)
    batches = iter(make_loader(accelerator, data.train, Collate(model.tokenizer), c.optim.batch_size, c.seed,
                               noise_sizes(model, 0.), range(10**6), c.data.workers))
    sizes = model.config
    model,lengths = accelerator.prepare(model),[]
    def step(ratio):
        start = time.perf_counter()
        batch = next(batches)
        accelerator.backward(info_nce(*model(to_float(batch['images']), batch['ids'], ratio, image_noise=batch['image_noise'] if ratio else None)))
        optimizer.step(); optimizer.zero_grad()
        lengths.append(batch['ids'].shape[1])
        return time.perf_counter() - start
    for ratio in RATIOS: step(ratio)
    seconds = {r: [] for r in RATIOS}
    for k in range(rounds):
        for ratio in RATIOS[k % 3:] + RATIOS[:k % 3]: seconds[ratio].append(step(ratio))
    length = round(statistics.mean(lengths))
    rows = [dict(mask_ratio=r, seconds=statistics.median(s), quartiles=statistics.quantiles(s, n=4)[::2],
                 pairs_per_second=c.optim.batch_size/statistics.median(s), flops=step_flops(sizes, r, length)) for r,s in seconds.items()]
    return dict(data=Path(c.data.data).name, rounds=rounds, text_length=length, machine=machine(), rows=rows,
                mixed_precision=accelerator.mixed_precision, **{k: o[k] for k in ('preset', 'batch_size', 'threads')})

def equal_time_run(given, folder, seconds):
    "Train for as many steps as fit into `seconds` at the measured speed."
    speeds,o = json.loads((folder/'speed.json').read_text()),given
    for k in ('preset', 'batch_size', 'threads'):
        if speeds[k] != o[k]: raise SystemExit(f"{folder/'speed.json'} was measured with {k} {speeds[k]}, not {o[k]}; measure again")
    rate = {r['mask_ratio']: r['pairs_per_second'] for r in speeds['rows']}
    steps = int(.9*seconds*rate[o['mask_ratio']]/o['batch_size'])
    tune_steps = int(.1*seconds*rate[0.]/o['batch_size'])                   # a tenth of the time, unmasked, for every ratio
    name = Path(o['data']).name
    with tempfile.TemporaryDirectory() as tmp:
        start = time.perf_counter()
        results = train(**o, steps=steps, tune_steps=tune_steps, eval_every=steps//6, log_every=steps//100, out=f'{tmp}/run', quiet=True)
        log,evaluations = (read_lines(Path(f'{tmp}/run/{file}.jsonl')) for file in ('metrics', 'evaluations'))
        scores = {(e['stage'], e['step']): {k: e[k] for k in ('zero_shot', 'zero_shot_unseen', 'retrieval', 'eval_seconds')} for e in evaluations}
        log = [line | scores.get((line['stage'], line['step']), {}) for line in log]
        config = json.loads(Path(f'{tmp}/run/train_config.json').read_text()) | dict(out=None, data=name)
    for line in log:                                                        # seconds at the measured speed
        tuning = line['stage'] == 'tuning'
        line['seconds'] = .9*seconds*tuning + line['step']*o['batch_size']/rate[0. if tuning else o['mask_ratio']]
    return dict(mask_ratio=o['mask_ratio'], seed=o['seed'], seconds=seconds, config=config, machine=machine(),
                wall_seconds=time.perf_counter() - start, results=results, log=log)

@call_parse
def main(
    data:str, # 'scenes', or a folder of pairs
    measure:bool=False, # Measure the speed and stop
    seed:int=0, # Seed of the run
    mask_ratio:float=None, # One ratio; default: 0, 0.5 and 0.75
    seconds:float=300., # Training time of each run at the measured speed
    threads:int=1, # CPU threads
    batch_size:int=128, # Pairs per step
    lr:float=2e-3, # Peak learning rate
    preset:str=None, # Default: that of flip_nb.train
):
    "Measure speed, or train at equal time, and store the result."
    folder = RESULTS/Path(data).name
    folder.mkdir(parents=True, exist_ok=True)
    given = dict(data=data, seed=seed, threads=threads, batch_size=batch_size, lr=lr, preset=preset or default_preset(data))
    if measure:
        return write_json(folder/'speed.json', measure_speed(resolve(build(TrainConfig, given))))
    for ratio in RATIOS if mask_ratio is None else (mask_ratio,):
        run = equal_time_run(given | dict(mask_ratio=ratio), folder, seconds)
        write_json(folder/f'mask{ratio*100:.0f}-seed{seed}.json', run)
