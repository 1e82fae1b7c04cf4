"Build the documentation into _docs/ without Quarto and check it: a page and an anchor for every name, no dead link"
import importlib, json, re, shutil, sys, tempfile
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pypandoc, yaml
from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.config import load
from smalldocs.site import Site

only_quarto = 'respect-user-color-scheme', 'html-math-method', 'output-file' # smalldocs does these in its own way

def page_names(folder:Path)->dict: # {Path('data/00_images.ipynb'): Path('data/images.ipynb')}
    "nbdev drops the numbers from the names of pages"
    found = sorted(f.relative_to(folder) for f in folder.rglob('*.ipynb') if not any(p[0] in '_.' for p in f.relative_to(folder).parts))
    names = {f: f.with_name(_nbpath2html(f).with_suffix('.ipynb').name) for f in found}
    twice = {str(n) for n in names.values() if list(names.values()).count(n) > 1}
    if twice: sys.exit(f'Two notebooks become one page: {sorted(twice)}')
    return names

def stage(src:Path, dst:Path):
    "Copy what `proc_nbs` made under the pages' names, links to the published site made relative"
    cfg, names = get_config(), page_names(src)
    site = f'{cfg.doc_host}{cfg.doc_baseurl}/'
    shutil.copytree(src, dst, dirs_exist_ok=True)
    for f in [*dst.rglob('*.ipynb'), *dst.glob('*.yml')]:
        rel = f.relative_to(dst)
        text = f.read_text(encoding='utf-8').replace(site, '../'*(len(rel.parts)-1))
        f.unlink()
        (dst/names.get(rel, rel)).write_text(re.sub(r'(?<=[(/ "\'])\d+_(?=\w+\.ipynb)', '', text), encoding='utf-8')

def mathml(m:re.Match)->str:
    tex = f'${unescape(m[2]).strip()}$' if m[1]=='inline' else f'$${unescape(m[2]).strip()}$$'
    made = re.search('<math.*</math>', pypandoc.convert_text(tex, 'html', 'markdown', extra_args=['--mathml']), re.S)
    return made[0] if made else sys.exit(f'pandoc cannot read the formula {tex}')

class OfflineSite(Site):
    "Formulas as MathML, which smalldocs leaves to a script from the web; pictures as wide as the notebook says"
    def render_page(self, page):
        super().render_page(page)
        page.html = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', mathml, page.html, flags=re.S)
        page.env.pop('math', None)
        outputs = [o for c in read_nb(self.root/page.src).cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
        for o in outputs:
            w, src = o.metadata.get('image/png', {}).get('width'), o.data['image/png'].strip() + '"'
            if w: page.html = page.html.replace(src, f'{src} width="{w}"')

def improve_search(site:Site):
    "Rank by words, and find pages by their first sentence and by the keywords that .ci/search.yml lists for them"
    here, index = Path(__file__).parent, site.out/'search.json'
    entries, keywords = json.loads(index.read_text(encoding='utf-8')), yaml.safe_load((here/'search.yml').read_text(encoding='utf-8'))
    pages = {str(p.out): p for p in site.pages.values()}
    if unknown := keywords.keys() - pages.keys(): sys.exit(f'.ci/search.yml names {sorted(unknown)}, which are no pages')
    top = {e['href']: e for e in entries if not e['section']}
    for href, p in pages.items():
        if href not in top: entries.append(top.setdefault(href, dict(objectID=href, href=href, title=p.title, section='', text='')))
        said = ' '.join(str(p.meta[k]) for k in ('subtitle', 'description') if p.meta.get(k))
        top[href].update(keywords=f"{said} {keywords.get(href, '')}", text=top[href]['text'] or said)
    index.write_text(json.dumps(entries, ensure_ascii=False), encoding='utf-8')
    with (site.out/'site_libs/fuse/fuse.min.js').open('a', encoding='utf-8') as f: f.write('\n' + (here/'search.js').read_text(encoding='utf-8'))

def build(out:Path)->list: # smalldocs' warnings
    "The site that Quarto makes for GitHub Pages, by smalldocs"
    refresh_quarto_yml()
    made = proc_nbs(force=True, n_workers=2)
    with tempfile.TemporaryDirectory() as tmp:
        stage(made, Path(tmp))
        site = OfflineSite(load(tmp), quiet=True)
        site.out = out
        site.build()
        improve_search(site)
    return [w for w in site.warnings if not any(k in w for k in only_quarto)]

class Page(HTMLParser):
    "The anchors and links of a page"
    def __init__(self, file:Path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(file.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids.add(a.get('id'))
        self.links += [a[k] for k in ('href', 'src') if a.get(k)]

def dead(link:str, file:Path, pages:dict)->bool:
    "A link inside the site, or to a source file of this repository, that leads nowhere"
    cfg, url = get_config(), urlsplit(link)
    blob = f'{cfg.git_url}/blob/{cfg.branch}/'
    if link.startswith(blob): return not (cfg.config_path/unquote(link.removeprefix(blob).split('#')[0])).exists()
    if url.scheme or url.netloc: return False
    target = (file.parent/unquote(url.path)).resolve() if url.path else file
    if target.is_dir(): target /= 'index.html'
    return not target.exists() or bool(url.fragment) and target in pages and unquote(url.fragment) not in pages[target].ids

def undocumented(out:Path, pages:dict)->tuple[int,list]: # public names, those without an anchor
    "A method written inside its class is on the class's anchor; a patched one has its own"
    syms = importlib.import_module(f'{get_config().lib_name}._modidx').d['syms']
    names = {n.removeprefix(f'{mod}.'): href for mod,d in syms.items() for n,(href,_) in d.items()}
    names = {n: href.split('#') for n,href in names.items() if not any(p[0]=='_' for p in n.split('.'))}
    def found(page, anchor):
        ids = pages[out/page].ids if out/page in pages else ()
        return anchor in ids or anchor.split('.')[0] in ids
    return len(names), [f'{n} has no anchor in {p}' for n,(p,a) in names.items() if not found(p, a)]

def main():
    out = Path(get_config().doc_path).resolve()
    problems = build(out)
    pages = {f: Page(f) for f in sorted(out.rglob('*.html'))}
    links = [(l, f) for f,p in pages.items() for l in p.links]
    n, bare = undocumented(out, pages)
    problems += bare + [f'{f.name}: dead link {l}' for l,f in links if dead(l, f, pages)]
    sidebar = (get_config().nbs_path/'sidebar.yml').read_text(encoding='utf-8')
    problems += [f'{f} is not in nbs/sidebar.yml' for f in page_names(get_config().nbs_path) if str(f) not in sidebar]
    for p in sorted(set(problems)): print(p)
    print(f'{len(pages)} pages, {n} names, {len(links)} links: {len(set(problems))} problems')
    sys.exit(bool(problems))

if __name__=='__main__': main()
