"Your own images: every kind of file, name and accident, from the folder through Python and the shell to the report"
import json, os, subprocess, sys
from pathlib import Path
from unicodedata import normalize

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from lift_nb.core.errors import LiftError
from lift_nb.data.loaders import dataloaders
from lift_nb.data.dataset import LongTailData, from_arrays, long_tail_counts, long_tail_subset
from lift_nb.data.lists import _clean_name, _in_order, _name_classes
from lift_nb.data.folders import from_folder, make_long_tailed
from lift_nb.data.tables import _from_path, from_table
from lift_nb.data.images import _all_image_facts, _image_facts_once, open_image
from lift_nb.data.inspection import _print_report, inspect, _meaningless_names
from lift_nb.learner import lift_plus_learner

few = settings(max_examples=20, deadline=None)
NFD_CAFE, NFC_CAFE = normalize('NFD', 'café au lait'), normalize('NFC', 'café au lait')
GREY, RGB = np.tile(np.arange(64, dtype=np.uint8)*4, (48, 1)), np.random.RandomState(0).randint(0, 255, (48, 64, 3), dtype=np.uint8)

def fails(f, *parts):
    "`f` raises a `LiftError` of one line with all `parts`"
    with pytest.raises(LiftError) as e: f()
    assert all(p in str(e.value) for p in parts) and '\n' not in str(e.value), str(e.value)

def noise(i, size=(40, 36)): return Image.fromarray(np.random.RandomState(i).randint(0, 255, (*size, 3), dtype=np.uint8))

def save(im, path, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    im.save(path, **kwargs)

def kinds():
    "Name → how one odd but readable image is written"
    turned = noise(1); turned.getexif()[0x0112] = 6
    frames = [noise(2), noise(3)]
    return {'8.png': dict(im=Image.fromarray(GREY)), '16.png': dict(im=Image.fromarray(GREY.astype(np.uint16)*257)), 'one.png': dict(im=Image.fromarray(GREY > 99)),
        'alpha.png': dict(im=Image.fromarray(np.dstack([RGB, GREY]))), 'la.png': dict(im=Image.fromarray(GREY).convert('LA')), 'cmyk.jpg': dict(im=noise(4).convert('CMYK')),
        'palette.png': dict(im=noise(5).quantize(16)), 'exif.jpg': dict(im=turned, exif=turned.getexif()), 'moving.gif': dict(im=frames[0], save_all=True, append_images=frames[1:]),
        '16.tif': dict(im=Image.fromarray(GREY.astype(np.uint16)*257)), 'x.webp': dict(im=noise(6)), 'X Y.JPG': dict(im=noise(7)), 'x.bmp': dict(im=noise(8))}

def odd_folder(root, corrupt=True):
    "Every oddity: kinds of images, blanks, accents in two forms, numbers, one image, no test image, copies; and corrupt files"
    train, valid, n = root/'train', root/'valid', iter(range(100, 10**6))
    for name, how in kinds().items(): save(path=train/'all kinds'/name, **how)
    for name, k in {f'{NFD_CAFE}': 4, ' grey  cat/deeper': 6, '10': 3, '9': 3, 'кот': 2, 'lonely emu': 1, 'never tested': 5}.items():
        for _ in range(k): i = next(n); save(noise(i), train/name/f'{i} a.png')
    for name in ('all kinds', NFC_CAFE, 'grey cat', '10', '9', 'кот', 'lonely emu'):
        for _ in range(2): i = next(n); save(noise(i), valid/name/f'{i}.png')
    save(noise(4, (9, 9)), train/'9/tiny.png')
    for a, b in {'9/tiny.png': '10/again.png', 'all kinds/x.bmp': 'all kinds/copy.bmp'}.items(): (train/b).write_bytes((train/a).read_bytes())
    save(open_image(train/'all kinds/x.bmp'), valid/'all kinds/leak.png')
    (train/'.hidden').mkdir(); save(noise(0), train/'.hidden/a.png'); save(noise(0), train/'10/._a.png'); save(noise(0), train/'loose.png')
    (train/'10/Thumbs.db').touch(); (valid/'empty class').mkdir(); (train/'empty class').mkdir()
    if corrupt:
        cut = train/'grey cat/cut.jpg'; save(noise(9), cut); cut.write_bytes(cut.read_bytes()[:500])
        for f, what in {'train/grey cat/zero.png': b'', 'valid/9/text.jpg': b'no image', 'train/10/half.png': next((train/'кот').iterdir()).read_bytes()[:900]}.items(): (root/f).write_bytes(what)
    return root

@pytest.fixture(scope='module')
def odd(tmp_path_factory): return odd_folder(tmp_path_factory.mktemp('odd')/'my föld er')

@pytest.fixture(scope='module')
def readable(tmp_path_factory): return odd_folder(tmp_path_factory.mktemp('fine')/'my föld er', corrupt=False)

NAMES = ('9', '10', 'all kinds', NFC_CAFE, 'grey cat', 'lonely emu', 'never tested', 'кот')

# Images

@few
@given(st.integers(0, 2**32-1), st.sampled_from(['>u2', '<u2']), st.sampled_from([256, 257]))
def test_sixteen_bits_are_eight_bits_scaled(seed, dtype, factor):
    x = np.random.RandomState(seed).randint(0, 256, (7, 5), dtype=np.uint8)
    wide = x.astype(np.uint16)*factor
    for im in (wide.astype(dtype), Image.fromarray(wide), wide.astype(dtype)[..., None]):
        assert np.array_equal(np.asarray(open_image(im)), np.dstack([x]*3))

@few
@given(st.integers(0, 2**32-1))
def test_transparency_lies_on_white(seed):
    x = np.random.RandomState(seed).randint(0, 256, (7, 5, 4), dtype=np.uint8)
    a = x[..., 3:]/255
    assert np.abs(np.asarray(open_image(x)) - (x[..., :3]*a + 255*(1-a))).max() <= 1
    x[..., 3] = np.where(x[..., 3] > 127, 255, 0)
    want = np.where(x[..., 3:] > 0, x[..., :3], 255)
    assert np.array_equal(np.asarray(open_image(x)), want)

@pytest.mark.parametrize('turn', range(1, 9))
def test_every_orientation(turn, tmp_path):
    "A picture stored in any of the eight orientations looks the same"
    back = {1: (), 2: ('FLIP_LEFT_RIGHT',), 3: ('ROTATE_180',), 4: ('FLIP_TOP_BOTTOM',), 5: ('TRANSPOSE',), 6: ('ROTATE_90',), 7: ('TRANSVERSE',), 8: ('ROTATE_270',)}
    stored, exif = Image.fromarray(RGB), Image.Exif()
    for t in back[turn]: stored = stored.transpose(Image.Transpose[t])
    exif[0x0112] = turn
    stored.save(tmp_path/'a.png', exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path/'a.png')), RGB)

