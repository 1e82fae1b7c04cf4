"Your own images: every kind of file, name and accident, from the folder through Python and the shell to the report"
import json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from lift_nb.core.errors import LiftError
from lift_nb.data.loaders import dataloaders
from lift_nb.data.dataset import LongTailData, from_arrays, long_tail_counts, long_tail_subset
from lift_nb.data.lists import _clean_name, _in_order
from lift_nb.data.splits import _name_classes, _split_classes
from lift_nb.data.folders import from_folder, make_long_tailed
from lift_nb.data.tables import _from_path, from_table
from lift_nb.data.images import _all_image_facts, _image_facts_once, open_image
from lift_nb.data.inspection import _print_report, inspect, _meaningless_names
from lift_nb.experiments import build
from lift_nb.experiments.build import _DATA_OPTIONS, _load
from lift_nb.experiments.recipe import Recipe, resolve
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
    done = lift_nb('-d', readable, '-b', 'tiny_clip', 'epochs', 1, 'batch_size', 8, 'output_dir', tmp_path/'out', cwd=tmp_path)
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
    done = lift_nb('-d', odd, '-b', 'tiny_clip', 'skip_corrupt', True, 'epochs', 1, 'batch_size', 8, 'output_dir', tmp_path/'out', cwd=tmp_path)
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

def test_print_report(odd, tmp_path, monkeypatch, capsys):
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

# What people have: splits, pixels, names, columns, files

def classes_of(root, start=0, **classes):
    "root/<class>/<i>.png of noise"
    i = start
    for c, n in classes.items():
        for _ in range(n): save(noise(i, (12, 12)), Path(root)/c/f'{i:03}.png'); i += 1
    return Path(root)

def listed(root): return sorted(str(f) for f in Path(root).rglob('*.png'))
def by_folder(files, **more): return pd.DataFrame(dict(path=list(map(str, files)), label=[Path(f).parent.name for f in files], **more))

@pytest.mark.parametrize('column, train, values', [(c, t, v) for c, t in [('is_train', True), ('is_training_image', True), ('Training', True), ('is_valid', False), ('isTest', False), ('is_val', False)]
    for v in [(1, 0), (1., 0.), (True, False), ('yes', 'no'), ('TRUE', 'FALSE')]])
def test_a_flag_never_exchanges_the_parts(tmp_path, column, train, values):
    files = listed(classes_of(tmp_path, cat=6, emu=4))
    flag = [i % 3 > 0 for i in range(10)]
    data = from_table(by_folder(files, **{column: [values[0] if f else values[1] for f in flag]}))
    assert data.train_images == [f for f, on in zip(files, flag) if on == train] and f"split from '{column}'" in data.notes[0]

@pytest.mark.parametrize('words', [('Training', 'PublicTest'), ('train', 'dev'), ('Training Set', 'test set'), ('TRAIN', 'val'), ('trainset', 'testset')])
@pytest.mark.parametrize('column', ['split', 'subset', 'Usage', 'phase', 'partition'])
def test_words_of_a_split(tmp_path, column, words):
    files = listed(classes_of(tmp_path, cat=6, emu=4))
    data = from_table(by_folder(files, **{column: [words[i % 3 == 0] for i in range(10)]}))
    assert data.test_images == files[::3]

@pytest.mark.parametrize('a, b', [('Training_Set', 'Test_Set'), ('train_images', 'test_images'), ('train', 'dev'), ('imgs_train', 'imgs_val'), ('flowers-train', 'flowers-test'), ('train2017', 'val2017'), ('TrainSet', 'EvalSet')])
def test_parts_of_a_split_in_any_spelling(tmp_path, a, b):
    classes_of(tmp_path/a, cat=4, dog=3); classes_of(tmp_path/b, start=50, cat=2, dog=1)
    data = from_folder(tmp_path)
    assert data.class_names == ('cat', 'dog') and len(data.test_labels) == 3 and data.notes == (f"Training images from '{a}', test images from '{b}'",)

