"Saved models: after loading, every method on every kind of backbone predicts what the learner predicts; whatever does not fit is refused"
import copy, subprocess, sys
from io import BytesIO
from pathlib import Path

import numpy as np, pandas as pd, pytest, timm, torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import Normalize
from fastai.learner import Learner, load_learner
from fastai.torch_core import set_seed
from fastai.vision.data import ImageBlock
from fastcore.basics import defaults
from PIL import Image
from safetensors.torch import save_file
from timm.layers import Attention
from torch import nn

from lift_nb.models.weights import _read_weights
from lift_nb.models.clip import _clip_backbone
from lift_nb.models.backbones import create_backbone, _tiny_clip_file
from lift_nb.core.errors import LiftError
from lift_nb.cli import main
from lift_nb.data.dataset import digits_lt
from lift_nb.experiments.run import run
from lift_nb.core.files import _read_tensors, _write_tensors
from lift_nb.original.checkpoints import load_original, save_original, _set_masked_entries_from, _load_original_tensors, _original_state
from lift_nb.learner import lift_plus_learner
from lift_nb.models.merge import merge
from lift_nb.models.model import assemble, set_precision
from lift_nb.models.saved import _frozen_digest, _trainable_tensors
from lift_nb.predictor import Predictor, _resolve_device, load_lift, save_lift
from lift_nb.models.surgery import n_trainable

small = digits_lt(n_max=40, n_test=1)
images = list(small.test_images)

def trained(backbone='tiny_clip', data=small, **options):
    "A learner whose trained tensors are no longer those of the start"
    set_seed(0)
    learn = lift_plus_learner(data, backbone, batch_size=None if not hasattr(data, 'train_images') else 32, **options)
    with torch.no_grad():
        for p in learn.model.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p)*.05)
    return learn

def equal(learn, p, eps=1e-5):
    "Are the predictor's logits the learner's, with one crop and with five?"
    for tte in (False, True):
        with learn.no_bar(): want = learn.logits(tte=tte)[0]
        assert (p.logits(images, tte=tte) - want).abs().max() < eps

KINDS = {
    'lift+': dict(), 'lora+ssf': dict(modules='lora+ssf', layers=1), 'vpt': dict(modules='vpt'), 'vpt_shallow': dict(modules='vpt_shallow', dim=3),
    'aft': dict(method='aft'), 'aft attn': dict(modules={'aft': dict(loc='attn', seed=7, r=.01)}), 'bitfit': dict(modules='bitfit'), 'ln': dict(modules='ln'),
    'fft': dict(method='fft', layers=[-1]), 'adapter': dict(modules='adapter', dim=5, head='linear'), 'lp': dict(method='lp', head='layernorm'),
    'zs': dict(method='zs', template=['a {}', 'the digit {}']), 'text': dict(method='text', text_layers=1, text_dim=3), 'text vpt': dict(method='text', text_modules='vpt'),
    'coop': dict(method='coop', ctx='middle', ctx_len=3), 'coop photo': dict(method='coop', ctx='photo'), 'coop own': dict(method='coop', ctx='X digit X {}'),
    'clip_adapter': dict(method='clip_adapter', adapter_dim=6), 'proj_tuning': dict(method='proj_tuning'), 'all text': dict(method='coop', head='coop+clip_adapter+proj_tuning'),
    'both towers': dict(method='coop', modules='adaptformer', text_modules='lora'), 'scale': dict(scale=10., mean=(.4, .5, .6), std=(1., .5, .25)),
    'expand': dict(expand=3), 'resolution': dict(resolution=48), 'kept in half': dict(precision='bf16', frozen_precision='bf16'),
    'names': dict(method='coop', classes=['the number ' + 'very '*i + 'big' for i in range(10)]),
}

@pytest.mark.parametrize('kind', KINDS)
def test_every_method(kind, tmp_path):
    learn = trained(**KINDS[kind])
    save_lift(tmp_path/'x.safetensors', learn)
    p = load_lift(tmp_path/'x.safetensors', device='cpu')
    equal(learn, p, .02 if 'half' in kind else 1e-5)
    assert p.classes == list(learn.dls.vocab) and p.counts == learn.counts.tolist()
    found = p.predict(images)
    assert found['class'].tolist() == [p.classes[i] for i in p.logits(images).argmax(1)] and found.probability.between(0, 1).all()

