"The losses against the original's numbers, against slow restatements, and under everything fastai asks of a loss"
import copy, json, math, os, pickle
from inspect import signature
from pathlib import Path

import numpy as np, pytest, torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.interpret import Interpretation
from fastai.learner import Learner
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn

from lift_nb.core.errors import LiftError
from lift_nb.training.losses import LADE, LOSSES, BalancedSoftmax, ClassBalanced, _ClassWeighted, CrossEntropy, LogitAdjustment, LongTailLoss

reference = Path(os.environ.get('LIFT_NB_REFERENCE', Path(__file__).parents[2]/'shared'/'reference'))/'losses'
few = settings(max_examples=25, deadline=None)
each_loss = pytest.mark.parametrize('name', LOSSES)
need_counts = [n for n, l in LOSSES.items() if signature(l).parameters['counts'].default is not None]
devices = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]
OPTIONS = dict(ce={}, focal=dict(gamma=(0, 4)), ldam=dict(scale=(.5, 40), margin=(0, 1)), cb=dict(beta=(0, .9999)), grw={}, bs={},
               la=dict(tau=(0, 3)), lade=dict(alpha=(0, 1), remine=(0, 1)))

SMOOTHED = 'ce', 'la', 'bs' # take label_smoothing

# Restatements in float64, one image and one class at a time

def ce(z, i): return math.log(sum(math.exp(v-max(z)) for v in z)) + max(z) - z[i]
def prior(n): return [c/sum(n) for c in n]
def la(z, y, n, tau=1.): return [ce([v + tau*math.log(p) for v, p in zip(row, prior(n))], i) for row, i in zip(z, y)]
def focal(z, y, n, gamma=2.): return [(1 - math.exp(-ce(row, i)))**gamma * ce(row, i) for row, i in zip(z, y)]

def ldam(z, y, n, scale=25., margin=.5):
    m = [margin*(c/min(n))**-.25 for c in n]
    return [ce([v - scale*m[i]*(c == i) for c, v in enumerate(row)], i) for row, i in zip(z, y)]

def weighted(z, y, w): return [w[i]/np.mean(w)*ce(row, i) for row, i in zip(z, y)]
def cb(z, y, n, beta=.9999): return weighted(z, y, [(1-beta)/(1-beta**c) for c in n])
def grw(z, y, n): return weighted(z, y, [1/p for p in prior(n)])

def lade(z, y, n, alpha=.1, remine=.1):
    e = 0
    for c, p in enumerate(prior(n)):
        mine = [row[c] for row, i in zip(z, y) if i == c]
        a = sum(mine)/(len(mine) + 1e-8)
        b = math.log(sum(math.exp(row[c] - math.log(p + 1e-9) + math.log(1/len(n) + 1e-9)) for row in z)/len(z))
        e -= p*(a - b - remine*b**2)
    return [l + alpha*e for l in la(z, y, n)]

RESTATED = dict(ce=lambda z, y, n: la(z, y, n, 0), focal=focal, ldam=ldam, cb=cb, grw=grw, bs=la, la=la, lade=lade)

def batch(c, b, seed, size=1.):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, c, generator=g)*size, torch.randint(c, (b,), generator=g), torch.randint(1, 3000, (c,), generator=g)

def make(name, counts, data):
    "A loss and its options, drawn from the ranges above"
    options = {k: data.draw(st.floats(*r), label=k) for k, r in OPTIONS[name].items()}
    return LOSSES[name](counts, **options), options

@pytest.mark.skipif(not reference.is_dir(), reason=f'the reference numbers are not at {reference}; set LIFT_NB_REFERENCE')
@pytest.mark.parametrize('theirs,name,options', [('CE', 'ce', {}), ('Focal', 'focal', {}), ('CB', 'cb', {}), ('GRW', 'grw', {}), ('BS', 'bs', {}), ('LA', 'la', {}),
    ('LA_tau1_5', 'la', dict(tau=1.5)), ('LADE', 'lade', {}), ('LDAM_s25', 'ldam', dict(scale=25))])
