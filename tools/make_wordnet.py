"""Write the noun table of flip_nb/objectives/wordnet_data from the files of WordNet 3.0.

    apt-get install wordnet-base && python tools/make_wordnet.py /usr/share/wordnet

`nouns.txt.xz` has a line for each noun synset, in the order of offsets: the distance to the offset before, the parents
(hypernyms) as distances in lines (a slash before those of a named instance), and the lemmas. A star before a lemma says
that this synset is the lemma's first sense. `exceptions.txt` has irregular plurals. The licence of WordNet stands beside
them in LICENSE and is not written here.
"""
import lzma, sys
from pathlib import Path

target = Path(__file__).resolve().parent.parent/'flip_nb'/'objectives'/'wordnet_data'


def entries(path):
    "The lines of a WordNet file, without the licence on top."
    return [line for line in path.read_text().splitlines() if line and not line.startswith('  ')]


def first_senses(path):
    "Lemma to the offset of its first sense."
    found = {}
    for line in entries(path):
        words = line.split()
        found[words[0]] = int(words[-int(words[2])])
    return found


def read_synsets(path):
    "Offset to its lemmas and its hypernyms, each with the kind of pointer."
    synsets = {}
    for line in entries(path):
        words = line.split(' | ')[0].split()
        count = int(words[3], 16)
        lemmas,rest = words[4:4 + 2*count:2],words[4 + 2*count:]
        pointers = [rest[1 + 4*i:5 + 4*i] for i in range(int(rest[0]))]
        synsets[int(words[0])] = lemmas, [(p[0], int(p[1])) for p in pointers if p[0] in ('@', '@i')]
    return synsets


def table(folder):
    "The text of nouns.txt."
    first,synsets = first_senses(folder/'index.noun'),read_synsets(folder/'data.noun')
    place,lines,before = {offset: i for i,offset in enumerate(sorted(synsets))},[],0
    for i,offset in enumerate(sorted(synsets)):
        lemmas,hypernyms = synsets[offset]
        ups = ','.join(('/' if kind == '@i' else '') + str(place[up] - i) for kind,up in hypernyms)
        names = ' '.join(('*' if first.get(name.lower()) == offset else '') + name for name in lemmas)
        lines.append(f'{offset - before} {ups or "-"} {names}')
        before = offset
    return '\n'.join(lines) + '\n'


def main():
    if len(sys.argv) != 2: sys.exit(__doc__)
    folder = Path(sys.argv[1])
    missing = [n for n in ('index.noun', 'data.noun', 'noun.exc') if not (folder/n).is_file()]
    if missing: sys.exit(f"{str(folder)!r} has no {missing[0]}: give the folder of WordNet's files, such as /usr/share/wordnet")
    target.mkdir(parents=True, exist_ok=True)
    (target/'nouns.txt.xz').write_bytes(lzma.compress(table(folder).encode(), preset=9 | lzma.PRESET_EXTREME))
    (target/'exceptions.txt').write_text('\n'.join(entries(folder/'noun.exc')) + '\n')
    for path in sorted(target.iterdir()): print(f'{path.stat().st_size:9,} {path.name}')


if __name__ == '__main__': main()
