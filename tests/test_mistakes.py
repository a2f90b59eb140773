"""Small, direct tests of what would go wrong in silence: a seed that is dropped, a rate one step early, a wrong split.

Each makes its own tiny input, and compares with numbers worked out by hand or by a plain loop.
"""
import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from small import WORDS, pictures, rng, tiny_flip, unit
from torch import nn

from flip_nb import zero_shot
from flip_nb.loop import (
    Stage, Step, contrastive_loss, diagnose, encode_batch, grad_norms, guarded_step, loss_backward, make_optimizer,
    plan_stages, scaled_lr, towers, training_steps, warmup_cosine)
from flip_nb.loss import INIT_LOGIT_SCALE, clamped_exp, info_nce, normalize, row_cross_entropy
from flip_nb.masking import encoder_flops, num_kept, patchify, random_mask, restore, unpatchify
from flip_nb.model import to_float
from flip_nb.zero_shot import (
    average_prompts, encode_captions, encode_images, evaluating, ranks, retrieval_chance, retrieval_ranks, retrieval_recall,
    standard_error, top_k_accuracy, zero_shot_classifier)


@pytest.fixture(scope='module')
def cpu(): return Accelerator(cpu=True)


# ---------------------------------------------------------------------------------------------------- masks and loss

def test_patches_are_cut_row_by_row_with_channels_first():
    x = torch.arange(2*3*4*6).view(2, 3, 4, 6)
    p = patchify(x, 2)
    assert p.shape == (2, 6, 12)
    assert p[1, 4].tolist() == x[1, :, 2:4, 2:4].flatten().tolist()              # second row, second column
    assert torch.equal(unpatchify(p, 2, (4, 6)), x)


@pytest.mark.parametrize('n,ratio,kept', [(10, .3, 7), (49, .5, 24), (196, .75, 49), (4, .99, 1), (64, 0., 64), (5, .3, 3), (20, .9, 2)])
def test_number_of_kept_tokens(n, ratio, kept): assert num_kept(n, ratio) == kept


def test_mask_keeps_the_smallest_noise_and_a_bias_drops_sooner():
    x,noise = torch.arange(8.).view(2, 4, 1),torch.tensor([[.4, .1, .3, .2], [.1, .9, .8, .7]])
    kept,ids = random_mask(x, .5, noise)
    assert ids.tolist() == [[1, 3], [0, 3]] and kept[..., 0].tolist() == [[1., 3.], [4., 7.]]
    assert random_mask(x, .5, noise, bias=torch.tensor([0., 1., 0., 0.]))[1].tolist() == [[3, 2], [0, 3]]
    assert restore(kept, ids, 4, fill=-1.)[..., 0].tolist() == [[-1., 1., -1., 3.], [4., -1., -1., 7.]]


def test_each_sample_has_a_mask_of_its_own_from_the_given_generator():
    x = torch.zeros(64, 16, 1)
    ids = random_mask(x, .5, generator=rng(1))[1]
    assert torch.equal(ids, random_mask(x, .5, generator=rng(1))[1])
    assert len({tuple(sorted(row)) for row in ids.tolist()}) > 60
    counts = ids.flatten().bincount(minlength=16)                                # no place is favoured
    assert counts.min() > 16 and counts.max() < 48


def test_flops_of_an_encoder():
    got = encoder_flops(10, 8, 3, 2.)
    assert got == dict(linear=3*2*10*64*8, attention=3*4*100*8, total=3*2*10*64*8 + 3*4*100*8)


def plain_nce(v, t, scale):
    logits = (scale*v @ t.T).double()
    rows = [logits[i].logsumexp(0) - logits[i, i] for i in range(len(v))]
    columns = [logits[:, i].logsumexp(0) - logits[i, i] for i in range(len(v))]
    return (sum(rows) + sum(columns))/(2*len(v))


@pytest.mark.parametrize('chunk', [None, 2, 3, 100])
def test_loss_asks_in_both_directions(chunk):
    v,t,scale = unit(5),unit(5, seed=1),torch.tensor(7.)
    v[1] = v[0]                                                                  # rows and columns differ
    assert torch.isclose(info_nce(v, t, scale, chunk).double(), plain_nce(v, t, scale), atol=1e-5)
    one_way = row_cross_entropy(v, t, scale)
    assert not torch.isclose(one_way, row_cross_entropy(t, v, scale), atol=1e-3)


