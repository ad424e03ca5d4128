"How tests are spread over two processes: each notebook by itself, all others by file; which of them need a GPU."
from pathlib import Path
import pytest, torch

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
