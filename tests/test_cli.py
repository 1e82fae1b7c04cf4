"The command line: every shape of line that the original's experiments have, both vocabularies, and garbage"
import os, subprocess, sys, traceback
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st

from lift_nb.models.adapters import auto_dim
from lift_nb.core.catalog import BACKBONES, METHODS
from lift_nb.core.errors import LiftError
from lift_nb.data.benchmarks import DATASETS
from lift_nb.commands import _split_settings, _translated
from lift_nb.cli import main, _arguments, _group
from lift_nb.data.dataset import digits_lt
from lift_nb.experiments.build import _build
from lift_nb.experiments.results import _load_previous
from lift_nb.experiments.run import run
from lift_nb.original.checkpoints import save_original
from lift_nb.core.locks import _LOCK, _locked
from lift_nb.original.options import _MODULES, _ORIGINAL, _parse_value
from lift_nb.experiments.sweeps import _recipe_hash
from lift_nb.experiments.recipe import _FIELDS, Recipe, RunSettings, _option_names, resolve, _resolve_with_sources, run_name

DATA = [d for d in DATASETS if d != 'digits_lt']
MAIN = ['cifar100_ir10', 'cifar100_ir50', 'cifar100_ir100', 'imagenet_lt', 'places_lt', 'inat2018']
BLOCKS = 12

GROUP = _group()
def read(words): # as the command line reads them
    "Settings and notes of a line of the original program"
    if not words: return {}, []
    pairs = (w.removeprefix('--').partition('=') for w in _arguments(words, GROUP)[1:] if w != '--')
    return _translated({k: v for k, _, v in pairs}, lenient=True)
def parse(words): return resolve(**_split_settings(read(words)[0])[0])
def recipe(line): return parse(line.split())
def has(r, **want): return {k: getattr(r, k) for k in want} == want

def line(data='imagenet_lt', backbone='clip_vit_b16', method='lift+', more=''): return f'-d {data} -b {backbone} -m {method} {more}'

# what each family of experiments varies: words after `-d -b -m`, and the settings that they must give
ABLATION = {
    '': dict(modules='adaptformer', head='cosine', init='semantic', loss='la', mda='convex', epochs=5, lr=.02, batch_size=128, tte=False),
    'classifier_init none': dict(init='none'), 'classifier_init None v.adaptformer False': dict(init='none', modules='none'),
    'mda False': dict(mda=False), 'mda False mda_func convex': dict(mda=False), 'loss_type CE': dict(loss='ce'), 'tte True': dict(tte=True, tte_expand=24),
    'classifier LinearClassifier': dict(head='linear'), 'v.adaptformer False': dict(modules='none'), 'num_epochs 10 mda False tte True': dict(epochs=10, mda=False, tte=True),
}
TUNING = {
    **{f'v.{m} True': dict(modules='vpt' if m == 'pt' else m) for m in _MODULES},
    **{f'v.{m} True v.{m}_dim {r}': dict(modules=m, dim=r) for m in ('lora', 'adapter', 'adaptformer') for r in (1, 2, 4, 8, 16, 32, 64, 128, 256)},
    **{f'v.pt True v.pt_len {n}': dict(modules='vpt', dim=n) for n in (1, 2, 8, 16)},
    **{f'v.aft True v.aft_ratio {p}': dict(modules='aft', dim=p) for p in (.0001, .001, .01, .1, .5)},
    **{f'v.aft True v.aft_loc {p}': dict(modules={'aft': {'loc': p}}) for p in ('attn', 'mlp')},
    'v.aft True v.aft_loc all v.aft_seed 0': dict(modules='aft'), 'v.aft True v.aft_seed 7': dict(modules={'aft': {'seed': 7}}),
    **{f'v.{m} True v.{m}_layers {k}': dict(modules='vpt' if m == 'pt' else m, layers=k) for m in _MODULES for k in range(BLOCKS+1)},
    'v.fft True v.fft_layers [0,1]': dict(modules='fft', layers=[0, 1]), 'v.fft True v.fft_layers range(3)': dict(layers=[0, 1, 2]), 'v.fft True v.fft_layers none': dict(layers=None),
    'v.lora True v.ssf True v.adaptformer True': dict(modules='lora+ssf+adaptformer'),
    'v.lora True v.lora_dim 4 v.adaptformer True': dict(modules={'lora': {'r': 4}, 'adaptformer': {}}),
}
CLASSIFIERS = {f'classifier {c}Classifier': dict(head=h) for c, h in dict(Linear='linear', Cosine='cosine', L2Norm='l2norm', LayerNorm='layernorm').items()}
CLASSIFIERS |= {f'classifier CosineClassifier classifier_scale {s}': dict(head='cosine', scale=float(s)) for s in (1, 10, 16, 20, 25, 30, 50)}
INITS = {f'classifier_init {i}': dict(init=i) for i in ('none', 'class_mean', 'linear_probing', 'semantic')}
LOSSES = {f'loss_type {l}': dict(loss=l.lower()) for l in ('CE', 'Focal', 'LDAM', 'CB', 'GRW', 'BS', 'LA', 'LADE')}
SCHEDULES = {'mda False': dict(mda=False), **{f'mda True mda_func {m}': dict(mda=m) for m in ('min', 'max', 'linear', 'convex', 'concave')}}
EPOCHS = {f'num_epochs {e}': dict(epochs=e) for e in (1, 2, 3, 5, 10, 15, 20, 30, 50)}
SIZES = {f'tte True {n} {e}': dict(tte=True, tte_expand=e) for n in ('expand', 'tte_expand') for e in (0, 8, 16, 24, 32, 40, 64)} | {
    f'expand {e}': dict(tte=False, expand=e) for e in (0, 16, 32)}
