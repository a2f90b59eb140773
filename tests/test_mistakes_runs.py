"What a run reads, saves, resumes and logs, in small direct tests: seeds, splits, shares of processes, places in a stream."
import json, math, random, shutil, signal, threading, time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace as Plain

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from small import Listed, WORDS, as_tensor, ignores_signals, make_pairs, pictures, png, rng, tiny_flip
from torch import nn

from flip_nb.data import stream as streaming
from flip_nb.data.lanes import Lane, shard_plan
from flip_nb.data.pairs import AllRows, Batches, Collate, SkippedRows, corpus, draw_items, own_rng
from flip_nb.data.records import BadShard, Source
from flip_nb.data.stream import PairStream, merge_states, pick_source, stream_loader
from flip_nb.distributed import talk_group
from flip_nb.evaluation.scores import evaluate_scenes
from flip_nb.loop import Stage, Step, TrainingDiverged
from flip_nb.loss import info_nce
from flip_nb.model import to_float
from flip_nb.scale import beside, run as running
from flip_nb.scale.accumulate import cached_backward, checkpoint_blocks, split_batch
from flip_nb.scale.beside import Evaluations, Shadow, mean_score
from flip_nb.scale.checkpoint import (
    Interrupted, StopRequest, checkpoints, latest_checkpoint, mark_best, random_state, read_state, save_checkpoint, set_random_state,
    training_state)
from flip_nb.scale.config import TrainConfig, changed, fill_in_steps, resolve, stages_of
from flip_nb.scale.loader import count_rows, deliver, make_loader, make_stream, new_model, noise_sizes, open_train_data
from flip_nb.objectives.family import Objective
from flip_nb.scale.objective import objective_backward
from flip_nb.scale.options import build, flatten, given
from flip_nb.scale.resume import check_identity, resume_config
from flip_nb.scale.results import collect_results, plot_run
from flip_nb.scale.run import (
    Checkpoints, Progress, Run, count_bad_steps, cut_logs, end_stage, own_lanes, progress_from,
    progress_state, publish, save_run)
from flip_nb.scale.steps import filled_up, largest_batch, made_batch, our_step
from flip_nb.scale.trainer import (
    checkpoint_is_due, evaluation_is_due, log_line, open_loader, open_run)
from flip_nb.scale.run import stop_run
from flip_nb.scenes import Scenes
from flip_nb.train import train


@pytest.fixture(scope='module')
def cpu(): return Accelerator(cpu=True)


def options(**values): return resolve(build(TrainConfig, given(TrainConfig, None, values)[0]))


# ------------------------------------------------------------------------------------------------------ pairs and batches

def batches(n=20, batch_size=6, seed=0, rank=0, world=1, **kwargs):
    return Batches(Listed(n), Collate(tiny_flip().tokenizer), batch_size, seed, rank=rank, world=world, **kwargs)


def test_the_seed_of_the_run_and_the_pass_decide_the_order():
    orders = {(seed, step): batches(seed=seed).rows(step) for seed in (0, 1) for step in (0, 3)}
    assert len({tuple(rows) for _,rows in orders.values()}) == 4
    assert [epoch for epoch,_ in orders.values()] == [0, 1, 0, 1]
    assert orders[1, 3] == batches(seed=1).rows(3)


def test_a_pass_shows_every_row_once_and_processes_share_it():
    whole,shares = batches(18),[batches(18, rank=r, world=3) for r in range(3)]
    for epoch in (0, 1):
        seen = [row for step in range(3*epoch, 3*epoch + 3) for row in whole.rows(step)[1]]
        assert sorted(seen) == list(range(18))
    assert whole.rows(0) == batches(18).rows(0) and whole.rows(4) == batches(18).rows(4)        # in any order
    for step in (0, 2, 4): assert sum((s.rows(step)[1] for s in shares), []) == whole.rows(step)[1]
    assert [batches(20).rows(s)[0] for s in (2, 3, 5, 6)] == [0, 1, 1, 2]        # 20 rows: three batches of 6, two rows left


def test_randomness_of_a_row_depends_on_seed_pass_and_row_alone():
    noise = dict(image_noise=5)
    draw = lambda rows, *seed: draw_items(Listed(20), rows, noise, *seed)[1]['image_noise']
    both = draw([4, 7], 0, 0)
    assert torch.equal(both[1], draw([7], 0, 0)[0]) and not torch.equal(both[0], both[1])
    assert not torch.equal(both, draw([4, 7], 1, 0)) and not torch.equal(both, draw([4, 7], 0, 1))
    assert 0 <= both.min() and both.max() < 1 and both.std() > .1
    batch = batches(noise=noise)
    want = draw(batch[4]['rows'], 0, 1)
    assert torch.equal(batch[4]['image_noise'], want)                            # step 4 is in the second pass


def test_a_batch_holds_the_images_captions_and_noise_of_its_rows():
    b = batches(noise=dict(image_noise=3))
    batch = b[1]
    for i,row in enumerate(batch['rows']):
        image,caption,_ = b.pairs[row]
        assert torch.equal(batch['images'][i], image)
        assert b.collate.tokenizer.decode(batch['ids'][i]) == b.collate.tokenizer.decode(b.collate.tokenizer([caption])[0])
    assert batch['ids'].shape[1] < 8 and Collate(b.collate.tokenizer, False)([b.pairs[0]])['ids'].shape == (1, 8)


def test_reading_leaves_the_generator_of_the_program_alone():
    before = torch.get_rng_state()
    batches(noise=dict(image_noise=3))[0]
    with own_rng() as g: g.manual_seed(3); torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())


def test_one_of_several_captions_is_drawn_and_a_broken_row_gives_way_to_the_next():
    pairs = make_pairs(captions=[['a', 'b', 'c'], 'd', None, 'e'])
    pairs.rows[3]['image'] = b'broken'
    torch.manual_seed(0)
    assert {pairs[0][1] for _ in range(40)} == {'a', 'b', 'c'}
    image,caption,broken = pairs[2]                                              # rows 2 and 3 cannot be used: row 0 comes
    assert caption in 'abc' and torch.equal(image, pairs[0][0]) and [row for row,_ in broken] == [2, 3]
    assert broken[0][1] == 'no caption' and pairs[1][1:] == ('d', [])
    assert [x is None for x,*_ in map(AllRows(pairs).__getitem__, range(4))] == [False, False, True, True]
    assert sorted(corpus(pairs)) == ['a', 'b', 'c', 'd', 'e']
    assert make_pairs(captions=[1, -1, 0], label_names=['x', 'y']).captions(0) == ['y']
    assert corpus(make_pairs(captions=[1, 1], label_names=['x', 'y'])) == ['x', 'y']
    assert make_pairs(captions=[1, -1, 0], label_names=['x', 'y']).captions(1) == []


