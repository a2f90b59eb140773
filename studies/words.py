"""Words as labels beside InfoNCE, alone and together, at two batch sizes: the same pairs, three seeds, on scenes.

    python studies/words.py            # results/words/scenes.json

A small model (patches of 8 pixels), half of the patches dropped. Every run sees the same number of pairs, so a smaller
batch takes more steps. What is stored: nearest-neighbour and zero-shot accuracy, and the seconds of a step, measured
in turns. Rates are the same for the three ways and were not tuned for any.
"""
import json
import statistics
import time
from pathlib import Path
import torch
from fastcore.script import call_parse
from torch import nn
from masking_pays import RESULTS, machine
from flip_nb.files import write_json
from flip_nb.loop import parameter_groups, warmup_cosine
from flip_nb.loss import info_nce, normalize
from flip_nb.model import FLIP, to_float
from flip_nb.objectives.words import word_loss, word_scores, word_weights
from flip_nb.scenes import Scenes
from flip_nb.text import CaptionTokenizer
from flip_nb.zero_shot import SCENE_NAMES, SCENE_TEMPLATES, top_k_accuracy, zero_shot_classifier

WAYS = ('infonce', 'words', 'infonce+words')
SIZES = dict(patch_size=8, image_width=64, image_depth=2, image_heads=2, text_width=64, embed_dim=64)

def new_model(seed, vocab_size):
    "Both towers, and the linear layer for the words."
    torch.manual_seed(seed)
    flip = FLIP.from_preset('tiny', vocab_size=vocab_size, **SIZES)
    flip.words = nn.Linear(flip.image_encoder.embed_dim, vocab_size)
    return flip

def loss_of(way, flip, images, ids, weights, ratio=.5):
    "The image is encoded once; the text only where InfoNCE asks for it."
    feature = flip.image_encoder(to_float(images), ratio)
    loss = 0.
    if 'infonce' in way:
        loss = info_nce(normalize(flip.image_proj(feature)), flip.encode_text(ids), flip.logit_scale.clamp(0, 4.6).exp())
    if 'words' in way: loss = loss + word_loss(flip.words(feature), ids, weights)
    return loss

def train(way, batch_size, seed, data, weights, lr):
    "One pass over the pairs in an order of its own."
    images,ids = data
    flip = new_model(seed, len(weights))
    steps = len(images)//batch_size
    optimizer = torch.optim.AdamW(parameter_groups(flip), lr=lr, betas=(.9, .95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: warmup_cosine(k, steps//10, steps))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for rows in order.split(batch_size)[:steps]:
        batch = ids[rows]
        loss_of(way, flip, images[rows], batch[:, :int((batch != 0).sum(1).max())], weights).backward()
        optimizer.step(); optimizer.zero_grad(); schedule.step()
    return flip

@torch.no_grad()
def evaluate(way, flip, tokenizer, weights, gallery, queries, k=10):
    "Accuracy over the eighty names: nearest neighbours among labelled images, and each way of zero-shot that there is."
    flip.eval(); flip.tokenizer = tokenizer
    encode = lambda images: torch.cat([flip.image_encoder(to_float(x)) for x in images.split(256)])
    known,asked = encode(gallery[0]),encode(queries[0])
    near = (normalize(asked) @ normalize(known).T).topk(k).indices
    votes = nn.functional.one_hot(gallery[1][near], len(SCENE_NAMES)).sum(1)
    scores = dict(knn=top_k_accuracy(votes.float(), queries[1]))
    if 'infonce' in way:
        names = zero_shot_classifier(flip, tokenizer, SCENE_NAMES, SCENE_TEMPLATES)
        scores['zero_shot_text'] = top_k_accuracy(normalize(flip.image_proj(asked)) @ names.T, queries[1])
    if 'words' in way:
        scores['zero_shot_words'] = top_k_accuracy(word_scores(flip.words(asked), tokenizer(SCENE_NAMES), weights), queries[1])
    return scores

def step_seconds(data, weights, batch_size, rounds=7):
    "Median seconds of forward and backward pass for each way, taking turns."
    flip,times = new_model(0, len(weights)),{way: [] for way in WAYS}
    for k in range(rounds + 1):
        for way in WAYS:
            start = time.perf_counter()
            loss_of(way, flip, data[0][:batch_size], data[1][:batch_size], weights).backward()
            if k: times[way].append(time.perf_counter() - start)
    return {way: statistics.median(t) for way,t in times.items()}

@call_parse
def main(
    pairs:int=10_240, # Pairs that each run sees
    seeds:int=3, # Runs of each kind
    queries:int=1000, # Images that are classified
):
    "Train all ways, evaluate, and store the scores."
    torch.set_num_threads(1)
    begun,rows = time.perf_counter(),[]
    images,captions,_ = Scenes('train', 32).batch(range(pairs))
    tokenizer = CaptionTokenizer.train(captions, 300)
    ids,weights = tokenizer(captions),word_weights(captions, tokenizer)
    (gallery,_,labels),(asked,_,answers) = (Scenes(split, 32, num_objects=1).batch(range(10**6 - n, 10**6))
                                            for split,n in (('train', 2000), ('val', queries)))
    for seed in range(seeds):
        for batch_size,lr in ((16, 1e-3), (128, 2e-3)):
            for way in WAYS:
                start,cpu = time.perf_counter(),time.process_time()
                flip = train(way, batch_size, seed, (images, ids), weights, lr)
                seconds = dict(wall_seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
                scores = evaluate(way, flip, tokenizer, weights, (gallery, labels), (asked, answers))
                rows.append(dict(way=way, batch_size=batch_size, lr=lr, seed=seed, **scores, **seconds))
                print(rows[-1], flush=True)
    config = dict(pairs=pairs, mask_ratio=.5, preset='tiny', queries=queries, gallery=2000, vocab_size=len(weights), **SIZES)
    (RESULTS/'words').mkdir(parents=True, exist_ok=True)
    write_json(RESULTS/'words'/'scenes.json', dict(config=config, machine=machine(), threads=1, wall_seconds=time.perf_counter() - begun,
               step_seconds={n: step_seconds((images, ids), weights, n) for n in (16, 128)}, rows=rows))
