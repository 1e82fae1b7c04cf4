"Sentences for the text tower, averaged templates, and the starts of a head, against their obvious restatements"
import json, warnings, weakref

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import normalize

from lift_nb.models.blocks import Backbone
from lift_nb.models.backbones import create_backbone
from lift_nb.core.errors import LiftError
from lift_nb.models.heads import INITS, _class_mean_rows, create_head, _labelled_features, _lda_rows, _linear_probing_rows, _semantic_rows
from lift_nb.models.text_heads import zero_shot_head
from lift_nb.models.text import TEMPLATE, prompts, _prompt_sentences, text_features, text_tower, tokenize

few = settings(max_examples=15, deadline=None)
tiny = create_backbone('tiny_clip')
tower = text_tower(tiny)
digits = 'zero one two three four five six seven eight nine'.split()
lists = st.lists(st.sampled_from(['a photo of a {}.', '{}', 'the number {}.', 'a blurry photo of the {} in the rain.']), min_size=1, max_size=5)
names = st.lists(st.sampled_from([*digits, 'capital_letter_a', 'letter b']), min_size=1, max_size=6)

def fails(f, *parts):
    "`f` raises a `LiftError` of one line with all `parts`"
    with pytest.raises(LiftError) as e: f()
    assert all(p in str(e.value) for p in parts) and '\n' not in str(e.value), str(e.value)

def write(path, what):
    path.write_text(what if isinstance(what, str) else json.dumps(what), encoding='utf-8')
    return path

# Sentences

@given(names, lists)
def test_each_class_gets_each_template(classes, templates):
    want = [[t.replace('{}', c.replace('_', ' ')) for t in templates] for c in classes]
    assert _prompt_sentences(classes, templates) == _prompt_sentences(classes, tuple(templates)) == want
    assert _prompt_sentences(classes, templates[0]) == [[ts[0]] for ts in want]
    assert prompts(classes, templates) == sum(want, []) and prompts(classes, templates[0]) == [ts[0] for ts in want]

@pytest.mark.parametrize('kind', [str, lambda p: p], ids=['string', 'path'])
def test_files(tmp_path, kind):
    "A file says the same as the object in it; blank lines, blanks around a line, and a byte order mark do not count"
    templates, table = ['a {}.', 'größer: {}'], {'sea_lion': 'It {} swims_far.', 'emu': ['runs', 'has 3 toes'], 'yak': 'extra'}
    classes = ['sea_lion', 'emu']
    assert _prompt_sentences(classes, kind(write(tmp_path/'a.txt', '\ufeff\na {}.\n  \n größer: {} \n'))) == _prompt_sentences(classes, templates)
    assert _prompt_sentences(classes, kind(write(tmp_path/'a.JSON', templates))) == _prompt_sentences(classes, templates)
    assert _prompt_sentences(classes, kind(write(tmp_path/'b.json', table))) == _prompt_sentences(classes, table) == [['It {} swims_far.'], ['runs', 'has 3 toes']]

@pytest.mark.parametrize('template,parts', [
    ('a photo', ["'a photo' needs one {}", 'has none']), ('{} and {}', ["'{} and {}' needs one {}", 'has 2']),
    (['{}', 'none'], ["'none' needs one {}"]), (['{}', 3], ['The template 3 needs one {}']), (['{}', 'templates.txt'], ["'templates.txt' needs one {}"]),
    ([], ['is needed, not []']), (3, ['is needed, not 3']), (None, ['is needed, not None'])])
def test_bad_templates(template, parts):
    for f in (_prompt_sentences, prompts, lambda c, t: text_features(tower, c, t), lambda c, t: create_head('cosine', tiny, c, template=t)):
        fails(lambda: f(digits, template), *parts)

