"What a reader of chapter 20_study need not see: interrupted, killed and concurrent sweeps, a real Ray"
import importlib.util, math, multiprocessing, os, shutil, signal, socket, subprocess, sys, tempfile, threading, time
import uuid, warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from joblib.externals.loky.backend.context import set_start_method

from gradreg import study
from gradreg.runs import BACKENDS
from gradreg.study import Run, append_row, grid, load_rows, run, run_all, tune
from samples import DIGITS, SIN, metrics



@pytest.fixture(autouse=True)
def no_smoke(monkeypatch): monkeypatch.delenv('GRADREG_SMOKE', raising=False)


def made(r, **kwargs): return {**asdict(r), 'status': 'ok', 'test': .5, 'valid': .5, 'train': .5, **kwargs}


def append(path, row): append_row(path, row, asdict(Run()))


def refuse(*args, **kwargs): raise AssertionError('nothing should be trained here')


def pretend(r, device=None): return made(r)


def spy():
    "`run`, and the Runs that it trains"
    seen = []
    return seen, lambda r, device=None: seen.append(r) or run(r, device)


# rows: what tables keeps, with the fields of Run as their key

def test_rows_are_runs(path):
    for i in range(3): append(path, made(replace(SIN, seed=i, lr=.1**i, bn=i == 2), commit='12e4'))
    df = load_rows(path)
    assert df.bn.dtype == bool and df.seed.dtype.kind == 'i' and set(df.commit) == {'12e4'}
    found = [Run(**{f.name: getattr(o, f.name) for f in fields(Run) if getattr(o, f.name) == getattr(o, f.name)})
             for o in df.itertuples()]  # a column of empty names is read as one of blanks
    assert found == [replace(SIN, seed=i, lr=.1**i, bn=i == 2) for i in range(3)]


def test_old_rows_mean_the_defaults(path):
    young = 'bn', 'every', 'penalty', 'strength', 'at', 'precision'
    append(path, {k: v for k, v in made(SIN).items() if k not in young})  # from a version without these fields
    append(path, made(replace(SIN, seed=1, bn=True)))
    row = run_all([SIN, replace(SIN, seed=1, bn=True)], path, run=refuse)
    assert row.seed.tolist() == [0, 1] and row.bn.tolist() == [False, True] and row.every.tolist() == [1, 1]
    assert study.readable(row).net.tolist() == ['plain', 'BatchNorm']
    assert study.choose(SIN, row.assign(valid=[.1, .2]), ['bn']).bn is False  # a field that a row lacks can be chosen
    append(path, made(SIN, test=.9))
    assert load_rows(path).test.tolist() == [.5, .5]


def test_no_two_runs_share_a_row(path):
    "Not even where a field is zero and its default is not"
    rs = [Run(), Run(lr=0), Run(protocol=0), Run(seed=1), Run(data='sin'), Run(bn=True), Run(lr=1e-3 + 1e-18),
          Run(wd=1e-300), Run(at='3'), Run(precision='bf16'), Run(penalty='a:B'), Run(penalty='a:B', strength=1)]
    for i, r in enumerate(rs): append(path, made(r, test=float(i)))
    assert run_all(rs[::-1], path, run=refuse).test.tolist() == [*range(len(rs))][::-1]


# processes: forked ones start at once; one test below starts everything from nothing

_fork = multiprocessing.get_context('fork')

def forked(f, *args):
    "A process of its own group that runs `f`; joblib's workers are forked too"
    def body():
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.simplefilter('ignore')
        set_start_method('fork', force=True)
        try: f(*args)
        except KeyboardInterrupt: os._exit(130)
        except BaseException as e: print(repr(e), file=sys.stderr, flush=True); os._exit(1)
        os._exit(0)
    p = _fork.Process(target=body)
    p.start()
    return p


def wait_for(what, seconds=900):
    end = time.monotonic() + seconds
    while not (got := what()):
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.02)
    return got


def ends(p, code=0):
    try: wait_for(lambda: p.exitcode is not None)  # join would wait for the workers too, which hold its pipe
    finally:
        with suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
    assert p.exitcode == code


def workers(p):
    return [o for o in psutil.Process(p.pid).children() if not any('resource_tracker' in w for w in o.cmdline())]


def gone(processes): return all(not o.is_running() or o.status() == 'zombie' for o in processes)


def slow(r, device=None):
    time.sleep(.3)  # so that there is a middle
    return run(r, device)


def held(go, runs, path, jobs=2):
    "A sweep whose first two runs are trained at once; the others wait until the file `go` is there."
    def work(r, device=None):
        if r.seed > 1: wait_for(go.exists)
        return run(r, device)
    run_all(runs, path, jobs=jobs, run=work)


