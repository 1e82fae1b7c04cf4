"A saved model's calibration, prediction sets and class mix, at the predictor and in the shell"
import numpy as np, pandas as pd, pytest
from PIL import Image
from fastai.torch_core import set_seed
from scipy.special import softmax

from lift_nb.cli import main
from lift_nb.core.errors import LiftError
from lift_nb.core.files import _read_tensors
from lift_nb.data.dataset import digits_lt
from lift_nb.evaluation.calibration import _nll
from lift_nb.evaluation.decisions import Calibration, fit_calibration
from lift_nb.learner import lift_plus_learner
from lift_nb.predictor import Predictor, load_lift, save_lift

data = digits_lt()
valid, test = np.arange(500)[::2], np.arange(500)[1::2]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A model that was not calibrated, one that was, and images"
    set_seed(0)
    folder = tmp_path_factory.mktemp('decisions')
    learn = lift_plus_learner(data, 'tiny_clip', method='lp', loss='ce', epochs=1)
    learn.fit_lift()
    save_lift(folder/'raw.safetensors', learn)
    p = load_lift(folder/'raw.safetensors', device='cpu')
    p.calibrate(data.test_images[valid], np.array(p.classes)[data.test_labels[valid]], prior='uniform')
    p.save(folder/'calibrated.safetensors')
    (folder/'images').mkdir()
    for i in range(4): Image.fromarray(data.test_images[i*50]).save(folder/'images'/f'{i}.png')
    (folder/'mix.csv').write_text('class,share\n' + ''.join(f'{c},{n}\n' for c, n in zip(p.classes, range(1, 11))))
    return folder

@pytest.fixture
def p(folder): return load_lift(folder/'calibrated.safetensors', device='cpu')

def test_cross_entropy_carries_the_training_prior(folder, p):
    raw = load_lift(folder/'raw.safetensors', device='cpu')
    assert raw.about['tau'] == 0 and raw.calibration is None
    images, mix = data.test_images[test], data.counts/data.counts.sum()
    z = raw.logits(images).numpy().astype(float)
    for prior, q in dict(uniform=np.full(10, .1), training=mix).items():
        want = softmax(z - np.log(mix) + np.log(q), axis=1).max(1)
        assert np.allclose(raw.predict(images, prior=prior).probability, want, atol=1e-6)
    right = {prior: (raw.predict(images, prior=prior)['class'].map(p.classes.index) == data.test_labels[test]).mean() for prior in ('training', 'uniform')}
    assert right['uniform'] > right['training']

def test_what_the_file_says(p, folder):
    "The calibration's prior is the default of a model that is loaded"
    z = p.logits(data.test_images[valid]).numpy().astype(float)
    y, shifted = data.test_labels[valid], z - np.log(data.counts/data.counts.sum())
    assert _nll(shifted, y, p.calibration.temperature) <= _nll(shifted, y)
    images = data.test_images[test]
    pd.testing.assert_frame_equal(p.predict(images), p.predict(images, prior='uniform'))
    again = fit_calibration(z, y, data.counts, 'uniform', data.counts)
    assert np.isclose(again.temperature, p.calibration.temperature) and again.predicted == p.calibration.predicted
    assert {*_read_tensors(folder/'calibrated.safetensors')[0]} == {*_read_tensors(folder/'raw.safetensors')[0]}

def test_sets_and_acceptance(p):
    "Coverage holds on other images, and does not depend on the class mix that is asked for"
    images, y = data.test_images[test], np.array(p.classes)[data.test_labels[test]]
    found = p.predict(images, coverage=.9, min_confidence=.5)
    inside = np.array([c in s for c, s in zip(y, found.set)])
    assert .84 < inside.mean() < .97
    assert found.sure.equals(found.probability >= .5)
    assert found.set.equals(p.predict(images, coverage=.9, prior='training').set)
    level = max(p.calibration.confidence)
    sure = p.predict(images, min_precision=level)
    assert (sure['class'] == y)[sure.sure].mean() > level - .06
    two = p.predict(list(images[:3]), 2, coverage=.9, min_confidence=.5)
    assert len(two) == 6 and two.sure[::2].tolist() == two.sure[1::2].tolist() == found.sure[:3].tolist()

def test_no_images(p):
    assert len(p.predict([], coverage=.9, min_confidence=.5)) == 0

