"Whatever a file or a command line holds: one clear sentence comes out, or what was meant; nothing is executed"
import io, json, os, pickle, struct, zipfile
from pathlib import Path

import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st

from lift_nb.basics import LiftError
from lift_nb.cli import parse_args
from lift_nb.files import read_tensors, write_tensors
from lift_nb.interop import read_original
from lift_nb.learner import lift_plus_learner
from lift_nb.options import ORIGINAL, RUN_OPTIONS
from lift_nb.predictor import HEADER, load_lift, read_lift, save_lift
from lift_nb.recipes import METHODS, option_names

many = settings(max_examples=int(os.environ.get('FUZZ_EXAMPLES', 60)), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

def clear(f, *args):
    "What `f` returns, or None after a `LiftError` of one line; anything else is a failure"
    try: return f(*args)
    except LiftError as e: assert str(e) and '\n' not in str(e).strip() and 'Traceback' not in str(e), e

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "A file of `save_lift`"
    file = tmp_path_factory.mktemp('fuzz')/'good.safetensors'
    save_lift(file, lift_plus_learner('digits_lt', 'tiny_clip', device='cpu'))
    return file

# Files

@given(data=st.binary(max_size=400))
@many
def test_any_bytes(tmp_path, data):
    (tmp_path/'x.safetensors').write_bytes(data)
    (tmp_path/'x.pth.tar').write_bytes(data)
    assert clear(load_lift, tmp_path/'x.safetensors') is None and clear(read_original, tmp_path/'x.pth.tar') is None

@given(data=st.data())
@many
def test_damaged(good, tmp_path, data):
    "A file cut short or changed in any bit is refused"
    content = bytearray(good.read_bytes())
    at = data.draw(st.integers(0, len(content)-1) | st.integers(0, 4000))
    if data.draw(st.booleans()): content = content[:at]
    else: content[at] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path/'x.safetensors').write_bytes(content)
    assert clear(load_lift, tmp_path/'x.safetensors') is None

@given(length=st.integers(0, 2**64-1), header=st.text(max_size=200) | st.integers(1, 3000).map(lambda n: '['*n) | st.just('{"a":{"dtype":"F32","shape":[4000000000,4000000000],"data_offsets":[0,64]}}'))
@many
def test_hostile_headers(tmp_path, length, header):
    "Lengths that are not there, deep nesting, tensors larger than the file: refused without the memory they ask for"
    for n in (length, len(header.encode())):
        (tmp_path/'x.safetensors').write_bytes(struct.pack('<Q', n) + header.encode() + bytes(64))
        assert clear(load_lift, tmp_path/'x.safetensors') is None

values = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12) | st.sampled_from(['name', 'modules', 'head', 'dim', 'layers', 'expand', 'mean']), inner, max_size=3), max_leaves=8)

@given(data=st.data())
@many
def test_wrong_values_in_the_header(good, tmp_path, data):
    "A sealed file that says anything at all in any place of its description"
    tensors, about = read_tensors(good)
    key = data.draw(st.sampled_from(list(HEADER)))
    if isinstance(about[key], dict) and data.draw(st.booleans()): about[key] = {**about[key], data.draw(st.sampled_from(list(about[key]))): data.draw(values)}
    else: about[key] = data.draw(values)
    write_tensors(tmp_path/'x.safetensors', tensors, **about)
    clear(load_lift, tmp_path/'x.safetensors')

class Evil:
    "Unpickled, it leaves a file"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)

def test_nothing_is_executed(tmp_path):
    evil, files = Evil(tmp_path/'executed'), {n: tmp_path/n for n in ('x.safetensors', 'x.pth.tar', 'zip.pth.tar')}
    for f in files.values(): f.write_bytes(pickle.dumps(evil))
    torch.save({'state_dict': evil}, files['zip.pth.tar'])
    assert zipfile.is_zipfile(files['zip.pth.tar'])
    for f in files.values():
        for read in load_lift, read_lift, read_tensors, read_original: assert clear(read, f) is None
    assert not (tmp_path/'executed').exists()

# Command lines

names = st.sampled_from([*option_names(), *RUN_OPTIONS, *ORIGINAL]) | st.text(max_size=12)
texts = st.text(max_size=20) | st.sampled_from(['None', 'nan', '-inf', '1e999', '0', '-1', '[1,2]', 'range(3)', 'range(10**12)', '{}', '()', "__import__('os')", '{"lora": {"r": 8}}',
    'adaptformer+lora', 'True', '9'*50, '\0', '../..', '{1: 2}', "[[[[[1]]]]]", 'ㄱ', 'digits_lt', 'cosine', 'LA', '(1).__class__', 'lambda: 1', 'lift+', '1_000', '0x10', '1j'])

@given(words=st.lists(st.tuples(names, texts), max_size=4), method=st.sampled_from(list(METHODS)) | texts)
@many
def test_command_lines(words, method):
    "Names and values of any kind: a recipe or a sentence"
    clear(parse_args, ['-d', 'digits_lt', '-b', 'tiny_clip', '-m', method, *(w for pair in words for w in pair)])

@given(words=st.lists(st.text(max_size=15) | st.sampled_from(['-d', '-b', '-m', '--help', '--dry-run', '-', '--', '-x']), max_size=6))
@many
def test_any_words(words): clear(parse_args, words)
