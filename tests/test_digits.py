"The embedded example keeps its promise: the default recipe with the default seed, end to end through the files it leaves"
import json

import pytest
from safetensors import safe_open

from lift_nb.experiments.run import run

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')/'lift+'
    run(folder, validate=False, echo=lambda line: None)
    return folder

def test_scores(folder):
    r = json.loads((folder/'result.json').read_text())
    assert r['mean_class'] >= 87 and r['few'] >= 78
    assert r['class_counts'] == [120, 79, 52, 35, 23, 15, 10, 6, 4, 3]

def test_zero_shot(tmp_path):
    assert run(tmp_path/'zs', method='zs', echo=lambda line: None)['overall'] > 40

def test_what_a_run_leaves(folder):
    assert {'result.json', 'log.txt', 'tensorboard', 'per_class.png', 'model.safetensors', 'predictions.csv', 'history.csv', 'report'} == {f.name for f in folder.iterdir()}
    r = json.loads((folder/'result.json').read_text())
    keys = 'recipe seed versions classes class_counts overall mean_class many medium few per_class seconds trained_parameters'.split()
    assert set(keys) <= set(r) and set(r['seconds']) == {'build', 'train', 'calibrate', 'test'}
    with safe_open(folder/'model.safetensors', 'pt') as f:
        assert json.loads(f.metadata()['classes'])[0] == 'zero'
        assert sum(f.get_tensor(k).numel() for k in f.keys()) == r['trained_parameters']

def test_saved_tensors_give_the_same_scores(folder, capsys):
    again = run(folder, test_only=True, echo=lambda line: None)
    assert again['per_class'] == json.loads((folder/'result.json').read_text())['per_class']