HARDWARE = {
    'gpu 1 num_workers 4 prec_train fp32 prec_test fp32': dict(device='cuda:1', num_workers=4, precision='fp32', test_precision='fp32'),
    'prec_train amp': dict(precision='bf16'), 'prec_train fp16 prec_test fp16': dict(precision='fp16', test_precision='fp16'), 'gpu None': dict(device=None),
    'batch_size 128 accum_step 4': dict(batch_size=128, accum_step=4), 'seed 3 deterministic False': dict(seed=3, deterministic=False),
    'lr 0.01 weight_decay 1e-4 momentum 0.8': dict(lr=.01, weight_decay=1e-4, momentum=.8), 'lr 5e-3': dict(lr=.005), 'root /data print_freq 50': dict(root='/data'),
    'resolution 112 mean [0.5,0.5,0.5] std [0.5,0.5,0.5]': dict(resolution=112, mean=(.5, .5, .5), std=(.5, .5, .5), expand=16),
    'test_only True model_dir output/somewhere tte True': dict(tte=True), 'output_dir output/here': {}, 'resolution None': dict(resolution=224),
}
TEXT = {
    **{f'{a} True': dict(head=a) for a in ('coop', 'clip_adapter', 'proj_tuning')},
    **{f'l.{m} True': dict(head='text', text_modules='vpt' if m == 'pt' else m) for m in _MODULES},
    **{f'l.{m} True l.{m}_layers {k}': dict(text_layers=k) for m in _MODULES for k in (1, 3, 12)},
    **{f'l.{m} True l.{m}_dim 8': dict(text_dim=8) for m in ('lora', 'adapter', 'adaptformer')}, 'l.pt True l.pt_layers deep l.pt_len 4': dict(text_modules='vpt', text_layers=None, text_dim=4),
    **{f'coop True coop_ctx_len {n} coop_cls_pos {p}': dict(head='coop', ctx=p, ctx_len=n) for n, p in product((1, 4, 16), ('end', 'middle', 'front'))},
    'coop True coop_init photo': dict(head='coop', ctx='photo'), 'coop True coop_init random coop_cls_pos front': dict(ctx='front'), 'clip_adapter True clip_adapter_dim 16': dict(adapter_dim=16),
    'zero_shot True': dict(head='zero_shot', epochs=0, modules='none'), 'l.lora True coop True': dict(head='coop', text_modules='lora'),
}

def lines():
    for d, b in product(MAIN, BACKBONES):
        for m in ('lift+', 'lift', 'lp', 'fft', 'aft'): yield line(d, b, m, 'tte True'), dict(data=d, backbone=b, tte=True, **{k: BACKBONES[b].defaults[k] for k in ('resolution', 'init')})
    for d, m in product(DATA, METHODS): yield line(d, method=m), dict(data=d, method=m)
    for d, m in product(('cifar100_ir100', 'imagenet_lt', 'places_lt'), ('coop', 'zs')): yield line(d, method=m), dict(head=dict(coop='coop', zs='zero_shot')[m])
    for d, (more, want) in product(('imagenet_lt', 'places_lt'), (ABLATION | CLASSIFIERS | INITS | LOSSES | SCHEDULES | EPOCHS | SIZES | HARDWARE).items()): yield line(d, more=more), want
    for more, want in TUNING.items(): yield line(method='lp', more=more), want
    for more, want in TEXT.items(): yield line(method='lp', more=more), want

