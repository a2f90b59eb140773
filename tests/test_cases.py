"Layouts of users' data: the same rows, splits and words in training, streams and evaluation."
import io, json, os, tarfile, zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from flip_nb.data.folders import load_pairs, load_rows
from flip_nb.data.layout import find_layout
from flip_nb.data.sources import open_stream
from flip_nb.evaluate import complete, data_request
from flip_nb.evaluation.datasets import open_test_set, open_test_sets


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')
    datasets.disable_progress_bars()
    (tmp_path/'d').mkdir()
    return tmp_path/'d'


def jpg(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out := io.BytesIO(), 'JPEG')
    return out.getvalue()


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpg(zlib.crc32(str(path).encode()) % 9999) if data is None else data if isinstance(data, bytes) else data.encode())


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as file:
        for name,data in members:
            info = tarfile.TarInfo(name); info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def sizes(data, **kw): return {s: len(p) for s,p in load_pairs(str(data), 16, **kw).items()}


@pytest.mark.parametrize('train,test', [('Train', 'Test'), ('TRAIN', 'TEST'), ('training', 'testing'), ('trainval', 'test'),
                                        ('train2017', 'test2017'), ('train_images', 'test_images')])
def test_split_folders_are_known_in_any_spelling(place, train, test):
    for split,n in ((train, 6), (test, 4)):
        for i in range(n): put(place/split/'ab'[i % 2]/f'{i}.jpg')
    assert sizes(place) == dict(train=6, test=4)


def test_words_in_names_of_images_and_classes_are_no_splits(place):
    for i in range(20): put(place/('train', 'crash-test')[i % 2]/f'steam_train_{i}.jpg')
    pairs = load_pairs(str(place), 16)
    assert {s: len(p) for s,p in pairs.items()} == dict(train=18, test=2)
    assert pairs['train'].label_names == ['crash-test', 'train']


def test_files_of_no_split_are_left_out_and_named(place):
    for name in ('train', 'test', 'more'):
        datasets.Dataset.from_dict(dict(image=[jpg()], caption=['x'])).to_parquet(place/f'{name}.parquet')
    notes = []
    assert {s: len(r) for s,r in load_rows(str(place), notes=notes).items()} == dict(train=1, test=1)
    assert any("'more.parquet', of no split" in n for n in notes)


def test_folder_names_are_captions_only_where_nothing_else_is(place):
    for i in range(10): put(place/f'0000{i % 2}'/f'{i}.jpg'); put(place/f'0000{i % 2}'/f'{i}.txt', f'words {i}')
    pairs = load_pairs(str(place), 16, holdout=0)['train']
    assert sorted(pairs.captions(i)[0] for i in range(10)) == [f'words {i}' for i in range(10)]
    for p in place.rglob('*.txt'): p.unlink()
    said = []
    assert load_pairs(str(place), 16, holdout=0, say=said.append)['train'].label_names == ['00000', '00001']
    assert 'names of folders, as there is nothing else' in said[0]


def test_table_beside_two_folders_of_images(place):
    for i in range(10): put(place/f'images_{i % 2}'/f'{i}.jpg')
    put(place/'captions.csv', 'image,caption\n' + ''.join(f'images_{i % 2}/{i}.jpg,words {i}\n' for i in range(10)))
    pairs = load_pairs(str(place), 16, holdout=0)['train']
    assert [pairs.captions(i) for i in range(10)] == [[f'words {i}'] for i in range(10)]


def test_classes_have_one_name_in_training_and_evaluation(place):
    for n,name in enumerate(('n01440764', 'n02084071-dog', 'american_bulldog')):
        for i in range(10): put(place/name/f'{i}.jpg')
    names = load_pairs(str(place), 16)['train'].label_names
    assert names == open_test_set(str(place), 16).class_names
    assert sorted(names) == ['american bulldog', 'dog', 'tench']


