"How nbdev shows a name on the site (`renderer` and `procs` in settings.ini): a table of parameters, and links from words that mean a name of this library"
import re, textwrap
from inspect import Parameter, signature

from fastcore.docments import docments, empty
from nbdev.doclinks import NbdevLookup
from nbdev.showdoc import BasicMarkdownRenderer

words = {'main', 'test', 'run', 'history'} # ordinary words that are names, too: linked with parentheses only

def short(p:Parameter)->str: # a parameter with its default, without type
    star = {Parameter.VAR_POSITIONAL: '*', Parameter.VAR_KEYWORD: '**'}.get(p.kind, '')
    value = getattr(p.default, '__name__', repr(p.default))
    return f'{star}{p.name}' + ('' if p.default is Parameter.empty else f'={value}')

def text(v)->str: # for a cell of a Markdown table
    if v in (None, empty): return ''
    return re.sub(r'\s+', ' ', getattr(v, '__name__', None) or str(v)).replace('|', '\\|').replace('<', '&lt;')

def rows(sym)->list:
    found = docments(sym, full=True)
    def row(n, d): return f"| {n} | {text(d.get('anno'))} | {'' if d.get('default') in (None, empty) else text(d['default'])} | {text(d.get('docment'))} |"
    return [row('**returns**' if n == 'return' else f'`{n}`', d) for n, d in found.items() if n != 'self' and d.get('docment') not in (None, empty)]

class ParameterTable(BasicMarkdownRenderer):
    "Signature in lines that fit, docstring, and a table of parameters"
    def _repr_markdown_(self):
        full = super()._repr_markdown_()
        try: params, table = signature(self.sym).parameters.values(), rows(self.sym)
        except (TypeError, ValueError, AttributeError, NameError): return full
        line = f"{self.nm} ({', '.join(short(p) for p in params if p.name != 'self')})"
        code = '\n'.join(textwrap.wrap(line, 80, subsequent_indent='    ', break_long_words=False))
        full = re.sub(r'```python\n.*?\n```', lambda _: f'```python\n{code}\n```', full, count=1, flags=re.S)
        head = '| Parameter | Type | Default | Meaning |\n|---|---|---|---|\n'
        return full + ('\n\n' + head + '\n'.join(table) if table else '')

class Lookup(NbdevLookup):
    def doc(self, sym):
        return None if any(p.startswith('_') for p in sym.split('.')) else super().doc(sym)
    def link_line(self, line): # what is a link already stays as it is
        return ''.join(s if s.startswith('[') else super(Lookup, self).link_line(s) for s in re.split(r'(\[[^\]]*\]\([^)]*\))', line))
    def _link_sym(self, m):
        return m.group(0) if m.group(1) in words and not m.group(0).endswith('()`') else super()._link_sym(m)

def link_names(cell):
    "Links from backticked public names, in prose and in what `show_doc` shows, outside of code"
    look = Lookup(incl_libs=('lift_nb', 'fastai'))
    if cell.cell_type == 'markdown': cell.source = look.linkify(cell.source)
    for o in cell.get('outputs', []):
        md = o.get('data', {}).get('text/markdown')
        if md: o['data']['text/markdown'] = look.linkify(md if isinstance(md, str) else ''.join(md))