def complete(path, runs):
    "All rows are there, none twice, and each is what training gives"
    df = load_rows(path)
    assert len(df) == len(runs) == len(load_rows(path, asdict(Run()), map(asdict, runs)))
    assert df.status.eq('ok').all() and df.test.notna().all()
    return df


@pytest.mark.parametrize('jobs', [1, 2])
def test_two_sweeps_share_the_work(path, jobs):
    "No run is trained twice, whatever the order, and both wait for all rows"
    runs, file = grid(SIN, seed=range(12)), path.parent/'trained'
    def sweeps(): return {o.split()[0] for o in file.read_text().splitlines()}
    def noted(r, device=None):
        with open(file, 'a') as f: f.write(f'{os.getppid() if jobs > 1 else os.getpid()} {r.seed}\n')
        wait_for(lambda: len(sweeps()) == 2)  # neither goes on before the other has begun
        return run(r, device)
    def sweep(rs): assert run_all(rs, path, jobs=jobs, run=noted).seed.tolist() == [r.seed for r in rs]
    for p in [forked(sweep, runs), forked(sweep, runs[::-1])]: ends(p)
    complete(path, runs)
    assert sorted(int(o.split()[1]) for o in file.read_text().splitlines()) == list(range(12))


def test_what_a_killed_sweep_was_at_is_trained_by_the_other(path):
    r, started, waits = replace(SIN, seed=1), path.parent/'started', path.parent/'waits'
    def hangs(r, device=None):
        started.touch()
        time.sleep(600)
    first = forked(lambda: run_all([r], path, jobs=1, run=hangs))
    wait_for(started.exists)
    def other():
        warnings.warn = lambda *args, **kwargs: waits.touch()
        run_all([r], path, jobs=1, run=pretend)
    second = forked(other)
    wait_for(waits.exists)
    assert second.exitcode is None and not len(load_rows(path))
    os.killpg(first.pid, signal.SIGKILL)
    ends(second)
    assert load_rows(path).seed.tolist() == [1]


def test_waiting_is_said(path, monkeypatch):
    started, said = path.parent/'started', path.parent/'said'
    def long(r, device=None):
        started.touch()
        wait_for(said.exists)
        return made(r)
    other = forked(lambda: run_all([SIN], path, jobs=1, run=long))
    wait_for(started.exists)
    monkeypatch.setattr(warnings, 'warn', lambda text, *args: said.write_text(text))
    assert run_all([SIN], path, jobs=1, run=refuse).status.tolist() == ['ok']
    assert said.read_text().startswith('another process trains 1 of these runs')
    ends(other)


@pytest.mark.parametrize('who', ['terminal', 'notebook'])
def test_ctrl_c(path, who):
    runs = grid(SIN, seed=range(8))
    p = forked(held, path.parent/'never', runs, path)
    wait_for(lambda: len(load_rows(path)))
    kids = workers(p)
    kill = os.killpg if who == 'terminal' else os.kill  # Ctrl-C reaches the group, Jupyter's stop button the process
    kill(p.pid, signal.SIGINT)
    ends(p, 130)
    before = load_rows(path)
    assert 1 <= len(before) <= 2 and before.status.eq('ok').all()
    assert len(kids) == 2 and wait_for(lambda: gone(kids))
    trained, work = spy()
    run_all(runs, path, jobs=1, run=work)
    after = complete(path, runs)
    assert len(trained) == 8 - len(before)
    pd.testing.assert_frame_equal(after[:len(before)], before)


def test_ctrl_c_alone(path):
    def interrupted(r, device=None):
        if r.seed == 2: raise KeyboardInterrupt
        return made(r)
    with pytest.raises(KeyboardInterrupt): run_all(grid(SIN, seed=range(4)), path, jobs=1, run=interrupted)
    assert load_rows(path).seed.tolist() == [0, 1]


def test_killed_worker(path):
    runs, go = grid(SIN, seed=range(8)), path.parent/'go'
    p = forked(held, go, runs, path)
    wait_for(lambda: len(load_rows(path)))
    before = load_rows(path)
    workers(p)[0].kill()
    go.touch()
    ends(p)
    after = complete(path, runs)
    pd.testing.assert_frame_equal(after[:len(before)], before)