ALL = list(lines())

def test_every_family_is_understood():
    "More than a thousand lines, each with the settings that it names"
    wrong = [(l, want) for l, want in ALL if not has(recipe(l), **want)]
    assert len(ALL) > 1000 and not wrong, wrong[:5]

def test_notes_only_where_something_is_in_vain():
    "Nothing that the families say is without effect, but for a schedule of what is off"
    told = {l: notes for l, _ in ALL if (notes := read(l.split())[1])}
    assert all('mda False mda_func' in l for l in told), told

def test_defaults_are_those_of_the_original():
    "METHOD.md, sections 4 and 7, for an ordinary data set"
    same = dict(batch_size=128, accum_step=1, lr=.02, weight_decay=5e-4, momentum=.9, loss='la', mda='convex', tte=False, scale=25., seed=0, deterministic=True, head='cosine', epochs=5)
    for m, modules in {'lift+': 'adaptformer', 'lp': 'none', 'fft': 'fft', 'aft': 'aft'}.items(): assert has(recipe(line(method=m)), modules=modules, **same)
    assert has(recipe(line(method='lift')), **dict(same, modules='adaptformer', mda=False, epochs=10, lr=.01))
    assert has(recipe(line(method='coop')), head='coop', modules='none', mda=False, epochs=50, lr=.002, batch_size=32)
    assert has(recipe(line(method='zs')), head='zero_shot', epochs=0, modules='none')
    assert has(recipe(line('inat2018')), epochs=15) and has(recipe(line('inat2018', method='lp')), epochs=5)
    assert auto_dim(1000, 12, 2) == 32 and has(recipe(line()), dim=None, layers=None)

def test_both_vocabularies_give_one_recipe():
    for theirs, ours in {'num_epochs 3 loss_type LDAM': 'epochs 3 loss ldam', 'v.adaptformer_dim 8 v.adaptformer_layers 3': 'dim 8 layers 3', 'classifier_scale 30': 'scale 30',
                         'v.adaptformer False v.lora True v.lora_dim 2': 'modules lora dim 2', 'mda_func linear': 'mda linear', 'mda False': 'mda false', 'gpu 0': 'device cuda:0',
                         'classifier L2NormClassifier classifier_init class_mean': 'head l2norm init class_mean', 'l.lora True l.lora_dim 4': 'head text text_modules lora text_dim 4',
                         'v.ssf True': 'modules ssf+adaptformer', 'coop True coop_init photo': 'head coop ctx photo'}.items():
        assert recipe(line(more=theirs)) == recipe(line(more=ours)), (theirs, ours)

@given(st.permutations(['lr 0.01', 'num_epochs 3', 'v.lora True', 'v.adaptformer_dim 4', 'loss_type CE', 'tte True']))
def test_order_does_not_matter(parts):
    first = 'lr 0.01 num_epochs 3 v.lora True v.adaptformer_dim 4 loss_type CE tte True'
    a, b = (_split_settings(read(l.split())[0])[0] for l in (first, ' '.join(parts)))
    assert resolve(**a) == resolve(**b) and run_name(**a) == run_name(**b)

def test_sources():
    r, source = _resolve_with_sources(**read(line('digits_lt', 'tiny_clip', 'lift', 'weight_decay 0.1').split())[0])
    for k, s in dict(weight_decay='option', epochs='data', lr='method', mda='method', resolution='backbone', init='backbone', momentum='default', head='default', data='option').items():
        assert source[k] == s, k
    assert set(source) == {*_option_names()}

def test_dry_run(tmp_path, monkeypatch, capsys):
    "Every setting on a line of its own, and nothing on the disk"
    monkeypatch.chdir(tmp_path)
    assert main([*line(more='v.lora_dim 8 output_dir x').split(), '--dry-run']) == 0
    out = capsys.readouterr().out
    assert [l.split()[0] for l in out.splitlines()[:len(_option_names())]] == _option_names()
    assert 'note: v.lora_dim has no effect here' in out and 'nothing was started' in out and not list(tmp_path.iterdir())