def test_bad_files(tmp_path):
    fails(lambda: _prompt_sentences(digits, 'nowhere.txt'), "There is no file of templates 'nowhere.txt'")
    fails(lambda: _prompt_sentences(digits, tmp_path), 'There is no file of templates', tmp_path.name)
    for p in (write(tmp_path/'a.yaml', '- {}'), str(write(tmp_path/'templates', '{}'))):
        fails(lambda: _prompt_sentences(digits, p), 'read from .txt and .json files, not from')
    fails(lambda: _prompt_sentences(digits, write(tmp_path/'a.txt', '{}\nno name\n')), "'no name' needs one {}")
    fails(lambda: _prompt_sentences(digits, write(tmp_path/'blank.txt', '\n \n')), 'is needed, not []')
    (tmp_path/'b.txt').write_bytes(b'\xff\xfe{}')
    fails(lambda: _prompt_sentences(digits, tmp_path/'b.txt'), 'Cannot read the templates in', 'b.txt')

@pytest.mark.parametrize('what,parts', [
    ('3', ['not int']), ('"a {}."', ['not str']), ('null', ['not NoneType']), ('[[1]]', ['[1] needs one {}']), ('[]', ['is needed, not []']),
    ('{"a": 3}', ["The descriptions lack 10 of the 10 classes: ['zero', 'one', 'two', 'three', 'four']"]), ('{"a"', ['Cannot read the templates']),
    ('__import__("os")', ['Cannot read the templates']), ('['*100_000, ['Cannot read the templates'])])
def test_other_json(tmp_path, what, parts): fails(lambda: _prompt_sentences(digits, write(tmp_path/'a.json', what)), *parts)

def test_bad_descriptions():
    table = dict.fromkeys(digits, 'a number')
    fails(lambda: _prompt_sentences([*digits, 'ten', 'eleven'], table), "lack 2 of the 12 classes: ['ten', 'eleven']")
    for bad in ('', ' ', [], 3, None, ['fine', ''], ['fine', 3], {'a': 1}, np.array(['a', 'b'])):
        fails(lambda: _prompt_sentences(digits, {**table, 'two': bad, 'six': bad}), "neither a sentence nor a list of sentences (2): ['two', 'six']")

@pytest.mark.parametrize('template', [TEMPLATE, [TEMPLATE, '{}'], dict(a='x')], ids=['one', 'two', 'descriptions'])
def test_bad_names(template):
    fails(lambda: _prompt_sentences(['a', ' ', 'b', ''], template), 'classes are empty (2): [1, 3]')
    fails(lambda: _prompt_sentences(['a', 7, None], template), 'classes are not strings (2): {1: 7, 2: None}')
    fails(lambda: _prompt_sentences(range(9), template), '(9): {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}')
    fails(lambda: _prompt_sentences([], template), 'no class names')

def test_too_long():
    "The classes are named, once each, not their sentences; the limit is the tower's"
    classes = ['fine', *(f'{"very "*80}{c}' for c in 'abcdefg'), 'good']
    fails(lambda: text_features(tower, ['fine', classes[1]], [TEMPLATE, 'the {}.']), 'The 77 positions', 'classes (1)', "['very very")
    table = {**dict.fromkeys(classes, 'short'), **{c: ['short', 'long '*99, 'longer '*99] for c in digits[:7]}}
    fails(lambda: text_features(tower, [*digits[:7], 'good'], table),
          "The 77 positions of the text tower are too few for these classes (7): ['zero', 'one', 'two', 'three', 'four']")
    with pytest.raises(LiftError) as e: text_features(tower, classes)
    assert 'classes (7)' in str(e.value) and len(str(e.value)) < 500
    small = text_tower(tiny)
    small.pos_embed = nn.Parameter(small.pos_embed[:9].detach())
    fails(lambda: text_features(small, ['emu', 'a b c d']), "The 9 positions of the text tower are too few for these classes (1): ['a b c d']")
    assert text_features(small, ['emu', 'a b']).shape == (2, 64)

# Averages

def plain(classes, template, bs=256):
    "One sentence a class, without any averaging"
    tokens = tokenize([template.replace('{}', c.replace('_', ' ')) for c in classes])
    with torch.no_grad(): return torch.cat([normalize(tower(t) @ tower.proj, dim=-1) for t in tokens.split(bs)])

@few
@given(names, st.integers(1, 7))
def test_one_template_as_ever(classes, bs):
    "Bit-equal, whether as a string, a list of one or a description each"
    want = plain(classes, TEMPLATE, bs)
    table = {c: TEMPLATE.replace('{}', c.replace('_', ' ')) for c in classes}
    for t in (TEMPLATE, [TEMPLATE], (TEMPLATE,), table): assert torch.equal(text_features(tower, classes, t, bs), want)