def test_rows_that_cannot_be_used_are_counted_once_and_too_many_stop_a_run(tmp_path):
    path = tmp_path/'skipped-0.jsonl'
    skipped = SkippedRows(path, .1, first=40)
    for _ in range(5): skipped.add([(3, 'no image: x'), (4, 'key', 'no caption')], 6)          # the same two rows again
    assert skipped.kinds == Counter({'no image': 1, 'key': 1}) and skipped.seen == 40
    assert len(path.read_text().splitlines()) == 2
    again = SkippedRows(path, .1, first=40, seen=40)                             # a resumed run knows them
    assert again.keys == {3, 4} and again.kinds == skipped.kinds
    again.add([(k, 'no image: x') for k in range(10, 20)], 0)                     # behind the first 40 nothing stops
    fresh = SkippedRows(tmp_path/'other.jsonl', .1, first=40)
    fresh.add([(k, 'x: y') for k in range(4)], 0)                                # four of 40 are allowed
    with pytest.raises(ValueError, match='5 of the first 5 rows.*more than 10%'): fresh.add([(9, 'x: y')], 0)


def test_workers_ignore_the_signals_that_end_a_run(cpu):
    config = options(data='x', stream=True, batch_size=4)
    loaders = (make_loader(cpu, Listed(8), None, 4, 0, {}, range(1)), make_stream(cpu, [Made()], 16, None, config, {}))
    assert all(ignores_signals(loader.worker_init_fn) for loader in loaders)


# --------------------------------------------------------------------------------------------------------------- streams

class Made(Source):
    "Shards that exist in memory only."
    sizes = (5, 7, 4, 6)
    def __init__(self, letter='a', sizes=sizes, weight=1.):
        self.sizes = sizes
        super().__init__([f'{letter}{s}' for s in range(len(sizes))], ('image',), ('caption',), weight=weight)
        self.record = dict(image=png(pictures(1)[0]), caption=[f'{letter} first', f'{letter} second'])
    def records(self, shard, wanted=lambda i: True, start=0):
        for i in range(self.sizes[shard]):                                       # from its beginning, as a tar file
            if wanted(i): yield i, str(i), self.record


def keys_of(lane, n): return [next(lane)[1] for _ in range(n)]


@pytest.mark.parametrize('lanes', [1, 2, 3, 5])
def test_every_record_is_read_once_in_a_pass_whatever_the_number_of_readers(lanes):
    everything = sorted(f'a{s}/{i}' for s,n in enumerate(Made.sizes) for i in range(n))
    found = []
    for lane in range(lanes):
        reader = Lane(Made(), 0, lane, lanes, seed=3, buffer_size=4)
        for _ in range(len(everything) + 1):
            epoch,key,*_ = next(reader)
            if epoch: break
            found.append(key)
        assert epoch == 1
    assert sorted(found) == everything


def test_whole_shards_are_dealt_out_evenly_and_the_rest_is_shared():
    plans = [shard_plan(7, lane, 3, 0) for lane in range(3)]
    assert all(len(p) == 3 and [shared for _,shared in p] == [False, False, True] for p in plans)
    assert len({p[2] for p in plans}) == 1
    assert {s for p in plans for s,_ in p} == set(range(7))
    orders = [tuple(s for s,_ in shard_plan(7, 0, 1, seed)) for seed in range(4)]
    assert len(set(orders)) == 4 and orders[2] == tuple(s for s,_ in shard_plan(7, 0, 1, 2))


def test_passes_seeds_and_sources_have_orders_of_their_own_and_blocks_are_shuffled():
    first = lambda **k: keys_of(Lane(Made(), k.pop('number', 0), buffer_size=k.pop('buffer_size', 8), **k), 22)
    assert first(seed=0) == first(seed=0)
    assert len({tuple(first(seed=s, number=n)) for s in (0, 1) for n in (0, 1)}) == 4
    reader = Lane(Made(), buffer_size=100)
    one,two = keys_of(reader, 22),keys_of(reader, 22)
    assert sorted(one) == sorted(two) and one != two
    assert keys_of(Lane(Made(sizes=(22,)), buffer_size=1), 22) == [f'a0/{i}' for i in range(22)]
    blocks = [[int(k[3:]) % 20 for k in keys_of(reader, 20)] for reader in [Lane(Made(sizes=(40,)), buffer_size=20)] for _ in range(2)]
    assert sorted(blocks[0]) == sorted(blocks[1]) == list(range(20)) and blocks[0] != blocks[1]
    assert keys_of(Lane(Made(sizes=(22,)), buffer_size=22), 22) != [f'a0/{i}' for i in range(22)]


@pytest.mark.parametrize('after', [1, 6, 7, 8, 21, 22, 23, 30])
def test_a_reader_resumes_at_any_record(after):
    reader = Lane(Made(), lane=1, lanes=3, seed=2, buffer_size=3)
    keys_of(reader, after)
    place = json.loads(json.dumps(reader.place))
    assert keys_of(reader, 20) == keys_of(Lane(Made(), lane=1, lanes=3, seed=2, buffer_size=3, place=place), 20)


def stream(rank=0, world=1, seed=0, start=None, sources=None, **kwargs):
    return PairStream(sources or [Made()], as_tensor, Collate(tiny_flip().tokenizer), 4, seed, dict(image_noise=5), rank,
                      world, 6, start, **kwargs)


def take(s, n): return [b for b,_ in zip(stream_loader(s), range(n))]


def test_a_stream_resumes_with_the_same_batches_and_another_seed_reads_otherwise():
    whole = take(stream(), 9)
    later = take(stream(start={0: whole[3]['state']}), 5)
    for a,b in zip(whole[4:], later):
        assert a['rows'] == b['rows'] and torch.equal(a['image_noise'], b['image_noise']) and a['state'] == b['state']
        assert torch.equal(a['ids'], b['ids']) and torch.equal(a['images'], b['images'])
    other = take(stream(seed=1), 2)
    assert other[0]['rows'] != whole[0]['rows']
    noise = {key: x for b in whole for key,x in zip(b['rows'], b['image_noise'])}
    same = [(key, x) for b in other for key,x in zip(b['rows'], b['image_noise']) if key in noise]
    assert same and not any(torch.equal(noise[key], x) for key,x in same)       # noise follows the seed, too
    assert len({tuple(x.tolist()) for b in whole[:5] for x in b['image_noise']}) == 20
    assert len({tuple(x.tolist()) for b in whole for x in b['ids']}) == 2       # either caption is drawn


def test_processes_of_a_stream_read_different_records_and_share_a_batch():
    a,b = (take(stream(rank=r, world=2), 4) for r in range(2))
    assert all(len(x['rows']) == 2 for x in a + b)
    keys = [k for x in a + b for k in x['rows']]
    assert len(set(keys)) == len(keys) == 16 and [x['state']['lane'] for x in (a[0], b[0])] == [0, 1]


