"How the tests are spread over two processes: each notebook by itself, all others file by file, so that what a file makes once is made once."
from pathlib import Path
import pytest

def pytest_collection_modifyitems(items):
    for item in items:
        name = Path(item.fspath).stem
        item.add_marker(pytest.mark.xdist_group(item.name if name == 'test_notebooks' else name))