@few
@given(names, lists, st.integers(1, 30))
def test_average(classes, templates, bs):
    got = text_features(tower, classes, templates, bs)
    want = torch.stack([normalize(sum(plain([c], t)[0] for t in templates)/len(templates), dim=0) for c in classes])
    assert torch.allclose(got, want, atol=1e-5) and torch.allclose(got.norm(dim=1), torch.ones(len(classes)), atol=1e-6)

def test_descriptions_of_different_number():
    table = dict(a=['the number one', 'a photo of a one.', 'one'], b='two', c=['three', 'three', 'the digit three'], d='unused')
    got = text_features(tower, ['c', 'a', 'b'], table)
    want = torch.stack([normalize(sum(plain([t], '{}')[0] for t in ([table[c]] if c == 'b' else table[c])), dim=0) for c in 'cab'])
    assert torch.allclose(got, want, atol=1e-5)

def test_batches_go_over_all_sentences():
    "Four templates and ten classes in batches of 16: three runs of the tower"
    sizes, handle = [], tower.register_forward_pre_hook(lambda m, x: sizes.append(len(x[0])))
    text_features(tower, digits, ['{}', 'a {}', 'the {}', 'one {}'], bs=16)
    handle.remove()
    assert sizes == [16, 16, 8]

def test_templates_reach_the_heads(tmp_path):
    templates = ['{}', 'the number {}.']
    f, file = text_features(tower, digits, templates), write(tmp_path/'t.txt', '\n'.join(templates))
    for t in (templates, file, {d: [t.replace('{}', d) for t in templates] for d in digits}):
        assert torch.equal(zero_shot_head(tiny, digits, t).text, f)
        assert torch.equal(create_head('cosine', tiny, digits, template=t).weight, normalize(f @ tiny.image_proj.T, dim=-1))
    assert torch.equal(_semantic_rows(tiny, digits), normalize(plain(digits, TEMPLATE) @ tiny.image_proj.T, dim=-1))

# Starts that look at images

class Flat(nn.Module):
    "Images (B, 3, 1, 2) → features (B, 6)"
    num_classes, num_features = 0, 6
    def forward(self, x): return x.flatten(1)

flat = Backbone('flat', Flat(), 1, (0,)*3, (1,)*3)

def images(counts, seed, bs):
    "Batches of classes that overlap, in random order"
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    y = y[torch.randperm(len(y), generator=g)]
    x = torch.randn(len(y), 6, generator=g) + torch.eye(len(counts), 6)[y]*2
    return list(zip(x.view(-1, 3, 1, 2).split(bs), y.split(bs)))

some_images = st.builds(images, st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 99), st.integers(1, 40))
def letters(batches): return list('abcdef'[:int(max(y.max() for _, y in batches)) + 1])
def joined(batches): return torch.cat([x.flatten(1) for x, _ in batches]), torch.cat([y for _, y in batches])

@few
@given(some_images)
def test_class_mean(batches):
    x, y = joined(batches)
    want = torch.stack([normalize(x[y == c].mean(0), dim=0) for c in range(int(y.max()) + 1)])
    assert torch.allclose(_class_mean_rows(flat, letters(batches), iter(batches)), want, atol=1e-5)

def restated(x, y):
    "Unit rows of scikit-learn's regression, all features at once"
    w = LogisticRegression(C=1, class_weight='balanced', max_iter=100, solver='lbfgs').fit(x.numpy(), y.numpy()).coef_
    w = np.concatenate([-w, w]) if len(w) == 1 else w
    return torch.tensor(w/np.linalg.norm(w, axis=1, keepdims=True))

@few
@given(some_images)
def test_linear_probing(batches):
    got = _linear_probing_rows(flat, letters(batches), iter(batches))
    assert got.dtype == torch.float32 and torch.allclose(got, restated(*joined(batches)), atol=1e-5)

