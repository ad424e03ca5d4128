"What a reader of chapter 08_tables need not see: broken files, full disks, two writers, SciPy's and other people's numbers, verdicts at their edges"
import csv, math, multiprocessing, os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gradreg.tables import append_row, beside, claim, compare, effects, gains, load_rows, paper, results, summarize, welch

CSV = Path(__file__).resolve().parents[1]/'nbs/studies/paper.csv'
KEY = dict(data='mnist', lr=1e-3, every=1, bn=False, seed=0)


@pytest.fixture
def path(tmp_path): return tmp_path/'rows.csv'


def made(**kwargs): return {**KEY, 'status': 'ok', 'test': .5, 'valid': .5, **kwargs}


def append(path, **kwargs): append_row(path, made(**kwargs), KEY)


# keeping rows

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
    assert results('x') == Path('results/x.csv')


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


# reading a table

def table(seed=0, n=6):
    rng = np.random.default_rng(seed)
    level = rng.normal(size=n)
    return pd.DataFrame([dict(method=m, bn=m == 'c', seed=s, test=level[s] + g + .3*rng.normal(), valid=rng.normal())
                         for m, g in (('b', .4), ('a', 0), ('c', -.2)) for s in rng.permutation(n)])


def test_summarize_against_scipy():
    df = table()
    out = summarize(df, 'method')
    assert out.index.tolist() == ['b', 'a', 'c'] and out.n.tolist() == [6]*3
    for m, o in out.iterrows():
        x = df[df.method == m].test
        lo, hi = stats.t.interval(.95, len(x) - 1, loc=np.mean(x), scale=stats.sem(x))
        assert np.allclose([o['mean'], o['sd'], o['mean'] - o.ci95, o['mean'] + o.ci95], [np.mean(x), np.std(x, ddof=1), lo, hi])
    two = summarize(df, ['method', 'bn'], 'valid')
    assert two.index.tolist() == [('b', False), ('a', False), ('c', True)]
    assert np.allclose(two['mean'], [df[df.method == m].valid.mean() for m in 'bac'])
    assert summarize(df[:1], 'method')[['sd', 'ci95']].isna().all(axis=None)
    df.loc[df.method == 'a', 'test'] = [math.nan, *range(5)]  # a row without the metric does not count
    assert summarize(df, 'method').loc['a', ['n', 'mean']].tolist() == [5, 2]


def test_compare_against_scipy():
    df = table()
    out = compare(df, 'method', 'a')
    by_seed = {m: df[df.method == m].sort_values('seed').test.to_numpy() for m in 'abc'}
    for m in 'bc':
        d, t = by_seed[m] - by_seed['a'], stats.ttest_rel(by_seed[m], by_seed['a'])
        lo, hi = t.confidence_interval(.95)
        assert np.allclose(out.loc[m, ['diff', 'p']].astype(float), [d.mean(), t.pvalue])
        assert np.allclose([out['diff'][m] - out.diff_ci95[m], out['diff'][m] + out.diff_ci95[m]], [lo, hi])
    assert out.loc['a', ['diff', 'diff_ci95', 'p']].isna().all() and np.allclose(out[['n', 'mean', 'sd', 'ci95']], summarize(df, 'method'))
    assert np.allclose(compare(df, 'method', 'a', 'valid')['mean'], [df[df.method == m].valid.mean() for m in 'bac'])


def test_compare_pairs_the_seeds_that_both_have():
    df = table(n=8)
    df = df[~((df.method == 'b') & df.seed.isin([0, 1])) & ~((df.method == 'a') & (df.seed == 7))]
    x = {m: df[(df.method == m) & df.seed.between(2, 6)].sort_values('seed').test.to_numpy() for m in 'ab'}
    out = compare(df, 'method', 'a')
    assert out.p['b'] == pytest.approx(stats.ttest_rel(x['b'], x['a']).pvalue) and out.n['b'] == 6 and out.pairs['b'] == len(x['a'])


