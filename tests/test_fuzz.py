"Files and words from anybody: nothing but `LiftError` comes out, nothing is executed, the memory stays small. FUZZ=100 takes a hundred times as many examples"
import copy, io, json, os, pickle, resource, struct, sys
from dataclasses import fields

import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st

from lift_nb.models.weights import _read_weights
from lift_nb.core.errors import LiftError
from lift_nb.cli import main
from lift_nb.data.dataset import digits_lt
from lift_nb.experiments.results import _load_previous
from lift_nb.core.files import _checksum, _read_tensors, _write_tensors
from lift_nb.original.checkpoints import _read_original
from lift_nb.learner import lift_plus_learner
from lift_nb.original.options import _ORIGINAL
from lift_nb.models.saved import save_lift
from lift_nb.predictor import load_lift, _read_lift
from lift_nb.experiments.sweeps import TABLES
from lift_nb.experiments.recipe import METHODS, RunSettings, _option_names

MORE = float(os.environ.get('FUZZ', 1))
def examples(n):
    return settings(max_examples=max(1, int(n*MORE)), deadline=None, suppress_health_check=[*HealthCheck], database=None)

def refused(f, *args, **kwargs):
    "What `f` returns; None for a `LiftError`, which must be readable"
    try: return f(*args, **kwargs)
    except LiftError as e: assert str(e).strip() and len(str(e)) < 3000, f'{len(str(e))} characters: {e!s:.300}'

@pytest.fixture(autouse=True)
def modest(request):
    "No test of this file may need more than 400 MB"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/(1e6 if sys.platform == 'darwin' else 1e3)
    assert grown < 400 + 20*MORE, f'{grown:.0f} MB'

small = digits_lt(n_max=40, n_test=1)
KINDS = dict(plain={}, text=dict(method='coop', text_modules='lora'), zs=dict(method='zs'), masks=dict(modules={'aft': dict(r=.001)}, method='clip_adapter'))

@pytest.fixture(scope='module')
def learners(): return {k: lift_plus_learner(small, 'tiny_clip', batch_size=8, **o) for k, o in KINDS.items()}

@pytest.fixture(scope='module')
def saved(learners, tmp_path_factory):
    "kind → bytes, tensors and description of a good file"
    path, found = tmp_path_factory.mktemp('saved')/'x.safetensors', {}
    for k, learn in learners.items():
        save_lift(path, learn)
        found[k] = (path.read_bytes(), *_read_tensors(path))
    return found

@pytest.fixture
def file(tmp_path): return tmp_path/'model.safetensors'

# what anybody may have written into a JSON
names = st.sampled_from(['', 'None', 'tiny_clip', 'adaptformer', 'lora+ssf', 'aft', 'zero_shot', 'coop', 'text', 'fp16', '/etc/passwd', '/dev/zero', '../x', 'hf-hub:a/b',
    'ViT-B-32//etc/passwd', '{}', '{0.__class__}', 'X {} X', '{}'*40, 'x.json', '\0', '\ud800', 'ü'*300, '__import__("os").system("true")', 'NaN'])
numbers = st.sampled_from([0, -1, 1, 2, 3, 255, 4096, 10**6, 10**9, 2**31, 2**63, 10**30, -10**30, .5, 1e-300, 1e300, float('inf'), float('-inf'), float('nan'), True, False, None])
values = st.recursive(names | numbers | st.text(max_size=8) | st.integers() | st.floats(), lambda v: st.lists(v, max_size=4) | st.dictionaries(names, v, max_size=3), max_leaves=6)

@examples(60)
@given(content=st.binary(max_size=200) | st.builds(lambda n, b: struct.pack('<Q', n) + b, st.integers(0, 2**64-1), st.binary(max_size=60)))
def test_arbitrary_bytes(content, tmp_path):
    for name, reader in (('model.safetensors', load_lift), ('x.pth.tar', _read_original), ('x.safetensors', _read_original), ('x.pt', _read_weights), ('y.safetensors', _read_weights)):
        (tmp_path/name).write_bytes(content)
        refused(reader, tmp_path/name)

def is_same(one, other): return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)

