"What a reader of chapter 07_rows need not see: damaged files, merges, spreadsheets, full disks, two writers, kills"
import contextlib, csv, io, itertools, math, multiprocessing, os, re, signal, stat, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from gradreg import rows as gradreg_rows
from book import code, notebooks, source
from gradreg.rows import (append_row, check_writable, load_rows, locked, results, smoke_test, studies_folder,
                          write_rows)

root = Path(__file__).resolve().parents[1]
many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEY = dict(data='mnist', lr=1e-3, every=1, bn=False, seed=0)


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
    assert set(df.commit) == {'12e4'} and set(df.torch) == {'2.14'} and df.seed.dtype.kind == 'i'
    assert df.bn.dtype == bool and not df.bn.any()


def test_strange_values_round_trip(path):
    append(path, test=math.nan, valid=math.inf, status='ValueError: "a, b"; ü')
    append(path, seed=1, test=-0., status='diverged', note='text')
    df = load_rows(path)
    assert math.isnan(df.test[0]) and df.valid[0] == math.inf and df.status[0] == 'ValueError: "a, b"; ü'
    assert df.note[1] == 'text'


def test_new_columns_and_old_rows(path):
    append_row(path, {k: v for k, v in made().items() if k not in ('bn', 'every')}, KEY)  # from before these columns
    append(path, seed=1, bn=True, extra=3)
    df = load_rows(path)
    assert len(df) == 2 and math.isnan(df.extra[0]) and df.extra[1] == 3 and df.bn[1] is True
    append(path, test=.9)  # a blank means the key's value, so this one is known
    assert load_rows(path).test.tolist() == [.5, .5]
    assert load_rows(path, KEY, [made()]).seed.tolist() == [0] and load_rows(path, KEY, [made(every=2)]).empty


def test_only_the_key_tells_rows_apart(path):
    for o in dict(), dict(lr=0.), dict(seed=1), dict(data='sin'), dict(bn=True): append(path, **o)
    for o in dict(lr=1e-3 + 1e-18), dict(test=.7), dict(other=1): append(path, **o)
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


@pytest.mark.parametrize('torn', [b'mnist,0.001,1', b'x'*5000, b'"', b'mnist,0.001,"ok', b'\0\0\0', 'ü'.encode()[:1]])
def test_what_broke_off_is_set_aside(path, torn):
    append(path)
    whole = path.read_bytes()
    for n in 1, 2:
        with open(path, 'ab') as f: f.write(torn)
        with pytest.warns(UserWarning, match='rows.csv: its last line has no end'): assert len(load_rows(path)) == n
        with pytest.warns(UserWarning, match='is now in rows.torn'): append(path, seed=n)
        assert path.read_bytes().startswith(whole) and path.read_bytes().count(b'\n') == n + 2
        assert (path.parent/'rows.torn').read_bytes() == n*(torn + b'\n')
    assert load_rows(path).seed.tolist() == [0, 1, 2]


@pytest.mark.filterwarnings('ignore:.*its last line')
@pytest.mark.parametrize('cut', [1, 2, 10, 20])
def test_truncated_file(path, cut):
    for i in range(3): append(path, seed=i)
    path.write_bytes(path.read_bytes()[:-cut])
    assert load_rows(path).seed.tolist() == [0, 1]
    append(path, seed=2)
    assert load_rows(path).seed.tolist() == [0, 1, 2]


@pytest.mark.filterwarnings('ignore:.*its last line')
@pytest.mark.parametrize('content', [None, '', '\n', 'data,lr,sta', 'data,lr,status\n'])
def test_no_rows_yet(path, content):
    if content is not None: path.write_text(content)
    assert load_rows(path).empty and [*load_rows(path, KEY)] == [*KEY, 'status']
    append(path)
    assert load_rows(path).seed.tolist() == [0]


OLD = 'data,lr,seed,status,test\nmnist,0.001,0,ok,0.5\nmnist,0.001,1,ok,0.25\nmnist,0.001,2,ok,0.125\n'


