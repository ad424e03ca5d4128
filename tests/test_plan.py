"The plan of the deep runs, and its command on a bare machine: no git, no repository, no Jupyter."
import os, subprocess, sys
from pathlib import Path
import pytest
from gradreg.plan import BASES, Step, plan, work
from gradreg.runs import NETWORKS

root = Path(__file__).resolve().parents[1]
def command(tmp_path, *args):
    "The finished command in an empty folder."
    env = {k: v for k,v in os.environ.items() if not k.startswith('GRADREG_')}
    env.update(PATH=str(tmp_path), GRADREG_COMMIT='abc1234', GRADREG_RESULTS=str(tmp_path), PYTHONPATH=str(root))
    return subprocess.run([sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True)

def test_it_says_what_is_missing_on_a_bare_machine(tmp_path):
    done = command(tmp_path, '-W', 'ignore', '-m', 'gradreg.plan', '--study', 'shared_directions')
    assert done.returncode == 0 and done.stdout.startswith('24 runs are missing'), done.stderr
    assert not list(tmp_path.iterdir())  # asking writes nothing

def test_no_notebook_tool_is_imported():
    code = (
        'import sys, gradreg.plan; print(sorted({"IPython", "nbformat", "nbclient", "nbconvert"} &'
        ' set(sys.modules)))'
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    before = (
        'import sys, fastai.learner; print(sorted({"IPython", "nbformat", "nbclient", "nbconvert"} &'
        ' set(sys.modules)))'
    )
    assert (
        done.stdout == subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', before], capture_output=True, text=True
        ).stdout
    )

wrong = [
    (['--study', 'none'], 'choose cifar, '),
    (['--minutes', 'nan'], 'at least 0'),
    (['--min', '3'], 'unrecognized'),
]

@pytest.mark.parametrize('args,said', wrong)
def test_wrong_options_are_named(args, said, tmp_path):
    done = command(tmp_path, '-W', 'ignore', '-m', 'gradreg.plan', *args)
    assert done.returncode == 2 and said in done.stderr, done.stderr

def test_every_run_of_the_plan_is_of_a_known_network_and_leaves_points_to_validate_on():
    corpus = {
        'cifar10': 10_000,
        'cifar100': 25_000,
        'tiny_imagenet': 20_000,
        'mnist': 60_000,
    }  # of the subsets that we have
    runs = [r for step in plan() for r in step.runs()]
    assert len(runs) > 300 and {r.data for r in runs} == set(corpus)
    for r in runs: assert r.model in NETWORKS and r.trace == 0 and r.n_train + r.n_valid <= corpus[r.data], r

def test_the_first_runs_are_the_papers_table():
    first = plan()[0].runs()
    assert (
        first[0] == BASES['cifar10']
        and {r.seed for r in first} == {0, 1, 2}
        and {r.data for r in first} == {'cifar10'}
    )

def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    for k in 'GRADREG_SMOKE', 'GRADREG_JOBS', 'GRADREG_SEEDS': monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('GRADREG_RESULTS', str(tmp_path))
    def fails_once(r, device):
        if r.seed == 0: raise MemoryError('too large')
        return {**vars(r), 'status': 'ok', 'seconds': 1.0, 'test': 0.5, 'valid': 0.5}
    steps = [Step('cifar', {'baseline': BASES['cifar10']}, 2)]
    with pytest.warns(UserWarning, match='too large'): assert [r.seed for r in work(5, steps, run=fails_once)] == [0, 1]
    assert 'MemoryError: too large: cifar10, seed=0' in capsys.readouterr().out

def test_runs_without_their_data_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv('GRADREG_RESULTS', str(tmp_path))
    monkeypatch.setattr('gradreg.plan.find_arrays', lambda name: None)
    assert work(5, [Step('cifar', {'baseline': BASES['cifar10']}, 2)]) == [] and not list(tmp_path.iterdir())
