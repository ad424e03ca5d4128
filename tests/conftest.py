"How tests are spread over two processes: each notebook by itself, all others by file; which of them need a GPU."
import os
from pathlib import Path
import pytest, torch

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts, for `repeatable`

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

def on_cuda(item):
    params = item.callspec.params.values() if hasattr(item, 'callspec') else ()
    return item.get_closest_marker('cuda') or any(isinstance(o, str) and o == 'cuda' for o in params)

def pytest_collection_modifyitems(items):
    for item in items:
        if on_cuda(item):
            item.add_marker('cuda')
            if not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
        name = Path(item.fspath).stem
        item.add_marker(pytest.mark.xdist_group(item.name if name == 'test_notebooks' else name))