def test_a_stream_in_another_setting_begins_the_next_pass():
    state = take(stream(), 3)[-1]['state']
    assert stream(start={0: state}).resumes(0) and not stream(seed=1, start={0: state}).resumes(0)
    loader = stream_loader(stream(rank=1, world=2, start={0: state}))
    assert 'not what it was' in loader.note
    batch = next(iter(loader))
    assert batch['state']['places'][0]['epoch'] == batch['state']['begin'] == 1 and batch['state']['batches'] == 1


def test_after_a_restart_the_batches_come_from_the_reader_whose_turn_it_is(monkeypatch):
    def begin(worker, start, **other):
        monkeypatch.setattr(streaming, 'get_worker_info', lambda: Plain(id=worker, num_workers=2))
        return next(iter(stream(start=start, **other)))['state']
    first = {worker: begin(worker, None) for worker in (0, 1)}
    assert [first[w]['lane'] for w in (0, 1)] == [0, 1]
    again = [begin(worker, {0: first[0]}) for worker in (0, 1)]                  # one batch was given: lane 1 is next
    assert [(s['lane'], s['batches']) for s in again] == [(1, 1), (0, 2)] and again[0] == first[1]
    assert [begin(worker, {0: first[0]}, seed=1)['lane'] for worker in (0, 1)] == [0, 1]       # another reading


def test_the_newest_state_of_each_reader_of_the_latest_reading_counts():
    s = lambda lane, begin, batches: dict(lane=lane, begin=begin, batches=batches)
    assert merge_states({0: s(0, 1, 3), 1: s(1, 1, 9)}, {0: s(0, 1, 4), 2: s(2, 0, 99)}) == {0: s(0, 1, 4), 1: s(1, 1, 9)}


def test_sources_are_drawn_by_their_weights():
    counts = Counter(pick_source([3, 0, 1], 5, i) for i in range(4000))
    assert 2900 < counts[0] < 3100 and counts[1] == 0 and pick_source([3, 0, 1], 5, 7) == pick_source([3, 0, 1], 5, 7)
    two = [Made('a', weight=3.), Made('b', weight=1.)]
    rows = [key[0] for b in take(stream(sources=two), 100) for key in b['rows']]
    assert 250 < rows.count('a') < 350
    equal = [Made('a'), Made('b')]
    drawn = [[key[0] for b in take(stream(rank, 2, sources=equal), 8) for key in b['rows']] for rank in (0, 1)]
    assert drawn[0] != drawn[1]                                                  # every reader draws for itself
    keys = [key for b in take(stream(sources=equal), 16) for key in b['rows']]
    one,two = ([k[1:] for k in keys if k[0] == letter] for letter in 'ab')
    assert one[:15] != two[:15]                                                  # and reads each source in an order of its own


class Torn(Made):
    "The second shard cannot be read."
    def records(self, shard, wanted=lambda i: True, start=0):
        if shard == 1: raise BadShard('shard unreadable', 'torn')
        yield from super().records(shard, wanted, start)


def test_a_shard_that_cannot_be_read_is_reported_and_passed_over():
    found = take(stream(sources=[Torn()]), 3)
    assert list([f for b in found for f in b['broken']][0]) == ['a1', 'shard unreadable', 'torn']
    assert not any(key.startswith('a1') for b in found for key in b['rows'])


# ------------------------------------------------------------------------------------------------------ what a run reads

def write_splits(folder, sizes):
    import datasets
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value('string'))
    for split,n in sizes.items():
        columns = dict(image=[png(x) for x in pictures(n, side=32)], caption=[f'{split} {i}' for i in range(n)])
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder/f'{split}.parquet')


@pytest.mark.parametrize('sizes,rows', [(dict(train=9, val=5, test=4), 4), (dict(train=9, val=5), 5)])
@pytest.mark.parametrize('streamed', [False, True])
def test_a_run_is_measured_on_test_rows_where_there_are_any(tmp_path, monkeypatch, sizes, rows, streamed):
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path/'cache'))
    write_splits(tmp_path, sizes)
    data = open_train_data(options(data=str(tmp_path), stream=streamed), 32)
    flip = tiny_flip(image_size=32)
    assert data.evaluate(flip, flip.tokenizer)['rows'] == rows
    assert {c.split()[0] for c in data.captions()} == {'train'}
    if not streamed: assert len(data.train) == 9


def test_objects_are_measured_on_their_test_split():
    flip,splits = tiny_flip(),dict(train=make_pairs(9), val=make_pairs(5), test=make_pairs(4))
    data = open_train_data(options(preset='tiny'), 16, splits)
    assert data.evaluate(flip, flip.tokenizer)['rows'] == 4 and len(data.train) == 9
    del splits['test']
    assert open_train_data(options(), 16, splits).evaluate(flip, flip.tokenizer)['rows'] == 5
    assert open_train_data(options(), 16, splits['train']).evaluate(flip, flip.tokenizer)['retrieval'] is None


def test_scenes_to_train_on_and_to_measure_on_follow_the_options():
    data = open_train_data(options(seed=4, eval_size=70), 16)
    assert torch.equal(data.train[3][0], Scenes('train', 16, seed=4)[3][0])
    assert data.evaluate.func is evaluate_scenes and data.evaluate.keywords == dict(size=70, seed=4)


def test_a_vocabulary_has_the_size_that_was_asked_for():
    captions = [f'w{i} x{7*i}' for i in range(400)]
    sizes = [new_model(options(vocab_size=n).model, lambda: captions).config.vocab_size for n in (40, 90)]
    assert sizes == [40, 90]


def test_every_process_of_a_stream_knows_its_place():
    second = Plain(process_index=1, num_processes=2, device=torch.device('cpu'), is_main_process=False)
    config = options(data='x', stream=True, batch_size=4, seed=3, buffer_size=7)
    made = make_stream(second, [Made()], 16, None, config, dict(image_noise=3)).dataset
    assert (made.rank, made.world, made.seed, made.buffer_size, made.batch_size) == (1, 2, 3, 7, 4)
    assert made.noise == dict(image_noise=3)


def test_noise_for_every_mask_and_no_more():
    assert noise_sizes(tiny_flip(), 0.) == dict(image_noise=16)
    assert noise_sizes(tiny_flip(), .25) == dict(image_noise=16, text_noise=8)


def test_a_loader_begins_at_the_step_it_is_given(cpu):
    flip = tiny_flip()
    whole,later = (list(make_loader(cpu, Listed(20), Collate(flip.tokenizer), 6, 5, dict(image_noise=16), steps))
                   for steps in (range(6), range(4, 6)))
    assert [b['rows'] for b in later] == [b['rows'] for b in whole[4:]] and len(whole) == 6
    assert torch.equal(later[0]['image_noise'], whole[4]['image_noise'])
    other = next(iter(make_loader(cpu, Listed(20), Collate(flip.tokenizer), 6, 6, {}, range(1))))
    assert other['rows'] != whole[0]['rows']
    second = Plain(process_index=1, num_processes=2, device=cpu.device)
    assert next(iter(make_loader(second, Listed(20), Collate(flip.tokenizer), 6, 5, {}, range(1))))['rows'] == whole[0]['rows'][3:]