@pytest.mark.filterwarnings('error')
def test_compare_with_nothing_to_compare():
    df = table(n=3)
    out = compare(df[df.method == 'a'], 'method', 'a')
    assert out.index.tolist() == ['a'] and [*out] == ['n', 'mean', 'sd', 'ci95', 'pairs', 'diff', 'diff_ci95', 'p'] and out['diff'].isna().all()
    assert claim('b is better', out, 'b', 1)['verdict'] == 'not run' and effects(out, pd.DataFrame(dict(n=10, mean=[1., 2.], sd=.1), index=['a', 'b']), 'a').verdict['b'] == 'not comparable'


@pytest.mark.filterwarnings('error')
def test_compare_edges():
    df = table()
    assert compare(df, 'bn', False).loc[True, 'n'] == 6 and np.isfinite(compare(df[df.method != 'b'], 'bn', False).p[True])
    same = pd.concat([df[df.method == 'a'], df[df.method == 'a'].assign(method='twin')])
    assert compare(same, 'method', 'a').loc['twin', 'diff'] == 0 and math.isnan(compare(same, 'method', 'a').p['twin'])
    one = compare(df[df.seed == 0], 'method', 'a')  # one pair has a difference and no interval
    assert one['diff'].notna().tolist() == [True, False, True] and one.diff_ci95.isna().all()
    with pytest.raises(ValueError, match="method='z'.*'b'"): compare(df, 'method', 'z')


def test_gains_are_what_compare_averages():
    df = pd.concat([table(n=6).assign(n_train=n) for n in (50, 200)], ignore_index=True).sample(frac=1, random_state=0)
    df = df[~((df.method == 'a') & (df.seed == 2) & (df.n_train == 200))]
    df['gain'] = gains(df, 'method', 'a', within='n_train')
    assert df.gain.isna().sum() == 2 and df.gain[(df.seed == 2) & (df.n_train == 200)].isna().all()  # b and c, whose baseline is not there
    for n, d in df.groupby('n_train'):
        assert np.allclose(d.groupby('method').gain.mean()[['b', 'c']], compare(d, 'method', 'a')['diff'][['b', 'c']].astype(float))
    for o in df.dropna().sample(5, random_state=1).itertuples():
        assert o.gain == o.test - df.test[(df.method == 'a') & (df.seed == o.seed) & (df.n_train == o.n_train)].item()
    assert np.allclose(gains(df, 'method', 'a', within=['n_train']), df.gain, equal_nan=True)
    with pytest.raises(ValueError, match="method='a' has several rows with {'seed': .}"): gains(df, 'method', 'a')
    with pytest.raises(ValueError, match="method='z'.*'b'"): gains(df, 'method', 'z', within='n_train')


@pytest.mark.parametrize('call', [lambda df: summarize(df, 'model'), lambda df: summarize(df, ['method', 'model']), lambda df: summarize(df, 'method', 'model'),
                                  lambda df: compare(df, 'model', 'a'), lambda df: compare(df.rename(columns={'test': 'model'}), 'method', 'a'),
                                  lambda df: compare(df.drop(columns='seed'), 'method', 'a')])
def test_wrong_columns(call):
    with pytest.raises(ValueError, match=r"the table has no column \['(model|test|seed)'\].*method"): call(table())


# the paper's numbers

def lines():
    with open(CSV, encoding='utf-8', newline='') as f: return list(csv.DictReader(f))


def test_paper_csv_is_complete():
    "As many numbers as the paper's tables have cells: methods times settings times data sets"
    assert Counter(int(o['table']) for o in lines()) == {1: 2*2*3, 2: 3*3*1, 3: 2*3*1, 4: 4*2, 5: 2*2*1, 6: 3*1, 7: 3*3, 8: 9}
    key = [(o['table'], o['data'], o['method'], o['setting'], o['metric']) for o in lines()]
    assert len(set(key)) == len(key) == 60
    methods = {'baseline', 'SpectReg', 'DoubleBack', 'JacReg', 'FrobReg', 'ConfidencePenalty'}
    assert {m for o in lines() for m in o['method'].split(' + ')} == methods
    assert {(o['data'], o['metric']) for o in lines()} == {*((d, 'accuracy_percent') for d in ('mnist', 'cifar10', 'cifar100')), ('sin', 'mse'),
                                                           *(('tiny_imagenet', f'top{k}_percent') for k in (1, 5))}
    assert {o['setting'] for o in lines()} == {'', 'wd=0', 'wd=0.0005', 'wd=0.003', 'batchnorm', 'dropout', *(f'spect_reg={x}' for x in (0, .001, .003, .01, .03, .1, .3, 1, 3))}


