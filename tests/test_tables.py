"Tables of runs: what each run keeps, how rows are compared, and the same numbers through Ray"
import importlib.util, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from threading import Thread

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st

from lift_nb.core.errors import LiftError
from lift_nb.cli import main
from lift_nb.experiments.run import run
from lift_nb.core.files import _read_tensors, _write_result
from lift_nb.evaluation.metrics import score_preds
from lift_nb.evaluation.predictions import compare_runs, prediction_table, read_predictions, _same_images, top_predictions, _write_predictions
from lift_nb.experiments.sweeps import run_all, _runs_of
from lift_nb.experiments.tables import _protocol_text, render_table
from lift_nb.evaluation.significance import compare_paired, _compare_proportions, intervals, _score_weights

few = settings(max_examples=25, deadline=None)
mute = dict(echo=lambda line: None)
ROWS = {'linear probing': dict(method='lp'), 'LIFT+': {}}

@pytest.fixture(scope='module')
def carried_out(tmp_path_factory):
    "Two rows with two seeds, one epoch each, in turn"
    folder = tmp_path_factory.mktemp('tables')/'in turn'
    return folder, run_all(_runs_of(ROWS, range(2), epochs=1), folder, 'digits', **mute)

# What a run keeps

def test_predictions_are_the_score(carried_out):
    for r in carried_out[1].itertuples():
        t, result = read_predictions(r.folder), json.loads((Path(r.folder)/'result.json').read_text())
        assert len(t) == 500 and t.probability.between(.1, 1).all() and list(t.image) == [str(i) for i in range(500)]
        s = score_preds(torch.tensor(t.prediction), torch.tensor(t.label), result['class_counts'])
        assert (s.overall, s.few, list(s.per_class)) == (result['overall'], result['few'], result['per_class'])

def test_a_second_test_keeps_its_own(carried_out, tmp_path):
    shutil.copytree(carried_out[1].folder[0], tmp_path/'run')
    before = (tmp_path/'run/predictions.csv').read_bytes()
    run(tmp_path/'run', method='lp', epochs=1, test_only=True, tte=True, tte_expand=4, **mute)
    assert (tmp_path/'run/predictions.csv').read_bytes() == before != (tmp_path/'run/test_only_predictions.csv').read_bytes()

def test_two_runs_in_the_shell(carried_out, capsys):
    a, b = carried_out[1].folder[[0, 2]]
    assert main(['compare', a, b]) == 0
    out = capsys.readouterr().out
    assert 'difference' in out and 'few' in out and len(out.splitlines()) == 6
    t = compare_runs(a, b)
    assert t.loc['overall', 'first'] == pytest.approx(carried_out[1].overall[0]) and t.loc['overall', 'second'] == pytest.approx(carried_out[1].overall[2])