def test_estimate_needs_images_and_every_class(p):
    with pytest.raises(LiftError, match='at least 10 images a class, 100, not 3'): p.predict(list(data.test_images[:3]), prior='estimate')
    some = valid[data.test_labels[valid] != 3]
    again = Predictor(p.model, p.about)
    again.calibrate(data.test_images[some], data.test_labels[some])
    assert '1 of 10 classes have no validation image (numbers [3])' in again.calibration.notes[0]
    with pytest.raises(LiftError, match='validation images of every class'): again.predict(data.test_images[test], prior='estimate')
    again.calibration = None
    with pytest.raises(LiftError, match='calibrated'): again.predict(data.test_images[test], prior='estimate')

def test_a_file_that_is_another_now(p, folder, tmp_path):
    with pytest.raises(LiftError, match='Only a model of load_lift'): Predictor(p.model, p.about).save(tmp_path/'x.safetensors')
    p.file = tmp_path/'gone.safetensors'
    with pytest.raises(LiftError, match='There is no file'): p.save()
    set_seed(1)
    save_lift(p.file, lift_plus_learner(data, 'tiny_clip', method='lift+'))
    with pytest.raises(LiftError, match='is another model now'): p.save()

def test_losses_of_ones_own(tmp_path):
    "What the logits carry is not guessed"
    import torch
    save_lift(tmp_path/'x.safetensors', lift_plus_learner(data, 'tiny_clip', method='lp', loss=torch.nn.CrossEntropyLoss()))
    p = load_lift(tmp_path/'x.safetensors', device='cpu')
    assert p.about['tau'] is None
    with pytest.raises(LiftError, match='pass train_prior'): p.predict(data.test_images[0], prior='uniform')
    with pytest.raises(LiftError, match='pass train_prior'): p.calibrate(data.test_images[valid], data.test_labels[valid], prior='uniform')
    assert len(p.predict(data.test_images[0], prior='uniform', train_prior='training')) == 1

def test_learner_saved_with_a_calibration(tmp_path):
    learn = lift_plus_learner(data, 'tiny_clip', method='zs')
    found = fit_calibration(*learn.logits(), learn.counts)
    save_lift(tmp_path/'x.safetensors', learn, calibration=found)
    assert load_lift(tmp_path/'x.safetensors', device='cpu').calibration == found != Calibration()

def shell(words, folder): return main(['predict', *(w.replace('FOLDER', str(folder)) for w in words.split())])

def test_shell(folder, p, capsys, tmp_path):
    assert shell('FOLDER/calibrated.safetensors FOLDER/images --coverage 0.9 --min_confidence .5 --out FOLDER/out.csv', folder) == 0
    found = pd.read_csv(folder/'out.csv', keep_default_na=False)
    want = p.predict(folder/'images', coverage=.9, min_confidence=.5)
    assert found.set.tolist() == want.set.map('; '.join).tolist() and found.sure.tolist() == want.sure.tolist()
    for prior, meant in {'training': 'training', 'FOLDER/mix.csv': dict(zip(p.classes, range(1, 11))), ','.join('2'*10): 'uniform'}.items():
        assert shell(f'FOLDER/calibrated.safetensors FOLDER/images prior {prior} --out FOLDER/out.csv', folder) == 0
        assert np.allclose(pd.read_csv(folder/'out.csv').probability, p.predict(folder/'images', prior=meant).probability, atol=1e-6)
    assert shell('FOLDER/raw.safetensors FOLDER/images --prior uniform --train_prior training', folder) == 0

@pytest.mark.parametrize('words, said', [('--prior unifrom', "choose from ['uniform'"), ('--prior 1,2', 'has 2 numbers'), ('--prior 1,x', "must be a number, not 'x'"), ('--coverage .5', 'choose from'),
    ('--coverage much', "Option coverage must be a number"), ('--min_confidence 2', 'between 0 and 1'), ('--prior estimate', 'at least 10 images a class'), ('--prior FOLDER/images/0.png', 'Option prior'),
    ('--min_precision .9 --min_confidence .5', 'give one of them'), ('--prior FOLDER/odd.csv', 'two columns'), ('--prior FOLDER/part.csv', 'lacks')])
