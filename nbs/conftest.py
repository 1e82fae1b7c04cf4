"Every code cell of every notebook is a pytest item: modules run against the exported module, documents as they are."
import importlib, os, traceback
import pytest
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.processors import _default_exp
from notebooks import code_cells, get_config, read_nb

os.environ['IN_TEST'] = '1'
exported = {'export', 'exports', 'exporti', 'default_exp'}

def pytest_addoption(parser): parser.addoption('--flags', default='', help="notebook cells to run nevertheless: 'slow gpu'")

def pytest_collect_file(file_path, parent):
    if file_path.suffix=='.ipynb' and file_path.name[0] not in '_.': return Notebook.from_parent(parent, path=file_path)

class Notebook(pytest.File):
    def collect(self):
        self.broken, nb = None, read_nb(self.path)
        self.module, at = _default_exp(nb), {c.id: i for i,c in enumerate(nb.cells)}
        for c in code_cells(self.path, self.config.getoption('--flags')):
            if not (self.module and exported & c.directives_.keys()):
                yield Cell.from_parent(self, name=f'cell {at[c.id]}', source=c.source)

    def setup(self):
        self.shell = CaptureShell(self.path, mpl_format='png')
        if not self.module: return
        module = importlib.import_module(f"{get_config().lib_name}.{self.module}")
        self.shell.user_ns.update({k: v for k,v in vars(module).items() if not k.startswith('__')})

    def teardown(self):
        import matplotlib.pyplot as plt
        plt.close('all')
        self.shell.reset()

class CellFailed(Exception): pass

class Cell(pytest.Item):
    def __init__(self, source, **kwargs):
        super().__init__(**kwargs)
        self.source = source

    def runtest(self):
        nb = self.parent
        if nb.broken: pytest.skip(f'{nb.broken} of this notebook failed')
        with working_directory(nb.path.parent): nb.shell.run(self.source)
        if not nb.shell.exc: return
        nb.broken = self.name
        raise CellFailed(self.message(nb.shell.exc))

    def message(self, e):
        "Notebook, cell, the line of the cell, and the traceback from there on"
        tb = traceback.extract_tb(e.__traceback__)
        here = [i for i,f in enumerate(tb) if 'ipykernel' in f.filename or f.filename.startswith('<ipython')]
        line = tb[here[-1]].line if here else self.source
        below = ''.join(traceback.format_list(tb[here[-1]+1:] if here else []))
        return f"{self.parent.path.name}, {self.name}: {line}\n{below}{''.join(traceback.format_exception_only(e))}"

    def repr_failure(self, excinfo):
        return str(excinfo.value) if excinfo.errisinstance(CellFailed) else super().repr_failure(excinfo)

    def reportinfo(self): return self.path, 0, f'{self.path.name}: {self.name}'
