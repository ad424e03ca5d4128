"What a reader of chapter 23_cli need not see: each command on a small repository, errors, exit codes, the page, Ctrl-C"
import json, math, os, re, signal, subprocess, sys, time
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from gradreg import arrays, cli, notebooks, study
from gradreg.rows import append_row, load_rows, write_rows
from gradreg.study import Run, grid
from samples import PNG

ROOT = Path(__file__).resolve().parents[1]
GRADREG = Path(sys.executable).with_name('gradreg')

TINY = Run(data='sin', model='mlp', n_train=50, n_valid=50, bs=25, iters=2)
TRAINS = ["""#| hide
import sys, matplotlib.pyplot as plt
from gradreg.study import Run, grid, results, run_all""",
"""print('a progress', 'bar', file=sys.stderr)
base = Run(data='sin', model='mlp', n_train=50, n_valid=50, bs=25, iters=2)
rows = run_all(grid(base, seed=range(3)), results('tiny'), jobs=1)
rows[['data', 'seed', 'test']]"""]
SHOWS = ["""plt.figure(figsize=(2, 1))
plt.plot(rows.seed, rows.test);""",
"print(f'All {len(rows)} runs are there & < 4.')"]
# the same without a network, as most tests here ask what the command does, not what a run does: no torch to wait for
WRITES = ["""#| hide
import sys, matplotlib.pyplot as plt
from dataclasses import asdict
from gradreg.rows import append_row, load_rows, results
from gradreg.runs import Run, grid""",
"""base = Run(data='sin', model='mlp', n_train=50, n_valid=50, bs=25, iters=2)
there = load_rows(results('tiny'))
new = [r for r in grid(base, seed=range(3)) if r.seed not in set(there.get('seed', []))]
for r in new: append_row(results('tiny'), {**asdict(r), 'status': 'ok', 'test': .5}, asdict(Run()))
if new: print(len(new), 'done', file=sys.stderr)
rows = load_rows(results('tiny'))
rows[['data', 'seed', 'test']]"""]


