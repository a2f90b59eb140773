"""Run notebooks in place, each in a fresh kernel, and store their outputs.

    python tools/execute_notebooks.py                          # every notebook under nbs/
    python tools/execute_notebooks.py nbs/1_method/01_masking.ipynb     # only these files or folders

Cells marked `#| eval: false`, or with one of the flags in `tst_flags` of settings.ini, are not run and keep
the output they have. What is written is already clean, so `nbdev_clean` changes nothing and a second run
writes the same bytes. A notebook that fails, takes too long or prints a path of this machine is left as it was.
"""
import argparse, json, os, re, sys, time
from pathlib import Path

import nbformat
from execnb.nbio import write_nb
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives

root = Path(__file__).resolve().parent.parent
kernelspec = dict(display_name='python3', language='python', name='python3')
here = '|'.join(re.escape(str(p)) for p in {root, Path.home(), Path(sys.prefix)} if len(p.parts) > 1)
path_re = re.compile(rf'(?<![\w.:/-])(?:(?:{here})(?![\w-])|/(?:tmp|work|root|home|Users|private|mnt|var|opt|usr/lib|usr/local)/)[^\s"\'<>]*'
                     r'|\S*(?:site|dist)-packages\S*')


def is_skipped(
    cell, # Notebook cell
    flags:set[str], # Flags of cells that are not run
) -> bool: # Does `nbdev_test` leave this code cell out?
    "The same choice as `nbdev_test` makes."
    direc = extract_directives(cell, remove=False)
    return direc.get('eval:', [''])[0].lower() == 'false' or bool(flags & direc.keys()) or 'nbdev_export(' in cell['source']


def output_texts(
    cell, # Code cell, as a dict
) -> list[str]: # Every text a reader of the outputs can see; pictures left out
    "Text of the stored outputs."
    texts = []
    for o in cell.get('outputs', []):
        texts += [o.get('text', ''), o.get('evalue', ''), o.get('traceback', '')]
        texts += [v for k,v in o.get('data', {}).items() if k.startswith('text') or 'svg' in k or 'json' in k]
    return [''.join(t) if isinstance(t, (str, list)) else json.dumps(t) for t in texts]


def machine_paths(
    cell, # Code cell, as a dict
) -> list[str]: # Absolute paths of one machine found in its outputs
    "Paths that mean nothing on a reader's machine."
    return [m.group() for t in output_texts(cell) for m in path_re.finditer(t)]


def execute(
    path:Path, # Notebook
    flags:set[str], # Flags of cells that are not run
    timeout:float, # Seconds allowed for the whole notebook
):
    "Run one notebook and write it back; raise without writing if anything is wrong."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == 'code' and is_skipped(cell, flags): cell.metadata['tags'] = ['skip-execution']
    nb.metadata['kernelspec'] = kernelspec
    end = time.monotonic() + timeout
    NotebookClient(nb, timeout_func=lambda cell: max(1, end - time.monotonic()), kernel_name='python3', coalesce_streams=True,
                   extra_arguments=['--log-level=ERROR'], resources={'metadata': {'path': str(path.parent)}}).execute()

    nb = json.loads(nbformat.writes(nb))
    for i,cell in enumerate(nb['cells'], 1):
        if found := machine_paths(cell): raise ValueError(f"cell {i} prints a path of this machine: {found[0]}\n{''.join(cell['source'])}")
    cfg = get_config()
    clean_nb(nb, cfg.clear_all, cfg.allowed_metadata_keys.split(), cfg.allowed_cell_metadata_keys.split(), cfg.clean_ids)
    write_nb(nb, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', type=Path, help='notebooks or folders; all of nbs/ when none is given')
    parser.add_argument('--flags', default='', help='flags whose cells are run after all, such as "slow gpu"')
    parser.add_argument('--timeout', type=float, default=900, help='seconds allowed per notebook')
    args = parser.parse_args()

    os.environ['OMP_WAIT_POLICY'] = 'passive'      # idle threads sleep: several times faster on shared cores
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
    paths = [p.resolve() for p in args.paths]      # before the working directory changes
    os.chdir(root)                                 # settings.ini is found from here
    flags = set(get_config().tst_flags.split()) - set(args.flags.split())
    files = sorted(f.resolve() for p in paths or [root/'nbs'] for f in ([p] if p.is_file() else nbglob(p, as_path=True)))
    if not files: sys.exit(f'No notebooks found in {args.paths}')

    failed,start = [],time.monotonic()
    for f in files:
        name,t = f.relative_to(root) if f.is_relative_to(root) else f, time.monotonic()
        try: execute(f, flags, args.timeout)
        except Exception as e:
            failed.append(str(name))
            print(f'{name}: FAILED, left as it was\n{type(e).__name__}: {e}', file=sys.stderr)
        print(f'{time.monotonic()-t:6.1f} s  {name}', flush=True)
    print(f'{time.monotonic()-start:6.1f} s  {len(files)} notebooks, {len(failed)} failed')
    if failed: sys.exit('Failed: ' + ', '.join(failed))


if __name__ == '__main__': main()
