"What a reader of chapter 22_notebooks need not see: damaged notebooks, terminals, dying kernels, what is overwritten"
import json, os, sys, unicodedata
from pathlib import Path

import nbformat
import pytest
from hypothesis import example, given, settings, strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from gradreg import cli
from gradreg.notebooks import (StudyFailed, execute, expanded, find_study, harmless, html_page, may_write, question,
                               read_cells, read_study, save_page, save_study, studies, texts)
from samples import PNG


def stored(*outputs, source='pass'):
    "A notebook with a title and one cell, whose outputs are stored"
    return new_notebook(cells=[new_markdown_cell('# Is it so?'), new_code_cell(source, outputs=list(outputs))])


GOOD = stored(new_output('stream', name='stdout', text='said'),
              new_output('stream', name='stderr', text='warned'),
              new_output('display_data', {'image/png': PNG, 'text/plain': '<Figure>'}),
              new_output('display_data', {'image/svg+xml': '<svg/>', 'text/plain': '<Figure>'}),
              new_output('execute_result', {'text/plain': 'a  1', 'text/html': '<table>', 'application/json': {}}))


# ---------------------------------------------------------------- damaged notebooks

words = st.text(max_size=5)
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | words,
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))


def places(node, path=()):
    "Paths to all values within a JSON value"
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for k, v in items: yield from places(v, (*path, k))


PLACES = list(places(GOOD))


def damaged(place, value):
    "GOOD with another value at one place"
    if not place: return value
    nb = json.loads(json.dumps(GOOD))
    *way, last = place
    node = nb
    for k in way: node = node[k]
    if value is None: del node[last]
    else: node[last] = value
    return nb


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A repository in which one stands, with one study"
    old, root = Path.cwd(), tmp_path_factory.mktemp('repo')
    (root/'nbs'/'studies').mkdir(parents=True)
    os.chdir(root)
    yield root/'nbs'/'studies'
    os.chdir(old)


def survives(path):
    "Whatever the file holds: it is read and shown, or refused by name"
    try:
        cells = read_cells(path)
        assert isinstance(question(cells), str) and all(isinstance(o, str) for o in texts(cells))
    except ValueError as e: assert str(path) in str(e) and 'is not a notebook' in str(e)
    try: read_study(path)
    except ValueError as e: assert str(path) in str(e) and 'is not a notebook' in str(e)
    assert may_write(path) is False
    for args in ['list'], ['show', 'so']: assert cli.main(args) in (0, 2)  # a traceback would come out here


@settings(max_examples=30, deadline=None)
@given(place=st.sampled_from(PLACES), value=json_values)
def test_a_value_in_the_wrong_place(folder, place, value):
    (folder/'50_so.ipynb').write_text(json.dumps(damaged(place, value)), encoding='utf-8')
    survives(folder/'50_so.ipynb')


@settings(max_examples=30, deadline=None)
@given(content=st.binary(max_size=200) | json_values.map(json.dumps).map(str.encode))
@example(b'')
@example(b'[' * 100_000)
@example(b'{"cells": []}')
@example(b'\xff\xfe')
@example(json.dumps(dict(GOOD, nbformat=3)).encode())
@example(json.dumps(dict(GOOD, nbformat=99)).encode())
def test_files_that_are_no_notebooks(folder, content):
    (folder/'50_so.ipynb').write_bytes(content)
    survives(folder/'50_so.ipynb')


@settings(deadline=None)
@given(cut=st.integers(0, len(json.dumps(GOOD)) - 1))
def test_a_notebook_cut_off(folder, cut):
    (folder/'50_so.ipynb').write_text(json.dumps(GOOD)[:cut], encoding='utf-8')
    with pytest.raises(ValueError, match='50_so.ipynb is not a notebook'): read_cells(folder/'50_so.ipynb')


def test_list_names_all_that_are_damaged_and_lists_the_others(folder, capsys):
    nbformat.write(GOOD, folder/'50_so.ipynb')
    (folder/'51_empty.ipynb').write_text('')
    (folder/'52_folder.ipynb').mkdir()
    assert cli.main(['list']) == 2
    out, err = capsys.readouterr()
    assert out.split(maxsplit=1) == ['so', 'Is it so?\n'] and 'Traceback' not in err
    assert len(err.splitlines()) == 2 and '51_empty.ipynb is not a notebook' in err and '52_folder.ipynb' in err
    (folder/'51_empty.ipynb').unlink()
    (folder/'52_folder.ipynb').rmdir()


