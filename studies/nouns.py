"""Nouns as labels: rival rules on the captions of Flickr8k, and the memory of the loss with and without a dense target.

    python studies/nouns.py ../shared/data/flickr8k_64      # results/nouns/flickr8k.json, a minute
    python studies/nouns.py memory                          # results/nouns/memory.json, needs 4 GB

No caption is stored, only counts. All rules get the tokens of textblob. The rule of CatLIP's released code: every word is
lemmatised as a noun and kept if the first sense is called so. The stop list is scikit-learn's.
"""
import json, re, subprocess, sys, time
from collections import Counter
from pathlib import Path
import pyarrow.parquet as pq
from masking_pays import RESULTS, machine
from flip_nb.files import write_json
from flip_nb.objectives.nouns import caption_nouns, clean_caption, noun_key, noun_tagger
from flip_nb.objectives.wordnet import lemmatise, load_wordnet, synset_key, synset_name

THRESHOLDS = (1, 5, 10, 50, 100, 500)
KINDS = {'NN': 'nouns', 'JJ': 'adjectives', 'VB': 'verbs', 'IN': 'prepositions', 'CD': 'numbers', 'RB': 'adverbs'}


def first_key(word):
    "First sense of any word, whatever its length."
    lemma = lemmatise(word)
    return lemma and synset_key(load_wordnet().first_sense[lemma])


def released_key(word):
    "The rule of the released code."
    lemma = lemmatise(word)
    if lemma is None: return None
    number = load_wordnet().first_sense[lemma]
    return synset_key(number) if load_wordnet().lemmas[number][0].lower() == lemma else None


def rules():
    "Name to a function (tagged words) -> (word, key) of each label."
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS as stop
    return {'released code: sense named as the word': lambda t: [(w, released_key(w)) for w,_ in t],
            'first sense of every word': lambda t: [(w, first_key(w)) for w,_ in t],
            'first sense, no stop words': lambda t: [(w, first_key(w)) for w,_ in t if w not in stop],
            'tagged as a noun (ours)': lambda t: [(w, noun_key(w, k in ('NNS', 'NNPS'))) for w,k in t if k[:2] == 'NN']}


def measure_rule(name, rule, tagged):
    "Labels and classes under one rule."
    counts,behind,labels,without = Counter(),{},0,0
    for words in tagged:
        keys = {}
        for word,key in rule(words):
            if key and key not in keys: keys[key] = word
        for key,word in keys.items(): behind.setdefault(key, Counter())[word] += 1
        counts.update(list(keys)); labels += len(keys); without += not keys
    top = [dict(key=k, name=synset_name(k), word=behind[k].most_common(1)[0][0], captions=n) for k,n in counts.most_common(40)]
    return dict(name=name, labels_per_caption=labels/len(tagged), without=without/len(tagged), without_captions=without,
                classes={n: sum(c >= n for c in counts.values()) for n in THRESHOLDS}, top=top,
                frequencies=sorted(Counter(counts.values()).items(), reverse=True))    # captions of a class, and how many classes have as many


def measure_loss(tagged):
    "What our rule leaves out: shares of words by kind, and compounds."
    kinds,unknown,words,with_compound,compounds = Counter(),0,0,0,Counter()
    for sentence in tagged:
        letters = [(w, k) for w,k in sentence if re.search(r'\w', w)]
        words += len(letters)
        for word,kind in letters:
            kinds[KINDS.get(kind[:2], 'articles, pronouns and the rest')] += 1
            unknown += kind[:2] == 'NN' and noun_key(word) is None
        pairs = [f'{a}_{b}' for (a,j),(b,k) in zip(sentence, sentence[1:]) if k[:2] == 'NN' and j[:2] in ('NN', 'JJ', 'VB')]
        found = [lemma for lemma in map(lemmatise, pairs) if lemma]
        compounds.update(found); with_compound += bool(found)
    shares = {k: n/words for k,n in kinds.most_common()} | {'nouns that WordNet does not have': unknown/words}
    top = [c.replace('_', ' ') for c,_ in compounds.most_common(12)]
    singles = {c: ', '.join(map(synset_name, caption_nouns(c))) for c in top[:6]}
    return words, dict(words=shares, compounds=with_compound/len(tagged), top_compounds=top, as_singles=singles)


def captions_of(folder):
    files = sorted(Path(folder).glob('*.parquet'))
    return [c for f in files for row in pq.read_table(f, columns=['captions'])['captions'].to_pylist() for c in row]


def study_rules(folder):
    captions = captions_of(folder)
    noun_tagger()
    start = time.process_time()
    for c in captions: caption_nouns(c)
    speed = len(captions)/(time.process_time() - start)
    tagged = [noun_tagger()(clean_caption(c)) for c in captions]
    rows = [measure_rule(name, rule, tagged) for name,rule in rules().items()]
    words,lost = measure_loss(tagged)
    write_json(RESULTS/'nouns'/'flickr8k.json', dict(data=Path(folder).name, captions=len(captions), words=words, captions_per_second=speed, machine=machine(), rules=rows, lost=lost))
    for row in rows: print({k: v for k,v in row.items() if k not in ('frequencies', 'top')}, [(c['word'], c['name'], c['captions']) for c in row['top'][:15]])
    print(f'{len(captions):,} captions, {speed:,.0f} a second', lost)


STEP = '''
import resource, time, torch
import torch.nn.functional as F
from flip_nb.objectives.nouns import noun_loss
torch.manual_seed(0)
z = torch.zeros({batch_size}, {classes}).normal_().requires_grad_()
labels = torch.randint({classes}, ({batch_size}, {labels}))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
noun_loss(torch.zeros(2, 9, requires_grad=True), torch.zeros(2, 1).long()).backward()
before,start = peak(),time.perf_counter()
if '{name}' == 'dense target':
    target = torch.zeros({batch_size}, {classes}).scatter_(1, labels, 1.)
    size = target.numel()*4
    (F.binary_cross_entropy_with_logits(z, target, reduction='sum')/{batch_size}).backward()
else:
    size = labels.numel()*8
    noun_loss(z, labels).backward()
print(size, peak() - before, time.perf_counter() - start)
'''


def study_memory(classes=24_320, batch_size=4096, labels=4):
    rows = []
    for name in ('dense target', 'numbers of the labels'):
        code = STEP.format(name=name, classes=classes, batch_size=batch_size, labels=labels)
        res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
        target,peak,seconds = map(float, res.stdout.split())
        rows.append(dict(name=name, target_bytes=int(target), peak_bytes=int(peak), seconds=seconds))
        print(rows[-1])
    write_json(RESULTS/'nouns'/'memory.json', dict(classes=classes, batch_size=batch_size, labels=labels, machine=machine(), rows=rows))


if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    (RESULTS/'nouns').mkdir(parents=True, exist_ok=True)
    study_memory() if sys.argv[1] == 'memory' else study_rules(sys.argv[1])