def notebook(path, title, *cells, outputs=()):
    cells = [new_markdown_cell(f'# {title}\n\n> One sentence.'), *map(new_code_cell, cells)]
    cells[-1].outputs = list(outputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture
def repo(tmp_path, monkeypatch):
    "A repository with studies, in which one stands"
    for k in [k for k in os.environ if k.startswith('GRADREG_')]: monkeypatch.delenv(k)
    studies = tmp_path/'nbs'/'studies'
    notebook(studies/'51_tiny.ipynb', 'Do three runs & a picture work?', *WRITES, *SHOWS)
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
    said = dict(o.split(maxsplit=1) for o in lines)
    assert said == {'old': 'Is it stored?', 'tiny': 'Do three runs & a picture work?', 'broken': 'Does it fail?'}
    assert list(said) == ['old', 'tiny', 'broken']
    monkeypatch.chdir(repo/'nbs'/'studies')  # from below too
    assert cli.main(['list']) == 0 and capsys.readouterr().out.splitlines() == lines


def test_show(repo, capsys):
    before = (repo/'nbs/studies/40_old.ipynb').read_bytes()
    assert cli.main(['show', 'old']) == 0
    assert capsys.readouterr() == ('first line\n\n  mean\na  0.5\n', '')
    assert (repo/'nbs/studies/40_old.ipynb').read_bytes() == before and not (repo/'nbs/studies/out').exists()


def test_show_without_outputs(repo, capsys):
    assert cli.main(['show', 'tiny']) == 0
    out = capsys.readouterr().out
    assert '51_tiny.ipynb holds no tables yet' in out and 'gradreg run tiny' in out


def test_show_wraps_sentences_and_takes_text_as_lines(repo, capsys):
    notebook(repo/'nbs/studies/41_long.ipynb', 'Long?', 'pass')
    nb = json.loads((repo/'nbs/studies/41_long.ipynb').read_text())
    table = ['a'.rjust(120) + '\n', '1'.rjust(120)]
    nb['cells'][-1]['outputs'] = [
        dict(output_type='stream', name='stdout', text=['word '*50 + '\n', '\n', 'end\n']),
        dict(output_type='execute_result', data={'text/plain': table}),
        dict(output_type='display_data', data={'text/markdown': '**so**', 'text/plain': '<object>'})]
    (repo/'nbs/studies/41_long.ipynb').write_text(json.dumps(nb))
    assert cli.main(['show', 'long']) == 0
    out = capsys.readouterr().out
    assert out.split() == ['word']*50 + ['end', 'a', '1', '**so**'] and ''.join(table) in out and '\n\nend\n' in out
    assert max(map(len, out.splitlines())) <= 160


@pytest.mark.parametrize('name', sorted(map(notebooks.study_name, (ROOT/'nbs/studies').glob('[0-9]*.ipynb'))))
def test_the_books_own_tables_fit(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(['show', name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5 and max(map(len, lines)) <= 160


def test_claims(repo, capsys, monkeypatch):
    good = dict(claim='A (Table 2): it raises accuracy', n=10, effect=.314, ci95=.1, verdict='confirmed')
    logs = dict(claim='B lowers the log of the error', n=3, effect=math.log(.5), ci95=0, verdict='contradicted')
    evil = dict(claim='C\u202e is not run', n=0, effect=math.nan, ci95=math.nan, verdict='not run')
    for name, rows in dict(tiny=[good, evil], old=[logs]).items():
        write_rows(repo/f'nbs/studies/results/claims_{name}.csv', rows)
    assert cli.main(['claims']) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert sorted(re.split(': |, ', lines[0])) == ['1 confirmed', '1 contradicted', '1 not run', '3 claims']
    assert lines[-6:] == ['old', 'contradicted  B lowers the error: × 0.50 (0.50 to 0.50) (n = 3)', '',
                          'tiny', 'confirmed     A (Table 2): it raises accuracy: +0.31 ± 0.10 points (n = 10)',
                          'not run       C\\u202e is not run (n = 0)']
    assert max(map(len, lines)) <= 92
    monkeypatch.chdir(repo/'nbs')
    assert cli.main(['claims']) == 0 and capsys.readouterr().out == out
    assert cli.main(['claims', '--results', 'studies/results']) == 0 and capsys.readouterr().out == out
    assert cli.main(['claims', '--results', '.']) == 2 and 'no claims there' in one_line(capsys.readouterr().err)


def test_the_books_own_claims(capsys, monkeypatch):
    "As many as the files hold, each once"
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv('GRADREG_RESULTS', raising=False)
    files = {p.stem[7:]: len(load_rows(p)) for p in (ROOT/'nbs/studies/results').glob('claims_*.csv')}
    assert cli.main(['claims']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f'{sum(files.values())} claims: ') and max(map(len, lines)) <= 92
    verdicts = [o for o in lines if re.match('(confirmed|contradicted|not shown|too few runs|not run)  ', o)]
    assert len(verdicts) == sum(files.values()) and set(files) <= set(lines)


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
    assert cli.main(['run', 'old']) == 2 and 'pip install nbclient' in one_line(capsys.readouterr().err)
    for name in 'nbconvert', 'nbformat', 'ipykernel': monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(['list']) == 0 == cli.main(['show', 'old'])  # reading needs none of them


@pytest.mark.parametrize('args,said', [
    (['--jobs', '-1'], '--jobs -1: must be at least 0'), (['--seeds', '-1'], '--seeds -1: must be at least 1'),
    (['--backend', 'dask'], '--backend dask: choose loky or ray'), (['--device', 'abacus'], '--device abacus: '),
    (['--data', 'no/where'], 'no/where: is not a folder'),
    (['--out', 'nbs/studies'], 'no notebook is ever overwritten'),
    (['--out', '~nobody123/here'], '~nobody123/here'), (['--data', '~nobody123/here'], '~nobody123/here'),
    (['--results', '~nobody123/here'], '~nobody123/here')])
def test_wrong_options(repo, capsys, monkeypatch, args, said):
    monkeypatch.setattr(cli, 'execute', lambda *_: pytest.fail('a kernel was started'))
    before = {p: p.read_bytes() for p in repo.rglob('*.ipynb')}
    assert cli.main(['run', 'old', *args]) == 2 and said in one_line(capsys.readouterr().err)
    assert {p: p.read_bytes() for p in repo.rglob('*')if p.is_file()} == before


@pytest.mark.parametrize('name,value', [('JOBS', 'two'), ('JOBS', '-1'), ('SEEDS', '0'), ('BACKEND', 'dask'),
                                        ('DEVICE', 'abacus'), ('DATA', 'no/where'), ('RESULTS', '~nobody123/rows'),
                                        ('SMOKE', 'maybe')])
@pytest.mark.parametrize('command', [['run', 'old'], [*('tune --method wd --lams 0 --data digits'.split())]])
def test_wrong_variables(repo, capsys, monkeypatch, name, value, command):
    if command[0] == 'tune' and name == 'RESULTS': pytest.skip('tune has a file of its own')
    monkeypatch.setattr(cli, 'execute', lambda *_: pytest.fail('a kernel was started'))
    monkeypatch.setenv(f'GRADREG_{name}', value)
    assert cli.main(command) == 2
    err = one_line(capsys.readouterr().err)
    assert value in err and (f'GRADREG_{name}' in err or name == 'RESULTS')


ENV = "import os; print(*(f'{k}={v}' for k, v in sorted(os.environ.items()) if k.startswith('GRADREG_')), sep='\\n')"


def kernels_variables(capsys, *args):
    assert cli.main(['run', 'env', *args]) == 0
    return [o for o in capsys.readouterr().out.splitlines() if o.startswith('GRADREG_')]


def test_options_reach_the_kernel(repo, capsys, monkeypatch):
    notebook(repo/'nbs/studies/55_env.ipynb', 'Which?', ENV)
    (repo/'my data').mkdir()
    outer = dict(os.environ)
    assert kernels_variables(capsys) == []
    got = kernels_variables(capsys, '--seeds', '3', '--jobs', '2', '--backend', 'ray', '--device', 'cuda:7',
                            '--data', 'my data', '--results', 'mine')
    assert got == ['GRADREG_BACKEND=ray', f"GRADREG_DATA={repo/'my data'}", 'GRADREG_DEVICE=cuda:7', 'GRADREG_JOBS=2',
                   f"GRADREG_RESULTS={repo/'mine'}", 'GRADREG_SEEDS=3']
    assert dict(os.environ) == outer  # what one call is told, the next does not know
    monkeypatch.setenv('GRADREG_JOBS', '5')
    monkeypatch.setenv('GRADREG_DATA', 'my data')  # a relative path means the same to the kernel, which runs elsewhere
    got = kernels_variables(capsys, '--seeds', '4')
    assert got == [f"GRADREG_DATA={repo/'my data'}", 'GRADREG_JOBS=5', 'GRADREG_SEEDS=4']
    assert kernels_variables(capsys, '--jobs', '1')[1] == 'GRADREG_JOBS=1'


@pytest.mark.parametrize('args,code', [([], 0), (['--help'], 0), (['-h'], 0), (['rum', 'tiny'], 2)])
def test_usage(capsys, args, code):
    with pytest.raises(SystemExit) as e: cli.main(args)
    out, err = capsys.readouterr()
    assert e.value.code == code and not (out if code else err) and ('rum' in err) == bool(code)
    for name in cli.COMMANDS: assert name in err if code else f'\n    {name} ' in out


@pytest.mark.parametrize('name', list(cli.COMMANDS))
def test_help_of_each_command(capsys, name):
    with pytest.raises(SystemExit) as e: cli.main([name, '--help'])
    out = ' '.join(capsys.readouterr().out.split())
    assert e.value.code == 0 and f'gradreg {name}' in out and ' '.join(cli.COMMANDS[name].__doc__.split()) in out


@pytest.mark.parametrize('args', [
    ['run'], ['show'], ['run', 'a', 'b', 'c'], ['run', 'old', '--lamda', '3'], ['run', 'old', '--jobs', 'two'],
    ['data'],
    ['run', 'old', '--seed', '3'], ['run', 'old', '--res', 'here'], ['tune', '--meth', 'wd'],  # are not guessed
    ['tune', '--lams', '.1,x'], ['tune', '--protocol', '3'], ['tune', '--seed', '3']])
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


def pretend(path, n, test=123):
    for r in grid(TINY, seed=range(n)): append_row(path, {**asdict(r), 'status': 'ok', 'test': test}, asdict(Run()))


def test_run(repo, capsys):
    "Two of three rows are there already: they stay, the third is trained, and all that comes out is in one folder"
    notebook(repo/'nbs/studies/51_tiny.ipynb', 'Do three runs & a picture work?', *TRAINS, *SHOWS)
    source, folder = (repo/'nbs/studies/51_tiny.ipynb').read_bytes(), repo/'nbs/studies/out/tiny'
    pretend(folder/'tiny.csv', 2)
    assert cli.main(['run', 'tiny', '--results', 'nbs/studies/out/tiny']) == 0
    out, err = capsys.readouterr()
    written = sorted(p.name for p in folder.iterdir() if p.suffix != '.lock')
    assert written == ['51_tiny.ipynb', 'tiny-1.png', 'tiny.csv', 'tiny.html']
    df = load_rows(folder/'tiny.csv')
    assert df.seed.tolist() == [0, 1, 2] and df.test[:2].tolist() == [123, 123]
    assert 0 < df.test[2] < 2 and math.isnan(df.valid[0])
    assert 'sin     0  123.0' in out and 'All 3 runs are there & < 4.' in out and '<Figure' not in out
    assert out.split()[-4:] == [str(folder/o) for o in ('tiny.csv', '51_tiny.ipynb', 'tiny-1.png', 'tiny.html')]
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


def test_repository_results_or_own(repo, capsys):
    "Without --results the repository's rows are used and extended; with it a run starts from zero, then trains nothing"
    own, theirs = repo/'mine'/'tiny.csv', repo/'nbs/studies/results/tiny.csv'
    pretend(theirs, 3)
    before = theirs.read_bytes()
    assert cli.main(['run', 'tiny']) == 0
    out, err = capsys.readouterr()
    assert '123' in out and 'done' not in err and 'tiny.csv' not in out and theirs.read_bytes() == before
    assert cli.main(['run', 'tiny', '--results', 'mine', '--out', 'page']) == 0
    out, err = capsys.readouterr()
    assert '123' not in out and '3 done' in err and str(own) in out and theirs.read_bytes() == before
    assert len(load_rows(own)) == 3 and (repo/'page/tiny.html').exists() and not (repo/'mine/tiny.html').exists()
    before = own.read_bytes()
    assert cli.main(['run', 'tiny', '--results', 'mine', '--out', 'page']) == 0
    out, err = capsys.readouterr()
    assert 'done' not in err and str(own) not in out and own.read_bytes() == before


def test_what_the_book_warns_of_is_told(repo, capsys):
    notebook(repo/'nbs/studies/56_bad.ipynb', 'Bad?', "import warnings; warnings.warn('of no interest')",
             "from gradreg.rows import load_rows; load_rows('torn.csv')")
    (repo/'nbs/studies/torn.csv').write_text('a,b\n1,2\n3')
    assert cli.main(['run', 'bad']) == 0
    err = capsys.readouterr().err
    assert 'torn.csv: its last line has no end' in err and 'no interest' not in err


def test_failing_cell(repo, capsys):
    folder = repo/'deep'/'down'
    assert cli.main(['run', 'broken', '--out', str(folder)]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == ["gradreg: 52_broken.ipynb: cell 4 failed with KeyError: 'no such key'",
                                f"As far as it came: {folder/'52_broken.ipynb'}"]
    cells = nbformat.read(folder/'52_broken.ipynb', 4).cells
    assert cells[2].outputs[0].text == 'so far 42\n' and 'Traceback' in ''.join(cells[3].outputs[0].traceback)
    assert not out and not (folder/'broken.html').exists()


def test_dying_kernel(repo, capsys):
    notebook(repo/'nbs/studies/57_dies.ipynb', 'Dies?', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)')
    assert cli.main(['run', 'dies']) == 1
    err = capsys.readouterr().err
    assert err.startswith('gradreg: 57_dies.ipynb: its kernel died') and 'Traceback' not in err


def test_two_at_once_share_the_work(repo):
    "Both show all rows, and what they write is whole; that each row is trained once is for test_study"
    pretend(repo/'nbs/studies/results/tiny.csv', 3)
    kw = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    two = [subprocess.Popen([GRADREG, 'run', 'tiny'], **kw) for _ in range(2)]
    for p in two:
        out, err = p.communicate(timeout=600)
        assert p.returncode == 0 and 'All 3 runs are there' in out, err
    page = (repo/'nbs/studies/out/tiny/tiny.html').read_text(encoding='utf-8')
    assert page.endswith('</html>') and 'All 3 runs are there' in Tags(page).text


# ---------------------------------------------------------------- pipes, homes, folders that are somebody's

@pytest.mark.parametrize('args,both', [(['run', 'tiny'], False), (['run', 'tiny'], True), (['show', 'old'], False),
                                       (['list'], False), (['--help'], False), (['run', '--help'], False)])
def test_a_reader_that_goes_away(repo, args, both):
    "As in `gradreg run tiny | head -0`, with stderr in the same pipe too: all is saved, nobody complains"
    pretend(repo/'nbs/studies/results/tiny.csv', 2)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'}
    stderr = subprocess.STDOUT if both else subprocess.PIPE
    p = subprocess.Popen([GRADREG, *args], stdout=subprocess.PIPE, stderr=stderr, env=env)
    p.stdout.close()
    err = '' if both else p.stderr.read().decode()
    assert p.wait(timeout=300) == 141
    assert not re.search('Traceback|BrokenPipe|Exception|gradreg:', err)
    if args[0] == 'run' and args[1] == 'tiny':
        written = {p.name for p in (repo/'nbs/studies/out/tiny').iterdir()}
        assert written == {'51_tiny.ipynb', 'tiny-1.png', 'tiny.html'}
        assert len(load_rows(repo/'nbs/studies/results/tiny.csv')) == 3


def test_homes(repo, capsys, monkeypatch):
    "~ means the same in every option and variable"
    home = repo/'home'
    (home/'sets').mkdir(parents=True)
    monkeypatch.setenv('HOME', str(home))
    notebook(repo/'nbs/studies/55_env.ipynb', 'Which?', ENV)
    got = kernels_variables(capsys, '--data', '~/sets', '--results', '~/rows', '--out', '~/page')
    assert got == [f"GRADREG_DATA={home/'sets'}", f"GRADREG_RESULTS={home/'rows'}"] and (home/'page/env.html').exists()
    monkeypatch.setenv('GRADREG_DATA', '~/sets')
    monkeypatch.setenv('GRADREG_RESULTS', '~/rows')
    assert kernels_variables(capsys) == got
    options = ['--seeds', '1', '--jobs', '1', '--results', '~/t.csv']
    assert cli.main([*WD[:-1], 'sin', '--model', 'mlp', *SMALL, *options]) == 0
    assert len(load_rows(home/'t.csv')) == 1


def owned(folder):
    "A folder that holds somebody's notebook of the name that a run would write"
    notebook(folder/'40_old.ipynb', 'My own notes', '6*7')
    return folder


def test_no_foreign_notebook_is_overwritten(repo, capsys, monkeypatch):
    copy = owned(repo/'copy')
    (repo/'link').mkdir()
    (repo/'link/40_old.ipynb').symlink_to(repo/'nbs/studies/40_old.ipynb')
    before = {p: p.read_bytes() for p in repo.rglob('*.ipynb')}
    monkeypatch.setattr(cli, 'execute', lambda *_: pytest.fail('a kernel was started'))
    for out in copy, repo/'link', repo/'nbs/studies', repo/'nbs/../nbs/studies':
        assert cli.main(['run', 'old', '--out', str(out)]) == 2
        assert 'no notebook is ever overwritten' in one_line(capsys.readouterr().err)
    assert {p: p.read_bytes() for p in repo.rglob('*.ipynb')} == before


def test_ones_own_page_is_overwritten_until_somebody_changes_it(repo, capsys):
    written = repo/'nbs/studies/out/old/40_old.ipynb'
    assert cli.main(['run', 'old']) == 0 == cli.main(['run', 'old'])
    written.write_text(written.read_text().replace('One sentence.', 'And mine.'))
    capsys.readouterr()
    assert cli.main(['run', 'old']) == 2 and 'changed since' in one_line(capsys.readouterr().err)
    assert 'And mine.' in written.read_text()


def test_a_study_of_ones_own(tmp_path, capsys, monkeypatch):
    "Outside of any repository, with a module beside it"
    for k in [k for k in os.environ if k.startswith('GRADREG_')]: monkeypatch.delenv(k)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine'/'my_part.py').parent.mkdir()
    (tmp_path/'mine'/'my_part.py').write_text('n = 42')
    notebook(tmp_path/'mine/01_notes.ipynb', 'Mine?', 'import my_part', *WRITES, 'print(my_part.n, len(rows))')
    assert cli.main(['run', 'mine/01_notes.ipynb']) == 0
    assert '42 3\n' in capsys.readouterr().out and (tmp_path/'mine/out/notes/notes.html').exists()
    assert len(load_rows(tmp_path/'mine/results/tiny.csv')) == 3
    assert cli.main(['show', 'mine/out/notes/01_notes.ipynb']) == 0 and '42 3\n' in capsys.readouterr().out


def test_console_script(repo):
    done = subprocess.run([GRADREG, 'run', 'nothing'], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and 'nothing' in one_line(done.stderr)


@pytest.mark.parametrize('args', [['--help'], ['list'], ['run', '--help'], ['tune', '--help'], ['show', 'old']])
def test_light_start(repo, args):
    "Help waits for nothing; listing not for torch, nor for Jupyter"
    heavy = {'torch', 'fastai', 'nbclient', 'nbconvert', 'nbformat', *(['numpy', 'pandas'] if '--help' in args else [])}
    code = f"""if True:
        import sys
        from gradreg.cli import main
        try: main({args})
        except SystemExit: pass
        print(*{heavy} & set(sys.modules), file=sys.stderr)"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and not done.stderr.strip()


def npz(folder, name='mine', **arrays):
    x, y = np.arange(12*4*5*3, dtype=np.uint8).reshape(12, 4, 5, 3), np.array([0]*5 + [1]*7)
    folder.mkdir(exist_ok=True)
    good = dict(x_train=x, y_train=y, x_test=x[:3], y_test=y[:3], classes=['cat', 'dog'])
    np.savez(folder/f'{name}.npz', **{**good, **arrays})
    return x


def test_data(repo, capsys, monkeypatch):
    x = npz(repo/'sets').astype(float)
    monkeypatch.setenv('GRADREG_DATA', str(repo/'sets'))
    assert cli.main(['data', 'mine']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"mine: {repo/'sets/mine.npz'}" and lines[3].split(maxsplit=1) == ['classes', '2: cat, dog']
    assert '12 images of 4x5x3, 0.0 MB, 5 to 7 per class' in lines[1]
    assert '3 images of 4x5x3, 0.0 MB, 0 to 3 per class' in lines[2]
    for line, stat in (lines[4], x.mean((0, 1, 2))), (lines[5], x.std((0, 1, 2))):
        assert ' '.join(f'{o:.2f}' for o in stat) in line


def test_data_shows_no_control_characters(repo, capsys, monkeypatch):
    npz(repo/'sets', classes=['cat\x1b[31m', 'd\u202eog'])
    monkeypatch.setenv('GRADREG_DATA', str(repo/'sets'))
    assert cli.main(['data', 'mine']) == 0
    out = capsys.readouterr().out
    assert '\x1b' not in out and '\u202e' not in out and 'cat' in out


def test_data_where_it_is_from(repo, capsys, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(repo/'cache'))
    assert cli.main(['data', 'digits']) == 0
    assert capsys.readouterr().out.startswith('digits: made just now, in no file\n')
    assert cli.main(['data', 'sin']) == 0 and 'sin_loaders' in capsys.readouterr().out
    def download(name):
        npz(repo/'cache', 'other')
        (repo/'cache/gradreg').mkdir()
        (repo/'cache/other.npz').rename(repo/'cache/gradreg/mnist.npz')
        return arrays._read_npz(repo/'cache/gradreg/mnist.npz')
    monkeypatch.setattr(arrays, '_download', download)
    for end in ', downloaded just now', '':
        assert cli.main(['data', 'mnist']) == 0
        assert capsys.readouterr().out.splitlines()[0] == f"mnist: {repo/'cache/gradreg/mnist.npz'}{end}"


@pytest.mark.parametrize('name,said', [
    ('mnits', 'Did you mean mnist'), ('../up', 'is not a name'), ('broken', 'x_train is float64')])
def test_data_errors(repo, capsys, monkeypatch, name, said):
    npz(repo/'sets', 'broken', x_train=np.zeros((12, 4, 5, 3)))
    monkeypatch.setenv('GRADREG_DATA', str(repo/'sets'))
    assert cli.main(['data', name]) == 2 and said in one_line(capsys.readouterr().err)


def tuned(r):
    "A row whose validation metric depends on strength and seed; with a test metric that would choose otherwise"
    valid = {.1: .5, .2: .7, .3: .6}[r.spect_reg] + r.seed/100
    return {**asdict(r), 'status': 'ok', 'valid': valid, 'test': 9876 - valid}


SMALL = ['--n_train', '20', '--bs', '10', '--iters', '2', '--n_valid', '50']
TUNE = ['tune', '--method', 'spect_reg', '--lams', '.1,.2,.3', *SMALL, '--data']
WD = ['tune', '--method', 'wd', '--lams', '0', '--data', 'digits']


@pytest.mark.parametrize('data,best,scale,unit', [
    ('digits', '0.2', 100, ': accuracy, % on 50 validation points'),
    ('sin', '0.1, at the edge of the list: try further ones', 1, ': mean squared error on 50 validation points')])
def test_tune(repo, capsys, data, best, scale, unit):
    model = 'mlp' if data == 'sin' else 'lenet5'
    base = Run(data=data, model=model, n_train=20, bs=10, iters=2, n_valid=50)
    for r in grid(base, spect_reg=[.1, .2, .3], seed=range(2)): append_row('own/rows.csv', tuned(r), asdict(Run()))
    assert cli.main([*TUNE, data, '--model', model, '--seeds', '2', '--results', 'own/rows.csv', '--jobs', '1']) == 0
    out, err = capsys.readouterr()
    rows = [[float(v) for v in o.split()] for o in out.splitlines() if o.startswith('0.')]
    table = [[lam, 2, round(scale*v, 4)] for lam, v in ((.1, .505), (.2, .705), (.3, .605))]
    assert [o[:3] for o in rows] == table
    assert unit in out
    assert f'best: spect_reg = {best}\n' in out and out.endswith('own/rows.csv\n') and '98' not in out and not err


def test_tune_trains_and_trains_once(repo, capsys):
    args = ['tune', '--method=wd', '--lams=0,.01', '--data', 'sin', '--model', 'mlp', *SMALL, '--seeds', '1']
    args += ['--jobs', '1']
    args[args.index('--n_train')] = '--n-train'  # either spelling will do
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert '2 done' in err and 'best: wd = 0' in out and load_rows('tune.csv').n_train.tolist() == [20, 20]
    assert cli.main(args) == 0 and capsys.readouterr() == (out, '')


def test_every_field_of_run_is_an_option_of_tune(repo, capsys, monkeypatch):
    other = {int: lambda v: v + 1, float: lambda v: v + .5, bool: lambda v: True}
    texts = dict(model='my_nets:small', penalty='my_reg:GapReg', at='0.1', probe='sphere', opt='sgd', precision='bf16')
    names = [f for f in fields(Run) if f.name not in ('seed', 'protocol', 'spect_reg', 'data')]
    want = replace(Run(data='digits'), **{f.name: texts.get(f.name) or other[f.type](f.default) for f in names})
    args = [o for f in names for o in [f'--{f.name}', str(getattr(want, f.name))][:1 if f.type is bool else 2]]
    def run_all(runs, path, **options):
        assert runs == [replace(want, spect_reg=o, seed=s) for o in (.1, .2) for s in range(2)]
        assert path == Path('tune.csv') and options == dict(jobs=4, backend='ray', device='cuda:7')
        raise OSError('seen')
    monkeypatch.setattr(study, 'run_all', run_all)
    options = ['--seeds', '2', '--jobs', '4', '--backend', 'ray', '--device', 'cuda:7', '--data', 'digits']
    assert cli.main(['tune', '--method', 'spect_reg', '--lams', '.1,.2', *options, *args]) == 2
    assert capsys.readouterr().err == 'gradreg: seen\n'


@pytest.mark.parametrize('args,said', [
    (['tune', '--lams', '.1'], '--method None: choose double_back, '),
    (['tune', '--method', 'probe', '--lams', '.1'], '--method probe: choose'),
    (['tune', '--method', 'spect_reg'], '--lams: say which'),
    (['tune', '--method', 'wd', '--lams', 'nan'], 'wd=nan: must be a finite number'),
    ([*WD[:-1], 'mnits'], 'Did you mean mnist'), ([*WD, '--bs', '0'], 'bs=0: must be'),
    ([*WD, '--seeds', '0'], '--seeds 0: must be at least 1'),
    ([*WD, '--results', '~nobody123/t.csv'], '~nobody123/t.csv')])
def test_tune_errors(repo, capsys, args, said):
    assert cli.main(args) == 2 and said in one_line(capsys.readouterr().err)
    assert not Path('tune.csv').exists()


def test_tune_says_what_can_never_work(repo, capsys):
    assert cli.main([*WD, '--n_train', '15', '--iters', '2', '--seeds', '1', '--jobs', '1']) == 2
    assert 'multiple of 10 classes (nothing was trained' in one_line(capsys.readouterr().err)
    assert not Path('tune.csv').exists()


def test_tune_says_that_no_run_came_to_its_end(repo, capsys):
    wild = '--n_train 20 --n_valid 50 --bs 10 --lr 1e30 --iters 9 --seeds 1 --jobs 1'.split()
    assert cli.main([*WD, *wild]) == 2
    end = capsys.readouterr().err.splitlines()[-1]
    assert end == 'gradreg: no run came to its end: the column status of tune.csv says why'


def test_tune_calls_a_tie_a_tie(repo, capsys):
    base = Run(data='digits', n_train=20, bs=10, iters=2, n_valid=50)
    for r in grid(base, spect_reg=[.1, .2, .3], seed=range(2)):
        append_row('rows.csv', {**asdict(r), 'status': 'ok', 'valid': .5 + .1*(r.spect_reg < .3)}, asdict(Run()))
    assert cli.main([*TUNE, 'digits', '--seeds', '2', '--results', 'rows.csv', '--jobs', '1']) == 0
    out, err = capsys.readouterr()
    assert 'best: spect_reg = 0.1' in out and 'edge' not in out
    assert 'spect_reg=0.1 and spect_reg=0.2 tie' in one_line(err)


OWN = '''import torch
from torch import nn
from fastai.data.core import DataLoaders
from torch.utils.data import TensorDataset
from gradreg.callbacks import GradReg
from gradreg.jacobians import sq_norm, vjp
from gradreg.runs import Task

def small(n_out): return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, n_out))

class SumReg(GradReg):
    def penalty(self): return sq_norm(vjp(self.pred, self.x, torch.ones_like(self.pred)))

def error(model, x, y): return (model.eval()(x) - y).abs().mean().item()

def loaders(n_train, n_valid, seed, bs, device):
    g = torch.Generator().manual_seed(seed)
    def part(n):
        x = torch.randn(n, 2, generator=g)
        return TensorDataset(x, x[:, :1]**2)
    dls = DataLoaders.from_dsets(part(n_train), part(n_valid), bs=bs, device=device, num_workers=0)
    dls.c, dls.test = 1, dls.valid.new(part(50))
    dls.task = Task('torch.nn:L1Loss', 'my_own:error', metric='mean distance', more=False, unit=' cm', scale=1)
    return dls
'''


def test_tune_with_data_network_and_penalty_of_ones_own(repo, capsys, monkeypatch):
    "In the folder where they lie; test_extend has them in workers"
    (repo/'my_own.py').write_text(OWN)
    monkeypatch.setattr(sys, 'path', [o for o in sys.path if o])
    args = '--data my_own:loaders --model my_own:small --penalty my_own:SumReg --method strength --lams 0,.1 --seeds 1'
    try: assert cli.main(['tune', *args.split(), *SMALL, '--jobs', '1']) == 0
    finally: sys.modules.pop('my_own', None)
    out = capsys.readouterr().out
    assert 'mean distance, cm on 50 validation points' in out and 'best: strength = ' in out
    assert sorted(load_rows('tune.csv').strength) == [0, .1]


def test_tune_without_training_says_that_nothing_is_there(repo, capsys):
    assert cli.main([*WD, '--jobs', '0']) == 2
    assert 'tune.csv holds none of these runs, and nothing was trained' in one_line(capsys.readouterr().err)
    assert not Path('tune.csv').exists()


def started(study, ready):
    "A process of `gradreg run`, and those that it has started by the time that `ready()`."
    p = subprocess.Popen([GRADREG, 'run', study], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         start_new_session=True)
    end, kernel = time.monotonic() + 300, []
    while not (kernel and ready()):
        assert p.poll() is None and time.monotonic() < end
        time.sleep(.1)
        kernel = psutil.Process(p.pid).children()
    return p, kernel


def stopped(p, kernel, sig):
    "What it says when it is stopped; no kernel is left behind."
    os.killpg(p.pid, sig)
    try: out, err = p.communicate(timeout=300)
    finally: p.kill()
    assert p.returncode == 130 and not out and 'goes on from here' in err and 'Traceback' not in err
    assert not psutil.wait_procs(kernel, timeout=300)[1]
    return err


def test_stopped_while_the_kernel_starts(repo):
    notebook(repo/'nbs/studies/53_slow.ipynb', 'Slow?', 'import time; time.sleep(1000)')
    stopped(*started('slow', lambda: True), signal.SIGTERM)


def test_interrupted_and_resumed(repo, capsys):
    "Ctrl-C in the middle of a grid: what had ended is kept, the same command trains the rest and shows all"
    axes = "Run(data='sin', model='mlp', n_train=50, n_valid=50, bs=25, iters=20), seed=range(4)"
    notebook(repo/'nbs/studies/58_grid.ipynb', 'Grid?', 'import os, time\nfrom gradreg.training import run',
             'from gradreg.study import Run, grid, results, run_all',
             # the third run waits until it is interrupted, the first time
             f"""def slow(r, device):
    if r.seed == 2 and not os.path.exists('waited'): open('waited', 'w').close(); time.sleep(1000)
    return run(r, device)
rows = run_all(grid({axes}), results('grid'), jobs=1, run=slow)
print('seeds', *rows.seed)""")
    file = repo/'nbs/studies/results/grid.csv'
    p, kernel = started('grid', (repo/'nbs/studies/waited').exists)
    kept = file.read_text()
    assert 'left, , 2 done' in stopped(p, kernel, signal.SIGINT)
    assert load_rows(file).seed.tolist() == [0, 1] and file.read_text() == kept
    assert cli.main(['run', 'grid']) == 0
    out, err = capsys.readouterr()
    assert 'grid: 2 runs' in err and 'seeds 0 1 2 3' in out and str(file) in out
    assert load_rows(file).seed.tolist() == [0, 1, 2, 3] and file.read_text().startswith(kept)