def weights_file(path, name):
    "Weights of a timm network, as a local file"
    torch.manual_seed(3)
    save_file(timm.create_model(name, num_classes=0).state_dict(), path)
    return path

TOWERS = {'vit_tiny_patch16_224': dict(modules='adaptformer', layers=2), 'resnet18': dict(modules='ssf'), 'resnet10t': dict(modules='bn', head='linear')}

@pytest.mark.parametrize('name', TOWERS)
def test_local_file_of_a_timm_network(name, tmp_path):
    first, second = weights_file(tmp_path/'a.safetensors', name), tmp_path/'moved.safetensors'
    learn = trained(name, checkpoint=first, resolution=64, init='none', **TOWERS[name])
    save_lift(tmp_path/'x.safetensors', learn)
    equal(learn, load_lift(tmp_path/'x.safetensors'), 1e-4)
    first.rename(second)
    with pytest.raises(LiftError, match='checkpoint'): load_lift(tmp_path/'x.safetensors')
    equal(learn, load_lift(tmp_path/'x.safetensors', checkpoint=second), 1e-4)
    with pytest.raises(LiftError, match='frozen weights'): load_lift(tmp_path/'x.safetensors', checkpoint=changed(second, tmp_path/'other.safetensors'))

def changed(file, to):
    "A copy of weights that differs in one number"
    state = _read_weights(file)
    name = next(n for n, t in state.items() if t.ndim > 1)
    state[name] = state[name].clone()
    state[name].view(-1)[0] += 1e-3
    save_file(state, to)
    return to

@pytest.mark.parametrize('as_path', [str, Path])
def test_file_of_a_clip(as_path, tmp_path):
    first, second = tmp_path/'clip.safetensors', tmp_path/'moved.safetensors'
    first.write_bytes(Path(_tiny_clip_file).read_bytes())
    learn = trained(as_path(first), resolution=48)
    save_lift(tmp_path/'x.safetensors', learn)
    equal(learn, load_lift(tmp_path/'x.safetensors'))
    first.rename(second)
    with pytest.raises(LiftError, match='pass'): load_lift(tmp_path/'x.safetensors')
    equal(learn, load_lift(tmp_path/'x.safetensors', checkpoint=second))
    equal(learn, load_lift(tmp_path/'x.safetensors', backbone=as_path(second)))

def tower(seed=0):
    torch.manual_seed(seed)
    return timm.create_model('resnet10t', num_classes=0)

@pytest.mark.parametrize('given', ['timm network', 'Backbone', 'state dict'])
def test_ready_networks(given, tmp_path):
    def make():
        if given == 'state dict': return _read_weights(_tiny_clip_file)
        return tower() if given == 'timm network' else create_backbone('tiny_clip', resolution=40)
    learn = trained(make(), init='none', modules='none' if given == 'timm network' else None)
    save_lift(tmp_path/'x.safetensors', learn)
    assert (tmp_path/'x.safetensors').stat().st_size < 200_000
    with pytest.raises(LiftError, match='pass it as backbone'): load_lift(tmp_path/'x.safetensors')
    equal(learn, load_lift(tmp_path/'x.safetensors', backbone=make()))
    with pytest.raises(LiftError): load_lift(tmp_path/'x.safetensors', backbone=tower(1))

def test_random_weights_are_recognised(tmp_path):
    save_lift(tmp_path/'x.safetensors', trained(pretrained=False, init='none'))
    with pytest.raises(LiftError, match='random'): load_lift(tmp_path/'x.safetensors')
    save_lift(tmp_path/'x.safetensors', trained(init='none'))
    with pytest.raises(LiftError, match='frozen weights'): load_lift(tmp_path/'x.safetensors', backbone=create_backbone('tiny_clip', pretrained=False))

def test_statistics_belong_to_the_frozen_weights(tmp_path):
    def rn(x=0.):
        torch.manual_seed(0)
        m = timm.create_model('resnet10t', num_classes=0)
        m.bn1.running_mean += x
        return m
    save_lift(tmp_path/'x.safetensors', trained(rn(), modules='bitfit', init='none'))
    load_lift(tmp_path/'x.safetensors', backbone=rn())
    with pytest.raises(LiftError, match='frozen weights'): load_lift(tmp_path/'x.safetensors', backbone=rn(.1))

