"What a trained network saw of an image is what its saved predictor sees: opened, scaled, turned, cropped and normalised alike"
from io import BytesIO
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import ImageDataLoaders, PILImage, Resize, ResizeMethod
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from PIL import Image

from lift_nb.cli import main
from lift_nb.core.errors import LiftError
from lift_nb.data.dataset import from_arrays
from lift_nb.data.folders import from_folder
from lift_nb.learner import lift_plus_learner
from lift_nb.models.saved import save_lift
from lift_nb.predictor import load_lift

def made(data, folder, **options):
    "A learner with a head that tells images apart, and its saved predictor"
    learn = lift_plus_learner(data, 'tiny_clip', batch_size=8, device='cpu', num_workers=0, **options)
    save_lift(folder/'m.safetensors', learn)
    return learn, load_lift(folder/'m.safetensors', device='cpu')

def same(learn, p, images, **kwargs):
    with learn.no_bar(): want = learn.logits(**kwargs)[0]
    return (p.logits(images, **kwargs) - want).abs().max() < 1e-4

def picture(rng, mode, size):
    "Random pixels of any of Pillow's modes"
    x = rng.integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    if mode == 'I;16': return Image.fromarray(x[..., 0].astype(np.uint16)*16)
    if mode == 'F': return Image.fromarray(x[..., 0].astype(np.float32)*16)
    if mode == 'P': return Image.fromarray(x[..., :3]).quantize(16)
    return Image.fromarray(x[..., 0] > 127) if mode == '1' else Image.fromarray(x).convert(mode)

sizes = st.tuples(*[st.integers(1, 70)]*2) | st.sampled_from([(1, 300), (300, 1), (40, 40), (39, 46), (32, 32)])
odd = st.tuples(st.sampled_from(['L', 'LA', 'RGB', 'RGBA', 'P', 'CMYK', '1', 'I;16']), sizes, st.integers(0, 9), st.sampled_from(['png', 'tif', 'jpg', 'webp']))

def saved_as(im, path, turn):
    "Save with an EXIF orientation, as PNG where the format has no such pixels"
    exif = Image.Exif(); exif[0x0112] = turn
    try: im.save(path, exif=exif)
    except (OSError, KeyError, ValueError):
        path.unlink(missing_ok=True)
        path = path.with_suffix('.png')
        (im.convert('RGB') if im.mode == 'CMYK' else im).save(path, exif=exif)
    return path

@settings(max_examples=12, deadline=None, suppress_health_check=[*HealthCheck], database=None, phases=[Phase.generate])
@given(kinds=st.lists(odd, min_size=4, max_size=8), expand=st.integers(0, 9), seed=st.integers(0, 2**20))
def test_odd_images_from_files(kinds, expand, seed, tmp_path_factory):
    "Modes, transparency, palettes, orientations, 12 bits, extreme shapes: the same logits from paths, bytes and PIL images, with one crop and five"
    root, rng = tmp_path_factory.mktemp('odd'), np.random.default_rng(seed)
    for part in ('train', 'test'):
        for i, (mode, size, turn, suffix) in enumerate(kinds):
            (root/part/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
            saved_as(picture(rng, mode, size), root/part/'ab'[i % 2]/f'{i}.{suffix}', turn)
    learn, p = made(from_folder(root, max_value=4095), root, expand=expand)
    files = [Path(f) for f in learn.data.test_images]
    assert p.max_value == 4095 and p.crop.expand == expand
    assert same(learn, p, files) and same(learn, p, files, tte=True, expand=3)
    opened = [Image.open(BytesIO(f.read_bytes())) for f in files]
    assert same(learn, p, [f.read_bytes() for f in files]) and same(learn, p, opened)

@pytest.mark.parametrize('dtype, top', [(np.uint8, None), (np.uint8, 15), (np.uint16, 4095), (np.uint16, None), (np.int64, 16), (np.float32, 1.), (np.float64, 300.)])
def test_arrays_of_any_range(dtype, top, tmp_path):
    "The array that was trained on, given to the predictor as it is"
    x = np.random.default_rng(0).random((8, 20, 24))
    x = (x*(top or np.iinfo(dtype).max)).astype(dtype)
    learn, p = made(from_arrays(x, np.arange(8) % 2, x, np.arange(8) % 2, 'ab', max_value=top), tmp_path, expand=0)
    assert same(learn, p, list(x)) and same(learn, p, x)
    with learn.no_bar(): assert torch.allclose(learn.predict(x[0])[2], p.logits(x[:1]).softmax(-1)[0], atol=1e-4)

def test_twelve_bits_through_the_shell(tmp_path, monkeypatch, capsys):
    "A training with max_value, and `predict` on the same files"
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part in ('train', 'test'):
        for c in 'ab':
            (tmp_path/'x'/part/c).mkdir(parents=True)
            for i in range(4): Image.fromarray(rng.integers(0, 4096, (40, 40)).astype(np.uint16)//(1 + 3*(c == 'a'))).save(tmp_path/'x'/part/c/f'{i}.png')
    words = '-b tiny_clip --epochs 4 --batch_size 4 --max_value 4095 --expand 0 --output_dir run --device cpu'.split()
    assert main(['train', 'x', *words]) == 0 and main(['predict', 'run', 'x/test', '--out', 'p.csv']) == 0
    ran, said = pd.read_csv('run/predictions.csv'), pd.read_csv('p.csv')
    assert list(said['class']) == [c for _, c in sorted(zip(ran['image'], ran['prediction_name']))]

@pytest.mark.parametrize('transforms, known', [([], True), ([Resize(32)], False), ([Resize(32, ResizeMethod.Squish)], False), ([Resize(48)], False)])
def test_transforms_of_ones_own(transforms, known, tmp_path):
    "DataLoaders whose images a predictor cannot make are refused until their crop is given; then the logits are the same"
    rng = np.random.default_rng(0)
    side = (32, 32) if not transforms else (50, 38)
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(10): Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)).save(tmp_path/c/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.4, seed=0, bs=4, num_workers=0, item_tfms=transforms, device='cpu')
    learn = lift_plus_learner(dls, 'tiny_clip', init='none')
    save_lift(tmp_path/'m.safetensors', learn)
    files = list(dls.valid_ds.items)
    if known: assert same(learn, load_lift(tmp_path/'m.safetensors', device='cpu'), files)
    else:
        with pytest.raises(LiftError, match='went through transforms that a file cannot name .*Resize'): load_lift(tmp_path/'m.safetensors')
        if transforms[0].size[0] == 32:
            p = load_lift(tmp_path/'m.safetensors', device='cpu', crop=lambda x: dls.valid.after_item.fs[0](PILImage.create(np.asarray(x)), split_idx=1))
            assert same(learn, p, files)
    with pytest.raises(LiftError, match='crop must return a PIL image of 32'): load_lift(tmp_path/'m.safetensors', crop=lambda x: x.resize((9, 9))).predict(files)
