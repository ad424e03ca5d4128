"What a reader of chapter 22_cli need not see: each command on a small repository of its own, errors, exit codes, the page, Ctrl-C"
import math, os, signal, subprocess, sys, time
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from gradreg import cli
from gradreg.study import Run, append_row, grid, load_rows

GRADREG = Path(sys.executable).with_name('gradreg')
PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='

STUDY = ["""#| hide
import sys, matplotlib.pyplot as plt
from gradreg.study import Run, grid, results, run_all""",
"""print('a progress', 'bar', file=sys.stderr)
rows = run_all(grid(Run(data='sin', model='mlp', n_train=50, n_valid=50, bs=25, iters=2), seed=range(3)), results('tiny'), jobs=1)
rows[['data', 'seed', 'test']]""",
"""plt.figure(figsize=(2, 1))
plt.plot(rows.seed, rows.test);""",
"print(f'All {len(rows)} runs are there & < 4.')"]


def notebook(path, title, *cells, outputs=()):
    cells = [new_markdown_cell(f'# {title}\n\n> One sentence.'), *map(new_code_cell, cells)]
    cells[-1].outputs = list(outputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture
def repo(tmp_path, monkeypatch):
    "A repository with studies, in which one stands"
    for k in ('GRADREG_RESULTS', 'GRADREG_SMOKE', 'PYTHONWARNINGS'):  # `run` sets some of them: here they come and go
        monkeypatch.setenv(k, '')
        monkeypatch.delenv(k)
    studies = tmp_path/'nbs'/'studies'
    notebook(studies/'51_tiny.ipynb', 'Do three runs & a picture work?', *STUDY)
    notebook(studies/'40_old.ipynb', 'Is it stored?', 'pass', outputs=[
        new_output('stream', name='stdout', text='first line\n'), new_output('stream', name='stderr', text='a warning'),
        new_output('display_data', {'image/png': PNG, 'text/plain': '<Figure size 10x10>'}),
        new_output('execute_result', {'text/plain': '  mean\na  0.5', 'text/html': '<table></table>'})])
    notebook(studies/'52_broken.ipynb', 'Does it fail?', 'kept = 6*7', 'print("so far", kept)', '{}["no such key"]')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_line(err):
    assert err.startswith('gradreg: ') and err.count('\n') == 1 and 'Traceback' not in err
    return err


def test_list(repo, capsys, monkeypatch):
    assert cli.main(['list']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [o.split(maxsplit=1) for o in lines] == [['old', 'Is it stored?'], ['tiny', 'Do three runs & a picture work?'], ['broken', 'Does it fail?']]
    monkeypatch.chdir(repo/'nbs'/'studies')  # from below too
    assert cli.main(['list']) == 0 and capsys.readouterr().out.splitlines() == lines


def test_show(repo, capsys):
    before = (repo/'nbs/studies/40_old.ipynb').read_bytes()
    assert cli.main(['show', 'old']) == 0
    assert capsys.readouterr() == ('first line\n\n  mean\na  0.5\n', '')
    assert (repo/'nbs/studies/40_old.ipynb').read_bytes() == before and not (repo/'nbs/studies/out').exists()


@pytest.mark.parametrize('command', ['show', 'run'])
def test_unknown_study(repo, capsys, command):
    assert cli.main([command, 'tinny']) == 2
    out, err = capsys.readouterr()
    assert not out and 'tinny' in one_line(err) and 'old, tiny, broken' in err


@pytest.mark.parametrize('args', [['list'], ['show', 'old'], ['run', 'old']])
def test_outside_a_repository(repo, capsys, monkeypatch, tmp_path_factory, args):
    monkeypatch.chdir(tmp_path_factory.mktemp('elsewhere'))
    assert cli.main(args) == 2 and 'inside a clone' in one_line(capsys.readouterr().err)


def test_folder_that_cannot_be(repo, capsys):
    (repo/'file').write_text('')
    assert cli.main(['run', 'old', '--out', str(repo/'file')]) == 2 and 'file' in one_line(capsys.readouterr().err)


def test_notebook_that_is_none(repo, capsys):
    (repo/'nbs/studies/60_bad.ipynb').write_text('{"cells": [')
    assert cli.main(['show', 'bad']) == 2
    one_line(capsys.readouterr().err)


def test_without_jupyter(repo, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'nbclient', None)
    assert cli.main(['run', 'old']) == 2 and 'nbclient' in one_line(capsys.readouterr().err)


@pytest.mark.parametrize('args,code', [([], 0), (['--help'], 0), (['-h'], 0), (['rum', 'tiny'], 2)])
def test_usage(capsys, args, code):
    assert cli.main(args) == code
    out, err = capsys.readouterr()
    for name in cli.COMMANDS: assert f'\n  {name} ' in (err if code else out)
    assert not (out if code else err)


@pytest.mark.parametrize('name', list(cli.COMMANDS))
def test_help_of_each_command(capsys, name):
    with pytest.raises(SystemExit) as e: cli.main([name, '--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0 and f'gradreg {name}' in out and ' '.join(cli.COMMANDS[name].__doc__.split()) in ' '.join(out.split())


@pytest.mark.parametrize('args', [['run'], ['show'], ['run', 'a', 'b', 'c'], ['run', 'old', '--lamda', '3']])
def test_wrong_arguments(capsys, args):
    with pytest.raises(SystemExit) as e: cli.main(args)
    assert e.value.code == 2 and 'usage: gradreg' in capsys.readouterr().err


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ''
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text += data


def assert_self_contained(page):
    "Nothing is loaded from anywhere, and nothing is run"
    tags = Tags(page).tags
    assert not {'script', 'link', 'iframe', 'object', 'embed'} & {t for t, _ in tags}
    for t, a in tags:
        for k in ('src', 'srcset', 'href', 'poster', 'data'):
            if k in a: assert a[k].startswith('data:' if t == 'img' else '#'), (t, a[k][:80])
        assert not [k for k in a if k.startswith('on')]
    assert '@import' not in page and 'url(' not in page


def test_run(repo, capsys):
    "Two of three rows are there already: they stay, the third is trained, and all that comes out is in one folder"
    source, folder = (repo/'nbs/studies/51_tiny.ipynb').read_bytes(), repo/'nbs/studies/out/tiny'
    for r in grid(Run(data='sin', model='mlp', n_train=50, n_valid=50, bs=25, iters=2), seed=range(2)):
        append_row(folder/'tiny.csv', {**asdict(r), 'status': 'ok', 'test': 123}, asdict(Run()))
    assert cli.main(['run', 'tiny']) == 0
    out, err = capsys.readouterr()
    assert sorted(p.name for p in folder.iterdir() if p.suffix != '.lock') == ['51_tiny.ipynb', 'tiny-1.png', 'tiny.csv', 'tiny.html']
    df = load_rows(folder/'tiny.csv')
    assert df.seed.tolist() == [0, 1, 2] and df.test[:2].tolist() == [123, 123] and 0 < df.test[2] < 2 and math.isnan(df.valid[0])
    assert 'sin     0  123.0' in out and 'All 3 runs are there & < 4.' in out and '<Figure' not in out
    assert out.split()[-3:] == [str(folder/o) for o in ('tiny.csv', 'tiny-1.png', 'tiny.html')]
    assert 'a progress bar' in err and '1 done' in err and 'Traceback' not in err
    assert (folder/'tiny-1.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    page = (folder/'tiny.html').read_text(encoding='utf-8')
    assert_self_contained(page)
    tags = Tags(page)
    assert 'Do three runs & a picture work?' in tags.text and 'All 3 runs are there & < 4.' in tags.text
    assert 'a progress bar' not in page and ('html', {'lang': 'en'}) in tags.tags
    assert [t for t, _ in tags.tags].count('img') == 1 == [t for t, _ in tags.tags].count('table')
    stored = nbformat.read(folder/'51_tiny.ipynb', 4)
    assert not [o for c in stored.cells if c.cell_type == 'code' for o in c.outputs if o.get('name') == 'stderr']
    assert (repo/'nbs/studies/51_tiny.ipynb').read_bytes() == source and not (repo/'nbs/studies/results').exists()


RERUN = """import os; from pathlib import Path
file = Path(os.environ['GRADREG_RESULTS'])/'rerun.csv'
if not file.exists(): file.write_text('trained'); print('training')
else: print('found')"""


def test_run_again(repo, capsys):
    notebook(repo/'nbs/studies/54_rerun.ipynb', 'Again?', RERUN)
    for out, words in (('', 'training'), ('', 'found'), ('else where', 'training'), ('else where', 'found')):
        assert cli.main(['run', 'rerun', *(['--out', out] if out else [])]) == 0
        assert capsys.readouterr().out.split('\n')[0] == words
    assert (repo/'else where'/'rerun.html').exists() and (repo/'nbs/studies/out/rerun/rerun.html').exists()


def test_failing_cell(repo, capsys):
    folder = repo/'deep'/'down'
    assert cli.main(['run', 'broken', '--out', str(folder)]) == 1
    out, err = capsys.readouterr()
    assert "KeyError" in err and 'no such key' in err and 'nbclient' not in err and 'cli.py' not in err
    assert err.startswith('gradreg: ') and folder.is_dir() and not (folder/'broken.html').exists()


def test_page_escapes(repo):
    nb = new_notebook(cells=[new_code_cell('1', outputs=[new_output('stream', name='stdout', text='<script>alert(1)</script>')])])
    page = cli._page(nb, '<b>&')
    assert_self_contained(page)
    assert '<script' not in page and '&lt;b&gt;&amp;' in page and page.startswith('<!doctype html>') and page.endswith('</html>')


def test_console_script(repo):
    done = subprocess.run([GRADREG, 'run', 'nothing'], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and 'nothing' in one_line(done.stderr)


def test_light_start():
    "Help and listing do not wait for torch"
    code = "import sys, gradreg.cli; sys.exit(', '.join({'torch', 'fastai', 'nbconvert', 'pandas'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('when,sig', [('a cell runs', signal.SIGINT), ('the kernel starts', signal.SIGTERM)])
def test_ctrl_c(repo, when, sig):
    notebook(repo/'nbs/studies/53_slow.ipynb', 'Slow?', "from pathlib import Path; Path('here').write_text('')", 'import time; time.sleep(100)')
    p = subprocess.Popen([GRADREG, 'run', 'slow'], stderr=subprocess.PIPE, text=True, start_new_session=True)
    here, end, kernel = repo/'nbs/studies/here', time.monotonic() + 60, []
    while not (kernel and (here.exists() or when == 'the kernel starts')):
        assert p.poll() is None and time.monotonic() < end
        time.sleep(.1)
        kernel = psutil.Process(p.pid).children()
    os.killpg(p.pid, sig)
    try: err = p.communicate(timeout=60)[1]
    finally: p.kill()
    assert p.returncode == 130 and 'goes on from here' in err and 'Traceback' not in err
    while not all(not o.is_running() or o.status() == 'zombie' for o in kernel):  # none is left behind
        assert time.monotonic() < end
        time.sleep(.1)
