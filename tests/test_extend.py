"One's own penalty, network, data set, optimizer, probe and backend, in a folder of one's own: no file here is touched."
import subprocess, sys, warnings
from dataclasses import replace
from textwrap import dedent

import numpy as np
import pytest

from gradreg.cli import main
from gradreg.runs import BACKENDS, OPTIMIZERS, PROBES
from gradreg.study import Run, grid, load_rows, readable, run_all, tune
from gradreg.training import penalties
from samples import arrays

FILES = {'my_reg.py': '''
    import torch
    from gradreg.callbacks import GradReg
    from gradreg.jacobians import sq_norm, vjp

    def gap_reg(logits, x):
        "Squared gradient of the gap between the two largest logits, (N,)."
        largest = logits.topk(2).values
        gap = largest[:, 0] - largest[:, 1]
        return sq_norm(vjp(gap, x, torch.ones_like(gap)))

    class GapReg(GradReg):
        def penalty(self): return self.scaled(gap_reg, self.pred)

    class Takes(GradReg):
        takes = 'wd',
        def __init__(self, lam, *, wd=7., every=1):
            super().__init__(lam, every=every)
            self.wd = wd
        def penalty(self): return self.wd*gap_reg(self.pred, self.x)

    class Wrong(Takes): takes = 'wdd',

    class Alone(GapReg):
        def __init__(self, lam): super().__init__(lam)
    ''', 'my_opt.py': '''
    import torch

    def adamax(params, lr): return torch.optim.Adamax(params, lr=lr)

    def cauchy(logits, *, generator=None): return torch.empty_like(logits).cauchy_(generator=generator)
    ''', 'my_nets.py': '''
    from torch import nn

    def small(n_out, bn=False):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *[nn.BatchNorm1d(16)]*bn, nn.Tanh(), nn.Linear(16, n_out))

    def boom(n_out): raise RuntimeError('boom')
    def three(n_out): return 3

    class Loud(nn.Sequential):
        def __init__(self, n_out): super().__init__(nn.Flatten(), nn.Linear(64, n_out))
        def forward(self, x): return super().forward(300*x)

    class Wide(nn.Sequential):
        def __init__(self, n_out): super().__init__(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, n_out))
    ''', 'my_data.py': '''
    import torch
    from fastai.data.core import DataLoaders
    from torch.utils.data import TensorDataset
    from gradreg.runs import Task

    def error(model, x, y): return (model.eval()(x) - y).abs().mean().item()

    def loaders(n_train, n_valid, seed, bs, device):
        "The angle of a point in the plane, learnt by its absolute error: less is better."
        g = torch.Generator().manual_seed(seed)
        def part(n):
            x = torch.randn(n, 2, generator=g)
            return TensorDataset(x, torch.atan2(x[:, 1], x[:, 0]).abs()[:, None])
        dls = DataLoaders.from_dsets(part(n_train), part(n_valid), bs=bs, device=device, num_workers=0)
        dls.c, dls.test = 1, dls.valid.new(part(100))
        dls.task = Task('torch.nn:L1Loss', 'my_data:error', metric='error', more=False, unit=' rad', scale=1)
        return dls
    ''', 'my_tables.py': '''
    import torch

    def plain(params, lr): return torch.optim.SGD(params, lr=lr)

    def last(y): return torch.eye(y.shape[1])[-1].expand_as(y)

    seen = []
    def in_turn(todo, jobs, device, work):
        for r in todo:
            seen.append(r)
            yield r, work(r, device)
    '''}
IMAGES = Run(data='mine', model='my_nets:small', penalty='my_reg:GapReg', n_train=40, n_valid=20, bs=10, iters=8)
ANGLES = Run(data='my_data:loaders', model='my_nets:Wide', n_train=60, n_valid=40, bs=20, iters=30, lr=.01)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Somebody's own folder, far from the repository, and that one works there"
    for name, text in FILES.items(): (tmp_path/name).write_text(dedent(text))
    np.savez(tmp_path/'mine.npz', **arrays())
    monkeypatch.setenv('GRADREG_DATA', str(tmp_path))
    for k in 'JOBS', 'BACKEND', 'SEEDS', 'SMOKE', 'RESULTS': monkeypatch.delenv(f'GRADREG_{k}', raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [o for o in sys.path])
    yield tmp_path
    for name in FILES: sys.modules.pop(name.removesuffix('.py'), None)