@pytest.mark.parametrize('chunk', [None, 2, 3])
def test_loss_of_a_part_has_value_and_gradient_of_a_plain_one(chunk):
    rows,columns,scale = unit(3).double(),unit(7, seed=1).double(),torch.tensor(5., dtype=torch.float64)
    def gradients(f):
        leaves = [x.clone().requires_grad_() for x in (rows, columns, scale)]
        value = f(*leaves)
        return value.detach(), torch.autograd.grad(2*value, leaves)
    want,wanted = gradients(lambda r, c, s: sum((s*r[i] @ c.T).logsumexp(0) - s*r[i] @ c[i + 2] for i in range(3))/3)
    got,found = gradients(lambda r, c, s: row_cross_entropy(r, c, s, 2, chunk))
    assert torch.isclose(want, got)
    for a,b in zip(wanted, found): torch.testing.assert_close(a, b)


def test_loss_is_computed_in_float32_also_of_half_features_and_under_autocast():
    v,t = unit(4).bfloat16(),unit(4, seed=1).bfloat16()
    want = plain_nce(v.float(), t.float(), 20.)
    with torch.autocast('cpu', torch.bfloat16):
        for chunk in (None, 2):
            loss = info_nce(v, t, 20., chunk)
            assert loss.dtype == torch.float32
            assert torch.isclose(loss.double(), want, atol=1e-5)


def test_temperature_starts_at_seven_hundredths_and_stays_above_one_hundredth():
    x = torch.tensor([-1., INIT_LOGIT_SCALE, 9.], requires_grad=True)
    y = clamped_exp(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([1., 1/.07, 100.]))
    assert x.grad[0] == 0 and x.grad[1] > 0 and x.grad[2] == 0


def test_normalize_works_on_the_last_axis_and_leaves_zero_finite():
    x = normalize(torch.tensor([[[3., 4.], [0., 0.]]]))
    torch.testing.assert_close(x, torch.tensor([[[.6, .8], [0., 0.]]]))


# ------------------------------------------------------------------------------------------------------------ the loop

def test_schedule_rises_from_zero_peaks_and_falls_as_a_cosine():
    assert [round(warmup_cosine(s, 2, 10), 4) for s in (0, 1, 2, 6, 10)] == [0, .5, 1, .5, 0]
    assert warmup_cosine(0, 0, 4) == 1 and math.isclose(warmup_cosine(1, 0, 4), .5*(1 + math.cos(math.pi/4)))


def test_learning_rate_rule_is_linear_in_the_batch(): assert scaled_lr(4e-3, 512) == 8e-3 and scaled_lr(1., 64) == .25


def test_every_step_is_taken_at_the_rate_of_the_steps_done_before_it(cpu):
    stage,model,seen = Stage('x', 10, 0., 2., 3),nn.Linear(2, 1),[]
    optimizer,schedule = make_optimizer(cpu, model, stage)
    def backward(accelerator, model, batch, stage):
        seen.append(optimizer.param_groups[0]['lr'])
        model(batch).sum().backward()
        return torch.tensor(0.)
    steps = list(training_steps(cpu, model, optimizer, schedule, iter(torch.ones(10, 1, 2)), stage, backward))
    assert seen == pytest.approx([2*warmup_cosine(s, 3, 10) for s in range(10)]), seen
    assert seen[0] == 0 and seen[3] == 2 and seen[-1] > 0 and schedule.get_last_lr()[0] == 0
    assert [s.number for s in steps] == list(range(1, 11)) and [s.is_last for s in steps] == [False]*9 + [True]


def test_a_resumed_stage_does_only_the_steps_that_are_left(cpu):
    stage,model = Stage('x', 5, 0., .1, 0),nn.Linear(2, 1)
    optimizer,schedule = make_optimizer(cpu, model, stage)
    loss = lambda model, batch, stage: model(batch).sum()
    found = [s.number for s in training_steps(cpu, model, optimizer, schedule, iter(torch.ones(9, 1, 2)), stage,
                                              partial(loss_backward, loss=loss), 3)]
    assert found == [4, 5]


def test_steps_clip_as_their_stage_says(cpu):
    stage,model = Stage('x', 1, 0., .1, 0, .5),nn.Linear(2, 1, bias=False)
    optimizer,schedule = make_optimizer(cpu, model, stage)
    backward = partial(loss_backward, loss=lambda model, batch, stage: model(batch).sum())
    step, = training_steps(cpu, model, optimizer, schedule, iter([torch.tensor([[3., 4.]])]), stage, backward)
    torch.testing.assert_close(optimizer.state[model.weight]['exp_avg'], torch.tensor([[.03, .04]]), rtol=1e-4, atol=1e-6)
    assert step.grad_norms.tolist() == [5.]