def test_folders_that_may_be_both(tmp_path):
    classes_of(tmp_path/'a/train', electric=3, steam=3); classes_of(tmp_path/'a', start=20, bus=3)
    fails(lambda: from_folder(tmp_path/'a'), "'train' may be parts of a split or classes, beside 'bus'")
    classes_of(tmp_path/'b', train=3, test=3)
    fails(lambda: from_folder(tmp_path/'b'), "['test', 'train']", 'hold no class folders')
    classes_of(tmp_path/'c/train', cat=4, dog=3); classes_of(tmp_path/'c', start=20, masks=3)
    assert from_folder(tmp_path/'c').class_names == ('cat', 'dog')
    classes_of(tmp_path/'d/train', cat=4, dog=3); classes_of(tmp_path/'d/val', start=20, cat=1, dog=1); classes_of(tmp_path/'d/test', start=40, test=3)
    data = from_folder(tmp_path/'d')
    assert len(data.test_labels) == 2 and data.notes[1] == 'Folders that were not used (1): test'
    for k in range(3): classes_of(tmp_path/f'e/fold_{k}', start=9*k, cat=2, dog=1)
    fails(lambda: from_folder(tmp_path/'e'), 'are the folds 0, 1, 2 of a cross-validation', 'with fold')
    assert all('fold_1' in f for f in from_folder(tmp_path/'e', fold=1).test_images)

@few
@given(st.integers(0, 99), st.integers(1, 9))
def test_an_image_more_moves_no_other_class(seed, more):
    found = {c: [f'r/{c}/{i}.png' for i in range(n)] for c, n in dict(a=20, b=13, c=2).items()}
    grown = {**found, 'a': found['a'] + [f'r/a/new {i}.png' for i in range(more)]}
    one, two = (_split_classes(f, .2, seed, 'r')[1] for f in (found, grown))
    assert one['b'] == two['b'] and one['c'] == two['c'] and len(set(one['a']) - set(two['a'])) <= more

