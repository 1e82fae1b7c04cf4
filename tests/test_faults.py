"Disks that are full, processes that die, files of anybody, groups without a class: nothing is lost, and one sentence says why"
import math, os, shutil, subprocess, sys

import numpy as np, pytest, torch
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from PIL import Image

import lift_nb.experiments.progress as progress
import lift_nb.experiments.results as results
from lift_nb.cli import main
from lift_nb.core.errors import LiftError
from lift_nb.core.files import _read_tensors
from lift_nb.data.dataset import digits_lt
from lift_nb.data.folders import from_folder
from lift_nb.experiments.run import run
from lift_nb.learner import lift_plus_learner
from lift_nb.models.saved import save_lift
from lift_nb.predictor import load_lift

small = dict(epochs=1, batch_size=64, expand=0, validate=False, echo=lambda line: None)
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
posix = pytest.mark.skipif(os.name != 'posix', reason='of POSIX')

def shell(*words, cwd, **env):
    "Return code and both outputs of a command"
    done = subprocess.run([sys.executable, '-m', 'lift_nb', *map(str, words)], cwd=cwd, env={**ENV, **env}, capture_output=True, timeout=300)
    return done.returncode, done.stdout.decode(errors='replace'), done.stderr.decode(errors='replace')

def photos(root, n=6, classes='ab', size=(36, 36)):
    "root/<class>/<i>.png of noise"
    for k, c in enumerate(classes):
        (root/c).mkdir(parents=True)
        for i in range(n): Image.fromarray(np.random.default_rng(97*k + i).integers(0, 255, (*size, 3), dtype=np.uint8)).save(root/c/f'{i}.png')
    return root

# Groups without a class

def test_an_empty_group_is_nan_inside_and_a_dash_outside():
    learn = lift_plus_learner(digits_lt(n_max=40, n_test=1), 'tiny_clip', batch_size=16, expand=0, epochs=1) # no class has more than 100 images
    with learn.no_bar(): learn.fit_lift()
    values, history = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1])), learn.history()
    assert math.isnan(values['many']) and str(values['many']) == f"{values['many']:.6f}" == '–' and history['many'].dtype == float and history['many'].isna().all()
    assert learn.scores().many is None

@pytest.mark.parametrize('callback', [SaveModelCallback, EarlyStoppingCallback])
def test_an_empty_group_cannot_be_monitored(callback, tmp_path):
    learn = lift_plus_learner(digits_lt(n_max=40, n_test=1), 'tiny_clip', batch_size=16, expand=0, epochs=1, path=tmp_path)
    with learn.no_bar(), learn.no_logging(), pytest.raises(Exception, match="'many' is empty: no class of that group"):
        learn.fit_lift(cbs=[callback(monitor='many')])

def test_interrupted_with_an_empty_group(tmp_path):
    "Scores without a class survive a checkpoint"
    class Stop(Exception): pass
    def stop(line):
        if line.startswith('epoch 2/'): raise Stop('here')
    options = dict(data=str(photos(tmp_path/'x')), backbone='tiny_clip', epochs=2, batch_size=4, expand=0, few=1, save_steps=1)
    whole = run(tmp_path/'whole', echo=lambda line: None, **options)
    with pytest.raises(Stop): run(tmp_path/'broken', echo=stop, **options)
    said = []
    found = run(tmp_path/'broken', resume=True, echo=said.append, **options)
    assert any('Going on in epoch 2' in s for s in said) and not any('few' in s for s in said if s.startswith('epoch'))
    assert found['few'] is None and found['per_class'] == whole['per_class'] and 'few –' in said[-1]
    a, b = (_read_tensors(tmp_path/n/'model.safetensors')[0] for n in ('whole', 'broken'))
    assert all(torch.equal(t, b[k]) for k, t in a.items())

# Disks and processes

def full(*args, **kwargs): raise OSError(28, 'No space left on device')

@pytest.mark.parametrize('what', ['_draw', '_write_predictions', '_write_scalars', '_write_result'])
def test_the_model_is_written_first(what, tmp_path, monkeypatch, capsys):
    "Whatever else cannot be written at the end, the trained tensors are there"
    monkeypatch.setattr(results, what, full)
    code = main(f'train digits_lt --epochs 1 --batch_size 64 --expand 0 --validate False --output_dir {tmp_path}/run'.split())
    said = capsys.readouterr().err
    assert code == (0 if what in ('_draw', '_write_scalars') else 2), said
    assert code == 0 or 'No space left on device' in said and said.count('\n') == 1
    assert load_lift(tmp_path/'run').classes and (code == 0) == (tmp_path/'run/result.json').exists()

def test_a_log_that_cannot_grow(tmp_path):
    "The training goes on, and says once that its log does not"
    (tmp_path/'run/log.txt').mkdir(parents=True)
    said = []
    assert run(tmp_path/'run', **{**small, 'echo': said.append})['overall'] > 20
    assert sum('log.txt' in s and 'the run goes on' in s for s in said) == 1

def test_a_folder_that_goes_away(tmp_path):
    "A run whose folder is deleted meanwhile ends with a result or with one sentence"
    def echo(line):
        if line.startswith('epoch 1/'): shutil.rmtree(tmp_path/'run')
    try: assert run(tmp_path/'run', **{**small, 'epochs': 2, 'echo': echo})['per_class']
    except LiftError as e: assert str(tmp_path) in str(e)

