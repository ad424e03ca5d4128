"What a reader of chapter 20_study need not see: interrupted, killed and concurrent sweeps, a real Ray"
import importlib.util, math, multiprocessing, os, shutil, signal, socket, subprocess, sys, tempfile, threading, time, uuid, warnings
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from joblib.externals.loky.backend.context import set_start_method

from gradreg import study
from gradreg.study import Run, append_row, grid, load_rows, run, run_all, tune

DIGITS = Run(data='digits', n_train=50, n_valid=50, bs=25, iters=4)
SIN = Run(data='sin', model='mlp', n_train=50, n_valid=50, bs=25, iters=4)  # trains in milliseconds
METRICS = ['test', 'valid', 'train', 'jac_train', 'jac_test', 'jac_between', 'jac_noise', 'weight_norm']


@pytest.fixture(autouse=True)
def no_smoke(monkeypatch): monkeypatch.delenv('GRADREG_SMOKE', raising=False)


@pytest.fixture
def path(tmp_path): return tmp_path/'rows.csv'


def metrics(row): return {k: row[k] for k in METRICS}


def made(r, **kwargs): return {**asdict(r), 'status': 'ok', 'test': .5, 'valid': .5, 'train': .5, **kwargs}


def append(path, row): append_row(path, row, asdict(Run()))


def refuse(*args, **kwargs): raise AssertionError('nothing should be trained here')


# rows: what tables keeps, with the fields of Run as their key

def test_rows_are_runs(path):
    for i in range(3): append(path, made(replace(SIN, seed=i, lr=.1**i, bn=i == 2), commit='12e4'))
    df = load_rows(path)
    assert df.bn.dtype == bool and df.seed.dtype.kind == 'i' and set(df.commit) == {'12e4'}
    assert [Run(**{f.name: getattr(o, f.name) for f in fields(Run)}) for o in df.itertuples()] == [replace(SIN, seed=i, lr=.1**i, bn=i == 2) for i in range(3)]


def test_old_rows_mean_the_defaults(path, monkeypatch):
    append(path, {k: v for k, v in made(SIN).items() if k not in ('bn', 'every')})  # from a version without these fields
    append(path, made(replace(SIN, seed=1, bn=True)))
    monkeypatch.setattr(study, 'run', refuse)
    row = run_all([SIN, replace(SIN, seed=1, bn=True)], path)
    assert row.seed.tolist() == [0, 1] and row.bn.tolist() == [False, True] and row.every.tolist() == [1, 1]
    assert study.readable(row).net.tolist() == ['plain', 'BatchNorm']
    assert study.choose(SIN, row.assign(valid=[.1, .2]), ['bn']).bn is False  # a field that a row lacks can be chosen
    append(path, made(SIN, test=.9))
    assert load_rows(path).test.tolist() == [.5, .5]


def test_no_two_runs_share_a_row(path, monkeypatch):
    "Not even where a field is zero and its default is not"
    rs = [Run(), Run(lr=0), Run(protocol=0), Run(seed=1), Run(data='sin'), Run(bn=True), Run(lr=1e-3 + 1e-18), Run(wd=1e-300)]
    for i, r in enumerate(rs): append(path, made(r, test=float(i)))
    monkeypatch.setattr(study, 'run', refuse)
    assert run_all(rs[::-1], path).test.tolist() == [*range(len(rs))][::-1]


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


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not (got := what()):
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.02)
    return got


def ends(p, code=0, seconds=60):
    try: wait_for(lambda: p.exitcode is not None, seconds)  # join would wait for the workers too, which hold its pipe
    finally:
        with suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
    assert p.exitcode == code


def workers(p): return [o for o in psutil.Process(p.pid).children() if not any('resource_tracker' in w for w in o.cmdline())]


def gone(processes): return all(not o.is_running() or o.status() == 'zombie' for o in processes)


def slow_sweep(runs, path, original=study.run):
    def run(r, device=None):
        time.sleep(.3)  # so that there is a middle
        return original(r, device)
    study.run = run
    run_all(runs, path, jobs=2)


def complete(path, runs):
    "All rows are there, none twice, and each is what training gives"
    df = load_rows(path)
    assert len(df) == len(runs) == len(load_rows(path, asdict(Run()), map(asdict, runs)))
    assert df.status.eq('ok').all() and df.test.notna().all()
    return df