def test_linear_probing_is_a_minimum():
    "The gradient of ½|W|² + Σ N/(C n_y) ce along the rows' own optimum vanishes: the rows are those of the balanced L2 loss"
    batches = images([40, 10, 5], 0, 16)
    x, y = joined(batches)
    w, b = torch.zeros(3, 6, requires_grad=True), torch.zeros(3, requires_grad=True)
    weight = len(y)/(3*y.bincount())
    opt = torch.optim.LBFGS([w, b], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn='strong_wolfe')
    def loss():
        opt.zero_grad()
        l = nn.functional.cross_entropy(x @ w.T + b, y, weight, reduction='sum') + w.square().sum()/2
        l.backward()
        return l
    opt.step(loss)
    assert torch.allclose(_linear_probing_rows(flat, 'abc', batches), normalize(w.detach(), dim=1), atol=5e-3)

def test_two_classes():
    "Opposite rows; the greater logit is the class that scikit-learn predicts without its intercept"
    batches = images([20, 6], 1, 8)
    x, y = joined(batches)
    rows = _linear_probing_rows(flat, ['a', 'b'], batches)
    fit = LogisticRegression(class_weight='balanced').fit(x.numpy(), y.numpy())
    assert rows.shape == (2, 6) and torch.equal(rows[0], -rows[1])
    assert ((x @ rows.T).argmax(1).numpy() == (x.numpy() @ fit.coef_[0] > 0)).all()

def test_lda_is_scikit_learns_rule_on_centred_features():
    "With equally many images a class, the rows order the classes as scikit-learn does, up to its intercepts and what all images have in common"
    batches = images([20, 20, 20], 2, 16)
    x, y = (t.double().numpy() if t.is_floating_point() else t.numpy() for t in joined(batches))
    fit = LinearDiscriminantAnalysis(solver='lsqr', shrinkage='auto').fit(x, y)
    rows = _lda_rows(flat, 'abc', batches).double().numpy()
    centred = fit.coef_ - fit.coef_.mean(0)
    mean = fit.means_.mean(0)
    want = np.stack([w - (w @ mean)/(mean @ mean)*mean for w in centred])
    assert np.allclose(rows, want/np.linalg.norm(want, axis=1, keepdims=True), atol=1e-4)
    assert np.abs(rows @ mean).max() < 1e-4

def test_lda_whitens():
    "Where all classes share a direction of large variation that says nothing, class means fail and the discriminant does not"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat_interleave(30)
    x = torch.cat([torch.eye(3)[y] + .1*torch.randn(90, 3, generator=g), 20*torch.randn(90, 1, generator=g), torch.ones(90, 2)], 1)
    def hits(rows): return (normalize(x, dim=1) @ rows.T).argmax(1).eq(y).float().mean()
    batches = [(x.view(90, 6, 1, 1), y)]
    assert hits(_lda_rows(flat, 'abc', batches)) > .95 > .8 > hits(_class_mean_rows(flat, 'abc', batches))

def test_lda_with_one_image_a_class():
    "Rows of the class means, without what they have in common"
    batches = images([1, 1, 1], 0, 3)
    x, y = joined(batches)
    rows, mean = _lda_rows(flat, 'abc', batches), x.mean(0)
    want = x[y.argsort()] - mean
    want = normalize(want - (want @ mean)[:, None]*mean/(mean @ mean), dim=1)
    assert torch.allclose(rows, want, atol=1e-4)
    assert _lda_rows(flat, 'ab', images([4, 1], 0, 3)).isfinite().all()

def test_only_the_expected_warning_is_silent(monkeypatch):
    batches = [(x*torch.tensor([30., 1., 1.]).view(3, 1, 1), y) for x, y in images([90, 80, 70], 0, 8)]
    with pytest.warns(ConvergenceWarning): restated(*joined(batches))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        _linear_probing_rows(flat, 'abc', batches)
    fit = LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, 'fit', lambda *args: (warnings.warn('another', UserWarning), fit(*args))[1])
    with pytest.warns(UserWarning, match='another'): _linear_probing_rows(flat, 'abc', batches)

