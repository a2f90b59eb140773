"Scores, their chance and their errors, features that are kept, and fine-tuning, in small direct tests."
import json, math, shutil
from types import SimpleNamespace as Plain

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from small import WORDS, ignores_signals, make_pairs, pictures, rng, tiny_flip, unit

from flip_nb.evaluate import EvaluateConfig, complete, data_request, model_names
from flip_nb.evaluation import features as featuring, report as reporting, scores as scoring, tasks
from flip_nb.evaluation.answers import (
    answer_chance, answer_ranks, answer_recall, image_print, image_prints, match_answers, shared_line, table_ranks)
from flip_nb.evaluation.datasets import TestSet
from flip_nb.evaluation.features import (
    FeatureKind, as_extracted, class_numbers, digest, embed_batch, extract_features, fingerprints, open_pictures)
from flip_nb.evaluation.galleries import best_matches, confusion_counts, find_mistakes, most_confused
from flip_nb.evaluation.intervals import Score, compare, interval, redraw, score_value
from flip_nb.evaluation.labels import classification_scores, mean_per_class_accuracy
from flip_nb.evaluation.probe import (
    best_strength, fit_logistic, knn_predict, linear_probe, paired_bootstrap, search_strengths, standardise, wilson_interval)
from flip_nb.evaluation.report import Report, finish_report, markdown_table, result_rows, run_task
from flip_nb.evaluation.robustness import ZeroShotTask, robustness_curve
from flip_nb.evaluation.scores import (
    encode_pairs, evaluate_pairs, evaluate_scenes, label_accuracy, results_table, stack_rows)
from flip_nb.evaluation.tasks import Job, JobConfig, every_fifth, first_images, job_features, plan, sample_pictures
from flip_nb.evaluation.views import masked_view_curve, masked_views, view_noise
from flip_nb.loop import Stage, Step, TrainingDiverged
from flip_nb.loss import clamped_exp, normalize
from flip_nb.model import to_float
from flip_nb.scale.checkpoint import checkpoints, read_state
from flip_nb.scale.options import build, given
from flip_nb.scale.run import Progress, Run
from flip_nb.scenes import CLASSES, Scenes
from flip_nb.transfer import tuner
from flip_nb.transfer.classifier import ImageClassifier, layer_groups, set_drop_path, zero_shot_head
from flip_nb.transfer.labelled import (
    Labelled, classification_loss, collate_labelled, evaluate_classifier, write_labelled_scenes)
from flip_nb.transfer.tuner import (
    FinetuneConfig, fill_in_tuning, finish_finetuning, make_classifier, open_finetuning, run_finetuning, save_tuning, tuning_line,
    tuning_stage)
from flip_nb.zero_shot import SCENE_NAMES, SCENE_TEMPLATES, encode_captions, zero_shot_classifier

TestSet.__test__ = False


@pytest.fixture(scope='module')
def cpu(): return Accelerator(cpu=True)


# --------------------------------------------------------------------------------------------------------------- answers

def plain_ranks(scores, right):
    return [min((scores[i] >= s).sum().item() - (right[i] & (scores[i] >= s)).sum().item() for s in scores[i][right[i]])
            for i in range(len(scores))]


ROWS = [['x', 'y'], ['y'], ['z'], ['x', 'y'], ['w', 'w']]                         # captions of five rows
PRINTS = ['a', 'b', 'c', 'a', 'd']                                               # rows 0 and 3 show one image


def test_equal_captions_and_equal_images_are_one_answer():
    found = match_answers(ROWS, PRINTS)
    assert found.images.tolist() == [0, 1, 2, 4] and found.captions == ['x', 'y', 'z', 'w']
    assert found.pairs.tolist() == [[0, 0], [0, 1], [1, 1], [2, 2], [3, 3]]
    assert match_answers(ROWS).images.tolist() == [0, 1, 2, 3, 4]
    assert shared_line(found, 5) == ('2 of 4 images share a caption with another image and 1 of 5 rows show an image again: '
                                     'each counts as a right answer')
    assert shared_line(match_answers([['a'], ['b', 'c']]), 2) == ''
    assert shared_line(match_answers([['a', 'b'], ['b', 'a'], ['c']]), 3).startswith('2 of 3 images share')


@pytest.mark.parametrize('chunk', [1, 3, 1024])
def test_ranks_of_a_table_of_answers(chunk):
    q,g,pairs = unit(5),unit(6, seed=1),torch.tensor([[4, 2], [0, 1], [2, 0], [1, 5], [3, 3], [0, 4], [2, 5]])
    g[3] = g[2]                                                                  # a tie
    right = torch.zeros(5, 6, dtype=torch.bool)
    right[pairs[:, 0], pairs[:, 1]] = True
    assert table_ranks(q, g, pairs, chunk).tolist() == plain_ranks(q @ g.T, right)


def test_recall_and_chance_go_from_images_to_captions_and_back():
    found = match_answers(ROWS, PRINTS)
    x,t = unit(4),unit(4, seed=1)
    right = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()
    ranks = answer_ranks(x, t, found)
    assert ranks['i2t'].tolist() == plain_ranks(x @ t.T, right) and ranks['t2i'].tolist() == plain_ranks(t @ x.T, right.T)
    recall,share = answer_recall(x, t, found, (1, 2)),lambda way, k: (ranks[way] < k).double().mean()
    assert recall['i2t']['R@2'] == share('i2t', 2) and recall['t2i']['R@1'] == share('t2i', 1)
    other = match_answers([['x', 'y', 'z'], ['w'], ['x']])
    chance = answer_chance(other, (1, 2, 9))
    assert math.isclose(chance['i2t']['R@1'], (3 + 1 + 1)/4/3) and math.isclose(chance['t2i']['R@1'], (2 + 1 + 1 + 1)/3/4)
    assert math.isclose(chance['i2t']['R@2'], (1 + 2/4 + 2/4)/3) and chance['t2i']['R@9'] == 1


def test_images_are_told_apart_by_their_content(tmp_path):
    (tmp_path/'a').write_bytes(b'1'); (tmp_path/'b').write_bytes(b'1')
    same = [image_print(v) for v in (b'1', dict(bytes=b'1', path='x'), dict(bytes=None, path=str(tmp_path/'a')), tmp_path/'b')]
    assert len(set(same)) == 1 and image_print(b'2') != same[0]
    pairs = make_pairs(4)
    pairs.rows[3] = pairs.rows[1]
    prints = image_prints(pairs, [3, 1, 0])
    assert prints[0] == prints[1] != prints[2]