@pytest.mark.parametrize('line,data,said', [
    (3, OLD.replace('1,ok', '1ok'), '4 cells under 5 names'), (3, OLD.replace('1,ok', '1,ok,7'), '6 cells'),
    (3, OLD.replace('1,ok', '1,"ok'), 'a quote'), (3, OLD.replace('1,ok', '1,o"k'), 'a quote'),
    (3, OLD.replace('1,ok', '1,"o"k'), 'a quote'), (3, OLD.replace('1,ok', '1,"a\nb"'), 'a quote'),
    (3, OLD.replace('1,ok', '1,o\0k'), 'control'), (3, OLD.replace('1,ok', '1,o\rk'), 'control'),
    (3, OLD.replace('1,ok', '1,\xff').encode('latin1'), 'no UTF-8'),
    (2, OLD.replace('\n', '\n<<<<<<< HEAD\n', 1), 'merge'),
    (4, OLD.replace('mnist,0.001,2', '=======\nmnist,0.001,2'), 'merge'), (5, OLD + '>>>>>>> main\n', 'merge'),
    (2, OLD.replace('\n', '\n||||||| base\n', 1), 'merge'),
    (1, OLD.replace('lr', '', 1), 'must name the columns'), (1, OLD.replace('lr', 'seed', 1), 'must name the columns'),
    (1, OLD.split('\n', 1)[1], 'must name the columns'), (1, OLD.replace('\n', ',', 1), 'must name the columns'),
    (2, OLD.replace(',', ';', 4), '5 cells under 1'), ('', OLD.replace('\n', '\r'), 'carriage returns')])
def test_what_cannot_be_read_stops_and_stays(path, line, data, said):
    data = data if isinstance(data, bytes) else data.encode()
    path.write_bytes(data)
    def load_some(path): load_rows(path, KEY, [made()])
    def add(path): append(path, seed=7, test=.75)
    for call in load_rows, load_some, add:
        with pytest.raises(ValueError, match=rf'rows\.csv, (line {line}: )?.*{said}.*mend it'): call(path)
        assert path.read_bytes() == data
    assert load_rows(path.parent/'rows.unsaved.csv').test.tolist() == [.75]  # once, and whole


def test_a_table_that_is_no_file_of_runs(path):
    path.write_text('data;lr;seed;status\nmnist;0.001;0;ok\n')  # as a German spreadsheet saves it
    for call in (lambda: load_rows(path, KEY, [made()]), lambda: append(path)):
        with pytest.raises(ValueError, match=r"rows\.csv has no column `status`.*'data;lr;seed;status'"): call()
    assert path.read_text() == 'data;lr;seed;status\nmnist;0.001;0;ok\n'


def test_unsaved_rows_go_to_the_end_of_the_mended_file(path):
    path.write_text(OLD + 'mnist,0.001\n')
    for i in 5, 6:
        with pytest.raises(ValueError, match=r'line 5: .*the new row is in .*rows\.unsaved\.csv'):
            append(path, seed=i, new=i)
    aside = path.parent/'rows.unsaved.csv'
    with open(path, 'w') as f: f.write(OLD + aside.read_text())
    df = load_rows(path)
    assert df.seed.tolist() == [0, 1, 2, 5, 6] and df.new.tolist()[3:] == [5, 6]
    assert df.test.tolist()[:3] == [.5, .25, .125]
    append(path, seed=7)
    assert load_rows(path).seed.tolist() == [0, 1, 2, 5, 6, 7] and path.read_text().count('status') == 1


def test_a_row_that_no_line_can_hold_is_saved_legibly(path):
    with pytest.raises(ValueError, match=r"note='a\\nb'.*line breaks.*rows\.unsaved\.csv"):
        append(path, note='a\nb', **{'c\0': 1})
    df = load_rows(path.parent/'rows.unsaved.csv')
    assert df.note[0] == 'a\\nb' and df['c\\x00'][0] == 1 and df.test[0] == .5 and not path.exists()


