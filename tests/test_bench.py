"The benchmark: which cases there are, how a step alternates, what a row says, which rows of a file stay"
import subprocess, sys
from dataclasses import asdict, replace
from pathlib import Path
import pytest, torch
from gradreg import bench
from gradreg.bench import Case, add, cases, interleave, measure, peak_mb, stepper
from gradreg.rows import load_rows

root = Path(__file__).resolve().parents[1]
cpu = torch.device('cpu')

@pytest.mark.parametrize('device', ['cpu', 'cuda:0'])
def test_cases(device):
    found = cases(torch.device(device))
    assert len(set(found)) == len(found)
    for c in found:  # each has a plain step of its own kind
        assert replace(c, penalty='none', every=1, fast=False) in found
    names = *bench.PENALTIES, *bench.RELATIVES
    assert {(c.penalty, c.every) for c in found} == {*((p, 1) for p in names), ('spect_reg', 8)}
    assert not any(c.penalty == 'frob_reg' and c.network == 'resnet18' for c in found)  # 200 passes

@pytest.fixture
def said(monkeypatch):
    "What each step was, by the penalty that it took."
    said = []
    for name in 'spect_reg', 'none':
        if f := bench.PENALTIES[name]:
            monkeypatch.setitem(bench.PENALTIES, name, lambda *a, f=f, name=name: said.append(name) or f(*a))
    return said

class StandIn:
    def __init__(self, device): self.aside = lambda f: f()
    def record(self, f, generators=()): return f

@pytest.mark.parametrize('captured,warmup', [(False, 0), (True, 3)])
def test_every_third_step_has_the_penalty(said, monkeypatch, captured, warmup):
    monkeypatch.setattr(bench, 'CudaRecorder', StandIn)
    step = stepper(Case('lenet5', 2, 'spect_reg', every=3, captured=captured), cpu)
    assert len(said) == warmup
    for _ in range(7): step()
    assert len(said) == warmup + 3

@pytest.mark.parametrize('network', bench.MEASURED)
def test_every_network_takes_every_way(network):
    for case in Case(network, 2, 'spect_reg', fast=True), Case(network, 2, 'double_back', precision='bf16'):
        if network != 'resnet18' or case.fast: stepper(case, cpu)()

@pytest.mark.parametrize('penalty', [*bench.PENALTIES, *bench.RELATIVES])
def test_every_penalty_makes_a_step(penalty): stepper(Case('lenet5', 2, penalty), cpu)()

def test_a_row_says_what_was_found(monkeypatch):
    group = [Case('lenet5', 2), Case('lenet5', 2, 'spect_reg')]
    monkeypatch.setattr(bench, 'interleave', lambda *_: {group[0]: [1., 2., 4.], group[1]: [3., 4., 16.]})
    monkeypatch.setattr(bench, 'peak_mb', lambda *_: 5.)
    plain, row = measure(group, 3, cpu)
    assert row == asdict(group[1]) | dict(ms_q25=3.5, ms=4., ms_q75=10., ratio_q25=2.5, ratio=3., ratio_q75=3.5,
                                          memory_mb=5., memory_ratio=1., rounds=3)
    assert plain['ratio'] == 1 and plain['ms'] == 2

def test_turns_go_there_and_back():
    order = []
    interleave({k: lambda k=k: order.append(k) for k in 'ab'}, 2, cpu, lambda name: 2 if name == 'b' else 1)
    assert ''.join(order) == 'abb' + 'bba' + 'abb'

def test_memory_is_that_of_the_largest_moment():
    def f():
        a = torch.zeros(2**20)
        del a
        return torch.zeros(3*2**20)
    assert 12 <= peak_mb(f, cpu) < 13

def test_rows_of_others_stay(tmp_path):
    row = asdict(Case()) | dict(ms=1., device='mine')
    add(tmp_path/'b.csv', [row, row | dict(device='yours'), row | dict(fast=True)])
    add(tmp_path/'b.csv', [row | dict(ms=2.)])
    assert list(zip(*[load_rows(tmp_path/'b.csv')[k] for k in ('device', 'fast', 'ms')])) == [
        ('mine', False, 2), ('yours', False, 1), ('mine', True, 1)]  # each in its place

def test_an_unknown_network_is_said():
    with pytest.raises(ValueError, match='choose lenet5'): bench._main(['--only', 'lenet', '--device', 'cpu'])

def test_it_is_a_plain_command(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'gradreg.bench', '--help'], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and '--rounds' in done.stdout
