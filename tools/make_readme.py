"""Write README.md from nbs/index.ipynb, without Quarto.

    python tools/make_readme.py            # write README.md, and the pictures among its outputs in index_files/
    python tools/make_readme.py --check    # write nothing; exit 1 if they are out of date

Links to notebooks and to `images/` are made relative to the repository root. The stored outputs are used as they
are: nothing is run. Of the Quarto cell options, `echo`, `output`, `include`, `label`, `fig-cap` and `fig-alt` are understood.
"""
import argparse, base64, re, sys
from pathlib import Path

import yaml
from execnb.nbio import read_nb
from nbdev.process import extract_directives

root = Path(__file__).resolve().parent.parent
figures = 'index_files'
header = '<!-- Generated from nbs/index.ipynb by tools/make_readme.py: edit the notebook, not this file. -->'
hidden = {'hide', 'default_exp', 'export', 'exporti', 'exports'}    # nbdev flags of cells that are not shown

code_re = re.compile(r'(^```.*?^```|`[^`\n]+`)', flags=re.M|re.S)
link_re = re.compile(r'(\]\(|^\[[^\]]+\]:\s*|\b(?:src|href)=["\'])([^)\s"\']+)', flags=re.M)
elsewhere_re = re.compile(r'[a-z][\w+.-]*:|[/#]', flags=re.I)       # a web address, an absolute path, a place on this page


def relink(
    text:str, # Markdown as it stands in the notebook
) -> str: # The same with its relative links counted from the repository root
    "`02_masking.ipynb` becomes `nbs/02_masking.ipynb`, `../LICENSE` becomes `LICENSE`; code is left alone."
    def _fix(m):
        before,url = m.groups()
        if elsewhere_re.match(url): return m.group()
        return before + (url[3:] if url.startswith('../') else f'nbs/{url}')
    return ''.join(p if i%2 else link_re.sub(_fix, p) for i,p in enumerate(code_re.split(text)))


def render_output(
    out, # One stored output
    opts:dict, # Quarto options of its cell
    files:dict, # Picture files so far, path -> bytes; added to
) -> str: # Markdown, or nothing
    "The best form of one output that GitHub can show."
    join = lambda v: v if isinstance(v, str) else ''.join(v)
    data = {k: join(v) for k,v in out.get('data', {}).items() if k.startswith(('image', 'text'))}
    for mime,ext in (('image/svg+xml', 'svg'), ('image/png', 'png'), ('image/jpeg', 'jpg')):
        if mime not in data: continue
        name = f"{figures}/{opts.get('label', 'figure')}-{len(files)+1}.{ext}"
        files[name] = data[mime].encode() if ext == 'svg' else base64.b64decode(data[mime])
        cap = opts.get('fig-cap', '')
        return f"![{opts.get('fig-alt', cap)}]({name})" + (f'\n\n*{cap}*' if cap else '')
    if 'text/markdown' in data: return relink(data['text/markdown']).strip()
    text = '' if out.get('name') == 'stderr' else data.get('text/plain', join(out.get('text', ''))).rstrip()
    return f'```text\n{text}\n```' if text else ''


def make(
    path:Path, # Notebook
) -> tuple[str,dict]: # Text of README.md; picture files, path -> bytes
    "README from the stored cells of a notebook."
    blocks,files = [header],{}
    for cell in read_nb(path).cells:
        if cell.cell_type == 'markdown': blocks.append(relink(cell.source.strip()))
        if cell.cell_type != 'code': continue
        lines = cell.source.splitlines()
        opts = yaml.safe_load('\n'.join(l[2:].strip() for l in lines if re.match(r'#\|\s*[\w-]+:\s', l))) or {}
        if hidden & extract_directives(cell, remove=False).keys() or opts.get('include') is False: continue
        code = '\n'.join(l for l in lines if not l.startswith('#|')).strip()
        if code and opts.get('echo') is not False: blocks.append(f'```python\n{code}\n```')
        if opts.get('output') is not False: blocks += [render_output(o, opts, files) for o in cell.outputs]
    return '\n\n'.join(b for b in blocks if b) + '\n', files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 if README.md is out of date')
    check = parser.parse_args().check

    text,files = make(root/'nbs'/'index.ipynb')
    files = {'README.md': text.encode(), **files}
    changed = [f for f,b in files.items() if not (root/f).exists() or (root/f).read_bytes() != b]
    stale = [f for p in (root/figures).glob('*') if (f := p.relative_to(root).as_posix()) not in files]
    if not changed+stale: return print('README.md agrees with nbs/index.ipynb.')
    if check: sys.exit(f"Out of date with nbs/index.ipynb: {', '.join(changed+stale)}. Run `python tools/make_readme.py`.")
    for f in changed:
        (root/f).parent.mkdir(exist_ok=True)
        (root/f).write_bytes(files[f])
        print('Wrote', f)
    for f in stale:
        (root/f).unlink()
        print('Removed', f)


if __name__ == '__main__': main()
