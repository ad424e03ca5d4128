"How the house is written: lines fit, cells are short, names have one home and private ones stay there."
import ast, importlib, inspect, re
from collections import Counter
import pytest
from book import cells, chapters, code, has_flag, modules, notebooks, parsed, read, root, source

each_chapter = pytest.mark.parametrize('path', chapters, ids=lambda p: p.stem)

# ---------------------------------------------------------------- width

def too_wide(text): return [o[:60] for o in text.splitlines() if len(o) > 120 and not o.startswith('#|')]

written = [*(root/'tests').glob('*.py'), *(root/'docs').rglob('*.py'), root/'setup.py',
           *(o for kind in ('css', 'js') for o in (root/'docs/_static').glob(f'*.{kind}')), root/'docs/slider.html']
# not: prose in Markdown, which what shows it wraps, and settings.ini, where a value that goes on below is none for all

@pytest.mark.parametrize('path', written, ids=lambda p: p.name)
def test_lines_of_code_fit(path): assert not too_wide(read(path))

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_lines_of_cells_fit(path): assert not [o for c in code(path) for o in too_wide(source(c))]

# ---------------------------------------------------------------- cells

def is_fields(cell): return source(cell).startswith('#| export\n@dataclass')  # a table, a line each
def exports(path): return [c for c in code(path) if has_flag(c, 'export', 'exporti') and not is_import(c)]
def length(cell): return len(source(cell).strip().splitlines()) - 1

def is_import(cell):
    first,*others = parsed(source(cell)).body
    defines = ast.FunctionDef, ast.ClassDef, ast.Assign
    return isinstance(first, (ast.Import, ast.ImportFrom, ast.Try)) and not any(isinstance(o, defines) for o in others)

@each_chapter
def test_export_cells_are_short(path):
    cells = [c for c in exports(path) if not is_fields(c)]
    assert not [(length(c), source(c).splitlines()[1][:60]) for c in cells if length(c) > 20]

def checks(node, helpers=()):
    "Whether a cell or a function asserts something, or calls a helper that does."
    names = {getattr(o.func, 'id', getattr(o.func, 'attr', '')) for o in ast.walk(node) if isinstance(o, ast.Call)}
    said = any(re.match('assert|test_|raises|warns|(grad)?gradcheck', o) or o in helpers for o in names)
    return said or any(isinstance(o, ast.Assert) for o in ast.walk(node))

def unproved(cells):
    "Export cells that no check and no picture follows within two cells of code."
    shown = [c for c in cells if c['cell_type'] == 'code' and not is_fields(c) and 'show_doc(' not in source(c)]
    helpers,proofs = set(),[]
    for c in shown:
        tree = parsed(source(c))
        helpers |= {o.name for o in tree.body if isinstance(o, ast.FunctionDef) and checks(o, helpers)}
        pictures = any(k.startswith('image/') for o in c['outputs'] for k in o.get('data', {}))
        proofs.append(not has_flag(c, 'export', 'exporti', 'hide') and (pictures or checks(tree, helpers)))
    for i,c in enumerate(shown):
        if has_flag(c, 'export', 'exporti') and not is_import(c) and not any(proofs[i+1:i+3]):
            yield source(c).splitlines()[1:3]

@each_chapter
def test_proofs_stand_beside(path): assert not list(unproved(cells(path)))

# ---------------------------------------------------------------- names

def exported(module): return importlib.import_module(f'gradreg.{module}').__all__

def test_a_name_is_exported_once():
    assert not [o for o,n in Counter(o for m in modules for o in exported(m)).items() if n > 1]

def assigned(text):
    "Names that a cell binds at its top level."
    for node in parsed(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        for o in ast.walk(node) if isinstance(node, (ast.Assign, ast.AugAssign, ast.For, ast.With)) else ():
            if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store): yield o.id

@each_chapter
def test_no_cell_overwrites_what_is_exported(path):
    mine = set(exported(path.stem.split('_', 1)[1]))
    others = [c for c in code(path) if not has_flag(c, 'export', 'exporti')]
    assert not [(o, source(c)[:50]) for c in others for o in assigned(source(c)) if o in mine]

# ---------------------------------------------------------------- types

def offered(cls):
    "Methods of a class that somebody calls; fastai calls the others, by the names of its events."
    for name,o in vars(cls).items():
        o = o.fget if isinstance(o, property) else getattr(o, '__func__', o)
        public = name == '__init__' or not name.startswith(('_', 'before_', 'after_'))
        if public and inspect.isfunction(o) and o.__module__.startswith('gradreg') and o.__name__ != '<lambda>': yield o

def untyped(f):
    "What a function does not say the type of, apart from what it passes on."
    signature = inspect.signature(f)
    own = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    method = '.' in f.__qualname__.replace('<locals>.', '')
    yield from (p.name for p in own[method:] if p.annotation is p.empty)
    if signature.return_annotation is signature.empty and f.__name__ != '__init__': yield 'return'

@pytest.mark.parametrize('module', modules)
def test_what_is_offered_has_types(module):
    names = [getattr(importlib.import_module(f'gradreg.{module}'), o) for o in exported(module)]
    functions = [o for o in names if inspect.isfunction(o)]
    functions += [f for o in names if inspect.isclass(o) for f in offered(o)]
    assert not {f.__qualname__: found for f in functions if (found := list(untyped(f)))}

# ---------------------------------------------------------------- private names

def private(tree):
    "Private names that are taken from another room."
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('gradreg')):
            rooms |= {a.asname or a.name for a in node.names if a.name in modules}
            yield from (a.name for a in node.names if a.name.startswith('_'))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in rooms:
            if re.match('_(?!_)', node.attr): yield f'{node.value.id}.{node.attr}'

def privates(text): return list(private(ast.parse(text)))

rooms = [*(root/'gradreg').glob('[!_]*.py'), *(root/'docs').glob('*.py')]  # tests may look into a room

@pytest.mark.parametrize('path', rooms, ids=lambda p: p.name)
def test_no_private_name_crosses_a_room(path): assert not privates(read(path))

def helpers(path):
    "What a file of tests declares at its top, imports apart, where it is more than a line."
    top = [ast.unparse(o) for o in ast.parse(read(path)).body if not isinstance(o, (ast.Import, ast.ImportFrom))]
    return {o for o in top if '\n' in o}

def test_what_tests_share_is_declared_once():
    declared = Counter(o for path in (root/'tests').glob('*.py') for o in helpers(path))
    assert not [o for o,n in declared.items() if n > 1], 'move it to book, nets or samples'

def annotated(x:int, *args, **kwargs)->int: return x

@pytest.mark.parametrize('check,text,bad', [
    (too_wide, 'x'*121, True), (too_wide, '#| fig-alt: ' + 'x'*121, False), (privates, 'from .rows import _read', True),
    (privates, 'from . import rows\nrows._read', True), (privates, 'from .rows import load_rows', False),
    (assigned, 'def vjp(): 1', True), (assigned, 'vjp(1)', False),
    (untyped, lambda x: x, True), (untyped, annotated, False)])
def test_a_fault_is_seen(check, text, bad): assert bool(list(check(text))) == bad
