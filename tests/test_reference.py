"Equality with the numbers in `reference/`: what the original program computes on tiny random models"
import json, os
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer

from lift_nb.data.crops import MDA_SCHEDULES, min_scale
from lift_nb.models.backbones import create_backbone
from lift_nb.data.dataset import long_tail_counts, long_tail_subset
from lift_nb.models.heads import create_head
from lift_nb.original.checkpoints import load_original, _original_state, save_original
from lift_nb.models.model import LiftModel
from lift_nb.training.losses import LOSSES
from lift_nb.models.surgery import first_token_only, n_trainable
from lift_nb.models.text_heads import zero_shot_head

reference = Path(os.environ.get('LIFT_NB_REFERENCE', Path(__file__).parents[2]/'shared'/'reference'))
pytestmark = pytest.mark.skipif(not reference.is_dir(), reason=f'the reference numbers are not at {reference}; set LIFT_NB_REFERENCE')

HEAD_NAMES = dict(CosineClassifier='cosine', LinearClassifier='linear', L2NormClassifier='l2norm', LayerNormClassifier='layernorm', none=None)
CASES = sorted(d.name for d in reference.glob('*__*')) if reference.is_dir() else []
TIMM = dict(timm_vit=lambda: VisionTransformer(img_size=32, patch_size=8, embed_dim=96, depth=3, num_heads=3, num_classes=5),
            timm_rn=lambda: ResNet(BasicBlock, (1, 1, 1, 1), channels=(16, 32, 32, 64), num_classes=5))

def read(case):
    d = reference/case
    before = load_file(d/'tuner_before.safetensors') if (d/'tuner_before.safetensors').exists() else {}
    return json.loads((d/'meta.json').read_text()), load_file(d/'io.safetensors'), before, d/'checkpoint.pth.tar'

def backbone_of(name):
    "A state dict in OpenAI's naming, or a timm model"
    sd = load_file(reference/f'backbone_{name}.safetensors')
    if name not in TIMM: return sd
    model = TIMM[name]()
    model.load_state_dict(sd)
    return model

def model_of(checkpoint, meta):
    return load_original(checkpoint, backbone_of(meta['backbone']), meta['classnames'], meta['template'], HEAD_NAMES[meta['head']])

def close(a, b, tol): return abs(a-b) <= tol*max(1, abs(b))

def train(model, io, meta):
    "The five steps; yields losses and gradient norms"
    tuned = [p for p in model.parameters() if p.requires_grad]
    loss, opt = LOSSES['la'](meta['class_counts']), torch.optim.SGD(tuned, lr=.005, momentum=.9, weight_decay=5e-4)
    for _ in meta['losses']:
        opt.zero_grad()
        l = loss(model(io['images']), io['labels'])
        l.backward()
        yield l.item(), torch.cat([p.grad.flatten() for p in tuned]).norm().item()
        opt.step()

def test_all_cases_are_here(): assert len(CASES) == 48

@pytest.mark.parametrize('short', [False, True], ids=['all-tokens', 'class-token'])
@pytest.mark.parametrize('case', CASES)
def test_case(case, short):
    "Parameter count, logits, losses, gradients, trained tensors; once more with only the class token in the last block"
    meta, io, before, checkpoint = read(case)
    model = model_of(before, meta)
    if first_token_only(model.backbone, short) != short: pytest.skip('a ResNet has no class token')
    assert n_trainable(model) == meta['tuned_params']
    assert (model(io['images']) - io['logits_before']).abs().max() < 1e-4
    if not before: return
    for (l, norm), want, want_norm in zip(train(model, io, meta), meta['losses'], meta['grad_norms']):
        assert close(l, want, 1e-4) and close(norm, want_norm, 1e-3)
    assert (model(io['images']) - io['logits_after']).abs().max() < 1e-4
    theirs = torch.load(checkpoint, weights_only=True)['tuner']
    ours = _original_state(model)
    assert ours.keys() == theirs.keys()
    for k, v in ours.items(): assert v.dtype == theirs[k].dtype and (v.float() - theirs[k].float()).abs().max() < 1e-4, k

@pytest.mark.parametrize('case', CASES)
def test_checkpoint_round_trip(case, tmp_path):
    "The original's own file gives its logits; written back, it holds the same tensors"
    meta, io, before, checkpoint = read(case)
    model = model_of(checkpoint, meta)
    assert (model(io['images']) - io['logits_after']).abs().max() < 1e-4
    save_original(model, tmp_path/'c.pth.tar')
    theirs, ours = (torch.load(f, weights_only=True)['tuner'] for f in (checkpoint, tmp_path/'c.pth.tar'))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)

@pytest.mark.parametrize('backbone', ['clip_vit', 'clip_rn'])
def test_semantic_start(backbone):
    meta, io, before, _ = read(f'{backbone}__lp')
    b = create_backbone(backbone_of(backbone))
    head = create_head('cosine', b, meta['classnames'], 'semantic', template=meta['template'])
    assert (head.weight - before['classifier.weight']).abs().max() < 1e-5

@pytest.mark.parametrize('backbone', ['clip_vit', 'clip_rn'])
def test_zero_shot(backbone):
    meta, io, *_ = read(f'{backbone}__zeroshot')
    b = create_backbone(backbone_of(backbone))
    model = LiftModel(b.model, zero_shot_head(b, meta['classnames'], meta['template']))
    assert n_trainable(model) == meta['tuned_params'] == 0
    assert (model(io['images']) - io['logits_before']).abs().max() < 1e-4

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
