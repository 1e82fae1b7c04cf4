"The published sets: files from a web that misbehaves, lists at full size, and the true lists and images where they are at hand"
import csv, errno, hashlib, json, lzma, os, pickle, socket, subprocess, sys, threading, time, zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import numpy as np, pytest
from PIL import Image

import lift_nb.data.benchmarks as benchmarks
import lift_nb.core.downloads as fetching
from lift_nb.core.errors import LiftError
from lift_nb.data.benchmarks import BENCHMARKS, _LEVELS, _PINNED, benchmark, cifar100_lt, load_data, _read_names, _tar
from lift_nb.data.loaders import dataloaders
from lift_nb.data.dataset import shot_groups
from lift_nb.core.downloads import _PinnedFile, _cache_dir, _fetch
from lift_nb.data.lists import _as_text, _find_images, _read_list

shared = Path(os.environ.get('LIFT_NB_SHARED', Path(__file__).parents[2]/'shared'))
splits, cifar = shared/'data'/'splits', shared/'data'/'cifar100'
true_lists = pytest.mark.skipif(not splits.is_dir(), reason=f'the true lists are not at {splits}; set LIFT_NB_SHARED')
true_cifar = pytest.mark.skipif(not cifar.is_dir(), reason=f'CIFAR-100 is not at {cifar}; set LIFT_NB_SHARED')

content = bytes(range(256))*1000
right = hashlib.sha256(content).hexdigest()

# A web that misbehaves