def test_optimizer_is_the_papers_adamw(cpu):
    flip = tiny_flip(image_pos='learned')
    optimizer,_ = make_optimizer(cpu, flip, Stage('x', 10, 0., 3e-4, 0))
    with_decay,without = optimizer.param_groups
    assert all(g['betas'] == (.9, .95) and g['eps'] == 1e-8 and g['lr'] == 3e-4 for g in optimizer.param_groups)
    assert (with_decay['weight_decay'], without['weight_decay']) == (.2, 0.)
    assert isinstance(optimizer.optimizer, torch.optim.AdamW)
    names = {id(p): n for n,p in flip.named_parameters()}
    spared = {names[id(p)] for p in without['params']}
    assert spared >= {'image_encoder.pos_embed', 'text_encoder.pos_embed', 'image_encoder.patch_embed.bias',
                      'image_encoder.transformer.norm.weight', 'text_encoder.transformer.blocks.0.norm1.weight'}
    assert not spared & {'image_proj.weight', 'text_encoder.token_embed.weight', 'image_encoder.cls_token',
                         'image_encoder.transformer.blocks.0.attn.qkv.weight'}
    assert len(with_decay['params']) + len(without['params']) == len(names)


def test_weight_decay_is_passed_on(cpu):
    optimizer,_ = make_optimizer(cpu, tiny_flip(), Stage('x', 10, 0., 1., 0), .7)
    assert [g['weight_decay'] for g in optimizer.param_groups] == [.7, 0.]


def test_stages_of_a_run():
    first,tuning = plan_stages(100, 40, .75, 1e-3, 1e-5, 7, grad_clip=.5)
    assert first == Stage('masked', 100, .75, 1e-3, 7, .5) and tuning == Stage('tuning', 40, 0., 1e-5, 3, .5)
    first,tuning = plan_stages(100, 40, .75, 1e-3, 1e-5, 7, final_lr=.1, beta2=.9)
    assert (first.final_lr, tuning.final_lr, first.beta2, tuning.beta2) == (.1, .1, .9, .9)
    assert plan_stages(5, 0, 0., 1., 1., 50) == [Stage('unmasked', 5, 0., 1., 4)]
    assert plan_stages(5, 1, .5, 1., 1., 0)[1].warmup_steps == 0


def gradient_step(cpu, gradient, clip=0.):
    p = nn.Linear(2, 1, bias=False)
    p.weight.data.zero_()
    optimizer,_ = make_optimizer(cpu, p, Stage('x', 10, 0., .1, 0), groups=[dict(params=[p.weight], weight_decay=0.)])
    p.weight.grad = torch.tensor([gradient])
    norms = guarded_step(cpu, optimizer, dict(a=[p.weight]), clip)
    return p, optimizer, norms


def test_a_step_reports_the_norm_before_clipping_and_clears_the_gradient(cpu):
    p,optimizer,norms = gradient_step(cpu, [3., 4.], clip=.5)
    assert norms.tolist() == [5.] and p.weight.grad is None
    moment = optimizer.state[p.weight]['exp_avg']
    torch.testing.assert_close(moment, .1*torch.tensor([[.3, .4]]), rtol=1e-4, atol=1e-6)      # clipped to length 0.5
    torch.testing.assert_close(gradient_step(cpu, [3., 4.])[1].state_dict()['state'][0]['exp_avg'],
                               .1*torch.tensor([[3., 4.]]))
    small = gradient_step(cpu, [.03, .04], clip=.5)[1].state_dict()['state'][0]['exp_avg']
    torch.testing.assert_close(small, .1*torch.tensor([[.03, .04]]))                            # shorter: as it is


