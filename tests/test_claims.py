"What a reader of chapter 09_claims need not see: SciPy's and other people's numbers, verdicts at their edges"
import csv, math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gradreg.claims import beside, claim, effects, paper, welch
from gradreg.tables import compare, summarize
from samples import table

CSV = Path(__file__).resolve().parents[1]/'nbs/studies/paper.csv'


# the paper's numbers

def lines():
    with open(CSV, encoding='utf-8', newline='') as f: return list(csv.DictReader(f))


def test_paper_csv_is_complete():
    "As many numbers as the paper's tables have cells: methods times settings times data sets"
    counted = Counter(int(o['table']) for o in lines())
    assert counted == {1: 2*2*3, 2: 3*3*1, 3: 2*3*1, 4: 4*2, 5: 2*2*1, 6: 3*1, 7: 3*3, 8: 9}
    key = [(o['table'], o['data'], o['method'], o['setting'], o['metric']) for o in lines()]
    assert len(set(key)) == len(key) == 60
    methods = {'baseline', 'SpectReg', 'DoubleBack', 'JacReg', 'FrobReg', 'ConfidencePenalty'}
    assert {m for o in lines() for m in o['method'].split(' + ')} == methods
    assert {(o['data'], o['metric']) for o in lines()} == {
        *((d, 'accuracy_percent') for d in ('mnist', 'cifar10', 'cifar100')), ('sin', 'mse'),
        *(('tiny_imagenet', f'top{k}_percent') for k in (1, 5))}
    strengths = {f'spect_reg={x}' for x in (0, .001, .003, .01, .03, .1, .3, 1, 3)}
    assert {o['setting'] for o in lines()} == {'', 'wd=0', 'wd=0.0005', 'wd=0.003', 'batchnorm', 'dropout', *strengths}


def test_paper_csv_is_plausible():
    low = {'mnist': 96, 'cifar10': 48, 'cifar100': 37, 'tiny_imagenet': 44}
    for o in lines():
        assert o['n'] == '10'
        if o['metric'] == 'mse': assert 0 < float(o['value']) < .02 and o['sd'] == ''
        else: assert low[o['data']] < float(o['value']) < 99 and 0 < float(o['sd']) < 3


def test_what_the_paper_prints_twice_agrees():
    value = {(int(o['table']), o['data'], o['method'], o['setting']): (o['value'], o['sd'])
             for o in lines() if o['table'] != '5'}
    for d in 'cifar10', 'cifar100':
        for m in 'baseline', 'SpectReg', 'DoubleBack': assert value[4, d, m, ''] == value[7, d, m, '']
        for m in 'baseline', 'SpectReg': assert value[1, d, m, 'wd=0.003'] == value[7, d, m, '']
    for m in 'baseline', 'SpectReg', 'DoubleBack': assert value[3, 'mnist', m, ''] == value[7, 'mnist', m, '']
    assert value[6, 'mnist', 'SpectReg', ''] == value[7, 'mnist', 'SpectReg', '']
    best = min((float(v), s) for (t, *_, s), (v, _) in value.items() if t == 8)
    assert best[1] == 'spect_reg=0.03'
    assert float(value[8, 'sin', 'baseline', 'spect_reg=0'][0])/best[0] > 10  # "by a factor of 10"


def test_paper_chooses():
    t = paper(5, metric='top5_percent')
    assert [*t] == ['n', 'mean', 'sd'] and t.index.name == 'method'
    assert t['mean'].to_dict() == {'baseline': 70.20, 'SpectReg': 75.93}
    sin = paper(8, by='setting')
    assert sin.loc['spect_reg=3', 'mean'] == pytest.approx(1264.4e-5) and sin.sd.isna().all()
    assert len(paper(2, by=['setting', 'method'])) == 9 and len(paper(2, setting='')) == 3
    assert paper(1, data='cifar10', setting='wd=0.003').equals(paper(7, data='cifar10').drop(index='DoubleBack'))