def test_delivery_keeps_the_books_and_hands_out_the_rest(tmp_path):
    lanes,skipped = {},SkippedRows(tmp_path/'skipped-0.jsonl')
    batch = lambda n: dict(images=torch.ones(2), rows=[n, n + 1], broken=[(n, 'x: y')], state=dict(lane=n % 2, batches=n))
    got = list(deliver((batch(n) for n in (1, 2, 3)), torch.device('cpu'), lanes, skipped))
    assert lanes == {1: dict(lane=1, batches=3), 0: dict(lane=0, batches=2)}
    assert skipped.seen == 9 and skipped.keys == {1, 2, 3} and got[0].keys() == {'images', 'rows'}


def test_a_pass_must_hold_a_batch():
    assert count_rows(options(batch_size=6), Listed(6)) == 6
    with pytest.raises(ValueError, match='larger than the data, 5 rows'): count_rows(options(batch_size=6), Listed(5))
    assert count_rows(options(stream=True, data='x', pairs=50, batch_size=6), []) == 50


# --------------------------------------------------------------------------------------------------------------- options

def test_defaults_as_they_are_documented():
    c = options()
    assert (c.masking.mask_ratio, c.stages.lr, c.optim.batch_size, c.optim.weight_decay, c.optim.grad_clip) == (.5, 2e-3, 128, .2, 0.)
    assert (c.data.min_area, c.model.vocab_size, c.model.preset) == (.5, 4096, 'tiny') and options(data='x').model.preset == 'mini'
    full = fill_in_steps(c, None)
    s = full.stages
    assert (s.steps, s.tune_steps, s.tune_lr, s.warmup_steps) == (3000, 150, 2e-4, 150)
    s = fill_in_steps(options(data='x', batch_size=50), 1010).stages
    assert (s.steps, s.epochs) == (1212, 60)                                     # 60 passes over 1,010 rows of 50
    assert fill_in_steps(options(data='x', epochs=.5, batch_size=50), 1000).stages.steps == 10
    assert fill_in_steps(options(data='x', batch_size=50), 1013).stages.steps == 1216           # 1215.6


def test_what_is_given_wins_over_the_recipe_and_the_recipe_over_defaults():
    from flip_nb.official.recipe import RECIPES, get_recipe
    name = next(n for n in RECIPES if not n.endswith('-tune'))
    recipe = get_recipe(name)
    c,mine = options(recipe=name, batch_size=512),options(recipe=name, batch_size=512, lr=.5, mask_ratio=.25)
    assert c.stages.lr == recipe['base_lr']*2 and (mine.stages.lr, mine.masking.mask_ratio) == (.5, .25)
    assert c.masking.mask_ratio == recipe['mask_ratio']
    assert c.model.vocab and options(recipe=name, vocab_size=99).model.vocab is None
    s = fill_in_steps(c, 1000).stages
    assert s.tune_steps == 0 or s.tune_steps == recipe.get('tune_steps', s.steps//20)
    assert abs(s.warmup_steps - s.steps*recipe['warmup_epochs']/recipe['virtual_epochs']) < 1


def test_stages_follow_the_options():
    c = options(steps=40, tune_steps=8, lr=1., tune_lr=.1, warmup_steps=4, mask_ratio=.75, grad_clip=2.)
    first,tuning = stages_of(c)
    assert first == Stage('masked', 40, .75, 1., 4, 2.) and (tuning.steps, tuning.lr, tuning.mask_ratio) == (8, .1, 0.)


def test_a_resumed_run_keeps_its_options_and_takes_new_ones_only_where_it_may(tmp_path):
    started = flatten(changed(fill_in_steps(options(steps=40, seed=3), None), out='moved', mixed_precision='no'))
    (tmp_path/'train_config.json').write_text(json.dumps(started))
    again = resume_config(*given(TrainConfig, None, dict(resume=str(tmp_path), keep=7)))
    assert (again.stages.steps, again.seed, again.save.keep, again.save.out) == (40, 3, 7, str(tmp_path))
    for wrong in (dict(steps=41), dict(seed=4), dict(batch_size=64)):
        with pytest.raises(ValueError, match='was started with'):
            resume_config(*given(TrainConfig, None, dict(resume=str(tmp_path)) | wrong))


# ----------------------------------------------------------------------------------------------------------- checkpoints

def step_folders(run, *steps):
    for s in steps: (run/'checkpoints'/f'step-{s}').mkdir(parents=True)


def test_checkpoints_are_ordered_by_number_not_by_text(tmp_path):
    step_folders(tmp_path, 9, 10, 100000000, 99999999)
    assert [p.name for p in checkpoints(tmp_path)] == ['step-9', 'step-10', 'step-99999999', 'step-100000000']


def fill(folder): (folder/'x').write_text('x')


def test_newest_best_and_spared_checkpoints_stay(tmp_path):
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, fill, keep=2, spare=[5])
        if step == 3: mark_best(tmp_path, 3, .5)
        if step == 2: mark_best(tmp_path, 2, .4)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [3, 5, 6, 7]
    save_checkpoint(tmp_path, 6, fill, keep=2)                                   # 7 is of a run that went further
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [3, 5, 6]
    mark_best(tmp_path, 4, .9)                                                   # no such checkpoint: nothing happens
    assert not (tmp_path/'checkpoints/step-00000004').exists()


def test_the_newest_checkpoint_that_is_whole_is_taken_and_the_others_are_named(tmp_path):
    for step in (1, 2, 3): save_checkpoint(tmp_path, step, fill, keep=3)
    (tmp_path/'checkpoints/step-00000003/x').write_text('y')
    path,faults = latest_checkpoint(tmp_path)
    assert path.name == 'step-00000002' and len(faults) == 1 and 'step-00000003' in faults[0]
    save_checkpoint(tmp_path, 3, fill, keep=3)                                   # a damaged one is written anew
    assert latest_checkpoint(tmp_path) == (tmp_path/'checkpoints/step-00000003', [])


def test_all_generators_of_a_process_are_restored():
    drawn = lambda: (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn())
    random.gauss(0, 1); np.random.randn()                                        # half of a pair is waiting in each
    state = random_state()
    first = drawn()
    torch.manual_seed(5); np.random.seed(5); random.seed(5)
    set_random_state(state)
    assert drawn() == first


def trained(cpu, steps=3, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(.5), nn.Linear(4, 1))
    run = Run(cpu, Path('.'), model, Progress(), model)
    run.begin(Stage('x', 20, 0., .1, 5))
    return run, [one_step(run) for _ in range(steps)]


def one_step(run):
    run.wrapped(torch.ones(2, 3)).sum().backward()
    run.optimizer.step(); run.optimizer.zero_grad(); run.schedule.step()
    return [p.detach().clone() for p in run.model.parameters()]