# ---------------------------------------------------------------------------------------------------- scores of a model

def test_masks_differ_between_batches_of_an_evaluation_and_follow_the_seed():
    flip,pairs = tiny_flip(),make_pairs(6)
    for row in pairs.rows: row['image'] = pairs.rows[0]['image']
    z = lambda **k: encode_pairs(flip, pairs, batch_size=2, **k)[0]
    masked = z(mask_ratio=.5, seed=3)
    assert len({tuple(row) for row in masked.tolist()}) == 6
    assert torch.equal(masked, z(mask_ratio=.5, seed=3)) and torch.equal(masked[2:4], z(mask_ratio=.5, seed=4)[:2])
    assert not torch.equal(masked, z(mask_ratio=.5, seed=9))
    torch.testing.assert_close(z()[0], flip.encode_image(to_float(pictures(6)[:1]))[0].detach())


def test_broken_rows_are_left_out_and_counted():
    flip,pairs = tiny_flip(),make_pairs(captions=['red', 'blue', 'red', None, ['grey', 'white']])
    pairs.rows[1]['image'] = b'broken'
    z,texts,faults,prints = encode_pairs(flip, pairs, batch_size=2)
    assert texts == [['red'], ['red'], ['grey', 'white']] and len(z) == len(prints) == 3 and len(faults) == 2
    results = evaluate_pairs(flip, flip.tokenizer, pairs)
    assert (results['rows'], results['images'], results['captions'], results['skipped']) == (3, 3, 3, 2)
    assert results['zero_shot'] is None and 'share a caption' in results['shared']
    assert math.isclose(results['chance']['retrieval']['i2t']['R@1'], (1 + 1 + 2)/3/3)
    pairs.rows[2]['image'] = pairs.rows[0]['image']                              # one image in two rows
    again = evaluate_pairs(flip, flip.tokenizer, pairs)
    assert (again['rows'], again['images']) == (3, 2) and 'rows show an image again' in again['shared']
    z,texts,_,prints = encode_pairs(flip, pairs, batch_size=5)
    assert prints == image_prints(pairs, [0, 2, 4])
    answers = match_answers(texts, prints)
    words = encode_captions(flip, flip.tokenizer, answers.captions)
    assert again['retrieval'] == answer_recall(z[[0, 2]], words, answers)


def test_an_evaluation_of_labels_passes_its_masks_on(monkeypatch):
    job,seen,own = labelled_job(names=NAMES[:3]),[],scoring.encode_pairs
    monkeypatch.setattr(scoring, 'encode_pairs', lambda flip, pairs, *args: seen.append(args) or own(flip, pairs, *args))
    found = evaluate_pairs(job.flip, job.tokenizer, job.data.splits['test'], .5, 0, 7)
    assert seen == [(.5, 0, 7)] and found['chance']['zero_shot'] == 1/3 and found['rows'] == 16


def test_zero_shot_accuracy_of_labels():
    flip,names = tiny_flip(),['red', 'blue', 'green']
    classes = zero_shot_classifier(flip, flip.tokenizer, names, ['{}', 'a {}', 'a photo of a {}'])
    accuracy,chance = label_accuracy(flip, flip.tokenizer, classes[[0, 1, 2, 2]], ['red', 'blue', 'green', 'red'], names)
    assert (accuracy, chance) == (.75, 1/3)


def test_scenes_are_new_ones_with_the_names_of_their_split(monkeypatch):
    answers,home,asked = {},{},[]
    for split in ('val', 'unseen'):
        images,_,labels = Scenes(split, 16, seed=3, num_objects=1).batch(range(40))
        answers |= {x.numpy().tobytes(): int(y) for x,y in zip(images, labels)}
        home |= {x.numpy().tobytes(): split for x in images}
    def oracle(flip, batches, ratio, seed, turns):
        asked.append((ratio, seed, home.get(batches[0][0].numpy().tobytes())))
        known = [answers.get(x.numpy().tobytes(), -1) for batch in batches for x in batch]
        return torch.stack([torch.eye(len(CLASSES))[y] if y >= 0 else unit(1, len(CLASSES), i)[0] for i,y in enumerate(known)])
    def classes(flip, tokenizer, names, templates, turns):
        assert (names, templates) == (SCENE_NAMES, SCENE_TEMPLATES)
        return torch.eye(len(CLASSES))
    monkeypatch.setattr(scoring, 'encode_images', oracle)
    monkeypatch.setattr(scoring, 'zero_shot_classifier', classes)
    monkeypatch.setattr(scoring, 'encode_captions', lambda flip, tokenizer, captions, turns: unit(len(captions), len(CLASSES)))
    flip = tiny_flip()
    found = evaluate_scenes(flip, flip.tokenizer, 40, 3, .25)
    assert found['zero_shot'] == found['zero_shot_unseen'] == 1 and found['scenes'] == 40
    assert asked == [(.25, 3, 'val'), (.25, 3, 'unseen'), (.25, 3, None)]
    assert found['chance']['zero_shot'] == found['chance']['zero_shot_unseen'] == 1/80
    assert evaluate_scenes(flip, flip.tokenizer, 40, 4)['zero_shot'] < .5        # other scenes: the oracle does not know them


def test_table_of_results_stands_on_the_right_number_of_questions():
    r = {'R@1': .5}
    results = dict(chance=dict(zero_shot=.1, retrieval=dict(i2t={'R@1': .2}, t2i={'R@1': .3})), zero_shot=.2, rows=100, images=64,
                   captions=400, retrieval=dict(i2t=r, t2i=r))
    lines = [line.split() for line in results_table(results).split('\n')]
    assert [line[-1] for line in lines] == ['100', '64', '400']
    assert [line[-7:-3] for line in lines] == [['±', '4.0', 'chance', '10.00%'], ['±', '6.2', 'chance', '20.00%'],
                                               ['±', '2.5', 'chance', '30.00%']]


def test_every_class_counts_the_same():
    labels,given = torch.tensor([0, 0, 0, 2, 2]),torch.tensor([0, 0, 1, 1, 2])
    assert math.isclose(mean_per_class_accuracy(given, labels), (2/3 + 1/2)/2)
    scores = torch.eye(6)[[1, 2, 3]] - torch.eye(6)[[0, 1, 2]]
    got = classification_scores(scores, torch.tensor([1, 1, 3]))
    assert (got['top_1'], got['top_5'], got['mean_per_class']) == (2/3, 2/3, .75) and 'top_5' not in classification_scores(
        torch.eye(5), torch.arange(5))