@pytest.mark.parametrize('kind', ['csv', 'sidecar', 'tar', 'parquet', 'classes'])
def test_evaluation_measures_on_the_rows_that_training_held_out(place, kind):
    for i in range(40):
        if kind in ('csv', 'sidecar'): put(place/f'{i:02}.jpg')
        if kind == 'sidecar': put(place/f'{i:02}.txt', f'words {i}')
        if kind == 'classes': put(place/'abcd'[i % 4]/f'{i:02}.jpg')
    if kind == 'csv': put(place/'captions.csv', 'image,caption\n' + ''.join(f'{i:02}.jpg,words {i}\n' for i in range(40)))
    if kind == 'tar': tar(place/'0.tar', [m for i in range(40) for m in ((f'{i}.jpg', jpg(i)), (f'{i}.txt', b'words %d' % i))])
    if kind == 'parquet':
        rows = dict(image=[jpg(i) for i in range(40)], caption=[f'words {i}' for i in range(40)])
        datasets.Dataset.from_dict(rows).to_parquet(place/'0.parquet')
    held,measured = load_pairs(str(place), 16)['test'],open_test_set(str(place), 16).splits['test']
    assert len(held) == len(measured) == 4
    for i in range(4):
        assert held.captions(i) == measured.captions(i)
        assert held.read(i)[0].equal(measured.read(i)[0])


def test_evaluation_opens_what_a_stream_held_out(place):
    for k in range(3):
        tar(place/'data'/f'{k}.tar', [m for i in range(10*k, 10*k + 10) for m in (
            (f'{i}.jpg', jpg(i)), (f'{i}.json', json.dumps(dict(caption=f'words {i}')).encode()))])
    data = f'{place}/data/{{0..2}}.tar'
    put(place/'run'/'train_config.json', json.dumps(dict(data=data, stream=True, weights=None)))
    config = complete(dict(runs=str(place/'run'), data=None, tasks=None, mask_ratio=0.))
    [found] = open_test_sets(data, 16, data_request(config, data))
    held = open_stream(data, 16)[1]['test']
    words = lambda pairs: [pairs.captions(i)[0] for i in range(len(pairs))]
    assert words(found.splits['test']) == words(held) == [f'words {i}' for i in range(20, 30)]


def test_a_run_on_an_object_asks_for_data(place):
    put(place/'run'/'train_config.json', json.dumps(dict(data='<list>')))
    with pytest.raises(ValueError, match='was trained on an object of Python.*--data'):
        complete(dict(runs=str(place/'run'), data=None, tasks=None, mask_ratio=0.))


@pytest.mark.parametrize('text', ['None', 'NA', 'null', 'nan', 'N/A', '0'])
def test_odd_words_are_captions(place, text):
    for i in range(3): put(place/f'{i}.jpg')
    put(place/'metadata.csv', f'file_name,text\n0.jpg,{text}\n1.jpg,\n2.jpg,a cat\n')
    said = []
    pairs = load_pairs(str(place), 16, holdout=0, say=said.append)['train']
    assert [pairs.captions(i) for i in range(2)] == [[text], ['a cat']] and len(pairs) == 2
    assert "1 x empty caption (such as '1.jpg')" in said[0]


def test_both_readers_skip_empty_captions_in_parquet(place):
    rows = dict(image=[jpg(i) for i in range(4)], caption=['a', '', None, 'd'])
    datasets.Dataset.from_dict(rows).to_parquet(place/'0.parquet')
    pairs = load_pairs(str(place), 16, holdout=0)['train']
    assert [pairs.read(i)[2] for i in range(4)] == ['', 'empty caption', 'no caption', '']
    sources,_ = open_stream(str(place), 16, holdout=0)
    from flip_nb.data.sources import first_rows
    assert [r['captions'] for r in first_rows(sources[0], 9)] == [['a'], ['d']]


def test_tars_with_other_endings_and_missing_members(place):
    good = [m for i in range(11) for m in ((f'{i}.{"webp" if i == 3 else "jpg"}', jpg(i)), (f'{i}.txt', b'words %d' % i))]
    tar(place/'0.tar', good + [('11.jpg', jpg(11))])
    said = []
    assert len(load_pairs(str(place), 16, holdout=0, say=said.append)['train']) == 11
    assert '1 x no caption' in said[0]


def test_a_torn_shard_is_read_as_far_as_it_is_whole(place):
    from flip_nb.data.sources import first_rows
    tar(place/'0.tar', [m for i in range(4) for m in ((f'{i}.jpg', jpg(i)), (f'{i}.txt', b'words %d' % i))])
    (place/'1.tar').write_bytes((place/'0.tar').read_bytes()[:5500])
    said = []
    here = load_pairs(str(place), 16, holdout=0, say=said.append)['train']
    there = [r['captions'] for r in first_rows(open_stream(str(place), 16, holdout=0)[0][0], 99)]
    assert [here.captions(i) for i in range(len(here))] == there and len(there) > 4
    assert "1.tar': shard cut short, " in said[0]
    assert f'; its first {len(there) - 4} records are read\n' in said[0]