def test_a_run_resumes_with_its_weights_moments_schedule_and_random_numbers(cpu):
    run,_ = trained(cpu)
    saved = dict(training=training_state(run.wrapped, run.optimizer), schedule=run.schedule.state_dict(),
                 random=[random_state()], scaler=None)
    want = [one_step(run) for _ in range(3)]                                     # with dropout
    other,_ = trained(cpu, 1, seed=8)
    other.begin(Stage('x', 20, 0., .1, 5), saved=saved)
    for a,b in zip(want, [one_step(other) for _ in range(3)]): assert all(map(torch.equal, a, b))


def test_a_stop_is_remembered_and_a_second_one_within_a_second_is_the_same():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)            # a shell's background job ignores it
    try: stop_twice()
    finally: signal.signal(signal.SIGINT, before)


def stop_twice():
    with StopRequest(patience=60) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == 'SIGTERM'
        signal.raise_signal(signal.SIGINT)                                       # of the launcher
        assert stop.signal == 'SIGTERM'
    with pytest.raises(KeyboardInterrupt), StopRequest(patience=0):
        signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)


# -------------------------------------------------------------------------------------------------------- where a run is

def test_progress_comes_back_from_a_checkpoint_and_counts_on():
    p = Progress(losses=[torch.tensor(1.)], norms=[torch.tensor([1., 2.])], waited=1., seconds=4.)
    p.add(Step(Stage('x', 9, 0., 1., 0), 5, None, torch.tensor(2.), torch.tensor([3., 4.]), .5))
    q = progress_from(progress_state(p))
    assert (q.step, q.done, q.waited, torch.stack(q.losses).tolist()) == (5, 1, 1.5, [1., 2.]) and len(q.norms) == 2
    q.spend(time.perf_counter() - 5, torch.device('cpu'))
    assert q.seconds == pytest.approx(9, abs=.1) and q.worked == pytest.approx(5, abs=.1)
    q.seconds = 4.
    end_stage(q, 'scores')
    assert (q.stage, q.step, q.done, q.seconds, q.finished) == (1, 0, 1, 0., [dict(seconds=4., results='scores')])


def test_bad_steps_are_counted_in_all_and_in_a_row():
    p,nan = Progress(in_a_row=2),math.nan
    assert count_bad_steps(p, torch.tensor([[nan, 1], [1, math.inf], [1, 1], [nan, 1]])) == 4
    assert (p.skipped, p.in_a_row) == (3, 1) and count_bad_steps(p, torch.ones(2, 2)) == 0 and p.in_a_row == 0


def test_log_lines_written_after_the_checkpoint_are_forgotten(tmp_path, cpu):
    logs = {n: tmp_path/n for n in ('metrics.jsonl', 'evaluations.jsonl', 'skipped-0.jsonl', 'skipped-1.jsonl', 'mine.jsonl')}
    for path in logs.values(): path.write_text('{"a": 1}\n{"b": 2}\n')
    cut_logs(Run(cpu, tmp_path, None, Progress(files={'metrics.jsonl': 9, 'evaluations.jsonl': 900})))
    sizes = {name: path.stat().st_size for name,path in logs.items()}
    assert sizes == {'metrics.jsonl': 9, 'evaluations.jsonl': 18, 'skipped-0.jsonl': 0, 'skipped-1.jsonl': 18, 'mine.jsonl': 18}


def test_places_in_a_stream_come_from_the_process_that_reads_there():
    known = [{0: 'a', 1: 'b', 2: 'old'}, {1: 'old', 2: 'c', 3: 'd'}]
    assert own_lanes(known, 2) == {0: 'a', 1: 'b', 2: 'c', 3: 'd'} and own_lanes([{0: 'a'}, {1: 'b'}], 0) == {0: 'a', 1: 'b'}


def test_only_what_belongs_to_the_model_is_published(tmp_path):
    step_folders(tmp_path, 1)
    checkpoint = tmp_path/'checkpoints/step-1'
    for name in ('model.safetensors', 'config.json', 'state.pt', 'manifest.json', 'best.json'): (checkpoint/name).write_text(name)
    publish(checkpoint, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'checkpoints', 'model.safetensors', 'config.json'}


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path):
    check_identity(tmp_path, dict(identity=dict(seed=1, rows=None)), dict(seed=1, rows=5))
    for name,there,here in (('seed', 0, 1), ('rows', 400, 300), ('preset', 'tiny', 'mini')):
        with pytest.raises(ValueError, match=f'{there}.*{here}'):
            check_identity(tmp_path, dict(identity={name: there}), {name: here})


def test_weights_that_are_not_finite_are_not_saved(tmp_path, cpu):
    flip = tiny_flip()
    run = Run(cpu, tmp_path, flip, Progress(done=4), flip)
    run.begin(Stage('x', 9, 0., 1., 0))
    saving = Checkpoints(run, options().save)
    saving.last = None
    flip.text_proj.weight.data[0, 0] = math.nan
    with pytest.raises(TrainingDiverged, match='step 4'): save_run(saving, must=True)
    assert not list(tmp_path.rglob('*.safetensors'))
    flip.text_proj.weight.data[0, 0] = 0
    save_run(saving, must=True)
    assert saving.last == 4 and latest_checkpoint(tmp_path)[0].name == 'step-00000004'
    stored = load_file(tmp_path/'model.safetensors')
    assert torch.equal(stored['text_proj.weight'], flip.text_proj.weight)


def test_a_checkpoint_that_could_not_be_written_is_tried_again(tmp_path, cpu, capsys):
    flip = tiny_flip()
    run = Run(cpu, tmp_path, flip, Progress(done=4), flip)
    run.begin(Stage('x', 9, 0., 1., 0))
    saving,full = Checkpoints(run, options().save),OSError(28, 'No space left on device')
    saving.last = 2
    write,saving.write = saving.write,lambda *args: (_ for _ in ()).throw(full)
    save_run(saving)
    assert saving.last == 2 and 'No space left' in capsys.readouterr().err
    with pytest.raises(ValueError, match='step 4 could not be written'): save_run(saving, must=True)
    saving.write = write
    save_run(saving)
    saving.write = None                                                          # step 4 is saved: nothing is written again
    save_run(saving)
    assert saving.last == 4 and latest_checkpoint(tmp_path)[0].name == 'step-00000004'


# ------------------------------------------------------------------------------------------------------ evaluation beside

def test_an_evaluation_beside_training_talks_in_a_group_of_its_own():
    seen,reported = [],[]
    shadow = Shadow(tiny_flip(), group='own')
    for _ in range(2):
        shadow.start(lambda model: seen.append((talk_group.get(), model)) or 'scores', lambda *r: reported.append(r[0]))
        shadow.wait()
    assert seen == [('own', shadow.model)]*2 and reported == ['scores']*2 and talk_group.get() is None


