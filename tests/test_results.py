"Stored rows are runs of today's protocol: whole, agreeing with one another, and their beginnings can be repeated."

import math
from dataclasses import asdict, fields, replace
from pathlib import Path
import pandas as pd
import pytest
from fastai.callback.core import Callback, CancelFitException
from gradreg.arrays import find_arrays
from gradreg.runs import DATA, PROTOCOL, Run, halvings
from gradreg.training import Trace, arithmetic, learner, one_thread, run
from gradreg.rows import load_rows
from samples import METRICS

root = Path(__file__).resolve().parents[1]
files = {
    p.stem: df
    for p in sorted((root / 'nbs/studies/results').glob('*.csv'))
    if 'iters' in (df := load_rows(p)).columns
}
each_file = pytest.mark.parametrize('df', files.values(), ids=files)
KEY = [f.name for f in fields(Run)]
default = asdict(Run())

def run_of(row):
    "The Run that a row is of; blanks are columns younger than the row."
    return Run(**{k: default[k] if k not in row or pd.isna(row[k]) else row[k] for k in KEY})

def needs(name):
    if name not in (*DATA, 'digits') and not find_arrays(name):
        pytest.skip(f'{name} is not on this machine: set GRADREG_DATA')

def test_there_are_rows(): assert {'digits', 'sin', 'mnist', 'beyond'} <= set(files)

@each_file
def test_rows_are_whole(df):
    runs = [run_of(row) for row in df.to_dict('records')]
    assert len(set(runs)) == len(runs), 'two rows of one run'
    assert {r.protocol for r in runs} == {PROTOCOL}, 'rows of an older protocol'
    assert set(df.status) <= {'ok', 'diverged'}
    ok = df[df.status == 'ok']
    assert (
        ok[METRICS].map(math.isfinite).all(axis=None)
        and (ok[['seconds', 'peak_mb']] > 0).all(axis=None)
        and ok.commit.str.len().ge(7).all()
    )
    images = ok[~ok.data.isin(DATA)]
    assert images[['test', 'valid', 'train']].map(lambda o: 0 <= o <= 1).all(axis=None)

def twins():
    "Rows of one Run, watched and unwatched."
    rows = {run_of(row): row for df in files.values() for row in df.to_dict('records')}
    return [(rows[replace(r, trace=0)], row) for r, row in rows.items() if r.trace and replace(r, trace=0) in rows]

def test_a_watched_run_is_the_same_run():
    assert len(twins()) >= 3
    for plain, watched in twins():
        exact = all(plain[k] == watched[k] for k in ('device', 'torch', 'python'))
        for k in METRICS:
            assert plain[k] == (watched[k] if exact else pytest.approx(watched[k], rel=0.05)), (run_of(watched), k)

class StopAfter(Callback):
    order = Trace.order + 1
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.train_iter == self.n: raise CancelFitException

def beginning(r, n):
    "What a watched run has found after n steps."
    learn = learner(r)
    with one_thread(), arithmetic(r, learn): learn.fit(1 + n//len(learn.dls.train), r.lr, cbs=StopAfter(n))
    return learn.trace.found

watched = {
    f'{name}-{i}': row
    for name, df in files.items()
    for i, row in enumerate(df.to_dict('records'))
    if row.get('trace', 0) > 0 and row['seed'] == 0
}

@pytest.mark.parametrize('row', watched.values(), ids=watched)
def test_a_run_begins_as_its_row_says(row):
    r = run_of(row)
    needs(r.data)
    n = max(s for s in halvings(r.iters, r.trace) if s <= 320)
    found = beginning(r, n)
    assert any(k.endswith(f'@{n}') for k in found)
    for k, v in found.items():
        assert v == pytest.approx(row[k], rel=0.02, abs=0.005 if k.startswith('valid') else 1e-6), k

def test_another_strength_begins_otherwise():
    row = next(o for o in watched.values() if o['data'] == 'sin')
    r = run_of(row)
    n = max(s for s in halvings(r.iters, r.trace) if s <= 320)
    found = beginning(replace(r, spect_reg=10*r.spect_reg), n)
    assert found[f'jac_train@{n}'] != pytest.approx(row[f'jac_train@{n}'], rel=.02)

@pytest.mark.parametrize('method', ['spect_reg', 'double_back', 'confidence_penalty'])
def test_a_row_of_the_first_study_again(method):
    df = files['digits']
    row = df[(df[method] > 0) & (df.status == 'ok')].iloc[0].to_dict()
    again = run(run_of(row))
    for k in METRICS: assert again[k] == pytest.approx(row[k], rel=.1, abs=.02), k