def test_fifteen_epochs_on_inaturalist(capsys):
    "LIFT+ on iNaturalist and its levels trains 15 epochs, unless told otherwise; other methods and sets do not"
    def epochs(words):
        assert main([*words.split(), '--dry-run']) == 0
        return next(l.split()[1:] for l in capsys.readouterr().out.splitlines() if l.startswith('epochs '))
    for d in ('inat2018', *(f'inat2018_{l}' for l in 'kpcofgs')): assert epochs(line(d)) == ['15', 'data'], d
    assert epochs(line('inat2018', more='num_epochs 5')) == ['5', 'option'] and epochs(line('inat2018', method='lift')) == ['10', 'method']
    assert epochs(line('inat2018', method='lp')) == epochs(line('places_lt')) == ['5', 'default']

def test_what_is_not_in_names(tmp_path):
    "What computes decides neither a run's folder nor its hash, nor does the root of a named set; another checkpoint, list or folder does"
    where = dict(data='imagenet_lt', root=str(tmp_path), device='cpu', num_workers=2)
    assert run_name(**where) == run_name(data='imagenet_lt') and _recipe_hash(resolve(**where).settings()) == _recipe_hash(resolve(data='imagenet_lt').settings())
    for k in ('checkpoint', 'lists'): assert len({run_name(data='imagenet_lt', **{k: v}) for v in ('a', 'b', None)}) == 3
    assert run_name(data='a/images') != run_name(data='b/images') and run_name(data=str(tmp_path), skip_corrupt=True) != run_name(data=str(tmp_path))

@pytest.mark.parametrize('data', [*DATASETS, '.'])
def test_both_doors_resolve_alike(data):
    "For every data set, backbone and method the learner's words and the shell's give one recipe"
    for b, m in product([*BACKBONES, None], METHODS):
        words = [w for k, v in dict(data=data, backbone=b, method=m).items() if v for w in (f'--{k}', v)]
        assert parse(['train', *words]) == resolve(data=data, backbone=b, method=m), (data, b, m)

def test_a_setting_is_one_line(monkeypatch, capsys):
    "A field that is added reaches the shell, its help, the learner's signature, the table in the docs and the run's hash"
    import dataclasses
    import lift_nb.experiments.recipe as recipe_module, lift_nb.commands as commands
    from lift_nb.learner import _settings_signature, lift_plus_learner
    wider = dataclasses.make_dataclass('Recipe', [('sharpness', float, recipe_module._setting(1., 'Training', 'how sharp it is', recipe_module._POSITIVE))], bases=(Recipe,), frozen=True, repr=False)
    monkeypatch.setattr(recipe_module, 'Recipe', wider)
    monkeypatch.setattr(commands, 'Recipe', wider)
    monkeypatch.setattr('lift_nb.learner.Recipe', wider)
    monkeypatch.setitem(_FIELDS, 'sharpness', {f.name: f for f in dataclasses.fields(wider)}['sharpness'])
    assert main('train digits_lt --sharpness 2 --dry-run'.split()) == 0
    assert [l.split() for l in capsys.readouterr().out.splitlines() if l.startswith('sharpness')] == [['sharpness', '2.0', 'option']]
    assert main(['train', '--help']) == 0 and 'how sharp it is' in capsys.readouterr().out
    assert main('train digits_lt --sharpness 0'.split()) == 2 and 'sharpness must be above 0' in capsys.readouterr().err
    assert 'sharpness' in _settings_signature(lift_plus_learner, ('data',), ()).parameters and 'how sharp it is' in recipe_module.settings_table({})
    hashes = {_recipe_hash(resolve(sharpness=s).settings()) for s in (1., 2.)}
    assert len(hashes) == 2 and 'sharpness_2.0' in run_name(sharpness=2.)

def test_help_names_everything(capsys):
    assert main(['--help']) == 0
    out = capsys.readouterr().out
    assert all(n in out for n in [*DATASETS, *BACKBONES, *METHODS, 'train', 'predict', 'reproduce', 'sweep', 'compare', 'bench'])
    assert main(['train', '--help']) == 0
    out = capsys.readouterr().out
    assert all(f'--{n} ' in out for n in _FIELDS) and all(n in ' '.join(out.split()) for n in ('(original: num_epochs)', 'lift_nb train path/to/images --epochs 3'))
    assert max(map(len, out.splitlines())) <= 150