def test_groups_stay_on_one_side(tmp_path):
    files = listed(classes_of(tmp_path, sick=20, well=20))
    t = by_folder(files, patient=[i//4 for i in range(40)])
    who = dict(zip(t.path, t.patient))
    for more in (dict(), dict(seed=3), dict(fold=0), dict(fold=4), dict(test_pct=.4)):
        data = from_table(t, group_col='patient', **more)
        assert not {who[f] for f in data.train_images} & {who[f] for f in data.test_images} and len(set(data.test_labels)) == 2
    data = from_table(t.assign(split=['test' if i % 2 else 'train' for i in range(40)]), group_col='patient')
    assert any(n.startswith('Groups with both training and test images (10)') for n in data.notes)
    for f in files: Path(f).rename(Path(f).with_name(f'p{who[f]}_{Path(f).name}'))
    data = from_folder(tmp_path, group_by=r'(p\d+)_')
    assert not {Path(f).name.split('_')[0] for f in data.train_images} & {Path(f).name.split('_')[0] for f in data.test_images}
    fails(lambda: from_folder(tmp_path, group_by='('), 'regular expression'); fails(lambda: from_folder(tmp_path, group_by='zebra'), 'finds nothing in 40 of 40')

def test_every_fold_reaches_the_data_at_both_doors(tmp_path): # 0 is a fold, not "none was named"
    for c, n in dict(cat=12, dog=9, owl=6).items():
        (tmp_path/c).mkdir()
        for i in range(n): noise(100*n + i).save(tmp_path/c/f'{i}.png')
    table = pd.DataFrame([dict(path=str(f), label=f.parent.name) for f in sorted(tmp_path.rglob('*.png'))])
    for data, make in (table, from_table), (str(tmp_path), from_folder):
        tested = []
        for fold in range(3):
            loaded = _load(resolve(data=data, fold=fold, n_folds=3))
            assert loaded.test_images == make(data, fold=fold, n_folds=3).test_images
            tested += map(str, loaded.test_images)
        assert sorted(tested) == sorted(map(str, tmp_path.rglob('*.png')))

@pytest.mark.parametrize('name', _DATA_OPTIONS)
def test_a_data_option_reaches_the_data(name, monkeypatch): # whatever was asked for arrives, zeros too
    value, passed = dict(test_pct=.3, valid_pct=.1, fold=0, max_value=255, skip_corrupt=True).get(name, 'x'), {}
    monkeypatch.setattr(build, 'load_data', lambda data, root, **options: passed.update(options))
    _load(replace(Recipe(), data='.', **{name: value}))
    assert passed.get(name) == value and type(passed[name]) is type(value)

def test_folds_test_each_image_once(tmp_path):
    files = listed(classes_of(tmp_path, cat=7, emu=5))
    tested = [f for k in range(3) for f in from_folder(tmp_path, fold=k, n_folds=3).test_images]
    assert sorted(tested) == files
    t = by_folder(files, fold=[i % 3 for i in range(12)])
    assert from_table(t, fold=1).test_images == files[1::3] and 'Columns of folds that were not used' in from_table(t).notes[1]
    fails(lambda: from_folder(tmp_path, fold=5), 'fold must lie in 0 … 4, not 5'); fails(lambda: from_table(t, fold=7), 'has the folds 0, 1, 2, not 7')

@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_twelve_bits_are_asked_for_and_used(tmp_path, suffix):
    x = np.linspace(0, 4095, 1600).reshape(40, 40).astype(np.uint16)
    for c in 'ab':
        for i in range(4): save(Image.fromarray(np.roll(x, 37*i + ord(c), 1)), tmp_path/c/f'{i}.{suffix}')
    fails(lambda: from_folder(tmp_path), '8 images of more than 8 bits', 'reach 4095 of 65535', 'max_value, for example 4095 for 12 bits')
    assert 'up to 4095' in str(inspect(tmp_path)) and 'up to 4095' not in str(inspect(tmp_path, max_value=4095))
    data = from_folder(tmp_path, max_value=4095)
    batch = dataloaders(data, [], (0,)*3, (1,)*3, bs=4, device='cpu', num_workers=0).train.one_batch()[0]
    assert data.max_value == 4095 and batch.max() == 1 and len(batch.unique()) > 200
    assert from_folder(tmp_path, max_value=65535).max_value == 65535

def test_names_and_columns(tmp_path):
    root = classes_of(tmp_path/'n', **{f'class_{i}': 2 for i in range(1, 13)})
    data = from_folder(root, class_names=np.array([f'name {i}' for i in range(1, 13)]))
    assert {Path(f).parent.name[6:] for f, y in zip(data.train_images, data.train_labels) if data.class_names[y] == 'name 10'} == {'10'}
    assert data.notes[0].startswith('Class names by position (12): class_1 = name 1')
    files = listed(classes_of(tmp_path/'t', cat=4, dog=4)); t = by_folder(files)
    (tmp_path/'f.csv').write_text('path,label\n' + ''.join(f'{f},{10. if "dog" in f else 5.}\n' for f in files))
    assert dict(zip(['5', '10'], from_table(tmp_path/'f.csv', class_names=['five', 'ten']).class_names)) == {'5': 'five', '10': 'ten'}
    fails(lambda: from_table(t.assign(label=[1, 1, 1, 1, 2, 2, 2, 2]), class_names=['cat', 'dog', 'emu']), 'from 0 or from 1')
    ranks = t.rename(columns=dict(label='species')).assign(**{'class': 'Mammalia', 'genus': 'x'})
    assert from_table(ranks).class_names == ('cat', 'dog')
    fails(lambda: from_table(t.assign(category=['a', 'b']*4)), "'label', 'category' could each hold the label", 'label_col')
    assert from_table(t.assign(target=[0]*4 + [1]*4)).class_names == ('cat', 'dog')
    assert from_table(t.assign(x=1., y=2.)).class_names == ('cat', 'dog')
    fails(lambda: from_table(t.drop(columns='label').assign(x=1., y=np.arange(8.))), 'No column is called label')
    fails(lambda: from_table(t.drop(columns='label').assign(target=np.arange(8)/3)), 'numbers with decimals, such as 0.3')
    hot = t[['path']].assign(cat=[1.]*4 + [0.]*4, dog=[0.]*4 + [1.]*4)
    assert from_table(hot).class_names == ('cat', 'dog') and 'label from one-hot columns' in from_table(hot).notes[0]
    fails(lambda: from_table(hot.assign(dog=1.)), '4 rows have not a single 1')
    twice = pd.concat([t, t[['label']]], axis=1)
    assert from_table(twice).n_classes == 2
    twice.iloc[:, 2] = 'other'; fails(lambda: from_table(twice), "'label' occurs 2 times")

def test_files_of_tables(tmp_path):
    files = listed(classes_of(tmp_path/'part_1', cat=4, dog=4)); t = by_folder(files)
    bare = t.assign(path=[Path(f).stem for f in files])
    assert from_table(bare, root=tmp_path).n_classes == 2 and 'found in folders below the root (8)' in from_table(bare, root=tmp_path).notes[1]
    fails(lambda: from_table(bare[:1].assign(path='nowhere'), root=tmp_path), 'no suffix such as .jpg')
    below = [str(Path(f).relative_to(tmp_path)) for f in files]
    assert from_table(t.assign(path=[f.replace('/', '\\') for f in below]), root=tmp_path).n_classes == 2
    for name, text in {'a': 'label, path\n' + ''.join(f'{l}, {f}\n' for f, l in zip(below, t.label)), 'b': 'sep=;\npath;label\n' + ''.join(f'{f};{l}\n' for f, l in zip(below, t.label)),
                       'c': ''.join(f'{f},{l}\n' for f, l in zip(below, t.label))}.items():
        (tmp_path/f'{name}.csv').write_text(text, encoding='utf-16' if name == 'b' else 'utf-8-sig')
        assert from_table(tmp_path/f'{name}.csv').class_names == ('cat', 'dog')
    for part, k in (('train', 0), ('test', 1)): (tmp_path/f'{part}.txt').write_text(''.join(f'{f} {int(l == "dog")}\n' for i, (f, l) in enumerate(zip(below, t.label)) if (i % 4 == 3) == k))
    data = _from_path(tmp_path/'train.txt')
    assert [Path(f).stem for f in data.test_images] == ['003', '007'] and "Test images from the list 'test.txt'" in data.notes
    half = t.assign(label=[None if i % 4 == 0 else l for i, l in enumerate(t.label)], split=['test' if i % 4 == 0 else 'train' for i in range(8)])
    assert 'Rows without path or label, left out (2)' in from_table(half).notes[1]
    fails(lambda: from_table(half.drop(columns='split')), '2 of 8 rows have no label', 'skip_corrupt=True')
    assert f"Files outside '{tmp_path}/part_1/cat' (4)" in from_table(t.assign(path=['../' + '/'.join(Path(f).parts[-2:]) for f in files]), root=tmp_path/'part_1/cat').notes[1]
    fails(lambda: from_table(t.assign(split=['train', 'test']*4).pipe(lambda x: pd.concat([x, x.assign(split='test')[:1]]))), 'training and test rows')

def test_what_lies_beside_images(tmp_path):
    for i, place in enumerate(('cat/@eaDir', '@eaDir', '$RECYCLE.BIN', '__MACOSX/cat', 'cat/.ipynb_checkpoints', 'System Volume Information', 'lost+found')):
        d = classes_of(tmp_path/str(i), cat=5, dog=4); save(noise(90), d/place/'thumb.png')
        data = from_folder(d); assert (len(data.train_labels) + len(data.test_labels), data.notes) == (9, ()), place
    d = classes_of(tmp_path/'m', cat=5, dog=4)
    for f in listed(d): save(noise(7), Path(f).with_name(Path(f).stem + '_mask.png')); save(noise(8), d/'masks'/Path(f).name)
    data = from_folder(d); assert data.class_names == ('cat', 'dog') and 'Masks or thumbnails beside the images, left out (18)' in data.notes[0]
    d = classes_of(tmp_path/'l', cat=6, dog=4); os.symlink(d, d/'cat/up'); os.symlink(tmp_path, d/'dog/up')
    assert len(from_folder(d).train_labels) + len(from_folder(d).test_labels) == 10
    d = classes_of(tmp_path/'p', cat=4, dog=4); os.mkfifo(d/'cat/pipe.png'); (d/'dog/x.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n')
    fails(lambda: from_folder(d), '2 of 10 images cannot be read', 'it is no regular file', 'not an image of a known format')
    d = classes_of(tmp_path/'e', **{'red\x1b[31m cat': 4, 'dog\u202e': 4})
    (d/'dog\u202e/\x1b]0;x.png').touch()
    assert from_folder(d, skip_corrupt=True).class_names == ('dog', 'red [31m cat')
    fails(lambda: from_folder(d), r'\x1b]0;x.png'); assert '\x1b' not in repr(inspect(d)) + str(from_folder(d, skip_corrupt=True))

# Random tables and folders: right, or one sentence

MORE = float(os.environ.get('FUZZ', 1))

cells = st.one_of(st.sampled_from(['', ' ', '0', '1', '1.0', '2.5', 'nan', 'train', 'test', 'val', 'cat', 'dog', '../x.png', 'a\\b.png', '\x1b[0m', 'x' * 400, '9' * 400]), st.text(max_size=6), st.integers(-3, 3), st.floats(), st.none(), st.booleans())
columns = st.sampled_from(['path', 'label', 'split', 'is_train', 'class', 'species', 'y', 'x', 'fold', 'file', 'image', 'set', 'target', ' label ', 'Path', 'test', ''])

@pytest.fixture(scope='module')
def ten(tmp_path_factory): return classes_of(tmp_path_factory.mktemp('ten'), cat=5, dog=5)

def right_or_refused(f):
    "The data set, or None after a `LiftError` of one line"
    try: return f()
    except LiftError as e: assert '\n' not in str(e) and '\x1b' not in str(e), repr(str(e))

@settings(max_examples=int(150*MORE), deadline=None)
@given(st.data())
def test_random_tables(ten, data):
    files, draw = listed(ten), data.draw
    t = by_folder(files)
    for c in draw(st.lists(columns, max_size=3)): t.insert(draw(st.integers(0, t.shape[1])), c, draw(st.lists(cells, min_size=10, max_size=10)), allow_duplicates=True)
    if draw(st.booleans()): t = t.drop(columns=draw(st.sampled_from(['path', 'label'])))
    found = right_or_refused(lambda: from_table(t, root=ten, check=False))
    if found is not None:
        assert set(found.train_images).isdisjoint(found.test_images) and set(found.train_images) | set(found.test_images) <= set(files)
    text = draw(st.one_of(st.just(t.to_csv(index=False, sep=draw(st.sampled_from(',;\t|')))), st.text(max_size=60), st.binary(max_size=60)))
    file = ten/f'random.{draw(st.sampled_from(["csv", "txt"]))}'
    file.write_bytes(text if isinstance(text, bytes) else text.encode('utf-8', 'surrogatepass'))
    right_or_refused(lambda: _from_path(file, check=False)); file.unlink()

parts = st.sampled_from(['train', 'Test', 'val', 'fold_0', 'fold_1', 'cat', 'dog', 'masks', '@eaDir', '.hidden', 'Training_Set', 'x y', '10', '9', 'images', 'test', 'caf\xe9', 'cafe\u0301'])

@settings(max_examples=int(100*MORE), deadline=None)
@given(st.lists(st.tuples(st.lists(parts, min_size=1, max_size=3), st.sampled_from(['a.png', 'b.png', 'a_mask.png', 'c.JPG', 'notes.txt', '.d.png'])), max_size=12), st.sampled_from([{}, dict(fold=0), dict(group_by='folder'), dict(class_names=['a', 'b'])]))
def test_random_folders(tmp_path_factory, files, options):
    root = tmp_path_factory.mktemp('r')
    for dirs, name in files:
        (d := root.joinpath(*dirs)).mkdir(parents=True, exist_ok=True); (d/name).touch()
    found = right_or_refused(lambda: from_folder(root, check=False, **options))
    if found is None: return
    used = [*found.train_images, *found.test_images]
    assert set(found.train_images).isdisjoint(found.test_images) and not any('@eaDir' in f or '/.' in f for f in used)
    assert len(used) == len(set(used)) and all(os.path.isfile(f) for f in used)