def test_several_processes_get_a_group_for_evaluations(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(beside.dist, 'new_group', lambda **k: made.append(k) or 'own')
    run = lambda n: Plain(accelerator=Plain(num_processes=n), folder=tmp_path, model=tiny_flip())
    assert Evaluations(run(2), None).shadow.group == 'own' and made == [dict(backend='gloo')]
    assert Evaluations(run(1), None).shadow.group is None


def scores(z, i2t=0., t2i=0.): return dict(zero_shot=z, zero_shot_unseen=None, retrieval=dict(i2t={'R@1': i2t}, t2i={'R@1': t2i}))


def test_the_weights_that_are_evaluated_are_those_of_that_step_and_the_best_is_marked(tmp_path, cpu):
    flip = tiny_flip()
    run,found = Run(cpu, tmp_path, flip, Progress()),[]
    evaluations = Evaluations(run, lambda model: found.append(model.logit_scale.item()) or scores(found[-1]/100))
    for done,scale in ((1, 2.), (2, 4.), (3, 3.), (4, 4.)):
        save_checkpoint(tmp_path, done, fill, keep=9)
        flip.logit_scale.data.fill_(scale)
        run.progress.done = run.progress.step = done
        evaluations.start_now(Stage('masked', 9, 0., 1., 0))
        flip.logit_scale.data.fill_(99.)                                         # training continues
        evaluations.shadow.wait()
    assert found == [2., 4., 3., 4.]
    lines = [json.loads(line) for line in (tmp_path/'evaluations.jsonl').read_text().splitlines()]
    assert [(line['done'], line['stage'], line['score']) for line in lines] == [
        (1, 'masked', .02), (2, 'masked', .04), (3, 'masked', .03), (4, 'masked', .04)]
    assert [(tmp_path/f'checkpoints/step-{d:08}/best.json').exists() for d in (1, 2, 3, 4)] == [True, True, False, True]
    assert evaluations.finish(Stage('masked', 9, 0., 1., 0))['zero_shot'] == .99


def test_an_evaluation_that_was_cut_off_is_known_and_repeated(tmp_path, cpu):
    flip,go = tiny_flip(),threading.Event()
    run,found = Run(cpu, tmp_path, flip, Progress(step=2, done=2)),[]
    for done,scale in ((2, 3.), (4, 5.)):
        flip.logit_scale.data.fill_(scale)
        save_checkpoint(tmp_path, done, flip.save_pretrained, keep=9)
    evaluations = Evaluations(run, lambda model: go.wait() and found.append(model.logit_scale.item()) or scores(.1))
    assert evaluations.pending() is None
    evaluations.start_now(Stage('masked', 9, 0., 1., 0))
    pending = evaluations.pending()
    assert (pending['done'], pending['stage']) == (2, 'masked')
    go.set(); evaluations.shadow.wait()
    run.progress.done = 4
    assert evaluations.repeat(pending) is False and found == [5.]                # its line is there: it had ended
    (tmp_path/'evaluations.jsonl').unlink()
    assert evaluations.repeat(pending) is False
    evaluations.shadow.wait()
    assert evaluations.repeat(pending | dict(done=4)) is True
    evaluations.shadow.wait()
    assert evaluations.repeat(pending | dict(done=4)) is True
    assert found == [5., 3., 5.] and evaluations.repeat(None) is False and evaluations.repeat(pending | dict(done=3)) is False


def test_the_score_that_chooses_the_best():
    assert mean_score(scores(0., .5, .1)) == 0 and mean_score(scores(.3, .5, .1)) == .3 and mean_score(scores(None, .5, .1)) == .3
    assert mean_score(dict(zero_shot=None, retrieval=None)) == 0


# --------------------------------------------------------------------------------------------------------------- one step

def gradients(flip, batch, **kwargs):
    flip.zero_grad()
    torch.manual_seed(3)
    loss = objective_backward(Accelerator(cpu=True), flip, batch, Stage('x', 1, .5, 1., 0), **kwargs)
    return loss, [p.grad.clone() for p in flip.parameters()]


@pytest.mark.parametrize('noisy', [True, False])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole_batch(noisy):
    flip = tiny_flip()
    batch = dict(images=pictures(6), ids=flip.tokenizer(WORDS), rows=[0]*6)
    if noisy: batch |= dict(image_noise=torch.rand(6, 16, generator=rng(1)), text_noise=torch.rand(6, 8, generator=rng(2)))
    how = dict(text_mask_ratio=.5, text_mask_order='padding_first') if noisy else {}
    pieces = [gradients(flip, batch, micro_batch=4, **how), gradients(flip, batch, micro_batch=4, objective=Objective(chunk_size=2), **how)]
    if noisy:
        images = flip.encode_image(to_float(batch['images']), .5, batch['image_noise'])
        texts = flip.encode_text(batch['ids'], .5, 'padding_first', batch['text_noise'])
        want = info_nce(images, texts, flip.logit_scale.exp())
        flip.zero_grad(); want.backward()
        for loss,grads in pieces + [gradients(flip, batch, **how)]:
            torch.testing.assert_close(loss, want.detach())
            for g,p in zip(grads, flip.parameters()): torch.testing.assert_close(g, p.grad, rtol=1e-3, atol=1e-5)
    else: torch.testing.assert_close(pieces[0][1], pieces[1][1], rtol=1e-3, atol=1e-5)


def test_pieces_see_the_same_random_numbers_twice_and_gradients_are_reduced_once():
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1)); self.drawn = []
        def forward(self, x):
            noise = torch.rand(len(x), 3); self.drawn.append(noise)
            return self.w*(x + noise), self.w*x, self.w
    model,synced = Noisy(),[]
    class Quiet:
        def __enter__(self): synced.append('quiet')
        def __exit__(self, *_): pass
    x = torch.randn(5, 3, generator=rng())
    torch.manual_seed(4)
    cached_backward(model, split_batch(dict(x=x), 2), lambda a, b, s: (a*b).sum()*s.sum() + 0*torch.rand(1).sum(),
                    lambda v: (synced.append('back'), v.backward()), Quiet)
    after = torch.rand(1)
    assert len(model.drawn) == 6 and all(map(torch.equal, model.drawn[:3], model.drawn[3:]))
    assert synced == ['quiet', 'back', 'quiet', 'back', 'back']
    torch.manual_seed(4)
    noise = torch.cat([torch.rand(n, 3) for n in (2, 2, 1)])
    torch.rand(1)                                                                # of the loss
    assert torch.equal(after, torch.rand(1))                                     # as if each piece had been encoded once
    w = torch.ones(1, requires_grad=True)
    ((w*(x + noise))*(w*x)).sum().mul(w.sum()).backward()
    torch.testing.assert_close(model.w.grad, w.grad)


def test_settings_go_to_every_piece_and_rows_are_cut():
    parts = split_batch(dict(x=torch.arange(5), mask_ratio=.5, scale=torch.tensor(2.)), 2)
    assert [p['x'].tolist() for p in parts] == [[0, 1], [2, 3], [4]] and all(p['mask_ratio'] == .5 and p['scale'] == 2 for p in parts)


def test_recomputed_blocks_give_the_same_gradient():
    flip = tiny_flip()
    batch = dict(images=pictures(3), ids=flip.tokenizer(WORDS[:3]), image_noise=torch.rand(3, 16, generator=rng()))
    before = gradients(flip, batch)
    torch.testing.assert_close(gradients(checkpoint_blocks(flip), batch), before)


