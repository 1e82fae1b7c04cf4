"CLIP's ResNets and files of a CLIP: equal to the reference and to open_clip's network, of any size, whole or refused in one sentence"
import json, os, pickle, random, re, tempfile
from argparse import Namespace
from pathlib import Path

import pytest, timm, torch
from hypothesis import given, settings, strategies as st
from open_clip.model import CLIP
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import load_file, save_file
from timm.layers import QuickGELU
from torch import nn
from torch.nn.functional import normalize

from lift_nb.core.catalog import BACKBONES
from lift_nb.models.blocks import _FEATURE_SLOT, _QuickGELU, blocks, _memory_saving_activations, _lookup_class, _slot
from lift_nb.models.clip import _clip_backbone, _clip_rn_from, _clip_vit_from
from lift_nb.models.backbones import create_backbone, _timm_model
from lift_nb.core.errors import LiftError
from lift_nb.models.text_heads import zero_shot_head
from lift_nb.models.text import text_tower

reference = Path(os.environ.get('LIFT_NB_REFERENCE', Path(__file__).parents[2]/'shared'/'reference'))
needs_reference = pytest.mark.skipif(not reference.is_dir(), reason=f'the reference numbers are not at {reference}; set LIFT_NB_REFERENCE')
few = settings(max_examples=10, deadline=None)

def scatter(model, seed=0):
    "Random vectors too: BatchNorm statistics, scales and biases"
    torch.manual_seed(seed)
    for p in model.state_dict().values():
        if p.is_floating_point() and p.ndim == 1: p.uniform_(.5, 1.5)
    return model.eval()

def their_rn(layers=(1, 1, 1, 1), width=4, size=64, joint=24, seed=0):
    return scatter(ModifiedResNet(layers=list(layers), output_dim=joint, heads=width//2, image_size=size, width=width), seed)

def visual(model): return {f'visual.{k}': v.clone() for k, v in model.state_dict().items()}

def their_clip(vision, seed=0):
    return scatter(CLIP(24, vision, dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=1), quick_gelu=True), seed)

SWAPS = ((r'stem\.conv(\d)\.conv', r'conv\1'), (r'stem\.conv(\d)\.bn', r'bn\1'), (r'shortcut\.conv\.conv', 'downsample.0'),
         (r'shortcut\.conv\.bn', 'downsample.1'), (r'conv(\d)_\w+?\.conv', r'conv\1'), (r'conv(\d)_\w+?\.bn', r'bn\1'),
         (r'head\.([qkv])\.', r'attnpool.\1_proj.'), (r'head\.proj', 'attnpool.c_proj'), (r'head\.pos_embed', 'attnpool.positional_embedding'))

def openai_name(name):
    "OpenAI's name of a tensor of timm's ResNet"
    for ours, theirs in SWAPS: name = re.sub(ours, theirs, name)
    return 'visual.' + re.sub(r'stages\.(\d)', lambda m: f'layer{int(m[1])+1}', name)

def read(case): return json.loads((reference/case/'meta.json').read_text()), load_file(reference/case/'io.safetensors')

@needs_reference
@pytest.mark.parametrize('name', ['clip_rn', 'timm_rn'])
def test_reference_features(name):
    _, io = read(f'{name}__lp')
    file, rows = reference/f'backbone_{name}.safetensors', load_file(reference/f'{name}__lp/tuner_before.safetensors')['classifier.weight']
    if name == 'timm_rn':
        model = timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(16, 32, 32, 64), num_classes=5)
        model.load_state_dict(load_file(file))
    b = create_backbone(file if name == 'clip_rn' else model)
    assert b.n_features == rows.shape[1]
    assert (25*normalize(b.model(io['images']), dim=-1) @ normalize(rows, dim=-1).T - io['logits_before']).abs().max() < 1e-4

@needs_reference
def test_reference_zero_shot():
    meta, io = read('clip_rn__zeroshot')
    b = create_backbone(str(reference/'backbone_clip_rn.safetensors'))
    assert b.image_proj is None and b.resolution == 64 and b.init == 'semantic'
    logits = zero_shot_head(b, meta['classnames'], meta['template'])(b.model(io['images']))
    assert (logits - io['logits_before']).abs().max() < 1e-4