@pytest.mark.parametrize('when', ['at work', 'idle'])
def test_workers_do_not_outlive_the_sweep(path, when):
    "kill -9 of the one process: its workers go too, also those that wait for work"
    def noted(r, device=None):
        (path.parent/f'started-{r.seed}').touch()
        row = slow(r, device)
        (path.parent/f'ended-{r.seed}').touch()
        return row
    def count(what): return len([*path.parent.glob(f'{what}-*')])
    p = forked(lambda: run_all(grid(SIN, seed=range(20)), path, jobs=2, run=noted))
    wait_for(lambda: len(load_rows(path)))
    kids = workers(p)
    if when == 'idle':
        os.kill(p.pid, signal.SIGSTOP)  # it gives out no more
        wait_for(lambda: count('started') == count('ended'))
    os.kill(p.pid, signal.SIGKILL)
    wait_for(lambda: p.exitcode is not None)
    started = count('started')
    assert len(kids) == 2 and wait_for(lambda: gone(kids))
    assert count('started') <= started + 2 < 20


def test_runs_that_kill_their_worker(path):
    "Too much memory, for instance: they become rows that say so, all others are trained"
    runs = grid(SIN, seed=range(7))
    def deadly(r, device=None):
        if r.seed in (0, 3): os.kill(os.getpid(), signal.SIGKILL)
        return run(r, device)
    def sweep():
        df = run_all(runs, path, jobs=2, run=deadly)
        assert df.seed.tolist() == [*range(7)]
        assert [s != 'ok' for s in df.status] == [True, False, False, True, False, False, False]
    ends(forked(sweep))
    assert load_rows(path).set_index('seed').status[0].startswith('TerminatedWorkerError')


def test_each_row_is_written_at_once(path):
    "Short runs come first: joblib must not bundle the long ones behind them"
    def waits(r, device=None):
        if r.seed < 40: time.sleep(.01)
        elif r.seed > 40: wait_for(lambda: len(load_rows(path)) >= r.seed)  # for all rows before it
        return made(r)
    def sweep(): run_all(grid(SIN, seed=range(44)), path, jobs=2, run=waits)
    ends(forked(sweep))
    assert len(load_rows(path)) == 44