def test_a_measured_step_masks_as_asked_and_counts_its_tokens():
    flip = tiny_flip()
    batch,seen = made_batch(flip.config, 4),[]
    assert torch.equal(batch['images'], made_batch(flip.config, 4)['images'])
    assert not torch.equal(batch['images'], made_batch(flip.config, 4, seed=1)['images']) and batch['ids'].min() >= 5
    flip.image_encoder.transformer.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    for step in our_step(Accelerator(cpu=True), flip, batch, [0., .5, .75]).values(): step()
    assert seen == [17, 9, 5]                                                    # a class token and what is kept of 16
    assert filled_up(torch.tensor([[5, 6]]), 4).tolist() == [[5, 6, 0, 0]]
    short = made_batch(flip.config, 50, 'flickr8k')['ids']
    assert short.shape[1] <= 8 and (short == 0).any() and not ((short[:, :-1] == 0) & (short[:, 1:] != 0)).any()


def test_the_largest_batch_is_found_by_doubling_and_halving():
    asked = []
    def memory(n): asked.append(n); return n/10
    fits,needs = largest_batch(memory, 5.05)
    assert 48 <= fits <= 50 and needs == fits/10 and asked[:4] == [8, 16, 32, 64]
    with pytest.raises(ValueError, match='8 pairs needs 0.80 GB'): largest_batch(memory, .5)


# ----------------------------------------------------------------------------------------------------------- a whole run

DATA = dict(batch_size=4, steps=6, tune_steps=4, weight_decay=.5, lr=1e-2, warmup_steps=2, log_every=2, save_every=2, eval_every=4, keep=9,
            quiet=True, track='none', mixed_precision='no', seed=5, threads=1)


def run_data(): return dict(train=make_pairs(10), val=make_pairs(3, seed=1), test=make_pairs(5, seed=2))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')/'run'
    return folder, train(dataset=run_data(), model=tiny_flip(), out=str(folder), **DATA)


def config_of(folder, **changes): return changed(build(TrainConfig, json.loads((folder/'train_config.json').read_text())), **changes)


def stopped(finished, tmp_path, step):
    "The run as a kill after a checkpoint would have left it."
    folder = tmp_path/'run'
    shutil.copytree(finished[0], folder)
    for name in ('results.json', 'training_curve.png'): (folder/name).unlink()
    for path in checkpoints(folder):
        if int(path.name[5:]) > step: shutil.rmtree(path)
    return folder


def evaluated(folder): return [json.loads(line) for line in (folder/'evaluations.jsonl').read_text().splitlines()]


def test_results_of_a_run(finished):
    folder,results = finished
    lines = [json.loads(line) for line in (folder/'metrics.jsonl').read_text().splitlines()]
    assert [(line['stage'], line['step']) for line in lines] == [('masked', 2), ('masked', 4), ('masked', 6), ('tuning', 2),
                                                              ('tuning', 4)]
    assert [round(line['lr'], 8) for line in lines[:2]] == [.01, round(.01*.5*(1 + math.cos(math.pi/2)), 8)]
    assert results['pairs'] == 40 and results['rows'] == 5 and results['seed'] == 5 and results['skipped_in_training'] == 0
    assert all(0 < line['loss'] < 4 and line['grad_norm'] > 0 and line['skipped_steps'] == 0 for line in lines)
    assert math.isclose(lines[3]['pairs_per_second'], 8/lines[3]['seconds'])     # of this stage alone
    assert math.isclose(lines[2]['pairs_per_second'], 24/lines[2]['seconds']) and 0 <= lines[2]['data_wait'] <= 1
    assert math.isclose(results['train_seconds'], lines[2]['seconds'] + lines[4]['seconds'])
    assert math.isclose(results['pairs_per_second'], 24/lines[2]['seconds'])
    both = evaluated(folder)[1:]
    assert [(e['stage'], e['done']) for e in evaluated(folder)] == [('masked', 4), ('masked', 6), ('tuning', 10)]
    assert results['retrieval_before_tuning'] == both[0]['retrieval'] and results['retrieval'] == both[1]['retrieval']
    assert [int(p.name[5:]) for p in checkpoints(folder)] == [2, 4, 6, 8, 10]
    groups = read_state(checkpoints(folder)[-1]/'state.pt')['training']['optimizer']['param_groups']
    assert [g['weight_decay'] for g in groups] == [.5, 0.]


def test_results_tell_the_scores_before_tuning_from_those_after(tmp_path):
    before,after = scores(.1, .2, .3),scores(.4, .5, .6)
    progress = Progress(finished=[dict(seconds=2., results=before), dict(seconds=3., results=after)], skipped=4)
    run = Plain(progress=progress, accelerator=Plain(num_processes=2, device=torch.device('cpu'), mixed_precision='no'))
    found = collect_results(run, fill_in_steps(options(steps=10, tune_steps=5, batch_size=4), None), {'x': 2, 'y': 1}, 9.)
    assert (found['zero_shot'], found['zero_shot_before_tuning']) == (.4, .1)
    assert found['retrieval_before_tuning'] == before['retrieval']
    assert (found['train_seconds'], found['wall_seconds'], found['pairs_per_second'], found['pairs']) == (5., 9., 20., 60)
    assert (found['skipped_in_training'], found['skipped_steps'], found['processes']) == (3, 4, 2)


def test_new_weights_follow_the_seed_of_the_run(tmp_path):
    def weights(name, seed):
        torch.manual_seed(len(name))                                             # whatever the program drew before
        config = options(preset='tiny', steps=2, tune_steps=0, batch_size=4, out=str(tmp_path/name), seed=seed, quiet=True,
                         track='none', threads=1, mixed_precision='no', vocab_size=60)
        parts = open_run(config, dict(train=Listed(8, side=32)))
        parts.lock and parts.lock.close()
        return parts.run.model.state_dict(), torch.rand(3)
    (one,drawn),(same,again),(other,_) = weights('a', 1),weights('bcd', 1),weights('ef', 2)
    assert all(torch.equal(w, same[n]) for n,w in one.items()) and torch.equal(drawn, again)
    assert not torch.equal(one['image_proj.weight'], other['image_proj.weight'])
    assert torch.equal(drawn, torch.rand(3, generator=rng(2)))                    # training draws from another seed than the weights


@pytest.mark.parametrize('step', [4, 6, 8])
def test_a_run_that_was_killed_ends_with_the_same_weights_and_log(finished, tmp_path, step):
    folder = stopped(finished, tmp_path, step)
    results = train(dataset=run_data(), resume=str(folder), quiet=True)
    want,got = load_file(finished[0]/'model.safetensors'),load_file(folder/'model.safetensors')
    assert all(torch.equal(w, got[name]) for name,w in want.items())
    steps = lambda f: [(line['stage'], line['step'], line['loss'], line['lr']) for line in
                       map(json.loads, (f/'metrics.jsonl').read_text().splitlines())]
    assert [e['done'] for e in evaluated(folder)] == [4, 6, 10]                  # also what was under way when it was killed
    assert steps(folder) == steps(finished[0]) and results['retrieval'] == finished[1]['retrieval']