def test_paper_csv_is_plausible():
    low = {'mnist': 96, 'cifar10': 48, 'cifar100': 37, 'tiny_imagenet': 44}
    for o in lines():
        assert o['n'] == '10'
        if o['metric'] == 'mse': assert 0 < float(o['value']) < .02 and o['sd'] == ''
        else: assert low[o['data']] < float(o['value']) < 99 and 0 < float(o['sd']) < 3


def test_what_the_paper_prints_twice_agrees():
    value = {(int(o['table']), o['data'], o['method'], o['setting']): (o['value'], o['sd']) for o in lines() if o['table'] != '5'}
    for d in 'cifar10', 'cifar100':
        for m in 'baseline', 'SpectReg', 'DoubleBack': assert value[4, d, m, ''] == value[7, d, m, '']
        for m in 'baseline', 'SpectReg': assert value[1, d, m, 'wd=0.003'] == value[7, d, m, '']
    for m in 'baseline', 'SpectReg', 'DoubleBack': assert value[3, 'mnist', m, ''] == value[7, 'mnist', m, '']
    assert value[6, 'mnist', 'SpectReg', ''] == value[7, 'mnist', 'SpectReg', '']
    best = min((float(v), s) for (t, *_, s), (v, _) in value.items() if t == 8)
    assert best[1] == 'spect_reg=0.03' and float(value[8, 'sin', 'baseline', 'spect_reg=0'][0])/best[0] > 10  # "by a factor of 10"


def test_paper_chooses():
    t = paper(5, metric='top5_percent')
    assert [*t] == ['n', 'mean', 'sd'] and t['mean'].to_dict() == {'baseline': 70.20, 'SpectReg': 75.93} and t.index.name == 'method'
    assert paper(8, by='setting').loc['spect_reg=3', 'mean'] == pytest.approx(1264.4e-5) and paper(8, by='setting').sd.isna().all()
    assert len(paper(2, by=['setting', 'method'])) == 9 and len(paper(2, setting='')) == 3
    assert paper(1, data='cifar10', setting='wd=0.003').equals(paper(7, data='cifar10').drop(index='DoubleBack'))


@pytest.mark.parametrize('kwargs,words', [
    (dict(table=9), 'table=9: choose one of .1, 2, 3, 4, 5, 6, 7, 8'), (dict(table='1'), "table='1'"), (dict(table=7, data='cinic'), "data='cinic'.*cifar100"),
    (dict(table=7), "several numbers for 'baseline'"), (dict(table=5), 'several numbers'), (dict(table=1, by='net'), "no column .'net'"),
    (dict(table=1, network='lenet5'), "no column .'network'.*setting")])
def test_paper_refuses(kwargs, words):
    with pytest.raises(ValueError, match=words): paper(**kwargs)


def test_where_the_paper_is_found(tmp_path, monkeypatch):
    for d in CSV.parent, CSV.parents[1], CSV.parents[2]:
        monkeypatch.chdir(d)
        assert len(paper(6)) == 3
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='no nbs/studies/paper.csv here or above'): paper(6)
    assert len(paper(6, path=CSV)) == 3
    (tmp_path/'other.csv').write_text('a,b,setting\n1,2,\n')
    with pytest.raises(ValueError, match="no column .*'value'.*'a', 'b'"): paper(6, path='other.csv')


# two means of independent runs

def group(n=10, mean=0., sd=1.): return pd.DataFrame(dict(n=n, mean=mean, sd=sd), index=['x'])


