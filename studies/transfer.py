"""What is Transfer Init worth? A classifier of nouns learns Flickr8k's captions and starts a classifier of CIFAR-10, with 1, 5, 10 and 100% of the labels.

    python studies/transfer.py ../shared/data/flickr8k_64 ../shared/data/cifar10 MODELS                # results/transfer/seed0.json ...; half an hour of one core
    python studies/transfer.py ../shared/data/flickr8k_64 ../shared/data/cifar10 MODELS --seeds 1      # one seed of three

MODELS gets the trained models. Whatever is stored or trained is not made again, and a run that was stopped is resumed (the
time of the part that was stopped is not counted). Each seed has two models of its own, which trained for the
same processor time (nouns, and InfoNCE for the zero-shot accuracy beside it), and 5,000 labelled images of its own; the test images are
the same. Heads start from the rows of the nearest nouns, as `flip_nb.finetune` takes them; from the same without the prior (the log-odds
of the nouns' frequencies, subtracted from their biases); from the nearest nouns that 50 captions have at least, also without the prior; from
zeros; and at random, as PyTorch does. All learn in a linear probe by gradient descent on features that were extracted once (always 30 epochs,
as in the paper's table 7), three of them in full fine-tuning too (`flip_nb.finetune`, always the same number of steps). Nothing was tuned:
learning rates are those of other studies, of the package and of the paper.
"""
import json
import tempfile
import time
from pathlib import Path
import datasets
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from fastcore.script import call_parse
from masking_pays import RESULTS, machine
from torch import nn
from flip_nb.data.pairs import Collate
from flip_nb.evaluation.datasets import open_test_set
from flip_nb.evaluation.features import FeatureKind, class_numbers, extract_features
from flip_nb.evaluation.probe import linear_probe
from flip_nb.evaluation.scores import name_classifier
from flip_nb.files import write_json
from flip_nb.finetune import finetune
from flip_nb.loop import Stage
from flip_nb.model import FLIP, preset_config
from flip_nb.objectives.family import fit_model, objective_loss, objective_of
from flip_nb.objectives.transfer import match_classes, transfer_rows
from flip_nb.objectives.vocabulary import NounVocabulary, count_nouns
from flip_nb.objectives.wordnet import synset_name
from flip_nb.scale.config import TrainConfig, resolve
from flip_nb.scale.loader import make_loader, open_train_data
from flip_nb.scale.options import build
from flip_nb.text import CaptionTokenizer
from flip_nb.train import train

KINDS = 'nouns', 'infonce'
SIZES = dict(preset='mini', patch_size=16, text_width=96)
TRAINING = dict(mask_ratio=.5, batch_size=32, lr=1e-3, threads=1, mixed_precision='no', quiet=True)
SHARES,LABELLED,TEST = (.01, .05, .1, 1.),5000,2000
TUNING = dict(steps=50, batch_size=32, lr=3e-3, drop_path=.1, label_smoothing=.1, weight_decay=.05, layer_decay=.75, threads=1, mixed_precision='no', quiet=True)
PROBE = dict(epochs=30, batch_size=256, lrs=(3e-5, 1e-3, 3e-2), last=1/30)    # the paper's, the package's 1e-3 x batch/256, and a large one
STRENGTHS = [.1, 1., 10., 100.]
MIN_COUNT,FREQUENT = 5,50    # captions that a noun needs


def new_model(captions, seed):
    "A small model with the vocabulary of the captions."
    tokenizer = CaptionTokenizer.train(captions, 4096)
    torch.manual_seed(seed)
    flip = FLIP.from_preset(SIZES['preset'], vocab_size=tokenizer.vocab_size, **{k: v for k,v in SIZES.items() if k != 'preset'})
    flip.tokenizer = tokenizer
    return flip


