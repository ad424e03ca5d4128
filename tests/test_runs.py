"What a reader of chapter 12_runs need not see: values of every type and size, grids, settings, a room without torch."
import math, subprocess, sys
from dataclasses import asdict, fields, replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st

from gradreg.runs import (BACKENDS, DATA, NETWORKS, OPTIMIZERS, PRECISIONS, PROBES, REGULARIZERS, TASKS, Run, Settings,
                          Task, grid, resolve, settings)
from samples import DIGITS

NUMBERS = [f.name for f in fields(Run) if type(f.default) in (int, float)]
WHOLE = [f.name for f in fields(Run) if type(f.default) is int]


def kind(field): return type(getattr(Run, field))


# values

@pytest.mark.parametrize('field,value', [
    ('lr', -1e-3), ('lr', float('nan')), ('lr', float('inf')), ('lr', 'fast'), ('lr', None), ('lr', [1e-3]),
    ('spect_reg', '.03'), ('wd', -1), ('wd', np.array([1, 2])), ('p_drop', math.nan), ('p_drop', 1.), ('p_drop', 50),
    ('seed', -1), ('seed', .5), ('seed', float('inf')), ('seed', None), ('iters', 2.5), ('iters', '10'), ('iters', 0),
    ('bs', 0), ('every', 0), ('every', 1.5), ('n_train', 0), ('n_valid', 0), ('bn', 'yes'), ('bn', 2), ('bn', None),
    ('data', None), ('data', 3), ('model', 5), ('probe', 1.), ('opt', None), ('lr', Decimal('.1')), ('lr', 1j),
    ('lr', Fraction(1, 3)), ('iters', 10**400), ('lr', 10**400), ('iters', 2**53), ('lr', np.bool_(1)),
    pytest.param('seed', 10**5000, id='too long to print')])
def test_bad_values(field, value):
    with pytest.raises(ValueError, match=rf'^{field}=.*must be') as e: Run(**{field: value})
    assert len(str(e.value)) < 200 and '\n' not in str(e.value)


@pytest.mark.parametrize('field', NUMBERS)
def test_true_is_no_number(field):
    with pytest.raises(ValueError, match=rf'^{field}=True'): Run(**{field: True})


anything = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=9), st.decimals(),
                     st.fractions(),
                     st.integers(-2**63, 2**63 - 1).map(np.int64), st.integers(0, 255).map(np.uint8),
                     st.floats(width=32).map(np.float32), st.complex_numbers(), st.just(np.array([1, 2])),
                     st.sampled_from(range(3)).map([10**400, -10**400, 10**5000].__getitem__),  # too long to print
                     st.sampled_from([math.nan, math.inf, b'x', (), {}, object()]))


@given(st.sampled_from(NUMBERS), anything)
def test_a_number_is_right_or_refused_by_name(field, value):
    try: got = getattr(Run(**{field: value} | ({'penalty': 'my_reg:GapReg'} if field == 'strength' else {})), field)
    except ValueError as e:
        assert str(e).startswith(f'{field}=') and len(str(e)) < 200 and '\n' not in str(e)
        return
    assert type(got) is kind(field) and got == value and not isinstance(value, (bool, np.bool_, str, Decimal))
    assert math.isfinite(got) and got >= 0
    assert type(got)(repr(got)) == got  # what a file can hold


@given(st.sampled_from(NUMBERS), st.integers(0, 2**53 - 1))
def test_whole_numbers_of_any_type_are_one_run(field, n):
    n = n or field in ('n_train', 'n_valid', 'every', 'bs', 'iters')
    if field == 'p_drop': n = 0
    same = {Run(**{field: o(n)} | ({'penalty': 'my_reg:GapReg'} if field == 'strength' else {}))
            for o in (int, float, np.int64, np.float64, Fraction)}
    assert len(same) == 1


@given(st.sampled_from(['data', 'model', 'penalty', 'at', 'probe', 'opt', 'precision']), st.text(max_size=30))
def test_a_name_is_in_a_table_or_a_path_or_refused(field, text):
    try: r = Run(**{field: text})
    except ValueError as e:
        assert str(e).startswith(f'{field}=') and 'choose' in str(e)
        return
    tables = dict(model=NETWORKS, probe=PROBES, opt=OPTIMIZERS, precision=PRECISIONS)
    assert getattr(r, field) == text and text.isascii() and text.isprintable() and not set('/\\"\'<>$') & set(text)
    assert field not in tables or text in tables[field] or field != 'precision' and ':' in text


