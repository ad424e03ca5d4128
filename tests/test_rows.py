"What a reader of chapter 07_rows need not see: broken files, full disks, two writers"
import math, multiprocessing, os
from pathlib import Path

import numpy as np
import pytest

from gradreg.rows import append_row, load_rows, results


KEY = dict(data='mnist', lr=1e-3, every=1, bn=False, seed=0)


@pytest.fixture
def path(tmp_path): return tmp_path/'rows.csv'


def made(**kwargs): return {**KEY, 'status': 'ok', 'test': .5, 'valid': .5, **kwargs}


def append(path, **kwargs): append_row(path, made(**kwargs), KEY)


def test_rows_round_trip(path):
    numbers = np.random.default_rng(0).integers(0, 2**63, 400, dtype=np.uint64).view(np.float64)
    rows = [made(seed=i, lr=float(abs(x)), test=float(x), valid=np.float32(i)/3, commit='12e4', torch='2.14')
            for i, x in enumerate(numbers[np.isfinite(numbers)][:12])]
    for o in rows: append_row(path, o, KEY)
    df = load_rows(path)
    assert df.test.tolist() == [o['test'] for o in rows] and df.lr.tolist() == [o['lr'] for o in rows]
    assert df.valid.astype(np.float32).tolist() == [o['valid'] for o in rows]
    assert set(df.commit) == {'12e4'} and set(df.torch) == {'2.14'} and df.bn.dtype == bool and df.seed.dtype.kind == 'i' and not df.bn.any()


def test_strange_values_round_trip(path):
    append(path, test=math.nan, valid=math.inf, status='ValueError: "a, b"; ü')
    append(path, seed=1, test=-0., status='diverged', note='text')
    df = load_rows(path)
    assert math.isnan(df.test[0]) and df.valid[0] == math.inf and df.status[0] == 'ValueError: "a, b"; ü' and df.note[1] == 'text'


def test_new_columns_and_old_rows(path):
    append_row(path, {k: v for k, v in made().items() if k not in ('bn', 'every')}, KEY)  # from before these columns
    append(path, seed=1, bn=True, extra=3)
    df = load_rows(path)
    assert len(df) == 2 and math.isnan(df.extra[0]) and df.extra[1] == 3 and df.bn[1] is True
    append(path, test=.9)  # a blank means the key's value, so this one is known
    assert load_rows(path).test.tolist() == [.5, .5]
    assert load_rows(path, KEY, [made()]).seed.tolist() == [0] and load_rows(path, KEY, [made(every=2)]).empty


def test_only_the_key_tells_rows_apart(path):
    for o in (dict(), dict(lr=0.), dict(seed=1), dict(data='sin'), dict(bn=True), dict(lr=1e-3 + 1e-18), dict(test=.7), dict(other=1)): append(path, **o)
    assert len(load_rows(path)) == 6
    append_row(path, made(test=.7), {**KEY, 'test': None})
    assert len(load_rows(path)) == 7


@pytest.mark.parametrize('key', [None, {}])
def test_a_key_is_needed(path, key):
    with pytest.raises(ValueError, match='name the columns'): append_row(path, made(), key)
    assert not path.exists()
    append(path)
    with pytest.raises(ValueError, match='name the columns'): load_rows(path, key, [made()])


def test_wanted_rows_come_in_the_order_asked_for(path):
    for i in range(5): append(path, seed=i, test=i/8)
    df = load_rows(path, KEY, (made(seed=i) for i in (3, 9, 0, 3)))
    assert df.seed.tolist() == [3, 0, 3] and df.index.tolist() == [0, 2, 3] and df.test.tolist() == [3/8, 0, 3/8]
    empty = load_rows(path, KEY, [made(seed=9)])
    assert empty.empty and [*empty] == [*KEY, 'status'] and load_rows(path, KEY, []).empty


def test_duplicates_and_failed_rows(path):
    append(path, status='ValueError: no')
    append(path, seed=1)
    append(path, status='OSError: again no')
    assert load_rows(path).status.tolist() == ['ok', 'OSError: again no']
    append(path, test=.7)
    append(path, test=.8)
    append(path, status='OSError: late')  # what is done stays
    df = load_rows(path)
    assert df.seed.tolist() == [1, 0] and df.test.tolist() == [.5, .7] and set(df.status) == {'ok'}


