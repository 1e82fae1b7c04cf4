"The house rules, checked: order of the modules, sizes, docstrings, titles, no foreign paths"
import ast, json, re, subprocess
from pathlib import Path
import pytest
from nbdev.processors import _default_exp
from notebooks import NBProcessor, read_nb, root

modules = sorted(f for f in (root/'lift_nb').rglob('*.py') if f.name not in ('_modidx.py', '__init__.py'))
notebooks = sorted(f for f in (root/'nbs').rglob('*.ipynb') if not any(p[0] in '_.' for p in f.relative_to(root).parts))
folders = 'core data models training evaluation original experiments bench'.split() # each imports from those before it; the doors come last
place = {_default_exp(read_nb(f)): f.relative_to(root/'nbs') for f in notebooks if f.name[0].isdigit()} # module → notebook
allowed = {'nbs', 'tests', 'lift_nb', 'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'CHANGELOG.md',
           'CONTRIBUTING.md', 'CODE_OF_CONDUCT.md', 'CITATION.cff', 'MANIFEST.in', '.github', '.ci', '.gitignore', '.gitattributes'}
functions = ast.FunctionDef, ast.AsyncFunctionDef

each_module = pytest.mark.parametrize('module', modules, ids=lambda f: '.'.join(f.relative_to(root/'lift_nb').with_suffix('').parts))
each_notebook = pytest.mark.parametrize('notebook', notebooks, ids=lambda f: str(f.relative_to(root/'nbs')))
def tree(f): return ast.parse(f.read_text(encoding='utf-8'))
def lines(n): return n.end_lineno - n.lineno + 1

def dotted(f): return '.'.join(f.relative_to(root/'lift_nb').with_suffix('').parts)
def rank(module): # where a module stands among all
    folder = module.split('.')[0] if '.' in module else None
    return (folders.index(folder) if folder in folders else len(folders)), place[module].name if module in place else '99'

def imported(f):
    "Names of the modules of lift_nb that `f` imports, also inside functions"
    base = ['lift_nb', *f.relative_to(root/'lift_nb').parts[:-1]]
    for n in ast.walk(tree(f)):
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            start = '.'.join([*(base[:len(base)-n.level+1] if n.level else []), *filter(None, [n.module])])
            names = [start, *(f'{start}.{a.name}' for a in n.names)]
        else: continue
        yield from (m.removeprefix('lift_nb.') for m in names if m.removeprefix('lift_nb.') in place)

@each_module
def test_imports_go_downwards(module):
    upward = sorted(m for m in {*imported(module)} if rank(m) >= rank(dotted(module)))
    assert not upward, f'{dotted(module)} imports {upward}, which do not come before it'

def defined(body):
    "Names that statements define, not those they import"
    for n in body:
        if isinstance(n, (*functions, ast.ClassDef)): yield n.name
        elif isinstance(n, (ast.Assign, ast.AnnAssign)):
            yield from (t.id for a in getattr(n, 'targets', None) or [n.target] for t in ast.walk(a) if isinstance(t, ast.Name))
        else: yield from (x for k in ('body', 'orelse', 'handlers', 'finalbody') for x in defined(getattr(n, k, [])))

@each_module
def test_names_come_from_where_they_are_defined(module):
    base, strange = module.relative_to(root).parts[:-1], []
    for n in ast.walk(tree(module)):
        if not isinstance(n, ast.ImportFrom) or not n.level: continue
        home = root.joinpath(*base[:len(base)-n.level+1], *(n.module or '').split('.')).with_suffix('.py')
        if home.is_file(): strange += [f'{a.name} from {n.module}' for a in n.names if a.name not in {*defined(tree(home).body)}]
    assert not strange, f'{dotted(module)} imports {strange}, which are defined elsewhere'

@each_module
def test_sizes(module):
    big = [f'{n.name}: {lines(n)} lines' for n in ast.walk(tree(module))
           if isinstance(n, functions) and lines(n) > 30 or isinstance(n, ast.ClassDef) and lines(n) >= 60]
    source = module.read_text(encoding='utf-8').splitlines()
    big += [f'line {i}: {len(l)} characters' for i,l in enumerate(source, 1) if len(l) > 160]
    assert not big, f'{module.name}: {big}'

