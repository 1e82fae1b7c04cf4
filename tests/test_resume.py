"A training that is killed, on a disk that is full, with files that are damaged: it ends with the same weights, or says why not"
import json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from hypothesis import HealthCheck, given, settings, strategies as st

from lift_nb.core.errors import LiftError
from lift_nb.data.dataset import digits_lt
from lift_nb.experiments.run import run
from lift_nb.core.files import _read_tensors
from lift_nb.learner import lift_plus_learner
from lift_nb.training.checkpoints import _newest_checkpoint, _list_checkpoints, _write_checkpoint
from lift_nb.models.backbones import create_backbone
from lift_nb.models.surgery import trainable_state

def same(a, b):
    "Are two dictionaries of tensors equal to the bit?"
    return a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())

# Killed

def program(*words):
    "One of the programs beside this file, which compare and count by themselves; FUZZ=5 disturbs five times as often"
    here = Path(__file__).parent
    words = [sys.executable, here/words[0], '--n', max(1, int(words[1]*float(os.environ.get('FUZZ', 1)))), *words[2:]]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONPATH': os.pathsep.join([str(here.parent), str(here)])}
    done = subprocess.run([*map(str, words)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

needs_fork = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs fork and the processes that Linux lists')

@needs_fork
def test_killed():
    "SIGKILL at file operations, in half-written files and at random moments, SIGTERM, SIGINT, a dead image worker: bit-equal in the end"
    said = program('kills.py', 2, '--only', 'LIFT+', '--only', 'two image workers')
    assert 'kills, all bit-equal' in said, said

@needs_fork
def test_flipped_bits():
    "A flipped bit of a file that is read again is refused, or changes nothing"
    said = program('flips.py', 50)
    assert said.count("'refused'") == 6, said

@needs_fork
def test_small_disks():
    "A disk that fills at any write: one sentence, and with room the same result"
    for way in 'calls', 'limits': assert "'tried'" in program('disks.py', 2, '--only', way)

# Interrupted, and then?

small = dict(epochs=2, batch_size=32, expand=0, validate=False)

class Stop(Exception): pass

def interrupted(folder, **options):
    "A run that ends after its first epoch"
    def echo(line):
        if line.startswith('epoch 1/'): raise Stop('here')
    with pytest.raises(Stop): run(folder, echo=echo, save_steps=3, **{**small, **options})

def test_goes_on_or_begins_again(tmp_path):
    "With resume a training goes on, and a finished one is shown; without it what was there moves aside"
    said = []
    whole, folder = run(tmp_path/'whole', echo=said.append, **small), tmp_path/'run'
    interrupted(folder)
    assert len(_list_checkpoints(folder/'resume')) == 2
    again = run(folder, resume=True, echo=said.append, **small)
    assert again['per_class'] == whole['per_class'] and any('Going on in epoch' in line for line in said) and not (folder/'resume').exists()
    assert same(*(_read_tensors(f/'model.safetensors')[0] for f in (folder, tmp_path/'whole')))
    before = (folder/'result.json').stat().st_mtime_ns
    assert run(folder, resume=True, **small) == json.loads((folder/'result.json').read_text()) and (folder/'result.json').stat().st_mtime_ns == before
    interrupted(tmp_path/'other')
    assert run(tmp_path/'other', echo=said.append, **small)['per_class'] == whole['per_class']
    assert 'An interrupted training moved' in ' '.join(said) and _list_checkpoints(tmp_path/'other.1/resume')

def test_another_training(tmp_path):
    interrupted(tmp_path/'run')
    with pytest.raises(LiftError, match='belong to another training: epochs is 2 there and 3 here'): run(tmp_path/'run', resume=True, **{**small, 'epochs': 3})
    with pytest.raises(LiftError, match='loss is .la. there and .ce. here'): run(tmp_path/'run', resume=True, loss='ce', **small)
    with pytest.raises(LiftError, match='give one of them'): run(tmp_path/'run', resume=True, test_only=True, **small)
    assert run(tmp_path/'run', resume=True, num_workers=1, device='cpu', **small)['recipe']['epochs'] == 2

def started(seed=0, change=lambda data: data, **options):
    "A learner of `lift_plus_learner` on a few digits"
    options = dict(dict(batch_size=16, expand=0, epochs=2, seed=seed), **options)
    return lift_plus_learner(change(digits_lt(n_max=40, n_test=1)), options.pop('backbone', 'tiny_clip'), **options)

def test_fit_lift_refuses_another_training(tmp_path, capsys):
    "Whatever else decides the weights: the sentence names what differs"
    def fit(learn):
        with learn.no_bar(), learn.no_logging(): learn.fit_lift(resume=tmp_path)
    fit(started())
    other = create_backbone('tiny_clip')
    next(other.model.parameters()).data += 1
    def relabelled(d): return replace(d, train_labels=np.where(np.arange(len(d.train_labels)) == 0, 1, d.train_labels))
    cases = {'seed': dict(seed=1), 'tau is 1.0 there and 2.0 here': dict(tau=2.), 'weight_decay is': dict(weight_decay=.1), 'momentum': dict(momentum=.8), 'scale': dict(scale=20.),
        'template': dict(template='a drawing of a {}.'), 'training images': dict(change=lambda d: replace(d, train_images=d.train_images[::-1].copy())),
        'training labels': dict(change=relabelled), 'class names': dict(change=lambda d: replace(d, class_names=d.class_names[::-1])),
        'frozen weights': dict(backbone=other), 'loss is': dict(loss='ce'), 'mda': dict(mda='linear')}
    for word, options in cases.items():
        with pytest.raises(LiftError, match=f'belong to another training: .*{word}'): fit(started(**options))
    fit(started(num_workers=1))
    assert 'All 2 epochs are trained already' in capsys.readouterr().out

# A full disk

@pytest.fixture
def small_disk(tmp_path):
    "A file system of a megabyte"
    if os.name != 'posix' or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', tmp_path], capture_output=True).returncode:
        pytest.skip('needs the right to mount')
    yield tmp_path
    subprocess.run(['umount', '-l', tmp_path], check=True)

class Fill(Callback):
    "Fill the disk after the first epoch, when that is saved"
    order = 95
    def __init__(self, folder): self.folder = folder
    def after_epoch(self):
        try: (self.folder/'ballast').write_bytes(bytes(2**20))
        except OSError: pass

def trained(epochs, **kwargs):
    set_seed(0)
    learn = lift_plus_learner(digits_lt(n_max=40, n_test=1), 'tiny_clip', batch_size=16, expand=0, epochs=epochs)
    with learn.no_bar(), learn.no_logging(): learn.fit_lift(**kwargs)
    return learn

def test_full_disk(small_disk, capsys):
    "Training goes on without saving and says so; what was saved before the disk was full is whole, and can be gone on from"
    whole = trained(3)
    full = trained(3, resume=small_disk/'checkpoints', cbs=[Fill(small_disk)])
    out = capsys.readouterr().out
    assert out.count('Could not save') == 2 and 'No space left on device' in out, out
    assert same(trainable_state(full.model), trainable_state(whole.model))
    assert [p.name for p in _list_checkpoints(small_disk/'checkpoints')] == ['checkpoint-00001-00000000.safetensors'] and not list(small_disk.glob('checkpoints/*.part'))
    (small_disk/'ballast').unlink()
    assert same(trainable_state(trained(3, resume=small_disk/'checkpoints').model), trainable_state(whole.model))
    assert 'Going on in epoch 2 of 3' in capsys.readouterr().out

# Damaged files

SAME = dict(settings=dict(epochs=5), fingerprint={})

@given(st.data())
@settings(max_examples=int(60*float(os.environ.get('FUZZ', 1))), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_checkpoints(tmp_path, data):
    "A checkpoint that was cut short or changed in any bit is recognised, and the one before it is used"
    for f in _list_checkpoints(tmp_path): f.unlink()
    for epoch in 1, 2: _write_checkpoint(tmp_path, epoch, 0, dict(w=torch.arange(40.)*epoch), SAME)
    path, said = _list_checkpoints(tmp_path)[0], []
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content)-1))
    if data.draw(st.booleans()): content = content[:at]
    else: content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    found = _newest_checkpoint(tmp_path, SAME, said.append)
    assert found['position'] == (1, 0) and torch.equal(found['w'], torch.arange(40.)) and 'damaged' in said[0]