# ------------------------------------------------------------------------------------------------------------- intervals

def test_wilson_interval(): assert wilson_interval(.8, 50) == pytest.approx((.66962, .88759), abs=1e-4)


def test_a_score_by_classes_and_its_interval():
    values,classes = torch.tensor([1., 1., 1., 0., 0., 1.]),torch.tensor([0, 0, 0, 1, 1, 1])
    assert score_value(Score('t', 'm', values, .1)) == pytest.approx(4/6)
    by_class = Score('t', 'm', torch.tensor([1., 1., 1., 0.]), .1, classes=torch.tensor([0, 0, 0, 1]))
    assert score_value(by_class) == .5
    drawn = redraw(Score('t', 'm', values, .1, classes=classes), 4000)
    assert drawn.mean().item() == pytest.approx(4/6, abs=.01)
    assert drawn.std().item() == pytest.approx(.5*(2/9/2)**.5, rel=.06)          # one class of three rows varies


def test_captions_of_an_image_are_drawn_together():
    groups = torch.arange(100).repeat_interleave(5)
    values = (groups % 2 == 0).double()
    together,alone = redraw(Score('t', 'm', values, 0., groups=groups)),redraw(Score('t', 'm', values, 0.))
    assert together.std().item() == pytest.approx(.05, rel=.1) and alone.std().item() == pytest.approx(.05/5**.5, rel=.1)
    low,high = interval(Score('t', 'm', values, 0., groups=groups))
    assert low == pytest.approx(.4, abs=.02) and high == pytest.approx(.6, abs=.02)
    assert interval(Score('t', 'm', values, 0.)) == wilson_interval(.5, 500)
    uneven = Score('t', 'm', torch.full((6,), .5), 0., groups=torch.tensor([0, 0, 0, 0, 1, 2]))
    assert (redraw(uneven, 50) == .5).all()                                      # groups of any size: a share of their questions
    ones = torch.ones(500)
    assert interval(Score('t', 'm', ones, 0., groups=groups)) == wilson_interval(1., 100)


def test_two_models_are_compared_question_by_question():
    a = Score('t', 'm', torch.tensor([1., 1., 1., 0.]*50), 0.)
    b = a._replace(values=torch.tensor([1., 1., 0., 0.]*50))
    found = compare(a, b)
    assert found == dict(difference=.25, low=pytest.approx(.19, abs=.015), high=pytest.approx(.31, abs=.015))
    assert compare(b, a)['difference'] == -.25 and compare(a, a) == dict(difference=0, low=0, high=0)
    assert torch.equal(redraw(a, 9, 1), redraw(a, 9, 1)) and not torch.equal(redraw(a, 9, 1), redraw(a, 9, 2))
    d,low,high = paired_bootstrap(a.values.bool(), b.values.bool(), generator=rng())
    assert d == .25 and low == pytest.approx(.19, abs=.015) and high == pytest.approx(.31, abs=.015)


# ---------------------------------------------------------------------------------------------------------------- probes

def test_neighbours_vote_with_the_weight_of_their_nearness():
    x,y = normalize(torch.tensor([[1., .1], [1., .2], [0., 1.], [.1, 1.], [.2, 1.]])),torch.tensor([0, 0, 1, 1, 1])
    q = torch.tensor([[10., 1.5]])                                               # any length
    assert knn_predict(x, y, q, k=5, temperature=math.inf).tolist() == [1] and knn_predict(x, y, q, k=5).tolist() == [0]
    assert knn_predict(x, y, q, k=3, temperature=math.inf).tolist() == [0]


def test_logistic_regression_is_at_its_optimum():
    x,y,strength = torch.randn(40, 3, generator=rng()).double(),torch.randint(0, 3, (40,), generator=rng(1)),2.
    W,b = fit_logistic(x, y, strength, 3)
    W.requires_grad_(); b.requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ W.T + b, y, reduction='sum') + strength/2*W.square().sum()   # as scikit-learn
    for g in torch.autograd.grad(loss, (W, b)): assert g.abs().max() < 1e-3


def test_rows_to_be_judged_are_scaled_by_the_rows_that_are_fitted():
    fitted = torch.tensor([[0., 5.], [2., 5.]])
    a,b = standardise(fitted, torch.tensor([[3., 6.]]))
    assert a.tolist() == [[-1., 0.], [1., 0.]] and b.tolist() == [[2., 1.]]


def test_of_equal_strengths_the_strongest_wins_and_the_search_closes_in():
    assert best_strength({.1: .5, 1.: .7, 10.: .7, 100.: .6}) == 10.
    sweep = search_strengths(lambda s: -abs(math.log10(s) - 3.4))
    assert math.log10(best_strength(sweep)) == pytest.approx(3.375) and min(sweep) == 1e-6 and max(sweep) == 1e6


def test_validation_rows_choose_the_strength_and_test_rows_do_not():
    x,y = torch.randn(60, 4, generator=rng()),torch.arange(60) % 2
    x[:, 0] += 2*y
    train,val,test = (x[:20], y[:20]),(x[20:40], y[20:40]),(x[40:], y[40:])
    found = linear_probe(*train, *val, *test)
    for s,accuracy in list(found['sweep'].items())[::5]:                         # of a fit on training rows alone
        scaled,other = standardise(train[0], val[0])
        W,b = fit_logistic(scaled, train[1], s, 2)
        assert accuracy == ((other @ W.T + b).argmax(1) == val[1]).double().mean()
    both = torch.cat([train[0], val[0]]),torch.cat([train[1], val[1]])
    scaled,other = standardise(both[0], test[0])
    W,b = fit_logistic(scaled, both[1], best_strength(found['sweep']), 2)
    assert torch.equal(found['correct'], (other @ W.T + b).argmax(1) == test[1])
    assert found['strength'] == best_strength(found['sweep']) and found['chance'] == .5
    few = linear_probe(*train, *val, test[0][5:10], torch.tensor([0, 1, 1, 1, 1]))
    assert few['chance'] == .8                                                   # the largest class of the test rows
    flipped = linear_probe(*train, *val, test[0], 1 - test[1])
    assert flipped['sweep'] == found['sweep'] and flipped['accuracy'] == pytest.approx(1 - found['accuracy'])