@each_module
def test_forbidden(module):
    calls = [ast.unparse(n.func) for n in ast.walk(tree(module)) if isinstance(n, ast.Call)]
    found = [c for c in calls if c in ('eval', 'exec', 'pickle.load', 'pickle.loads')]
    found += re.findall(r'\bTODO\b|\bFIXME\b', module.read_text(encoding='utf-8'))
    assert not found, f'{module.name} has {found}'

@each_module
def test_docstrings(module):
    bare = [n.name for n in tree(module).body
            if isinstance(n, (*functions, ast.ClassDef)) and n.name[0]!='_' and not ast.get_docstring(n)]
    assert not bare, f'{module.name}: no docstring in {bare}'

@each_notebook
def test_title_and_promise(notebook):
    first = next((c.source for c in read_nb(notebook).cells if c.cell_type=='markdown'), '')
    assert re.search(r'^# \S', first) and re.search(r'^> \S', first, re.M), 'begin with `# Title` and `> promise` in one cell'
    rest = [l for l in first.splitlines() if l.strip() and not re.match(r'# |> |- \w+:', l)]
    assert not rest, f'nbdev drops other lines of the title cell; move to the next cell: {rest}'

@each_notebook
def test_export_cells_are_short(notebook):
    cells = [c for c in NBProcessor(notebook).nb.cells if {'export', 'exports', 'exporti'} & c.directives_.keys()]
    big = [c.idx_ for c in cells if len([l for l in c.source.splitlines() if l.strip()]) > 50]
    assert not big, f'{notebook.name}: cells {big} export more than 50 lines'

@each_notebook
def test_imports_have_cells_of_their_own(notebook): # nbdev runs a cell with imports when it makes the page, and nothing before it
    sources = [re.sub(r'^(\s*)[!%].*$', r'\1pass', c.source, flags=re.M) for c in read_nb(notebook).cells if c.cell_type == 'code']
    bodies = [ast.parse(s).body for s in sources]
    mixed = [ast.unparse(b[0]) for b in bodies if 0 < sum(isinstance(n, (ast.Import, ast.ImportFrom)) for n in b) < len(b)]
    assert not mixed, f'{notebook.name}: a cell imports and does something else: {mixed}'

@each_notebook
def test_outputs_name_no_machine(notebook):
    outputs = [o for c in read_nb(notebook).cells for o in c.get('outputs', [])]
    texts = [v for o in outputs for k,v in [('', o.get('text', '')), *o.get('data', {}).items()] if not k.startswith('image/')]
    paths = re.findall(r'(?<![\w.:/])/(?:home|root|tmp|Users|usr)/[^\s"\\]*|site-packages', json.dumps(texts))
    assert not paths, f'{notebook.name} shows {paths[:3]}'

def test_numbers_are_unique():
    nums = [(f.parent.name, f.name.split('_')[0]) for f in notebooks if f.name[0].isdigit()]
    assert len(set(nums)) == len(nums), f'two notebooks with one number: {sorted(n for n in nums if nums.count(n) > 1)}'

def test_top_level():
    names = subprocess.check_output(['git', 'ls-files'], cwd=root, text=True).splitlines()
    extra = {n.split('/')[0] for n in names} - allowed
    assert not extra, f'not at the top level: {sorted(extra)}'

@each_notebook
def test_a_rerun_keeps_committed_results(notebook): # `new/'file'` or the like instead: where LIFT_NB_RESULTS says
    written = re.compile(r"(write_text|write_bytes|to_csv|savez\w*|copy|_write_json|open)\([^\n]*\.\./results|\.\./results[^\n]*\)\.(write_text|write_bytes)\(")
    found = [c.source for c in read_nb(notebook).cells if c.cell_type == 'code' and written.search(c.source)]
    assert not found, f'{notebook.name} overwrites committed results: {found}'

@each_notebook
def test_no_warning_opens_it(notebook): # fastai's import warns of torch.jit.script; importing lift_nb first silences that
    code = '\n'.join(c.source for c in read_nb(notebook).cells if c.cell_type == 'code')
    first = re.search(r'^(?:from|import) (lift_nb|fastai\.(?!torch_core))', code, re.M)
    assert not first or first[1] == 'lift_nb', f'{notebook.name} imports {first[1]} before lift_nb'