@pytest.mark.parametrize('field,value', [
    ('opt', 'lion'), ('opt', 'my Lion'), ('probe', 'cauchy'), ('model', 'vgg'), ('model', 'my.nets'),
    ('model', 'a:b:c'), ('model', ':small'), ('model', '../nets:small'), ('penalty', 'GapReg'), ('precision', 'fp16'),
    ('data', ''), ('data', '.x'), ('data', 'a/b'), ('data', 'a\nb'), ('at', 'a b'), ('at', '0;1')])
def test_bad_names(field, value):
    with pytest.raises(ValueError, match=rf'^{field}=.*choose'): Run(**{field: value})


@pytest.mark.parametrize('field', ['data', 'model', 'penalty', 'probe', 'opt'])
@pytest.mark.parametrize('text,way', [
    ('__main__:Mine', "choose 'my_file:Mine', with Mine in my_file.py"), ('my_nets.py:small', "choose 'my_nets:small'"),
    ('./my_nets.py:small', "choose 'my_nets:small'")])
def test_a_path_that_no_other_process_can_import(field, text, way):
    "A worker knows nothing of a notebook's own cells, nor does who reads the row next week"
    with pytest.raises(ValueError, match=f"^{field}='{text}': {way}"): Run(**{field: text})


@pytest.mark.parametrize('field,value,way', [
    ('at', 'a-b', "a layer's name"), ('data', '', 'a data set, such as mnist'),
    ('data', '../mine.npz', '.*GRADREG_DATA'),
    ('model', 'vgg', "lenet5, .*or your own as 'module:name'"), ('penalty', 'GapReg', "your own as 'module:name'"),
    ('opt', 'lion', "adam, sgd or your own as 'module:name'$"), ('precision', 'fp16', 'float32, tf32, bf16$')])
def test_what_to_choose_instead(field, value, way):
    with pytest.raises(ValueError, match=f'^{field}={value!r}: choose {way}') as e: Run(**{field: value})
    assert ('module:name' in str(e.value)) is (field not in ('at', 'precision'))


@pytest.mark.parametrize('field', REGULARIZERS)
def test_a_penalty_has_one_strength(field):
    "Two strengths of one penalty would be two rows of one training, or one strength that is not trained"
    for k in {}, {'strength': .2}, {'strength': .2, field: .1}:
        with pytest.raises(ValueError, match=f'^penalty=.*a field of its own, {field},'):
            Run(penalty=REGULARIZERS[field], **k)


def test_names_of_ones_own():
    r = Run(data='my_data:loaders', model='pkg.nets:small', penalty='my_reg:GapReg', strength=.1, at='0.encoder.1')
    assert (r.model, r.penalty, r.strength) == ('pkg.nets:small', 'my_reg:GapReg', .1)
    assert Run(data='tiny_imagenet').data == 'tiny_imagenet' and Run(penalty='my_reg:GapReg').strength == 0
    with pytest.raises(ValueError, match=r"^strength=0\.1: needs penalty"): Run(strength=.1)


def test_values_are_cast():
    a = Run(spect_reg=1, lr=np.float32(.5), iters=np.int64(7), n_train=100., bn=np.bool_(True), seed=np.uint8(3),
            data=np.str_('sin'), wd=-0.)
    for f in fields(Run): assert type(getattr(a, f.name)) is type(f.default), f.name
    assert (a.spect_reg, a.lr, a.iters, a.n_train, a.bn, a.seed, a.data) == (1., .5, 7, 100, True, 3, 'sin')
    assert str(a.wd) == '0.0'
    b = Run(spect_reg=1., lr=.5, iters=7, n_train=100, bn=1, seed=3, data='sin')
    assert a == b and hash(a) == hash(b) and len({a, b, replace(a, seed=4)}) == 2
    with pytest.raises(AttributeError): a.lr = 1
    with pytest.raises(TypeError): Run(lamda=1)