def test_after_freeze_and_with_more_opened(tmp_path):
    "What was trained before a `freeze`, and what was opened by hand, is in the file"
    learn, file = trained(), tmp_path/'x.safetensors'
    learn.freeze()
    save_lift(file, learn)
    equal(learn, load_lift(file))
    learn.unfreeze()
    with torch.no_grad(): learn.model.backbone.norm.bias.requires_grad_().add_(1)
    save_lift(file, learn)
    equal(learn, load_lift(file))

def test_merged_modules_cannot_be_saved(tmp_path):
    learn = trained(modules='lora')
    merge(learn.model.backbone)
    with pytest.raises(LiftError, match='save_lift'): save_lift(tmp_path/'x.safetensors', learn)
    with pytest.raises(LiftError, match='lift_plus_learner'): save_lift(tmp_path/'x.safetensors', Learner(learn.dls, nn.Linear(1, 1), nn.MSELoss()))

def test_other_entries_of_aft(tmp_path):
    "The entries that a checkpoint of the original trained need not be those of the seed"
    a, b = trained(modules={'aft': dict(r=.01, seed=1)}), trained(modules={'aft': dict(r=.01, seed=2)})
    state = _original_state(a.model)
    _set_masked_entries_from(b.model, state)
    _load_original_tensors(b.model, state)
    save_lift(tmp_path/'x.safetensors', b)
    equal(a, load_lift(tmp_path/'x.safetensors'))

def test_data_of_ones_own(tmp_path):
    "Numbers as categories, another normalisation; the margin of the crop is unknown, so none"
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: Image.fromarray(small.train_images[i]).convert('RGB').resize((32, 32)),
                      get_y=lambda i: int(small.train_labels[i]), batch_tfms=[Normalize.from_stats([.1, .2, .3], [.5, .6, .7])])
    dls = block.dataloaders(list(range(len(small.train_labels))), bs=16, num_workers=0)
    learn = trained(data=dls, init='none')
    save_lift(tmp_path/'x.safetensors', learn)
    p = load_lift(tmp_path/'x.safetensors')
    assert p.classes == [str(c) for c in dls.vocab] and torch.allclose(p.mean.flatten().cpu(), torch.tensor([.1, .2, .3]))
    with learn.no_bar(): want = learn.logits()[0]
    assert (p.logits([Image.fromarray(small.train_images[i]).convert('RGB').resize((32, 32)) for i in dls.valid_ds.items]) - want).abs().max() < 1e-5

def test_precision_asked_for(tmp_path):
    learn = trained(precision='bf16', frozen_precision='bf16')
    save_lift(tmp_path/'x.safetensors', learn)
    exact, half = load_lift(tmp_path/'x.safetensors', precision='fp32'), load_lift(tmp_path/'x.safetensors')
    difference = (exact.logits(images) - half.logits(images)).abs().max()
    assert 0 < difference < .5 and next(exact.model.backbone.parameters()).dtype == torch.float32
    with pytest.raises(LiftError, match='fp61'): load_lift(tmp_path/'x.safetensors', precision='fp61')

@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    "The folder of a short run, and images"
    folder = tmp_path_factory.mktemp('run')
    run(folder/'run', epochs=1, validate=False, echo=lambda line: None)
    (folder/'images').mkdir()
    for i, x in enumerate(images[:3]): Image.fromarray(x).save(folder/'images'/f'{i} ü.png')
    return folder

def test_folder_of_a_run(ran):
    p, said = load_lift(ran/'run'), pd.read_csv(ran/'run'/'predictions.csv')
    assert isinstance(p, Predictor) and p.about['recipe']['epochs'] == 1 and {'python', 'torch', 'timm', 'lift_nb'} <= {*p.about['versions']}
    assert p.logits(list(digits_lt().test_images)).argmax(1).tolist() == said.prediction.tolist()