def test_a_torn_parquet_is_named(place):
    rows = dict(image=[jpg(i) for i in range(50)], caption=['x']*50)
    (place/'p').mkdir()
    for k in range(2): datasets.Dataset.from_dict(rows).to_parquet(place/'p'/f'{k}.parquet')
    data = bytearray((place/'p'/'1.parquet').read_bytes()); data[4:3000] = bytes(2996)
    (place/'p'/'1.parquet').write_bytes(data)
    with pytest.raises(ValueError, match="p/1.parquet': "): load_pairs(str(place/'p'), 16)


def test_a_mistyped_path_is_no_name_of_the_hub(place, monkeypatch):
    put(place/'mydata'/'imgs'/'0.jpg')
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match="Did you mean 'imgs'"): load_rows('mydata/img')
    with pytest.raises(ValueError, match='hf://datasets/mydta/imgs'): load_rows('mydta/imgs')


@pytest.mark.parametrize('name', ['a, b', 'a [x]', 'a*b', 'ä ö', "it's", 'a{b}'])
def test_odd_names_of_folders(place, name):
    for i in range(3): put(place/name/f'{i}.jpg'); put(place/name/f'{i}.txt', f'words {i}')
    assert sizes(place/name, holdout=0) == dict(train=3)


def test_class_folders_that_are_links(place):
    for i in range(4): put(place/'real'/'ab'[i % 2]/f'{i}.jpg')
    (place/'links').mkdir()
    for c in 'ab': os.symlink(place/'real'/c, place/'links'/c)
    assert load_pairs(str(place/'links'), 16, holdout=0)['train'].label_names == ['a', 'b']
    assert len(find_layout(str(place/'links')).files) == 4


def test_a_comma_in_the_name_of_a_folder_separates_nothing(place):
    tar(place/'a, b'/'0.tar', [m for i in range(4) for m in ((f'{i}.jpg', jpg(i)), (f'{i}.txt', b'words'))])
    assert len(open_stream(str(place/'a, b'), 16, holdout=0)[0]) == 1
    assert len(open_stream(f"{place/'a, b'/'0.tar'}", 16, holdout=0)[0]) == 1


def test_captions_that_repeat_are_said_once_with_the_floor_of_the_loss(place):
    from accelerate import Accelerator
    from flip_nb.scale.config import TrainConfig, changed, resolve
    from flip_nb.scale.loader import open_model_and_data
    import contextlib
    for i in range(40): put(place/f'{i}.jpg')
    put(place/'captions.csv', 'image,caption\n' + ''.join(f'{i}.jpg,{"ab"[i % 2]} cat\n' for i in range(40)))
    config = resolve(changed(TrainConfig(), data=str(place), preset='tiny', batch_size=16))
    with contextlib.redirect_stdout(io.StringIO()) as out: open_model_and_data(Accelerator(cpu=True), config)
    assert out.getvalue().count('its InfoNCE cannot fall below 2.') == 1
    assert "36 rows to train on (train), 4 rows to evaluate on (test)\nfirst caption: 'a cat'" in out.getvalue()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        open_model_and_data(Accelerator(cpu=True), changed(config, quiet=True))
    assert not out.getvalue()


def test_samples_of_both_readers_are_captions_of_single_rows(place):
    from flip_nb.data.pairs import sample_captions
    from flip_nb.data.sources import stream_sample
    kind = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['cat', 'dog']))
    rows = dict(image=[dict(bytes=jpg(), path=None)]*6, label=[0, 1, 1, 1, 1, 0])
    datasets.Dataset.from_dict(rows, features=kind).to_parquet(place/'0.parquet')
    assert sample_captions(load_pairs(str(place), 16, holdout=0)['train']) == ['cat'] + ['dog']*4 + ['cat']
    assert sample_captions(load_pairs(str(place), 16, holdout=0)['train'], 3) == ['cat', 'dog', 'dog']
    assert stream_sample(open_stream(str(place), 16, holdout=0)[0]) == ['cat'] + ['dog']*4 + ['cat']


