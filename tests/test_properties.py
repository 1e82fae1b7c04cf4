"Properties that hold for random sizes: towers, layer sets, counts, crops, batches"
import copy, math, pickle

import numpy as np, pytest, timm, torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn

from lift_nb.models.adapters import auto_dim
from lift_nb.data.crops import MDA_SCHEDULES, _crop_box, min_scale
from lift_nb.core.errors import LiftError
from lift_nb.cli import main
from lift_nb.data.dataset import class_counts, long_tail_counts, long_tail_subset, shot_groups
from lift_nb.data.splits import _split_classes
from lift_nb.models.heads import HEADS
from lift_nb.training.losses import LogitAdjustment
from lift_nb.evaluation.metrics import score_preds
from lift_nb.experiments.recipe import Recipe, resolve, run_name
from lift_nb.models.surgery import adapt, load_trainable, n_trainable, _pick_layers, trainable_state

few = settings(max_examples=15, deadline=None)

def tower(depth, heads):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16*heads, depth=depth, num_heads=heads, num_classes=0).eval()

@few
@given(depth=st.integers(1, 4), heads=st.integers(1, 3), r=st.integers(1, 9), data=st.data())
def test_adaptformer(depth, heads, r, data):
    "Fresh modules change nothing; counts follow the formula; state, copy and pickle go round"
    layers, x = data.draw(st.lists(st.integers(0, depth-1), min_size=1, unique=True)), torch.randn(2, 3, 16, 16)
    vit = tower(depth, heads)
    before, d = vit(x), 16*heads
    adapt(vit, 'adaptformer', 10, layers, r)
    assert torch.equal(vit(x), before)
    assert n_trainable(vit) == len(layers)*(2*d + 2*d*r + r + d + 1)
    with torch.no_grad():
        for p in vit.parameters(): p.add_(p.requires_grad*torch.randn_like(p)*.1)
    after, twin = vit(x), tower(depth, heads)
    adapt(twin, 'adaptformer', 10, layers, r)
    load_trainable(twin, trainable_state(vit))
    assert torch.equal(twin(x), after) and not torch.equal(after, before)
    assert torch.equal(copy.deepcopy(vit)(x), after) and torch.equal(pickle.loads(pickle.dumps(vit))(x), after)

def test_adaptformer_restated():
    "The branch beside the MLP equals the obvious loop over blocks"
    vit, x = tower(2, 2), torch.randn(2, 3, 16, 16)
    adapt(vit, 'adaptformer', 10, r=3)
    for n, p in vit.named_parameters():
        if p.requires_grad: nn.init.normal_(p)
    h = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
    for b in vit.blocks:
        h = h + b.attn(b.norm1(h))
        main, side = b.mlp.main, b.mlp.side
        h = h + main.mlp(main.norm2(h)) + side.scale*side.up(torch.relu(side.down(side.norm(h))))
    assert torch.allclose(vit.norm(h)[:, 0], vit(x), atol=1e-5)

def test_one_graph():
    "torch.compile sees an adapted tower as one graph"
    vit = tower(2, 2)
    adapt(vit, 'adaptformer', 10, r=3)
    assert torch._dynamo.explain(vit)(torch.randn(2, 3, 16, 16)).graph_break_count == 0

@given(n=st.integers(1, 30), k=st.integers(-3, 33))
def test_layers(n, k):
    if 0 <= k <= n: assert _pick_layers(k, n) == list(range(n))[n-k:]
    else:
        with pytest.raises(LiftError): _pick_layers(k, n)

@given(c=st.integers(2, 10_000), layers=st.integers(1, 48), k=st.sampled_from([1, 2, 4]))
def test_auto_dim(c, layers, k):
    r = auto_dim(c, layers, k)
    assert r & (r-1) == 0 and r >= 1
    assert r == 1 or r <= c/(layers*k) < 2*r

