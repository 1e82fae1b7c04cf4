"Settings that change how is trained: off by default, on they do what they say, also across an interruption"
import numpy as np, pytest, torch
from torch.nn.functional import normalize

from lift_nb.core.errors import LiftError
from lift_nb.core.files import _read_tensors
from lift_nb.data.dataset import digits_lt
from lift_nb.experiments.recipe import resolve
from lift_nb.experiments.run import run
from lift_nb.learner import lift_plus_learner
from lift_nb.models.saved import save_lift
from lift_nb.models.surgery import trainable_state
from lift_nb.predictor import load_lift

ALL = dict(ema=.9, sampler='sqrt', mixup=.4, head_lr=.1, label_smoothing=.1, center=True)
few = digits_lt(n_max=40, n_test=2)
def learner(**options): return lift_plus_learner(few, 'tiny_clip', **dict(dict(batch_size=16, expand=0, epochs=1), **options))

def fitted(**options):
    learn = learner(**options)
    with learn.no_bar(), learn.no_logging(): learn.fit_lift()
    return learn

def weights(learn): return torch.cat([t.flatten() for t in trainable_state(learn.model).values()])

def callback(learn, name): return next((cb for cb in learn.cbs if type(cb).__name__ == name), None)

@pytest.fixture(scope='module')
def plain(): return weights(fitted())

def test_off_by_default():
    learn, r = learner(), resolve()
    assert (r.ema, r.sampler, r.mixup, r.head_lr, r.label_smoothing, r.center) == (None, 'instance', None, None, 0., False)
    assert not callback(learn, '_AverageWeights') and not callback(learn, '_MixImages') and learn.dls.train.weights is None
    assert learn.lr == .02 and learn.loss_func.label_smoothing == 0

@pytest.mark.parametrize('name', ALL)
def test_each_changes_the_training(name, plain): assert not torch.equal(weights(fitted(**{name: ALL[name]})), plain)

def test_head_lr():
    learn = fitted(head_lr=.1)
    assert [h['lr'] for h in learn.opt.hypers] == [.02, .1] # of the only epoch
    assert fitted(lr=.02, head_lr=.1, epochs=2).recorder.lrs[-1] == pytest.approx(.05)

@pytest.mark.parametrize('sampler, power', dict(sqrt=.5, balanced=0).items())
def test_the_loss_knows_what_is_drawn(sampler, power):
    learn, n = learner(sampler=sampler), few.counts.astype(float)
    want = np.log(n**power/(n**power).sum())
    assert callback(learn, 'AdjustLogits').adjustment.log_prior.numpy() == pytest.approx(want, abs=1e-5)
    learn.dls.train.rng.seed(0)
    drawn = np.bincount(few.train_labels[np.concatenate([learn.dls.train.get_idxs() for _ in range(40)]) % len(few.train_labels)], minlength=10)
    assert drawn/drawn.sum() == pytest.approx(np.exp(want), abs=.02)
    assert (learn.counts == few.counts).all() # the groups stay those of the data

def test_center():
    rows, start = (learner(center=c).model.head.weight.detach() for c in (True, False))
    assert torch.allclose(rows, normalize(start - start.mean(0), dim=-1), atol=1e-6)

def test_the_average_is_saved(tmp_path):
    learn = fitted(ema=.9, sampler='balanced', loss='ce', epochs=2)
    logits, _ = learn.logits()
    save_lift(tmp_path/'model.safetensors', learn)
    p = load_lift(tmp_path/'model.safetensors')
    assert torch.allclose(p.logits(list(few.test_images)), logits, atol=1e-4)
    assert _read_tensors(tmp_path/'model.safetensors')[1]['tau'] == 1 # balanced drawing takes the prior out

class Stop(Exception): pass

@pytest.mark.parametrize('line', ['epoch 1/', 'epoch 2/2  batch 5/'], ids=['between epochs', 'within one'])
def test_interrupted(line, tmp_path):
    "All of them at once: the training that went on has the weights of the one that was left alone"
    options = dict(backbone='tiny_clip', epochs=2, batch_size=16, expand=0, validate=False, print_freq=1, save_steps=3, **ALL)
    def echo(text):
        if text.startswith(line): raise Stop("here")
    run(tmp_path/'whole', echo=lambda text: None, **options)
    with pytest.raises(Stop): run(tmp_path/'broken', echo=echo, **options)
    run(tmp_path/'broken', echo=lambda text: None, resume=True, **options)
    whole, broken = (_read_tensors(tmp_path/n/'model.safetensors')[0] for n in ('whole', 'broken'))
    assert whole.keys() == broken.keys() and all(torch.equal(t, broken[k]) for k, t in whole.items())

def test_cached_features_change_nothing(tmp_path):
    a, b = (weights(fitted(method='lp', mda='plain', sampler='sqrt', ema=.9, epochs=2, **more)) for more in ({}, dict(features=str(tmp_path))))
    assert torch.allclose(a, b, atol=1e-6)

def test_mixed_images_are_not_cached(tmp_path):
    a, b = (weights(fitted(method='lp', mda='plain', mixup=.4, **more)) for more in ({}, dict(features=str(tmp_path))))
    assert torch.equal(a, b)

def test_fitted_again_after_an_interruption():
    "fastai's callback alone would call itself without end"
    learn, mix = learner(mixup=.4), None
    def spoil(*args): raise KeyboardInterrupt
    mix, ok = callback(learn, '_MixImages'), learn.model.forward
    learn.model.forward = spoil
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): learn.fit_lift()
    learn.model.forward = ok
    with learn.no_bar(), learn.no_logging(): learn.fit_lift()
    assert learn.loss_func != mix.lf

@pytest.mark.parametrize('options, says', [
    (dict(ema=1.), 'ema must be between 0 and 1'), (dict(sampler='square'), "Unknown sampler 'square'"), (dict(mixup=0), 'mixup must be above 0'),
    (dict(head_lr=-1), 'head_lr must be above 0'), (dict(label_smoothing=1), 'label_smoothing must be at least 0 and below 1'),
    (dict(label_smoothing=.1, loss='ldam'), "label_smoothing has no effect here: it belongs to the losses 'ce', 'la' and 'bs'"),
    (dict(ema=.9, method='zs'), 'ema has no effect here'), (dict(center=True, method='coop'), 'center has no effect here'), (dict(center='yes'), 'center must be bool')])
def test_mistakes(options, says):
    with pytest.raises(LiftError, match=says): resolve(**options)

def test_an_average_that_was_saved_while_shown():
    learn = fitted(ema=.9)
    cb = callback(learn, '_AverageWeights')
    cb.show(False)
    raw = weights(learn)
    cb.show(True) # as in an evaluation, where an interruption may save
    shown, state = weights(learn), cb.state_dict()
    cb.shown = False # as in a new process, with the weights that were saved
    cb.load_state_dict(state)
    assert torch.equal(weights(learn), raw) and not torch.equal(raw, shown)

def test_no_history_without_a_training():
    learn = lift_plus_learner(few, 'tiny_clip', 'zs')
    with learn.no_bar(), learn.no_logging(): learn.scores()
    assert not len(learn.history())

def test_the_gradient_is_clipped_behind_what_gathers(): # of several processes
    learn = learner(clip_grad=1.)
    assert callback(learn, '_ClipGradient').order > callback(learn, '_GatherLogits').order