def test_shell_says_what_is_wrong(words, said, folder, capsys):
    (folder/'odd.csv').write_text('a,b,c\n'); (folder/'part.csv').write_text('zero,1\n')
    assert shell(f'FOLDER/calibrated.safetensors FOLDER/images {words}', folder) == 2
    err = capsys.readouterr().err
    assert err.startswith('lift_nb: ') and err.count('\n') == 1 and said in err

def test_calibrate_in_the_shell(folder, tmp_path, capsys):
    "Folder and table give the calibration of the predictor; five crops where the run tested with five; mistakes are one sentence"
    from lift_nb.core.files import _write_tensors
    some, rows = valid[::3], []
    for i in some:
        c = tmp_path/'labelled'/data.class_names[data.test_labels[i]]
        c.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.test_images[i]).save(c/f'{i}.png')
        rows.append(f'labelled/{c.name}/{i}.png,{c.name}')
    (tmp_path/'labelled.csv').write_text('\n'.join(['path,label', *rows]) + '\n')
    raw = load_lift(folder/'raw.safetensors', device='cpu')
    want = {tte: raw.calibrate(data.test_images[some], data.test_labels[some], tte=tte).temperature for tte in (False, True)}
    tensors, about = _read_tensors(folder/'raw.safetensors')
    about['recipe'] = dict(about.get('recipe') or {}, tte=True)
    _write_tensors(tmp_path/'five.safetensors', tensors, **about)
    for model, source, tte in ((folder/'raw.safetensors', 'labelled', False), (folder/'raw.safetensors', 'labelled.csv', False), (tmp_path/'five.safetensors', 'labelled', True)):
        assert main(['calibrate', str(model), str(tmp_path/source), '--out', str(tmp_path/'new.safetensors')]) == 0
        said = capsys.readouterr().out
        assert f'temperature {want[tte]:.3f}, fitted on {len(some)} images' in said and ('five crops' in said) == tte
        assert np.isclose(load_lift(tmp_path/'new.safetensors', device='cpu').calibration.temperature, want[tte])
    (tmp_path/'odd.csv').write_text('path,label\nlabelled/zero/0.png,puma\n'); (tmp_path/'lost.csv').write_text('path,label\nx.png,zero\n')
    for words, sentence in {'': 'takes a run and', 'none': 'There is no folder or table', 'odd.csv': "Unknown class 'puma'", 'lost.csv': 'x.png'}.items():
        assert main(['calibrate', str(folder/'raw.safetensors'), *([str(tmp_path/words)] if words else [])]) == 2
        err = capsys.readouterr().err
        assert sentence in err and err.count('\n') == 1

def test_images_of_another_kind(folder, tmp_path, capsys):
    "An estimated class mix comes with a warning when the images are unlike the validation images, and only then"
    (tmp_path/'noise').mkdir(); (tmp_path/'digits').mkdir()
    rng = np.random.default_rng(0)
    for i in range(120):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path/f'noise/{i}.png')
        Image.fromarray(data.test_images[test][2*i]).save(tmp_path/f'digits/{i}.png')
    for images, unlike in ('noise', True), ('digits', False):
        assert main(['predict', str(folder/'calibrated.safetensors'), str(tmp_path/images), '--prior', 'estimate', '--out', str(tmp_path/'x.csv')]) == 0
        assert ('unlike the validation images' in capsys.readouterr().err) == unlike

@pytest.mark.parametrize('rows, said', [('zero,-1', "'zero' must be a positive"), ('class,share\nzero,0', "'zero' must be a positive"), ('zero,1e-3', None)])
def test_numbers_of_a_prior(folder, tmp_path, capsys, rows, said):
    (tmp_path/'mix.csv').write_text(rows + ''.join(f'\n{c},0.111' for c in data.class_names[1:]))
    code = main(['predict', str(folder/'calibrated.safetensors'), str(folder/'images'), '--prior', str(tmp_path/'mix.csv')])
    assert code == (2 if said else 0) and (said or '') in capsys.readouterr().err

def test_no_threshold(folder):
    "A calibrated model that reaches no precision says so, with the best that was reached"
    p = load_lift(folder/'raw.safetensors', device='cpu')
    p.calibrate(data.test_images[valid][:40], np.arange(40) % 10)
    with pytest.raises(LiftError, match='was calibrated, but knows no precision. No threshold gives'): p.predict(data.test_images[:2], min_precision=.9)