def test_fresh_process(ran):
    "Prediction loads neither data, nor training code, nor fastai"
    code = f"""import sys
from lift_nb.predictor import load_lift
print(load_lift({str(ran/'run')!r}).predict({str(ran/'images')!r}, tte=True).to_csv(index=False))
found = [m for m in sys.modules if m.startswith(('fastai', 'lift_nb.training', 'lift_nb.experiments.run', 'lift_nb.learner'))]
assert not found, found"""
    said = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count('\n') >= 4 and '0 ü.png' in said.stdout

def test_saving_by_hand_needs_no_fastai():
    code = "import sys, lift_nb.models.saved; assert not [m for m in sys.modules if m.startswith(('fastai', 'lift_nb.training'))]"
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)

def test_switch_of_fastai(monkeypatch):
    "Without a device the GPU is taken where there is one, unless fastai was told to stay on the CPU"
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda *a, **k: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda *a, **k: torch.device('meta'))
    monkeypatch.setattr(defaults, 'use_cuda', None, raising=False)
    assert _resolve_device(None).type == 'meta' and _resolve_device('cpu').type == 'cpu'
    monkeypatch.setattr(defaults, 'use_cuda', False)
    assert _resolve_device(None).type == 'cpu'

def test_command(ran, capsys, tmp_path):
    assert main(['predict', str(ran/'run'), str(ran/'images'), 'top', '2']) == 0
    assert capsys.readouterr().out.count('.png') == 6
    out = tmp_path/'found.csv'
    assert main(['predict', str(ran/'run'/'model.safetensors'), *map(str, (ran/'images').iterdir()), '--out', str(out), 'tte', 'True']) == 0
    found = pd.read_csv(out)
    assert list(found) == ['image', 'class', 'probability'] and len(found) == 3

@pytest.mark.parametrize('words', [[], ['RUN'], ['RUN', 'missing.png'], ['nowhere', 'IMAGES'], ['RUN', 'IMAGES', 'top', '0'], ['RUN', 'IMAGES', 'top', 'x'], ['RUN', 'IMAGES', 'top'],
    ['RUN', 'IMAGES', 'tte', 'perhaps'], ['RUN', 'IMAGES', 'device', 'abacus'], ['RUN', 'IMAGES', 'out', 'nowhere/x.csv'], ['RUN', 'IMAGES', 'out', 'IMAGES'], ['RUN', 'RUN'],
    ['RUN', 'RUN/result.json'], ['IMAGES', 'IMAGES'], ['RUN/result.json', 'IMAGES'], ['RUN', 'IMAGES', 'checkpoint', 'nowhere']])