@pytest.mark.parametrize('name', ['a, b', 'a [x]', 'a*b', 'a{b}'])
def test_odd_names_of_folders_with_tables(place, name):
    (place/name).mkdir()
    datasets.Dataset.from_dict(dict(image=[jpg()]*3, caption=list('abc'))).to_parquet(place/name/'0.parquet')
    assert sizes(place/name, holdout=0) == dict(train=3)
    assert len(open_stream(str(place/name), 16, holdout=0)[0][0].shards) == 1


def test_names_in_a_column_of_labels_are_classes_for_both(place):
    (place/'d').mkdir()
    datasets.Dataset.from_dict(dict(image=[jpg()]*20, breed=['pug', 'boxer']*10)).to_parquet(place/'d'/'train.parquet')
    datasets.Dataset.from_dict(dict(image=[jpg()]*4, breed=['boxer']*4)).to_parquet(place/'d'/'test.parquet')
    pairs,found = load_pairs(str(place/'d'), 16),open_test_set(str(place/'d'), 16)
    assert pairs['test'].label_names == found.class_names == ['boxer', 'pug']
    assert pairs['test'].captions(0) == found.splits['test'].captions(0) == ['boxer']


@pytest.mark.parametrize('text,why', [('image,caption\n', 'it has no rows'), ('image,caption\nx/9.jpg,a\n', 'names no image'),
                                      ('Datei,Text auf Deutsch\n0.jpg,a\n', 'no column looks like the image')])
def test_a_table_that_is_not_used_is_named_with_the_reason(place, text, why):
    for i in range(3): put(place/f'{i}.jpg')
    put(place/'captions.csv', text)
    with pytest.raises(ValueError, match=f'captions.csv.*{why}'): load_pairs(str(place), 16)
    put(place/'other.csv', 'image,caption\n0.jpg,a\n')
    put(place/'metadata.csv', 'file_name,text\n0.jpg,b\n')
    load_pairs(str(place), 16, holdout=0, say=(said := []).append)
    assert "other.csv': others come first" in said[0] and "first caption: 'b'" in said[0]
    (place/'other.csv').unlink(); (place/'metadata.csv').unlink()
    for i in range(3): put(place/f'{i}.txt', 'words')
    said = []
    assert sizes(place, holdout=0, say=said.append) == dict(train=3) and 'not used: ' in said[0]


def test_captions_that_are_all_empty_end_in_one_sentence(place):
    for i in range(3): put(place/f'{i}.jpg'); put(place/f'{i}.txt', ' \n')
    with pytest.raises(ValueError, match='none of the images has a caption.*3 x empty caption'): load_pairs(str(place), 16)
    tar(place/'t'/'0.tar', [(f'{i}.jpg', jpg(i)) for i in range(3)])
    with pytest.raises(ValueError, match='no record can be used.*3 x no caption'): load_pairs(str(place/'t'), 16)
    (place/'t'/'0.tar').write_bytes(b'no tar')
    with pytest.raises(ValueError, match='0.tar.: shard unreadable'): load_pairs(str(place/'t'), 16)


def test_classes_without_names_get_those_of_the_user(place):
    from flip_nb.evaluation.datasets import DataRequest
    from flip_nb.transfer.labelled import LabelledConfig, open_labelled
    for s,n in (('train', 8), ('test', 4)):
        for i in range(n): put(place/'d'/s/'01'[i % 2]/f'{i}.jpg')
    data = str(place/'d')
    with pytest.raises(ValueError, match='give --class_names'): open_test_sets(data, 16)
    put(place/'names.txt', 'a cat\n\na dog\n')
    for given in ('a cat, a dog', str(place/'names.txt')):
        [found] = open_test_sets(data, 16, DataRequest(class_names=given))
        assert found.class_names == ['a cat', 'a dog'] and found.splits['test'].captions(3) == ['a dog']
        pairs,_ = open_labelled(LabelledConfig(data=data, class_names=given), 16)
        assert pairs.label_names == ['a cat', 'a dog']
    with pytest.raises(ValueError, match="there are 1 class names|none of the 1 classes"):
        open_test_sets(data, 16, DataRequest(class_names='a cat'))
    with pytest.raises(ValueError, match="--class_names ', ' holds no name"):
        open_test_sets(data, 16, DataRequest(class_names=', '))


