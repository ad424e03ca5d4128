"Each study runs from top to bottom, in a process of its own, two steps per run (GRADREG_SMOKE)."
import pytest
from book import check, notebooks

@pytest.mark.parametrize('path', [o for o in notebooks if o.parent.name == 'studies'], ids=lambda p: p.stem)
def test_study(path, tmp_path, runner): check(runner, path, tmp_path)