def test_reference(theirs, name, options):
    meta, io = json.loads((reference/'meta.json').read_text()), load_file(reference/'io.safetensors')
    z = io['logits'].clone().requires_grad_()
    loss = LOSSES[name](meta['class_counts'], **options)(z, io['labels'])
    loss.backward()
    assert math.isclose(loss.item(), meta['values'][theirs], rel_tol=1e-4)
    assert (z.grad - io[f'grad_{theirs.removesuffix("_s25")}']).abs().max() < 1e-6

def test_rows():
    assert set(LOSSES) == set(OPTIONS) == set(RESTATED)
    for name, options in OPTIONS.items():
        assert list(signature(LOSSES[name]).parameters) == ['counts', *options, 'reduction', *(['label_smoothing'] if name in SMOOTHED else [])]

@pytest.mark.parametrize('name', SMOOTHED)
@few
@given(c=st.integers(2, 9), b=st.integers(1, 9), seed=st.integers(0, 999), part=st.floats(0, .9))
def test_label_smoothing(name, c, b, seed, part):
    "The part of the target that is spread over the classes asks for each of them alike"
    z, y, n = batch(c, b, seed, 3)
    plain = LOSSES[name](n)
    plain.reduction = 'none'
    each = torch.stack([plain(z, torch.full_like(y, k)) for k in range(c)], 1)
    want = (1-part)*each[torch.arange(b), y] + part*each.mean(1)
    assert torch.allclose(LOSSES[name](n, label_smoothing=part)(z, y), want.mean(), rtol=1e-4, atol=1e-5)

@each_loss
@few
@given(c=st.integers(2, 9), b=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_restated(name, c, b, seed, data):
    z, y, n = batch(c, b, seed, 3)
    loss, options = make(name, n, data)
    loss.reduction = 'none'
    want = RESTATED[name](z.double().tolist(), y.tolist(), n.tolist(), **options)
    rel = 1e-3 if name == 'cb' else 1e-4 # the weights of cb are float32 like the original's
    assert torch.allclose(loss(z, y).double(), torch.tensor(want, dtype=torch.double), rtol=rel, atol=1e-4)

@each_loss
@few
@given(c=st.integers(2, 9), b=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_reductions(name, c, b, seed, data):
    z, y, n = batch(c, b, seed)
    loss, _ = make(name, n, data)
    loss.reduction = 'none'
    single = loss(z, y)
    total = loss.weight[y].sum() if isinstance(loss, _ClassWeighted) else b
    assert single.shape == (b,)
    for reduction, want in [('sum', single.sum()), ('mean', single.sum()/total)]:
        loss.reduction = reduction
        assert torch.allclose(loss(z, y), want, rtol=1e-4, atol=1e-5)

@each_loss
@pytest.mark.parametrize('device', devices)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('size', [0, 1, 3e4])
def test_finite(name, device, dtype, size):
    "Loss and gradient stay finite, right and wrong answers alike, also inside autocast"
    y, n = torch.arange(4, device=device).repeat(2), [5000, 60, 4, 1]
    hot = nn.functional.one_hot(y, 4)*2. - 1
    hot[4:] *= -1
    z = (hot*size).to(dtype).requires_grad_()
    loss = LOSSES[name](n).to(device)
    with torch.autocast(device, dtype): l = loss(z, y)
    assert l.dtype == torch.float32 and l.isfinite() and torch.equal(l, loss(z.float(), y))
    l.backward()
    assert z.grad.isfinite().all()

@pytest.mark.parametrize('gamma', [0, .1, .5, 1, 2, 5])
def test_focal_at_certainty(gamma):
    z = torch.tensor([[200., 0], [17., 0], [0., 0], [0., 200]], requires_grad=True)
    LOSSES['focal'](gamma=gamma)(z, torch.zeros(4)).backward()
    assert z.grad.isfinite().all() and z.grad[0].abs().max() == 0

@pytest.mark.parametrize('name', sorted(set(LOSSES) - {'lade'}))
@few
@given(c=st.integers(2, 9), b=st.integers(1, 9), shift=st.floats(-50, 50), seed=st.integers(0, 999), data=st.data())
def test_constant_shift(name, c, b, shift, seed, data):
    "Only differences of logits count; LADE's second term is the exception"
    z, y, n = batch(c, b, seed)
    loss, _ = make(name, n, data)
    assert torch.allclose(loss(z + shift, y), loss(z, y), rtol=1e-3, atol=1e-3)
    assert loss.activation(z).sum(1).allclose(torch.ones(b)) and torch.equal(loss.decodes(z), z.argmax(1))

@each_loss
def test_copies(name):
    z, y, n = batch(6, 9, 0)
    loss, want = LOSSES[name](n), LOSSES[name](n)(z, y)
    other = LOSSES[name](n.flip(0))
    other.load_state_dict(loss.state_dict())
    for l in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), other): assert torch.equal(l(z, y), want)
    assert not list(loss.parameters()) and loss.y_int
    assert all(b.dtype == torch.float32 and b.shape == (6,) for b in loss.buffers())
    assert (name in need_counts) == bool(list(loss.buffers()))