# ----------------------------------------------------------------------------------------------------------------- tasks

NAMES = ['red', 'blue', 'green', 'grey', 'black', 'white', 'pink', 'brown']


def labelled_job(splits=('test',), names=NAMES, n=16, config=None, **flip):
    labels = [i*i % len(names) for i in range(n)]
    pairs = {s: make_pairs(captions=labels, label_names=names, seed=k) for k,s in enumerate(splits)}
    for p in pairs.values(): p.transform = whole_image
    flip = tiny_flip(**flip)
    data = TestSet('made', pairs, names, ['{}', 'a {}'], 'top_1')
    return Job('m', flip, flip.tokenizer, data, config or JobConfig(quiet=True))


def whole_image(image):
    from flip_nb.data.decode import eval_transform
    return eval_transform(16)(image)


def test_zero_shot_scores_with_their_chance():
    job = labelled_job()
    scores,figures = tasks.zero_shot_task(job)
    one,five,each = scores
    cosines = job_features(job).features @ tasks.job_classifier(job).T
    labels = torch.tensor([i*i % 8 for i in range(16)])
    assert torch.equal(one.values, cosines.argmax(1) == labels) and torch.equal(each.values, one.values)
    assert torch.equal(five.values, (cosines.topk(5).indices == labels[:, None]).any(1))
    assert [(s.metric, s.chance) for s in scores] == [('top_1', 1/8), ('top_5', 5/8), ('mean_per_class', 1/8)]
    assert torch.equal(each.classes, labels) and one.classes is None and one.groups is None
    assert [s.metric for s in tasks.zero_shot_task(labelled_job(names=NAMES[:5]))[0]] == ['top_1', 'mean_per_class']


def test_figures_of_zero_shot_get_right_and_given_classes_in_this_order(monkeypatch):
    job,drawn = labelled_job(config=JobConfig(quiet=True, pictures=8)),{}
    for name in ('confusion_matrix', 'confident_mistakes'):
        monkeypatch.setattr(tasks, name, lambda *args, name=name, **kwargs: drawn.setdefault(name, args))
    right = tasks.zero_shot_task(job)[0][0].values
    labels,given,names = drawn['confusion_matrix']
    assert labels.tolist() == [i*i % 8 for i in range(16)] and torch.equal(given == labels, right) and names == NAMES
    images,scores,labels,_,scale,most = drawn['confident_mistakes']
    assert most == (~right[::2]).sum() and torch.equal(scores.argmax(1) == labels, right[::2]) and len(images) == 8
    assert scale == pytest.approx(1/.07)


def test_the_probe_is_fitted_on_rows_that_do_not_choose_its_strength(monkeypatch):
    asked = []
    def probe(*args): asked.append(args); return dict(correct=torch.ones(3), chance=.25)
    monkeypatch.setattr(tasks, 'linear_probe', probe)
    (score,),_ = tasks.linear_probe_task(labelled_job(('train', 'test'), NAMES[:3], 40))
    tasks.linear_probe_task(job := labelled_job(('train', 'val', 'test'), NAMES[:3], 40))
    x,y,val,val_y,test,_ = asked[0]
    rows = lambda t: {tuple(r) for r in t.tolist()}
    assert len(x) + len(val) == 40 and not rows(x) & rows(val) and 4 <= len(val) <= 10 and len(test) == 40
    assert score.chance == .25 and len(y) == len(x) and len(val_y) == len(val)
    given = [job_features(job, s, projected=False).features for s in ('train', 'val', 'test')]
    assert all(torch.equal(a, b) for a,b in zip(given, asked[1][::2]))           # a split 'val' is taken as it is


def test_every_fifth_row_of_each_class_is_held_out():
    labels = torch.tensor([0]*20 + [1]*11 + [2]*4)
    held = every_fifth(labels, 1)
    assert [int(held[labels == c].sum()) for c in (0, 1, 2)] == [4, 2, 0]
    assert torch.equal(held, every_fifth(labels, 1)) and not torch.equal(held, every_fifth(labels, 2))


def test_neighbours_are_training_rows_and_chance_is_the_largest_class():
    job = labelled_job(('train', 'test'))
    (score,),_ = tasks.knn_task(job)
    train,test = (job_features(job, s, projected=False).features for s in ('train', 'test'))
    own = [extract_features(job.flip, job.data.splits[s], quiet=True).features for s in ('train', 'test')]
    torch.testing.assert_close([train, test], own)                               # each split has its own
    labels = torch.tensor([i*i % 8 for i in range(16)])
    assert torch.equal(score.values, knn_predict(train, labels, test, k=16) == labels)
    assert score.chance == (labels == 1).sum()/16


def caption_job(captions, config=None):
    flip,pairs = tiny_flip(),make_pairs(captions=captions)
    pairs.transform = whole_image
    return Job('m', flip, flip.tokenizer, TestSet('made', dict(test=pairs), None, ['{}'], 'top_1'),
               config or JobConfig(quiet=True))


def test_retrieval_scores_with_groups_of_captions():
    job = caption_job([['red', 'blue'], ['grey'], ['white', 'a green cone'], ['red']])
    scores,_ = tasks.retrieval_task(job)
    answers = match_answers([['red', 'blue'], ['grey'], ['white', 'a green cone'], ['red']])
    x,t = job_features(job).features,encode_captions(job.flip, job.tokenizer, answers.captions)
    ranks,chance = answer_ranks(x, t, answers),answer_chance(answers)
    assert [s.metric for s in scores] == [f'{way} R@{k}' for way in ('i2t', 't2i') for k in (1, 5, 10)]
    for s in scores:
        way,k = s.metric.split()
        assert torch.equal(s.values, ranks[way] < int(k[2:])) and s.chance == chance[way][k]
        assert s.groups is None if way == 'i2t' else s.groups.tolist() == [0, 0, 1, 2, 2]
    assert first_images(match_answers([['b'], ['a', 'b'], ['a']])).tolist() == [0, 1]
    twice = caption_job(['red', 'red', 'grey', 'blue'])
    twice.data.splits['test'].rows[1] = twice.data.splits['test'].rows[0]
    x,t = job_features(twice).features[[0, 2, 3]],encode_captions(twice.flip, twice.tokenizer, ['red', 'grey', 'blue'])
    assert tasks.retrieval_task(twice)[0][0].values.tolist() == ((x @ t.T).argmax(1) == torch.arange(3)).tolist()
    assert job.known['shared',].startswith('2 of 4 images share')


