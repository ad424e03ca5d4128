"Each notebook fetches on Colab what it needs, by its first cell, which does nothing elsewhere."
import ast, json, os, shutil, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions, requires
import pytest
from book import code, notebooks, parsed, read, root, source
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CELL = source(code(root/'nbs/index.ipynb')[0])

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_the_first_cell_is_the_same_everywhere(path):
    assert source(code(path)[0]) == CELL, 'copy the first cell of code from nbs/index.ipynb, which is for Colab'

def test_the_page_on_installing_says_the_same():
    fetch,*others = CELL.replace('/content', '.').splitlines()[2:]
    commands = '!' + fetch.partition(' || ')[2].removesuffix(' ./gradreg'),*others
    assert '\n'.join(o.strip() for o in commands) in read(root/'docs/install.md')

# ---------------------------------------------------------------- a machine like Colab

RUN = '''
import sys
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
path, where = sys.argv[1:]
Shell = type('Shell', (CaptureShell,), dict(__module__=where))
nb = read_nb(path)
Shell(path).run_all(nb, exc_stop=True)
write_nb(nb, path)
'''

def opened(path, folder, where, **env):
    "The cells of a notebook that is run in an empty folder, by a shell of the module that is named."
    folder.mkdir()
    shutil.copy(path, folder)
    nb = folder/path.name
    nb.write_text(read(nb).replace('/content', str(folder)), encoding='utf-8')
    env = {k: v for k,v in os.environ.items() if not k.startswith(('GRADREG_', 'PYTHONPATH'))} | env
    done = subprocess.run([sys.executable, '-c', RUN, nb, where], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return code(nb)

def said(cells):
    "What cells print, but for warnings."
    outputs = [o for c in cells for o in c['outputs'] if o.get('name') == 'stdout']
    return ''.join(''.join(o['text']) for o in outputs)

def origin(folder):
    "A repository of what is here, and the settings by which git takes it for the one on GitHub."
    unkept = shutil.ignore_patterns('.*', 'out', 'models', '*.lock', '*.tmp', '__pycache__')
    for o in 'nbs', 'gradreg': shutil.copytree(root/o, folder/o, ignore=unkept)
    for o in 'setup.py', 'settings.ini', 'README.md', 'LICENSE': shutil.copy(root/o, folder)
    for args in ['init', '-q'], ['add', '-A'], ['-c', 'user.name=t', '-c', 'user.email=t@t', 'commit', '-qm', 'all']:
        subprocess.run(['git', '-C', folder, *args], check=True)
    return dict(GIT_CONFIG_COUNT='1', GIT_CONFIG_KEY_0=f'url.{folder.as_uri()}.insteadOf',
                GIT_CONFIG_VALUE_0='https://github.com/gradreg/gradreg')

def test_on_colab_a_study_finds_package_and_rows(tmp_path):
    "The notebook alone in a folder, and no training allowed: it answers what is stored in it."
    site = tmp_path/'site'
    site.mkdir()
    pip = dict(PIP_NO_INDEX='1', PIP_NO_DEPS='1', PIP_NO_BUILD_ISOLATION='0', PIP_TARGET=str(site))  # 0: do without
    study,env = root/'nbs/studies/30_digits.ipynb',dict(GRADREG_JOBS='0', MPLBACKEND='Agg', PYTHONPATH=str(site))
    cells = opened(study, tmp_path/'content', 'google.colab._shell', **origin(tmp_path/'origin'), **pip, **env)
    assert said(cells[1:]) == said(code(study)) and 'points' in said(code(study))
    assert (site/'gradreg/rows.py').exists() and (tmp_path/'content/gradreg/nbs/studies/results/digits.csv').exists()

def test_elsewhere_the_cell_does_nothing(tmp_path):
    "Where neither git nor pip can be found, a cell that called them would say so."
    nb = tmp_path/'index.ipynb'
    nb.write_text(json.dumps(dict(json.loads(read(root/'nbs/index.ipynb')), cells=code(root/'nbs/index.ipynb')[:1])))
    cell, = opened(nb, tmp_path/'content', 'ipykernel.zmqshell', PATH='')
    assert not cell['outputs'] and [o.name for o in (tmp_path/'content').iterdir()] == [nb.name]

# ---------------------------------------------------------------- what is installed there

def imported(path):
    "The packages that cells of a notebook import."
    for node in (o for c in code(path) for o in parsed(source(c)).body):
        if isinstance(node, ast.Import): yield from (o.name.partition('.')[0] for o in node.names)
        if isinstance(node, ast.ImportFrom): yield node.module.partition('.')[0]

@pytest.fixture(scope='module')
def brought():
    "What the first cell installs and what comes with a kernel, by names in lower case."
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    names = ini['DEFAULT']['requirements'], ini['DEFAULT']['book_requirements'], 'ipykernel'
    found,waiting = {'gradreg'},[Requirement(o) for o in ' '.join(names).split()]
    while waiting:
        o = waiting.pop()
        if o.name in found or o.marker and not o.marker.evaluate(): continue
        found.add(o.name)
        waiting += map(Requirement, requires(o.name) or ())
    return {canonicalize_name(o) for o in found}

homes = packages_distributions()  # a name that is in none is that of a file which the notebook writes

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_the_first_cell_installs_what_is_imported(path, brought):
    needed = {o: {*map(canonicalize_name, homes.get(o, ()))} for o in imported(path)}
    assert not {k: v for k,v in needed.items() if v and not v & brought}, 'name it in book_requirements of settings.ini'