def test_kinds_of_counts():
    z, y, n = batch(6, 9, 0)
    for counts in (n.tolist(), n.numpy(), n.float(), tuple(n.tolist())): assert torch.equal(LADE(counts)(z, y), LADE(n)(z, y))

@pytest.mark.parametrize('name', need_counts)
def test_bad_counts(name):
    with pytest.raises(LiftError, match='pass them as `counts`'): LOSSES[name](None)
    with pytest.raises(LiftError, match='class 1 has 0'): LOSSES[name]([3, 0])
    with pytest.raises(LiftError, match='class 0 has nan'): LOSSES[name]([math.nan, 2])
    with pytest.raises(LiftError, match='class 1 has -2'): LOSSES[name](np.array([1, -2]))

def test_without_counts():
    assert need_counts == ['ldam', 'cb', 'grw', 'bs', 'la', 'lade']
    for name in ('ce', 'focal'): assert LOSSES[name]()(*batch(2, 9, 0)[:2]) == LOSSES[name]([3, 0])(*batch(2, 9, 0)[:2])

@each_loss
def test_bad_options(name):
    with pytest.raises(LiftError, match='Unknown reduction'): LOSSES[name]([3, 1], reduction='avg')
    with pytest.raises((IndexError, RuntimeError)): LOSSES[name]([3, 1])(torch.zeros(1, 2), torch.tensor([2]))

@pytest.mark.parametrize('beta', [1, 2, -.1, math.nan, 1-1e-9])
def test_bad_beta(beta):
    with pytest.raises(LiftError, match='beta must lie between'): ClassBalanced([3, 1], beta)

def test_relations():
    z, y, n = batch(6, 40, 0)
    assert torch.equal(BalancedSoftmax(n)(z, y), LogitAdjustment(n, 1)(z, y)) and isinstance(BalancedSoftmax(n), LogitAdjustment)
    assert not isinstance(LADE(n), LogitAdjustment), 'a callback that adjusts the logits would lose the rest of the loss'
    for l in (LogitAdjustment(n), BalancedSoftmax(n)): assert torch.equal(CrossEntropy()(l.adjust(z), y), l(z, y))

@each_loss
def test_in_fastai(name):
    "Single losses of a Learner and of Interpretation are those of the batches by themselves"
    z, y, n = batch(5, 24, 0)
    dl = DataLoader(list(zip(z, y)), bs=8, device='cpu')
    loss = LOSSES[name](n)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), nn.PReLU(init=1), loss) # passes the logits on
    want = torch.cat([LOSSES[name](n, reduction='none')(z[i:i+8], y[i:i+8]) for i in (0, 8, 16)])
    p, _, decoded, single = learn.get_preds(with_decoded=True, with_loss=True)
    worst, _ = Interpretation.from_learner(learn).top_losses(3)
    assert torch.allclose(single, want) and torch.allclose(p, z.softmax(1)) and torch.equal(decoded, z.argmax(1))
    assert torch.allclose(worst, want.topk(3)[0]) and loss.reduction == 'mean'

def test_base_is_plain():
    z, y, _ = batch(5, 24, 0)
    assert torch.equal(LongTailLoss()(z, y), nn.functional.cross_entropy(z, y))