def test_a_resumed_run_knows_how_many_rows_it_has_seen(finished, tmp_path):
    folder = stopped(finished, tmp_path, 4)
    parts = open_run(config_of(folder, resume=str(folder), out=str(folder)), run_data())
    try:
        assert parts.skipped.seen == 16 and parts.run.progress.done == 4 and parts.checkpoints.last == 4
        rows = [b['rows'] for b in parts.loader]
        flip = parts.run.model
        whole = make_loader(parts.run.accelerator, run_data()['train'], Collate(flip.tokenizer), 4, 5, {}, range(4, 10))
        assert rows == [b['rows'] for b in whole]
        assert parts.run.identity == dict(preset=config_of(folder).model.preset, seed=5, rows=10)
        assert parts.backward.keywords == dict(text_mask_ratio=0., text_mask_order='random', micro_batch=0, objective=Objective())
    finally: parts.lock and parts.lock.close()


def test_a_run_is_resumed_with_its_own_seed_and_data_only(finished, tmp_path):
    folder = stopped(finished, tmp_path, 4)
    here = dict(resume=str(folder), out=str(folder))
    with pytest.raises(ValueError, match='seed 5.*has 6'): open_run(config_of(folder, seed=6, **here), run_data())
    with pytest.raises(ValueError, match='10 rows.*have 9'): open_run(config_of(folder, **here), dict(train=make_pairs(9)))


def test_options_of_a_step_reach_it(finished, tmp_path):
    folder = stopped(finished, tmp_path, 4)
    config = config_of(folder, resume=str(folder), out=str(folder), text_mask_ratio=.25, text_mask_order='padding_first',
                       micro_batch=3, loss_chunk=2, max_broken=.3)
    parts = open_run(config, run_data())
    parts.lock and parts.lock.close()
    assert parts.backward.keywords == dict(text_mask_ratio=.25, text_mask_order='padding_first', micro_batch=3,
                                           objective=Objective(chunk_size=2))
    assert parts.loader.dataset.noise == dict(image_noise=16, text_noise=8) and not parts.loader.dataset.collate.trim
    assert (parts.skipped.most, parts.skipped.first) == (.3, 10)


@pytest.mark.parametrize('padding_mask,text_mask_ratio,trim', [(True, 0., True), (False, 0., False), (True, .25, False)])
def test_captions_are_trimmed_in_training_only_where_padding_is_not_looked_at(cpu, padding_mask, text_mask_ratio, trim):
    flip = tiny_flip(padding_mask=padding_mask)
    config = fill_in_steps(options(steps=4, tune_steps=2, batch_size=4, text_mask_ratio=text_mask_ratio), None)
    loader = open_loader(Run(cpu, Path('.'), flip, Progress(done=3)), config, Plain(train=Listed(9)))
    assert loader.dataset.collate.trim is trim and list(loader.sampler) == [3, 4, 5]


def test_places_of_another_reading_are_forgotten(cpu):
    flip = tiny_flip()
    config = fill_in_steps(options(data='x', stream=True, steps=4, batch_size=4), None)
    state = take(stream(), 1)[-1]['state']                                       # another buffer: another reading
    run = Run(cpu, Path('.'), flip, Progress(lanes={0: state}))
    assert open_loader(run, config, Plain(train=[Made()])).note and run.progress.lanes == {}
    own = next(iter(open_loader(run, config, Plain(train=[Made()]))))['state']
    run.progress.lanes[0] = own
    assert not open_loader(run, config, Plain(train=[Made()])).note and run.progress.lanes == {0: own}


def test_when_a_run_saves_and_evaluates():
    config = fill_in_steps(options(steps=20, tune_steps=0, save_every=6, eval_every=9, log_every=2), None)
    stage = stages_of(config)[0]
    parts = Plain(config=config, run=Plain(progress=Progress()))
    due = lambda f: [n for n in range(1, 21) if f(parts, Step(stage, n))]
    assert due(evaluation_is_due) == [10, 18] and due(checkpoint_is_due) == [6, 10, 12, 18, 20]
    parts.run.progress.in_a_row = 1                                              # not in the middle of bad steps
    assert due(evaluation_is_due) == [] and due(checkpoint_is_due) == [20]


def test_a_log_line_averages_the_steps_since_the_last_one_and_leaves_bad_ones_out(tmp_path, cpu):
    flip,config = tiny_flip(),fill_in_steps(options(steps=20, batch_size=4), None)
    stage = stages_of(config)[0]
    run = Run(cpu, tmp_path, flip, Progress(step=6, done=6, seconds=2., waited=.5, worked=1.), flip)
    run.begin(stage)
    run.progress.losses = [torch.tensor(x) for x in (1., 3., 50.)]
    run.progress.norms = [torch.tensor(x) for x in ([3., 4.], [6., 8.], [math.nan, 1.])]
    line = log_line(run, Step(stage, 6, {}), config)
    assert (line['loss'], line['grad_norm'], line['skipped_steps'], line['data_wait']) == (2., 7.5, 1, .5)
    assert line['pairs_per_second'] == 12 and math.isclose(line['logit_scale'], 1/.07, rel_tol=1e-5)
    assert run.progress.losses == [] and run.progress.waited == run.progress.worked == 0 and run.progress.in_a_row == 1
    run.progress.losses,run.progress.norms = [torch.tensor(1.)]*9,[torch.tensor([math.nan]*5)]*9
    batch = dict(images=pictures(2), ids=flip.tokenizer(WORDS[:2]))
    with pytest.raises(TrainingDiverged, match='10 steps in a row'): log_line(run, Step(stage, 6, batch), config)


def test_a_run_that_is_asked_to_stop_saves_first(monkeypatch):
    saved = []
    monkeypatch.setattr(running, 'save_run', lambda *args, **kwargs: saved.append((args, kwargs)))
    accelerator = Plain(num_processes=1, wait_for_everyone=lambda: saved.append('wait'))
    checkpoints = Plain(run=Plain(folder='there', accelerator=accelerator))
    with pytest.raises(Interrupted, match='SIGTERM; saved, resume with --resume there'): stop_run(checkpoints, 'SIGTERM')
    assert saved == [((checkpoints,), dict(must=True, leave=True)), 'wait']


def test_the_curve_of_the_second_stage_begins_where_the_first_ended(finished):
    loss,temperature = plot_run(finished[0]).axes
    assert [list(line.get_xdata()) for line in temperature.lines] == [[2, 4, 6], [8, 10]]
    assert list(temperature.lines[0].get_ydata()) == pytest.approx([.07]*3, rel=.1)
    assert [line.get_ydata()[0] for line in loss.lines][2] == math.log(4)