def one_line(words, capsys):
    "What a mistake is answered with"
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith('lift_nb: ') and err.count('\n') == 1
    return err

@pytest.mark.parametrize('words, says', {
    'num_epoch 5': "choose from ['num_epochs', ", 'v.adaptfomer True': "'v.adaptformer'", 'l.lora_dims 4': "'l.lora_dim'", 'qwxyz 1': "see 'lift_nb --help'", '--epoch 3': "'epochs'", 'loss bs tau 2': "belongs to the loss 'la'", 'train -m lp --layers 3': "modules is 'none'",
    'loss_type CEE': "one of ['CE', 'Focal', 'LDAM'", 'classifier Cosine2': "one of ['CosineClassifier'", 'mda_func convx': "one of ['min', 'max'", 'v.aft_loc mid': "one of ['attn', 'mlp', 'all']",
    'v.lora maybe': 'must be True or False', 'v.fft_layers all': 'must be none (all), a number', 'gpu fast': 'must be the number of a GPU', 'prec_train int8': "one of ['amp', 'fp16'",
    'coop_cls_pos top': "one of ['end', 'middle', 'front']", 'v.adaptformer_dim 0': 'dim must be above 0', 'v.adaptformer_dim 2.5': 'width of', 'lr 1e999': 'must be finite', 'lr -1': 'above 0', 'lr': 'has no value', 'mean [1,2]': 'three numbers',
    'num_epochs 5 epochs 6': 'give one of them', 'coop True classifier CosineClassifier': 'no classifier beside', '-m lift++': "Unknown method 'lift++'; choose from ['lift+'",
    '-d imagnet_lt': "choose from ['imagenet_lt'", '-b clip_vit_b61': "choose from ['clip_vit_b16'", 'batch_size 10 accum_step 3': 'into 3 equal gradient-accumulation steps', 'classifier_init means': "one of ['semantic'",
}.items())
def test_mistakes_are_one_sentence(words, says, capsys): assert says in one_line(words.split(), capsys)

keys = st.sampled_from([*_ORIGINAL, *_FIELDS, '-d', '-b', '-m'])
values = st.one_of(st.text(max_size=12), st.sampled_from(['True', 'False', 'none', '0', '1', '-1', '0.5', '[0,1]', 'range(3)', '[]', '{}', "{'lora': 5}", "{'lora': {'r': 'x'}}", '"', '[[]]', "['lora']",
    'lora+aft', 'coop', 'zero_shot', '{[]: 1}', '9'*50, '1e999', 'nan', 'range(10,0)', '{}{}', '(' * 300, 'a\0b', '\udc80', '/'*5000]))

@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(keys, values), max_size=5))
def test_any_values_make_a_recipe_or_a_sentence(pairs):
    try: r = parse([w for p in pairs for w in p])
    except LiftError as e: assert str(e) and len(str(e).splitlines()) == 1
    else: assert isinstance(r, Recipe) and _resolve_with_sources(**{f: getattr(r, f) for f in _option_names()})[0] == r

@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=6))
def test_garbage_never_crashes(words):
    try: parse(words)
    except LiftError: pass

@given(st.dictionaries(st.sampled_from(['data', 'template', 'root', 'loss', 'ctx']), st.text(max_size=300), max_size=4))
def test_names_are_safe(options):
    name = run_name(**options)
    assert name == run_name(**options) and len(name.encode()) <= 180 and name not in ('.', '..') and not set('/\\\0 \n:*?"<>|') & set(name) and name.isprintable()

@given(st.text(max_size=20))
def test_values_are_plain(text): assert isinstance(_parse_value(text), (str, int, float, list, tuple, dict, type(None)))

def test_two_runs_in_one_folder(tmp_path, capsys):
    "The second is told who holds the folder; a killed one's lock is recognised"
    code = f"import time\nfrom lift_nb.core.locks import _locked\nwith _locked(r'{tmp_path}/run'): print('held', flush=True); time.sleep(600)"
    first = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    try:
        assert first.stdout.readline() == 'held\n'
        assert f'process {first.pid} on' in one_line(['-m', 'zs', 'output_dir', f'{tmp_path}/run'], capsys)
    finally: first.kill(); first.wait()
    said = []
    with _locked(tmp_path/'run', said.append) as folder: assert (folder/_LOCK).exists()
    assert f'process {first.pid}, which is gone' in said[0] and not (tmp_path/'run'/_LOCK).exists()