@pytest.mark.parametrize('name', ['mydta/x.tar', './mydta/imgs', '~/mydta', 'mydta/imgs/', 'a\\b', 'mydta.csv', '/mydta/imgs', 'mydta/a/b'])
def test_what_is_written_like_a_path_is_never_asked_for(place, name, monkeypatch):
    from flip_nb.model import FLIP
    from flip_nb.official.recipe import load_tokenizer
    monkeypatch.setattr('flip_nb.core.hub_answers', lambda: pytest.fail(f'{name!r} was looked for on the hub'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.chdir(place)
    for call in (lambda: load_rows(name), lambda: open_stream(name, 16), lambda: FLIP.from_pretrained(name), lambda: load_tokenizer(name),
                 lambda: open_test_sets(name, 16)):
        with pytest.raises(ValueError, match='does not exist|there is no'): call()


def test_without_network_a_name_of_the_hub_ends_at_once(place, monkeypatch):
    import time
    from flip_nb.model import FLIP
    from flip_nb.official.recipe import load_tokenizer
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', False)
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')    # nobody listens there
    began = time.monotonic()
    for call in (lambda: load_rows('someone/images'), lambda: FLIP.from_pretrained('someone/flip'), lambda: load_tokenizer('some-bert'),
                 lambda: open_test_sets('cifar10', 16)):
        with pytest.raises(ValueError, match='hub'): call()
    assert time.monotonic() - began < 12


def test_floats_of_another_range_are_said_in_evaluation():
    import warnings
    from small import pictures, tiny_flip
    from flip_nb.model import to_float
    flip,images = tiny_flip().eval(),pictures(4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        flip.encode_image(to_float(images)); flip.train().encode_image(images/255); flip.eval()
        assert not said
        flip.logits(images/255, flip.tokenizer(['a']))
    assert len(said) == 1 and 'between 0 and 1; give uint8 images to flip_nb.model.to_float' in str(said[0].message)


def test_data_of_an_old_run_are_found_beside_it(place, monkeypatch):
    for i in range(20): put(place/'pairs'/'my data'/f'{i}.jpg'); put(place/'pairs'/'my data'/f'{i}.txt', f'words {i}')
    put(place/'runs'/'old'/'train_config.json', json.dumps(dict(data='pairs/my data')))
    (place/'elsewhere').mkdir(); monkeypatch.chdir(place/'elsewhere')
    config = complete(dict(runs='../runs/old', data=None, tasks=None, mask_ratio=0.))
    assert config.questions.data == [str(place/'pairs'/'my data')]
    notes = []
    assert len(open_test_sets(*config.questions.data, 16, notes=notes)[0].splits['test']) == 2 and notes[-1] == '2 rows to evaluate on'
    put(place/'runs'/'old'/'train_config.json', json.dumps(dict(data='pairs/gone/*.tar')))
    with pytest.raises(ValueError, match="'pairs/gone/\\*.tar', are neither here nor beside the run; say with --data"):
        complete(dict(runs='../runs/old', data=None, tasks=None, mask_ratio=0.))
    assert complete(dict(runs='../runs/old', data=str(place/'pairs'), tasks=None, mask_ratio=0.)).questions.data == [str(place/'pairs')]


def test_a_name_of_one_word_that_is_nearly_a_folder_is_not_asked_for(place, monkeypatch):
    put(place/'pictures'/'0.jpg')
    monkeypatch.setattr('flip_nb.core.hub_answers', lambda: pytest.fail('was looked for on the hub'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match="'picturs' does not exist. Did you mean 'pictures'.*hf://datasets/picturs"): load_rows('picturs')


@pytest.mark.parametrize('keep', [False, True])
def test_accents_are_kept_where_that_is_asked_for(place, keep, capsys):
    from accelerate import Accelerator
    from flip_nb.scale.config import TrainConfig, changed, resolve
    from flip_nb.scale.loader import open_model_and_data
    from flip_nb.text import CaptionTokenizer
    for i in range(40): put(place/f'{i}.jpg')
    put(place/'captions.csv', 'image,caption\n' + ''.join(f'{i}.jpg,{("pêche", "péché")[i % 2]} {i}\n' for i in range(40)))
    config = resolve(changed(TrainConfig(), data=str(place), preset='tiny', batch_size=16, keep_accents=keep))
    flip,_ = open_model_and_data(Accelerator(cpu=True), config)
    flip.save_pretrained(place/'model')
    ids = CaptionTokenizer.from_file(place/'model')(['pêche', 'péché'])
    assert ids[0].ne(ids[1]).any() == keep
    assert ('100.0% of the captions lose their accents' in capsys.readouterr().out) != keep
