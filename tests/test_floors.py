"The house: imports point down, fastai stays where it belongs, importing the package costs nothing."
import ast, configparser, json, re, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
chapters = {m[2]: int(m[1]) for p in (root/'nbs').glob('*.ipynb') if (m := re.match(r'(\d\d)_(\w+)$', p.stem))}
modules = sorted(p for p in (root/'gradreg').glob('*.py') if not p.stem.startswith('_'))
may_import_fastai = {'data', 'callbacks', 'measures', 'study'}

def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = 'gradreg' if node.level else ''
            base = '.'.join(filter(None, [here, node.module]))
            yield from ([base] if node.module else [f'{base}.{a.name}' for a in node.names])
            if base == 'gradreg' and node.module: yield from (f'{base}.{a.name}' for a in node.names)

def test_every_module_has_a_chapter(): assert {p.stem for p in modules} == set(chapters)
def test_no_cupboard(): assert not {p.stem for p in modules} & {'core', 'utils', 'common', 'all'}

@pytest.mark.parametrize('path', modules, ids=lambda p: p.stem)
def test_imports_point_down(path):
    for name in imports(path):
        if m := re.match(r'gradreg\.(\w+)', name): assert chapters[m[1]] < chapters[path.stem], f'{path.stem} imports {m[1]}'
        if name.split('.')[0] == 'fastai': assert path.stem in may_import_fastai, f'{path.stem} imports {name}'
        if chapters[path.stem] < 3: assert name.split('.')[0] not in ('fastai', 'fastcore'), f'{path.stem} imports {name}'
        if path.stem == 'plots': assert not name.startswith('gradreg'), 'plots knows tables, not runs'

def test_studies_export_nothing():
    for p in (root/'nbs/studies').glob('*.ipynb'):
        for cell in json.loads(p.read_text(encoding='utf-8'))['cells']: assert not re.search(r'^#\|\s*export|default_exp', ''.join(cell['source']), re.M), p

def python(code): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)

def test_importing_the_package_imports_nothing():
    done = python("import sys; before = set(sys.modules); import gradreg; print(sorted(set(sys.modules) - before))")
    assert done.stdout.strip() == "['gradreg']", done.stdout + done.stderr

@pytest.mark.parametrize('name', ['jacobians', 'penalties', 'models'])
def test_torch_is_enough(name):
    done = python(f"import sys; sys.modules['fastai'] = sys.modules['fastcore'] = None; import gradreg.{name}")
    assert done.returncode == 0, done.stderr

def test_version_stands_in_one_place():
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini')
    assert (root/'gradreg/__init__.py').read_text().split() == ['__version__', '=', f'"{ini["DEFAULT"]["version"]}"']
    assert '<' not in ini['DEFAULT']['requirements'], 'caps belong to dev_requirements'
