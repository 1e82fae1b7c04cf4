"Look at the built site in Chromium, wide and narrow, light and dark: text that is cut off, broken or unreadable, and whether search finds what people ask"
import argparse, functools, os, shutil, sys, threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

root = Path(__file__).resolve().parent.parent
widths, schemes = (1400, 420), ('light', 'dark')
flags = 'headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync'.split()

asked = { # what people type: a page that must be first or second
    'misclassified': 'evaluation/predictions.html evaluation/report.html explanations/faq.html',
    'deploy': 'models/export.html explanations/faq.html predictor.html',
    'early stopping': 'explanations/faq.html training/callbacks.html',
    'class imbalance': 'explanations/faq.html explanations/glossary.html training/losses.html',
    'resume': 'training/resume.html explanations/faq.html',
    'own images': 'tutorials/own_images.html',
    'out of memory': 'training/memory.html explanations/faq.html',
    'confidence': 'evaluation/calibration.html explanations/faq.html explanations/glossary.html',
    'learning rate': 'explanations/faq.html explanations/choosing.html experiments/recipe.html explanations/glossary.html',
    'onnx': 'models/export.html models/onnx_predictor.html',
    'rare classes': 'index.html explanations/faq.html explanations/glossary.html',
    'threshold': 'evaluation/decisions.html evaluation/calibration.html explanations/faq.html',
    'which backbone': 'explanations/choosing.html',
    'how long does it take': 'explanations/choosing.html explanations/faq.html',
    'no internet': 'explanations/faq.html',
    'csv labels': 'data/tables.html tutorials/own_images.html',
    'confusion matrix': 'evaluation/report.html evaluation/predictions.html evaluation/report_plots.html',
    'multiple gpus': 'training/distributed.html explanations/faq.html',
    'lora': 'models/adapters.html explanations/what_adapters_train.html',
    'macro f1': 'evaluation/metrics.html evaluation/report.html explanations/glossary.html',
    'focal loss': 'training/losses.html',
    'hyperparameter search': 'experiments/sweeps.html explanations/faq.html',
    'loss is nan': 'explanations/faq.html training/callbacks.html',
    'duplicate images': 'data/inspection.html',
}

look = r"""() => {
  const all = q => [...document.querySelectorAll(q)], shown = e => e.getClientRects().length > 0, text = e => e.textContent.trim().slice(0, 70);
  const lines = e => { const r = document.createRange(); r.selectNodeContents(e); return new Set([...r.getClientRects()].map(b => Math.round(b.top / 8))).size; };
  const rgb = c => (c.match(/[\d.]+/g) || [0, 0, 0, 0]).map((v, i) => Number(v) * (c.startsWith('color(') && i < 3 ? 255 : 1));
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > .5) return c.slice(0, 3); } return [255, 255, 255]; };
  const blend = (c, b) => c.slice(0, 3).map((v, i) => c.length > 3 ? v * c[3] + b[i] * (1 - c[3]) : v);
  const contrast = e => { const b0 = behind(e), [a, b] = [light(blend(rgb(getComputedStyle(e).color), b0)), light(b0)]; return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); };
  const words = all('body *').filter(e => shown(e) && ![...e.children].length && e.textContent.trim() && !e.closest('svg, math, script, style, noscript'));
  const ordinary = /^(main|test|run|history|data|model|train|images|learner|loss|few|many|scores|predict)$/;
  return {
    'code cut off': all('main pre, main pre > code').filter(e => shown(e) && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline').map(text),
    'page wider than the window': document.documentElement.scrollWidth > innerWidth + 1 ? [String(document.documentElement.scrollWidth)] : [],
    'raw Markdown links': (document.querySelector('main').textContent.match(/\[[^\]\n]{1,80}\]\((https?:|[\w.\/]+\.(html|ipynb))/g) || []),
    'ordinary words linked': all('main a > code').filter(e => ordinary.test(e.textContent) && e.parentElement.hash).map(text),
    'numbers broken over lines': all('main td, main th').filter(e => shown(e) && /^[\d.]+ ± [\d.]+$/.test(e.textContent.trim()) && lines(e) > 1).map(text),
    'tables of prose cut off': innerWidth < 1000 ? [] : all('main table:not(.dataframe)').filter(e => shown(e) && e.scrollWidth > e.clientWidth + 1).map(text),
    'low contrast': words.filter(e => contrast(e) < 3).map(e => `${contrast(e).toFixed(1)} ${text(e)}`),
  };
}"""

@contextmanager
def served(folder:Path): # the address of a server of `folder`
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/'
    finally: server.shutdown()

def chromium()->str|None: # its executable
    return os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

def views(browser): # a page of each width and theme
    for width in widths:
        for scheme in schemes:
            context = browser.new_context(viewport=dict(width=width, height=1000), color_scheme=scheme)
            yield width, scheme, context.new_page()
            context.close()

def problems(browser, site:str, pages:list)->list: # (kind, page, width, scheme, text)
    found = []
    for width, scheme, page in views(browser):
        for p in pages:
            page.goto(site + p, wait_until='load')
            page.wait_for_timeout(80) # the theme's script waits 50 ms
            found += [(kind, p, width, scheme, t) for kind, texts in page.evaluate(look).items() for t in texts]
    return found

def found_first(page, query:str, n:int=2)->list: # the first n pages that search shows
    page.fill('.smalldocs-search input >> visible=true', '')
    page.fill('.smalldocs-search input >> visible=true', query)
    page.wait_for_timeout(400)
    links = page.eval_on_selector_all('.smalldocs-search-results.show a', 'es => es.map(e => e.getAttribute("href"))')
    return list(dict.fromkeys(h.split('#')[0].removeprefix('./') for h in links))[:n]

def searches(browser, site:str)->dict: # {query: the pages found}, of each query that misses
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    page.goto(site + 'index.html')
    got = {q: found_first(page, q) for q in asked}
    return {q: g for q,g in got.items() if not {*g} & {*asked[q].split()}}

def unreadable_results(browser, site:str)->list: # as `problems`, of the list that search opens
    found = []
    for width, scheme, page in views(browser):
        if width < 1000: continue # the box is in the menu there
        page.goto(site + 'index.html')
        found_first(page, 'rare classes')
        found += [('low contrast', 'search', width, scheme, t) for t in page.evaluate(look)['low contrast']]
    return found

def report(folder:Path, pages:list|None=None)->tuple[list,dict]: # problems of the pages, searches that miss
    from playwright.sync_api import sync_playwright
    pages = pages or sorted(str(f.relative_to(folder)) for f in folder.rglob('*.html') if 'site_libs' not in f.parts)
    with served(folder) as site, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=[f'--{f}' for f in flags])
        try: return problems(browser, site, pages) + unreadable_results(browser, site), searches(browser, site)
        finally: browser.close()

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('pages', nargs='*', help='default: all')
    p.add_argument('--folder', type=Path, default=root/'_docs', help='the built site')
    a = p.parse_args()
    found, missed = report(a.folder, a.pages)
    for kind, page, width, scheme, text in found: print(f'{kind}: {page} at {width}, {scheme}: {text}')
    for q, got in missed.items(): print(f'search: {q!r} finds {got}, not {asked[q]}')
    kinds = {k: sum(f[0] == k for f in found) for k in dict.fromkeys(f[0] for f in found)}
    print(f'{kinds or "no problems"}; {len(asked)-len(missed)} of {len(asked)} searches find their page first or second')
    sys.exit(bool(found or missed))

if __name__=='__main__': main()