@pytest.mark.skipif(os.name != 'posix' or not os.getuid(), reason='root may write everywhere')
def test_a_folder_without_permission(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert 'Cannot write to the output folder' in one_line(['-m', 'zs', 'output_dir', f'{tmp_path}/x'], capsys)

@pytest.fixture
def small(monkeypatch):
    "digits_lt with two test images a class"
    monkeypatch.setitem(DATASETS, 'digits_lt', lambda root=None: digits_lt(n_test=2))
    return dict(epochs=1, echo=lambda line: None, validate=False)

def test_settings_reach_the_run(small, tmp_path):
    "A line every few batches, a GPU that is not there, another precision in the test, mean and std of the images"
    said, usual = [], run(tmp_path/'usual', method='lp', **small)
    r = run(tmp_path/'run', method='lp', print_freq=3, device='cuda:7', test_precision='bf16', mean=(.1, .9, .5), deterministic=False, **dict(small, echo=said.append))
    if not torch.cuda.is_available(): assert said[0] == "There is no GPU on this machine, so 'cuda:7' became the CPU" and r['device'] == 'cpu'
    assert sum('  batch ' in l for l in said) == 3 and r['recipe']['mean'] == (.1, .9, .5)
    learn = _build(resolve(mean=(.1, .9, .5), std=(1, 2, 3)))
    assert learn.backbone.mean == (.1, .9, .5) and torch.allclose(learn.dls.after_batch.fs[-1].std.flatten().cpu(), torch.tensor([1., 2, 3]))
    assert usual['recipe']['mean'] == BACKBONES['tiny_clip'].defaults['mean']

@pytest.mark.parametrize('modules, head', [('adaptformer', 'cosine'), ('aft', 'linear'), ('none', 'coop'), ('lora', 'text')])
def test_checkpoints_of_the_original(modules, head, small, tmp_path, capsys):
    "`test_only True model_dir DIR` on a folder that holds only the original's file"
    o = dict(modules=modules, head=head, **({'text_modules': 'aft'} if head == 'text' else {}))
    trained, learn = run(tmp_path/'ours', **o, **small), _build(resolve(**o))
    _load_previous(learn, tmp_path/'ours')
    (tmp_path/'theirs').mkdir()
    save_original(learn.model, tmp_path/'theirs/checkpoint.pth.tar')
    words = [w for k, v in o.items() for w in (k, v)] + ['test_only', 'True', 'model_dir', f'{tmp_path}/theirs', 'output_dir', f'{tmp_path}/test', 'v.aft_seed', '1', 'l.aft_seed', '1']
    assert main(words) == 0 # the entries that aft trains are those of the file, whatever the seed
    assert run(tmp_path/'again', test_only=True, model_dir=tmp_path/'theirs', **o, **small)['per_class'] == trained['per_class']
    assert f"accuracy %{trained['overall']:>12.1f}" in capsys.readouterr().out
    assert 'does not fit' in (main(['-m', 'lp', 'modules', 'ssf', *words[words.index('test_only'):-4]]), capsys.readouterr().err)[1]

def test_a_reader_that_goes_away():
    "As in `lift_nb --help | head -1`"
    p = subprocess.Popen([sys.executable, '-m', 'lift_nb', '--help'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    p.stdout.close()
    assert 'Error' not in p.stderr.read() and p.wait() == 0

def test_few_functions_between_a_setting_and_its_use(tmp_path, monkeypatch):
    "Ours that are at work when tau reaches the loss: at most ten at both doors"
    from lift_nb.learner import lift_plus_learner
    from lift_nb.training.losses import LogitAdjustment
    class Found(Exception): pass
    def note(self, counts, tau):
        frames = [f.f_code for f, _ in traceback.walk_stack(None) if 'lift_nb' in f.f_globals.get('__name__', '').split('.')[:1]]
        raise Found(tau, [f.co_name for f in frames if f.co_name != '<lambda>' and f.co_filename.endswith('.py')])
    monkeypatch.setattr(LogitAdjustment, '__init__', note)
    doors = (lambda: lift_plus_learner('digits_lt', tau=1.5), lambda: main(['train', 'digits_lt', '--tau', '1.5', '--output_dir', str(tmp_path/'run')]))
    for door in doors:
        with pytest.raises(Found) as found: door()
        tau, path = found.value.args
        assert tau == 1.5 and len(path) + 1 <= 10, path