def test_command_says_what_is_wrong(words, ran, capsys):
    words = [w.replace('RUN', str(ran/'run')).replace('IMAGES', str(ran/'images')) for w in words]
    if words[1:] == [str(ran/'run')]: (ran/'run'/'per_class.png').rename(ran/'per_class.png') # no image is left there
    assert main(['predict', *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith('lift_nb: ') and said.count('\n') == 1

def test_what_can_be_predicted(ran):
    p, file = load_lift(ran/'run'), next((ran/'images').iterdir())
    for one in (file, str(file), images[0], Image.fromarray(images[0]).convert('RGBA'), np.stack([images[0]]*3, -1)): assert len(p.predict(one)) == 1
    assert len(p.predict([file, images[1]])) == 2 and len(p.predict(np.stack(images)[..., None])) == len(images)
    assert p.logits([]).shape == (0, 10) and len(p.predict([])) == 0 and len(p.predict(file, top=10)) == 10
    for bad in (None, 3, [None], images[0]/255, Path('missing.png'), ['missing.png']):
        with pytest.raises(LiftError): p.predict(bad)
    for bad in (0, 11, 1.5, 'a', True, None):
        with pytest.raises(LiftError, match='top'): p.predict(file, top=bad)

def test_batches_change_nothing(ran):
    p = load_lift(ran/'run')
    assert (p.logits(images, bs=3, tte=True) - p.logits(images, tte=True)).abs().max() < 1e-5

def test_fastai_keeps_working(tmp_path):
    learn = trained()
    learn.path, learn.model_dir = tmp_path, '.'
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        want = learn.logits()[0]
        learn.save('all')
        with torch.no_grad(): learn.model.head.weight.mul_(2)
        learn.load('all')
        assert torch.equal(learn.logits()[0], want)
        learn.export('export.pkl')
        again = load_learner(tmp_path/'export.pkl')
        with again.no_bar(): assert torch.allclose(again.predict(images[5])[2], learn.predict(images[5])[2], atol=1e-6)
    save_lift(tmp_path/'x.safetensors', again := load_learner(tmp_path/'export.pkl'))
    assert (load_lift(tmp_path/'x.safetensors').logits(images) - want).abs().max() < 1e-5

def test_a_tensor_too_few_too_many_or_of_another_kind(tmp_path):
    file = tmp_path/'x.safetensors'
    save_lift(file, trained())
    tensors, about = _read_tensors(file)
    name = next(iter(tensors))
    for changed, match in ((dict(list(tensors.items())[1:]), 'missing'), ({**tensors, 'odd': torch.ones(1)}, 'left over|odd'), ({**tensors, name: torch.ones(3, 3, 3)}, 'shape'),
                           ({**tensors, name: tensors[name].to(torch.complex64)}, 'complex'), ({}, 'rows')):
        _write_tensors(file, changed, **about)
        with pytest.raises(LiftError, match=match): load_lift(file)

def test_prompts_cannot_be_exchanged(tmp_path):
    "Tokens of a text head follow from prompts and class names; a file with others is refused, not run"
    file = tmp_path/'x.safetensors'
    save_lift(file, trained(method='coop'))
    tensors, about = _read_tensors(file)
    for name in [n for n in tensors if tensors[n].dtype == torch.int64]:
        _write_tensors(file, {**tensors, name: tensors[name] + 10**9}, **about)
        with pytest.raises(LiftError): load_lift(file)

# --- the same network, wherever it comes from -------------------------------------------------------------------------
def mechanisms(model):
    "Classes of all modules, the switches that decide how they compute, hooks, modes, types and places of tensors"
    switches = 'fused_attn', 'grad_checkpointing', 'precision', 'frozen_precision', 'training'
    hooks = [k for k in vars(torch.nn.Module()) if 'hook' in k]
    modules = [(n, type(m), *(getattr(m, s, None) for s in switches), *(len(getattr(m, h) or ()) for h in hooks)) for n, m in model.named_modules()]
    return modules, {n: (t.dtype, t.device, t.is_contiguous()) for n, t in (*model.named_parameters(), *model.named_buffers())}

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('options', [dict(), dict(head='coop', modules='none')], ids=['classifier', 'text'])
def test_one_network_for_all_doors(tmp_path, precision, options):
    "The learner's model, the saved one and the original's checkpoint are built of the same modules with the same switches"
    learn = lift_plus_learner(digits_lt(n_test=2), 'tiny_clip', expand=0, precision=precision, device='cpu', **options)
    save_lift(tmp_path/'m.safetensors', learn); save_original(learn.model, tmp_path/'o.safetensors')
    text = dict(head=None, classnames=list(learn.data.classes), template='X X X X {}.') if options else {}
    found = [load_lift(tmp_path/'m.safetensors', device='cpu').model, load_original(tmp_path/'o.safetensors', 'tiny_clip', precision=precision, **text)]
    for model in found: assert mechanisms(model.eval()) == mechanisms(learn.model.eval())
    assert {n: p.requires_grad for n, p in found[1].named_parameters()} == {n: p.requires_grad for n, p in learn.model.named_parameters()}

def test_change_of_precision():
    "A precision that is chosen later decides the attention too (197 tokens: fused under fp32, plain under bf16)"
    vit = create_backbone('vit_tiny_patch16_224', pretrained=False)
    model = assemble(vit, ['a', 'b'], modules='none', init='none')
    def fused(): return {m.fused_attn for m in model.modules() if isinstance(m, Attention)}
    assert fused() == {True}
    set_precision(model, 'bf16'); assert fused() == {False}
    set_precision(model, 'fp32'); assert fused() == {True}

# --- what predict takes -----------------------------------------------------------------------------------------------
def test_every_form_of_an_image(tmp_path):
    "The same picture in each form that people have gives the same prediction; a shape with two readings is refused"
    learn = lift_plus_learner(digits_lt(n_test=2), 'tiny_clip', expand=0, device='cpu')
    save_lift(tmp_path/'m.safetensors', learn); p = load_lift(tmp_path/'m.safetensors', device='cpu')
    grey = learn.data.test_images[7]; rgb = np.repeat(grey[..., None], 3, -1)
    file = tmp_path/'a.png'; Image.fromarray(rgb).save(file)
    want, t = p.logits(file), torch.from_numpy(rgb)
    one = [str(file), Image.open(file), file.read_bytes(), BytesIO(file.read_bytes()), open(file, 'rb'), grey, rgb, t, t.permute(2, 0, 1), t[..., 0],
           t.permute(2, 0, 1)[:1], [t.permute(2, 0, 1)], [file.read_bytes()], np.array([str(file)]), np.array([file], dtype=object), pd.Series([str(file)]),
           rgb[None], t.permute(2, 0, 1)[None]]
    for x in one: assert torch.equal(p.logits(x), want), type(x)
    five = np.stack([grey]*5)
    for x in five, torch.from_numpy(five): assert torch.allclose(p.logits(x), want.expand(5, -1), atol=1e-4) # sums of a larger batch round otherwise
    for x in rgb.transpose(2, 0, 1), np.zeros((2, 5, 6, 7), np.uint8), np.zeros(5, np.uint8), np.zeros((2, 2, 2, 2, 2), np.uint8), b'no image', 7, [rgb[None].repeat(2, 0)]:
        with pytest.raises(LiftError): p.predict(x)

def test_one_broken_file_among_many(tmp_path):
    learn = lift_plus_learner(digits_lt(n_test=2), 'tiny_clip', expand=0, device='cpu')
    save_lift(tmp_path/'m.safetensors', learn); p = load_lift(tmp_path/'m.safetensors', device='cpu')
    (tmp_path/'new').mkdir()
    for i in range(5): Image.fromarray(learn.data.test_images[i]).save(tmp_path/'new'/f'{i}.png')
    for i in (0, 3): (tmp_path/'new'/f'{i}.png').write_bytes((tmp_path/'new'/f'{i}.png').read_bytes()[:150])
    with pytest.raises(LiftError, match='0.png'): p.predict(tmp_path/'new')
    found = p.predict(tmp_path/'new', top=2, bs=1, skip_corrupt=True)
    assert [Path(x).stem for x in found['image']] == ['1', '1', '2', '2', '4', '4'] and [Path(x).stem for x in found.attrs['skipped']] == ['0', '3']
    assert found['class'][0] == p.predict(tmp_path/'new'/'1.png')['class'][0]

def test_network_with_the_same_tensors(tmp_path):
    "A QuickGELU network and a GELU one have the same tensors and are different networks; so are other numbers of heads"
    learn = lift_plus_learner(digits_lt(n_test=2), 'tiny_clip', expand=0, device='cpu')
    save_lift(tmp_path/'m.safetensors', learn)
    sd = _read_weights(_tiny_clip_file)
    load_lift(tmp_path/'m.safetensors', _clip_backbone(sd, text_heads=1), device='cpu')
    for other in _clip_backbone(sd, act='gelu', text_heads=1), _clip_backbone(sd, heads=4, text_heads=1):
        with pytest.raises(LiftError, match='another'): load_lift(tmp_path/'m.safetensors', other, device='cpu')

def test_layer_scale_of_the_old_version(tmp_path):
    "A file of 0.1.0 is read where it means the same, and refused where its AdaptFormer stood outside LayerScale"
    for init_values in None, .1:
        def vit(): return timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, init_values=init_values)
        torch.manual_seed(0); net = vit()
        learn = lift_plus_learner(digits_lt(n_test=2), copy.deepcopy(net), init='none', device='cpu', batch_size=8)
        save_lift(tmp_path/'m.safetensors', learn)
        tensors, about = _read_tensors(tmp_path/'m.safetensors')
        about |= dict(layout=1, digest=_frozen_digest(learn.model, _trainable_tensors(learn), 1)); _write_tensors(tmp_path/'old.safetensors', tensors, **about)
        load_lift(tmp_path/'m.safetensors', copy.deepcopy(net), device='cpu')
        if init_values:
            with pytest.raises(LiftError, match='outside LayerScale'): load_lift(tmp_path/'old.safetensors', copy.deepcopy(net), device='cpu')
        else: load_lift(tmp_path/'old.safetensors', copy.deepcopy(net), device='cpu')
