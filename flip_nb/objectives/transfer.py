import torch
from .wordnet import load_wordnet, synset_key, lemmatise
def match_classes(names, keys):
    out=[]
    for n in names:
        w=lemmatise(n.lower().split()[-1]); k=w and synset_key(load_wordnet().first_sense[w])
        out.append([keys.index(k)] if k in keys else [])
    return out
def noun_logits(logits, matches):
    cols=[logits[:,m].mean(1) if m else torch.full((len(logits),),-torch.inf) for m in matches]
    return torch.stack(cols,1)
