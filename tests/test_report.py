"The report: numbers against scikit-learn, names that could do harm, the command line, and what a wheel holds"
import json, re
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import classification_report, confusion_matrix
from lift_nb.cli import main
from lift_nb.core.files import _write_json
from lift_nb.evaluation.predictions import _write_predictions
from lift_nb.evaluation.report import write_report
from notebooks import root

NAMES = ['"a" & \'b\'', '<img src=x onerror=alert(1)>', 'two\nlines', '=1+1', 'x'*60, '猫と犬', '@sum', '</script><script>alert(1)</script>']

def predictions(seed=0, n=400, C=len(NAMES)):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n)
    p = np.where(rng.random(n) < .6, y, rng.integers(0, C, n))
    return pd.DataFrame(dict(image=[f'{i}.png' for i in range(n)], label=y, prediction=p, probability=rng.random(n)))

def run_folder(folder, table, **more):
    folder.mkdir(parents=True)
    seal = _write_predictions(folder/'predictions.csv', table)
    counts = [300, 150, 90, 40, 25, 12, 6, 3]
    _write_json(folder/'result.json', dict(class_counts=counts, classes=NAMES, predictions=seal, recipe=dict(data='gone', backbone='tiny_clip', method='lift+'), **more))
    return folder

def test_tables_equal_scikit_learn(tmp_path):
    t = predictions()
    write_report(tmp_path, t, [300, 150, 90, 40, 25, 12, 6, 3], NAMES)
    ours, pairs = pd.read_csv(tmp_path/'classes.csv'), pd.read_csv(tmp_path/'confusions.csv')
    theirs = classification_report(t.label, t.prediction, output_dict=True)
    for c, row in ours.iterrows():
        np.testing.assert_allclose(row[['precision', 'recall', 'f1', 'test']].astype(float), [theirs[str(c)][k] for k in ('precision', 'recall', 'f1-score', 'support')], atol=1e-4)
    m = confusion_matrix(t.label, t.prediction)
    assert all(m[r.true, r.predicted] == r.images for r in pairs.itertuples()) and pairs.images.sum() == m.sum() - m.trace()

def test_names_do_no_harm(tmp_path):
    page = write_report(tmp_path, predictions(), [300, 150, 90, 40, 25, 12, 6, 3], NAMES, '<b>', '<i>').read_text(encoding='utf-8')
    assert '<img src=x' not in page and '<script>alert' not in page and '<title><b>' not in page and '<i>' not in page
    data = [json.loads(s) for s in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]
    assert {r[0] for r in data[0]['rows']} == set(NAMES)
    cells = pd.read_csv(tmp_path/'classes.csv').name
    assert cells[3] == "'=1+1" and cells[6] == "'@sum" and cells[2] == 'two\nlines'

def test_command_line(tmp_path, capsys):
    a, b = run_folder(tmp_path/'a', predictions()), run_folder(tmp_path/'b', predictions().assign(prediction=0))
    assert main(['report', str(a)]) == 0 and (a/'report/report.html').is_file()
    assert 'The test images cannot be shown' in (a/'report/report.html').read_text(encoding='utf-8')
    assert main(['report', str(a), str(b), '--out', str(tmp_path/'both')]) == 0 and (tmp_path/'both/tests.csv').is_file()
    assert main(['report', str(b), '--out', str(tmp_path/'b2')]) == 0
    assert 'Every test image is predicted as' in (tmp_path/'b2/report.html').read_text(encoding='utf-8')
    capsys.readouterr()

