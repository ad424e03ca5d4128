"What a reader of chapter 08_tables need not see: SciPy's numbers, groups and seeds at their edges"
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gradreg.tables import compare, gains, summarize, t_interval
from samples import table


def test_summarize_against_scipy():
    df = table()
    out = summarize(df, 'method')
    assert out.index.tolist() == ['b', 'a', 'c'] and out.n.tolist() == [6]*3
    for m, o in out.iterrows():
        x = df[df.method == m].test
        lo, hi = stats.t.interval(.95, len(x) - 1, loc=np.mean(x), scale=stats.sem(x))
        ends = [o['mean'] - o.ci95, o['mean'] + o.ci95]
        assert np.allclose([o['mean'], o['sd'], *ends], [np.mean(x), np.std(x, ddof=1), lo, hi])
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
    assert out.loc['a', ['diff', 'diff_ci95', 'p']].isna().all()
    assert np.allclose(out[['n', 'mean', 'sd', 'ci95']], summarize(df, 'method'))
    assert np.allclose(compare(df, 'method', 'a', 'valid')['mean'], [df[df.method == m].valid.mean() for m in 'bac'])


def test_compare_pairs_the_seeds_that_both_have():
    df = table(n=8)
    df = df[~((df.method == 'b') & df.seed.isin([0, 1])) & ~((df.method == 'a') & (df.seed == 7))]
    x = {m: df[(df.method == m) & df.seed.between(2, 6)].sort_values('seed').test.to_numpy() for m in 'ab'}
    out = compare(df, 'method', 'a')
    assert out.p['b'] == pytest.approx(stats.ttest_rel(x['b'], x['a']).pvalue)
    assert out.n['b'] == 6 and out.pairs['b'] == len(x['a'])


@pytest.mark.filterwarnings('error')
def test_compare_with_nothing_to_compare():
    df = table(n=3)
    out = compare(df[df.method == 'a'], 'method', 'a')
    assert [*out] == ['n', 'mean', 'sd', 'ci95', 'pairs', 'diff', 'diff_ci95', 'p']
    assert out.index.tolist() == ['a'] and out['diff'].isna().all()


@pytest.mark.filterwarnings('error')
def test_compare_edges():
    df = table()
    assert compare(df, 'bn', False).loc[True, 'n'] == 6
    assert np.isfinite(compare(df[df.method != 'b'], 'bn', False).p[True])
    same = pd.concat([df[df.method == 'a'], df[df.method == 'a'].assign(method='twin')])
    assert compare(same, 'method', 'a').loc['twin', 'diff'] == 0 and math.isnan(compare(same, 'method', 'a').p['twin'])
    one = compare(df[df.seed == 0], 'method', 'a')  # one pair has a difference and no interval
    assert one['diff'].notna().tolist() == [True, False, True] and one.diff_ci95.isna().all()
    with pytest.raises(ValueError, match="method='z'.*'b'"): compare(df, 'method', 'z')


def test_gains_are_what_compare_averages():
    df = pd.concat([table(n=6).assign(n_train=n) for n in (50, 200)], ignore_index=True).sample(frac=1, random_state=0)
    df = df[~((df.method == 'a') & (df.seed == 2) & (df.n_train == 200))]
    df['gain'] = gains(df, 'method', 'a', within='n_train')
    alone = (df.seed == 2) & (df.n_train == 200)  # b and c, whose baseline is not there
    assert df.gain.isna().sum() == 2 and df.gain[alone].isna().all()
    for n, d in df.groupby('n_train'):
        mean = compare(d, 'method', 'a')['diff'][['b', 'c']].astype(float)
        assert np.allclose(d.groupby('method').gain.mean()[['b', 'c']], mean)
    for o in df.dropna().sample(5, random_state=1).itertuples():
        assert o.gain == o.test - df.test[(df.method == 'a') & (df.seed == o.seed) & (df.n_train == o.n_train)].item()
    assert np.allclose(gains(df, 'method', 'a', within=['n_train']), df.gain, equal_nan=True)
    with pytest.raises(ValueError, match="method='a' has several rows with {'seed': .}"): gains(df, 'method', 'a')
    with pytest.raises(ValueError, match="method='z'.*'b'"): gains(df, 'method', 'z', within='n_train')


@pytest.mark.parametrize('call', [
    lambda df: summarize(df, 'model'), lambda df: summarize(df, ['method', 'model']),
    lambda df: summarize(df, 'method', 'model'), lambda df: compare(df, 'model', 'a'),
    lambda df: compare(df.rename(columns={'test': 'model'}), 'method', 'a'),
    lambda df: compare(df.drop(columns='seed'), 'method', 'a')])
def test_wrong_columns(call):
    with pytest.raises(ValueError, match=r"the table has no column \['(model|test|seed)'\].*method"): call(table())


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('n', [1, 2, 3, 10, 200])
def test_the_interval_against_scipy(n):
    x = np.random.default_rng(n).normal(3, 2, n)
    expected = stats.t.interval(.95, n - 1, loc=x.mean(), scale=stats.sem(x)) if n > 1 else (x[0], x[0])
    assert t_interval(x) == t_interval(pd.Series(x)) == pytest.approx(expected)
