"Small things that several files of tests make: a model of a few thousand weights, images, pairs."
import io, signal

import numpy as np
import torch
from PIL import Image

from flip_nb.data.pairs import Pairs
from flip_nb.loss import normalize
from flip_nb.model import FLIP, FLIPConfig
from flip_nb.text import CaptionTokenizer

WORDS = ['red ball', 'blue box', 'a green cone', 'two grey cubes on a table', 'one black ring', 'white']


def rng(seed=0): return torch.Generator().manual_seed(seed)


def tiny_flip(seed=0, **changes):
    "A model of a few thousand weights, with a tokenizer."
    torch.manual_seed(seed)
    tokenizer = CaptionTokenizer.train(WORDS, 96, context_length=8)
    sizes = dict(image_size=16, patch_size=4, image_width=16, image_depth=1, image_heads=2, text_width=16, text_depth=1,
                 text_heads=2, embed_dim=8, context_length=8, vocab_size=tokenizer.vocab_size)
    flip = FLIP(FLIPConfig(**sizes | changes))
    flip.tokenizer = tokenizer
    return flip


def pictures(n, seed=0, side=16): return torch.randint(0, 256, (n, 3, side, side), generator=rng(seed), dtype=torch.uint8)


def png(image):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file := io.BytesIO(), 'png')
    return file.getvalue()


def as_tensor(image): return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1).contiguous()


def unit(n, e=6, seed=0): return normalize(torch.randn(n, e, generator=rng(seed)))


def make_pairs(n=12, captions=None, label_names=None, seed=0):
    "Rows of a PNG and a caption, or a class number."
    texts = captions if captions is not None else [WORDS[i % len(WORDS)] for i in range(n)]
    rows = [dict(image=png(x), caption=c) for x,c in zip(pictures(len(texts), seed), texts)]
    return Pairs(rows, 'image', 'caption', as_tensor, label_names)


class Listed(torch.utils.data.Dataset):
    "Pairs that draw nothing at random."
    def __init__(self, n, seed=0, side=16):
        self.images,self.captions_ = pictures(n, seed, side),[WORDS[i % len(WORDS)] for i in range(n)]

    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.images[i], self.captions_[i], []


def ignores_signals(worker_init):
    "Whether a worker that begins with this function is left alone by the signals that end a run."
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for s in before: signal.signal(s, signal.SIG_DFL)
        worker_init(0)
        return all(signal.getsignal(s) == signal.SIG_IGN for s in before)
    finally:
        for s,handler in before.items(): signal.signal(s, handler)