@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_a_broken_exif_block_is_no_reason_to_fail(tmp_path):
    Image.fromarray(RGB).save(tmp_path/'a.jpg', exif=b'Exif\0\0II*\0garbage that is no directory')
    assert open_image(tmp_path/'a.jpg').size == (64, 48)

def test_every_cut_is_found(tmp_path):
    "A file cut anywhere is either reported or, when nothing but its tail is gone, whole"
    for suffix in ('png', 'jpg', 'gif', 'webp', 'bmp', 'tif'):
        whole = tmp_path/f'whole.{suffix}'
        Image.fromarray(RGB).save(whole)
        pixels, stored = np.asarray(open_image(whole)), whole.read_bytes()
        for part in (0, .02, .3, .6, .9):
            (tmp_path/f'cut.{suffix}').write_bytes(stored[:int(part*len(stored))])
            look = _image_facts_once(tmp_path/f'cut.{suffix}')
            assert look.error or np.array_equal(np.asarray(open_image(tmp_path/f'cut.{suffix}')), pixels), (suffix, part)

def test_looking_in_parallel_keeps_the_order(tmp_path):
    for i in range(150): noise(i, (8+i, 9)).save(tmp_path/f'{i:03}.png')
    files = sorted(tmp_path.iterdir())
    looks = _all_image_facts(files, n_workers=4)
    assert [l.height for l in looks] == [8+i for i in range(150)] and looks == _all_image_facts(files, n_workers=0) and len({l.digest for l in looks}) == 150

# The odd folder

def test_corrupt_files_are_refused_together(odd):
    fails(lambda: from_folder(odd), '4 of 59 images cannot be read', 'cut.jpg', "zero.png' (the file is empty)", "text.jpg' (not an image", 'half.png', 'skip_corrupt=True')