@pytest.mark.parametrize('a,b', [((10, 97.79, .12), (10, 97.39, .11)), ((2, 0., 5.), (100, 1., .1)), ((3, -4., .01), (7, 2., 3.))])
def test_welch_against_scipy(a, b):
    d, ci95 = welch(group(*a), group(*b))
    u, v = a[2]**2/a[0], b[2]**2/b[0]
    assert d['x'] == pytest.approx(a[1] - b[1])
    for end in d['x'] - ci95['x'], d['x'] + ci95['x']:
        assert stats.ttest_ind_from_stats(a[1] - end, a[2], a[0], b[1], b[2], b[0], equal_var=False).pvalue == pytest.approx(.05)
    rng = np.random.default_rng(0)  # and from rows with exactly these statistics
    x, y = ((z - z.mean())/z.std(ddof=1)*sd + m for (n, m, sd) in (a, b) for z in [rng.normal(size=n)])
    interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval(.95)
    assert np.allclose([*interval], [d['x'] - ci95['x'], d['x'] + ci95['x']]) and ci95['x'] > stats.norm.ppf(.975)*(u + v)**.5


def test_welch_limits():
    "With equal n and sd twice n - 1 degrees of freedom, with one sd 0 the other's"
    assert welch(group(), group())[1]['x'] == pytest.approx(stats.t.ppf(.975, 18)*.2**.5)
    assert welch(group(7, sd=2.), group(10, sd=0.))[1]['x'] == pytest.approx(stats.t.ppf(.975, 6)*2/7**.5)
    a = group(5, 1., 2.).loc['x']
    assert np.allclose(welch(a, a), [0, welch(group(5, 1., 2.), group(5, 1., 2.))[1]['x']])  # rows do too


# verdicts

def simulated(rng, n, sd, mean=0., groups=20_000):
    x = rng.normal(mean, sd, (groups, n))
    return pd.DataFrame(dict(n=n, mean=x.mean(1), sd=x.std(1, ddof=1)))


def within(share, p, n, se=4): return abs(share - p) < se*(p*(1 - p)/n)**.5


def test_verdicts_err_as_often_as_they_say():
    rng = np.random.default_rng(1)
    ours, theirs = simulated(rng, 10, 1.), simulated(rng, 10, 1.5)
    out = beside(ours, theirs).verdict.value_counts(normalize=True)
    assert within(out['differs'], .05, 20_000) and set(out.index) == {'matches', 'differs'}
    power = (beside(ours, theirs.assign(mean=theirs['mean'] + 2)).verdict == 'differs').mean()
    assert power > .85  # and a gap is seen


def test_claims_err_as_often_as_they_say():
    rng = np.random.default_rng(2)
    ours = simulated(rng, 6, 1.)  # of paired differences around 0, whatever the paper claims
    ours = ours.assign(pairs=6, diff=ours['mean'], diff_ci95=ours.sd/6**.5*stats.t.ppf(.975, 5))
    ours.loc['baseline'] = [6, 0, 1, math.nan, math.nan, math.nan]
    theirs = pd.DataFrame(dict(n=10, mean=1., sd=1.), index=ours.index)
    theirs.loc['baseline', 'mean'] = 0.
    out = effects(ours, theirs).verdict.value_counts(normalize=True)
    assert within(out['confirmed'], .025, 20_000) and within(out['contradicted'], .025, 20_000) and within(out['not shown'], .95, 20_000)


@pytest.mark.parametrize('ours,theirs,verdict', [
    (group(), group(), 'matches'), (group(mean=9.), group(), 'differs'), (group(mean=-9.), group(), 'differs'),
    (group(1, sd=math.nan), group(), 'not comparable'), (group(1, sd=0.), group(), 'not comparable'), (group(0, math.nan, math.nan), group(), 'not comparable'),
    (group(), group(sd=math.nan), 'not comparable'), (group(), group(n=math.nan), 'not comparable'), (group(mean=math.nan), group(), 'not comparable'), (group(), group(mean=math.nan), 'not comparable'),
    (group(sd=0.), group(mean=.1), 'matches'), (group(sd=0.), group(mean=9.), 'differs'),
    (group(sd=0.), group(sd=0.), 'not comparable'), (group(sd=0.), group(mean=1., sd=0.), 'not comparable'),
    (group(), group().rename(index={'x': 'y'}), 'not comparable')])
@pytest.mark.filterwarnings('error')
def test_beside_edges(ours, theirs, verdict): assert beside(ours, theirs).verdict['x'] == verdict