def test_clipping_goes_by_the_norm_of_all_parts_together(cpu):
    model = nn.ModuleDict(dict(a=nn.Linear(1, 1, bias=False), b=nn.Linear(1, 1, bias=False)))
    a,b = (model[k].weight for k in 'ab')
    optimizer,_ = make_optimizer(cpu, model, Stage('x', 10, 0., .1, 0))
    a.grad,b.grad = torch.tensor([[3.]]),torch.tensor([[4.]])
    assert guarded_step(cpu, optimizer, dict(a=[a], b=[b]), 1.).tolist() == [3., 4.]
    assert [optimizer.state[p]['exp_avg'].item() for p in (a, b)] == pytest.approx([.06, .08], rel=1e-4)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_step_without_finite_gradient_changes_nothing(cpu, bad):
    p,optimizer,norms = gradient_step(cpu, [bad, 1.], clip=1.)
    assert p.weight.tolist() == [[0., 0.]] and not norms.isfinite().any()
    assert all(not s['exp_avg'].any() for s in optimizer.state.values())


def test_gradient_norms_stand_beside_the_part_they_belong_to():
    flip = tiny_flip()
    parts = towers(flip)
    assert list(parts) == ['image_encoder', 'text_encoder', 'image_proj', 'text_proj', 'rest']
    assert sum(map(len, parts.values())) == len(list(flip.parameters()))
    for name,ps in parts.items():
        for p in ps: p.grad = torch.full_like(p, dict(image_proj=2., rest=3.).get(name, 0.))
    got = dict(zip(parts, grad_norms(parts).tolist()))
    assert got['image_encoder'] == 0 and got['rest'] == 3
    assert math.isclose(got['image_proj'], 2*flip.image_proj.weight.numel()**.5, rel_tol=1e-5)


def test_a_batch_is_masked_as_its_stage_says():
    seen = []
    def model(*args): seen.append(args); return unit(2), unit(2, seed=1), torch.tensor(5.)
    batch = dict(images=pictures(2), ids=torch.ones(2, 8, dtype=torch.long), image_noise='image', text_noise='text')
    loss = contrastive_loss(model, batch, Stage('x', 1, .75, 1., 0))
    assert torch.equal(loss, info_nce(unit(2), unit(2, seed=1), 5.))
    encode_batch(model, batch, 0., .25, 'padding_first')
    (x,ids,*first),(*_,ratio,text_ratio,order,image_noise,text_noise) = seen
    assert torch.equal(x, to_float(batch['images'])) and ids is batch['ids']
    assert first == [.75, 0., 'random', 'image', None]
    assert (ratio, text_ratio, order, image_noise, text_noise) == (0., .25, 'padding_first', None, 'text')


def test_steps_that_are_due():
    stage = Stage('x', 100, 0., 1., 0)
    due = lambda *args: [n for n in range(101) if Step(stage, n).is_due(*args)]
    assert due(30) == [30, 60, 90, 100] and due(0) == [100]
    assert due(25, 10) == [30, 50, 80, 100]                                      # put off to the next multiple


def test_diagnosis_names_the_rows_of_the_data():
    flip = tiny_flip()
    flip.text_encoder.token_embed.weight.data[5] = math.nan
    batch = dict(images=pictures(4), ids=torch.tensor([[6, 7], [5, 7], [6, 6], [8, 5]]), rows=[40, 41, 42, 43])
    text = diagnose(flip, batch, towers(flip), torch.ones(5))
    assert text.endswith('not finite: 41, 43') and 'temperature 0.07;' in text


# ----------------------------------------------------------------------------------------------------- zero-shot scores

def test_every_batch_has_masks_of_its_own_and_the_seed_decides_them():
    flip,image = tiny_flip(),pictures(1)
    same = [image.expand(3, -1, -1, -1)]*3
    z = encode_images(flip, same, .5, seed=4)
    assert len({tuple(row) for row in z.tolist()}) == 9                          # 9 masks of one image
    assert torch.equal(z, encode_images(flip, same, .5, seed=4))
    assert torch.equal(z[3:6], encode_images(flip, same, .5, seed=5)[:3])        # the next batch has the next seed
    assert not torch.equal(z, encode_images(flip, same, .5, seed=7))
    torch.testing.assert_close(encode_images(flip, same)[0], flip.encode_image(to_float(image))[0].detach())


def test_evaluating_leaves_modes_and_generators_as_they_were():
    flip = tiny_flip().train()
    flip.text_encoder.eval()
    before = torch.get_rng_state()
    with evaluating(flip, 0): assert torch.equal(torch.rand(2), torch.rand(2, generator=rng(0)))
    with evaluating(flip, 3):
        drawn = torch.rand(2)
        assert not any(m.training for m in flip.modules()) and torch.is_inference_mode_enabled()
    assert torch.equal(drawn, torch.rand(2, generator=rng(3)))
    assert torch.equal(before, torch.get_rng_state())
    assert flip.training and flip.image_encoder.training and not flip.text_encoder.training