def test_kept_features_are_those_of_the_rows_that_have_captions(tmp_path):
    config = JobConfig(features=str(tmp_path), quiet=True)
    first = job_features(caption_job(['red', 'blue', 'grey', 'white'], config))
    second = job_features(caption_job(['red', None, 'grey', 'white'], config))
    assert first.rows.tolist() == [0, 1, 2, 3] and second.rows.tolist() == [0, 2, 3]
    torch.testing.assert_close(second.features, first.features[[0, 2, 3]])
    assert job_features(caption_job(['red', 'blue', 'grey', 'white'], config)).rows.tolist() == [0, 1, 2, 3]


def test_a_file_of_features_is_refused_where_other_rows_have_captions(tmp_path):
    flip,path,texts = tiny_flip(),tmp_path/'x.npy',['red']*40
    found,again = (extract_features(flip, caption_job(texts).data.splits['test'], path, quiet=True) for _ in range(2))
    assert torch.equal(found.features, again.features)
    texts[4] = None
    with pytest.raises(ValueError, match='other data'):
        extract_features(flip, caption_job(texts).data.splits['test'], path, quiet=True)


@pytest.mark.parametrize('change', [dict(seed=1), dict(mask_ratio=.25)])
def test_kept_features_are_those_of_the_same_masks(tmp_path, change):
    features = lambda **k: job_features(caption_job(WORDS, JobConfig(features=str(tmp_path), quiet=True, **k)))
    first = features(mask_ratio=.5)
    assert torch.equal(first.features, features(mask_ratio=.5).features) and len(list(tmp_path.glob('*.npy'))) == 1
    assert not torch.equal(first.features, features(**dict(mask_ratio=.5) | change).features)


def test_kept_features_are_those_of_the_same_model_and_images(tmp_path):
    flip,pairs = tiny_flip(),caption_job(WORDS).data.splits['test']
    seen = lambda flip, pairs: fingerprints(flip, open_pictures(pairs, 16), a=1)
    first,other = seen(flip, pairs),caption_job(WORDS).data.splits['test']
    other.rows[5]['image'] = other.rows[4]['image']
    changed = {k for k,v in seen(flip, other).items() if v != first[k]}
    flip.text_proj.weight.data += 1                                              # features of images do not depend on it
    assert changed == {'data'} and seen(flip, pairs) == first
    flip.image_encoder.cls_token.data += 1
    assert {k for k,v in seen(flip, pairs).items() if v != first[k]} == {'model'}
    heads = tiny_flip(image_heads=4)                                             # the same weights, another model
    assert {k for k,v in seen(heads, pairs).items() if v != first[k]} == {'model'}
    assert len({digest(x) for x in (torch.zeros(4), torch.zeros(2, 2), torch.zeros(4).int())}) == 3
    cropped = make_pairs()
    cropped.transform = None                                                     # of training; features see whole images
    assert torch.equal(open_pictures(cropped, 16)[1][0], pairs.read(1)[0]) and cropped.transform is None


def test_embedding_in_parts_finds_faults_by_row_and_other_masks_in_every_part():
    flip,image = tiny_flip(),pictures(1)[0]
    rows = stack_rows([(image, 'x', ''), (None, 'x', 'torn'), (image, 'x', '')])
    n,z,skipped = embed_batch(flip, rows, 7, FeatureKind(.5, seed=2))
    assert (n, skipped, z.shape) == (3, {'8': 'torn'}, (2, 16))
    again,other = (embed_batch(flip, stack_rows([image, image]), start, FeatureKind(.5, seed=2))[1] for start in (7, 9))
    assert (again == z).all() and (again != other).any()
    whole = embed_batch(flip, stack_rows([image]), 0, FeatureKind(projected=True))[1]
    torch.testing.assert_close(torch.from_numpy(whole), flip.encode_image(to_float(image[None])).detach())
    found = as_extracted(z, dict(done=3, skipped={'1': 'torn'}))
    assert found.rows.tolist() == [0, 2] and found.skipped == {1: 'torn'}
    pairs = make_pairs(captions=[2, 0, 1], label_names=['a', 'b', 'c'])
    assert class_numbers(pairs, found.rows).tolist() == [2, 1]


def test_features_stay_with_their_rows_in_batches_of_any_size():
    flip,pairs = tiny_flip(),caption_job([*WORDS, None, 'red', 'blue']).data.splits['test']
    pairs.rows[2]['image'] = b'broken'
    one,three = (extract_features(flip, pairs, batch_size=b, quiet=True) for b in (1, 3))
    torch.testing.assert_close(one.features, three.features)
    assert one.rows.tolist() == three.rows.tolist() == [0, 1, 3, 4, 5, 7, 8] and set(three.skipped) == {2, 6}
    torch.testing.assert_close(three.features[3], flip.image_encoder(to_float(pairs.read(4)[0][None]))[0].detach())


@pytest.mark.parametrize('module', [scoring, featuring])
def test_workers_of_an_evaluation_ignore_the_signals_that_end_a_run(monkeypatch, module):
    flip,pairs,seen = tiny_flip(),caption_job(WORDS).data.splits['test'],[]
    own = module.WorkerLoader
    monkeypatch.setattr(module, 'WorkerLoader', lambda *args, **kwargs: seen.append(kwargs) or own(*args, **kwargs))
    encode_pairs(flip, pairs) if module is scoring else extract_features(flip, pairs, quiet=True)
    assert len(seen) == 1 and ignores_signals(seen[0]['worker_init_fn'])


def test_some_pictures_are_spread_over_the_test_rows():
    job = labelled_job()
    places,images = sample_pictures(job, 4)
    assert places.tolist() == [0, 4, 8, 12] and torch.equal(images[2], job.data.splits['test'].read(8)[0])
    assert len(sample_pictures(job, 99)[0]) == 16


