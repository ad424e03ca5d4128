"What is generated is what the notebooks say; what is exported is documented; what is stored is clean."
import ast, importlib, inspect, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from fastcore.docments import docments

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'docs'))
from make_readme import render

modules = sorted(p.stem for p in (root/'gradreg').glob('*.py') if not p.stem.startswith('_'))
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not {'.ipynb_checkpoints', 'out'} & set(p.parts))
cells = lambda p: json.loads(p.read_text(encoding='utf-8'))['cells']

def test_export_leaves_no_diff(tmp_path):
    for name in 'settings.ini', 'setup.py', 'README.md': shutil.copy(root/name, tmp_path)
    shutil.copytree(root/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('out', '.ipynb_checkpoints'))
    (tmp_path/'gradreg').mkdir()
    done = subprocess.run([sys.executable, '-c', 'from nbdev.export import nb_export; from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {p.name: p.read_text() for p in (tmp_path/'gradreg').glob('*.py')}
    assert made == {p.name: p.read_text() for p in (root/'gradreg').glob('*.py')}, 'run `make export`'

def test_readme_is_the_index():
    text,images = render(json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8')))
    assert (root/'README.md').read_text(encoding='utf-8') == text, 'run `make export`'
    assert {p.name: p.read_bytes() for p in (root/'docs/images').glob('readme-*.png')} == images and images

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook_is_clean_and_executed(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert path.stat().st_size < 400_000 and set(nb['metadata']) <= {'kernelspec'}
    outputs = [o for c in nb['cells'] if c['cell_type'] == 'code' for o in c['outputs']]
    assert outputs, 'execute the notebook before you commit it'
    for c in nb['cells']: assert not c['metadata'] and c.get('execution_count') is None and c.get('id')
    for o in outputs: assert o['output_type'] != 'error' and o.get('name') != 'stderr' and o.get('execution_count') is None
    for c in nb['cells']:  # a cell that ends in a name or draws must show something
        last = ''.join(c['source']).rstrip().splitlines()[-1:] or ['']
        if c['cell_type'] == 'code' and re.fullmatch(r'[a-z_]\w*', last[0]): assert c['outputs'], f'no output stored: {last[0]}'

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_links_between_notebooks_resolve(path):
    for c in cells(path):
        for link in re.findall(r'\]\(([\w/.]+\.ipynb)', ''.join(c['source'])): assert (path.parent/link).exists(), f'{path.name}: {link}'

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_title_and_sentence_open_a_chapter(path):
    first = ''.join(cells(path)[0]['source'])
    assert re.match(r'# .+\n\n> .+', first), first[:80]

def exported():
    for m in modules:
        mod = importlib.import_module(f'gradreg.{m}')
        for name in mod.__all__: yield f'{m}.{name}',getattr(mod, name)

@pytest.mark.parametrize('name,obj', exported(), ids=lambda o: o if isinstance(o, str) else '')
def test_every_exported_name_is_documented(name, obj):
    if not callable(obj): return
    assert obj.__doc__ and obj.__doc__.strip(), name
    if inspect.isclass(obj) and '__init__' not in vars(obj): return
    if name in ('study.Iterations', 'study.HalfSumLoss'): return  # one-line constructors
    for arg,doc in docments(obj).items():
        if arg not in ('return', 'self', 'kwargs', 'axes', 'args'): assert doc or arg in ('seed', 'jobs', 'backend', 'device'), f'{name}: {arg} has no comment'

def test_pyflakes_is_silent():
    files = [*(root/'gradreg').glob('[!_]*.py'), *(root/'tests').glob('*.py'), *(root/'docs').glob('*.py'), root/'setup.py']
    done = subprocess.run([sys.executable, '-m', 'pyflakes', *map(str, files)], capture_output=True, text=True)
    assert not done.stdout, done.stdout

def test_no_star_imports():
    for m in modules:
        for node in ast.walk(ast.parse((root/f'gradreg/{m}.py').read_text(encoding='utf-8'))):
            assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == '*'), m

def test_no_path_of_one_machine():
    for p in [*notebooks, *(root/'gradreg').glob('*.py'), *(root/'nbs/studies/results').glob('*.csv'), root/'README.md', root/'Makefile']:
        assert not re.search(r'(?<![\w.])/(work|root|home)/\w', p.read_text(encoding='utf-8')), p