@examples(100)
@given(kind=st.sampled_from([*KINDS]), data=st.data())
def test_damaged_files(kind, data, saved, file):
    "Bits flipped, bytes lost, put in or exchanged: refused, or nothing has changed"
    content, tensors, about = saved[kind]
    damaged = bytearray(content)
    header = 8 + struct.unpack('<Q', content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header) | st.integers(0, len(damaged)-1) | st.integers(0, 7))
        what = data.draw(st.sampled_from(['flip', 'cut', 'insert', 'byte', 'swap']))
        if what == 'flip': damaged[min(at, len(damaged)-1)] ^= 1 << data.draw(st.integers(0, 7))
        elif what == 'cut': del damaged[at:at+data.draw(st.integers(1, 2000))]
        elif what == 'insert': damaged[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif what == 'byte': damaged[min(at, len(damaged)-1)] = data.draw(st.integers(0, 255))
        else: damaged[:] = damaged[at:] + damaged[:at]
        if not damaged: break
    file.write_bytes(damaged)
    found = refused(_read_lift, file)
    assert found is None or is_same(found[0], tensors) and found[1] == about

@examples(60)
@given(header=values | st.dictionaries(names | st.just('__metadata__'), st.fixed_dictionaries(dict(
    dtype=st.sampled_from('F32 F64 F16 BF16 I64 U8 BOOL C64 F8_E4M3 F8_E5M2 F8_E8M0 F4 U16 U32 U64 F6_E2M3 X'.split()),
    shape=st.lists(st.integers(0, 3) | st.sampled_from([2**31, 2**62, 2**64]), max_size=4), data_offsets=st.lists(st.integers(0, 64) | st.just(2**63), min_size=2, max_size=2))) | values, max_size=3),
    n=st.integers(-8, 8), tail=st.binary(max_size=64))
def test_headers_of_others(header, n, tail, file):
    "Any JSON as a header, its length right or wrong"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack('<Q', max(0, len(text)+n)) + text + tail)
    refused(load_lift, file)
    refused(_read_original, file)

def test_deep_and_large_headers(file):
    "Nesting, repetition, digits without end, and a length far behind the end"
    for text in (b'['*10**6, b'{"a":'*10**5, b'{"__metadata__":{"classes":"' + b'['*10**5 + b'"}}', b'{"__metadata__":{"layout":"' + b'9'*10**6 + b'"}}', b'{"a":{"dtype":"F32","shape":[' + b'9'*4000 + b'],"data_offsets":[0,4]}}'):
        for n in (len(text), 2**40, 2**64-1):
            file.write_bytes(struct.pack('<Q', n) + text)
            assert refused(load_lift, file) is None
    for deep in ('['*200_000, '{"a":'*200_000, '9'*100_000):
        write_raw(file, {'layout': deep})
        assert refused(load_lift, file) is None

def write_raw(path, texts):
    "A sealed file whose description is text as it stands"
    from safetensors.torch import save_file
    tensors = dict(a=torch.zeros(1))
    save_file(tensors, path, metadata={'format': 'pt', **texts, 'sha256': _checksum(tensors, texts)})

def places(about):
    "Every place of a description: (field,) and (field, key)"
    return [(k,) for k in about] + [(k, n) for k, v in about.items() if isinstance(v, dict) for n in [*v, 'odd']] + [('parts', n) for n in
        ('layers', 'dim', 'ctx', 'ctx_len', 'text_layers', 'text_dim', 'adapter_dim', 'scale', 'template')] + [('backbone', n) for n in ('checkpoint', 'pretrained', 'resolution')]

def is_tame(about):
    "Would this name of a network be looked for in the net?"
    source = about.get('backbone') if isinstance(about.get('backbone'), dict) else {}
    return source.get('name') in ('tiny_clip', None) or not str(source['name']).startswith('ViT')

@examples(100)
@given(kind=st.sampled_from([*KINDS]), data=st.data())
def test_sealed_descriptions(kind, data, saved, file):
    "Any value in any field of a file whose checksum is right: refused, or a model that predicts"
    _, tensors, about = saved[kind]
    about = copy.deepcopy(about)
    for place in data.draw(st.lists(st.sampled_from(places(about)), min_size=1, max_size=2, unique=True)):
        field, value = (about, data.draw(values)) if len(place) == 1 else (about[place[0]], data.draw(values))
        if isinstance(field, dict): field[place[-1]] = value
    try: _write_tensors(file, tensors, **about)
    except (ValueError, OSError, TypeError, UnicodeError): return # not even JSON
    if (p := refused(load_lift, file)) is not None: assert p.logits(small.test_images[0]).shape == (1, len(p.classes))