def test_the_edge_of_the_interval_decides():
    ci95 = welch(group(), group())[1]['x']
    assert beside(group(mean=.999*ci95), group()).verdict['x'] == 'matches' and beside(group(mean=1.001*ci95), group()).verdict['x'] == 'differs'


def test_another_test_set_widens_the_gap():
    ours,theirs = group(mean=97.6, sd=.1),group(mean=97.4, sd=.1)
    narrow,wide = beside(ours, theirs),beside(ours, theirs, n_test=10_000)
    assert narrow.verdict['x'] == 'differs' and wide.verdict['x'] == 'matches'
    test_sets = 1.96**2*(97.6*2.4 + 97.4*2.6)/10_000
    assert wide.gap_ci95['x'] == pytest.approx((narrow.gap_ci95['x']**2 + test_sets)**.5, rel=1e-4) and wide.gap['x'] == narrow.gap['x']
    assert beside(group(mean=100., sd=.1), group(mean=100., sd=.1), n_test=10).gap_ci95['x'] == pytest.approx(welch(group(sd=.1), group(sd=.1))[1]['x'])


def test_beside_keeps_order_and_missing_groups():
    ours = summarize(table(), 'method')
    theirs = pd.DataFrame(dict(n=10, mean=[0., 0., 0.], sd=1.), index=['z', 'a', 'b'])
    out = beside(ours, theirs)
    assert out.index.tolist() == ['b', 'a', 'c', 'z'] and out.verdict[['c', 'z']].eq('not comparable').all() and out.gap[['c', 'z']].isna().all()
    assert [*out] == ['n', 'mean', 'sd', 'paper_n', 'paper_mean', 'paper_sd', 'gap', 'gap_ci95', 'verdict']
    assert out.gap['b'] == pytest.approx(ours['mean']['b']) and math.isnan(out.paper_mean['c']) and pd.isna(out.n['z']) and str(out.n.dtype) == str(out.paper_n.dtype) == 'Int64'
    assert [*beside(compare(table(), 'method', 'a'), theirs)] == [*out]


def test_beside_with_several_columns():
    theirs = paper(7, by=['data', 'method'])
    ours = theirs[::-1].drop(index=('mnist', 'baseline'))
    out = beside(ours, theirs)
    assert out.gap.dropna().eq(0).all() and out.verdict.eq('matches').sum() == 8 and out.verdict['mnist', 'baseline'] == 'not comparable'
    assert out.index.tolist() == [*ours.index, ('mnist', 'baseline')]


def compared(diff, ci95=1.):
    return pd.DataFrame(dict(n=6, mean=[0., diff], sd=1., pairs=6, diff=[math.nan, diff], diff_ci95=[math.nan, ci95]), index=['baseline', 'x'])


def claimed(diff, sd=1., n=10): return pd.DataFrame(dict(n=n, mean=[50., 50. + diff], sd=sd), index=['baseline', 'x'])


@pytest.mark.parametrize('ours,theirs,verdict', [
    (compared(2.), claimed(2.), 'confirmed'), (compared(-2.), claimed(-2.), 'confirmed'), (compared(-2.), claimed(2.), 'contradicted'), (compared(2.), claimed(-2.), 'contradicted'),
    (compared(.9), claimed(2.), 'not shown'), (compared(-.9), claimed(2.), 'not shown'), (compared(1.), claimed(9.), 'not shown'), (compared(0., 0.), claimed(1.), 'not shown'),
    (compared(2., math.nan), claimed(1.), 'not comparable'), (compared(math.nan, math.nan), claimed(1.), 'not comparable'), (compared(math.nan), claimed(1.), 'not comparable'), (compared(2.), claimed(math.nan), 'not comparable'),
    (compared(2.), claimed(0.), 'none in the paper'), (compared(2.), claimed(.9), 'none in the paper'),  # what the paper does not show is no claim
    (compared(2.), claimed(1., math.nan), 'confirmed'),                        # the sign is there without a standard deviation
    (compared(2.), claimed(1.).rename(index={'x': 'y'}), 'not comparable'), (compared(2.), claimed(1., 1., 1), 'confirmed'), (compared(2.), claimed(1., 0.), 'confirmed')])