def test_damage_and_masked_views_are_compared_with_whole_images():
    job = labelled_job(config=JobConfig(quiet=True, seed=3, pictures=8))
    whole = tasks.zero_shot_task(job)[0][0].values[::2]
    places,images = sample_pictures(job, 8)
    labels = torch.tensor([i*i % 8 for i in range(16)])[places]
    task = ZeroShotTask(tasks.job_classifier(job), images, labels)
    scores,_ = tasks.robustness_task(job)
    assert scores[0].metric == 'unchanged' and all(s.chance == 1/8 for s in scores)
    assert torch.equal(scores[0].values, whole) and places.tolist() == list(range(0, 16, 2))
    curve = robustness_curve(job.flip, task, ['blur', 'noise'], seed=3, correct=True)
    for s in scores[1:]:
        if s.metric in ('blur', 'noise'): torch.testing.assert_close(s.values, curve['correct'][s.metric].double().mean(0))
    views,_ = tasks.masked_views_task(job)
    assert torch.equal(views[0].values, whole) and [s.metric for s in views[1:3]] == ['50% dropped, 1 view', '50% dropped, 2 views']
    assert torch.equal(views[2].values, masked_view_curve(job.flip, task, .5, (1, 2, 4, 8), seed=3, correct=True)[1])
    assert torch.equal(views[5].values, masked_view_curve(job.flip, task, .75, (1, 2, 4, 8), seed=3, correct=True)[0])


def test_views_of_an_image_are_averaged_and_disjoint_views_cover_it():
    flip,x = tiny_flip(),to_float(pictures(2))
    noise = view_noise(2, 16, .5, 2, rng(), disjoint=True)
    kept = noise.argsort(-1)[..., :8]
    assert all(sorted(kept[:, i].flatten().tolist()) == list(range(16)) for i in range(2))
    z = torch.stack([flip.encode_image(x, .5, n) for n in view_noise(2, 16, .5, 3, rng(4))])
    torch.testing.assert_close(masked_views(flip, x, .5, 3, rng(4)), normalize(z.mean(0)))
    job = labelled_job()
    task = ZeroShotTask(tasks.job_classifier(job), sample_pictures(job, 99)[1], torch.tensor([i*i % 8 for i in range(16)]))
    right = masked_view_curve(job.flip, task, .5, (1, 2), seed=1, correct=True)
    images = normalize(torch.stack([job.flip.encode_image(to_float(task.images), .5, n)
                                    for n in view_noise(16, 16, .5, 2, rng(1))]).mean(0))
    assert torch.equal(right[1], (images @ task.classifier.T).argmax(1) == task.labels)


def test_the_plan_does_what_fits():
    captions,labels = caption_job(WORDS).data,labelled_job(('train', 'test')).data
    assert [t for _,t in plan(None, [captions, labels])] == [['retrieval'], ['zero_shot']]
    assert [t for _,t in plan(['knn', 'retrieval'], [labels, captions])] == [['knn'], ['retrieval']]
    with pytest.raises(ValueError, match='needs training rows'): plan(['knn'], [labelled_job().data])


# --------------------------------------------------------------------------------------------------- galleries and report

def test_confusions_stand_in_the_row_of_the_right_class_and_right_answers_are_no_mistakes():
    counts = confusion_counts(torch.tensor([0, 0, 1, 3]), torch.tensor([2, 2, 0, 3]), 4)
    assert counts[0, 2] == 2 and counts[1, 0] == 1 and counts[3, 3] == 1 and counts.sum() == 4
    counts = torch.diag(torch.tensor([90, 80, 70, 60, 50]))
    counts[4, 3] = 2; counts[2, 4] = 1
    assert most_confused(counts, 2).tolist() == [3, 4] and most_confused(counts, 3).tolist() == [2, 3, 4]


def test_the_surest_mistakes_come_first():
    scores = torch.tensor([[.9, .1, .0], [.2, .8, .1], [.1, .2, .95], [.5, .4, .3]])
    rows,given,p = find_mistakes(scores, torch.tensor([0, 0, 0, 1]), 10.)
    assert rows.tolist() == [2, 1, 3] and given.tolist() == [2, 1, 0]
    torch.testing.assert_close(p, (10*scores.double()).softmax(1))


def test_best_matches_are_sorted_and_of_equal_ones_the_first():
    cosines,places = best_matches(torch.tensor([[1., 0.]]), torch.tensor([[.6, .8], [1., 0.], [.6, -.8], [1., 0.]]), 3)
    assert places.tolist() == [[1, 3, 0]] and cosines[0].tolist() == pytest.approx([1., 1., .6])


def made_scores(*values, chance=.25): return [Score('zero_shot', 'top_1', torch.tensor(values), chance)]


def test_rows_of_a_report_and_the_difference_to_the_first_model(tmp_path):
    data = TestSet('made', {}, NAMES, ['{}'], 'top_1', 'val')
    first,second = result_rows(data, dict(a=made_scores(1., 0., 0., 0.), b=made_scores(1., 1., 1., 0.)))
    assert 'to_first' not in first and second['to_first']['difference'] == .5
    assert (second['score'], second['chance'], second['n'], second['model'], second['split']) == (.75, .25, 4, 'b', 'val')
    assert (second['low'], second['high']) == pytest.approx(wilson_interval(.75, 4))
    by_class = [made_scores(1., 1., 1., 0.)[0]._replace(classes=torch.tensor([0, 0, 0, 1]))]
    assert result_rows(data, dict(a=by_class))[0]['score'] == .5
    line = markdown_table([first, second]).split('\n')[3]
    low,high = (100*v for v in wilson_interval(.75, 4))
    assert line.startswith(f'| b | made | zero shot | top 1 | 4 | 25.00% | 75.0% | {low:.1f} to {high:.1f} | +50.0 (')


def test_a_fault_costs_one_task_and_is_raised_at_the_end(tmp_path, monkeypatch):
    report,job = Report(tmp_path, dict(seed=4), quiet=True),labelled_job()
    def broken(job): raise ValueError('no rows')
    monkeypatch.setitem(reporting.TASKS, 'knn', broken)
    monkeypatch.setattr(reporting, 'is_ours', lambda error: True)    # a sentence for the user, not a fault
    monkeypatch.setitem(reporting.TASKS, 'zero_shot', lambda job: (made_scores(1., 0.), {}))
    for task in ('knn', 'zero_shot'): run_task(task, job, report)
    stored = json.loads((tmp_path/'results.json').read_text())
    assert stored['options'] == dict(seed=4) and [r['score'] for r in stored['rows']] == [.5]
    other = [s._replace(task='linear_probe') for s in made_scores(1., 1.)]
    monkeypatch.setitem(reporting.TASKS, 'linear_probe', lambda job: (other, {}))
    run_task('linear_probe', job, report)
    assert [(r['task'], r['score']) for r in report.record()['rows']] == [('zero_shot', .5), ('linear_probe', 1.)]
    with pytest.raises(ValueError, match='knn of m on made: no rows'): finish_report(report)