@examples(80)
@given(kind=st.sampled_from([*KINDS]), data=st.data())
def test_sealed_tensors(kind, data, saved, file):
    "Tensors left out, exchanged, of other shapes, types and contents"
    _, tensors, about = saved[kind]
    tensors = dict(tensors)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2, unique=True)):
        t, what = tensors[name], data.draw(st.sampled_from(['out', 'rename', 'shape', 'type', 'filled', 'empty']))
        if what == 'out': del tensors[name]
        elif what == 'rename': tensors[data.draw(st.text(max_size=5)) or 'x'] = tensors.pop(name)
        elif what == 'shape': tensors[name] = torch.zeros(data.draw(st.lists(st.integers(0, 5), max_size=4)))
        elif what == 'type': tensors[name] = t.to(data.draw(st.sampled_from([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn])))
        elif what == 'filled': tensors[name] = torch.full_like(t, data.draw(st.sampled_from([-1, 10**9, -2**40, 0, 1])))
        else: tensors[name] = t[:0] if t.ndim else t
    _write_tensors(file, tensors, **about)
    if (p := refused(load_lift, file)) is not None: assert p.logits(small.test_images[0]).shape == (1, 10)

@examples(40)
@given(kind=st.sampled_from([*KINDS]), classes=values, drop=st.integers(0, 3))
def test_put_back(kind, classes, drop, saved, learners, tmp_path):
    "Files of earlier runs, in `test_only`"
    _, tensors, about = saved[kind]
    try: _write_tensors(tmp_path/'model.safetensors', dict(list(tensors.items())[drop:]), **{**about, **(dict(classes=classes) if drop % 2 else {})})
    except (ValueError, UnicodeError): return
    refused(_load_previous, learners[kind], tmp_path)

class Bomb:
    "What a pickle does when it is opened by somebody careless"
    def __init__(self, words): self.words = words
    def __reduce__(self): return os.system, (self.words,)

@pytest.mark.parametrize('zipped', [True, False, None])
@pytest.mark.parametrize('at', ['alone', 'tuner', 'value', 'key'])
def test_pickles_are_not_opened(zipped, at, saved, tmp_path):
    "Whatever the file is called and whoever reads it"
    sign = tmp_path/'executed'
    bomb = Bomb(f'touch {sign}')
    state = {'alone': bomb, 'tuner': {'tuner': {'a': bomb}}, 'value': {'a': torch.ones(1), 'b': bomb}, 'key': {'tuner': {'classifier.weight': torch.ones(10, 128), 'x': [bomb]}}}[at]
    buffer = io.BytesIO()
    if zipped is None: pickle.dump(state, buffer)
    else: torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    for name, reader in (('x.pth.tar', _read_original), ('x.safetensors', _read_original), ('model.safetensors', load_lift), ('x.pt', _read_weights), ('x.bin', _read_weights), ('x.ckpt', _read_weights)):
        (tmp_path/name).write_bytes(buffer.getvalue())
        with pytest.raises(LiftError): reader(tmp_path/name)
    save = tmp_path/'said'/'model.safetensors'
    save.parent.mkdir()
    _, tensors, about = saved['plain']
    _write_tensors(save, tensors, **{**about, 'backbone': dict(name='tiny_clip', checkpoint=str(tmp_path/'x.pt'))})
    with pytest.raises(LiftError): load_lift(save)
    assert not sign.exists()
    pickle.loads(pickle.dumps(bomb))
    assert sign.exists(), 'this test shows nothing'

@examples(60)
@given(data=st.data())
def test_damaged_pickles(data, learners, tmp_path):
    "Checkpoints of the original, damaged: refused, or tensors"
    buffer = io.BytesIO()
    torch.save({'tuner': {'classifier.weight': torch.ones(10, 8), 'image_encoder.blocks.0.adaptformer.scale': torch.ones(())}}, buffer, _use_new_zipfile_serialization=data.draw(st.booleans()))
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))): content[data.draw(st.integers(0, len(content)-1))] = data.draw(st.integers(0, 255))
    (tmp_path/'checkpoint.pth.tar').write_bytes(content[:data.draw(st.integers(1, len(content)) | st.just(len(content)))])
    found = refused(_read_original, tmp_path/'checkpoint.pth.tar')
    assert found is None or all(isinstance(t, torch.Tensor) for t in found.values())

plain_objects = st.recursive(names | numbers | st.just(torch.ones(2)), lambda v: st.lists(v, max_size=3) | st.dictionaries(names | st.integers(), v, max_size=3) | st.tuples(v, v), max_leaves=6)