def test_the_odd_folder(odd):
    data = from_folder(odd, skip_corrupt=True)
    assert data.classes == NAMES and data.name == 'my föld er'
    assert dict(zip(data.classes, data.counts)) == {'10': 4, '9': 4, 'all kinds': 14, NFC_CAFE: 4, 'grey cat': 6, 'lonely emu': 1, 'never tested': 5, 'кот': 2}
    notes = '\n'.join(data.notes)
    for part in ('left out (1): loose.png', 'left out (1): Thumbs.db', 'left out (4): ', 'left out (1): empty class', 'single training image (1): lonely emu',
                 'without a score (1): never tested', "(1): 'valid/all kinds/leak.png' = 'train/all kinds/copy.bmp'"): assert part in notes, (part, notes)
    assert not any('hidden' in str(f) or '._a' in str(f) for f in data.train_images)
    assert all(n in str(data) for n in data.notes)

def test_every_oddity_is_in_the_report(odd):
    text = str(report := inspect(odd))
    for part in ('8 classes', 'imbalance', 'I;16 2', 'CMYK 1', 'LA 1', 'RGBA 1', 'lonely emu', 'never tested', 'copy.bmp', 'leak.png', "'train/9/tiny.png' (9×9)",
                 "(9) = 'train/10/again.png' (10)", 'say nothing to a text tower', 'кот', 'loose.png', 'Thumbs.db', 'cut.jpg', 'zero.png', 'text.jpg', 'half.png'): assert part in text, part
    assert len(report.problems['Images that cannot be read']) == 4 and report.sizes.width['min'] == 9
    assert report.classes.loc['grey cat', 'training'] == 8 and report.groups.loc['few', 'classes'] == 8

def test_trained_through_python(readable):
    learn = lift_plus_learner(readable, backbone='tiny_clip', epochs=1, batch_size=8)
    with learn.no_bar(), learn.no_logging(): learn.fit_lift()
    with learn.no_bar(): scores = learn.scores()
    assert scores.many is None and scores.medium is None and 0 <= scores.few <= 100
    assert [a is None for a in scores.per_class] == [n == 'never tested' for n in NAMES]
    with learn.no_bar(): name, _, p = learn.predict(readable/'train/all kinds/16.tif')
    assert name in NAMES and abs(p.sum() - 1) < 1e-4

def lift_nb(*words, cwd): return subprocess.run([sys.executable, '-m', 'lift_nb', *map(str, words)], cwd=cwd, capture_output=True, text=True,
    env={**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)})