def test_a_run_folder_that_goes_away_in_the_shell(tmp_path, monkeypatch, capsys):
    log = progress._Log.__call__
    def say(self, text, *shown):
        log(self, text, *shown)
        if text.startswith('epoch 1/'): shutil.rmtree(tmp_path/'run', ignore_errors=True)
    monkeypatch.setattr(progress._Log, '__call__', say)
    code = main(f'train digits_lt --epochs 2 --batch_size 64 --expand 0 --output_dir {tmp_path}/run'.split())
    assert code in (0, 2) and capsys.readouterr().err.count('\n') <= 1

def test_dead_locks(tmp_path):
    "What a dead process has left, of this host or another one, holds nobody up"
    (tmp_path/'run').mkdir()
    for owner in ('process 999999 on another-host since 2026-01-01 00:00:00', f'process {os.getpid()} on somewhere since 2026-01-01 00:00:00', 'nonsense', ''):
        (tmp_path/'run/run.lock').write_text(owner)
        assert run(tmp_path/'run', **{**small, 'epochs': 0})['overall'] >= 0
        assert not (tmp_path/'run/run.lock').exists()

def test_a_sweep_with_failed_runs(tmp_path, monkeypatch, capsys):
    photos(tmp_path/'x', 4); monkeypatch.chdir(tmp_path)
    words = 'sweep x -b tiny_clip --epochs 1 --batch_size 8 --scale 20,25 --output_dir all'.split()
    from lift_nb.experiments import sweeps
    once = sweeps.run
    monkeypatch.setattr(sweeps, 'run', lambda place, **o: full() if o['scale'] == 20 else once(place, **o))
    assert main(words) == 2 and '1 of 2 runs failed' in capsys.readouterr().err
    monkeypatch.setattr(sweeps, 'run', once)
    assert main(words) == 0

@pytest.mark.parametrize('words', ['sweep digits_lt --lr 0.1,0.2 --epochs 1 --output_dir', 'reproduce digits --seeds 1 --output_dir', 'train digits_lt --output_dir'])
@pytest.mark.parametrize('place', ['file', 'file/x'])
def test_folders_that_cannot_be(words, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); (tmp_path/'file').touch()
    assert main([*words.split(), place]) == 2 and capsys.readouterr().err.count('\n') == 1

# Files of anybody

ESCAPE = '\x1b[31mred\x07'

@pytest.mark.parametrize('make, says', [('postscript', 'not an image of a known format'), ('fifo', 'no regular file'), ('bomb', 'megapixels')])
@posix
def test_hostile_images(make, says, tmp_path):
    "In a folder to be trained on, and given as path, bytes and open file to a predictor; quickly"
    root = photos(tmp_path/'x', 4)
    if make == 'postscript': (root/'a/x.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n')
    elif make == 'fifo': os.mkfifo(root/'a/x.png')
    else: Image.new('1', (30000, 30000)).save(root/'a/x.png')
    learn = lift_plus_learner(digits_lt(n_max=40, n_test=1), 'tiny_clip', expand=0, device='cpu')
    save_lift(tmp_path/'m.safetensors', learn); p = load_lift(tmp_path/'m.safetensors', device='cpu')
    forms = [root/'a/x.png'] if make == 'fifo' else [root/'a/x.png', (root/'a/x.png').read_bytes(), open(root/'a/x.png', 'rb')]
    for x in forms:
        with pytest.raises(LiftError, match=says): p.predict(x)
    if make != 'fifo':
        with pytest.raises(LiftError, match=says): from_folder(root)

# Words, names and dicts

def test_names_that_look_like_tex(tmp_path, monkeypatch):
    "Formulas that are none, as names of the folder, of classes and of the prompt: the picture and the report are there"
    monkeypatch.chdir(tmp_path); said = []
    root = photos(tmp_path/'$\\frac{x$', 4, ('$\\frac{', 'a_$b^$'))
    run(tmp_path/'run', data=str(root), backbone='tiny_clip', epochs=1, batch_size=8, expand=0, template='$\\sqrt$ {}', echo=said.append)
    assert (tmp_path/'run/per_class.png').exists() and not any('Could not' in line for line in said), said

@pytest.mark.parametrize('words', [['--help'], ['train', '--help'], ['data', 'x'], ['train', 'x', '--epochs', '0', '-m', 'zs', '-b', 'tiny_clip']])
def test_an_ascii_terminal(words, tmp_path):
    "The C locale without Python's UTF-8 mode, where a class is called K\u00e4fer"
    photos(tmp_path/'x', 4, ('K\u00e4fer', 'b'))
    code, out, err = shell(*words, cwd=tmp_path, LC_ALL='C', PYTHONIOENCODING='ascii', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    assert code == 0 and out and 'Traceback' not in err, err

@pytest.mark.parametrize('words, says', [('train digits_lt --lr 1e308', 'at most 1e12'), ('train digits_lt --expand 100000', 'at most 2048'),
    ('output_dir --dry-run', 'has no value'), ('train digits_lt --output_dir --epochs 3', 'has no value'), ('train digits_lt --resolution 4000', 'at most 2048'),
    ('train digits_lt -b vit_tiny_patch16_224.no_such_tag', "knows no weights 'no_such_tag'")])
def test_settings_that_cannot_be(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2 and says in (err := capsys.readouterr().err) and err.count('\n') == 1 and not [f for f in tmp_path.rglob('*') if f.is_file()]