def test_a_row_is_never_read_under_another_header(path):
    "Two headers of one length, in every order of the lines; and a name that was damaged"
    append(path, seed=0, a=1)
    a = path.read_text()
    path.unlink()
    append(path, seed=1, c=2)
    head_a, row_a, head_c, row_c = (a + path.read_text()).splitlines()
    for lines in itertools.permutations([head_a, row_a, head_c, row_c]):
        if lines[0] not in (head_a, head_c): continue
        path.write_text('\n'.join(lines) + '\n')
        df = load_rows(path).set_index('seed')
        assert df.a[0] == 1 and df.c[1] == 2 and df.notna().a.sum() == df.notna().c.sum() == 1 and 'columns' not in df
    path.write_text(a.replace('seed', 'sxed'))
    for call in load_rows, append:
        with pytest.raises(ValueError, match='line 2: its header, c[0-9a-f]{8}, is not there'): call(path)
    path.write_text(a.replace('"a"', '"b"').replace('"columns"', '"what"'))
    assert load_rows(path).b.tolist() == [1]  # who takes the check out may change the names
    with pytest.raises(ValueError, match='`columns` is a name that result files have for themselves.*rows.unsaved.csv'):
        append(path, seed=5, columns=1)


def test_status_of_unknown_meaning_stays(path):
    "Only the row of an error gives way: a finished one whose status was damaged does not"
    append(path)
    path.write_text(path.read_text().replace('"ok"', '"oj"'))
    append(path, test=.75)
    assert load_rows(path).test.tolist() == [.5, .75] and load_rows(path, KEY, [KEY]).test.tolist() == [.75]


def test_modes_stay(path):
    append(path)
    for mode in 0o600, 0o664:
        path.chmod(mode)
        with open(path, 'a') as f: f.write('torn')
        with pytest.warns(UserWarning, match='rows.torn'): append(path, seed=mode)
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((path.parent/'rows.torn').stat().st_mode) == mode


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
    assert len(load_rows(path)) == 2 and len(load_rows(path.parent/'rows.unsaved.csv')) > 0


def test_folders_are_made(tmp_path):
    append(tmp_path/'a'/'b'/'rows.csv')
    assert len(load_rows(tmp_path/'a'/'b'/'rows.csv')) == 1


def test_results_wherever_one_stands(tmp_path, monkeypatch):
    for k in 'GRADREG_RESULTS', 'GRADREG_SMOKE': monkeypatch.delenv(k, raising=False)
    for d in root, root/'nbs', root/'tests', root/'nbs/studies/results':
        monkeypatch.chdir(d)
        assert studies_folder() == root/'nbs/studies' and results('x') == root/'nbs/studies/results/x.csv'
    monkeypatch.chdir(tmp_path)
    assert studies_folder() is None and results('x') == tmp_path/'results/x.csv'
    for said, folder in (tmp_path/'there', tmp_path/'there'), ('here', tmp_path/'here'), ('~/me', Path.home()/'me'):
        monkeypatch.setenv('GRADREG_RESULTS', str(said))
        assert results('x') == folder/'x.csv'
    monkeypatch.setenv('GRADREG_RESULTS', '~nobody at all')
    with pytest.raises(ValueError, match='~nobody at all: no user has that name'): results('x')


@pytest.mark.parametrize('said,smoke', [(None, False), ('', False), ('0', False), ('1', True)])
def test_rows_are_lost_only_by_a_smoke_test(tmp_path, monkeypatch, said, smoke):
    monkeypatch.chdir(tmp_path)
    for k in 'GRADREG_RESULTS', 'GRADREG_SMOKE': monkeypatch.delenv(k, raising=False)
    if said is not None: monkeypatch.setenv('GRADREG_SMOKE', said)
    assert smoke_test() is smoke and (results('x') != tmp_path/'results/x.csv') is smoke


@pytest.mark.parametrize('said', ['yes', 'true', ' 1', '2'*5000])
def test_a_smoke_test_that_is_neither_yes_nor_no(monkeypatch, said):
    monkeypatch.setenv('GRADREG_SMOKE', said)
    for call in smoke_test, lambda: results('x'):
        with pytest.raises(ValueError, match='^GRADREG_SMOKE=.*choose 1') as e: call()
        assert len(str(e.value)) < 200


def test_one_place_reads_whether_it_is_a_smoke_test():
    "Elsewhere the variable is set or taken away, for a test; never read"
    def asks(text): return re.search(r"(environ.*|getenv\()'GRADREG_SMOKE|GRADREG_SMOKE' in os", text)
    assert asks("os.environ.get('GRADREG_SMOKE')") and asks("'GRADREG_SMOKE' in os.environ")
    found = {p.stem for p in notebooks for c in code(p) if asks(source(c))}
    assert found == {'07_rows'}