@pytest.mark.filterwarnings('error')
def test_effects_edges(ours, theirs, verdict): assert effects(ours, theirs).verdict['x'] == verdict


def test_effects_of_the_paper():
    theirs = paper(7, data='cifar100')
    ours = compare(table().replace({'method': {'a': 'baseline', 'b': 'SpectReg', 'c': 'FrobReg'}}), 'method', 'baseline')
    out = effects(ours, theirs)
    assert out.index.tolist() == ['SpectReg', 'FrobReg', 'DoubleBack'] and [*out] == ['n', 'diff', 'diff_ci95', 'paper_n', 'paper_diff', 'paper_diff_ci95', 'verdict']
    assert out.paper_diff['DoubleBack'] == pytest.approx(48.72 - 49.56) and out['diff']['SpectReg'] == ours['diff']['SpectReg']
    end = stats.ttest_ind_from_stats(out.paper_diff_ci95['SpectReg'], .65, 10, 0, 2.96, 10, equal_var=False)
    assert end.pvalue == pytest.approx(.05) and effects(ours, theirs, 'DoubleBack').paper_diff['baseline'] == pytest.approx(49.56 - 48.72)


@pytest.mark.parametrize('call,words', [
    (lambda a, b: beside(a.drop(columns='sd'), b), r"ours has no column \['sd'\]"), (lambda a, b: beside(a, b[['mean']]), r"theirs has no column \['n', 'sd'\]"),
    (lambda a, b: beside(pd.concat([a, a]), b), "ours has several rows for 'baseline'"), (lambda a, b: beside(a, pd.concat([b, b])), "theirs has several rows for 'baseline'"),
    (lambda a, b: effects(b, b), r"ours has no column \['pairs', 'diff', 'diff_ci95'\]"), (lambda a, b: effects(a, b, 'plain'), "theirs has no group 'plain'.*'baseline', 'x'"),
    (lambda a, b: effects(a, paper(6, path=CSV)), "theirs has no group 'baseline'.*FrobReg")])
def test_wrong_tables(call, words):
    with pytest.raises(ValueError, match=words): call(compared(1.), claimed(1.))


@pytest.mark.filterwarnings('ignore:Precision loss')
def test_two_runs_give_no_verdict():  # two differences that are equal, as happens with accuracies on a grid, have an interval of width 0
    df = pd.DataFrame(dict(seed=[0, 1, 2]*2, by=['a']*3 + ['b']*3, test=[97.1, 97.2, 97.4, 97.3, 97.4, 97.6]))
    for k, said, sign in (2, 'too few runs', 'not comparable'), (3, 'confirmed', 'confirmed'):
        out = compare(df[df.seed < k], 'by', 'a')
        assert claim('', out, 'b', 1)['verdict'] == said and claim('', out, 'b', 0, .1)['verdict'] == said.replace('confirmed', 'contradicted')
        theirs = pd.DataFrame(dict(n=10, mean=[97., 97.5], sd=.1), index=['a', 'b'])
        assert effects(out, theirs, 'a').verdict['b'] == sign and (beside(out, theirs).verdict['b'] == 'not comparable') == (k == 2)


@pytest.mark.parametrize('diff,ci95,verdict', [
    (.02, .05, 'confirmed'), (-.02, .05, 'confirmed'), (0., .1, 'confirmed'),                      # wholly within the margin of 0.1
    (.02, .3, 'not shown'), (-.07, .07, 'not shown'), (.15, .1, 'not shown'), (-.15, .1, 'not shown'),  # reaching out of it, or into it
    (.3, .1, 'contradicted'), (-.3, .1, 'contradicted')])
def test_no_difference_needs_a_margin(diff, ci95, verdict):
    out = compared(diff, ci95)
    assert claim('', out, 'x', 0, .1)['verdict'] == verdict
    for sign, margin in (0, 0), (0, -.1), (0, math.nan), (1, .1):
        with pytest.raises(ValueError, match=f'margin={margin}'): claim('', out, 'x', sign, margin)


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