@pytest.mark.parametrize('broken', ['mnist,0.001,1', 'x'*5000, '"', 'mnist,0.001,"ok'])
def test_half_written_line_is_mended(path, broken):
    append(path)
    whole = path.read_text()
    path.write_text(whole + broken)
    assert len(load_rows(path)) == 1
    append(path, seed=1)
    lines = path.read_text().splitlines()
    assert path.read_text().startswith(whole) and load_rows(path).seed.tolist() == [0, 1] and len(lines) == 3 and broken not in lines


@pytest.mark.parametrize('cut', [1, 2, 10, 20])
def test_truncated_file(path, cut):
    for i in range(3): append(path, seed=i)
    path.write_bytes(path.read_bytes()[:-cut])
    assert load_rows(path).seed.tolist() == [0, 1]
    append(path, seed=2)
    assert load_rows(path).seed.tolist() == [0, 1, 2]


def test_short_and_long_lines(path):
    "Lines that some other hand broke do not count as done and stop nothing"
    append(path)
    with open(path, 'a') as f: f.write('mnist,1\n' + path.read_text().splitlines()[1] + ',7,8\n')
    append(path, seed=1)
    df = load_rows(path)
    assert df.seed.tolist() == [0, 1] and df.status.eq('ok').all() and df.test.eq(.5).all()


@pytest.mark.parametrize('content', [None, '', 'data,lr,sta', 'data,lr,status\n'])
def test_no_rows_yet(path, content):
    if content is not None: path.write_text(content)
    assert load_rows(path).empty and [*load_rows(path, KEY)] == [*KEY, 'status']
    append(path)
    assert load_rows(path).seed.tolist() == [0]


def test_full_disk(path, monkeypatch):
    append(path)
    before = path.read_bytes()
    def full(*args): raise OSError(28, 'No space left on device')
    for name in 'fsync', 'replace':
        with monkeypatch.context() as m, pytest.raises(OSError, match='No space'):
            m.setattr(os, name, full)
            append(path, seed=1)
        assert path.read_bytes() == before and not list(path.parent.glob('.*tmp'))
    append(path, seed=1)
    assert len(load_rows(path)) == 2


def test_folder_and_results(tmp_path, monkeypatch):
    append(tmp_path/'a'/'b'/'rows.csv')
    assert len(load_rows(tmp_path/'a'/'b'/'rows.csv')) == 1
    monkeypatch.setenv('GRADREG_RESULTS', str(tmp_path))
    assert results('x') == tmp_path/'x.csv'
    monkeypatch.setenv('GRADREG_RESULTS', '')
    monkeypatch.delenv('GRADREG_SMOKE', raising=False)
    monkeypatch.chdir(Path(__file__).parent)
    assert results('x') == Path(__file__).resolve().parents[1]/'nbs/studies/results/x.csv'
    monkeypatch.chdir(tmp_path)
    assert results('x') == tmp_path/'results/x.csv'


def test_two_writers(path):
    fork = multiprocessing.get_context('fork')
    start = fork.Event()
    def write(me):
        start.wait()
        for i in range(20): append(path, seed=100*me + i, who=me)
        for i in range(5): append(path, seed=1000 + i, who=me)  # both want these
    ps, seen = [fork.Process(target=write, args=(me,)) for me in (1, 2)], [0]
    for p in ps: p.start()
    start.set()
    while any(p.is_alive() for p in ps): seen.append(len(load_rows(path)))  # never broken, never shorter
    assert [p.exitcode for p in ps] == [0, 0]
    df = load_rows(path)
    assert sorted(df.seed) == [*range(100, 120), *range(200, 220), *range(1000, 1005)] and seen == sorted(seen)
    assert df[df.seed < 1000].who.tolist() == (df[df.seed < 1000].seed//100).tolist()
    assert not list(path.parent.glob('.*tmp'))


def test_rows_reach_the_file_behind_a_link(tmp_path):
    (tmp_path/'real').mkdir()
    real, link = tmp_path/'real/rows.csv', tmp_path/'rows.csv'
    append(real, seed=0)
    link.symlink_to(real)
    append(link, seed=1)
    assert link.is_symlink() and load_rows(real).seed.tolist() == load_rows(link).seed.tolist() == [0, 1]
    assert not (tmp_path/'rows.csv.lock').exists()  # one lock for both names


def test_a_file_saved_by_excel_keeps_its_first_column(path):
    append(path, data='cifar10')
    path.write_text(path.read_text(), encoding='utf-8-sig')
    assert load_rows(path).data.tolist() == ['cifar10'] and load_rows(path, KEY, [KEY]).empty  # and not MNIST's
    append(path, data='cifar10')
    assert len(load_rows(path)) == 1