class Handler(BaseHTTPRequestHandler):
    "Answers each request as the next word of `server.plan` says, and whole when there is none left"
    def log_message(self, *args): pass

    def do_GET(self):
        s, start = self.server, int((self.headers['Range'] or 'bytes=0-')[6:-1])
        how = s.plan.pop(0) if s.plan else 'whole'
        s.asked.append(start)
        if how.isdigit(): return self.send_error(int(how))
        body, resumed = s.body, start and how != 'norange'
        if resumed and start >= len(body): return self.send_error(416)
        self.send_response(206 if resumed else 200)
        if resumed: self.send_header('Content-Range', f'bytes {start}-{len(body)-1}/{len(body)}')
        body = body[start:] if resumed else body
        self.send_header('Content-Length', len(body))
        self.end_headers()
        if how == 'stall': s.stalled.wait(5)
        else: self.wfile.write(body[:len(body)//2] if how == 'cut' else body)

@pytest.fixture
def web(monkeypatch):
    for name in 'no_proxy', 'NO_PROXY': monkeypatch.setenv(name, '*')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.plan, server.asked, server.body, server.stalled = [], [], content, threading.Event()
    server.pin = _PinnedFile(f'http://127.0.0.1:{server.server_port}/list.txt', len(content), right)
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    yield server
    server.stalled.set(); server.shutdown(); server.server_close()

def get(web, folder, **options): return _fetch(web.pin, folder/'list.txt', **dict(timeout=5, pause=0) | options)
def left(folder): return sorted(f.name for f in folder.iterdir() if f.suffix != '.lock')

def test_whole_and_once(web, tmp_path):
    for _ in range(2): assert get(web, tmp_path/'new'/'folder').read_bytes() == content
    assert web.asked == [0] and left(tmp_path/'new'/'folder') == ['list.txt']

def test_cut_off_and_gone_on_with(web, tmp_path):
    web.plan, half = ['cut', '503'], len(content)//2
    assert get(web, tmp_path).read_bytes() == content and web.asked == [0, half, half] and left(tmp_path) == ['list.txt']
    web.plan = ['cut', 'norange']
    assert get(web, tmp_path/'other').read_bytes() == content and left(tmp_path/'other') == ['list.txt']
    web.plan = ['cut']*3
    with pytest.raises(LiftError, match='or came incomplete'): get(web, tmp_path/'new')

@pytest.mark.parametrize('old', [None, b'damaged'], ids=['new', 'damaged'])
@pytest.mark.parametrize('body', [content[::-1], b'<html>Please log in</html>', content*9], ids=['other', 'short', 'long'])
def test_a_wrong_file(web, tmp_path, body, old):
    "Never installed, and what was there stays"
    if old: (tmp_path/'list.txt').write_bytes(old)
    web.body = body
    with pytest.raises(LiftError, match='is not the file that it should be.* SHA-256 is not'): get(web, tmp_path)
    assert left(tmp_path) == (['list.txt'] if old else []) and len(web.asked) == 3
    assert not old or (tmp_path/'list.txt').read_bytes() == old

def test_a_damaged_file_is_fetched_again(web, tmp_path):
    (tmp_path/'list.txt').write_bytes(content[:-1] + b'x')
    assert get(web, tmp_path).read_bytes() == content

def test_a_refusal_is_not_repeated(web, tmp_path):
    web.plan = ['404']
    with pytest.raises(LiftError, match=r"Could not fetch 'http.*list.txt': the server answered 404 Not Found; put a copy"): get(web, tmp_path)
    assert web.asked == [0]

def test_a_stalled_server(web, tmp_path):
    web.plan = ['stall']
    start = time.perf_counter()
    assert get(web, tmp_path, timeout=.3).read_bytes() == content
    assert time.perf_counter() - start < 3
    web.plan = ['stall']
    with pytest.raises(LiftError, match='timed out'): _fetch(web.pin, tmp_path/'other.txt', timeout=.3, tries=1)

def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    pin = _PinnedFile('http://127.0.0.1:9/list.txt', 1, right)
    with pytest.raises(LiftError, match=f"Could not fetch '{pin.url}': .*refused; put a copy of the file at"): _fetch(pin, tmp_path/'a', pause=0)
    def no_name(*args, **kwargs): raise URLError(socket.gaierror(-2, 'Name or service not known'))
    monkeypatch.setattr(fetching, 'urlopen', no_name)
    with pytest.raises(LiftError, match='Name or service not known; put a copy'): _fetch(pin, tmp_path/'a', pause=0)

def test_a_full_disk(web, tmp_path, monkeypatch):
    "What was there stays, what came goes"
    (tmp_path/'list.txt').write_bytes(b'damaged')
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(fetching._Bar, 'to', full) # after the first piece
    with pytest.raises(LiftError, match=r"The disk of '.*' is full, list.txt needs 0.3 MB"): get(web, tmp_path)
    assert left(tmp_path) == ['list.txt'] and (tmp_path/'list.txt').read_bytes() == b'damaged'

@pytest.mark.parametrize('code', [errno.EACCES, errno.EROFS])
def test_no_permission(web, tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(Path, 'mkdir', refuse)
    with pytest.raises(LiftError, match='No permission to write to .*; set LIFT_NB_CACHE'): get(web, tmp_path)

def test_a_file_in_the_way(web, tmp_path):
    (tmp_path/'cache').write_text('kept')
    for folder in tmp_path/'cache', tmp_path/'cache'/'below':
        with pytest.raises(LiftError, match=f"'{tmp_path}/cache' is in the way of"): get(web, folder)
    (tmp_path/'list.txt').mkdir()
    with pytest.raises(LiftError, match=f"'{tmp_path}/list.txt' is in the way of"): get(web, tmp_path)
    assert (tmp_path/'cache').read_text() == 'kept'

def test_two_at_once(web, tmp_path):
    threads = [threading.Thread(target=get, args=(web, tmp_path)) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert web.asked == [0] and (tmp_path/'list.txt').read_bytes() == content

def test_cache_dir(monkeypatch):
    monkeypatch.setenv('LIFT_NB_CACHE', '~/mine')
    assert _cache_dir() == Path.home()/'mine'
    monkeypatch.delenv('LIFT_NB_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', '/xdg')
    assert _cache_dir() == Path('/xdg/lift_nb')
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert _cache_dir().name == 'lift_nb' and Path.home() in _cache_dir().parents

# Lists

def write_list(path, n, n_classes=8142):
    "A list as long as iNaturalist's, of paths as long as its"
    rng = np.random.RandomState(0)
    names = rng.bytes(16*n).hex()
    labels = np.r_[:n_classes, rng.randint(0, n_classes, n-n_classes)]
    path.write_text(''.join(f'train_val2018/Actinopterygii/{y}/{names[32*i:32*i+32]}.jpg {y}\n' for i, y in enumerate(labels)))
    return labels

MEASURE = '''import sys, time
from lift_nb.data.lists import _read_list
def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/1024
start, before = time.perf_counter(), peak()
paths, labels = _read_list(sys.argv[1], 8142)
print(len(paths), time.perf_counter() - start, peak() - before)'''

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='the memory of a process is not known here')
@pytest.mark.parametrize('n, seconds', [(100_000, 1), (437_513, 5)])
def test_a_long_list(tmp_path, n, seconds):
    "In a process of its own: lines, seconds, growth of the peak memory in MB"
    write_list(tmp_path/'list.txt', n)
    found, took, grew = map(float, subprocess.check_output([sys.executable, '-c', MEASURE, tmp_path/'list.txt'], text=True).split())
    print(f'{n:,} lines: {took:.2f} s, {grew:.0f} MB more')
    assert found == n and took < seconds and grew < 300

def test_inat2018_at_full_size(tmp_path):
    "The whole set, made up: 437,513 + 24,426 lines to a data set below 5 s, seven levels with the counts of their species"
    labels = write_list(tmp_path/'train.txt', 437_513)
    write_list(tmp_path/'val.txt', 24_426)
    levels = [dict(id=i, **{name: f'{name}{i % (k+2)}' for k, name in enumerate(_LEVELS.values())}) for i in range(8142)]
    (tmp_path/'categories.json').write_text(json.dumps(levels))
    start = time.perf_counter()
    data = load_data('inat2018_p', lists=tmp_path, sample=0)
    assert time.perf_counter() - start < 5
    assert data.name == 'inat2018_p' and data.classes == ('phylum0', 'phylum1', 'phylum2')
    assert data.counts.tolist() == np.bincount(labels % 3).tolist() and data.train_images[-1].startswith('train_val2018/')
    assert len(pickle.dumps(data.train_images)) < 40e6

def test_lists_are_fetched_into_the_cache(web, tmp_path, monkeypatch):
    web.body = b'a/1.jpg 0\na/2.jpg 1\n'
    pin = _PinnedFile(web.pin.url, len(web.body), hashlib.sha256(web.body).hexdigest())
    monkeypatch.setitem(_PINNED, 'ImageNet_LT/train.txt', pin)
    monkeypatch.setitem(_PINNED, 'ImageNet_LT/test.txt', pin)
    monkeypatch.setenv('LIFT_NB_CACHE', str(tmp_path/'cache'))
    (tmp_path/'names').mkdir()
    small = replace(BENCHMARKS['imagenet_lt'], n_classes=2, totals=dict(train=2, test=2), groups=None, named=lambda parts, *_: (['a', 'b'], parts))
    for _ in range(2): assert benchmark(small, sample=0).counts.tolist() == [1, 1]
    assert len(web.asked) == 2 and (tmp_path/'cache'/'ImageNet_LT'/'train.txt').read_bytes() == web.body

@pytest.mark.parametrize('name', ['Places_LT/train.txt', 'Places_LT_train.txt', 'train.txt', 'Places_LT/train.txt.xz'])
def test_names_of_local_lists(tmp_path, name):
    (tmp_path/name).parent.mkdir(exist_ok=True)
    (tmp_path/name).write_text('')
    assert benchmarks._list_file('Places_LT/train.txt', tmp_path) == tmp_path/name

def test_names_of_classes_come_from_the_cache(tmp_path, monkeypatch):
    "A local folder often holds the lists alone"
    monkeypatch.setattr(benchmarks, '_fetch', lambda pin, path: path)
    assert benchmarks._names_file('ImageNet_LT/classnames.txt', tmp_path) == _cache_dir()/'ImageNet_LT/classnames.txt'
    (tmp_path/'classnames.txt').touch()
    assert benchmarks._names_file('ImageNet_LT/classnames.txt', tmp_path) == tmp_path/'classnames.txt'

def test_images_go_through_dataloaders(tmp_path):
    "Paths of a list, with blanks, opened by worker processes"
    for f in 'a b.png', 'ç.png': Image.new('RGB', (8, 8), 'red').save(tmp_path/f)
    (tmp_path/'list.txt').write_text('a b.png 0\nç.png 1\n', encoding='utf-8')
    data = benchmarks.from_lists(tmp_path, tmp_path/'list.txt', tmp_path/'list.txt', ['x', 'y'])
    x, y = dataloaders(data, [], (.5,)*3, (.5,)*3, bs=2, num_workers=1).valid.one_batch()
    assert x.shape == (2, 3, 8, 8) and y.tolist() == [0, 1]

@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may read everything')
def test_a_root_without_permission(tmp_path):
    (tmp_path/'root').mkdir(mode=0)
    with pytest.raises(LiftError, match='No permission to read the root'): _find_images(tmp_path/'root', np.array([b'a.jpg']))

# The true lists

def lay_out(root, paths, n=50):
    "An empty file for each image that will be looked for"
    for i in np.linspace(0, len(paths)-1, n).astype(int):
        (root/paths[i]).parent.mkdir(parents=True, exist_ok=True)
        (root/paths[i]).touch()

@true_lists
def test_places_lt():
    data = load_data('places_lt', lists=splits, sample=0)
    assert [int(m.sum()) for m in shot_groups(data.counts).values()] == [131, 163, 71]
    assert (len(data.train_labels), len(data.test_labels), data.counts.max(), data.counts.min()) == (62_500, 36_500, 4980, 5)
    assert data.counts.tolist() == [int(n) for n in (splits/'Places_LT'/'class_counts.txt').read_text().split()]
    val = load_data('places_lt', lists=splits, sample=0, split='val')
    assert len(val.test_labels) == 7_300 and val.name == 'places_lt_val'

@true_lists
def test_names_of_places():
    "Those of the folders; the file of names is the same but for the order of five"
    names, file = load_data('places_lt', lists=splits, sample=0).classes, _read_names(splits/'Places_LT'/'classnames.txt')
    assert sorted(names) == sorted(file)
    assert [n for n, f in zip(names, file) if n != f] == ['desert_road', 'desert-sand', 'desert-vegetation', 'field_road', 'field-wild']

@pytest.fixture(scope='module')
def second_edition(tmp_path_factory):
    "Places-LT's lists as they circulate with other programs; only the layout of the paths differs"
    folder, sizes = tmp_path_factory.mktemp('places'), []
    for split in 'train', 'test':
        paths, labels = _read_list(splits/'Places_LT'/f'{split}.txt.xz')
        text = ''.join(f'{_tar(_as_text(p), "256")} {y}\n' for p, y in zip(paths, labels))
        (folder/f'Places_LT_{split}.txt').write_text(text)
        sizes.append(len(text))
    assert sizes[0] == 2_405_174 and sizes[1] == 1_412_500 # of the files that are in circulation
    return folder

@true_lists
@pytest.mark.parametrize('edition', ['first', 'second'])
@pytest.mark.parametrize('layout', BENCHMARKS['places_lt'].layouts, ids=['easy', '256', 'large'])
def test_both_editions_of_places_in_every_layout(tmp_path, second_edition, edition, layout):
    first = load_data('places_lt', lists=splits, sample=0)
    for images in first.train_images, first.test_images: lay_out(tmp_path, [layout(p) for p in images])
    data = load_data('places_lt', tmp_path, lists=splits if edition == 'first' else second_edition, sample=50)
    assert data.classes == first.classes and (data.train_labels == first.train_labels).all()
    for a, b in (data.train_images, first.train_images), (data.test_images, first.test_images):
        assert all(a[i] == str(tmp_path/layout(b[i])) for i in range(0, len(a), 997))

@true_lists
def test_missing_images_are_named(tmp_path):
    data = load_data('places_lt', lists=splits, sample=0)
    lay_out(tmp_path/'images', list(data.train_images), 40)
    lay_out(tmp_path/'images', list(data.test_images), 40)
    (tmp_path/'images'/data.train_images[0]).unlink()
    said = r"1 of 40 images that were looked for are not in '.*', among them 'train/airfield/00004851.jpg'; expected there: train/<class>/\*.jpg"
    with pytest.raises(LiftError, match=said): load_data('places_lt', tmp_path/'images', lists=splits, sample=40)
    with pytest.raises(LiftError, match=r"40 of 40 images .*; they are in '.*images'$"): load_data('places_lt', tmp_path, lists=splits, sample=40)

@true_lists
@pytest.mark.parametrize('split', ['val', 'test'])
def test_imagenet_lt(tmp_path, split):
    "Its training list is not at hand; one is made with the true counts"
    counts = [int(n) for n in (splits/'ImageNet_LT'/'class_counts.txt').read_text().split()]
    (tmp_path/'train.txt').write_text(''.join(f'train/n{y:08}/n{y:08}_{i}.JPEG {y}\n' for y, n in enumerate(counts) for i in range(n)))
    for name in f'{split}.txt.xz', 'classnames.txt': (tmp_path/name).symlink_to(splits/'ImageNet_LT'/name)
    data = load_data('imagenet_lt', lists=tmp_path, split=split, sample=0)
    assert data.counts.tolist() == counts and (data.counts.max(), data.counts.min()) == (1280, 5)
    assert [int(m.sum()) for m in shot_groups(data.counts).values()] == [385, 479, 136]
    assert len(data.test_labels) == BENCHMARKS['imagenet_lt'].totals[split] and (data.classes[0], data.classes[-1]) == ('tench', 'toilet paper')
    (tmp_path/'train.txt').write_text((tmp_path/'train.txt').read_text().replace(' 0\n', ' 1\n', 31))
    with pytest.raises(LiftError, match=r'\(385, 478, 137\) many-, medium- and few-shot classes'): load_data('imagenet_lt', lists=tmp_path, sample=0)

@true_lists
def test_the_true_part_of_imagenet_lt():
    paths, labels = _read_list(splits/'ImageNet_LT'/'train_partial.txt.xz', 1000)
    counts = np.loadtxt(splits/'ImageNet_LT'/'class_counts.txt', dtype=int)
    assert len(paths) == 96_261 and (np.bincount(labels) <= counts).all() and (np.bincount(labels) >= .8*counts).all()

@true_lists
@pytest.mark.parametrize('key, n', [('k', 6), ('p', 25), ('c', 57), ('o', 272), ('f', 1118), ('g', 4401), ('s', 8142), ('', 8142)])
def test_levels_of_inat2018(key, n):
    row, lists = BENCHMARKS[f'inat2018_{key}' if key else 'inat2018'], splits/'iNaturalist2018'
    parts = dict(train=_read_list(lists/'train_head.txt.xz', 8142), val=benchmarks._checked_list(row, 'val', splits))
    names, grouped = row.named(parts, row, splits)
    assert len(names) == len(set(names)) == n
    categories = json.loads(lzma.open(lists/'categories.json.xz').read())
    for split, (paths, labels) in grouped.items():
        species = parts[split][1]
        assert all(names[y] == categories[s][_LEVELS.get(key, 'name')] for y, s in zip(labels, species))
        if key in ('', 's'): assert (labels == species).all()
    assert (np.bincount(parts['val'][1]) == 3).all() and set(grouped['val'][1]) == set(range(n))

@true_lists
@pytest.mark.parametrize('name', [n for n in _PINNED if not n.endswith(('T/train.txt', '8/train.txt'))] + ['Places_LT/train.txt'])
def test_the_pins_are_those_of_the_true_files(tmp_path, name):
    file = splits/name
    (tmp_path/'file').write_bytes(file.read_bytes() if file.exists() else lzma.open(f'{file}.xz').read())
    assert _PINNED[name].fits(tmp_path/'file')

@true_lists
@pytest.mark.parametrize('name, folder', [('imagenet_lt', 'ImageNet_LT'), ('places_lt', 'Places_LT')])
def test_stored_class_counts(name, folder):
    "The counts that the pages draw"
    with open(Path(__file__).parents[1]/'nbs'/'results'/f'{name}_counts.csv') as f: rows = list(csv.DictReader(f))
    assert [r['images'] for r in rows] == (splits/folder/'class_counts.txt').read_text().split()

# The true images of CIFAR-100

@pytest.fixture(scope='module')
def strips():
    "Images, labels and names from zips of one strip a class"
    def read(path):
        with zipfile.ZipFile(path) as z:
            names = sorted(z.namelist())
            x = [np.asarray(Image.open(z.open(n)).convert('RGB')).reshape(-1, 32, 32, 3) for n in names]
        return np.concatenate(x), np.repeat(np.arange(len(names)), [len(s) for s in x]), [n[3:-5] for n in names]
    return [read(cifar/f'{s}.zip') for s in ('train', 'test')]

@true_cifar
@pytest.mark.parametrize('ratio, total, groups', [(10, 19_573, (69, 31, 0)), (50, 12_608, (41, 41, 18)), (100, 10_847, (35, 35, 30))])
def test_cifar100_lt(strips, ratio, total, groups):
    (x, y, names), (test_x, test_y, _) = strips
    data = cifar100_lt(x, y, test_x, test_y, names, ratio)
    assert data.name == f'cifar100_ir{ratio}' and len(data.train_images) == total and len(data.test_images) == 10_000
    assert (data.counts[0], data.counts[-1]) == (500, 500//ratio)
    assert tuple(int(m.sum()) for m in shot_groups(data.counts).values()) == groups