@pytest.fixture
def trained(monkeypatch):
    "The Runs that are trained from here on in this process"
    seen, original = [], study.run
    def spy(r, device=None):
        seen.append(r)
        return original(r, device)
    monkeypatch.setattr(study, 'run', spy)
    return seen


def test_two_sweeps_on_one_file(path):
    runs, start = grid(replace(SIN, iters=30), seed=range(8)), _fork.Event()
    def sweep(rs):
        start.wait()
        assert run_all(rs, path, jobs=1).seed.tolist() == [r.seed for r in rs]
    ps = [forked(sweep, runs), forked(sweep, runs[::-1])]
    start.set()
    for p in ps: ends(p)
    complete(path, runs)


@pytest.mark.parametrize('who', ['terminal', 'notebook'])
def test_ctrl_c(path, trained, who):
    runs = grid(SIN, seed=range(8))
    p = forked(slow_sweep, runs, path)
    wait_for(lambda: len(load_rows(path)))
    kids = workers(p)
    (os.killpg if who == 'terminal' else os.kill)(p.pid, signal.SIGINT)  # Ctrl-C reaches the group, Jupyter's stop button the process
    ends(p, 130)
    before = load_rows(path)
    assert 1 <= len(before) < 8 and before.status.eq('ok').all()
    assert len(kids) == 2 and wait_for(lambda: gone(kids))
    run_all(runs, path, jobs=1)
    after = complete(path, runs)
    assert len(trained) == 8 - len(before)
    pd.testing.assert_frame_equal(after[:len(before)], before)


def test_ctrl_c_alone(path, monkeypatch):
    def run(r, device=None):
        if r.seed == 2: raise KeyboardInterrupt
        return made(r)
    monkeypatch.setattr(study, 'run', run)
    with pytest.raises(KeyboardInterrupt): run_all(grid(SIN, seed=range(4)), path, jobs=1)
    assert load_rows(path).seed.tolist() == [0, 1]


def test_killed_worker(path):
    runs = grid(SIN, seed=range(8))
    p = forked(slow_sweep, runs, path)
    wait_for(lambda: len(load_rows(path)))
    before = load_rows(path)
    workers(p)[0].kill()
    ends(p)
    after = complete(path, runs)
    pd.testing.assert_frame_equal(after[:len(before)], before)


def test_workers_do_not_outlive_the_sweep(path, original=study.run):
    "kill -9 of the one process: its workers finish what they are at, and go"
    def run(r, device=None):
        (path.parent/f'started-{r.seed}').touch()
        time.sleep(.3)
        return original(r, device)
    def sweep():
        study.run = run
        run_all(grid(SIN, seed=range(20)), path, jobs=2)
    p = forked(sweep)
    wait_for(lambda: len(load_rows(path)))
    kids = workers(p)
    os.kill(p.pid, signal.SIGKILL)
    wait_for(lambda: p.exitcode is not None)
    started = len([*path.parent.glob('started-*')])
    assert len(kids) == 2 and wait_for(lambda: gone(kids))
    assert len([*path.parent.glob('started-*')]) <= started + 2 < 20


def test_runs_that_kill_their_worker(path):
    "Too much memory, for instance: they become rows that say so, all others are trained"
    runs, original = grid(SIN, seed=range(7)), study.run
    def run(r, device=None):
        if r.seed in (0, 3): os.kill(os.getpid(), signal.SIGKILL)
        return original(r, device)
    def sweep():
        study.run = run
        df = run_all(runs, path, jobs=2)
        assert df.seed.tolist() == [*range(7)]
        assert [s != 'ok' for s in df.status] == [True, False, False, True, False, False, False]
    ends(forked(sweep))
    assert load_rows(path).set_index('seed').status[0].startswith('TerminatedWorkerError')


def test_each_row_is_written_at_once(path):
    "Short runs come first: joblib must not bundle the long ones behind them"
    def run(r, device=None):
        time.sleep(.01 if r.seed < 40 else 3)
        return made(r, ended=time.time())
    def sweep():
        late, original = [], study.append_row
        def spy(path, row, key): late.append(time.time() - row['ended']); return original(path, row, key)
        study.run, study.append_row = run, spy
        run_all(grid(SIN, seed=range(44)), path, jobs=2)
        assert len(late) == 44 and max(late) < 2.9, late  # a long run's row would wait for the next long one
    ends(forked(sweep))


