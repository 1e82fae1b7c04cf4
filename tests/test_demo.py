"The page to try a model: what it answers, and the page itself in a browser where gradio, playwright and Chromium are there"
import os, shutil, socket
import numpy as np, pytest
from PIL import Image

from lift_nb.cli import main
from lift_nb.core.errors import LiftError
from lift_nb.data.dataset import digits_lt
from lift_nb.experiments.demo import _Demo, make_demo, serve_demo
from lift_nb.experiments.run import run
from lift_nb.predictor import load_lift

data = digits_lt()
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update '
    '--disable-sync').split()

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A run, calibrated, and images of its classes"
    folder = tmp_path_factory.mktemp('demo')
    run(folder/'run', data='digits_lt', method='lp', epochs=2, echo=lambda line: None)
    p = load_lift(folder/'run', device='cpu')
    p.calibrate(data.test_images[::2], data.test_labels[::2])
    p.save()
    for i in (10, 400): Image.fromarray(data.test_images[i]).resize((200, 200)).save(folder/f'digit {i}.png')
    (folder/'<b>no image.png').write_text('text')
    return folder

def test_answers(folder):
    "Probabilities, set, record and neighbours are those of the predictor, the report and the features"
    p = load_lift(folder/'run', device='cpu')
    demo = make_demo(folder/'run', p)
    found, want = demo.answer(str(folder/'digit 10.png')), p.predict(folder/'digit 10.png', 5, coverage=.9)
    assert [n for n, _ in found['top']] == list(want['class']) and np.allclose([q for _, q in found['top']], want.probability)
    assert found['set'].endswith(', '.join(want.set[0])) and 'of its 50 test images' in found['record'] and len(found['near']) == 6
    own = demo.neighbours.nearest(demo.neighbours.features[7])[0] # a training image is its own neighbour
    assert own['file'] == demo.neighbours.names[7] and own['name'] == data.class_names[data.train_labels[7]]
    page = demo.html([str(folder/'digit 400.png'), str(folder/'<b>no image.png')])
    assert '&lt;b&gt;no image.png' in page and '<b>no' not in page and demo.html(None).count('<article>') == 0

def test_what_is_missing(folder, tmp_path, monkeypatch, capsys):
    "Without images, report, calibration or gradio the rest still works, or a sentence says what to do"
    said, p = [], load_lift(folder/'run', device='cpu')
    shutil.copy(folder/'run/model.safetensors', tmp_path/'model.safetensors')
    demo = make_demo(tmp_path, p, say=said.append)
    assert demo.neighbours is None and len(said) == 2 and demo.answer(str(folder/'digit 10.png'))['near'] == []
    with pytest.raises(LiftError, match='choose from'): make_demo(tmp_path, p, coverage=.5)
    p.calibration = None
    assert 'Not calibrated' in _Demo(p).html([str(folder/'digit 10.png')])
    monkeypatch.setitem(__import__('sys').modules, 'gradio', None)
    for words, sentence in (['demo'], 'takes one run'), (['demo', str(folder/'run')], 'lift_nb[demo]'):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert sentence in err and err.count('\n') == 1

@pytest.fixture
def browser():
    pytest.importorskip('gradio')
    api = pytest.importorskip('playwright.sync_api')
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not path: pytest.skip('no Chromium')
    with api.sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=path, args=FLAGS)
        yield b
        b.close()

def test_page(folder, browser):
    "Two images are dropped; the page answers, asks nobody else, and listens on this computer only"
    said, foreign = [], []
    page = serve_demo(make_demo(folder/'run', load_lift(folder/'run', device='cpu')), 'digits', block=False, say=said.append)
    try:
        port = int(said[0].split(':')[2].split('/')[0])
        tab = browser.new_page(viewport=dict(width=1000, height=1000))
        tab.on('request', lambda r: r.url.startswith(('http://127.0.0.1', 'http://localhost', 'data:', 'blob:')) or foreign.append(r.url))
        tab.goto(said[0].split()[0])
        tab.wait_for_selector('input[type=file]', state='attached', timeout=60_000)
        tab.set_input_files('input[type=file]', [str(folder/'digit 10.png'), str(folder/'digit 400.png')])
        tab.wait_for_selector('.lift article:nth-of-type(2) .near figure', timeout=60_000)
        texts = tab.inner_text('.lift')
        assert 'digit 10.png' in texts and texts.count('Nearest training images') == 2 and 'The true class is among these' in texts
        if out := os.environ.get('SCREENSHOT'): tab.screenshot(path=out, full_page=True)
        addresses = {a[4][0] for a in socket.getaddrinfo(socket.gethostname(), port) if not a[4][0].startswith(('127.', '::1'))}
        for a in addresses:
            with socket.socket() as s: assert s.connect_ex((a, port))
        with pytest.raises(LiftError, match=f'port {port}'): serve_demo(make_demo(folder/'run', load_lift(folder/'run', device='cpu')), port=port, block=False)
        assert not foreign, foreign
    finally: page.close()