@needs_reference
@pytest.mark.parametrize('name', ['clip_rn', 'timm_rn'])
def test_reference_block_names(name):
    "The original's numbers of the blocks are ours"
    tuned = load_file(reference/f'{name}__bitfit/tuner_before.safetensors')
    names = [m for k in tuned if (m := re.match(r'image_encoder\.blocks\.(\d+)_', k))]
    if name == 'clip_rn': model = _clip_rn_from(load_file(reference/'backbone_clip_rn.safetensors'))
    else: model = timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(16, 32, 32, 64), num_classes=0)
    assert len(blocks(model)) == 1 + max(int(m[1]) for m in names)
    for i, b in enumerate(blocks(model)):
        theirs = [v.numel() for k, v in tuned.items() if k.startswith(f'image_encoder.blocks.{i}_')]
        assert sorted(p.numel() for n, p in b.named_parameters() if n.endswith('bias')) == sorted(theirs)

@few
@given(layers=st.tuples(*[st.integers(1, 2)]*4), width=st.sampled_from([2, 4, 6, 10, 16]), size=st.sampled_from([32, 64, 96]), joint=st.integers(1, 40),
       half=st.booleans(), seed=st.integers(0, 99))
def test_rn_of_any_size(layers, width, size, joint, half, seed):
    "open_clip's form of the network gives the same features; every tensor goes there and back"
    theirs = their_rn(layers, width, size, joint, seed)
    if half: theirs.half().float()
    sd, x = visual(theirs), torch.randn(2, 3, size, size)
    b = create_backbone({k: v.half() if half and v.is_floating_point() else v for k, v in sd.items()})
    assert (b.resolution, b.n_features, len(blocks(b.model))) == (size, joint, sum(layers))
    assert torch.allclose(b.model(x), theirs(x), rtol=1e-4, atol=1e-4)
    back = {openai_name(k): v for k, v in b.model.state_dict().items()}
    assert back.keys() == sd.keys() and all(torch.equal(back[k], sd[k]) for k in sd)

def test_rn_resolution():
    "Resampled positions once, instead of in every forward; a pickle is the same model"
    sd, x = visual(their_rn()), torch.randn(2, 3, 96, 96)
    b = create_backbone(sd, resolution=96)
    assert b.resolution == 96 and b.model.head.pos_embed.shape[0] == 10
    assert torch.allclose(b.model(x), create_backbone(sd).model(x), atol=1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(b.model))(x), b.model(x))

def test_named_rn_resolution():
    "A checkpoint for a name of the table is read at its own size and resampled afterwards"
    sd = visual(ModifiedResNet(layers=[3, 4, 6, 3], output_dim=1024, heads=32, image_size=224, width=64))
    model = _timm_model('clip_rn50', BACKBONES['clip_rn50'], sd, False, 64)
    assert model.head.pos_embed.shape == (5, 2048) and model(torch.zeros(1, 3, 64, 64)).shape == (1, 1024)
    with pytest.raises(LiftError, match='multiple of 32 pixels, not 80'): create_backbone('clip_rn50', pretrained=False, resolution=80)

VISIONS = {'ViT': dict(layers=2, width=64, patch_size=8, image_size=32, head_width=32),
           'ResNet': dict(layers=(1, 1, 1, 1), width=4, image_size=64, head_width=64)}

