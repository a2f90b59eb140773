"Objectives through the trainer: resumed, in pieces, streamed, read back, and refused in one sentence."
import json, shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from torchmetrics.classification import MultilabelAveragePrecision

from flip_nb.evaluate import evaluate
from flip_nb.loss import clamped_exp, info_nce, normalize
from flip_nb.model import FLIP, to_float
from flip_nb.objectives.family import Objective, fit_model, split_objective
from flip_nb.objectives.nouns import caption_nouns
from flip_nb.objectives.sigmoid import sigmoid_loss
from flip_nb.objectives.vocabulary import count_nouns
from flip_nb.objectives.words import row_word_loss, word_loss, word_weights
from flip_nb.official.openclip import OpenCLIPModel
from flip_nb.scale.accumulate import cached_backward, split_batch
from flip_nb.scale.checkpoint import checkpoints
from flip_nb.train import train
from small import WORDS, make_pairs, pictures, png, rng, tiny_flip

TEXTS = ['a red dog', 'a blue bird on a tree', 'two dogs', 'a tree and a house', 'very red']
KINDS = 'sigmoid', 'words', 'nouns', 'infonce+words+nouns'
QUIET = dict(steps=6, tune_steps=2, batch_size=4, log_every=2, save_every=2, keep=9, track='none', quiet=True, mixed_precision='no',
             workers=0, threads=1, seed=5)


def data(n=12):
    texts = [TEXTS[i % len(TEXTS)] for i in range(n)]
    return dict(train=make_pairs(captions=texts), test=make_pairs(captions=texts[:6], seed=2))


def run(kind, folder, **changes):
    nouns = dict(min_count=1) if 'nouns' in kind else {}
    return train(dataset=data(), model=tiny_flip(), objective=kind, out=str(folder), **QUIET | nouns | changes)


@pytest.fixture(scope='module', params=KINDS)
def done(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('objective')/'run'
    return request.param, folder, run(request.param, folder)


def losses(folder): return [json.loads(line)['loss'] for line in (folder/'metrics.jsonl').read_text().splitlines()]


def weights(folder): return load_file(folder/'model.safetensors')


def resumed_half_way(folder, half):
    "A copy of a run that was stopped after step 4 and resumed."
    shutil.copytree(folder, half)
    (half/'results.json').unlink()
    for path in checkpoints(half):
        if int(path.name[5:]) > 4: shutil.rmtree(path)
    train(dataset=data(), resume=str(half), quiet=True)
    return half


def test_a_run_resumes_bit_for_bit(done, tmp_path):
    kind,folder,_ = done
    half = resumed_half_way(folder, tmp_path/'run')
    first,second = weights(folder), weights(half)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first), kind
    assert FLIP.from_pretrained(half).labels == FLIP.from_pretrained(folder).labels


def test_pieces_change_nothing(done, tmp_path):
    kind,folder,_ = done
    run(kind, tmp_path/'run', micro_batch=3, loss_chunk=2)
    first,second = losses(folder), losses(tmp_path/'run')    # weights of near-zero gradient differ: AdamW divides by their size
    assert second == pytest.approx(first, rel=1e-3) and second[0] == pytest.approx(first[0], rel=1e-5)


def test_every_part_is_trained_and_saved(done):
    kind,folder,results = done
    flip,start = FLIP.from_pretrained(folder), fit_model(
        tiny_flip(), kind, count_nouns([p for p in TEXTS]*3, progress=False), TEXTS)
    names = split_objective(kind)
    assert set(flip.heads) == set(Objective(names).labels) and flip.config.logit_bias == ('sigmoid' in names)
    assert (flip.text_encoder is not None) == Objective(names).compares == (results['retrieval'] is not None)
    assert {n.split('.')[0] for n,_ in flip.named_parameters()} == {n.split('.')[0] for n,_ in start.named_parameters()}
    lines = [json.loads(line) for line in (folder/'metrics.jsonl').read_text().splitlines()]
    assert all((line['logit_scale'] is None) == (flip.text_encoder is None) for line in lines)
    if kind == 'nouns': assert results['nouns']['labels'] == len(flip.labels['nouns']) and 0 < results['nouns']['mAP'] <= 1


def test_an_averaged_run_resumes_bit_for_bit_and_publishes_the_average(tmp_path):
    folder,half = tmp_path/'run',tmp_path/'half'
    run('infonce', folder, ema=.3)
    plain = tmp_path/'plain'
    run('infonce', plain)
    assert losses(folder) == losses(plain)    # the average only follows
    average,last = weights(folder)['image_proj.weight'],weights(plain)['image_proj.weight']
    state = torch.load(checkpoints(folder)[-1]/'state.pt', weights_only=True)['training']['model']['image_proj.weight']
    assert torch.equal(state, last) and not torch.equal(average, last)
    resumed_half_way(folder, half)
    first,second = weights(folder),weights(half)
    assert all(torch.equal(first[k], second[k]) for k in first) and losses(half) == losses(folder)
    assert json.loads((half/'results.json').read_text())['retrieval'] == json.loads((folder/'results.json').read_text())['retrieval']


