"Exported models predict as the predictor does: every kind of network, every adapter that fits, every format"
import json, subprocess, sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from lift_nb.core.errors import LiftError
from lift_nb.models.backbones import create_backbone
from lift_nb.models.export import _export, _photographs
from lift_nb.models.model import assemble
from lift_nb.predictor import Predictor, export_model, load_lift

pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
from lift_nb.models.onnx_predictor import OnnxPredictor, _main

names = ['cat', 'dog "x"', 'えび', '=1+1', 'a\nb']

def towers():
    "Name → a small network of each kind, with random weights"
    vit = dict(embed_dim=48, depth=2, num_heads=3, num_classes=0)
    return dict(tiny_clip=lambda: 'tiny_clip', dinov2=lambda: timm.create_model('vit_small_patch14_dinov2', img_size=42, init_values=.5, **vit),
        resnet=lambda: timm.create_model('resnet10t', num_classes=0), convnext=lambda: timm.create_model('convnext_atto', num_classes=0, depths=(1, 1, 2, 1)))

def predictor(kind, modules='none', resolution=42, **options):
    "A model whose adapters do something, as if it were trained"
    torch.manual_seed(0)
    b = create_backbone(towers()[kind]())
    options = {'init': 'none', **options}
    model = assemble(b, names, modules=modules, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(.1*torch.randn_like(p))
    r = b.resolution if kind == 'tiny_clip' else resolution
    images = dict(resolution=r, expand=r//7, mean=list(b.mean), std=list(b.std))
    return Predictor(model, dict(classes=names, counts=[5, 4, 3, 2, 1], images=images, weights='random', method={}, recipe=dict(seed=0)))

transformer = 'adaptformer adapter lora ssf aft vpt vpt_shallow bitfit ln fft'.split()
fits = [*[('tiny_clip', m) for m in transformer], *[('dinov2', m) for m in transformer],
    *[('resnet', m) for m in ('none', 'ssf', 'bn', 'bitfit', 'fft')], ('convnext', 'none')]

@pytest.mark.parametrize('kind,modules', fits)
def test_torch_export(kind, modules, tmp_path):
    "The recorded program takes any number of images and gives the same logits"
    found = _export(predictor(kind, modules), tmp_path/'x.pt2', 'torch')
    assert found.difference < 1e-3 and found.images == 8 and found.files == [tmp_path/'x.pt2']

@pytest.mark.parametrize('kind,modules', [f for f in fits if f[1] in ('adaptformer', 'none', 'vpt', 'aft', 'ssf', 'lora')])
def test_onnx(kind, modules, tmp_path):
    "The small predictor gives the logits of the PyTorch predictor, one crop and five"
    p, images = predictor(kind, modules), _photographs()
    found = _export(p, tmp_path/'x.onnx')
    assert found.difference < 1e-3 and {f.name for f in found.files} == {'x.onnx', 'onnx_predictor.py'}
    small = OnnxPredictor(tmp_path/'x.onnx')
    np.testing.assert_allclose(small.logits(images, tte=True, bs=5), p.logits(images, tte=True), atol=1e-3)
    assert small.classes == names and small.about['recipe'] == {'seed': 0} and small.session.get_inputs()[0].shape[0] == 'batch'

@pytest.mark.parametrize('head', ['text', 'coop', 'clip_adapter', 'proj_tuning', 'zero_shot', 'linear', 'l2norm', 'layernorm'])
def test_heads(head, tmp_path):
    "Heads with and without classifier; text features are constants of the file"
    p = predictor('tiny_clip', 'adaptformer', head=head)
    assert _export(p, tmp_path/'x.pt2', 'torch').difference < 1e-3

@pytest.mark.parametrize('kind,modules', [(k, m) for k in ('tiny_clip', 'dinov2') for m in ('lora', 'ssf', 'aft', 'ln', 'lora+ssf')])
def test_timm(kind, modules, tmp_path):
    "The merged weights fit the plain network"
    p = predictor(kind, modules)
    assert _export(p, tmp_path/'x.safetensors', 'timm').difference < 1e-3
    plain = create_backbone(towers()[kind]())
    tensors = load_file(tmp_path/'x.safetensors')
    plain.model.load_state_dict({k: t for k, t in tensors.items() if not k.startswith('lift_head.')})
    x = torch.randn(3, 3, p.resolution, p.resolution)
    with torch.no_grad(): torch.testing.assert_close(p.model.head(plain.model(x)), p.model(x), atol=1e-3, rtol=1e-4)
    assert torch.equal(tensors['lift_head.weight'], p.model.head.weight)

@pytest.mark.parametrize('modules', ['adaptformer', 'adapter', 'vpt'])
def test_timm_refuses_what_cannot_be_folded(modules, tmp_path):
    with pytest.raises(LiftError, match='cannot be folded'): _export(predictor('tiny_clip', modules), tmp_path/'x.safetensors', 'timm')
    assert not list(tmp_path.iterdir())

def test_half_precision(tmp_path):
    "A model that computes in half precision is exported in float32"
    p = predictor('tiny_clip', 'adaptformer', precision='bf16', frozen_precision='bf16')
    assert _export(p, tmp_path/'x.pt2', 'torch').difference < 1e-3
    assert p.model.precision == 'bf16' and p.model.backbone.blocks[0].attn.qkv.weight.dtype == torch.bfloat16

def test_an_operator_that_onnx_lacks(tmp_path):
    class Odd(torch.nn.Linear):
        def forward(self, x): return super().forward(x) + torch.linalg.eigvalsh(x.T @ x)[:1].sum()
    with pytest.raises(LiftError, match='cannot become ONNX.*eigh'): _export(predictor('tiny_clip', head=Odd(128, 5)), tmp_path/'x.onnx')
    assert not list(tmp_path.iterdir())

def test_existing_files_stay(tmp_path):
    p, path = predictor('tiny_clip'), tmp_path/'x.pt2'
    path.write_text('mine')
    with pytest.raises(LiftError, match='exists already'): export_model(p, path, 'torch')
    assert path.read_text() == 'mine'
    assert export_model(p, path, 'torch', overwrite=True, images=np.zeros((3, 9, 9, 3), np.uint8)).images == 3

def test_learner_run_and_shell(tmp_path):
    "A learner, its file and the command line write the same model; fastai's model can be recorded as it is"
    from lift_nb.all import digits_lt, lift_plus_learner, save_lift
    from lift_nb.cli import main
    data = digits_lt(n_max=40, n_test=2)
    learn = lift_plus_learner(data, 'tiny_clip')
    torch.export.export(learn.model, (torch.randn(2, 3, 32, 32),))
    save_lift(tmp_path/'digits.safetensors', learn)
    assert export_model(learn, tmp_path/'a.pt2', 'torch').difference < 1e-3
    assert main(['export', str(tmp_path/'digits.safetensors'), '--format', 'onnx']) == 0
    assert main(['export', str(tmp_path/'digits.safetensors')]) == 2
    assert main(['export', str(tmp_path/'digits.safetensors'), '--format', 'tflite']) == 2
    files = []
    for i, x in enumerate(data.test_images[:5]): Image.fromarray(x).save(f := tmp_path/f'{i}.png'); files.append(str(f))
    found = [rows[0] for rows in OnnxPredictor(tmp_path/'digits.onnx').predict(files)]
    table = load_lift(tmp_path/'digits.safetensors', device='cpu').predict(files)
    assert [c for c, _ in found] == table['class'].tolist()
    np.testing.assert_allclose([p for _, p in found], table.probability, atol=1e-4)
    blocked = 'import sys; sys.modules.update(torch=None, timm=None, fastai=None, lift_nb=None); import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
    out = subprocess.run([sys.executable, '-c', blocked, tmp_path/'onnx_predictor.py', tmp_path/'digits.onnx', *files], capture_output=True, text=True)
    assert [l.split('\t')[1] for l in out.stdout.splitlines()] == table['class'].tolist(), out.stderr