def test_a_bad_path_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    os.mkfifo(tmp_path/'pipe')
    (tmp_path/'link').symlink_to(tmp_path)
    for bad in tmp_path, tmp_path/'pipe', tmp_path/'link', os.devnull:
        for call in check_writable, load_rows, append:
            with pytest.raises(OSError, match='a folder, a pipe or a device'): call(bad)
    append(tmp_path/'rows.csv')
    with pytest.raises(OSError, match='cannot be written.*choose another place'):
        check_writable(tmp_path/'rows.csv'/'rows.csv')
    def denied(*args, **kwargs): raise PermissionError(13, 'Permission denied')
    with monkeypatch.context() as m:
        m.setattr(gradreg_rows.tempfile, 'TemporaryFile', denied)
        with pytest.raises(OSError, match='cannot be written .Permission denied'): check_writable(tmp_path/'rows.csv')
    assert check_writable(tmp_path/'new'/'rows.csv') == (tmp_path/'new'/'rows.csv').resolve()
    assert not (tmp_path/'new'/'rows.csv').exists() and len(load_rows(check_writable(tmp_path/'rows.csv'))) == 1


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


# spreadsheets and merges

def as_spreadsheet(path):
    "Save a file as spreadsheets do: no needless quotes, 0 for 0.0, TRUE for True, other line ends, a mark in front"
    def saved(text):
        if text in ('True', 'False'): return text.upper()
        with contextlib.suppress(ValueError): return f'{float(text):.15g}'
        return text
    with open(path, encoding='utf-8', newline='') as f: lines = [[*map(saved, o)] for o in csv.reader(f)]
    with open(path, 'w', encoding='utf-8-sig', newline='') as f: csv.writer(f, lineterminator='\r\n').writerows(lines)


def test_rows_saved_by_a_spreadsheet_are_found(path):
    fields = (0., True, 1, 'mnist'), (1., False, 2, 'sin'), (1e-5, True, 10**7, 'a, b'), (.1, False, 1, '"')
    runs = [made(seed=i, lr=lr, bn=bn, every=every, data=data) for i, (lr, bn, every, data) in enumerate(fields)]
    for o in runs: append_row(path, o, KEY)
    before = load_rows(path)
    as_spreadsheet(path)
    saved = path.read_bytes()
    assert load_rows(path, KEY, runs).index.tolist() == [0, 1, 2, 3]
    df = load_rows(path)
    assert df.equals(before.astype(df.dtypes)) and df.bn.tolist() == [True, False, True, False]
    for o in runs: append_row(path, {**o, 'test': .75}, KEY)
    assert path.read_bytes() == saved  # all are known
    append(path, seed=9)
    assert load_rows(path, KEY, [*runs, made(seed=9)]).test.tolist() == [.5]*5


@pytest.mark.parametrize('default,same,other', [
    (False, ['False', 'FALSE', 'false', '0', '0.0', ''], ['True', '1', 'no']),
    (True, ['TRUE', '1', '1.0'], ['0', 'yes']), (10**30, [str(10**30)], ['1e30']),
    (3, ['3', '3.0', '3e0', '"3"', ''], ['4', '3.5', 'three', 'inf', 'nan']),
    (.001, ['0.001', '1e-3', '1E-03', '"0.001"', ''], ['0.01', 'nan', 'x']), (0., ['0', '-0.0', '0e7'], ['1']),
    ('2', ['2', '"2"', ''], ['2.0', 'two']), (None, [''], ['1', 'x'])])
def test_keys_are_compared_by_type(path, default, same, other):
    for cell in same + other:
        path.write_text(f'key,status\n{cell},ok\n')
        assert len(load_rows(path, dict(key=default), [dict(key=default)])) == (cell in same), cell
        append_row(path, dict(key=default, status='ok'), dict(key=default))
        assert len(load_rows(path)) == (1 if cell in same else 2), cell