def test_killed_in_the_middle(path, trained):
    "From nothing: a new Python, joblib's real workers, kill -9 of all of them"
    runs = grid(replace(DIGITS, iters=20), seed=range(6))
    code = ("import sys; from gradreg.study import *; base = Run(data='digits', n_train=50, n_valid=50, bs=25, iters=20); "
            "run_all(grid(base, seed=range(6)), sys.argv[1], jobs=2)")
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, str(path)], start_new_session=True, stderr=subprocess.DEVNULL, cwd=path.parent)
    try: wait_for(lambda: len(load_rows(path)) or p.poll() is not None, 120)
    finally: os.killpg(p.pid, signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL
    before = load_rows(path)
    assert 1 <= len(before) < 6
    df = run_all(runs, path, jobs=1)
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
    monkeypatch.setattr(study, 'run', refuse)
    monkeypatch.setattr(study, 'Parallel', refuse)
    df = run_all(runs[::-1] + runs, path, jobs=2)
    assert df.seed.tolist() == [2, 1, 0] and path.read_bytes() == before and run_all([], path).empty


def test_only_what_was_asked_for(path, trained):
    for i in range(3): append(path, made(replace(SIN, seed=i, wd=.5)))
    df = run_all([replace(SIN, seed=7), replace(SIN, seed=1, wd=.5)], path, jobs=1)
    assert df.seed.tolist() == [7, 1] and trained == [replace(SIN, seed=7)] and len(load_rows(path)) == 4


def test_failures_and_divergence_do_not_stop_the_rest(path, trained):
    bad = [replace(DIGITS, n_train=55), replace(SIN, lr=1e30), replace(SIN, lr=1e30, spect_reg=.1, iters=1), replace(DIGITS, every=4, lr=1e30, jac_reg=1.)]
    with pytest.warns(UserWarning, match='n_train=55.*10 classes'): df = run_all([*bad, SIN], path, jobs=1)
    assert df.status[0].startswith('ValueError: n_train=55') and df.status[1:].tolist() == ['diverged']*3 + ['ok']
    assert df.lr[:4].tolist() == [1e-3, 1e30, 1e30, 1e30] and math.isnan(df.test[0]) and math.isfinite(df.test[4])
    trained.clear()
    with pytest.warns(UserWarning, match='tried again next time'): again = run_all([*bad, SIN], path, jobs=1)
    assert trained == bad[:1]  # the failed one again; a diverged one would diverge again
    pd.testing.assert_frame_equal(df, again)


def test_a_data_set_that_is_not_there_is_one_error(path, trained, monkeypatch, tmp_path):
    monkeypatch.delenv('GRADREG_DATA', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    def no_network(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr('urllib.request.urlopen', no_network)
    for name, error, said in ('mnits', ValueError, 'Did you mean mnist'), ('mnist', ConnectionError, 'set GRADREG_DATA'):
        with pytest.raises(error, match=said): run_all(grid(replace(DIGITS, data=name), seed=range(9)) + [SIN], path, jobs=1)
    assert not trained and not path.exists()
    assert run_all([replace(DIGITS, data='mnist')], path, jobs=0).empty  # who only reads needs no data


def test_failed_row_gives_way(path, monkeypatch):
    monkeypatch.setattr(study, 'run', lambda r, device=None: 1/0)
    with pytest.warns(UserWarning, match='ZeroDivisionError'): run_all([SIN], path, jobs=1)
    monkeypatch.setattr(study, 'run', lambda r, device=None: made(r))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert run_all([SIN], path, jobs=1).status.tolist() == ['ok'] == load_rows(path).status.tolist()


def test_long_messages_stay_one_line(path, monkeypatch):
    def run(r, device=None): raise RuntimeError('first\n  second, "third"\r\n' + 'x'*10_000)
    monkeypatch.setattr(study, 'run', run)
    with pytest.warns(UserWarning): run_all([SIN], path, jobs=1)
    assert len(path.read_text().splitlines()) == 2 and load_rows(path).status[0].startswith('RuntimeError: first second, "third" xxx')


@pytest.mark.parametrize('kwargs,words', [(dict(jobs='all'), 'jobs=all'), (dict(jobs=-1), 'jobs=-1'), (dict(backend='dask'), "backend='dask'.*ray")])
def test_bad_ways_to_run(path, kwargs, words):
    with pytest.raises(ValueError, match=words): run_all([SIN], path, **kwargs)


def test_smoke(path, monkeypatch, trained):
    monkeypatch.setenv('GRADREG_SMOKE', '1')
    monkeypatch.setattr(study, '_on_ray', refuse)
    df = run_all(grid(replace(SIN, iters=10**6), spect_reg=[0, .1], seed=range(3, 9)), path, jobs=2, backend='ray')
    assert [(r.spect_reg, r.seed, r.iters) for r in trained] == [(0, 3, 2), (0, 4, 2), (.1, 3, 2), (.1, 4, 2)]
    assert df.status.eq('ok').all() and df.seed.tolist() == [3, 4, 3, 4]


def test_smoke_needs_no_download(path, monkeypatch, trained):
    monkeypatch.setenv('GRADREG_SMOKE', '1')
    monkeypatch.setenv('GRADREG_DATA', str(path.parent))
    df = run_all(grid(Run(p_drop=.5), n_train=[500, 20_000], seed=range(10)), path)
    assert df.data.eq('digits').all() and df.n_train.tolist() == [10, 10, 400, 400] and df.status.eq('ok').all()


def test_nothing_is_trained_with_no_jobs(path, monkeypatch):
    append(path, made(SIN, test=.25))
    for kwargs in dict(jobs=0), {}:
        df = run_all(grid(SIN, seed=range(3)), path, **kwargs)
        assert df.test.tolist() == [.25] and df.seed.tolist() == [SIN.seed]
        monkeypatch.setenv('GRADREG_JOBS', '0')
        monkeypatch.setattr(study, 'run', refuse)


def test_the_environment_answers_what_the_call_leaves_open(path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, '_train_all', lambda todo, path, *how: asked.append(([r.seed for r in todo], *how)))
    for k, v in dict(JOBS='3', BACKEND='ray', DEVICE='cuda:1', SEEDS='2').items(): monkeypatch.setenv(f'GRADREG_{k}', v)
    run_all(grid(SIN, seed=range(5)), path)
    run_all(grid(SIN, seed=range(5)), path, jobs=1, backend='loky', device='cpu')
    assert asked == [([0, 1], 3, 'ray', 'cuda:1'), ([0, 1], 1, 'loky', 'cpu')]


@pytest.mark.parametrize('gpus,jobs,device,expected', [
    (0, 2, None, [None]*5), (1, 2, None, ['cuda:0']*5), (2, 2, None, ['cuda:0', 'cuda:1', 'cuda:0', 'cuda:1', 'cuda:0']),
    (2, 2, 'cuda:1', ['cuda:1']*5), (2, 1, None, [None]*5), (2, None, None, ['cuda:0', 'cuda:1', 'cuda:0', 'cuda:1', 'cuda:0'])])
def test_gpus_take_turns(path, monkeypatch, gpus, jobs, device, expected):
    class Here: # joblib's Parallel in this process
        def __init__(self, n_jobs, **kwargs): assert n_jobs == (jobs or 2)
        def __call__(self, tasks): return (f(*args, **kwargs) for f, args, kwargs in tasks)
    seen = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr(study, 'Parallel', Here)
    monkeypatch.setattr(study, 'run', lambda r, device: seen.append(device) or made(r))
    run_all(grid(SIN, seed=range(5)), path, jobs, device=device)
    assert seen == expected


@pytest.mark.parametrize('device,jobs', [(None, 3), ('cpu', 7), (torch.device('cpu'), 7), ('cuda', 1), ('cuda:1', 1)])
def test_as_many_at_a_time_as_the_device_has_places(path, monkeypatch, device, jobs):
    asked = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    monkeypatch.setattr(study, 'cpu_count', lambda: 7)
    monkeypatch.setattr(study, '_train_all', lambda todo, path, jobs, backend, device: asked.append(jobs))
    run_all([SIN], path, device=device)
    assert asked == [jobs]


def test_progress(path, monkeypatch, capfd):
    monkeypatch.setattr(study, 'run', lambda r, device=None: made(r))
    run_all(grid(SIN, seed=range(3)), path, jobs=1)
    bar = capfd.readouterr().err
    assert 'rows: 3 runs' in bar and '100%' in bar and ' left' in bar and '3 done' in bar


def test_cost():
    cost = lambda **kwargs: study._cost(Run(**{'iters': 100, **kwargs}))
    assert cost() == 100 == cost(wd=1, p_drop=.5) and cost(iters=200) == 200
    assert cost() < cost(spect_reg=1) < cost(spect_reg=1, double_back=1) < cost(frob_reg=1) and cost(spect_reg=1, every=4) < cost(spect_reg=1)


# tuning

def test_tune_by_validation_only(path, monkeypatch):
    monkeypatch.setattr(study, 'run', refuse)
    for r in grid(DIGITS, spect_reg=[.1, .01, 1.], seed=range(3)):  # on test points .01 and 1 are far better
        append(path, made(r, valid={.1: .9, .01: .89, 1.: .5}[r.spect_reg] + .01*r.seed, test=1 - r.spect_reg if r.spect_reg != .1 else 0.))
    assert tune(DIGITS, path, spect_reg=[.01, .1, 1.]) == replace(DIGITS, spect_reg=.1)
    assert tune(DIGITS, path, spect_reg=[.01, 1.]) == replace(DIGITS, spect_reg=.01)
    df = load_rows(path).drop(columns=['test'])
    monkeypatch.setattr(study, 'run_all', lambda *args: df)
    assert tune(DIGITS, path, spect_reg=[.01, .1, 1.]) == replace(DIGITS, spect_reg=.1)


def test_tune_averages_over_seeds_and_takes_the_smaller_error(path, monkeypatch):
    monkeypatch.setattr(study, 'run', refuse)
    valid = {.1: [1., 1., 9.], .2: [3., 3., 3.], .4: [math.nan]*3, .8: [0., 0., 0.]}
    status = {.4: 'diverged', .8: 'diverged'}  # a diverged run's numbers do not count
    for r in grid(SIN, spect_reg=valid, seed=range(3)):
        append(path, made(r, valid=valid[r.spect_reg][r.seed], test=r.spect_reg, status=status.get(r.spect_reg, 'ok')))
    assert tune(SIN, path, spect_reg=list(valid)) == replace(SIN, spect_reg=.2)
    assert tune(SIN, path, seeds=range(2), spect_reg=list(valid)) == replace(SIN, spect_reg=.1)
    with pytest.raises(ValueError, match='none of the runs'): tune(SIN, path, spect_reg=[.4, .8])


def test_tune_two_axes(path, monkeypatch):
    monkeypatch.setattr(study, 'run', lambda r, device=None: made(r, valid=-(r.wd - .2)**2 - (r.double_back - 3)**2, test=r.wd))
    best = tune(DIGITS, path, seeds=[4], jobs=1, wd=[.1, .2, .3], double_back=[1, 3, 5])
    assert best == replace(DIGITS, wd=.2, double_back=3) and len(load_rows(path)) == 9 and best.seed == 0


# Ray

def test_ray_is_missing(path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match='pip install ray'): run_all([SIN], path, backend='ray')
    assert not path.exists()


class FakeRay:
    "Enough of Ray to see what cannot be brought about in seconds: a worker that dies each time, many GPUs, an interrupt"
    class exceptions: RayError = type('RayError', (Exception,), {})
    def __init__(self, dies=(), gpus=0): self.dies, self.gpus, self.started, self.cancelled, self.most, self.flying = dies, gpus, [], [], 0, 0
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
                return (len(ray.started), self.f, args)
        return Task
    def wait(self, refs):
        self.flying -= 1
        return [refs[-1]], refs[:-1]
    def get(self, ref):
        if ref[2][0].seed in self.dies: raise self.exceptions.RayError('the worker died unexpectedly')
        return ref[1](*ref[2])
    def cancel(self, ref, force): self.cancelled.append(ref[2][0].seed)


@pytest.mark.parametrize('jobs,gpus', [(2, 0), (None, 0), (3, 8)])
def test_ray_worker_that_always_dies(path, monkeypatch, jobs, gpus):
    ray = FakeRay(dies=[1], gpus=gpus)
    monkeypatch.setitem(sys.modules, 'ray', ray)
    monkeypatch.setattr(study, 'run', lambda r, device=None: made(r))
    with pytest.warns(UserWarning, match='RayError: the worker died'): df = run_all(grid(SIN, seed=range(6)), path, jobs, 'ray', device='cpu')
    assert [s == 'ok' for s in df.status] == [True, False, True, True, True, True] and not ray.cancelled
    assert ray.most == (jobs or 6) and {o[1] for o in ray.started} == {'cpu'}
    assert ray.options['num_gpus'] == bool(gpus) and ray.options['num_cpus'] == 1 and ray.options['max_retries'] > 0


def test_ray_interrupted(path, monkeypatch):
    ray = FakeRay()
    def run(r, device=None):
        if r.seed == 3: raise KeyboardInterrupt
        return made(r)
    monkeypatch.setitem(sys.modules, 'ray', ray)
    monkeypatch.setattr(study, 'run', run)
    with pytest.raises(KeyboardInterrupt): run_all(grid(SIN, seed=range(6)), path, 2, 'ray')
    assert len(load_rows(path)) == len(ray.started) - 1 - len(ray.cancelled) and len(ray.cancelled) == 2


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets: s.bind(('', 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return ports


@pytest.fixture(scope='module')
def ray_head(tmp_path_factory):
    "A cluster of two workers on this machine, started as an administrator would, and RAY_ADDRESS set to it"
    if importlib.util.find_spec('ray') is None: pytest.skip("Ray is not installed: pip install ray")
    port, *agents = free_ports(5)
    env = dict(RAY_ADDRESS=f'127.0.0.1:{port}', RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=uuid.uuid4().hex, RAY_raylet_start_wait_time_s='180')
    log = tmp_path_factory.mktemp('ray')/'head.log'
    temp = tempfile.mkdtemp(prefix='ray', dir='/tmp')  # short: Ray's sockets lie in it
    # with given ports the node does not wait, 15 seconds at most, for its agents to name theirs: ray-project/ray#65983
    names = 'dashboard-agent-listen-port', 'dashboard-agent-grpc-port', 'metrics-export-port', 'runtime-env-agent-port'
    command = [str(Path(sys.executable).with_name('ray')), 'start', '--head', '--block', '--num-cpus=2', '--num-gpus=0', f'--port={port}',
               *(f'--{k}={v}' for k, v in zip(names, agents)), '--include-dashboard=false', '--include-log-monitor=false', '--disable-usage-stats',
               '--object-store-memory=80000000', f'--temp-dir={temp}']
    with open(log, 'w') as f: head = subprocess.Popen(command, env={**os.environ, **env}, stdout=f, stderr=f, start_new_session=True)
    try:
        wait_for(lambda: 'Ray runtime started' in log.read_text() or head.poll() is not None, 180)
        assert head.poll() is None, log.read_text()[-3000:]
        with pytest.MonkeyPatch.context() as m:
            for k, v in env.items(): m.setenv(k, v)
            yield psutil.Process(head.pid)
            import ray
            ray.shutdown()
    finally:
        kids = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        head.wait(60)
        wait_for(lambda: gone(kids))
        shutil.rmtree(temp, ignore_errors=True)


def test_ray(ray_head, path, monkeypatch):
    "A small grid, and a worker killed in the middle of its run costs nothing but that run's time"
    long = replace(SIN, iters=2000, seed=9)
    runs = [long, *grid(SIN, seed=range(4)), replace(DIGITS, n_train=55)]
    killed = []
    def kill():
        wait_for(lambda: len(load_rows(path)) == 5, 180)  # all but the long one
        worker, = [o for o in ray_head.children(recursive=True) if (o.cmdline() or [''])[0].startswith('ray::_task')]
        worker.kill()
        killed.append(worker.pid)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.warns(UserWarning, match='n_train=55'): df = run_all(runs, path, jobs=2, backend='ray')
    killer.join(10)
    assert len(killed) == 1
    assert df.status[:5].tolist() == ['ok']*5 and df.status[5].startswith('ValueError: n_train=55') and df.seed.tolist() == [9, 0, 1, 2, 3, 0]
    for i in (1, 2): assert metrics(run(runs[i])) == metrics(df.iloc[i])
    monkeypatch.setattr(study, '_on_ray', refuse)
    monkeypatch.setitem(study._backends, 'ray', refuse)
    pd.testing.assert_frame_equal(run_all(runs[:5], path, jobs=2, backend='ray'), df[:5], check_dtype=False)