def test_killed_in_the_middle(path):
    "From nothing: a new Python, joblib's real workers, kill -9 of all of them"
    runs = grid(DIGITS, seed=range(6))
    code = f"""if True:
        import sys, time
        from gradreg.study import Run, grid, run, run_all
        def work(r, device=None):
            while r.seed > 1: time.sleep(1)
            return run(r, device)
        run_all(grid({DIGITS}, seed=range(6)), sys.argv[1], jobs=2, run=work)"""
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, str(path)], start_new_session=True,
                         stderr=subprocess.DEVNULL, cwd=path.parent)
    try: wait_for(lambda: len(load_rows(path)) or p.poll() is not None)
    finally: os.killpg(p.pid, signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL
    before = load_rows(path)
    assert 1 <= len(before) <= 2
    trained, work = spy()
    df = run_all(runs, path, jobs=1, run=work)
    assert len(trained) == 6 - len(before) and df.seed.tolist() == [*range(6)]
    after = complete(path, runs)
    pd.testing.assert_frame_equal(after[:len(before)], before)
    r = runs[before.seed[0]]  # a worker's numbers are this process's
    assert metrics(run(r)) == metrics(before.iloc[0])


# many runs in one process

def test_complete_file_trains_nothing(path, monkeypatch):
    runs = grid(SIN, seed=range(3))
    for r in runs: append(path, made(r))
    before = path.read_bytes()
    monkeypatch.setitem(BACKENDS, 'loky', refuse)
    df = run_all(runs[::-1] + runs, path, jobs=2)
    assert df.seed.tolist() == [2, 1, 0] and path.read_bytes() == before and run_all([], path).empty


def test_only_what_was_asked_for(path):
    for i in range(3): append(path, made(replace(SIN, seed=i, wd=.5)))
    trained, work = spy()
    df = run_all([replace(SIN, seed=7), replace(SIN, seed=1, wd=.5)], path, jobs=1, run=work)
    assert df.seed.tolist() == [7, 1] and trained == [replace(SIN, seed=7)] and len(load_rows(path)) == 4


def test_failures_and_divergence_do_not_stop_the_rest(path):
    wild = [replace(SIN, spect_reg=.1, iters=1), replace(DIGITS, every=4, jac_reg=1.), SIN]
    bad = [SIN, *(replace(r, lr=1e30) for r in wild)]
    good, trained = replace(SIN, seed=1), []
    def work(r, device=None):
        trained.append(r)
        if r == SIN: raise OSError('no space left')
        return run(r, device)
    with pytest.warns(UserWarning, match='no space left'): df = run_all([*bad, good], path, jobs=1, run=work)
    assert df.status.tolist() == ['OSError: no space left', 'diverged', 'diverged', 'diverged', 'ok']
    assert df.lr[:4].tolist() == [1e-3, 1e30, 1e30, 1e30] and math.isnan(df.test[0]) and math.isfinite(df.test[4])
    trained.clear()
    with pytest.warns(UserWarning, match='tried again next time'): again = run_all([*bad, good], path, jobs=1, run=work)
    assert trained == bad[:1]  # the failed one again; a diverged one would diverge again
    pd.testing.assert_frame_equal(df, again)


# what can never work

@pytest.mark.parametrize('kwargs,words', [
    (dict(n_train=55), 'n_train=55.*10 classes'), (dict(bs=51), 'bs=51'), (dict(n_train=10**6), 'per_class=100000'),
    (dict(n_valid=10**6), 'n_valid=1000000'), (dict(model='cifar_resnet'), r'cifar_resnet takes.*\(25, 1, 28, 28\)'),
    (dict(model='mlp'), 'mlp takes'), (dict(model='resnet18', bn=True), 'bn=True on resnet18'),
    (dict(data='digitz'), 'digitz'),
    (dict(data='sin', model='mlp', jac_reg=1.), 'two classes'), (dict(precision='tf32'), 'tf32'),
    (dict(model='my_nets:small'), "no module 'my_nets'"), (dict(penalty='gradreg.models:mlp', strength=1.), 'GradReg'),
    (dict(data='gradreg.models:mlp'), 'TypeError')])
def test_what_can_never_work_is_one_error(path, kwargs, words):
    runs = grid(replace(DIGITS, **kwargs), seed=range(3), lr=[1e-3, 1e-2])
    with pytest.raises(ValueError, match=f'{words}.*nothing was trained: 1 of 2 kinds'):
        run_all([SIN, *runs], path, jobs=1, device='cpu')
    assert not path.exists()


def test_a_bad_device_is_one_error(path):
    with pytest.raises(ValueError, match='cuda:99'): run_all(grid(SIN, seed=range(3)), path, jobs=1, device='cuda:99')


@pytest.mark.parametrize('asked,named', [(None, 'GRADREG_DEVICE'), ('abacus', 'device')])
def test_a_bad_device_is_named_as_it_was_given(path, monkeypatch, asked, named):
    monkeypatch.setenv('GRADREG_DEVICE', 'gpu')
    with pytest.raises(ValueError, match=f"^{named}='{asked or 'gpu'}'"): run_all([SIN], path, jobs=1, device=asked)


def test_a_long_error_ends_between_words(path):
    words = ' '.join(f'word{i}' for i in range(500))
    def wordy(r, device=None): raise RuntimeError(words)
    with pytest.warns(UserWarning): status = run_all([SIN], path, jobs=1, run=wordy).status[0]
    said, dots = status.removeprefix('RuntimeError: ').rsplit(' ', 1)
    assert dots == '...' and set(said.split()) < set(words.split()) and 300 < len(status) < 620


def test_a_path_that_cannot_be_written_is_one_error(path):
    for bad in path.parent, path.parent/'no'/'..', '~nobody1234/rows.csv':
        with pytest.raises((OSError, ValueError)): run_all([SIN], bad, jobs=1, run=refuse)


def test_all_that_cannot_work_is_said_at_once(path):
    with pytest.raises(ValueError, match='n_train=55.*bs=51.*2 of 2 kinds'):
        bad = grid(replace(DIGITS, n_train=55), seed=range(3)) + grid(replace(DIGITS, bs=51), wd=[0, 1])
        run_all(bad, path, jobs=1)


def test_a_damaged_data_file_is_one_error(path, monkeypatch):
    (path.parent/'mine.npz').write_bytes(b'PK no archive')
    monkeypatch.setenv('GRADREG_DATA', str(path.parent))
    with pytest.raises(ValueError, match='mine.npz.*nothing was trained'):
        run_all(grid(replace(DIGITS, data='mine'), seed=range(9)), path, jobs=1)


def test_a_data_set_that_is_not_there_is_one_error(path, monkeypatch, tmp_path):
    monkeypatch.delenv('GRADREG_DATA', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    def no_network(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr('urllib.request.urlopen', no_network)
    for name, said in ('mnits', 'Did you mean mnist'), ('mnist', 'set GRADREG_DATA'):
        with pytest.raises(ValueError, match=said):
            run_all(grid(replace(DIGITS, data=name), seed=range(9)) + [SIN], path, jobs=1)
    assert not path.exists()
    assert run_all([replace(DIGITS, data='mnist')], path, jobs=0).empty  # who only reads needs no data


def test_a_rehearsal_for_each_kind_and_no_more(path, monkeypatch):
    seen = []
    monkeypatch.setattr(study, 'rehearse', lambda r, device: seen.append(r) or made(r))
    monkeypatch.setattr(study, '_train_one', pretend)
    run_all(grid(DIGITS, spect_reg=[0, .1, 1], p_drop=[0, .2, .5], wd=[0, 1], seed=range(9)), path, jobs=1)
    assert len(seen) == len(set(seen)) == 4 and {r.iters for r in seen} == {1}
    run_all(grid(DIGITS, spect_reg=[0, .1, 1], seed=range(9)), path, jobs=1)  # all there
    assert len(seen) == 4


def test_failed_row_gives_way(path):
    with pytest.warns(UserWarning, match='ZeroDivisionError'): run_all([SIN], path, jobs=1, run=lambda r, device: 1/0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert run_all([SIN], path, jobs=1, run=pretend).status.tolist() == ['ok'] == load_rows(path).status.tolist()


def test_long_messages_stay_one_line(path):
    def wordy(r, device=None): raise RuntimeError('first\n  second, "third"\r\n' + 'x'*10_000)
    with pytest.warns(UserWarning): run_all([SIN], path, jobs=1, run=wordy)
    assert len(path.read_text().splitlines()) == 2
    assert load_rows(path).status[0].startswith('RuntimeError: first second, "third" xxx')


@pytest.mark.parametrize('kwargs,words', [
    (dict(jobs='all'), 'jobs=all'), (dict(jobs=-1), 'jobs=-1'), (dict(jobs=True), 'jobs=True'),
    (dict(jobs=1.5), 'jobs=1.5'),
    (dict(backend='dask'), "backend='dask'.*ray")])
def test_bad_ways_to_run(path, kwargs, words):
    with pytest.raises(ValueError, match=words): run_all([SIN], path, **kwargs)


def test_smoke(path, monkeypatch):
    monkeypatch.setenv('GRADREG_SMOKE', '1')
    monkeypatch.setitem(BACKENDS, 'ray', refuse)
    trained, work = spy()
    df = run_all(grid(replace(SIN, iters=10**6), spect_reg=[0, .1], seed=range(3, 9)), path, 2, 'ray', run=work)
    assert [(r.spect_reg, r.seed, r.iters) for r in trained] == [(0, 3, 2), (0, 4, 2), (.1, 3, 2), (.1, 4, 2)]
    assert df.status.eq('ok').all() and df.seed.tolist() == [3, 4, 3, 4]


def test_smoke_needs_no_download(path, monkeypatch):
    monkeypatch.setenv('GRADREG_SMOKE', '1')
    monkeypatch.setenv('GRADREG_DATA', str(path.parent))
    df = run_all(grid(Run(p_drop=.5), n_train=[500, 20_000], seed=range(10)), path)
    assert df.data.eq('digits').all() and df.n_train.tolist() == [10, 10, 400, 400] and df.status.eq('ok').all()
    deep = Run(data='cifar10', model='cifar_resnet', precision='tf32', at='3', bs=128)
    deep = run_all(grid(deep, seed=range(3)), path)
    assert deep.model.eq('lenet5').all() and deep.status.eq('ok').all()


def test_nothing_is_trained_with_no_jobs(path, monkeypatch):
    append(path, made(SIN, test=.25))
    for kwargs in dict(jobs=0), {}:
        df = run_all(grid(SIN, seed=range(3)), path, run=refuse, **kwargs)
        assert df.test.tolist() == [.25] and df.seed.tolist() == [SIN.seed]
        monkeypatch.setenv('GRADREG_JOBS', '0')


@pytest.fixture
def asked(monkeypatch):
    "How the backends are called; nothing is trained, and each run fails"
    seen = []
    def backend(name):
        def f(todo, jobs, device, work):
            seen.append(([r.seed for r in todo], jobs, name, device))
            return (o for o in ())
        return f
    for name in 'loky', 'ray': monkeypatch.setitem(BACKENDS, name, backend(name))
    return seen


def test_the_environment_answers_what_the_call_leaves_open(path, monkeypatch, asked):
    for k, v in dict(JOBS='3', BACKEND='ray', DEVICE='cuda:1', SEEDS='2').items(): monkeypatch.setenv(f'GRADREG_{k}', v)
    run_all(grid(SIN, seed=range(5)), path, run=refuse)
    run_all(grid(SIN, seed=range(5)), path, jobs=1, backend='loky', device='cpu', run=refuse)
    assert asked == [([0, 1], 2, 'ray', 'cuda:1'), ([0, 1], 1, 'loky', 'cpu')]  # two runs are no work for three
    monkeypatch.setenv('GRADREG_SEEDS', 'two')
    with pytest.raises(ValueError, match="GRADREG_SEEDS='two'"): run_all([SIN], path)


def test_no_more_jobs_than_runs(path, asked):
    run_all(grid(SIN, seed=range(2)), path, jobs=10**9, run=refuse)
    assert asked[0][1] == 2


TURNS = ['cuda:0', 'cuda:1', 'cuda:0', 'cuda:1', 'cuda:0']

@pytest.mark.parametrize('gpus,jobs,device,expected', [
    (0, 2, None, [None]*5), (1, 2, None, ['cuda:0']*5), (2, 2, None, TURNS), (2, 2, 'cuda:1', ['cuda:1']*5),
    (2, 1, None, [None]*5), (2, None, None, TURNS)])
def test_gpus_take_turns(path, monkeypatch, gpus, jobs, device, expected):
    class Here: # joblib's Parallel in this process
        def __init__(self, n_jobs, **kwargs): assert n_jobs == (jobs or 2)
        def __call__(self, tasks): return (f(*args, **kwargs) for f, args, kwargs in tasks)
    seen = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr(study, 'Parallel', Here)
    run_all(grid(SIN, seed=range(5)), path, jobs, device=device, run=lambda r, device: seen.append(device) or made(r))
    assert seen == expected


@pytest.mark.parametrize('device,jobs', [(None, 3), ('cpu', 7), (torch.device('cpu'), 7), ('cuda', 1), ('cuda:1', 1)])
def test_as_many_at_a_time_as_the_device_has_places(path, monkeypatch, asked, device, jobs):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    monkeypatch.setattr(study, 'cpu_count', lambda: 7)
    run_all(grid(SIN, seed=range(9)), path, device=device, run=refuse)
    assert [o[1] for o in asked] == [jobs]


def test_progress(path, capfd):
    run_all(grid(SIN, seed=range(3)), path, jobs=1, run=pretend)
    bar = capfd.readouterr().err
    assert 'rows: 3 runs' in bar and '100%' in bar and ' left' in bar and '3 done' in bar


def test_cost():
    cost = lambda **kwargs: study.cost(Run(**{'iters': 100, **kwargs}))
    assert cost() == 100 == cost(wd=1, p_drop=.5) and cost(iters=200) == 200
    assert cost() < cost(spect_reg=1) < cost(spect_reg=1, double_back=1) < cost(frob_reg=1)
    assert cost(spect_reg=1, every=4) < cost(spect_reg=1) and cost(confidence_penalty=1) == cost()
    assert cost(penalty='gradreg.relative_callbacks:SpectralNormReg', strength=1) == 2200 and cost(jac_reg=1) == 1000


# tuning

def test_tune_by_validation_only(path):
    valid = {.1: .9, .01: .89, 1.: .5}
    for r in grid(DIGITS, spect_reg=[.1, .01, 1.], seed=range(3)):  # on test points .01 and 1 are far better
        test = 1 - r.spect_reg if r.spect_reg != .1 else 0.
        append(path, made(r, valid=valid[r.spect_reg] + .01*r.seed, test=test))
    assert tune(DIGITS, path, spect_reg=[.01, .1, 1.], run=refuse) == replace(DIGITS, spect_reg=.1)
    assert tune(DIGITS, path, spect_reg=[.01, 1.], run=refuse) == replace(DIGITS, spect_reg=.01)
    df = load_rows(path).drop(columns=['test'])
    assert study.choose(DIGITS, df, ['spect_reg']) == replace(DIGITS, spect_reg=.1)


def test_tune_averages_over_seeds_and_takes_the_smaller_error(path):
    valid = {.1: [1., 1., 9.], .2: [3., 3., 3.], .4: [math.nan]*3, .8: [0., 0., 0.]}
    status = {.4: 'diverged', .8: 'diverged'}  # a diverged run's numbers do not count
    for r in grid(SIN, spect_reg=valid, seed=range(3)):
        row = made(r, valid=valid[r.spect_reg][r.seed], test=r.spect_reg, status=status.get(r.spect_reg, 'ok'))
        append(path, row)
    assert tune(SIN, path, spect_reg=list(valid), run=refuse) == replace(SIN, spect_reg=.2)
    assert tune(SIN, path, seeds=range(2), spect_reg=list(valid), run=refuse) == replace(SIN, spect_reg=.1)
    with pytest.raises(ValueError, match='none of the runs'): tune(SIN, path, spect_reg=[.4, .8], run=refuse)


def test_tune_two_axes(path):
    def work(r, device=None): return made(r, valid=-(r.wd - .2)**2 - (r.double_back - 3)**2, test=r.wd)
    best = tune(DIGITS, path, seeds=[4], jobs=1, wd=[.1, .2, .3], double_back=[1, 3, 5], run=work)
    assert best == replace(DIGITS, wd=.2, double_back=3) and len(load_rows(path)) == 9 and best.seed == 0


def test_a_tie_is_called_a_tie(path):
    def work(r, device=None): return made(r, valid=.9 if r.spect_reg < 1 else .5)
    with pytest.warns(UserWarning, match='^spect_reg=0.01 and spect_reg=0.1 tie .* taking spect_reg=0.01, the small'):
        assert tune(DIGITS, path, jobs=1, spect_reg=[.1, 1., .01], run=work).spect_reg == .01
    with pytest.warns(UserWarning, match='^wd=0.0, bn=False and wd=0.0, bn=True and .*bn=True tie'):
        assert tune(DIGITS, path, jobs=1, wd=[1, 0], bn=[True, False], run=work) == DIGITS
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert tune(DIGITS, path, jobs=1, spect_reg=[1., .01], run=work).spect_reg == .01


def test_a_tie_over_two_axes_is_said_in_plain_numbers(path):
    def work(r, device=None): return made(r, valid=.5)
    with pytest.warns(UserWarning, match='^wd=0.0, lr=0.001 and wd=0.5, lr=0.001 tie .* taking wd=0.0, lr=0.001, the'):
        tune(DIGITS, path, seeds=[0], jobs=1, wd=[0, np.float64(.5)], lr=1e-3, run=work)


def test_tune_needs_an_axis(path):
    with pytest.raises(ValueError, match='no axes: name a field'): tune(DIGITS, path, jobs=1, run=refuse)
    with pytest.raises(ValueError, match='no axes: name a field'):
        study.choose(DIGITS, pd.DataFrame([made(DIGITS, valid=.5)]), [])


# Ray

def test_ray_is_missing(path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match='pip install ray'): run_all([SIN], path, backend='ray')
    assert not path.exists()


class FakeRay:
    "Enough of Ray for what cannot be brought about in seconds: a worker that dies each time, many GPUs, an interrupt"
    class exceptions: RayError = type('RayError', (Exception,), {})
    def __init__(self, dies=(), gpus=0):
        self.dies, self.gpus, self.started, self.cancelled, self.most, self.flying = dies, gpus, [], [], 0, 0
    def is_initialized(self): return True
    def cluster_resources(self): return {'CPU': 4., 'GPU': self.gpus} if self.gpus else {'CPU': 4.}
    def remote(self, **options):
        self.options, ray = options, self
        class Task:
            def __init__(self, f): self.f = f
            def remote(self, *args):
                ray.started.append(args)
                ray.flying += 1
                ray.most = max(ray.most, ray.flying)
                return partial(self.f, *args)
        return Task
    def wait(self, refs):
        self.flying -= 1
        return [refs[-1]], refs[:-1]
    def get(self, ref):
        if ref.args[0].seed in self.dies: raise self.exceptions.RayError('the worker died unexpectedly')
        return ref()
    def cancel(self, ref, force): self.cancelled.append(ref.args[0].seed)


@pytest.mark.parametrize('jobs,gpus', [(2, 0), (None, 0), (3, 8)])
def test_ray_worker_that_always_dies(path, monkeypatch, jobs, gpus):
    ray = FakeRay(dies=[1], gpus=gpus)
    monkeypatch.setitem(sys.modules, 'ray', ray)
    with pytest.warns(UserWarning, match='RayError: the worker died'):
        df = run_all(grid(SIN, seed=range(6)), path, jobs, 'ray', device='cpu', run=pretend)
    assert [s == 'ok' for s in df.status] == [True, False, True, True, True, True] and not ray.cancelled
    assert ray.most == (jobs or 6) and {o[1] for o in ray.started} == {'cpu'}
    assert ray.options['num_gpus'] == bool(gpus) and ray.options['num_cpus'] == 1 and ray.options['max_retries'] > 0


def test_ray_interrupted(path, monkeypatch):
    ray = FakeRay()
    def interrupted(r, device=None):
        if r.seed == 3: raise KeyboardInterrupt
        return made(r)
    monkeypatch.setitem(sys.modules, 'ray', ray)
    with pytest.raises(KeyboardInterrupt): run_all(grid(SIN, seed=range(6)), path, 2, 'ray', run=interrupted)
    assert len(load_rows(path)) == len(ray.started) - 1 - len(ray.cancelled) and len(ray.cancelled) == 2


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets: s.bind(('', 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return ports


@contextmanager
def cluster(log):
    "The head of a cluster of two workers on this machine, started as an administrator would, and what names it."
    port, *agents = free_ports(5)
    env = dict(RAY_ADDRESS=f'127.0.0.1:{port}', RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=uuid.uuid4().hex,
               RAY_raylet_start_wait_time_s='900')
    temp = tempfile.mkdtemp(prefix='ray', dir='/tmp')  # short: Ray's sockets lie in it
    # with given ports the node does not wait for most of its agents to name theirs: ray-project/ray#65983
    names = 'dashboard-agent-listen-port', 'dashboard-agent-grpc-port', 'metrics-export-port', 'runtime-env-agent-port'
    command = [str(Path(sys.executable).with_name('ray')), 'start', '--head', '--block', '--num-cpus=2', '--num-gpus=0',
               f'--port={port}', *(f'--{k}={v}' for k, v in zip(names, agents)), '--include-dashboard=false',
               '--include-log-monitor=false', '--disable-usage-stats',
               '--object-store-memory=80000000', f'--temp-dir={temp}']
    with open(log, 'w') as f:
        p = subprocess.Popen(command, env={**os.environ, **env}, stdout=f, stderr=f, start_new_session=True)
    head = psutil.Process(p.pid)
    try: yield head, env
    finally:
        kids = head.children(recursive=True) if p.poll() is None else []
        for o in [p, *kids]:
            with suppress(psutil.NoSuchProcess): o.kill()  # asked to end, Ray takes half a minute
        p.wait(900)
        wait_for(lambda: gone(kids))
        shutil.rmtree(temp, ignore_errors=True)


def given_up(head):
    "Ray lets its node wait 15 seconds for the first agent, which a busy machine may need for imports alone."
    return any(o.status() == 'zombie' for o in [head, *(o for o in head.children() if o.name() == 'raylet')])


@pytest.fixture(scope='module')
def ray_head(tmp_path_factory):
    "A cluster that runs, and RAY_ADDRESS set to it"
    if importlib.util.find_spec('ray') is None: pytest.skip("Ray is not installed: pip install ray")
    log = tmp_path_factory.mktemp('ray')/'head.log'
    for _ in range(3):
        with cluster(log) as (head, env):
            started = wait_for(lambda: 'Ray runtime started' in log.read_text() and 'yes' or given_up(head) and 'no')
            if started == 'no': continue
            with pytest.MonkeyPatch.context() as m:
                for k, v in env.items(): m.setenv(k, v)
                yield head
                import ray
                ray.shutdown()
            return
    pytest.skip(f'the machine is too busy for Ray to start: {log.read_text()[-300:]}')


def test_ray(ray_head, path, monkeypatch):
    "A small grid, and a worker killed in the middle of its run costs nothing but that run's time"
    runs = [replace(SIN, seed=9), *grid(SIN, seed=range(4)), replace(DIGITS, lr=1e30)]
    killed, begun = [], path.parent/'begun'
    def work(r, device):
        if r.seed == 9 and not begun.exists():
            begun.touch()
            time.sleep(10_000)
        return run(r, device)
    def kill():
        wait_for(lambda: begun.exists() and len(load_rows(path)) == 5)  # all but the first
        worker, = [o for o in ray_head.children(recursive=True) if (o.cmdline() or [''])[0].startswith('ray::_job')]
        worker.kill()
        killed.append(worker.pid)
    killer = threading.Thread(target=kill, daemon=True)
    with pytest.raises(ValueError, match='n_train=55.*nothing was trained'):
        run_all([replace(DIGITS, n_train=55), *runs], path, jobs=2, backend='ray')
    assert not path.exists()
    killer.start()
    df = run_all(runs, path, jobs=2, backend='ray', run=work)
    killer.join(900)
    assert len(killed) == 1
    assert df.status.tolist() == ['ok']*5 + ['diverged'] and df.seed.tolist() == [9, 0, 1, 2, 3, 0]
    for i in (1, 2): assert metrics(run(runs[i])) == metrics(df.iloc[i])
    monkeypatch.setitem(BACKENDS, 'ray', refuse)
    pd.testing.assert_frame_equal(run_all(runs[:5], path, jobs=2, backend='ray'), df[:5], check_dtype=False)


def test_ones_own_network_on_ray(ray_head, path, monkeypatch):
    "A module of the caller's folder, which the cluster was not told of when it was started"
    text = 'from gradreg.models import mlp\ndef net(n_out): return mlp((1, 8, n_out))'
    (path.parent/'my_ray_nets.py').write_text(text)
    monkeypatch.syspath_prepend(path.parent)
    runs = grid(replace(SIN, model='my_ray_nets:net'), seed=range(3))
    assert run_all(runs, path, jobs=2, backend='ray').status.tolist() == ['ok']*3