def test_models_are_called_by_the_end_of_their_path_that_tells_them_apart():
    assert model_names(['runs/a', 'runs/b']) == ['a', 'b'] and model_names(['x/run', 'y/run']) == ['x/run', 'y/run']


def test_columns_of_training_are_found_again_and_those_given_win(tmp_path):
    known = dict(data='mine', image_column='img', caption_column='txt')
    (tmp_path/'train_config.json').write_text(json.dumps(known))
    values = lambda **k: complete(given(EvaluateConfig, None, dict(runs=str(tmp_path)) | k)[0])
    config = values()
    assert config.questions.data == ['mine']
    asked = data_request(config, 'mine')
    assert (asked.image_column, asked.caption_column, asked.split, asked.limit, asked.seed) == ('img', 'txt', 'test', 0, 0)
    asked = data_request(values(caption_column='other', split='val', limit=9, seed=4), 'mine')
    assert (asked.image_column, asked.caption_column, asked.split, asked.limit, asked.seed) == ('img', 'other', 'val', 9, 4)
    assert data_request(values(data='else'), 'else').image_column is None


# ----------------------------------------------------------------------------------------------------------- fine-tuning

def test_a_zero_shot_head_answers_as_zero_shot_does():
    flip = tiny_flip()
    features,classes = flip.image_encoder(to_float(pictures(6))).detach(),unit(3, 8)
    W = zero_shot_head(flip, classes, features)
    projected = flip.image_proj(features).detach()
    want = clamped_exp(flip.logit_scale.detach())*projected @ classes.T/projected.norm(dim=1).mean()
    torch.testing.assert_close(features @ W.T, want)


def test_layers_below_the_head_learn_slower_step_by_step():
    model = ImageClassifier(tiny_flip(image_depth=3).config, ['a', 'b'])
    names,found = {id(p): n for n,p in model.named_parameters()},{}
    for g in layer_groups(model, 1., .3, .5):
        assert g['betas'] == (.9, .999)
        for p in g['params']: found[names[id(p)]] = g['lr'],g['weight_decay']
    assert len(found) == len(names) and found['head.weight'] == (1., .3) and found['head.bias'] == (1., 0.)
    block = lambda i: found[f'image_encoder.transformer.blocks.{i}.attn.qkv.weight']
    assert [block(i)[0] for i in (2, 1, 0)] == [.5, .25, .125] and block(0)[1] == .3
    assert found['image_encoder.patch_embed.weight'][0] == .0625 and found['image_encoder.transformer.norm.weight'] == (.5, 0.)


def test_branches_are_left_out_more_often_further_up_and_only_while_training():
    model = ImageClassifier(tiny_flip(image_depth=3).config, ['a', 'b'])
    assert set_drop_path(model.image_encoder, .5) == pytest.approx([0., .25, .5])
    assert set_drop_path(model.image_encoder, .5) == pytest.approx([0., .25, .5])  # replaces the earlier one
    seen,attn = [],model.image_encoder.transformer.blocks[2].attn
    attn.register_forward_hook(lambda m, a, out: seen.append((out == 0).all((1, 2)).double().mean().item()))
    x = to_float(pictures(400))
    with torch.no_grad():
        model.train()(x); model.eval()(x)
    assert .4 < seen[0] < .6 and seen[1] == 0


def test_loss_of_labels_is_smoothed_and_masked(monkeypatch):
    seen = []
    def model(images, ratio, noise): seen.append((ratio, noise)); return torch.tensor([[2., 0., 1.], [0., 1., 0.]])
    batch = dict(images=pictures(2), labels=torch.tensor([0, 2]), image_noise='noise')
    loss = classification_loss(model, batch, Plain(mask_ratio=.5), .3)
    p = torch.tensor([[2., 0., 1.], [0., 1., 0.]]).log_softmax(1)
    target = torch.tensor([[.8, .1, .1], [.1, .1, .8]])
    torch.testing.assert_close(loss, -(target*p).sum(1).mean())
    assert seen == [(.5, 'noise')] and classification_loss(model, batch, Plain(mask_ratio=0.), .3) and seen[1][0] == 0.


def test_a_broken_image_takes_its_label_along():
    pairs = make_pairs(captions=[2, 0, 1, -1], label_names=['x', 'y', 'z'])
    pairs.rows[1]['image'] = b'broken'
    rows = Labelled(pairs)
    assert [rows[i][1] for i in range(4)] == [2, 1, 1, 2] and [len(rows[i][2]) for i in range(4)] == [0, 1, 0, 1]
    assert torch.equal(rows[1][0], rows[2][0]) and pairs.label_names == ['x', 'y', 'z']
    batch = collate_labelled([rows[0], rows[1]])
    assert batch['labels'].tolist() == [2, 1] and len(batch['broken']) == 1


def finetuning(**values): return build(FinetuneConfig, given(FinetuneConfig, None, values)[0])


def test_defaults_of_finetuning():
    t = fill_in_tuning(finetuning(run='x', data='y', batch_size=64), 640).tuning
    assert (t.steps, t.epochs, t.lr, t.warmup_steps) == (200, 20, .25e-3, 20)
    given_ = dict(epochs=2, batch_size=64, lr=.5, warmup_steps=900, mask_ratio=.25, grad_clip=3.)
    stage = tuning_stage(fill_in_tuning(finetuning(run='x', data='y', **given_), 640))
    assert (stage.steps, stage.lr, stage.warmup_steps, stage.mask_ratio, stage.grad_clip) == (20, .5, 19, .25, 3.)


def test_a_classifier_is_measured_with_its_chance():
    model,pairs = ImageClassifier(tiny_flip().config, NAMES[:3]).eval(),labelled_job(names=NAMES[:3]).data.splits['test']
    model.head.bias.data[1] = 9.
    labels = torch.tensor([i*i % 3 for i in range(16)])
    found = evaluate_classifier(model, pairs)
    share = (labels == 1).double().mean().item()
    assert found['top_1'] == share and found['mean_per_class'] == .5 and found['images'] == 16 and found['skipped'] == 0
    assert found['chance'] == dict(top_1=max(share, 1 - share), mean_per_class=.5)
    assert found['interval'] == pytest.approx(wilson_interval(share, 16))


