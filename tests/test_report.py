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
    assert 'is not a number' in page

def test_the_template_is_packaged():
    text = (root/'setup.py').read_text() + (root/'MANIFEST.in').read_text()
    assert "'evaluation/*.html'" in text and '*.html' in text.split('recursive-include')[1]
