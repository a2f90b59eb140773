"""The two runs of nbs/00_one_page.ipynb with another seed: masked, and never masked in the same processor seconds.

    python studies/one_page.py --seed 0              # run the notebook's cells with this seed and print both logs
    python studies/one_page.py --seed 0 --store      # also write results/one_page/seed0.json

There is one source: the cells of the notebook are run in order, up to the one that reads these results.
"""
import os
os.environ['MPLBACKEND'] = 'agg'                                # the notebook's figures are drawn and dropped
import platform
import time
from pathlib import Path
import matplotlib.pyplot as plt
import torch
from execnb.nbio import read_nb
from fastcore.script import call_parse
from flip_nb.files import write_json

ROOT = Path(__file__).resolve().parent.parent

def run_cells(seed):
    "What the notebook has defined when both runs are over."
    names,found = {},0
    for cell in read_nb(ROOT/'nbs'/'00_one_page.ipynb').cells:
        if cell.cell_type != 'code': continue
        if 'results/one_page' in cell.source: break
        found += cell.source.count('seed = 0;')
        exec(cell.source.replace('seed = 0;', f'seed = {seed};'), names)
        plt.close('all')
    if found != 1: raise SystemExit(f"the notebook should set `seed = 0;` once, but does so {found} times")
    return names

@call_parse
def main(
    seed:int=0, # Seed of both runs
    store:bool=False, # Write the result under results/one_page
):
    "Run the notebook's two runs with one seed."
    start = time.perf_counter()
    names = run_cells(seed)
    cpu = torch.backends.cpu.get_cpu_capability()
    machine = dict(cpu=f'{platform.machine()}, {cpu}', python=platform.python_version(), torch=torch.__version__)
    config = dict(seed=seed, mask_ratio=.5, threads=torch.get_num_threads(), batch_size=64, names=len(names['NAMES']),
                  parameters=sum(p.numel() for p in names['model'].parameters()), test_images=len(names['test_images']))
    right,seen = names['right'],names['seen']
    result = dict(config=config, machine=machine, read=right[seen].mean().item(), never_read=right[~seen].mean().item(),
                   wall_seconds=time.perf_counter() - start,
                  masked=names['log'], unmasked=names['twin_log'])
    if store:
        (folder := ROOT/'results'/'one_page').mkdir(parents=True, exist_ok=True)
        write_json(folder/f'seed{seed}.json', result)
    for kind in ('masked', 'unmasked'): print(seed, kind, *(f"{x['seconds']:.1f}s {x['zero_shot']:.3f}" for x in result[kind]))
