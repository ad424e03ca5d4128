"The house: imports point down, fastai stays where it belongs, rooms stay small, importing the package costs nothing."
import ast, configparser, json, re, statistics, subprocess, sys
from importlib.metadata import requires
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
chapters = {
    m[1]: p.stem for p in (root / 'nbs').glob('*.ipynb') if (m := re.match(r'\d\d_(\w+)$', p.stem))
}  # in the order of their names one reads them; the tens digit is the floor
modules = sorted(p for p in (root/'gradreg').glob('*.py') if not p.stem.startswith('_'))
each_module = pytest.mark.parametrize('path', modules, ids=lambda p: p.stem)
may_import_fastai = {
    'data', 'callbacks', 'measures', 'training', 'relative_callbacks', 'unlabelled', 'capture', 'lam_find'
}

def parse(path): return ast.parse(path.read_text(encoding='utf-8'))

def imports(nodes):
    "Absolute names of all modules that are imported, and of all that is taken from the package itself."
    for node in nodes:
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['gradreg' if node.level else '', node.module]))
            yield from (f'{base}.{a.name}' for a in node.names) if base == 'gradreg' else [base]

def faults(importer, names):
    "What `importer` may not import."
    for name in names:
        top,_,rest = name.partition('.')
        room = rest.partition('.')[0]
        if top == 'gradreg' and not chapters.get(room, '99') < chapters[importer]:
            yield f'{importer} imports {name}: it may only look down'
        if top == 'gradreg' and importer == 'plots' and room != 'tables':
            yield f'plots imports {name}: it knows tables, not runs'
        if top == 'fastai' and importer not in may_import_fastai:
            yield f'{importer} imports {name}: only {sorted(may_import_fastai)} may'
        if top in ('torch', 'fastai', 'fastcore') and importer in ('rows', 'tables', 'claims'):
            yield f'{importer} imports {name}: it knows rows, not networks'
        if top in ('fastai', 'fastcore') and importer in (
            'jacobians',
            'penalties',
            'relatives',
            'double_backward',
            'models',
        ):
            yield f'{importer} imports {name}: torch is enough'

def named_above(path):
    "Rooms above that a room names as text, 'gradreg.room:name', which no import shows."
    named = re.findall(r"'gradreg\.(\w+):\w+'", path.read_text(encoding='utf-8'))
    return {o for o in named if not chapters[o] < chapters[path.stem]}

@each_module
def test_text_points_down_too(path):
    "But for the tables of names in `runs`, and the graph that `training` adds on a GPU: it needs callbacks alone"
    assert named_above(path) <= {'runs': {*chapters}, 'training': {'capture'}}.get(path.stem, set())

def test_every_module_has_a_chapter(): assert {p.stem for p in modules} == set(chapters)
def test_no_cupboard(): assert not {p.stem for p in modules} & {'core', 'utils', 'common', 'all'}

@each_module
def test_imports_point_down(path): assert not list(faults(path.stem, imports(ast.walk(parse(path)))))

@pytest.mark.parametrize(
    'importer,source',
    [
        ('penalties', 'from gradreg.callbacks import SpectReg'),
        ('penalties', 'from .penalties import sphere'),
        ('jacobians', 'import gradreg.penalties'),
        ('callbacks', 'def f():\n    from . import study'),
        ('plots', 'from .jacobians import vjp'),
        ('arrays', 'from .data import scale'),
        ('tables', 'import torch'),
        ('rows', 'import torch'),
        ('claims', 'from fastcore.test import test_eq'),
        ('models', 'import fastcore.basics as b'),
        ('cli', 'from fastai.learner import Learner'),
        ('study', 'from gradreg import no_such_room'),
    ],
)
def test_a_wrong_import_is_seen(importer, source):
    assert list(faults(importer, imports(ast.walk(ast.parse(source)))))

@each_module
def test_rooms_are_small(path):
    lines = len(path.read_text(encoding='utf-8').splitlines())
    assert lines <= 350, f'{path.stem} has {lines} lines: make it two rooms'

def statements(f):
    "Number of statements of a function, its docstring and the bodies of functions within it apart."
    def count(node):
        inner = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node is not f
        return isinstance(node, ast.stmt) + (0 if inner else sum(map(count, ast.iter_child_nodes(node))))
    return count(f) - 1 - (ast.get_docstring(f) is not None)

def lengths():
    for path in modules:
        for f in ast.walk(parse(path)):
            if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)): yield f'{path.stem}.{f.name}',statements(f)

def test_functions_are_short():
    names,n = zip(*lengths())
    assert not [o for o in zip(names, n) if o[1] > 25]
    assert statistics.median(n) <= 4

def test_statements_are_counted():
    f, = ast.parse("def f(x):\n    'doc'\n    if x: return 1\n    def g():\n        y = 1; return y\n    return g").body
    assert statements(f) == 4  # if, return, def, return

def test_studies_export_nothing():
    for p in (root/'nbs/studies').glob('*.ipynb'):
        for cell in json.loads(p.read_text(encoding='utf-8'))['cells']:
            assert not re.search(r'^\s*#\s*\|\s*(export|default_exp)', ''.join(cell['source']), re.M), p.name

def python(code): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)

def test_importing_the_package_imports_nothing():
    done = python("import sys; before = set(sys.modules); import gradreg; print(sorted(set(sys.modules) - before))")
    assert done.stdout.strip() == "['gradreg']", done.stdout + done.stderr

def test_torch_is_enough():
    done = python("""if True:
        import sys
        sys.modules.update(dict.fromkeys('fastai fastcore nbdev pandas matplotlib seaborn sklearn torchvision'.split()))
        import torch, gradreg.double_backward, gradreg.jacobians, gradreg.relatives
        from gradreg.models import lenet5
        from gradreg.penalties import spect_reg
        x = torch.randn(2, 1, 28, 28, requires_grad=True)
        assert spect_reg(lenet5()(x), x).shape == (2,)""")
    assert done.returncode == 0, done.stderr

@pytest.fixture
def settings():
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def name_of(requirement): return re.match(r'[\w.-]+', requirement)[0]

def test_version_stands_in_one_place(settings):
    assert (root/'gradreg/__init__.py').read_text().split() == ['__version__', '=', f'"{settings["version"]}"']

def test_requirements_have_no_caps(settings):
    assert not re.search('[<~!]|==', settings['requirements']), 'caps belong to dev_requirements'

def test_what_the_package_imports_arrives_with_it(settings):
    on_pypi = {'sklearn': 'scikit-learn', 'PIL': 'pillow'}
    required = {name_of(o) for o in settings['requirements'].split()}
    arrives = required | {
        name_of(o) for r in required for o in requires(r) or [] if ';' not in o
    }  # what these always bring along
    needed = {name.split('.')[0] for p in modules for name in imports(parse(p).body)} - {
        'gradreg',
        *sys.stdlib_module_names,
    }
    missing = {on_pypi.get(o, o) for o in needed} - arrives
    assert not missing, f'add to requirements in settings.ini: {" ".join(sorted(missing))}'