def test_new_fields_are_what_old_rows_were():
    old = dict(penalty='', strength=0., at='', precision='float32')
    assert {k: v for k, v in asdict(Run()).items() if k in old} == old


def test_grid():
    rs = grid(DIGITS, spect_reg=(0, .03), bn=[False, True], seed=(i for i in range(3)), data='digits')
    assert len(rs) == len(set(rs)) == 12 and all(r.iters == 4 for r in rs)
    assert [(r.spect_reg, r.bn, r.seed) for r in rs[:4]] == [(0, False, 0), (0, False, 1), (0, False, 2), (0, True, 0)]
    assert grid(DIGITS) == [DIGITS] and grid(DIGITS, seed=[]) == []
    assert grid(DIGITS, spect_reg=np.array([.1]), seed=3) == [replace(DIGITS, spect_reg=.1, seed=3)]
    with pytest.raises(ValueError, match='no field .*lambda'): grid(DIGITS, **{'lambda': 1})
    with pytest.raises(ValueError, match='^wd=-1'): grid(DIGITS, wd=[0, -1])


# tables of entries

def test_every_entry_leads_somewhere():
    tasks = [o for t in TASKS.values() for o in (t.loss, t.score, *t.beside)]
    for table in REGULARIZERS, NETWORKS, DATA, OPTIMIZERS, PROBES, BACKENDS:
        tasks += table.values()
    for path in tasks: assert callable(resolve(path)), path


def test_the_fields_of_strength_are_the_classes():
    "Each penalty of chapter 10 has its field, as one of another room may; what a class takes of a Run is a field"
    from gradreg import callbacks
    found = {cls for cls in vars(callbacks).values() if isinstance(cls, type) and issubclass(cls, callbacks.GradReg)
             and cls is not callbacks.GradReg and cls.__module__ == 'gradreg.callbacks'}
    assert found <= {resolve(path) for path in REGULARIZERS.values()}
    strengths = [f.name for f in fields(Run) if f.name in REGULARIZERS]
    assert strengths == list(REGULARIZERS) and all(getattr(Run, k) == 0 for k in strengths)
    for name, path in REGULARIZERS.items():
        cls = resolve(path)
        assert cls(0.).name == name and set(cls.takes) <= {f.name for f in fields(Run)}
        assert isinstance(cls.passes(10), int) and cls.passes(10) >= 0


def test_tasks():
    assert [k for k, t in TASKS.items() if t.more] == ['classification']
    assert isinstance(TASKS['sin'], Task) and TASKS['sin'].loss != TASKS['regression'].loss


@pytest.mark.parametrize('module', ['gradreg.runs', 'gradreg.rows'])
def test_no_torch(module):
    slow = {'torch', 'fastai', 'fastcore', 'sklearn'}
    code = f"import sys, {module}; print({slow} & {{k.split('.')[0] for k in sys.modules}})"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == 'set()', done.stdout + done.stderr


# what the environment says

@pytest.fixture
def env(monkeypatch):
    for f in fields(Settings): monkeypatch.delenv(f'GRADREG_{f.name.upper()}', raising=False)
    return lambda **kwargs: [monkeypatch.setenv(f'GRADREG_{k}', v) for k, v in kwargs.items()]


def test_settings(env):
    assert settings() == Settings()
    env(JOBS='2', BACKEND='ray', DEVICE='cuda:1', SEEDS='10', COMMIT='abc1234')
    assert settings() == Settings(2, 'ray', 'cuda:1', 10, 'abc1234')
    env(JOBS='0', BACKEND='')
    assert settings() == Settings(0, None, 'cuda:1', 10, 'abc1234')


@pytest.mark.parametrize('name,value', [
    ('JOBS', 'all'), ('JOBS', '-1'), ('JOBS', '1.5'), ('JOBS', '9'*5000), ('JOBS', '²'), ('SEEDS', '0'),
    ('SEEDS', 'inf'), ('BACKEND', 'dask')])
def test_wrong_settings(env, name, value):
    env(**{name: value})
    with pytest.raises(ValueError, match=f'^GRADREG_{name}=') as e: settings()
    assert len(str(e.value)) < 200