def merged(base, ours, theirs, folder):
    "What git makes of two branches' files by `merge=union`"
    for name, text in dict(base=base, ours=ours, theirs=theirs).items():
        (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    files = [folder/o for o in ('ours', 'base', 'theirs')]
    done = subprocess.run(['git', 'merge-file', '-p', '--union', *files], capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


extra = st.fixed_dictionaries({}, optional=dict(a=st.integers(0, 3), b=st.just(.5), c=st.just('x'), d=st.booleans()))


@settings(many, max_examples=30)
@given(*[st.lists(extra, max_size=n) for n in (9, 4, 4, 4)])
@example([{}], [dict(a=1)], [dict(c='x')], [])
@example([{}]*9, [dict(a=1)], [dict(b=.5)], [dict(a=2)])  # git puts both headers first, then the rows
def test_no_row_is_lost_in_merges(tmp_path, base, ours, theirs, others):
    "Three branches, merged one after the other"
    path, seeds = tmp_path/'rows.csv', iter(range(99))
    def grown(text, extras):
        path.write_text(text)
        for o in extras: append(path, seed=next(seeds), **o)
        return path.read_text()
    text = grown('', base)
    branches = a, b, c = [grown(text, o) for o in (ours, theirs, others)]
    path.write_bytes(merged(text, merged(text, a, b, tmp_path), c, tmp_path))
    n = next(seeds)
    if n == 0: return
    df = load_rows(path)
    assert sorted(df.seed) == [*range(n)]  # each once, although a merge may bring it twice
    assert load_rows(path, KEY, [made(seed=i) for i in range(n)]).index.tolist() == [*range(n)]
    for text in branches:
        path.write_text(text)
        for o in load_rows(path).to_dict('records'):
            row = df[df.seed == o['seed']].iloc[0]
            assert all(row[k] == v for k, v in o.items() if not pd.isna(v))


# any values, any damage

texts = st.text(st.characters(exclude_categories=['Cc', 'Cs']), max_size=20)
names = st.text(st.characters(exclude_categories=['Cc', 'Cs']), min_size=1, max_size=8)
like_numbers = st.sampled_from(['1e4', '007', 'True', 'nan', ''])
values = st.one_of(st.none(), st.booleans(), st.integers(-2**53, 2**53), st.floats(), texts, like_numbers)


@many
@given(st.lists(st.dictionaries(names, values, min_size=1, max_size=5), min_size=1, max_size=5))
@example([{'a': 'a'}, {'b': 1}])
@example([{'a': None}, {'a': 1}])
@example([{'a': True, 'b': '1'}, {'a': 1, 'b': 1}])
@example([{'n': 10**30}])
@example([{'long': 'x'*131_073, 'n': 1}])
def test_what_is_written_is_read(path, rows):
    try: write_rows(path, rows)
    except ValueError as e:
        assert 'repeats the names' in str(e)  # nobody could tell it from a header
        return
    df = load_rows(path)
    assert [*df] == [*dict.fromkeys(k for o in rows for k in o)] and len(df) == len(rows)
    for row, o in zip(df.to_dict('records'), rows):
        for k, back in row.items():
            v = o.get(k)
            if k in gradreg_rows._text and v is None: assert back == ''
            elif k in gradreg_rows._text: assert back == str(v)
            elif v is None or v != v: assert pd.isna(back)
            else: assert back == v and isinstance(back, str) == isinstance(v, str)
    blank = '' if df.shape[1] > 1 else 'nan'  # a line must not be empty
    expected = [[blank if o.get(k) is None else str(o[k]) for k in df] for o in rows]
    csv.field_size_limit(10**6)
    with open(path, encoding='utf-8', newline='') as f: assert [*csv.reader(f)] == [[*df], *expected]  # Python agrees


@many
@given(st.dictionaries(names, st.one_of(values, st.text(max_size=5)), max_size=4), st.integers(0, 3))
def test_an_appended_row_is_there_or_beside(path, more, seed):
    for o in path.parent.iterdir(): o.unlink()
    append(path)
    row = made(seed=seed, **{k: v for k, v in more.items() if k not in KEY and k not in ('status', 'test', 'valid')})
    try: append_row(path, row, KEY)
    except ValueError as e:
        assert 'control characters' in str(e)
        assert load_rows(path.parent/'rows.unsaved.csv').seed.tolist() == [seed]
    else: assert seed in load_rows(path).seed.tolist()
    assert load_rows(path, KEY, [KEY]).seed.tolist() == [0]


@pytest.fixture(scope='module')
def five(tmp_path_factory):
    "A file of five rows as it is written today, and as it was before text stood in quotes"
    path = tmp_path_factory.mktemp('five')/'rows.csv'
    for i in range(5): append(path, seed=i, test=i/8, status='OSError: full, "so"' if i == 3 else 'ok')
    older = io.StringIO()
    with open(path, encoding='utf-8', newline='') as f: lines = [o[:-1] for o in csv.reader(f)]  # without their mark
    csv.writer(older, lineterminator='\n').writerows(lines)
    return path.read_bytes(), older.getvalue().encode()


@settings(many, max_examples=150)
@given(st.data(), st.sampled_from(['replace', 'insert', 'delete', 'cut']), st.integers(0, 255), st.booleans())
def test_no_damage_loses_a_row_silently(five, path, data, kind, byte, older):
    for o in path.parent.iterdir(): o.unlink()
    whole = five[older]
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] + {'replace': bytes([byte]), 'insert': bytes([byte]) + whole[at:at + 1]}.get(kind, b'')
    if kind != 'cut': damaged += whole[at + 1:]
    path.write_bytes(damaged)
    untouched = [o for o in whole.split(b'\n')[1:-1] if o in damaged.split(b'\n')[:-1]]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try:
            n = len(load_rows(path))
            assert n + bool(said) == 5 if kind != 'cut' else n == max(damaged.count(b'\n') - 1, 0)
            assert bool(said) == (not damaged.endswith(b'\n') and damaged != b'')
        except ValueError as e:
            assert 'rows.csv' in str(e) and 'line' in str(e)
        try: append(path, seed=99)
        except ValueError as e:
            assert 'rows.unsaved.csv' in str(e) and path.read_bytes() == damaged
            assert load_rows(path.parent/'rows.unsaved.csv').seed.tolist() == [99]
            return
    now, torn = path.read_bytes(), damaged.rpartition(b'\n')[2]
    assert all(o in now for o in untouched)
    assert not torn or (path.parent/'rows.torn').read_bytes() == torn + b'\n'
    assert len(load_rows(path, KEY, [made(seed=99)])) == 1


# killed, and waiting

writer = """import json, sys
from gradreg.rows import append_row
for i in range(10**6):
    append_row(sys.argv[1], dict(seed=i, status='ok', test=i/8, **{f'c{i//20}': 'x'*i}), dict(seed=-1))
    print(i, flush=True)"""


@pytest.mark.parametrize('n', [0, 1, 5, 19, 40])
def test_a_killed_writer_leaves_whole_rows(path, n):
    with subprocess.Popen([sys.executable, '-c', writer, path], stdout=subprocess.PIPE, text=True) as p:
        for i in range(n + 1): p.stdout.readline()
        time.sleep(np.random.default_rng(n).uniform(0, .02))
        p.kill()
    assert p.returncode == -signal.SIGKILL
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        df = load_rows(path)
        assert df.seed.tolist() == [*range(len(df))] and len(df) > n and df.test.tolist() == (df.seed/8).tolist()
        append_row(path, dict(seed=10**6, status='ok'), dict(seed=-1))  # its lock is gone with it
    assert len(load_rows(path)) == len(df) + 1


def test_who_waits_is_told_for_whom(path, capfd):
    holder = 'import sys, gradreg.rows as r\nwith r.locked(sys.argv[1]): print(1, flush=True); sys.stdin.readline()'
    waiter = 'import sys, gradreg.rows as r\nwith r.locked(sys.argv[1], patience=.2): print("mine")'
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, '-c', holder, path], **pipes) as one:
        one.stdout.readline()
        with subprocess.Popen([sys.executable, '-c', waiter, path], **pipes) as two:
            said = two.stderr.readline()
            one.stdin.write('\n')
            one.stdin.flush()
            assert two.stdout.readline() == 'mine\n'
    assert f'rows.csv is in use by process {one.pid} on ' in said and said.endswith(': waiting\n')
    assert not path.with_name('rows.csv.holder.lock').exists()
    with locked(path): pass
    assert capfd.readouterr().err == ''
