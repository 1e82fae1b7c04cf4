"Equality with the numbers in `reference/`: what the original program computes on tiny random models"
import json, os
from pathlib import Path

import numpy as np, pytest, timm, torch
from safetensors.torch import load_file

from lift_nb.augment import MDA_SCHEDULES, min_scale
from lift_nb.backbones import create_backbone, wrap_model
from lift_nb.data import long_tail_counts, long_tail_subset
from lift_nb.heads import create_head, zero_shot_head
from lift_nb.learner import LiftModel
from lift_nb.losses import LOSSES
from lift_nb.surgery import adapt, load_tuned, n_tuned, tuned_state
from lift_nb.text import dense_embedding

reference = Path(os.environ.get('LIFT_NB_REFERENCE', Path(__file__).parents[2]/'shared'/'reference'))
pytestmark = pytest.mark.skipif(not reference.is_dir(), reason=f'the reference numbers are not at {reference}; set LIFT_NB_REFERENCE')

HEAD_NAMES = dict(CosineClassifier='cosine', LinearClassifier='linear', L2NormClassifier='l2norm', LayerNormClassifier='layernorm')
CASES = [('clip_vit', 'lp'), ('clip_vit', 'adaptformer'), ('clip_vit', 'head_LinearClassifier'), ('clip_vit', 'head_L2NormClassifier'),
         ('clip_vit', 'head_LayerNormClassifier'), ('timm_vit', 'lp'), ('timm_vit', 'adaptformer')]

def read(backbone, method):
    d = reference/f'{backbone}__{method}'
    return json.loads((d/'meta.json').read_text()), load_file(d/'io.safetensors'), d

def backbone_of(name):
    sd = load_file(reference/f'backbone_{name}.safetensors')
    if name == 'clip_vit': return create_backbone(dense_embedding(sd))
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=96, depth=3, num_heads=3, num_classes=5)
    model.load_state_dict(sd)
    return create_backbone(wrap_model(model))

def ours(name):
    "This library's name of a tensor in the original's checkpoint"
    return (name.replace('classifier.', 'head.').replace('image_encoder.', 'backbone.').replace('.adaptformer.', '.mlp.side.'))

def model_of(backbone, meta, init='none'):
    head = create_head(HEAD_NAMES[meta['head']], backbone, meta['classnames'], init, template=meta['template'])
    if 'adaptformer' in meta['method'] or meta['method'].startswith('head_'): adapt(backbone.model, 'adaptformer', len(head.weight), r=4)
    return LiftModel(backbone.model, head).eval()

def close(a, b, tol): return abs(a-b) <= tol*max(1, abs(b))

@pytest.mark.parametrize('backbone,method', CASES)
def test_case(backbone, method):
    meta, io, d = read(backbone, method)
    model = model_of(backbone_of(backbone), meta)
    load_tuned(model, {ours(k): v for k, v in load_file(d/'tuner_before.safetensors').items()})
    assert n_tuned(model) == meta['tuned_params']
    assert (model(io['images']) - io['logits_before']).abs().max() < 1e-4
    loss, opt = LOSSES['la'](meta['class_counts']), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.005, momentum=.9, weight_decay=5e-4)
    for want, norm in zip(meta['losses'], meta['grad_norms']):
        opt.zero_grad()
        l = loss(model(io['images']), io['labels'])
        l.backward()
        assert close(l.item(), want, 1e-4)
        assert close(torch.cat([p.grad.flatten() for g in opt.param_groups for p in g['params']]).norm().item(), norm, 1e-3)
        opt.step()
    assert (model(io['images']) - io['logits_after']).abs().max() < 1e-4
    theirs = {ours(k): v for k, v in torch.load(d/'checkpoint.pth.tar', weights_only=True)['tuner'].items()}
    for k, v in tuned_state(model).items(): assert (v - theirs[k]).abs().max() < 1e-4, k

def test_semantic_start():
    meta, io, d = read('clip_vit', 'lp')
    model = model_of(backbone_of('clip_vit'), meta, init='semantic')
    assert (model.head.weight - load_file(d/'tuner_before.safetensors')['classifier.weight']).abs().max() < 1e-5
    assert (model(io['images']) - io['logits_before']).abs().max() < 1e-4

def test_zero_shot():
    meta, io, _ = read('clip_vit', 'zeroshot')
    backbone = backbone_of('clip_vit')
    model = LiftModel(backbone.model, zero_shot_head(backbone, meta['classnames'], meta['template']))
    assert n_tuned(model) == meta['tuned_params'] == 0
    assert (model(io['images']) - io['logits_before']).abs().max() < 1e-4

@pytest.mark.parametrize('name,row,tau', [('CE', 'ce', 1), ('LA', 'la', 1), ('LA_tau1_5', 'la', 1.5)])
def test_loss(name, row, tau):
    meta, io = json.loads((reference/'losses/meta.json').read_text()), load_file(reference/'losses/io.safetensors')
    z = io['logits'].clone().requires_grad_()
    loss = LOSSES[row](meta['class_counts'], tau)(z, io['labels'])
    loss.backward()
    assert close(loss.item(), meta['values'][name], 1e-4)
    assert (z.grad - io[f'grad_{name}']).abs().max() < 1e-6

@pytest.mark.parametrize('schedule', MDA_SCHEDULES)
@pytest.mark.parametrize('epochs', [5, 10])
def test_schedule(schedule, epochs):
    want = json.loads((reference/'schedules.json').read_text())['mda_min_scale'][f'{schedule}_{epochs}']
    assert np.allclose([min_scale(e, epochs, schedule) for e in range(epochs)], want)

@pytest.mark.parametrize('factor', [.1, .02, .01])
def test_cifar_subset(factor):
    want = json.loads((reference/'schedules.json').read_text())['cifar100_lt']['subsets'][str(factor)]
    labels = np.random.RandomState(42).permutation(np.repeat(np.arange(100), 500))
    counts = long_tail_counts(500, 100, factor)
    picks = long_tail_subset(labels, counts)
    assert counts == want['counts'] and len(picks) == want['total'] and int(picks.sum()) == want['sum']
    assert picks[:20].tolist() == want['first20'] and picks[-5:].tolist() == want['last5']