@pytest.mark.parametrize('kind', VISIONS)
@pytest.mark.parametrize('suffix', ['safetensors', 'pt'])
def test_files(kind, suffix, tmp_path):
    "A file gives what its state dict gives; scalars, half precision and a sparse token embedding are read too"
    model, size = their_clip(VISIONS[kind]), VISIONS[kind]['image_size']
    model.half().float()
    with torch.no_grad(): model.token_embedding.weight[300:49000].zero_()
    sd = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    rows, x = torch.tensor([*range(300), *range(49000, 49408)]), torch.randn(2, 3, size, size)
    sd.update({'token_embedding.rows': rows, 'token_embedding.values': sd.pop('token_embedding.weight')[rows],
               **{k: torch.tensor(n) for k, n in dict(input_resolution=size, context_length=77, vocab_size=49408).items()}})
    file = tmp_path/f'clip.{suffix}'
    (save_file if suffix == 'safetensors' else torch.save)(sd, file)
    b = create_backbone(file)
    assert b.weights == b.name == str(file) and b.resolution == size
    joint = b.model(x) if b.image_proj is None else b.model(x) @ b.image_proj
    assert torch.allclose(joint, model.encode_image(x), rtol=1e-3, atol=1e-3)
    assert torch.equal(create_backbone(sd).model(x), b.model(x)) and torch.equal(create_backbone(str(file)).model(x), b.model(x))
    assert torch.equal(text_tower(b).token_embedding.weight, model.token_embedding.weight)
    bigger = create_backbone(file, resolution=2*size)
    assert bigger.resolution == 2*size and bigger.model(torch.zeros(1, 3, 2*size, 2*size)).shape == (1, b.n_features)

@pytest.mark.parametrize('kind', VISIONS)
def test_bad_state_dicts(kind):
    "Each tensor in turn missing, of another shape, no tensor: always one sentence"
    sd = {k: v for k, v in their_clip(VISIONS[kind]).state_dict().items() if k.startswith('visual.')}
    _clip_backbone(sd)
    for k in (k for k in sd if not k.endswith('num_batches_tracked')):
        rest = {n: v for n, v in sd.items() if n != k}
        for bad in rest, {**rest, k: torch.ones(3, 5, 7)}, {**rest, k: torch.ones(sd[k].numel() + 1)}, {**rest, k: 'x'}:
            with pytest.raises(LiftError, match='CLIP|positional embedding|heads') as e: _clip_backbone(bad)
            assert '\n' not in str(e.value) and len(str(e.value)) < 500
    with pytest.raises(LiftError, match='do not make a CLIP'): _clip_backbone({**sd, 'visual.unknown': torch.ones(1)})

def test_bad_positions():
    sd = visual(their_rn())
    with pytest.raises(LiftError, match='The 7 rows'): _clip_rn_from({**sd, 'visual.attnpool.positional_embedding': torch.ones(7, 128)})
    with pytest.raises(LiftError, match='96 wide'): _clip_rn_from({**sd, 'visual.attnpool.q_proj.weight': torch.ones(96, 128)})
    for resolution in 0, -32, 31, 80:
        with pytest.raises(LiftError, match='multiple of 32'): _clip_rn_from(sd, resolution)

def test_bad_inputs(tmp_path):
    rn, timm_sd = visual(their_rn()), timm.create_model('vit_tiny_patch16_224', depth=1).state_dict()
    with pytest.raises(LiftError, match='neither that of a CLIP vision transformer nor that of a CLIP ResNet'): create_backbone(timm_sd)
    with pytest.raises(LiftError, match='not that of a CLIP vision transformer'): _clip_vit_from(rn)
    with pytest.raises(LiftError, match='not that of a CLIP ResNet'): _clip_rn_from({})
    for sd in {}, {'visual.layer1.0.conv1.weight': torch.ones(1)}, {'visual.transformer.x': torch.ones(1)}:
        with pytest.raises(LiftError): create_backbone(sd)
    file = tmp_path/'resnet50.safetensors' # begins like a timm name
    save_file(rn, file)
    for name in rn, file, str(file):
        for option in dict(checkpoint=file), dict(pretrained=False):
            with pytest.raises(LiftError, match='belong to the name of a backbone'): create_backbone(name, **option)
    with pytest.raises(LiftError, match='There is no file of weights'): create_backbone(tmp_path/'none.pt')
    with pytest.raises(LiftError, match='There is no file of weights'): create_backbone(tmp_path)
    with pytest.raises(LiftError, match='Unknown backbone.*or give the file of a CLIP'): create_backbone(str(tmp_path/'none.pt'))
    for resolution in 0, -8, 33.5, '64', True:
        with pytest.raises(LiftError, match='number of pixels'): create_backbone(rn, resolution=resolution)
    for name in None, 3, [], 'x\0y', 'x'*5000:
        with pytest.raises(LiftError): create_backbone(name)

