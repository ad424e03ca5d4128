"Each notebook runs from top to bottom, in a process of its own; studies run two steps per run (GRADREG_SMOKE)."
import re
import pytest
from book import check, execute, notebooks
from nbformat.v4 import new_code_cell, new_notebook, new_output, writes

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook(path, tmp_path, runner): check(runner, path, tmp_path)

def test_there_are_notebooks(): assert len(notebooks) >= 11

def notebook(tmp_path, *cells):
    "A notebook of cells, each its source and the text stored with it."
    outputs = lambda text: [new_output('execute_result', {'text/plain': text})] if text else []
    path = tmp_path/'nb.ipynb'
    path.write_text(writes(new_notebook(cells=[new_code_cell(source, outputs=outputs(text)) for source,text in cells])))
    return path

def test_a_good_notebook_passes(tmp_path, runner):
    cells = [
        ('#| cuda\nimport torch; torch.zeros(1).cuda()', ''),
        (f'import os\nassert os.path.samefile(os.getcwd(), {str(tmp_path)!r})', ''),
        ('6*7', '42'),
        ("print('quiet');", 'quiet'),
    ]
    assert execute(runner, notebook(tmp_path, *cells), tmp_path) == (0, '')

@pytest.mark.parametrize(
    'source,code,said',
    [('x = 0\n1/x', 1, 'Cell #2.*1/x.*ZeroDivisionError'), ('import os; os._exit(3)', 3, ''),
     ('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', -9, '')],
    ids=['raises', 'crashes', 'is killed'],
)
def test_a_bad_notebook_fails(source, code, said, tmp_path, runner):
    found,err = execute(runner, notebook(tmp_path, ('6*7', '42'), (source, '')), tmp_path)
    assert found == code and re.search(said, err, re.S), err

def test_stale_outputs_fail(tmp_path, runner):
    figure = 'import matplotlib.pyplot as plt; plt.plot([1]);'
    nb = notebook(tmp_path, ('6*7', ''), ('y = 6', '42'), (figure, 'old'), ('6*8', '48'))
    code,err = execute(runner, nb, tmp_path)
    assert code == 1 and re.findall('This cell (.*):\n(.*)', err) == [
        ('shows text that is not stored', '6*7'),
        ('no longer shows text that is stored', 'y = 6'),
        ('shows a figure that is not stored', figure),
    ]