def python(*args):
    "In a process of its own, so that nothing of this one is known there"
    done = subprocess.run([sys.executable, '-W', 'ignore', *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ones_own_of_everything(folder):
    "Strengths and seeds; a baseline without the penalty is what strength 0 is"
    df = run_all(grid(IMAGES, strength=[0, .1], seed=[0, 1]), 'rows.csv', jobs=1)
    assert df.status.eq('ok').all() and (df.gap_reg_end > 0).tolist() == [False, False, True, True]
    assert readable(df).method.tolist() == ['baseline', 'baseline', 'GapReg', 'GapReg']
    plain = run_all(grid(IMAGES, penalty='', seed=[0, 1]), 'plain.csv', jobs=1)
    assert plain.weight_norm.tolist() == df.weight_norm[:2].tolist() and df.weight_norm.nunique() == 4


def test_in_a_script_with_two_processes(folder):
    (folder/'study.py').write_text(dedent(f'''
        from gradreg.study import Run, grid, run_all
        if __name__ == '__main__':
            df = run_all(grid({IMAGES}, strength=[0, .1], seed=range(2)), 'rows.csv', jobs=2)
            print(df.status.tolist())'''))
    assert python('study.py').strip() == "['ok', 'ok', 'ok', 'ok']"


def test_one_chooses_by_ones_own_score(folder, capsys):
    "The smallest validation error wins, and the command says it in the words of the task"
    assert tune(ANGLES, 'rows.csv', jobs=1, lr=[1e-5, .01]).lr == .01
    mean = load_rows('rows.csv').groupby('lr').valid.mean()
    assert mean[.01] < mean[1e-5]
    options = '--n-train 60 --n-valid 40 --bs 20 --iters 30 --seeds 2 --jobs 1 --method wd --lams 0,.1'.split()
    assert main(['tune', '--data', 'my_data:loaders', '--model', 'my_nets:Wide', *options]) == 0
    said = capsys.readouterr().out
    assert 'error' in said and 'accuracy' not in said and 'best: wd = ' in said


def test_the_command_tunes_ones_own_penalty(folder, capsys):
    options = '--n-train 40 --n-valid 20 --bs 10 --iters 4 --seeds 1 --jobs 1 --lams 0,.1 --method strength'.split()
    assert main(['tune', *'--data mine --model my_nets:small --penalty my_reg:GapReg'.split(), *options]) == 0
    assert 'best: strength = ' in capsys.readouterr().out and (folder/'tune.csv').exists()


@pytest.mark.parametrize('change,words', [
    (dict(p_drop=.5), "no argument 'p_drop'"), (dict(model='my_nets:large'), "my_nets.py has no 'large'"),
    (dict(penalty='my_reg:gap_reg', strength=1), "'my_reg:gap_reg' is no subclass of GradReg"),
    (dict(penalty='my_reg:gap_reg', strength=0), "'my_reg:gap_reg' is no subclass of GradReg"),
    (dict(penalty='my_reg:Nothing', strength=0), "my_reg.py has no 'Nothing'"),
    (dict(penalty='my_reg:Wrong', strength=1), "'my_reg:Wrong' failed: .*no attribute 'wdd'"),
    (dict(penalty='my_reg:Alone', strength=1), "'my_reg:Alone' failed: .*unexpected keyword argument 'every'"),
    (dict(data='my_data:error'), r"'my_data:error' failed: TypeError: error\(\)"),
    (dict(model='my_nets:boom'), "'my_nets:boom' failed: RuntimeError: boom"),
    (dict(model='my_nets:three'), "'my_nets:three': returned a int, not an nn.Module"),
    (dict(opt='my_opt:cauchy'), "'my_opt:cauchy' failed: TypeError"), (dict(opt='my_opt:lion'), "has no 'lion'"),
    (dict(model='my_nets:Wide'), "'my_nets:Wide', 'my_reg:GapReg' failed: RuntimeError: mat1 and mat2"),
    (dict(penalty='', at='no.layer', spect_reg=1.), 'no.layer')])
def test_what_ones_own_lacks_is_one_error(folder, change, words):
    with pytest.raises(ValueError, match=f'{words}.*nothing was trained'):
        run_all(grid(IMAGES, **change, seed=range(3)), 'rows.csv', jobs=1)
    assert not (folder/'rows.csv').exists()


def test_what_a_class_takes_of_a_run_it_gets(folder):
    own, = penalties(replace(IMAGES, penalty='my_reg:Takes', strength=.1, wd=.5, every=3))
    assert (own.wd, own.every, own.lam) == (.5, 3, .1)


def test_an_optimizer_and_a_probe_of_ones_own(folder):
    "By path or, where one has given them a name, by that; in this process and in others"
    mine = replace(IMAGES, penalty='', spect_reg=.1, opt='my_opt:adamax', probe='my_opt:cauchy')
    (folder/'study.py').write_text(dedent(f'''
        from gradreg import runs
        from gradreg.study import Run, grid, run_all
        runs.OPTIMIZERS['mine'], runs.PROBES['heavy'] = 'my_opt:adamax', 'my_opt:cauchy'
        if __name__ == '__main__':
            named = grid({mine}, opt='mine', probe='heavy', seed=range(2))
            df = run_all(grid({mine}, seed=range(2)) + named, 'rows.csv', jobs=2)
            print(df.status.tolist(), df.weight_norm.nunique())'''))
    assert python('study.py').strip() == "['ok', 'ok', 'ok', 'ok'] 2"
    adam = run_all([replace(mine, opt='adam')], 'adam.csv', jobs=1)
    assert load_rows('rows.csv').weight_norm[0] != adam.weight_norm[0]


def test_the_rehearsal_warns_of_no_strength_that_nobody_asked_for(folder):
    "The penalty of the first batch is hundreds of times the loss, but lam times it is not"
    loud = replace(IMAGES, penalty='', model='my_nets:Loud')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert run_all(grid(loud, spect_reg=[1e-9, 1e-8]), 'rows.csv', jobs=1).status.eq('ok').all()
    with pytest.warns(UserWarning, match='spect_reg: lam.penalty .* times the loss. Start from lam='):
        run_all(grid(loud, spect_reg=[1e-7, 1.]), 'rows.csv', jobs=1)


def test_a_layer_of_ones_own(folder):
    df = run_all(grid(IMAGES, spect_reg=.1, at=['', '2'], seed=0), 'rows.csv', jobs=1)
    assert df.status.eq('ok').all() and df.spect_reg_end.nunique() == 2 and df['at'].tolist() == ['', '2']


def test_a_line_in_a_table(folder, monkeypatch):
    "An optimizer, a probe and a backend"
    for table, name in (OPTIMIZERS, 'plain'), (PROBES, 'last'), (BACKENDS, 'in_turn'):
        monkeypatch.setitem(table, name, f'my_tables:{name}')
    runs = grid(replace(IMAGES, penalty='', spect_reg=.1), opt=['sgd', 'plain'], probe=['gaussian', 'last'])
    df = run_all(runs, 'rows.csv', jobs=1, backend='in_turn')
    assert df.status.eq('ok').all() and df.weight_norm.nunique() == df.spect_reg_end.nunique() == 4
    assert sys.modules['my_tables'].seen[-4:] == runs


def test_the_cells_of_a_study_of_ones_own(folder):
    "As `gradreg run` executes them, in their folder; test_cli has a kernel do it"
    names = {}
    for cell in ('from gradreg.study import Run, grid, results, run_all, summarize',
                 f"rows = run_all(grid({IMAGES}, strength=[0, .1], seed=range(2)), results('mine'), jobs=1)"):
        exec(cell, names)
    assert names['rows'].status.eq('ok').all() and (folder/'results'/'mine.csv').exists()