@pytest.mark.parametrize('words,sentence', [((), 'one or more runs'), (('none',), 'There are no predictions'), (('a', 'a'), 'named once only'), (('a', 'other'), 'not predictions for the same images')])
def test_one_sentence(tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path/'a', predictions()); run_folder(tmp_path/'other', predictions(n=300))
    assert main(['report', *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1

def test_nan_probabilities(tmp_path, capsys):
    a = run_folder(tmp_path/'a', predictions().assign(probability=np.nan))
    assert main(['report', str(a)]) == 2 and 'probabilities that are none' in capsys.readouterr().err
    page = write_report(tmp_path/'direct', predictions().assign(probability=np.nan), [9]*8).read_text(encoding='utf-8')
    assert 'no probabilities' in page
    some = predictions().assign(probability=np.where(np.arange(400) < 3, np.nan, .5))
    page = write_report(tmp_path/'some', some, [9]*8).read_text(encoding='utf-8')
    assert 'The probability of 3 of 400 images is not a number' in page

def test_the_template_is_packaged():
    text = (root/'setup.py').read_text() + (root/'MANIFEST.in').read_text()
    assert "'evaluation/*.html'" in text and '*.html' in text.split('recursive-include')[1]

def test_proper_scores_equal_brute_force(tmp_path):
    "Brier score and negative log-likelihood, overall and by group, from the columns that a run stores"
    import torch
    from lift_nb.evaluation.calibration import calibration_scores
    from lift_nb.evaluation.predictions import prediction_table, read_predictions, top_predictions
    torch.manual_seed(0)
    counts, z, y = [300, 150, 90, 40, 25, 12, 6, 3], torch.randn(3000, 8)*3, torch.arange(3000) % 8
    folder = run_folder(tmp_path/'a', prediction_table(list(map(str, range(3000))), top_predictions([(z[:999], y[:999]), (z[999:], y[999:])]), NAMES))
    write_report(tmp_path/'report', read_predictions(folder), counts, NAMES)
    ours, q, one = pd.read_csv(tmp_path/'report/reliability.csv').set_index('group'), np.exp(z.double().log_softmax(1).numpy()), np.eye(8)[y]
    assert np.isclose(ours.brier['overall'], ((q - one)**2).sum(1).mean(), atol=1e-4) and np.isclose(ours.nll['overall'], -np.log((q*one).sum(1)).mean(), atol=1e-4)
    theirs = calibration_scores(q, y.numpy(), counts)
    np.testing.assert_allclose(ours[['brier', 'nll']], theirs.loc[ours.index, ['brier', 'nll']], atol=1e-3)

def test_classes_only(tmp_path):
    "The stored predictions of CIFAR-100-LT hold a class for each image and nothing else; the page says what is missing"
    with np.load(root/'nbs/results/cifar100_vit_s14.npz', allow_pickle=False) as found: z = dict(found)
    t = pd.DataFrame(dict(label=z['labels'], prediction=z['IR 100, LIFT+, seed 0']))
    counts = [int(500*.01**(c/99)) for c in range(100)]
    page = write_report(tmp_path, t, counts, title='LIFT+ on CIFAR-100-LT').read_text(encoding='utf-8')
    ours, theirs = pd.read_csv(tmp_path/'classes.csv'), classification_report(t.label, t.prediction, output_dict=True, zero_division=0)
    np.testing.assert_allclose(ours.recall, [theirs[str(c)]['recall'] for c in range(100)], atol=1e-4)
    assert all(s in page for s in ('hold classes only', 'so there is no map', 'test images were not at hand', '--check_data True'))
    assert not any(s in page for s in ('Brier', 'NaN', 'nan %')) and len(page) < 2e6

def test_a_run_keeps_its_map_and_its_words(tmp_path, capsys):
    "Title, protocol and map are those of the run when the report is written again; the features come in the order of the images"
    from lift_nb.experiments.run import run
    run(tmp_path/'a', data='digits_lt', method='lp', loss='ce', epochs=1, echo=lambda line: None)
    points = pd.read_csv(tmp_path/'a/report/map.csv')
    labels = np.repeat(np.arange(10), 50)[points.row]
    near = [(labels[np.argsort(np.hypot(points.x - r.x, points.y - r.y))[1:4]] == l).mean() for r, l in zip(points.itertuples(), labels)]
    assert len(points) == 500 and np.mean(near) > .7
    assert main(['report', str(tmp_path/'a'), '--out', str(tmp_path/'again')]) == 0
    first, again = ((tmp_path/d/'report.html').read_text(encoding='utf-8') for d in ('a/report', 'again'))
    lead = [re.search('<p class="lead">(.*?)</p>', page, re.S)[1] for page in (first, again)]
    assert lead[0] == lead[1] and 'there is no map' not in first + again and '<h1>lp with loss ce, epochs 1 on digits_lt</h1>' in again and 'as in the papers' in again
    capsys.readouterr()

@pytest.mark.parametrize('installed', [True, False])
def test_label_errors(tmp_path, monkeypatch, installed):
    "Planted label errors and duplicates are found; without cleanlab a sentence says how to get it"
    from PIL import Image
    from lift_nb.data.dataset import digits_lt
    from lift_nb.experiments.run import run
    if installed: pytest.importorskip('cleanlab')
    else: monkeypatch.setattr('importlib.util.find_spec', lambda name, find=__import__('importlib.util').util.find_spec: None if name == 'cleanlab' else find(name))
    data = digits_lt()
    for i in range(0, 300):
        label = int(data.test_labels[i]) if i not in (3, 60, 110) else 5
        for part in ('train', 'test') if i % 6 == 0 else ('train' if i % 3 else 'test',):
            (tmp_path/f'images/{part}/{label}').mkdir(parents=True, exist_ok=True)
            im = Image.fromarray(data.test_images[i])
            im.save(tmp_path/f'images/{part}/{label}/{i}{part}.jpg', quality=95 if part == 'train' else 80)
    run(tmp_path/'a', data=str(tmp_path/'images'), backbone='tiny_clip', method='lp', epochs=1, echo=lambda line: None)
    from lift_nb.experiments.reports import report_run
    page = report_run(tmp_path/'a', check_data=True).read_text(encoding='utf-8')
    found = {r.test_image.split('/')[1][:-8] == r.train_image.split('/')[1][:-9] for r in pd.read_csv(tmp_path/'a/report/near_duplicates.csv')[:40].itertuples()}
    assert found == {True}
    if installed: assert {'110train.jpg'} <= {i.split('/')[1] for i in pd.read_csv(tmp_path/'a/report/label_issues.csv').image}
    else: assert 'lift_nb[labels]' in page