@pytest.mark.parametrize('kwargs,words', [
    (dict(table=9), 'table=9: choose one of .1, 2, 3, 4, 5, 6, 7, 8'), (dict(table='1'), "table='1'"),
    (dict(table=7, data='cinic'), "data='cinic'.*cifar100"), (dict(table=7), "several rows for 'baseline'"),
    (dict(table=5), 'several rows'), (dict(table=1, by='net'), "no column .'net'"),
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


@pytest.mark.parametrize('a,b', [
    ((10, 97.79, .12), (10, 97.39, .11)), ((2, 0., 5.), (100, 1., .1)), ((3, -4., .01), (7, 2., 3.))])
def test_welch_against_scipy(a, b):
    d, ci95 = welch(group(*a), group(*b))
    u, v = a[2]**2/a[0], b[2]**2/b[0]
    assert d['x'] == pytest.approx(a[1] - b[1])
    for end in d['x'] - ci95['x'], d['x'] + ci95['x']:
        numbers = a[1] - end, a[2], a[0], b[1], b[2], b[0]
        assert stats.ttest_ind_from_stats(*numbers, equal_var=False).pvalue == pytest.approx(.05)
    rng = np.random.default_rng(0)  # and from rows with exactly these statistics
    x, y = ((z - z.mean())/z.std(ddof=1)*sd + m for (n, m, sd) in (a, b) for z in [rng.normal(size=n)])
    interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval(.95)
    assert np.allclose([*interval], [d['x'] - ci95['x'], d['x'] + ci95['x']])
    assert ci95['x'] > stats.norm.ppf(.975)*(u + v)**.5


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
    for word, p in ('confirmed', .025), ('contradicted', .025), ('not shown', .95): assert within(out[word], p, 20_000)


@pytest.mark.parametrize('ours,theirs,verdict', [
    (group(), group(), 'matches'), (group(mean=9.), group(), 'differs'), (group(mean=-9.), group(), 'differs'),
    (group(1, sd=math.nan), group(), 'not comparable'), (group(1, sd=0.), group(), 'not comparable'),
    (group(0, math.nan, math.nan), group(), 'not comparable'), (group(), group(sd=math.nan), 'not comparable'),
    (group(), group(n=math.nan), 'not comparable'), (group(mean=math.nan), group(), 'not comparable'),
    (group(), group(mean=math.nan), 'not comparable'),
    (group(sd=0.), group(mean=.1), 'matches'), (group(sd=0.), group(mean=9.), 'differs'),
    (group(sd=0.), group(sd=0.), 'not comparable'), (group(sd=0.), group(mean=1., sd=0.), 'not comparable'),
    (group(), group().rename(index={'x': 'y'}), 'not comparable')])
@pytest.mark.filterwarnings('error')
def test_beside_edges(ours, theirs, verdict): assert beside(ours, theirs).verdict['x'] == verdict


def test_the_edge_of_the_interval_decides():
    ci95 = welch(group(), group())[1]['x']
    assert beside(group(mean=.999*ci95), group()).verdict['x'] == 'matches'
    assert beside(group(mean=1.001*ci95), group()).verdict['x'] == 'differs'


def test_another_test_set_widens_the_gap():
    ours,theirs = group(mean=97.6, sd=.1),group(mean=97.4, sd=.1)
    narrow,wide = beside(ours, theirs),beside(ours, theirs, n_test=10_000)
    assert narrow.verdict['x'] == 'differs' and wide.verdict['x'] == 'matches'
    test_sets = 1.96**2*(97.6*2.4 + 97.4*2.6)/10_000
    assert wide.gap_ci95['x'] == pytest.approx((narrow.gap_ci95['x']**2 + test_sets)**.5, rel=1e-4)
    assert wide.gap['x'] == narrow.gap['x']
    sure = group(mean=100., sd=.1)
    assert beside(sure, sure, n_test=10).gap_ci95['x'] == pytest.approx(welch(sure, sure)[1]['x'])


def test_beside_keeps_order_and_missing_groups():
    ours = summarize(table(), 'method')
    theirs = pd.DataFrame(dict(n=10, mean=[0., 0., 0.], sd=1.), index=['z', 'a', 'b'])
    out = beside(ours, theirs)
    assert out.index.tolist() == ['b', 'a', 'c', 'z'] and out.gap[['c', 'z']].isna().all()
    assert out.verdict[['c', 'z']].eq('not comparable').all()
    assert [*out] == ['n', 'mean', 'sd', 'paper_n', 'paper_mean', 'paper_sd', 'gap', 'gap_ci95', 'verdict']
    assert out.gap['b'] == pytest.approx(ours['mean']['b']) and math.isnan(out.paper_mean['c'])
    assert pd.isna(out.n['z']) and str(out.n.dtype) == str(out.paper_n.dtype) == 'Int64'
    assert [*beside(compare(table(), 'method', 'a'), theirs)] == [*out]


def test_beside_with_several_columns():
    theirs = paper(7, by=['data', 'method'])
    ours = theirs[::-1].drop(index=('mnist', 'baseline'))
    out = beside(ours, theirs)
    assert out.gap.dropna().eq(0).all() and out.verdict.eq('matches').sum() == 8
    assert out.verdict['mnist', 'baseline'] == 'not comparable'
    assert out.index.tolist() == [*ours.index, ('mnist', 'baseline')]


def compared(diff, ci95=1.):
    columns = dict(n=6, mean=[0., diff], sd=1., pairs=6, diff=[math.nan, diff], diff_ci95=[math.nan, ci95])
    return pd.DataFrame(columns, index=['baseline', 'x'])


def claimed(diff, sd=1., n=10): return pd.DataFrame(dict(n=n, mean=[50., 50. + diff], sd=sd), index=['baseline', 'x'])


@pytest.mark.parametrize('ours,theirs,verdict', [
    (compared(2.), claimed(2.), 'confirmed'), (compared(-2.), claimed(-2.), 'confirmed'),
    (compared(-2.), claimed(2.), 'contradicted'), (compared(2.), claimed(-2.), 'contradicted'),
    (compared(.9), claimed(2.), 'not shown'), (compared(-.9), claimed(2.), 'not shown'),
    (compared(1.), claimed(9.), 'not shown'), (compared(0., 0.), claimed(1.), 'not shown'),
    (compared(2., math.nan), claimed(1.), 'not comparable'), (compared(math.nan), claimed(1.), 'not comparable'),
    (compared(math.nan, math.nan), claimed(1.), 'not comparable'), (compared(2.), claimed(math.nan), 'not comparable'),
    (compared(2.), claimed(0., math.nan), 'not comparable'),
    (compared(2.), claimed(0.), 'none in the paper'),  # what the paper does not show is no claim
    (compared(2.), claimed(.9), 'none in the paper'),
    (compared(2.), claimed(1., math.nan), 'confirmed'),  # the sign is there without a standard deviation
    (compared(2.), claimed(1.).rename(index={'x': 'y'}), 'not comparable'),
    (compared(2.), claimed(1., 1., 1), 'confirmed'), (compared(2.), claimed(1., 0.), 'confirmed')])
@pytest.mark.filterwarnings('error')
def test_effects_edges(ours, theirs, verdict): assert effects(ours, theirs).verdict['x'] == verdict


def test_effects_of_the_paper():
    theirs = paper(7, data='cifar100')
    names = {'a': 'baseline', 'b': 'SpectReg', 'c': 'FrobReg'}
    ours = compare(table().replace({'method': names}), 'method', 'baseline')
    out = effects(ours, theirs)
    assert out.index.tolist() == ['SpectReg', 'FrobReg', 'DoubleBack']
    assert [*out] == ['n', 'diff', 'diff_ci95', 'paper_n', 'paper_diff', 'paper_diff_ci95', 'verdict']
    assert out.paper_diff['DoubleBack'] == pytest.approx(48.72 - 49.56)
    assert out['diff']['SpectReg'] == ours['diff']['SpectReg']
    end = stats.ttest_ind_from_stats(out.paper_diff_ci95['SpectReg'], .65, 10, 0, 2.96, 10, equal_var=False)
    assert end.pvalue == pytest.approx(.05)
    assert effects(ours, theirs, 'DoubleBack').paper_diff['baseline'] == pytest.approx(49.56 - 48.72)


@pytest.mark.filterwarnings('error')
def test_nothing_to_claim():
    df = table(n=3)
    out = compare(df[df.method == 'a'], 'method', 'a')
    theirs = pd.DataFrame(dict(n=10, mean=[1., 2.], sd=.1), index=['a', 'b'])
    assert claim('b is better', out, 'b', 1)['verdict'] == 'not run'
    assert effects(out, theirs, 'a').verdict['b'] == 'not comparable'


@pytest.mark.parametrize('call,words', [
    (lambda a, b: beside(a.drop(columns='sd'), b), r"ours has no column \['sd'\]"),
    (lambda a, b: beside(a, b[['mean']]), r"theirs has no column \['n', 'sd'\]"),
    (lambda a, b: beside(pd.concat([a, a]), b), "ours has several rows for 'baseline'"),
    (lambda a, b: beside(a, pd.concat([b, b])), "theirs has several rows for 'baseline'"),
    (lambda a, b: effects(b, b), r"ours has no column \['pairs', 'diff', 'diff_ci95'\]"),
    (lambda a, b: effects(a, b, 'plain'), "theirs has no group 'plain'.*'baseline', 'x'"),
    (lambda a, b: effects(a, paper(6, path=CSV)), "theirs has no group 'baseline'.*FrobReg")])
def test_wrong_tables(call, words):
    with pytest.raises(ValueError, match=words): call(compared(1.), claimed(1.))


@pytest.mark.filterwarnings('ignore:Precision loss')
def test_two_runs_give_no_verdict():
    "Two differences that are equal, as happens with accuracies on a grid, have an interval of width 0"
    df = pd.DataFrame(dict(seed=[0, 1, 2]*2, by=['a']*3 + ['b']*3, test=[97.1, 97.2, 97.4, 97.3, 97.4, 97.6]))
    for k, said, sign in (2, 'too few runs', 'not comparable'), (3, 'confirmed', 'confirmed'):
        out = compare(df[df.seed < k], 'by', 'a')
        assert claim('', out, 'b', 1)['verdict'] == said
        assert claim('', out, 'b', 0, .1)['verdict'] == said.replace('confirmed', 'contradicted')
        theirs = pd.DataFrame(dict(n=10, mean=[97., 97.5], sd=.1), index=['a', 'b'])
        assert effects(out, theirs, 'a').verdict['b'] == sign
        assert (beside(out, theirs).verdict['b'] == 'not comparable') == (k == 2)


@pytest.mark.parametrize('diff,ci95,verdict', [
    (.02, .05, 'confirmed'), (-.02, .05, 'confirmed'), (0., .1, 'confirmed'),  # wholly within the margin of 0.1
    (.02, .3, 'not shown'), (-.07, .07, 'not shown'),                          # reaching out of it
    (.15, .1, 'not shown'), (-.15, .1, 'not shown'),                           # reaching into it
    (.3, .1, 'contradicted'), (-.3, .1, 'contradicted')])
def test_no_difference_needs_a_margin(diff, ci95, verdict):
    out = compared(diff, ci95)
    assert claim('', out, 'x', 0, .1)['verdict'] == verdict
    for sign, margin in (0, 0), (0, -.1), (0, math.nan), (1, .1):
        with pytest.raises(ValueError, match=f'margin={margin}'): claim('', out, 'x', sign, margin)