@pytest.mark.parametrize('init', ['class_mean', 'linear_probing', 'lda'])
def test_classes_without_images(init):
    batches = images([3, 0, 2, 0], 0, 2)
    fails(lambda: create_head('cosine', flat, list('abcd'), init, batches), "No training image was seen of the classes ['b', 'd']")
    fails(lambda: create_head('cosine', flat, list('abcd'), init, []), "No training image was seen of the classes ['a', 'b', 'c', 'd']")
    fails(lambda: create_head('cosine', flat, list('abcd'), init), 'needs labelled training images')
    assert create_head('cosine', flat, list('abc'), init, images([3, 2, 1], 0, 2)).weight.shape == (3, 6)

def test_one_class(): fails(lambda: _linear_probing_rows(flat, ['a'], images([3], 0, 2)), 'at least two classes')

def test_class_mean_streams():
    "Never more than the features of two batches at a time are alive"
    alive, most = weakref.WeakSet(), []
    class Watched(Flat):
        def forward(self, x):
            f = super().forward(x).clone()
            alive.add(f)
            most.append(len(alive))
            return f
    _class_mean_rows(Backbone('watched', Watched(), 1, (0,)*3, (1,)*3), 'ab', images([20, 20], 0, 2))
    assert len(most) == 20 and max(most) <= 2

def test_features_carry_no_gradient():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 6).bfloat16())
    found = list(_labelled_features(model, [(x.bfloat16(), y.int()) for x, y in images([4, 4], 0, 3)]))
    assert [f.shape for f, _ in found] == [(3, 6), (3, 6), (2, 6)] and torch.is_grad_enabled()
    assert all(f.dtype == torch.float32 and y.dtype == torch.int64 and not f.requires_grad for f, y in found)

# Ready rows and ready heads

@pytest.mark.parametrize('rows', [torch.randn(10, 128), np.random.randn(10, 128), np.arange(1280).reshape(10, 128)[::-1], torch.eye(10, 128).half()],
                         ids=['tensor', 'float64', 'reversed integers', 'half'])
def test_matrix(rows):
    h = create_head('linear', tiny, digits, rows)
    assert h.weight.dtype == torch.float32 and torch.equal(h.weight, torch.as_tensor(np.array(rows)).float())
    with torch.no_grad(): h.weight.zero_()
    assert rows.any()
    assert torch.equal(create_head('linear', tiny, digits, lambda *args: rows).weight, torch.as_tensor(np.array(rows)).float())

@pytest.mark.parametrize('init,parts', [
    (torch.zeros(9, 128), ['have shape (9, 128), it needs (10, 128)']), (np.zeros((10, 9)), ['have shape (10, 9), it needs (10, 128)']),
    (np.zeros(10), ['have shape (10,), it needs (10, 128)']), (np.full((10, 128), 'a'), ['A head starts from', 'numpy array of numbers (10, 128), not <U1']),
    ([[1.]*128]*10, ['A head starts from', 'not list']), (3, ['A head starts from', 'not int']), (None, ['A head starts from', 'not NoneType']),
    ('rows.npy', ["Unknown initialisation 'rows.npy'"]), ('linear_probe', ["choose from ['linear_probing']"])])
def test_bad_inits(init, parts): fails(lambda: create_head('cosine', tiny, digits, init), *parts)

def test_the_table_of_starts(): assert list(INITS) == ['semantic', 'class_mean', 'linear_probing', 'lda', 'none']

class Buffered(nn.Module):
    "A head without parameters"
    def __init__(self, device):
        super().__init__()
        self.register_buffer('rows', torch.zeros(10, 128, device=device))
    def forward(self, x): return x @ self.rows.T

@pytest.mark.parametrize('head', [nn.Linear(128, 10, device='meta'), Buffered('meta'), Buffered('cpu'), nn.Linear(128, 10)])
def test_ready_head_on_its_device(head): assert create_head(head, tiny, digits) is head

def test_ready_heads_that_do_not_fit():
    "Also on another device; a module that has no tensors is tried on the CPU"
    class First(nn.Module):
        def forward(self, x): return x[:, :10].cpu()
    head = First()
    assert create_head(head, tiny, digits) is head
    fails(lambda: create_head(nn.Linear(128, 7, device='meta'), tiny, digits), 'made for 7 classes, the data has 10')
    with pytest.raises(LiftError, match='does not take the 128 features'): create_head(nn.Linear(9, 10, device='meta'), tiny, digits)