def test_a_name_is_no_file(tmp_path, monkeypatch):
    "A file that happens to be called like a row of the table does not take its place"
    monkeypatch.chdir(tmp_path)
    Path('tiny_clip').write_bytes(b'junk')
    assert create_backbone('tiny_clip').weights == 'embedded'

def byob(**kwargs): return timm.create_model('resnet50_clip', num_classes=16, img_size=64, **kwargs)
TOWERS = dict(clip=byob, clip_without_projection=lambda: byob(), byobnet=lambda: timm.create_model('resnet50_clip_gap', num_classes=0),
              repvgg=lambda: timm.create_model('repvgg_a0', num_classes=0), resnet=lambda: timm.create_model('resnet18', num_classes=0))

@pytest.mark.parametrize('name', TOWERS)
def test_feature_slot(name):
    "What stands behind the feature slot sees the pooled feature, in the plain forward"
    model, x = TOWERS[name]().eval(), torch.randn(2, 3, 64, 64)
    if name == 'clip_without_projection': model.reset_classifier(0)
    feature, attr = model(x), _lookup_class(_FEATURE_SLOT, model)
    setattr(model, attr, nn.Sequential(getattr(model, attr), nn.Tanh()))
    assert feature.ndim == 2 and torch.equal(model(x), feature.tanh())

@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'resnet50_clip', 'repvgg_a0'])
def test_slots_of_residual_blocks(name):
    model = timm.create_model(name)
    stages = model.stages if hasattr(model, 'stages') else (model.layer1, model.layer2, model.layer3, model.layer4)
    assert len(blocks(model)) == sum(map(len, stages)) and blocks(model)[-1] is stages[-1][-1]
    hint = 'known blocks are' if name == 'repvgg_a0' else 'of the modules ssf, bitfit, bn and fft work there'
    first = blocks(model)[0]
    with pytest.raises(LiftError, match=f"'lora' cannot go on a block of class {type(first).__name__}: .*'qkv'; {hint}"): _slot(first, 'qkv', 'lora')

@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=20))
def test_lean_quick_gelu(values):
    x, y = (torch.tensor(values, requires_grad=True) for _ in range(2))
    a, b = QuickGELU()(x), _QuickGELU()(y)
    (a.sum() + b.sum()).backward()
    assert torch.allclose(a, b, rtol=1e-6, atol=1e-6) and torch.allclose(x.grad, y.grad, rtol=1e-5, atol=1e-6)

def saved(model, x):
    "Bytes that autograd keeps for the backward pass, each storage once"
    found = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.update({t.data_ptr(): t.nbytes}) or t, lambda t: t): model(x)
    return sum(found.values())

def test_saved_tensors_halve():
    x, m = torch.randn(2, 5, 32, requires_grad=True), nn.Sequential(QuickGELU())
    assert saved(m, x) == 2*x.nbytes and saved(_memory_saving_activations(m), x) == x.nbytes
    vit = _clip_vit_from(their_clip(VISIONS['ViT']).state_dict()).requires_grad_(False)
    x, hidden = torch.randn(2, 3, 32, 32, requires_grad=True), 2*17*256*4
    full, feature = saved(vit, x), vit(x)
    assert full - saved(_memory_saving_activations(vit), x) == len(blocks(vit))*hidden and torch.allclose(vit(x), feature, atol=1e-5)

def test_lean_where_it_belongs():
    quick, plain = create_backbone('tiny_clip').model, create_backbone('vit_tiny_patch16_224', pretrained=False).model
    assert all(isinstance(b.mlp.act, _QuickGELU) for b in blocks(quick)) and all(type(b.mlp.act) is nn.GELU for b in blocks(plain))
    assert all(isinstance(b.mlp.act, _QuickGELU) for b in _memory_saving_activations(text_tower(create_backbone('tiny_clip'))).blocks)

# --- weights of somebody else ------------------------------------------------------------------------------------------
TINY = 'vit_tiny_patch16_224'
def fresh(name=TINY, **kwargs):
    torch.manual_seed(1)
    return scatter(timm.create_model(name, **kwargs))

