"What all tests share, and which of them need a GPU."
import os, subprocess, sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # processes fill the cores, threads would wait in turns
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts, for `repeatable`

import pytest, torch  # noqa: E402 (both are read at this import)

@pytest.fixture(autouse=True)
def repeatable():
    "On a GPU, where PyTorch may add in any order, tests ask for one order: twice the same is then equal bit by bit."
    if not torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)

@pytest.fixture
def path(tmp_path):
    "A result file that is not there yet."
    return tmp_path/'rows.csv'

@pytest.fixture(scope='session')
def runner():
    "A process that runs notebooks, see run_notebooks.py."
    env = dict(GRADREG_SMOKE='1', MPLBACKEND='Agg', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    env = {**{k: v for k,v in os.environ.items() if k != 'GRADREG_RESULTS'}, **env}
    if data := env.get('GRADREG_DATA'): env['GRADREG_DATA'] = str(Path(data).resolve())  # each runs in its own folder
    here = Path(__file__).parent
    p = subprocess.Popen([sys.executable, here/'run_notebooks.py'], cwd=here.parent, env=env, text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield p
    p.stdin.close()
    p.wait()

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "The tests of a file go to one process, for what they share is made once; each notebook goes by itself."
    from xdist.scheduler import LoadScopeScheduling
    class Spread(LoadScopeScheduling):
        def _split_scope(self, nodeid): return nodeid if 'test_notebooks' in nodeid else nodeid.split('::')[0]
    return Spread(config, log)

def on_cuda(item):
    params = item.callspec.params.values() if hasattr(item, 'callspec') else ()
    return item.get_closest_marker('cuda') or any(isinstance(o, str) and o == 'cuda' for o in params)

def pytest_collection_modifyitems(items):
    for item in items:
        if on_cuda(item):
            item.add_marker('cuda')
            if not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