def test_what_cannot_be_compared(carried_out, tmp_path, capsys):
    a = Path(carried_out[1].folder[0])
    shutil.copytree(a, tmp_path/'b')
    seal = _write_predictions(tmp_path/'b/predictions.csv', read_predictions(a)[:400].assign(label=1))
    result = json.loads((tmp_path/'b/result.json').read_text(encoding='utf-8'))
    _write_result(tmp_path/'b/result.json', {**result, 'predictions': seal})
    for words, says in ([a, tmp_path/'nowhere'], 'There are no predictions'), ([a, tmp_path/'b'], '100 (\'400\''), ([a], 'takes'):
        assert main(['compare', *map(str, words)]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count('\n') == 1, err

@few
@given(st.integers(0, 2**32-1), st.integers(2, 6))
def test_order_does_not_matter(seed, n_classes):
    rng = np.random.default_rng(seed)
    y, counts = rng.integers(0, n_classes, 60), rng.integers(1, 300, n_classes)
    tables = [prediction_table([f'{i}.png' for i in range(60)], top_predictions([(torch.tensor(rng.normal(size=(60, n_classes))), torch.tensor(y))])) for _ in range(2)]
    a, b = _same_images(tables[0], tables[1].sample(frac=1, random_state=seed % 1000))
    want = compare_paired(*(np.array(t.prediction) for t in tables), y, counts, n=200)
    assert compare_paired(np.array(a.prediction), np.array(b.prediction), np.array(a.label), counts, n=200).difference.equals(want.difference)

@few
@given(st.integers(0, 2**32-1), st.integers(1, 4), st.integers(1, 4))
def test_rows_of_several_runs(seed, n, m):
    "Means are means of scores; a row against itself differs by nothing; changing sides changes the sign"
    rng = np.random.default_rng(seed)
    y, counts = rng.integers(0, 4, 80), [300, 60, 10, 2]
    a, b = (rng.random((k, 80)) < .7 for k in (n, m))
    t = _compare_proportions(a.mean(0), b.mean(0), y, counts, n=500)
    means = [np.mean([score_preds(torch.tensor(np.where(h, y, -1)), torch.tensor(y), counts).overall for h in hits]) for hits in (a, b)]
    assert t.loc['overall', ['first', 'second']].tolist() == pytest.approx(means) and (t.low <= t.difference + 1e-6).all() and (t.difference <= t.high + 1e-6).all()
    back, same = (_compare_proportions(b.mean(0), x.mean(0), y, counts, n=500) for x in (a, b))
    assert back.difference.tolist() == pytest.approx((-t.difference).tolist()) and (same.p == 1).all() and not same.difference.any() and (same.low == -same.high).all()
    assert set(intervals(a.mean(0), y, counts).index) == set(_score_weights(np.bincount(y, minlength=4), counts).index)

def test_intervals_cover():
    "About 95 of 100 intervals of simulated test sets hold the true mean of two networks that share what is hard"
    rng, y, covered = np.random.default_rng(0), np.repeat([0, 1], 80), 0
    for i in range(200):
        hard = rng.random(160)
        share = np.mean([hard + rng.normal(0, .2, 160) < .8 for _ in range(2)], 0)
        truth = np.mean(rng.random(200_000) + rng.normal(0, .2, 200_000) < .8)*100
        covered += (t := intervals(share, y, [50, 50]).loc['overall']).low <= truth <= t.high
    assert 180 <= covered <= 198

# Tables

def test_a_table_that_was_moved(carried_out, tmp_path, monkeypatch, capsys):
    "Rendered with intervals where the runs' folders lie beside it, without where they are gone"
    shutil.copytree(carried_out[0], tmp_path/'moved')
    tidy = pd.read_csv(tmp_path/'moved/digits.csv').assign(folder=lambda t: t.folder.str.replace('in turn', 'elsewhere'))
    tidy.to_csv(tmp_path/'moved/digits.csv', index=False)
    monkeypatch.chdir(tmp_path)
    assert main(['table', 'digits', 'moved', 'against', 'LIFT+']) == 0
    out = capsys.readouterr().out
    assert 'confidence interval' in out and 'overall against LIFT+' in out and ' ± ' in out and ' p ' in out
    assert '[' not in str(render_table(tidy).overall.tolist()).strip('[]') and 'confidence' not in _protocol_text(tidy)
    for words, says in (['against', 'LIFT++'], "nothing to test against 'LIFT++'; choose from ['LIFT+']"), (['a', 'b'], 'a folder and against ROW'):
        assert main(['table', 'digits', 'moved', *words][:3 + len(words)] if words[0] == 'against' else ['table', 'digits', *words]) == 2
        assert says in capsys.readouterr().err

def test_seeds_tested_on_different_images(carried_out, tmp_path):
    shutil.copytree(carried_out[0], tmp_path/'t')
    place = tmp_path/'t'/Path(carried_out[1].folder[1]).name
    seal = _write_predictions(place/'predictions.csv', read_predictions(place)[:499])
    with pytest.raises(LiftError, match='is not the table that was written with result.json'): render_table(carried_out[1], tmp_path/'t')
    result = json.loads((place/'result.json').read_text(encoding='utf-8'))
    _write_result(place/'result.json', {**result, 'predictions': seal})
    with pytest.raises(LiftError, match="not predictions for the same images: 1 \\('499'\\) of 500"): render_table(carried_out[1], tmp_path/'t')
    (place/'predictions.csv').unlink()
    assert '[' not in render_table(carried_out[1], tmp_path/'t').loc['linear probing', 'overall'] and '[' in render_table(carried_out[1], tmp_path/'t').loc['LIFT+', 'overall']

def test_where_it_ran_does_not_matter(carried_out):
    "A finished run is found again with another device or number of workers"
    said = []
    again = run_all(_runs_of(ROWS, range(2), epochs=1, device='cpu', num_workers=0), carried_out[0], 'again', echo=said.append)
    assert not said and again.equals(carried_out[1])

# Ray

ray = pytest.mark.skipif(not importlib.util.find_spec('ray'), reason='Ray is not installed')

@pytest.fixture(scope='module')
def cluster():
    "Ray with one worker on this machine"
    import ray
    ray.init('local', num_cpus=1, num_gpus=0, log_to_driver=False, include_dashboard=False)
    yield ray
    ray.shutdown()

def same_runs(a, b):
    "Equal tables but for seconds and folders, and equal tensors"
    but = ['seconds', 'folder']
    pd.testing.assert_frame_equal(a.drop(columns=but), b.drop(columns=but), check_dtype=False, check_exact=True)
    for f, g in zip(a.folder, b.folder):
        (x, _), (y, _) = (_read_tensors(Path(d)/'model.safetensors') for d in (f, g))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        assert (Path(f)/'predictions.csv').read_bytes() == (Path(g)/'predictions.csv').read_bytes()

@ray
def test_through_ray(carried_out, cluster, tmp_path, monkeypatch):
    "The same bits; relative names; finished runs are skipped; a mistake is a sentence and stops nothing"
    monkeypatch.chdir(tmp_path)
    runs, said = _runs_of(ROWS, range(2), epochs=1), []
    first = run_all(runs[:1], 'rayed', 'digits', 'local', **mute)
    made = Path(first.folder[0], 'result.json').stat().st_mtime_ns
    lost = ('lost', dict(data='digits_lt', checkpoint='nowhere.safetensors', seed=0))
    tidy = run_all([lost, *runs], 'rayed', 'digits', 'local', echo=said.append)
    assert said == [f'lost: {tidy.problem[0]}'] and "no file of weights 'nowhere.safetensors'" in tidy.problem[0] and pd.isna(tidy.overall[0])
    assert Path(first.folder[0], 'result.json').stat().st_mtime_ns == made
    same_runs(carried_out[1], tidy[1:].drop(columns='problem').reset_index(drop=True)[carried_out[1].columns])
    assert pd.read_csv('rayed/digits.csv').name.tolist() == tidy.name.tolist()

@ray
@pytest.mark.parametrize('gpus', [1, -1, 'all', True])
def test_gpus_that_are_not_there(gpus, cluster, tmp_path):
    with pytest.raises(LiftError, match='gpus must be a number from 0 to 0'): run_all([], tmp_path, ray='local', gpus=gpus)

@ray
def test_a_worker_that_dies(cluster, tmp_path):
    "The row says so, and the other row is there"
    runs = [('killed', dict(data='digits_lt', seed=0, epochs=1000)), ('lp', dict(method='lp', seed=0, epochs=1))]
    def kill():
        while not (locks := list(tmp_path.glob('runs/*/run.lock'))) or not locks[0].read_text(): time.sleep(.2)
        os.kill(json.loads(locks[0].read_text())['pid'], signal.SIGKILL)
    (killer := Thread(target=kill)).start()
    tidy = run_all(runs, tmp_path/'runs', ray='local', **mute)
    killer.join()
    assert 'Error: ' in tidy.problem[0] and '\n' not in tidy.problem[0] and tidy.overall[1] > 50

@ray
@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_interrupted_and_continued(tmp_path):
    "Ctrl-C stops the worker and leaves no lock; started again, what is finished stays"
    words = [sys.executable, '-m', 'lift_nb', 'reproduce', 'digits', 'seeds', '2', 'epochs', '1', 'ray', 'local']
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'OMP_NUM_THREADS': '1'}
    first = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (done := list(tmp_path.glob('output/reproduce/*/result.json'))) and first.poll() is None: time.sleep(.1)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=90)
    assert first.returncode == 130 and err.endswith(f"lift_nb: interrupted; go on with\n  python -m {' '.join(words[2:])}\n"), err
    assert done and not list(tmp_path.glob('output/reproduce/*/run.lock'))
    made = {f: f.stat().st_mtime_ns for f in done}
    again = subprocess.run(words[:-2], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count('3 seeds') == 0 and all(f.stat().st_mtime_ns == t for f, t in made.items())
    assert len(list(tmp_path.glob('output/reproduce/*/result.json'))) == 6

@ray
@pytest.mark.parametrize('address', ['127.0.0.1:9', 'ray://127.0.0.1:9', 'no address'])
def test_no_cluster(address):
    "Asked for in a process of its own, as this one may be connected"
    code = f"from lift_nb.experiments.workers import _connect\ntry: _connect({address!r})\nexcept ValueError as e: print(type(e).__name__, e)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
    assert done.stdout.startswith('LiftError There is no Ray cluster at') and done.stdout.count('\n') == 1, done.stdout + done.stderr[-500:]