def feature(m, x): return m.forward_head(m.forward_features(x), pre_logits=True)

def taken(found, m, name=TINY, size=224):
    "Does the checkpoint give exactly the features of `m`?"
    with tempfile.TemporaryDirectory() as d:
        torch.save(found, f'{d}/x.pth')
        b = create_backbone(name, checkpoint=f'{d}/x.pth')
    x = torch.randn(1, 3, size, size)
    with torch.no_grad(): return torch.allclose(b.model(x), feature(m, x), atol=1e-4)

NAME = 'resnet10t'
PREFIXES = ['', 'model.', 'module.', 'backbone.', 'encoder.', 'net.', 'student.', 'teacher.', 'module.backbone.', 'model.visual.net.', 'something_else.']
CONTAINERS = [None, 'state_dict', 'model', 'model_state_dict', 'weights', 'teacher', 'net', 'anything']

@settings(max_examples=int(25*float(os.environ.get('FUZZ', 1))), deadline=None)
@given(prefix=st.sampled_from(PREFIXES), container=st.sampled_from(CONTAINERS), drop=st.integers(0, 2), rename=st.integers(0, 2), extra=st.booleans(), seed=st.integers(0, 99))
def test_renamed_and_omitted(prefix, container, drop, rename, extra, seed):
    "Known and unknown prefixes and containers are loaded exactly; a tensor less, or under another name, is refused"
    rng, m = random.Random(seed), fresh(NAME, num_classes=3)
    sd, needed = dict(m.state_dict()), [k for k in m.state_dict() if not k.startswith('fc.') and 'num_batches' not in k]
    for k in rng.sample(needed, drop): del sd[k]
    for k in rng.sample([k for k in needed if k in sd], rename): sd[k.replace('.', '_')] = sd.pop(k)
    if extra: sd = {k: v for k, v in sd.items() if not k.startswith('fc.')} # a checkpoint without classifier
    sd = {prefix + k: v for k, v in sd.items()}
    found = sd if container is None else {container: sd, 'epoch': 3, 'optimizer': {'state': {}, 'lr': .1}, 'args': Namespace(lr=1)}
    if not drop and not rename: assert taken(found, m, NAME)
    else:
        with pytest.raises(LiftError, match='missing') as e: taken(found, m, NAME)
        assert '\n' not in str(e.value) and len(str(e.value)) < 600

def test_averaged_weights_come_first():
    a, b = fresh(NAME, num_classes=3), scatter(timm.create_model(NAME, num_classes=3), 5)
    assert taken({'model': b.state_dict(), 'model_ema': a.state_dict()}, a, NAME)
    dino = {side: {f'module.backbone.{k}': v for k, v in m.state_dict().items()} | {'module.head.mlp.0.weight': torch.ones(2, 2)}
            for side, m in (('student', b), ('teacher', a))}
    assert taken(dino, a, NAME)

def hf_vit(sd, dino):
    "A timm state dict under Hugging Face's names"
    out, table = {}, dict(cls_token='embeddings.cls_token', pos_embed='embeddings.position_embeddings')
    block = {'attn.proj': 'attention.output.dense', 'norm1': 'norm1' if dino else 'layernorm_before', 'norm2': 'norm2' if dino else 'layernorm_after',
             'mlp.fc1': 'mlp.fc1' if dino else 'intermediate.dense', 'mlp.fc2': 'mlp.fc2' if dino else 'output.dense',
             'ls1.gamma': 'layer_scale1.lambda1', 'ls2.gamma': 'layer_scale2.lambda1'}
    for k, v in sd.items():
        if k.startswith('head'): continue
        if m := re.match(r'blocks\.(\d+)\.(.*)', k):
            at = f'encoder.layer.{m[1]}.'
            if m[2].startswith('attn.qkv.'):
                for n, t in zip(('query', 'key', 'value'), v.chunk(3)): out[f'{at}attention.attention.{n}.{m[2].split(".")[-1]}'] = t
            else: out[at + next(m[2].replace(a, b) for a, b in block.items() if m[2].startswith(a))] = v
        else: out[table.get(k) or k.replace('patch_embed.proj', 'embeddings.patch_embeddings.projection').replace('norm.', 'layernorm.')] = v
    return out