@given(n_max=st.integers(1, 500), c=st.integers(1, 60), ratio=st.floats(1, 200), seed=st.integers(0, 99))
def test_long_tail(n_max, c, ratio, seed):
    counts = long_tail_counts(n_max, c, 1/ratio)
    assert counts[0] == n_max and counts == sorted(counts, reverse=True)
    labels = np.random.RandomState(seed).permutation(np.repeat(np.arange(c), n_max))
    picks = long_tail_subset(labels, counts, seed)
    assert len(set(picks)) == len(picks) and class_counts(labels[picks], c).tolist() == counts
    assert sum(m.astype(int) for m in shot_groups(counts).values()).tolist() == [1]*c

@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=9), pct=st.floats(.01, .99))
def test_split(sizes, pct):
    found = {str(i): [f'{i}/{j}' for j in range(n)] for i, n in enumerate(sizes)}
    train, test = _split_classes(found, pct, 0)
    for c, files in found.items():
        assert sorted(train[c] + test[c]) == sorted(files) and (len(train[c]) >= 1 or not files)
        assert len(files) < 2 or len(test[c]) >= 1

@given(w=st.integers(1, 600), h=st.integers(1, 600), lo=st.floats(.01, 1), seed=st.integers(0, 999))
def test_crop(w, h, lo, seed):
    torch.manual_seed(seed)
    top, left, side = _crop_box(w, h, lo)
    assert 1 <= side <= min(w, h) and 0 <= top <= h-side and 0 <= left <= w-side
    assert side >= math.floor(math.sqrt(min(lo*w*h, min(w, h)**2)))

@given(epochs=st.integers(1, 100), name=st.sampled_from(list(MDA_SCHEDULES)))
def test_schedules(epochs, name):
    s = [min_scale(e, epochs, name) for e in range(epochs)]
    assert s == sorted(s) and .08-1e-9 <= s[0] and s[-1] <= 1+1e-9

@few
@given(c=st.integers(1, 12), n=st.integers(1, 60), seed=st.integers(0, 99))
def test_scores(c, n, seed):
    rng = np.random.RandomState(seed)
    preds, targs, counts = rng.randint(0, c, n), rng.randint(0, c, n), rng.randint(1, 300, c)
    s, hit = score_preds(preds, targs, counts), preds == targs
    per = [100*hit[targs == k].mean() if (targs == k).any() else None for k in range(c)]
    assert [None if p is None else round(p, 6) for p in per] == [None if p is None else round(p, 6) for p in s.per_class]
    for g, m in shot_groups(counts).items():
        mine = [p for p, i in zip(per, m) if i and p is not None]
        assert (getattr(s, g) is None) == (not mine) and (not mine or math.isclose(getattr(s, g), np.mean(mine)))

@few
@given(c=st.integers(2, 9), b=st.integers(1, 9), tau=st.floats(0, 3), seed=st.integers(0, 99))
def test_logit_adjustment(c, b, tau, seed):
    torch.manual_seed(seed)
    z, y, counts = torch.randn(b, c, dtype=torch.float32), torch.randint(c, (b,)), torch.randint(1, 500, (c,))
    prior = (counts/counts.sum()).log()
    want = torch.stack([torch.logsumexp(z[i] + tau*prior, 0) - (z[i] + tau*prior)[y[i]] for i in range(b)]).mean()
    assert torch.allclose(LogitAdjustment(counts, tau)(z, y), want, atol=1e-4)
    assert torch.isfinite(LogitAdjustment(counts, tau)((z*1e4).half(), y))

@given(st.sampled_from(list(HEADS)), st.integers(1, 20), st.integers(1, 9))
def test_heads(name, d, c):
    assume(not (name == 'layernorm' and d == 1))
    h = HEADS[name](d, c)
    assert h(torch.randn(3, d)).shape == (3, c) and torch.allclose(h.weight.norm(dim=1), torch.ones(c), atol=1e-5)

@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4), key=st.sampled_from(['lr', 'epochs', 'batch_size', 'expand', 'tte', 'seed']))
def test_command_line_never_crashes(words, key):
    "Garbage in front or as a value ends in exit code 2, before anything is built"
    if main(['-m', 'nonsense', key, *words]) != 2: raise AssertionError(words)

def test_recipe_names():
    assert run_name(**{'data': 'x', 'lr': 0.1}).startswith('x_clip_vit_b16_lift+_lr_0.1_')
    assert resolve(method='lp').modules == 'none' and Recipe().method == 'lift+'