@examples(60)
@given(state=plain_objects | st.fixed_dictionaries(dict(tuner=plain_objects)))
def test_original_checkpoints_of_anything(state, tmp_path):
    torch.save(state, tmp_path/'checkpoint.pth.tar')
    found = refused(_read_original, tmp_path/'checkpoint.pth.tar')
    assert found is None or all(isinstance(t, torch.Tensor) for t in found.values())

# words of a command line
odd = st.text(st.characters(), max_size=12) | st.text('[](){},:\'"\\\n\t\0-+*/.0129eExX_ \u2028\ud800\udfffüß中🙂', max_size=20)
hostile = st.sampled_from(['9'*5000, '-'+'9'*400, '9**9**9', '1e999', '-inf', 'nan', '['*500, '('*500, '{'*500, '[1,'*200, "__import__('os').system('touch executed')", 'range(10**9)',
    'range(999999)', 'list(range(1000000))', 'range(0,1,0)', "{'adaptformer': {'r': 10**9}}", "{'aft': {'r': nan}}", '{1: 2}', "b'x'", '1j', '...', '0x', '1_000', 'lambda: 0', '[]', '()', '{}',
    "''", '" "', '\0', '/'*300, '../..', '~', '$HOME', '`true`', '%s%n', '{0.__class__}', 'none', 'None', 'True', 'a'*10_000, 'ü'*400, "{'lora': {'layers': [" + '1,'*500 + ']}}'])
options = st.sampled_from(sorted({*_option_names(), *(f.name for f in fields(RunSettings)), *_ORIGINAL}))
usual = st.sampled_from(['none', 'True', 'False', '0', '1', '2', '3', '0.5', '-1', '1e-3', '[0, 1]', '[-1]', 'range(2)', 'deep', 'shallow', 'adaptformer', 'lora+ssf', "{'lora': {'r': 2}}", "{'aft': {'loc': 'mlp'}}",
    'cosine', 'zero_shot', 'coop', 'coop+clip_adapter', 'text', 'LA', 'CE', 'convex', 'amp', 'fp16', 'bf16', 'auto', 'semantic', 'CosineClassifier', 'digits_lt', 'tiny_clip', 'clip_vit_b16', 'cpu', 'skip', 'end',
    'photo', 'X X {}', 'a photo of a {}.', '(.5, .5, .5)', '[1, 1, 1]', 'mlp', 'lift+', 'zs', *METHODS])
option_values = usual | hostile | odd | numbers.map(repr) | names | values.map(repr)
words = st.lists(st.tuples(options, usual), max_size=5) | st.lists(st.tuples(options, option_values), max_size=4) | st.lists(st.tuples(options | odd, option_values), max_size=3)
words = words.map(lambda pairs: [w for p in pairs for w in p])
first = {'table': [*TABLES, 'sweep'], 'reproduce': [*TABLES], 'data': ['digits_lt', '.'], 'compare': ['.'], 'predict': ['.'], 'sweep': ['lr', 'seed']}
own = st.sampled_from(['seeds', 'ray', 'gpus', 'against', 'top', 'out', 'tte', 'checkpoint', 'device', '--out', 'seed', 'lr', '0.1,0.2', '0:3', '3:0', '0:1000000', '.', '1'])

@examples(300)
@given(words=words, dashes=st.sampled_from(['', '--', '-']), method=st.sampled_from([None, *METHODS]))
def test_options(words, dashes, method, tmp_path, monkeypatch):
    "Any words: a recipe or one sentence; no file appears"
    monkeypatch.chdir(tmp_path)
    words = [*(['-m', method] if method else []), *(dashes + w if i % 2 == 0 else w for i, w in enumerate(words))]
    assert main([*words, '--dry-run']) in (0, 2)
    assert not list(tmp_path.iterdir())

@examples(40)
@given(words=st.lists(odd | hostile | names, max_size=6))
def test_bare_words(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['--dry-run', *words]) in (0, 2)
    assert not list(tmp_path.iterdir())

@examples(120)
@given(command=st.sampled_from([*first]), known=st.booleans(), rest=st.lists(own | usual | odd | hostile | names | options, max_size=5), data=st.data())
def test_commands(command, known, rest, data, tmp_path, monkeypatch):
    "Words behind a command; where they could start something, only its plan"
    monkeypatch.chdir(tmp_path)
    dry = ['--dry-run'] if command in ('reproduce', 'sweep') else []
    start = [data.draw(st.sampled_from(first[command]))] if known else []
    assert main([command, *start, *rest, *dry]) in (0, 2)
    assert not (tmp_path/'executed').exists()
