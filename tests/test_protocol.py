"""Training, validation and test images of own data: drawn apart, and the test set looked at once, at the end."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from hypothesis import given, settings, strategies as st
from PIL import Image

from lift_nb.cli import main
from lift_nb.core.errors import LiftError
from lift_nb.core.fingerprint import _differing_parts, _fingerprint
from lift_nb.data import loaders
from lift_nb.data.dataset import digits_lt, from_arrays
from lift_nb.data.folders import _assemble_data, from_folder
from lift_nb.data.loaders import _data_parts
from lift_nb.data.tables import from_table
from lift_nb.evaluation.decisions import fit_calibration
from lift_nb.evaluation.predictions import read_predictions
from lift_nb.experiments.run import run
from lift_nb.learner import lift_plus_learner
from lift_nb.predictor import load_lift

QUICK = dict(backbone='tiny_clip', batch_size=16, expand=0, device='cpu')

def mute(line): pass

def parts_of(data): return {part: list(images) for part, (images, _) in data.parts.items()}

def split(found, **options): return _assemble_data(found, None, 'x', 'r', check=False, **options)

sizes = st.lists(st.integers(1, 30), min_size=2, max_size=6).filter(lambda n: sorted(n)[-1] >= 3)
pcts = dict(test_pct=st.floats(.05, .6), valid_pct=st.floats(.05, .6))

@settings(max_examples=100, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 9), fold=st.one_of(st.none(), st.integers(0, 3)), **pcts)
def test_the_parts_are_disjoint_and_complete_and_stay_when_another_class_grows(sizes, seed, fold, test_pct, valid_pct):
    found = {f'c{c}': [f'r/c{c}/{i}.png' for i in range(n)] for c, n in enumerate(sizes)}
    options = dict(seed=seed, test_pct=test_pct, valid_pct=valid_pct, fold=fold, n_folds=4)
    try: data = split(found, **options)
    except LiftError as e:
        assert 'There are too few' in str(e) or 'There are no test images' in str(e)
        return
    train, valid, test = parts_of(data).values()
    assert sorted(train + valid + test) == sorted(f for fs in found.values() for f in fs) and data.counts.min() >= 1
    assert set(test) == set(split(found, **{**options, 'valid_pct': None}).test_images), 'the validation set changes nothing in the test set'
    grown = split({**found, 'c0': found['c0'] + ['r/c0/new.png']}, **options)
    for part, files in parts_of(grown).items(): assert [f for f in files if '/c0/' not in f] == [f for f in parts_of(data)[part] if '/c0/' not in f]
    lost = [c for c in data.class_names if not any(f'/{c}/' in f for f in valid)]
    assert bool(lost) == any(n.startswith(f'Classes without a validation image ({len(lost)})') for n in data.notes)

@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(4, 30), min_size=2, max_size=5), per_group=st.integers(1, 5), seed=st.integers(0, 9), **pcts)
def test_groups_stay_in_one_part(sizes, per_group, seed, test_pct, valid_pct):
    found = {f'c{c}': [f'r/c{c}/{i}.png' for i in range(n)] for c, n in enumerate(sizes)}
    groups = {f: f'{c}-{i//per_group}' for c, fs in found.items() for i, f in enumerate(fs)}
    try: data = split(found, groups=groups, seed=seed, test_pct=test_pct, valid_pct=valid_pct)
    except LiftError as e:
        assert 'too few' in str(e) or 'There are no test images' in str(e)
        return
    sides = [{groups[f] for f in files} for files in parts_of(data).values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == len(set(groups.values())) and data.counts.min() >= 1
    for c, fs in found.items():
        n = sum(f in fs for f in data.test_images)
        assert n or len({groups[f] for f in fs}) == 1, 'a class with two groups is tested'
        assert abs(n - max(1, round(test_pct*len(fs)))) < per_group or n + per_group >= len(fs), 'as many as asked for, as far as groups allow'
    new = {f'r/c0/new {i}.png': 'new' for i in range(per_group)}
    grown = split({**found, 'c0': found['c0'] + list(new)}, groups=groups | new, seed=seed, test_pct=test_pct, valid_pct=valid_pct)
    for part, files in parts_of(grown).items(): assert [f for f in files if '/c0/' not in f] == [f for f in parts_of(data)[part] if '/c0/' not in f]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Four digits, 40, 20, 10 and 5 images"
    d, top = digits_lt(n_max=60, factor=1/2), tmp_path_factory.mktemp('own')/'scans'
    for c, n in enumerate((40, 20, 10, 5)):
        (top/d.class_names[c]).mkdir(parents=True)
        for i, x in enumerate(d.train_images[d.train_labels == c][:n]): Image.fromarray(x).save(top/d.class_names[c]/f'{i:03}.png')
    return top

class Opened(list):
    "The images that loaders open, in order"
    def __enter__(self):
        true = loaders.open_image
        def open_image(x, *args): self.append(x) or 0; return true(x, *args)
        self.patch = patch.object(loaders, 'open_image', open_image)
        self.patch.start()
        return self
    def __exit__(self, *_): self.patch.stop()

@pytest.mark.parametrize('options', [dict(), dict(valid_pct=.25), dict(valid_pct=.25, fold=1), dict(valid_pct=.25, method='lp', mda='plain', init='class_mean')], ids=str)
@pytest.mark.parametrize('cached', [False, True])
def test_the_test_images_are_opened_once_at_the_end(folder, options, cached, tmp_path):
    if cached and 'method' in options: options = dict(options, features=str(tmp_path/'features'))
    elif cached: pytest.skip('features belong to a frozen network')
    with Opened() as opened:
        learn = lift_plus_learner(folder, epochs=2, **QUICK, **options)
        with learn.no_bar(), learn.no_logging(): learn.fit_lift()
        seen, test = list(opened), parts_of(learn.data)['test']
        assert not set(seen) & set(test)
        valid = parts_of(learn.data).get('validation', [])
        for f in valid: assert seen.count(f) == (1 if cached else 2) + (f == valid[0])*(seen.count(f) % 2 == (not cached)) # the loader tries its first
        opened.clear()
        with learn.no_bar(): found = learn.scores()
    assert sorted(opened) == sorted(test) and len(found.per_class) == 4
    assert list(learn.history().columns)[:2] == (['train_loss', 'valid_loss'] if valid else ['train_loss', 'lr'])

def test_both_doors_agree_and_the_run_tells_its_parts(folder, tmp_path):
    said = []
    with Opened() as opened: result = run(tmp_path/'run', echo=said.append, data=str(folder), epochs=2, valid_pct=.25, **QUICK)
    data = from_folder(folder, valid_pct=.25)
    test, epochs = parts_of(data)['test'], [l for l in said if l.startswith('epoch ')]
    assert not set(opened[:-len(test)]) & set(test) and sorted(opened[-len(test):]) == sorted(test)
    assert len(epochs) == 2 and all('  validation: valid_loss ' in l and 'test' not in l for l in epochs)
    assert any(l.startswith('test: overall ') for l in said)
    assert result['n_images'] == {k: len(v) for k, v in parts_of(data).items()} and result['epoch_set'] == 'validation'
    assert sorted(f"{folder}/{i}" for i in read_predictions(tmp_path/'run').image) == sorted(test)
    assert not any('Could not' in l for l in said) and any(l.startswith('temperature ') for l in said)
    p, images = load_lift(tmp_path/'run'), list(data.valid_images)
    by_hand = fit_calibration(p.logits(images).numpy(), data.valid_labels, data.counts)
    assert p.calibration.temperature == pytest.approx(by_hand.temperature, rel=1e-3) and p.calibration.targets == by_hand.targets
    for source in str(folder), data:
        learn = lift_plus_learner(source, epochs=2, **QUICK, **(dict(valid_pct=.25) if source is not data else {}))
        with learn.no_bar(), learn.no_logging(): learn.fit_lift()
        with learn.no_bar(): assert list(learn.scores().per_class) == result['per_class']
        assert parts_of(learn.data) == parts_of(data)

def test_without_a_validation_set_only_the_loss_is_told(folder, tmp_path):
    said = []
    result = run(tmp_path/'run', echo=said.append, data=str(folder), epochs=1, **QUICK)
    line = next(l for l in said if l.startswith('epoch '))
    assert not any('Could not' in l for l in said) and load_lift(tmp_path/'run').calibration is None
    assert 'train_loss' in line and 'overall' not in line and result['epoch_set'] is None and list(result['n_images']) == ['training', 'test']
    with pytest.raises(LiftError, match='validate has no effect here'): run(tmp_path/'x', echo=mute, data=str(folder), epochs=1, validate=True, **QUICK)
    run(tmp_path/'x', echo=mute, data=str(folder), epochs=1, validate=False, **QUICK)

def test_benchmarks_are_tested_after_each_epoch_as_before(tmp_path):
    said = []
    result = run(tmp_path/'run', echo=said.append, data='digits_lt', epochs=1, **QUICK)
    line = next(l for l in said if l.startswith('epoch '))
    assert '  valid_loss ' in line and 'validation' not in line and result['epoch_set'] == 'test'
    with pytest.raises(LiftError, match='valid_pct has no effect here'): lift_plus_learner('digits_lt', valid_pct=.1)

def test_what_is_chosen_by_looking_needs_a_validation_set(folder, tmp_path):
    learn = lift_plus_learner(folder, epochs=1, path=tmp_path, **QUICK)
    for cb in SaveModelCallback('overall'), EarlyStoppingCallback():
        with learn.no_bar(), learn.no_logging(), pytest.raises(LiftError, match='nothing is evaluated between epochs.*valid_pct'): learn.fit_lift(cbs=cb)
    learn = lift_plus_learner(folder, epochs=3, valid_pct=.25, path=tmp_path, **QUICK)
    with learn.no_bar(), learn.no_logging(): learn.fit_lift(cbs=SaveModelCallback('overall'))
    best = learn.history().overall.max()
    with learn.no_bar(): assert learn.validate()[1] == pytest.approx(best), 'the best epoch is that of the validation set'

def test_checkpoints_belong_to_a_validation_set(folder, tmp_path):
    def fit(**options):
        learn = lift_plus_learner(folder, epochs=2, **QUICK, **options)
        with learn.no_bar(), learn.no_logging(): learn.fit_lift(resume=tmp_path/'resume')
        return learn.history()
    assert fit(valid_pct=.25).equals(fit(valid_pct=.25))
    with pytest.raises(LiftError, match='belong to another training'): fit(valid_pct=.3)
    data = digits_lt()
    assert list(_data_parts(data)) == ['training images', 'test images', 'training labels', 'test labels', 'class names'], 'as in earlier versions'
    held = replace(data, valid_images=data.test_images[:9], valid_labels=data.test_labels[:9])
    other = replace(held, valid_labels=held.valid_labels + 1)
    assert _differing_parts(*(_fingerprint(**_data_parts(x)) for x in (held, other))) == ['validation labels']

def test_a_finished_run_with_another_validation_set_is_not_taken(folder, tmp_path):
    options = dict(echo=mute, data=str(folder), epochs=1, resume=True, **QUICK)
    first = run(tmp_path/'run', valid_pct=.25, **options)
    assert run(tmp_path/'run', valid_pct=.25, **options)['seconds'] == first['seconds']
    assert run(tmp_path/'run', valid_pct=.5, **options)['n_images'] != first['n_images']

def test_tables_bring_a_validation_set(folder, tmp_path):
    files = sorted(folder.rglob('*.png'))
    side = ['train', 'train', 'train', 'validation', 'test']
    table = pd.DataFrame(dict(path=map(str, files), label=[f.parent.name for f in files], split=[side[i % 5] for i in range(len(files))]))
    data = from_table(table)
    assert {k: v for k, v in parts_of(data).items()} == {p: list(table.path[table.split == s]) for p, s in dict(training='train', validation='validation', test='test').items()}
    learn = lift_plus_learner(table, epochs=1, **QUICK)
    with learn.no_bar(), learn.no_logging(): learn.fit_lift()
    assert [len(dl.dataset) for dl in learn.dls] == [len(v) for v in parts_of(data).values()] and learn.history().overall.notna().all()
    folds = from_table(table.drop(columns='split').assign(fold=[i % 5 for i in range(len(files))]), fold=2, valid_pct=.25)
    assert list(folds.test_images) == list(map(str, files[2::5])) and len(folds.valid_images) > 0
    with pytest.raises(LiftError, match='come with one of their own'): lift_plus_learner(table, valid_pct=.1, **QUICK)

def test_validation_and_test_images_are_cropped_alike():
    data = digits_lt()
    held = replace(data, valid_images=data.test_images, valid_labels=data.test_labels)
    learn = lift_plus_learner(held, **QUICK)
    for (x, y), (u, v) in zip(learn.dls[1], learn.dls[2]): assert x.equal(u) and y.equal(v)

def test_arrays_take_a_validation_set():
    x = np.random.RandomState(0).randint(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    data = from_arrays(x[:6], [0, 1]*3, x[6:8], [0, 1], ['cat', 'dog'], valid_images=x[8:], valid_labels=[1, 0, 1, 0])
    learn = lift_plus_learner(data, epochs=1, **QUICK)
    with learn.no_bar(), learn.no_logging(): learn.fit_lift()
    assert learn.history().overall.notna().all() and len(learn.logits()[0]) == 2

def test_the_shell_has_it_too(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['data', str(folder), '--valid_pct', '.25']) == 0 and 'validation images' in capsys.readouterr().out
    assert main(['sweep', str(folder), '--valid_pct', '0.1,0.25', '--backbone', 'tiny_clip', '--dry-run']) == 0
    out = capsys.readouterr().out
    assert '0.1' in out and '0.25' in out
    assert main(['train', str(folder), '--valid_pct', '2']) != 0 and 'between 0 and 1' in capsys.readouterr().err
    words = dict(valid_pct='.25', backbone='tiny_clip', epochs='1', batch_size='16', expand='0', output_dir='out')
    assert main(['train', str(folder), *(f'--{k}={v}' for k, v in words.items())]) == 0
    assert json.loads(Path('out/result.json').read_text())['epoch_set'] == 'validation'