def step_seconds(data, captions, vocabulary, rounds=6):
    "Processor seconds of a step of each kind, masked and not, reading included; all take turns."
    runs,found = {},{kind: {.5: [], 0.: []} for kind in KINDS}
    for kind in KINDS:
        model = fit_model(new_model(captions, 0), kind, vocabulary).train()
        collate = Collate(model.tokenizer, nouns=vocabulary.encode if kind == 'nouns' else None)
        loader = make_loader(Accelerator(cpu=True), data.train, collate, TRAINING['batch_size'], 0, {}, range(2*rounds + 2))
        runs[kind] = model,objective_of(model, (kind,)),torch.optim.AdamW(model.parameters(), lr=0., fused=True),iter(loader)
    for _ in range(rounds + 1):
        for kind,(model,objective,optimizer,batches) in runs.items():
            for ratio,seconds in found[kind].items():
                start = time.process_time()
                objective_loss(model, next(batches), Stage('timed', 1, ratio, 0., 0), objective).backward()
                optimizer.step(); optimizer.zero_grad()
                seconds.append(time.process_time() - start)
    return {kind: {'masked' if ratio else 'whole': sorted(s[1:])[rounds//2] for ratio,s in of.items()} for kind,of in found.items()}


def pretrain(data, captions, kind, seed, steps, out, nouns):
    "Train, or resume a run that was stopped."
    if (out/'results.json').exists(): return
    if (out/'train_config.json').exists(): return train(resume=str(out), threads=1, quiet=True)
    given = dict(data=data, objective=kind, seed=seed, eval_size=50, out=str(out)) | (dict(nouns=str(nouns)) if kind == 'nouns' else {})
    train(model=new_model(captions, seed), **given, **steps, **TRAINING)


def write_sets(source, seed, folder):
    "CIFAR-10 with a share of the labels; the classes take turns, so each share is balanced and begins the next one."
    def turns(split, n, first=0):
        table = pq.read_table(Path(source)/f'{split}.parquet')
        labels = torch.tensor(table['label'].to_pylist())
        per = n//10
        rows = torch.stack([(labels == c).nonzero()[first:first + per, 0] for c in range(10)], 1)    # (rows of a class, classes)
        return table.take(rows.flatten().tolist())
    labelled,test = turns('train', LABELLED, seed*LABELLED//10),turns('test', TEST)
    for share in SHARES:
        (place := folder/f'{share:g}').mkdir(parents=True)
        pq.write_table(labelled.slice(0, int(share*LABELLED)), place/'train.parquet')
        pq.write_table(test, place/'test.parquet')


def features_of(flip, data, splits, **kw):
    "Features and labels of whole images."
    found = {s: extract_features(flip, data.splits[s], quiet=True, **kw) for s in splits}
    return [t for s,f in found.items() for t in (f.features.clone(), class_numbers(data.splits[s], f.rows))]


def answers(scores, labels):
    "Accuracy, recall of each class, and how often each class is the answer."
    said,C = scores.argmax(1),scores.shape[1]
    return dict(accuracy=(said == labels).double().mean().item(), recall=[(said[labels == c] == c).double().mean().item() for c in range(C)],
                answers=[(said == c).double().mean().item() for c in range(C)])


def gradient_probe(start, x, y, tx, ty, lr, seed):
    "The head learns by AdamW with a cosine, from its start; the features stay."
    head = nn.Linear(x.shape[1], len(start[1]))
    with torch.no_grad(): head.weight.copy_(start[0]); head.bias.copy_(start[1])
    size = min(PROBE['batch_size'], len(x))
    steps,gen = PROBE['epochs']*(len(x)//size),torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, lr*PROBE['last'])
    before = answers(head(tx), ty)['accuracy']
    for _ in range(PROBE['epochs']):
        for rows in torch.randperm(len(x), generator=gen).split(size)[:len(x)//size]:
            F.cross_entropy(head(x[rows]), y[rows]).backward()
            optimizer.step(); optimizer.zero_grad(); schedule.step()
    return dict(steps=steps, before=before, accuracy=answers(head(tx), ty)['accuracy'])


def converged(x, y, tx, ty):
    "The convex probe, which forgets its start; a quarter of the rows chooses its strength."
    k = len(x)*3//4
    found = linear_probe(x[:k], y[:k], x[k:], y[k:], tx, ty, strengths=STRENGTHS)
    return dict(accuracy=found['accuracy'], strength=found['strength'])


def starts(flip, fair, vocabulary, names, seed):
    "Heads to begin with."
    def rows(flip, n=1): return transfer_rows(flip.heads['nouns'].weight, flip.heads['nouns'].bias, match_classes(names, vocabulary.cut(n)))    # the most frequent come first
    D,C = flip.image_encoder.embed_dim,len(names)
    torch.manual_seed(seed)
    return dict(nouns=rows(flip), nouns_without_prior=rows(fair), frequent_without_prior=rows(fair, FREQUENT), zeros=(torch.zeros(C, D), torch.zeros(C)), random=[p.detach() for p in nn.Linear(D, C).parameters()])


def load_models(run, vocabulary):
    "The model of nouns, and the same without the prior."
    flip,fair = FLIP.from_pretrained(run),FLIP.from_pretrained(run)
    assert flip.labels['nouns'] == vocabulary.keys
    with torch.no_grad(): fair.heads['nouns'].bias -= vocabulary.log_odds()
    return flip,fair


def probe_rows(run, vocabulary, folder, seed):
    "Zero-shot with nouns, and the probes."
    flip,fair = load_models(run, vocabulary)
    data = open_test_set(str(folder/'1'), flip.config.image_size)
    x,y,tx,ty = features_of(flip, data, ('train', 'test'))
    heads,score = starts(flip, fair, vocabulary, data.class_names, seed),lambda model: name_classifier(model, None, data.class_names, [])(tx).detach()
    W,b = heads['frequent_without_prior']
    for start,scores in dict(nouns=score(flip), nouns_without_prior=score(fair), frequent_without_prior=tx @ W.T + b).items():
        yield dict(way='zero_shot', start=start, share=0.) | answers(scores, ty)
    for share in SHARES:
        n = int(share*LABELLED)
        yield dict(way='converged', start='any', share=share) | converged(x[:n], y[:n], tx, ty)
        for start,head in heads.items():
            for lr in PROBE['lrs']: yield dict(way='probe', start=start, share=share, lr=lr) | gradient_probe(head, x[:n], y[:n], tx, ty, lr, seed)


def tuning_rows(run, vocabulary, folder, seed, done):
    "Full fine-tuning, as far as it is not stored."
    load_models(run, vocabulary)[1].save_pretrained(folder/'fair')
    for start,begin,head in (('nouns_without_prior', folder/'fair', 'zero_shot'), ('zeros', run, 'zeros'), ('nouns', run, 'zero_shot')):
        for share in SHARES:
            if ('finetuning', start, share) in done: continue
            r = finetune(str(begin), str(folder/f'{share:g}'), head=head, seed=seed, out=str(folder/f'{share:g}-{start}'), **TUNING)
            yield dict(way='finetuning', start=start, share=share, steps=TUNING['steps'], before=r['before']['top_1'], accuracy=r['after']['top_1'])


def infonce_rows(run, folder):
    "Zero-shot with prompts."
    flip = FLIP.from_pretrained(run)
    data = open_test_set(str(folder/'1'), flip.config.image_size)
    tx,ty = features_of(flip, data, ('test',), kind=FeatureKind(projected=True))
    yield dict(way='zero_shot', start='infonce', share=0.) | answers(name_classifier(flip, flip.tokenizer, data.class_names, data.templates)(tx).detach(), ty)


def matched(names, vocabulary):
    "What the classes start from."
    return [dict(name=m.name, similarity=m.similarity, nouns={synset_name(vocabulary.keys[i]): vocabulary.counts[i] for i in m.classes}) for m in match_classes(names, vocabulary)]


@call_parse
def main(
    data:str, # Folder of pairs to learn from
    labelled:str, # Folder of CIFAR-10
    models:str, # Folder that gets the trained models
    seeds:str='0,1,2', # With commas
    seconds:float=100., # Processor time of the training of a model
):
    "Train, transfer, and store what came out."
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    models = Path(models)
    for folder in (models, RESULTS/'transfer'): folder.mkdir(parents=True, exist_ok=True)
    opened = open_train_data(resolve(build(TrainConfig, dict(data=data, quiet=True))), preset_config(SIZES['preset']).image_size)
    captions,nouns = list(opened.captions()),models/'nouns.parquet'
    start = time.process_time()
    if not nouns.exists(): count_nouns(captions, progress=False).cut(MIN_COUNT).save(nouns)
    vocabulary = NounVocabulary.load(nouns)
    if not (times := models/'step_seconds.json').exists(): write_json(times, step_seconds(opened, captions, vocabulary))
    speed = json.loads(times.read_text())
    names = json.loads((Path(labelled)/'classes.json').read_text())['classes']
    classes = {n: matched(names, vocabulary.cut(n)) for n in (MIN_COUNT, FREQUENT)}
    once = time.process_time() - start
    steps = {kind: dict(steps=int(.9*seconds/s['masked']), tune_steps=int(.1*seconds/s['whole'])) for kind,s in speed.items()}
    about = dict(data=Path(data).name, labelled=Path(labelled).name, sizes=SIZES, training=TRAINING | dict(seconds=seconds), steps=steps, step_seconds=speed,
                 tuning=TUNING, probe=PROBE, strengths=STRENGTHS, labelled_rows=LABELLED, test_rows=TEST, classes=classes, machine=machine(), threads=1,
                 vocabulary=dict(nouns=len(vocabulary), captions=vocabulary.captions, min_count=MIN_COUNT), once_cpu_seconds=once)
    for part in ('probe', 'finetuning', 'infonce'):
        for seed in map(int, seeds.split(',')):
            path,kind = RESULTS/'transfer'/f'seed{seed}.json','infonce' if part == 'infonce' else 'nouns'
            record = about | dict(seed=seed, wall_seconds=0., cpu_seconds=0., rows=[])
            if path.exists(): record = json.loads(path.read_text())
            done = {(r['way'], r['start'], r['share']) for r in record['rows']}
            wanted = dict(probe={('zero_shot', 'nouns', 0.)}, infonce={('zero_shot', 'infonce', 0.)}, finetuning={('finetuning', s, share) for s in ('nouns', 'nouns_without_prior', 'zeros') for share in SHARES})
            if wanted[part] <= done: continue
            wall,cpu,run = time.perf_counter(),time.process_time(),models/f'{kind}-seed{seed}'
            with tempfile.TemporaryDirectory() as tmp:
                datasets.config.HF_DATASETS_CACHE = Path(tmp)/'cache'
                pretrain(data, captions, kind, seed, steps[kind], run, nouns)
                write_sets(labelled, seed, tmp := Path(tmp)/'sets')
                found = dict(probe=lambda: probe_rows(run, vocabulary, tmp, seed), finetuning=lambda: tuning_rows(run, vocabulary, tmp, seed, done), infonce=lambda: infonce_rows(run, tmp))[part]()
                for row in found if part == 'finetuning' else [list(found)]:
                    rows = [row] if isinstance(row, dict) else row
                    now = time.perf_counter(),time.process_time()
                    record['rows'] += [dict(seed=seed) | r for r in rows]
                    record |= dict(wall_seconds=record['wall_seconds'] + now[0] - wall, cpu_seconds=record['cpu_seconds'] + now[1] - cpu)
                    wall,cpu = now
                    write_json(path, record)
                    print(seed, part, {k: v for k,v in rows[-1].items() if k not in ('recall', 'answers')}, f"{record['cpu_seconds']:.0f}", flush=True)
