"Each notebook runs from top to bottom, in a process of its own; studies run two steps per run (GRADREG_SMOKE)."
import os, re, subprocess, sys
from pathlib import Path
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output, writes

root = Path(__file__).resolve().parents[1]
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not {'.ipynb_checkpoints', 'out'} & set(p.parts))

# nbdev's own test of one notebook, in the notebook's folder; beside it, what each cell shows is compared in kind
# with what is stored
runner = """
import sys, torch
from pathlib import Path
from execnb.shell import CaptureShell
from nbdev.test import test_nb

torch.set_num_threads(1)
run_all,faults = CaptureShell.run_all,[]

def kinds(cell):
    shown = [o for o in cell.get('outputs', []) if o.get('name') != 'stderr']
    return {'a figure' if 'image/png' in o.get('data', {}) else 'text' for o in shown}

def run_and_compare(shell, nb, preproc, **kw):
    code = [c for c in nb.cells if c.cell_type == 'code' and not preproc(c)]
    stored = [kinds(c) for c in code]
    for c in code: c.outputs = []
    run_all(shell, nb, preproc=preproc, **kw)
    for c,old in zip(code, stored):
        unkept = {'text'} if c.source.rstrip().endswith(';') else set()  # execnb does not keep what such a cell prints
        gone = old - kinds(c) - unkept
        if new := kinds(c) - old: faults.append(f'shows {", ".join(new)} that is not stored:\\n{c.source}')
        if gone: faults.append(f'no longer shows {", ".join(gone)} that is stored:\\n{c.source}')

CaptureShell.run_all = run_and_compare
ok,_ = test_nb(Path(sys.argv[1]), skip_flags=[] if torch.cuda.is_available() else ['cuda'])
for o in faults: print('Stored outputs are stale, execute the notebook. This cell ' + o + '\\n', file=sys.stderr)
sys.exit(not ok or bool(faults))
"""

def execute(path, tmp):
    "Finished process that has run the notebook; its temporary files go to `tmp`."
    env = {
        **os.environ,
        'GRADREG_SMOKE': '1',
        'MPLBACKEND': 'Agg',
        'OMP_NUM_THREADS': '1',
        'TMPDIR': str(tmp),
        'PYTHONWARNINGS': 'ignore',
    }
    env.pop('GRADREG_RESULTS', None)
    if data := env.get('GRADREG_DATA'):
        env['GRADREG_DATA'] = str(Path(data).resolve())  # a notebook runs in its own folder
    return subprocess.run(
        [sys.executable, '-c', runner, str(path)], cwd=root, env=env, capture_output=True, text=True, timeout=900
    )

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook(path, tmp_path):
    done = execute(path, tmp_path)
    if done.returncode:
        pytest.fail(f'{path.relative_to(root)}, exit code {done.returncode}\n{done.stderr[-6000:]}', pytrace=False)

def test_there_are_notebooks(): assert len(notebooks) >= 11

def notebook(tmp_path, *cells):
    "A notebook of cells, each its source and the text stored with it."
    outputs = lambda text: [new_output('execute_result', {'text/plain': text})] if text else []
    path = tmp_path/'nb.ipynb'
    path.write_text(writes(new_notebook(cells=[new_code_cell(source, outputs=outputs(text)) for source,text in cells])))
    return path

def test_a_good_notebook_passes(tmp_path):
    cells = [
        ('#| cuda\nimport torch; torch.zeros(1).cuda()', ''),
        (f'import os\nassert os.path.samefile(os.getcwd(), {str(tmp_path)!r})', ''),
        ('6*7', '42'),
        ("print('quiet');", 'quiet'),
    ]
    done = execute(notebook(tmp_path, *cells), tmp_path)
    assert done.returncode == 0, done.stderr

@pytest.mark.parametrize(
    'source,code,said',
    [('x = 0\n1/x', 1, 'Cell #2.*1/x.*ZeroDivisionError'), ('import os; os._exit(3)', 3, '')],
    ids=['raises', 'crashes'],
)
def test_a_bad_notebook_fails(source, code, said, tmp_path):
    done = execute(notebook(tmp_path, ('6*7', '42'), (source, '')), tmp_path)
    assert done.returncode == code and re.search(said, done.stderr, re.S), done.stderr

def test_stale_outputs_fail(tmp_path):
    done = execute(
        notebook(
            tmp_path,
            ('6*7', ''),
            ('y = 6', '42'),
            ('import matplotlib.pyplot as plt; plt.plot([1]);', 'old'),
            ('6*8', '48'),
        ),
        tmp_path,
    )
    assert done.returncode == 1
    assert re.findall('This cell (.*):\n(.*)', done.stderr) == [
        ('shows text that is not stored', '6*7'),
        ('no longer shows text that is stored', 'y = 6'),
        ('shows a figure that is not stored', 'import matplotlib.pyplot as plt; plt.plot([1]);'),
    ]