@pytest.mark.parametrize('padding_mask', [True, False])
def test_captions_are_cut_only_where_padding_is_not_looked_at(padding_mask):
    flip = tiny_flip(padding_mask=padding_mask)
    whole = flip.encode_text(flip.tokenizer(WORDS)).detach()
    torch.testing.assert_close(encode_captions(flip, flip.tokenizer, WORDS[:1]), whole[:1])      # alone it is short
    torch.testing.assert_close(encode_captions(flip, flip.tokenizer, WORDS), whole)


def test_captions_come_back_in_their_order_also_repeated_and_in_batches():
    flip = tiny_flip()
    asked = [WORDS[i] for i in (3, 0, 3, 2, 1, 0)]
    z = encode_captions(flip, flip.tokenizer, asked, batch_size=2)
    torch.testing.assert_close(z, torch.cat([encode_captions(flip, flip.tokenizer, [c]) for c in asked]))


def test_a_class_is_the_mean_direction_of_its_prompts():
    flip,names,prompts = tiny_flip(),['red', 'blue', 'grey'],['a {}', '{} ball']
    z = zero_shot_classifier(flip, flip.tokenizer, names, prompts)
    for i,name in enumerate(names):
        one = encode_captions(flip, flip.tokenizer, [p.replace('{}', name) for p in prompts])
        torch.testing.assert_close(z[i], normalize(one.mean(0)))
    long = torch.tensor([[[9., 0.]], [[0., 1.]]])                                # every prompt has the same weight
    torch.testing.assert_close(average_prompts(long), torch.full((1, 2), .5**.5))


def test_top_k_and_its_error():
    scores,labels = torch.tensor([[.1, .3, .2], [.9, .8, .7], [.1, .2, .3]]),torch.tensor([2, 2, 2])
    assert [round(top_k_accuracy(scores, labels, k), 4) for k in (1, 2, 3)] == [.3333, .6667, 1.]
    assert standard_error(.2, 100) == .04


def plain_ranks(scores, right):
    return [min((scores[i] >= s).sum().item() - (right[i] & (scores[i] >= s)).sum().item() for s in scores[i][right[i]])
            for i in range(len(scores))]


@pytest.mark.parametrize('chunk,held', [(1, 2**22), (2, 2**22), (1024, 2**22), (2, 6), (5, 10)])
def test_ranks_count_wrong_answers_ahead_and_ties_against(monkeypatch, chunk, held):
    monkeypatch.setattr(zero_shot, 'MAX_SCORES', held)                           # a gallery in parts, too
    q,g,q_ids,g_ids = unit(5),unit(9, seed=1),torch.arange(5),torch.tensor([0, 0, 1, 2, 3, 4, 4, 1, 2])
    g[3] = g[2]                                                                  # a tie of a right and a wrong one
    assert ranks(q, q_ids, g, g_ids, chunk).tolist() == plain_ranks(q @ g.T, q_ids[:, None] == g_ids)
    assert ranks(q[:1], torch.tensor([9]), g, g_ids).item() > 10**9              # no right answer: never found


def test_retrieval_goes_both_ways_with_the_captions_of_each_image():
    images,texts,owner = unit(4),unit(6, seed=1),torch.tensor([3, 0, 1, 2, 0, 3])
    found = retrieval_ranks(images, texts, owner)
    right = torch.arange(4)[:, None] == owner
    assert found['i2t'].tolist() == plain_ranks(images @ texts.T, right)
    assert found['t2i'].tolist() == plain_ranks(texts @ images.T, right.T)
    recall = retrieval_recall(images, texts, owner, (1, 3))
    assert recall['i2t']['R@3'] == (found['i2t'] < 3).double().mean() and recall['t2i']['R@1'] == (found['t2i'] == 0).double().mean()


def test_chance_of_retrieval():
    chance = retrieval_chance(torch.tensor([0, 0, 1, 2]), 3, (1, 2, 10))
    miss = lambda m, k: math.comb(4 - m, k)/math.comb(4, k)
    assert math.isclose(chance['i2t']['R@2'], 1 - (miss(2, 2) + 2*miss(1, 2))/3) and chance['i2t']['R@10'] == 1
    assert math.isclose(chance['t2i']['R@1'], 1/3) and math.isclose(chance['t2i']['R@2'], 2/3) and chance['t2i']['R@10'] == 1