def test_trained_through_the_shell(readable, tmp_path):
    done = lift_nb('-d', readable, 'epochs', 1, 'batch_size', 8, 'output_dir', tmp_path/'out', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log, result = (tmp_path/'out/log.txt').read_text(encoding='utf-8'), json.loads((tmp_path/'out/result.json').read_text(encoding='utf-8'))
    for part in ('lonely emu', 'never tested', 'leak.png', 'loose.png', 'Thumbs.db'): assert part in log, part
    assert result['classes'] == list(NAMES) and result['many'] is None and result['few'] is not None and result['per_class'][6] is None

def test_refused_by_the_shell(odd, tmp_path):
    done = lift_nb('-d', odd, 'epochs', 1, cwd=tmp_path)
    assert done.returncode == 2 and '4 of 59 images cannot be read' in done.stderr and 'Traceback' not in done.stderr

def learn_from_what_can_be_read(odd, learn):
    "What a training on the odd folder must have seen"
    assert dict(zip(NAMES, learn.data.counts)) == {'10': 4, '9': 4, 'all kinds': 14, NFC_CAFE: 4, 'grey cat': 6, 'lonely emu': 1, 'never tested': 5, 'кот': 2}
    assert not {'cut.jpg', 'zero.png', 'half.png', 'text.jpg'} & {Path(f).name for f in (*learn.data.train_images, *learn.data.test_images)}

SAID = ('lonely emu', 'never tested', 'leak.png', 'loose.png', 'Thumbs.db', 'empty class', 'Images that cannot be read, left out (4)', 'cut.jpg', 'zero.png', 'half.png', 'text.jpg')

def test_corrupt_files_left_out_through_python(odd):
    learn = lift_plus_learner(odd, backbone='tiny_clip', epochs=1, batch_size=8, skip_corrupt=True)
    learn_from_what_can_be_read(odd, learn)
    with learn.no_bar(), learn.no_logging(): learn.fit_lift()
    with learn.no_bar(): scores = learn.scores()
    assert [a is None for a in scores.per_class] == [n == 'never tested' for n in NAMES] and all(part in str(learn.data) for part in SAID)

def test_corrupt_files_left_out_through_the_shell(odd, tmp_path):
    done = lift_nb('-d', odd, 'skip_corrupt', True, 'epochs', 1, 'batch_size', 8, 'output_dir', tmp_path/'out', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log, result = (tmp_path/'out/log.txt').read_text(encoding='utf-8'), json.loads((tmp_path/'out/result.json').read_text(encoding='utf-8'))
    assert all(part in log for part in SAID), [part for part in SAID if part not in log]
    assert result['recipe']['skip_corrupt'] is True and result['classes'] == list(NAMES) and result['class_counts'] == [4, 4, 14, 4, 6, 1, 5, 2]
    kept = pd.read_csv(tmp_path/'out/predictions.csv', dtype=dict(image=str))
    assert len(kept) == 15 and set(kept.label) == {0, 1, 2, 3, 4, 5, 7} and 'all kinds/leak.png' in set(kept.image)

def test_reported_by_the_shell(odd, tmp_path):
    done = lift_nb('data', odd, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (*(s for s in SAID if 'left out' not in s), 'cannot be read (4)', 'CMYK 1', 'I;16 2', 'RGBA 1', 'copy.bmp', 'кот', 'imbalance 14.0'): assert part in done.stdout, part
    assert len(list((tmp_path/'output').glob('*.png'))) == 1

def test_heic(tmp_path):
    "Photographs of a phone are images that Pillow cannot read by itself: they are named, with what to do"
    for i, c in enumerate('aabb'): save(noise(i), tmp_path/c/f'{i}.png')
    (tmp_path/'a/IMG 1.HEIC').write_bytes(b'\0\0\0\x18ftypheic' + bytes(40))
    fails(lambda: from_folder(tmp_path), "1 of 5 images cannot be read: 'a/IMG 1.HEIC'", 'pillow_heif.register_heif_opener()', 'skip_corrupt=True')
    assert 'IMG 1.HEIC' in from_folder(tmp_path, skip_corrupt=True).notes[0] and 'pillow-heif' in str(inspect(tmp_path))

def test_data_job(odd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _print_report(str(odd), tiny=5)
    said = capsys.readouterr().out
    assert 'cannot be read (4)' in said and 'Very small' not in said and str(tmp_path/'output/data_my-föld-er.png') in said
    assert Image.open(tmp_path/'output/data_my-föld-er.png').width > 500

def test_nothing_can_be_read(tmp_path):
    for f in ('a/1.png', 'a/2.png', 'b/1.png', 'b/2.png'): (tmp_path/f).parent.mkdir(exist_ok=True); (tmp_path/f).touch()
    assert 'cannot be read (4)' in str(inspect(tmp_path)) and 'cannot be read (4)' in str(inspect(tmp_path, decode=False))
    fails(lambda: from_folder(tmp_path, skip_corrupt=True), 'At least two classes with images are needed, not []')

# Folders

def test_no_permission(readable, monkeypatch):
    def refuse(path='.'): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(os, 'scandir', refuse)
    fails(lambda: from_folder(readable), 'Cannot read the folder', 'Permission denied')

def test_a_file_that_vanishes_is_named_while_training(tmp_path):
    for c in 'ab':
        for i in range(3): save(noise(100*ord(c) + i), tmp_path/c/f'{i}.png')
    data = from_folder(tmp_path)
    Path(data.train_images[0]).unlink()
    fails(lambda: dataloaders(data, [], (.5,)*3, (.5,)*3, bs=4, device='cpu', num_workers=0).train.one_batch(), 'Cannot read the image', 'No such file')

def test_the_split_does_not_depend_on_the_disk(readable, monkeypatch):
    a = from_folder(readable/'train')
    listed = os.listdir
    monkeypatch.setattr(os, 'listdir', lambda p='.': listed(p)[::-1])
    b = from_folder(readable/'train')
    assert a.train_images == b.train_images and a.test_images == b.test_images
    assert set(a.train_images).isdisjoint(a.test_images) and all(len(d) for d in (a.test_labels, a.train_labels))
    assert from_folder(readable/'train', seed=1).test_images != a.test_images

texts = st.text(st.characters(codec='utf-8', exclude_categories=['Cs', 'Cc']), min_size=1, max_size=8)

@few
@given(st.lists(texts, min_size=1, max_size=8))
def test_names(names):
    "Cleaning is idempotent and blind to Unicode forms; order is total; nothing breaks the test for meaning"
    for n in names:
        assert _clean_name(_clean_name(n)) == _clean_name(n) == _clean_name(normalize('NFD', n))
        assert _meaningless_names(n) in (True, False)
    assert _in_order(names) == _in_order(names[::-1])
    found = _in_order(map(_clean_name, names))
    assert all(f.isdecimal() for f in found) or list(_name_classes(found, [f'class {i}' for i in range(len(found))])[0]) == found

# Tables

@pytest.fixture
def photos(tmp_path):
    for i in range(12): save(noise(i), tmp_path/'imgs'/NFD_CAFE/f'{i:02} x.png')
    return tmp_path

def rows(n=12, form='NFC'): return pd.DataFrame(dict(Image=[f'imgs/{normalize(form, NFC_CAFE)}/{i:02} x.png' for i in range(n)], Label=[0]*8 + [1]*(n-8)))

@pytest.mark.parametrize('form', ['NFC', 'NFD'])
@pytest.mark.parametrize('sep, suffix', [(',', 'csv'), (';', 'csv'), ('\t', 'tsv')])
def test_tables_as_files(photos, form, sep, suffix):
    rows(form=form).to_csv(photos/f't.{suffix}', sep=sep, index=False, encoding='utf-8-sig')
    data = _from_path(photos/f't.{suffix}', classes={0: 'cat', 1: 'dog'})
    assert data.classes == ('cat', 'dog') and data.name == 't' and len(data.train_labels) + len(data.test_labels) == 12
    assert open_image(data.train_images[0]).size == (36, 40)

@pytest.mark.parametrize('labels', [['a b', 'c'], [0, 1], [0., 1.], [True, False], ['None', 'nan'], pd.Categorical(['x', 'y'])])
def test_labels_of_all_types(photos, labels):
    t = rows().assign(Label=np.array(labels)[[0]*8 + [1]*4])
    assert len(from_table(t, root=photos).classes) == 2
    t.to_csv(photos/'t.csv', index=False)
    assert from_table(photos/'t.csv', check=False).n_classes == 2

def test_what_a_table_lacks(photos):
    t = rows()
    fails(lambda: from_table(t), '12 of 12 files do not exist', 'root')
    fails(lambda: from_table(pd.concat([t]).assign(Image=['a.png', 'b.png', 'c.png', 'd.png', *t.Image[4:]]), root=photos), '4 of 12 files', "'a.png', 'b.png', 'c.png' …")
    fails(lambda: from_table(t.rename(columns=dict(Image='wo')), root=photos), "'wo', 'Label'", 'path_col')
    fails(lambda: from_table(t[:0]), 'has no rows', 'Image, Label')
    fails(lambda: from_table(t.assign(Label=['a']*11 + [None]), root=photos), '1 of 12 rows have no label', 'row 12')
    fails(lambda: from_table(t.assign(Label='a'), root=photos), 'At least two classes')
    fails(lambda: from_table(pd.concat([t, t[:2].assign(Label=1)]), root=photos), 'one label only; 2 have more')
    fails(lambda: from_table(t.assign(split=['train']*11 + ['tset']), root=photos), "'split' must say train or test", "'tset'")
    fails(lambda: from_table(t.assign(split=['train']*8 + ['test']*4), root=photos), "no training image: ['1']")
    fails(lambda: from_table(t, root=photos, classes=['a']), '1 class names (a) were given for 2 classes')
    assert from_table(pd.concat([t, t]), root=photos).notes[1].startswith('Rows that repeat another, left out (12)')
    kept = from_table(pd.concat([t, t[:1].assign(Image='gone.png')]), root=photos, skip_corrupt=True)
    assert kept.notes[1] == "Files that do not exist, left out (1): 'gone.png'"

def test_a_copy_across_a_tables_split(photos):
    t = rows().assign(split=['train']*6 + ['test']*2 + ['train']*2 + ['test']*2)
    (photos/'imgs'/NFD_CAFE/'06 x.png').write_bytes((photos/'imgs'/NFD_CAFE/'00 x.png').read_bytes())
    data = from_table(t, root=photos)
    assert any(n.startswith('Test images that are also training images (1)') for n in data.notes)

# Long-tailed subsets

def test_the_rule_of_the_benchmarks():
    y = np.repeat(np.arange(20), 60)
    data = LongTailData('balanced', map(str, range(20)), np.arange(1200)[:, None, None], y, np.zeros((20, 1, 1)), np.arange(20))
    for imbalance in (1, 10, 50, 60):
        cut = make_long_tailed(data, imbalance, seed=2)
        assert np.array_equal(cut.train_images[:, 0, 0], long_tail_subset(y, [max(1, n) for n in long_tail_counts(60, 20, 1/imbalance)], 2))
        assert (cut.counts.max(), cut.counts.min()) == (60, 60//imbalance) and len(cut.test_labels) == 20
    fails(lambda: make_long_tailed(data, 61), 'is at most 60, not 61')