def test_two_studies_of_one_name(tmp_path, monkeypatch):
    (tmp_path/'nbs'/'studies').mkdir(parents=True)
    for name in '50_so', '60_so': nbformat.write(GOOD, tmp_path/f'nbs/studies/{name}.ipynb')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='50_so.ipynb and 60_so.ipynb have one name'): studies()


def test_a_notebook_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    nbformat.write(GOOD, tmp_path/'my own.ipynb')
    assert find_study('~/my own.ipynb') == tmp_path/'my own.ipynb'
    with pytest.raises(ValueError, match='there is no notebook .*other.ipynb'): find_study('~/other.ipynb')


def test_homes(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert expanded('~/a') == tmp_path/'a' and expanded('a/~') == Path('a/~') and expanded(tmp_path) == tmp_path
    with pytest.raises(ValueError, match='^~nobody123/a: '): expanded('~nobody123/a')


# ---------------------------------------------------------------- what is printed

@given(text=st.text())
@example('\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b31m \r\n\ttab \u202egnp.exe \ud800 été 0.5 ± 0.1')
def test_no_control_reaches_the_terminal(text):
    out = harmless(text)
    obeyed = [c for c in out if unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp') or '\u202a' <= c <= '\u202e']
    assert set(obeyed) <= {'\n', '\t'}
    out.encode()  # can be printed
    if text.isprintable(): assert out == text
    assert harmless(out) == out


def test_texts_escape_and_wrap():
    nb = stored(new_output('stream', name='stdout', text='\x1b[2J' + 'word '*10),
                new_output('execute_result', {'text/plain': '\x07'}))
    assert list(texts(read_cells(nb), 20)) == ['\\x1b[2Jword word\nword word word word\nword word word word', '\\x07']


def test_what_is_shown_of_an_output():
    assert list(texts(read_cells(GOOD))) == ['said', 'a  1']
    both = new_output('display_data', {'text/markdown': '**so**', 'text/plain': 'x'})
    assert list(texts(read_cells(stored(both)))) == ['**so**']


# ---------------------------------------------------------------- kernels

def test_a_kernel_that_dies(tmp_path):
    nb = new_notebook(cells=[new_code_cell('import os, signal; os.kill(os.getpid(), signal.SIGKILL)')])
    with pytest.raises(StudyFailed, match='its kernel died'): execute(nb, tmp_path, dict(os.environ))


def test_where_a_kernel_runs_and_what_it_knows(tmp_path):
    nb = new_notebook(cells=[new_code_cell('import os, sys; print(os.getcwd(), os.environ["MINE"], sys.executable)')])
    execute(nb, tmp_path, {**os.environ, 'MINE': 'yours'})
    assert list(texts(read_cells(nb), 999)) == [f'{tmp_path} yours {sys.executable}']


# ---------------------------------------------------------------- what is written

@pytest.mark.parametrize('text', ['<script>alert(1)</script>', '</title><img src=x onerror=alert(1)>'])
def test_a_page_escapes(text):
    page = html_page(stored(new_output('stream', name='stdout', text=text)), text)
    assert '<script' not in page and '<img' not in page
    assert page.startswith('<!doctype html>') and page.endswith('</html>')


sources = st.lists(st.text(st.characters(exclude_categories=['Cs'])), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(sources=sources, other=sources)
def test_only_what_was_written_is_overwritten(tmp_path_factory, sources, other):
    path = tmp_path_factory.mktemp('out')/'so.ipynb'
    nb = new_notebook(cells=[new_code_cell(o) for o in sources])
    assert may_write(path)
    nbformat.write(nb, path)
    assert not may_write(path)  # somebody's own
    save_study(nb, path)
    assert may_write(path)
    nbformat.write(nbformat.read(path, 4), path)  # as Jupyter stores it, line by line
    assert may_write(path)
    changed = nbformat.read(path, 4)
    changed.cells = [new_code_cell(o) for o in other]
    nbformat.write(changed, path)
    assert may_write(path) == (other == sources)


def test_files_are_whole(tmp_path, monkeypatch):
    "A page that cannot be made leaves the one before it, and no scraps"
    assert [p.name for p in save_page(GOOD, tmp_path, 'so')] == ['so-1.png', 'so-2.svg', 'so.html']
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError('no space')))
    with pytest.raises(OSError, match='no space'): save_page(GOOD, tmp_path, 'so')
    with pytest.raises(OSError, match='no space'): save_study(GOOD.copy(), tmp_path/'so.ipynb')
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
