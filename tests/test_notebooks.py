"Each notebook runs from top to bottom, in a process of its own; studies run two steps per run (GRADREG_SMOKE)."
import os, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not {'.ipynb_checkpoints', 'out'} & set(p.parts))

runner = """
import sys, torch
from nbdev.test import test_nb
torch.set_num_threads(1)
ok, seconds = test_nb(sys.argv[1], skip_flags=[] if torch.cuda.is_available() else ['cuda'])
sys.exit(not ok)
"""

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook(path):
    env = {**os.environ, 'GRADREG_SMOKE': '1', 'MPLBACKEND': 'Agg', 'OMP_NUM_THREADS': '1'}
    env.pop('GRADREG_RESULTS', None)
    if data := env.get('GRADREG_DATA'): env['GRADREG_DATA'] = str((root/data).resolve())  # a notebook runs in its own folder
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', runner, str(path)], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]

def test_there_are_notebooks(): assert len(notebooks) >= 11