def test_weights_of_a_classifier_that_are_not_finite_are_not_saved(tmp_path, cpu, monkeypatch):
    model,saved = ImageClassifier(tiny_flip().config, NAMES[:3]),[]
    monkeypatch.setattr(tuner, 'save_run', lambda *a, **k: saved.append(k))
    parts = Plain(run=Run(cpu, tmp_path, model, Progress(step=3)), checkpoints=None)
    save_tuning(parts, must=True)
    model.head.weight.data[0, 0] = math.inf
    with pytest.raises(TrainingDiverged, match='step 3.*lower --lr'): save_tuning(parts, must=True)
    assert saved == [dict(must=True)]


def test_a_classifier_starts_with_the_tower_and_the_words_it_is_told_to():
    job = labelled_job(names=NAMES[:3])
    flip,pairs = job.flip,job.data.splits['test']
    make = lambda **k: make_classifier(finetuning(run='x', data='y', drop_path=.4, **k), flip, pairs, job.data)
    words,zeros,scratch = make(),make(head='zeros'),make(head='zeros', scratch=True)
    features = extract_features(flip, pairs, quiet=True).features
    torch.testing.assert_close(words.head.weight.detach(), zero_shot_head(flip, tasks.job_classifier(job), features))
    assert not zeros.head.weight.any() and zeros.class_names == NAMES[:3]
    same = lambda m: all(torch.equal(w, m.image_encoder.state_dict()[n]) for n,w in flip.image_encoder.state_dict().items())
    assert same(words) and same(zeros) and not same(scratch)


def test_finetuning_stops_after_ten_steps_without_finite_gradients(tmp_path, cpu):
    model = ImageClassifier(tiny_flip().config, NAMES[:3])
    run = Run(cpu, tmp_path, model, Progress(step=9, seconds=3.), model)
    run.begin(stage := Stage('finetuning', 20, 0., 1., 0))
    parts = Plain(run=run, config=finetuning(run='x', data='y', batch_size=4))
    bad = lambda n: ([torch.tensor(math.nan)]*n, [torch.tensor([math.nan, 1.])]*n)
    run.progress.losses,run.progress.norms = [torch.tensor(5.), *bad(9)[0]],[torch.ones(2), *bad(9)[1]]
    line = tuning_line(parts, Step(stage, 9))
    assert (line['loss'], line['pictures_per_second'], line['skipped_steps']) == (5., 12., 9)
    run.progress.losses,run.progress.norms = bad(1)
    step = Step(stage, 9, dict(images=pictures(2)))
    with pytest.raises(TrainingDiverged, match='10 steps in a row.*step 9'): tuning_line(parts, step)


def test_results_of_finetuning_tell_before_from_after(tmp_path, cpu, monkeypatch):
    monkeypatch.setattr(tuner, 'evaluate_classifier', lambda *args: 'after')
    config = fill_in_tuning(finetuning(run='x', data='y', steps=10, batch_size=4, seed=6, quiet=True), 40)
    progress = Progress(finished=[dict(seconds=0., results='before')], seconds=2.)
    parts = Plain(config=config, run=Run(cpu, tmp_path, None, progress, identity=dict(rows=40)), skipped=Plain(keys={1, 2}), began=0.,
                  data=Plain(splits=dict(test=None), metric='top_1', class_names=NAMES))
    found = finish_finetuning(parts)
    assert (found['before'], found['after'], found['pictures_per_second'], found['seed']) == ('before', 'after', 20., 6)
    assert (found['classes'], found['training_rows'], found['skipped_in_training']) == (8, 40, 2)
    assert json.loads((tmp_path/'results.json').read_text()) == found


TUNING = dict(batch_size=4, steps=6, log_every=1, save_every=2, keep=9, drop_path=.4, weight_decay=.3,
              layer_decay=.6, label_smoothing=.2, threads=1, mixed_precision='no', quiet=True)


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    top = tmp_path_factory.mktemp('tune')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('HF_DATASETS_CACHE', str(top/'cache'))
        (top/'data').mkdir()
        write_labelled_scenes(top/'data', 'background', 16, 8, broken=(2,))
        flip = tiny_flip(image_depth=2)
        flip.save_pretrained(top/'flip')
        config = finetuning(run=str(top/'flip'), data=str(top/'data'), out=str(top/'tuned'), seed=3, **TUNING)
        yield top, run_finetuning(config), config


def test_finetuning_that_was_stopped_ends_with_the_same_weights(tuned, tmp_path, monkeypatch):
    top,results,config = tuned
    folder = tmp_path/'tuned'
    shutil.copytree(top/'tuned', folder)
    (folder/'results.json').unlink()
    for path in checkpoints(folder)[1:]: shutil.rmtree(path)
    stored = json.loads((folder/'finetune_config.json').read_text()) | dict(out=str(folder), resume=str(folder))
    again = build(FinetuneConfig, stored)
    parts = open_finetuning(again)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=rng(4)))            # drop path draws from another seed than the order
    parts.lock and parts.lock.close()
    assert parts.skipped.seen == 8 and parts.run.progress.done == 2 and parts.run.identity == dict(seed=3, rows=16)
    assert [len(b['rows']) for b in parts.loader] == [4]*4
    assert parts.loader.dataset.seed == 3 and parts.loader.dataset.noise == dict(image_noise=16)
    rates = sorted({(g['lr'], g['weight_decay']) for g in parts.groups}, reverse=True)
    assert rates[:2] == [(1e-3*4/256, .3), (1e-3*4/256, 0.)] and rates[2][0] == pytest.approx(1e-3*4/256*.6)
    losses,own = [],tuner.training_steps
    monkeypatch.setattr(tuner, 'training_steps', lambda *args: losses.append(args[6].keywords['loss']) or own(*args))
    assert run_finetuning(again)['after'] == results['after']
    assert losses[0].func is classification_loss and losses[0].keywords == dict(label_smoothing=.2)
    want,got = load_file(top/'tuned/model.safetensors'),load_file(folder/'model.safetensors')
    assert all(torch.equal(w, got[name]) for name,w in want.items())             # drop path drew the same numbers
    assert (folder/'metrics.jsonl').read_text().count('\n') == 6 and results['training_rows'] == 16
    assert results['before']['images'] == results['after']['images'] == 8 and results['skipped_in_training'] == 1
    groups = read_state(checkpoints(folder)[-1]/'state.pt')['training']['optimizer']['param_groups']
    assert len(groups) == len(parts.groups) and all(g['betas'] == (.9, .999) for g in groups)
    assert [g['initial_lr'] for g in groups] == [g['lr'] for g in parts.groups]
