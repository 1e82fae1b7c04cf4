"The notebooks' tools: execute them into themselves, check that they are clean and exported, build README.md"
import argparse, base64, os, re, subprocess, sys
from pathlib import Path

import matplotlib
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export, nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

root = Path(__file__).resolve().parent.parent
index, images = root/'nbs/index.ipynb', root/'nbs/index_files'
picture = {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg'}

def code_cells(
    fn:Path, # a notebook
    flags:str='', # words of `tst_flags` to run nevertheless, such as `slow`
)->list: # cells that `nbdev_test` would run, their directives moved from the source to `directives_`
    "The rule is a closure inside `nbdev.test.test_nb`, so it is said again here."
    nb = NBProcessor(fn, procs=FrontmatterProc, process=True).nb
    if nb.frontmatter_.get('skip_exec'): return []
    skip = set(get_config().tst_flags.split()) - set(flags.split())
    def runs(c):
        shown = c.directives_.get('eval:', [''])[0].lower() == 'false'
        return c.cell_type=='code' and 'nbdev_export(' not in c.source and not shown and not skip & c.directives_.keys()
    return [c for c in nb.cells if runs(c)]

def execute(fn:Path, flags:str=''):
    "Run `fn` and keep what its cells print and show, but not stderr: warnings name the paths of one machine."
    nb, shell = read_nb(fn), CaptureShell(fn)
    matplotlib.rc_file(Path(__file__).with_name('matplotlibrc'), use_default_template=False)
    cells = {c.id: c for c in nb.cells}
    with working_directory(fn.parent):
        for c in code_cells(fn, flags):
            shell._cell_idx = cells[c.id].idx_ + 1  # prettytb names it
            cells[c.id].outputs = shell.run(c.source, stderr=False)
            if shell.exc: sys.exit(f'{fn.name}, cell {cells[c.id].idx_}:\n{shell.prettytb(fn)}')
    write_nb(nb, fn)
    nbdev_clean.__wrapped__(str(fn))

def check()->str: # what git sees under nbs/ and lift_nb/ after cleaning and exporting: nothing is right
    "`nbdev_clean` and `nbdev_export` return 0 always, so ask git."
    nbdev_clean.__wrapped__()
    nbdev_export.__wrapped__()
    return subprocess.check_output(['git', 'status', '--porcelain', '--', 'nbs', 'lift_nb'], cwd=root, text=True)

def github(kind:str)->str: # 'blob' for pages, 'raw' for pictures
    cfg = get_config()
    return f'{cfg.git_url}/{kind}/{cfg.branch}'

def markdown(source:str)->str:
    "Prose of nbs/index.ipynb with absolute links, which work on GitHub and on PyPI"
    link = r'(\]\(|src="|href=")(?!\w+:|[#/])([^)"\s]+)'
    return re.sub(link, lambda m: m[1] + f"{github('blob')}/{os.path.normpath(f'nbs/{m[2]}')}", source)

def fenced(text:str, lang:str='')->str: return f'```{lang}\n{text.rstrip()}\n```'

def output(o, pictures:dict, alt:str)->str:
    "An output as GitHub's Markdown; a picture goes to `pictures`"
    if 'data' not in o: return fenced(''.join(o.get('text', [])))
    text = {k: v if isinstance(v, str) else ''.join(v) for k,v in o.data.items()}
    for mime, ext in picture.items():
        if mime not in text: continue
        name = f'figure-{len(pictures)+1}.{ext}'
        pictures[name] = text[mime].encode() if ext=='svg' else base64.b64decode(text[mime])
        width = o.get('metadata', {}).get(mime, {}).get('width')
        return f'<img src="{github("raw")}/nbs/{images.name}/{name}" alt="{alt or name}"' + (f' width="{width}">' if width else '>')
    if 'text/markdown' in text: return markdown(text['text/markdown'])
    return table(text['text/html']) if '<table' in text.get('text/html', '') else fenced(text['text/plain'])

def table(html:str)->str:
    import pypandoc
    html = re.sub(r'<style.*?</style>', '', html, flags=re.S)
    return pypandoc.convert_text(html, 'gfm-raw_html', 'html', extra_args=['--columns=120']).strip()

def readme()->tuple[str,dict]: # README.md, {name: bytes} of its pictures
    "README.md from nbs/index.ipynb and the outputs stored in it"
    parts, pictures = [], {}
    for c in NBProcessor(index).nb.cells:
        d = {k.rstrip(':'): v for k,v in c.directives_.items()}
        shown = lambda k: d.get(k) != ['false']
        if c.cell_type=='raw' or 'hide' in d or not shown('include'): continue
        if c.cell_type=='markdown': parts.append(markdown(c.source))
        elif shown('echo') and c.source.strip(): parts.append(fenced(re.sub(r'^#\|.*\n', '', c.source, flags=re.M), 'python'))
        parts += [output(o, pictures, ' '.join(d.get('fig-alt', [])).strip('"')) for o in c.get('outputs', []) if shown('output')]
    parts.insert(1, '<!-- Made from nbs/index.ipynb by `python .ci/notebooks.py readme`: edit that. -->')
    return '\n\n'.join(p.strip() for p in parts) + '\n', pictures

def write_readme(check:bool)->str: # names of files that differ from what they should be
    text, pictures = readme()
    want = {root/'README.md': text.encode(), **{images/k: v for k,v in pictures.items()}}
    extra = [f for f in images.glob('*') if f not in want]
    stale = [f for f,b in want.items() if not f.exists() or f.read_bytes()!=b]
    if check: return ''.join(f'{f.relative_to(root)} is not what nbs/index.ipynb says\n' for f in stale+extra)
    images.mkdir(exist_ok=True)
    for f in extra: f.unlink()
    for f in stale: f.write_bytes(want[f])
    if not pictures: images.rmdir()
    return ''

def main():
    p = argparse.ArgumentParser(description=__doc__)
    sub = p.add_subparsers(dest='command', required=True)
    e = sub.add_parser('execute', help='run notebooks and store their outputs (then look at `git diff`)')
    e.add_argument('files', nargs='*', type=Path, help='default: all')
    e.add_argument('--flags', default='', help="cells to run nevertheless, such as 'slow gpu'")
    sub.add_parser('check', help='list what nbdev_clean and nbdev_export change; nothing is right')
    sub.add_parser('readme', help='build README.md').add_argument('--check', action='store_true', help='compare only')
    a = p.parse_args()
    if a.command=='execute':
        os.environ['IN_TEST'] = '1'
        for f in a.files or sorted(nbglob(as_path=True)): execute(f.resolve(), a.flags)
        return
    report = check() if a.command=='check' else write_readme(a.check)
    sys.exit(report.rstrip() or 0)

if __name__=='__main__': main()