@pytest.mark.parametrize('prefix', ['', 'vit.', 'model.dinov2.'])
@pytest.mark.parametrize('dino', [False, True])
def test_names_of_hugging_face(prefix, dino):
    name = 'vit_small_patch14_dinov2' if dino else TINY
    m = fresh(name, num_classes=0)
    sd = {prefix + k: v for k, v in hf_vit(m.state_dict(), dino).items()} | {'classifier.weight': torch.ones(3, 4)} | \
        ({f'{prefix}embeddings.mask_token': torch.ones(1, 4)} if dino else {f'{prefix}pooler.dense.weight': torch.ones(4, 4)})
    assert taken(sd, m, name, 518 if dino else 224)
    del sd[prefix + 'encoder.layer.1.attention.attention.key.weight']
    with pytest.raises(LiftError, match='blocks.1.attn.qkv.weight'): taken(sd, m, name)

def hf_clip(sd, width, prefix=''):
    "OpenAI's state dict under Hugging Face's names"
    out, swap = {}, (('visual.transformer.resblocks', 'vision_model.encoder.layers'), ('transformer.resblocks', 'text_model.encoder.layers'),
        ('visual.class_embedding', 'vision_model.embeddings.class_embedding'), ('visual.conv1', 'vision_model.embeddings.patch_embedding'),
        ('visual.positional_embedding', 'vision_model.embeddings.position_embedding.weight'), ('visual.ln_pre', 'vision_model.pre_layrnorm'),
        ('visual.ln_post', 'vision_model.post_layernorm'), ('token_embedding', 'text_model.embeddings.token_embedding'),
        ('positional_embedding', 'text_model.embeddings.position_embedding.weight'), ('ln_final', 'text_model.final_layer_norm'))
    inner = (('attn.out_proj', 'self_attn.out_proj'), ('ln_1', 'layer_norm1'), ('ln_2', 'layer_norm2'), ('mlp.c_fc', 'mlp.fc1'), ('mlp.c_proj', 'mlp.fc2'))
    for k, v in sd.items():
        if k in ('visual.proj', 'text_projection'): out[dict(zip(('visual.proj', 'text_projection'), ('visual_projection.weight', 'text_projection.weight')))[k]] = v.T
        else:
            new = next((b + k[len(a):] for a, b in swap if k.startswith(a)), k)
            for a, b in inner: new = new.replace(a, b)
            if 'attn.in_proj_' in new:
                for n, t in zip('qkv', v.chunk(3)): out[new.replace('attn.in_proj_', f'self_attn.{n}_proj.')] = t
            else: out[new] = v
    return {prefix + k: v for k, v in out.items()}

def test_clip_of_hugging_face(tmp_path):
    "Both towers"
    sd = their_clip(VISIONS['ViT']).state_dict()
    want = create_backbone(dict(sd)); x = torch.randn(2, 3, 32, 32)
    for prefix in '', 'model.':
        save_file({k: v.contiguous() for k, v in hf_clip(sd, 64, prefix).items()}, tmp_path/'x.safetensors')
        b = create_backbone(tmp_path/'x.safetensors')
        assert torch.equal(b.model(x), want.model(x)) and torch.equal(b.image_proj, want.image_proj)
        assert torch.equal(text_tower(b)(torch.tensor([[49406, 5, 49407]])), text_tower(want)(torch.tensor([[49406, 5, 49407]])))

def test_other_sizes_are_refused():
    for other in dict(patch_size=32), dict(depth=11), dict(depth=13), dict(embed_dim=96), dict(init_values=.1):
        with pytest.raises(LiftError, match='does not fit'): taken(fresh(**other).state_dict(), None)
    with pytest.raises(LiftError, match='no tensors'): taken({}, None)
    with pytest.raises(LiftError, match="timm knows no weights 'nonsense'.*augreg_in21k"): create_backbone('vit_tiny_patch16_224.nonsense', pretrained=False)