def test_a_recipe_of_catlip_trains_on_nouns(tmp_path):
    few = {k: v for k,v in QUIET.items() if k not in ('steps', 'tune_steps')}
    train(dataset=data(), model=tiny_flip(), recipe='catlip-b16-cc3m', preset=None, epochs=2, min_count=1, out=str(tmp_path/'run'), **few)
    config = json.loads((tmp_path/'run'/'train_config.json').read_text())
    wanted = dict(objective='nouns', mask_ratio=0., lr=2e-3, final_lr=.01, beta2=.999, ema=5e-4, grad_clip=1., steps=6, tune_steps=0, min_count=1)
    assert {k: config[k] for k in wanted} == wanted
    lines = [json.loads(line) for line in (tmp_path/'run'/'metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['lr'] == pytest.approx(2e-5)    # not zero
    assert FLIP.from_pretrained(tmp_path/'run').text_encoder is None


def test_a_run_from_before_these_options_existed_resumes(tmp_path):
    folder = tmp_path/'run'
    run('infonce', folder)
    (folder/'results.json').unlink()
    shutil.rmtree(checkpoints(folder)[-1])
    stored = json.loads((folder/'train_config.json').read_text())
    for name in ('objective', 'nouns', 'min_count', 'ema', 'beta2', 'final_lr'): stored.pop(name)
    (folder/'train_config.json').write_text(json.dumps(stored))
    before = weights(folder)
    train(dataset=data(), resume=str(folder), quiet=True)
    after = weights(folder)
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize('kind', ('sigmoid', 'infonce+words+nouns', 'nouns'))
def test_a_stream_gives_every_objective(kind, tmp_path):
    texts = [TEXTS[i % len(TEXTS)] for i in range(24)]
    (tmp_path/'data').mkdir()
    for split,part in (('train-0', texts[:10]), ('train-1', texts[10:18]), ('test-0', texts[18:])):
        rows = [dict(image=dict(bytes=png(x), path=None), caption=c) for x,c in zip(pictures(len(part), len(part)), part)]
        Dataset.from_list(rows).to_parquet(tmp_path/'data'/f'{split}.parquet')
    nouns = dict(min_count=1) if 'nouns' in kind else {}
    train(model=tiny_flip(), data=str(tmp_path/'data'), stream=True, objective=kind, out=str(tmp_path/'run'), no_flip=True, buffer_size=4, **QUIET | nouns)
    flip = FLIP.from_pretrained(tmp_path/'run')
    assert all(torch.isfinite(torch.tensor(losses(tmp_path/'run')))) and len(losses(tmp_path/'run')) == 4
    if 'nouns' in kind: assert {'n02084071', 'n01503061'} <= set(flip.labels['nouns'])    # dog and bird
    given = dict(data=str(tmp_path/'data'), tasks=['nouns'], threads=1, quiet=True)
    if 'nouns' not in kind:
        with pytest.raises(ValueError, match='the task nouns needs a model that learned nouns'): evaluate(str(tmp_path/'run'), **given)
        return
    row, = evaluate(str(tmp_path/'run'), **given)['rows']
    z,answers = flip.image_encoder(to_float(pictures(6, 6))).detach(),torch.zeros(6, len(flip.labels['nouns']))
    for y,c in zip(answers, texts[18:]): y[[flip.labels['nouns'].index(n) for n in caption_nouns(c)]] = 1
    seen = answers.any(0)
    wanted = MultilabelAveragePrecision(int(seen.sum()), average='macro')(flip.heads['nouns'](z)[:, seen].sigmoid(), answers[:, seen].long())
    assert row['score'] == pytest.approx(wanted.item(), rel=1e-5) and row['n'] == int(seen.sum())
    if 'words' in kind: assert len(flip.labels['words']) == flip.config.vocab_size

def test_what_a_model_of_labels_cannot_do_is_said(done, tmp_path):
    kind,folder,_ = done
    flip = FLIP.from_pretrained(folder)
    if flip.text_encoder is not None:
        model = OpenCLIPModel(flip, output_dict=True)
        out = model(torch.zeros(1, 3, 16, 16), torch.zeros(1, 8, dtype=torch.long))
        assert ('logit_bias' in out) == (kind == 'sigmoid')
        return
    with pytest.raises(ValueError, match='no text tower'): flip.encode_text(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match='has no text tower'): OpenCLIPModel(flip)
    with pytest.raises(ValueError, match='robustness needs a text tower, but .* learned .* alone; choose --tasks zero_shot'):
        evaluate(str(folder), data='scenes', tasks='robustness', limit=8, out=str(tmp_path/'scores'), quiet=True)


@pytest.mark.parametrize('options,message', [
    (dict(objective='noun'), "--objective noun: there is no objective 'noun'. Did you mean 'nouns'"),
    (dict(objective='infonce+sigmoid'), 'choose one of them'),
    (dict(objective='words', min_count=3), '--min_count 3 is for the objective nouns: give --objective nouns or words[+]nouns'),
    (dict(nouns='x.parquet'), '--nouns .*x.parquet is for the objective nouns'),
    (dict(objective='nouns', nouns='x.parquet', min_count=2), 'leave it away, or --nouns'),
    (dict(objective='nouns', text_mask_ratio=.5), '--text_mask_ratio 0.5 masks the input of the text tower'),
    (dict(objective='nouns', nouns='missing.parquet'), "no file .*missing.parquet"),
    (dict(objective='nouns', min_count=1000), 'Choose a smaller --min_count')])
def test_options_that_do_not_go_together(options, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace('--', '-?-?')):
        train(dataset=data(), model=tiny_flip(), out=str(tmp_path/'run'), **QUIET | options)


def test_captions_without_a_noun_are_refused(tmp_path):
    texts = dict(train=make_pairs(captions=['very red']*8), test=make_pairs(captions=['so blue']*4))
    with pytest.raises(ValueError, match='none of the 8 captions has a noun'):
        train(dataset=texts, model=tiny_flip(), objective='nouns', out=str(tmp_path/'run'), **QUIET)


def test_a_vocabulary_of_another_run_is_refused(tmp_path):
    run('nouns', tmp_path/'first')
    count_nouns(['a cat', 'a cow'], progress=False).save(tmp_path/'other.parquet')
    with pytest.raises(ValueError, match='nouns of another vocabulary .*leave --nouns away'):
        train(dataset=data(), model=FLIP.from_pretrained(tmp_path/'first'), objective='nouns', nouns=str(tmp_path/'other.parquet'),
              out=str(tmp_path/'second'), **QUIET)


class Worded(nn.Module):
    "FLIP with a bias and a layer for the words; the losses of the rows come as a table with one column."
    def __init__(self):
        super().__init__()
        self.flip = tiny_flip().double()
        self.words = nn.Linear(16, self.flip.config.vocab_size).double()
        self.bias = nn.Parameter(torch.tensor([-3.]).double())
        self.weights = word_weights(WORDS, self.flip.tokenizer).double()

    def forward(self, images, ids, mask_ratio):
        feature = self.flip.image_encoder(images, mask_ratio)
        v,t = normalize(self.flip.image_proj(feature)),self.flip.encode_text(ids, mask_ratio)
        rows = row_word_loss(self.words(feature), ids, self.weights)
        return v, t, clamped_exp(self.flip.logit_scale), self.bias, rows[:, None]


def both(v, t, scale, bias, rows): return sigmoid_loss(v, t, scale, bias) + info_nce(v, t, scale) + rows.mean()


def gradients(model, way):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    value = way(model)
    return value.detach(), {n: p.grad.clone() for n,p in model.named_parameters()}


@pytest.mark.parametrize('part', (1, 4, 5, 11))
def test_words_and_contrast_in_parts_are_one_graph(part):
    model,texts = Worded(),[WORDS[i % len(WORDS)] for i in range(10)] + ['']
    batch = dict(images=torch.randn(11, 3, 16, 16, generator=rng()).double(), ids=model.flip.tokenizer(texts), mask_ratio=.5)
    parts = split_batch(batch, part)
    def one_graph(model):
        out = list(zip(*(model(**p) for p in parts)))
        value = both(*(torch.cat(out[i]) if i in (0, 1, 4) else out[i][0] for i in range(5)))
        value.backward()
        return value
    truth,wanted = gradients(model, one_graph)
    value,found = gradients(model, lambda m: cached_backward(m, parts, both))
    torch.testing.assert_close(value, truth, rtol=0, atol=1e-12)
    assert found.keys() == wanted.keys() and wanted['words.weight'].norm() > .01 and wanted['bias'].norm() > .01
    for n,g in wanted.items(): torch.testing.assert_close(found[n], g, rtol=0, atol=1e-12)


def test_words_alone_in_parts_are_plainly_added():
    flip = tiny_flip()
    weights,ids = word_weights(WORDS, flip.tokenizer),flip.tokenizer(WORDS[:4] + ['', 'zzz'])
    logits = torch.randn(6, len(weights), generator=rng()).double().requires_grad_()
    whole, = torch.autograd.grad(word_loss(logits, ids, weights), logits)
    parts = sum(word_loss(z, i, weights)*len(i)/6 for z,i in zip(logits.split(4), ids.split(4)))
    torch.testing.assert_close(torch.autograd.grad(parts, logits)[0], whole, rtol=0, atol=1e-15)
