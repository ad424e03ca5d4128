"What a reader of chapter 12_runs need not see: bad values, each field against a loop written by hand, traces"
import os, random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from torch import nn

from gradreg import callbacks, penalties, runs
from gradreg.data import image_dls, sin_dls
from gradreg.models import lenet5, mlp
from gradreg.runs import Run, grid, run
from samples import arrays

DIGITS = Run(data='digits', n_train=50, n_valid=50, bs=25, iters=4)
SIN = Run(data='sin', model='mlp', n_train=50, n_valid=50, bs=25, iters=4)  # trains in milliseconds
METRICS = ['test', 'valid', 'train', 'jac_train', 'jac_test', 'jac_between', 'jac_noise', 'weight_norm']
REGS = ['double_back', 'jac_reg', 'frob_reg', 'spect_reg', 'confidence_penalty']


def metrics(row): return {k: row[k] for k in METRICS}


@pytest.fixture
def flat(monkeypatch):
    "`run` without the slopes, its slowest part here"
    monkeypatch.setattr(runs, 'jac_norms', lambda model, x: torch.zeros(1))


@pytest.fixture
def learners(monkeypatch):
    "The Learners that `run` makes, in order"
    made, original = [], runs._learner
    def spy(*args):
        made.append(original(*args))
        return made[-1]
    monkeypatch.setattr(runs, '_learner', spy)
    return made


# what a run is

@pytest.mark.parametrize('field,value', [
    ('lr', -1e-3), ('lr', float('nan')), ('lr', float('inf')), ('lr', 'fast'), ('lr', None), ('lr', [1e-3]), ('spect_reg', '.03'),
    ('wd', -1), ('wd', np.array([1, 2])), ('p_drop', float('nan')), ('seed', -1), ('seed', .5), ('seed', float('inf')), ('seed', None),
    ('iters', 2.5), ('iters', '10'), ('iters', 0), ('bs', 0), ('every', 0), ('every', 1.5), ('n_train', 0), ('n_valid', 0),
    ('bn', 'yes'), ('bn', 2), ('bn', None), ('data', None), ('data', 3), ('model', 5), ('probe', 1.), ('opt', None)])
def test_bad_values(field, value):
    with pytest.raises(ValueError, match=rf'^{field}=.*must be'): Run(**{field: value})


def test_values_are_cast():
    a = Run(spect_reg=1, lr=np.float32(.5), iters=np.int64(7), n_train=100., bn=np.bool_(True), seed=np.uint8(3), data=np.str_('sin'), wd=-0.)
    for f in fields(Run): assert type(getattr(a, f.name)) is type(f.default), f.name
    assert (a.spect_reg, a.lr, a.iters, a.n_train, a.bn, a.seed, a.data) == (1., .5, 7, 100, True, 3, 'sin')
    assert str(a.wd) == '0.0'
    b = Run(spect_reg=1., lr=.5, iters=7, n_train=100, bn=1, seed=3, data='sin')
    assert a == b and hash(a) == hash(b) and len({a, b, replace(a, seed=4)}) == 2
    with pytest.raises(AttributeError): a.lr = 1
    with pytest.raises(TypeError): Run(lamda=1)


def test_grid():
    rs = grid(DIGITS, spect_reg=(0, .03), bn=[False, True], seed=(i for i in range(3)), data='digits')
    assert len(rs) == len(set(rs)) == 12 and all(r.iters == 4 for r in rs)
    assert [(r.spect_reg, r.bn, r.seed) for r in rs[:4]] == [(0, False, 0), (0, False, 1), (0, False, 2), (0, True, 0)]
    assert grid(DIGITS) == [DIGITS] and grid(DIGITS, seed=[]) == []
    assert grid(DIGITS, spect_reg=np.array([.1]), seed=3) == [replace(DIGITS, spect_reg=.1, seed=3)]
    with pytest.raises(ValueError, match='no field .*lambda'): grid(DIGITS, **{'lambda': 1})
    with pytest.raises(ValueError, match='^wd=-1'): grid(DIGITS, wd=[0, -1])


# one run

def by_hand(r, dls, model, loss_func, coupled=True, biases=False):
    "`r` trained by a bare loop: both optimizers from their definition, no torch.optim and no fastai"
    ps = list(model.parameters())
    m, v, lrs, t = [torch.zeros_like(p) for p in ps], [torch.zeros_like(p) for p in ps], [], 0
    while t < r.iters:
        for x, y in dls.train:
            if t == r.iters: break
            lrs.append(r.lr*(1 if t < r.iters/2 else .1 if t < .75*r.iters else .01))
            lr, t, grads = lrs[-1], t+1, torch.autograd.grad(loss_func(model(x), y), ps)
            with torch.no_grad():
                for i, (p, g) in enumerate(zip(ps, grads)):
                    decay = r.wd*p if p.ndim > 1 or biases else torch.zeros_like(p)
                    if coupled: g = g + decay
                    else: p -= lr*decay
                    if r.opt == 'sgd':
                        m[i] = .9*m[i] + g
                        p -= lr*(g + .9*m[i])
                    else:
                        m[i], v[i] = .9*m[i] + .1*g, .999*v[i] + .001*g*g
                        p -= lr*(m[i]/(1 - .9**t))/((v[i]/(1 - .999**t)).sqrt() + 1e-8)
    return model, lrs


def case(r):
    torch.manual_seed(r.seed)
    if r.data == 'sin':
        return sin_dls(n=50, n_valid=50, seed=r.seed, bs=25), mlp((1, 64, 64, 64, 64, 64, 1)), lambda p, y: ((p - y)**2).sum()/2
    return image_dls('digits', 5, n_valid=50, seed=r.seed, bs=25), lenet5(10), F.cross_entropy


def distance(a, b): return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize('r', [replace(SIN, wd=.3, lr=3e-3, iters=9, seed=2), replace(SIN, wd=.3, lr=1e-3, iters=9, opt='sgd'),
                               replace(DIGITS, wd=.3, lr=3e-3, iters=8, seed=1)], ids=['sin-adam', 'sin-sgd', 'digits-adam'])
def test_same_as_by_hand(r, learners):
    row = run(r)
    theirs, lrs = by_hand(r, *case(r))
    assert np.allclose(lrs, [r.lr*f for f in [1]*-(-r.iters//2) + [.1]*(-(-3*r.iters//4) - -(-r.iters//2)) + [.01]*(r.iters - -(-3*r.iters//4))])
    assert distance(learners[0].model, theirs) < 2e-5
    # and the bounds tell: none of these is L2 on weights only, by three learning rates
    assert distance(learners[0].model, by_hand(r, *case(r), coupled=False)[0]) > 2e-4
    assert distance(learners[0].model, by_hand(r, *case(r), biases=True)[0]) > 2e-4
    assert distance(learners[0].model, by_hand(replace(r, iters=r.iters - 1), *case(r))[0]) > 2e-5
    dls, model = case(r)[0], theirs.eval()
    for name, dl in zip(('train', 'valid', 'test'), dls):
        with torch.no_grad(): pred, y = model(dl.dataset.x), dl.dataset.y
        expected = (pred - y).square().mean() if r.data == 'sin' else (pred.argmax(1) == y).float().mean()
        assert row[name] == pytest.approx(expected.item(), rel=1e-3)
    assert row['weight_norm'] == pytest.approx(sum(p.square().sum().item() for p in theirs.parameters() if p.ndim > 1), rel=1e-5)
    x = dls.train.dataset.x[:50].clone().requires_grad_()
    J = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x)  # the sum over the batch takes the examples apart
    assert row['jac_train'] == pytest.approx(J.transpose(0, 1).flatten(1).norm(dim=1).mean().item(), rel=1e-4)


def test_deterministic(learners):
    r = replace(DIGITS, spect_reg=.1, p_drop=.5, seed=5)
    torch.manual_seed(99)
    first, threads = run(r), torch.get_num_threads()
    torch.rand(7), np.random.rand(3), random.random()
    torch.set_num_threads(2)
    try:
        assert metrics(run(r)) == metrics(first) and torch.get_num_threads() == 2
        with pytest.raises(ValueError): run(replace(r, n_train=55))
        assert torch.get_num_threads() == 2  # after an error too
    finally: torch.set_num_threads(threads)
    assert distance(learners[0].model, learners[1].model) == 0
    assert metrics(run(replace(r, seed=6))) != metrics(first)
    assert len(learners[0].dls.train) == 2 and learners[0].opt.hypers[0]['lr'] == pytest.approx(1e-5)
    assert set(first) >= {f.name for f in fields(Run)} | {'seconds', 'peak_mb', 'device', 'threads', 'python', 'torch', 'fastai', 'commit', 'spect_reg_end'}
    assert first['threads'] == 1 and first['torch'] == torch.__version__ and first['seconds'] > 0 and first['peak_mb'] > 50


@pytest.mark.parametrize('field', REGS)
def test_regularizer_field(field, learners, flat):
    r = replace(DIGITS, **{field: .25}, every=2, probe='rademacher', iters=3)
    row = run(r)
    cb, = [o for o in learners[0].cbs if isinstance(o, callbacks.GradReg)]
    assert type(cb).__name__.lower() == field.replace('_', '') and (cb.lam, cb.every) == (.25, 2)
    assert len(cb.penalties) == 2 and row[f'{field}_end'] == pytest.approx(np.mean(cb.penalties))
    if field == 'spect_reg': assert cb.probe is penalties.rademacher
    run(replace(r, **{field: 0}))
    assert not [o for o in learners[1].cbs if isinstance(o, callbacks.GradReg)]
    assert distance(learners[0].model, learners[1].model) > 1e-5


def test_regularizers_combine(learners, flat):
    row = run(replace(SIN, spect_reg=.01, double_back=.02, iters=3))
    assert {(type(o).__name__, o.lam) for o in learners[0].cbs if isinstance(o, callbacks.GradReg)} == {('SpectReg', .01), ('DoubleBack', .02)}
    assert row['spect_reg_end'] > 0 and row['double_back_end'] > 0


def test_dropout_and_batchnorm(learners, flat):
    run(replace(DIGITS, p_drop=.25, iters=1))
    run(replace(DIGITS, bn=True, iters=1))
    kinds = [{type(m): m for m in o.model.modules()} for o in learners]
    assert kinds[0][nn.Dropout].p == .25 and nn.BatchNorm1d not in kinds[0]
    assert nn.BatchNorm1d in kinds[1] and nn.Dropout not in kinds[1]


@pytest.mark.parametrize('kwargs,words', [
    (dict(n_train=55), 'n_train=55.*10 classes'), (dict(model='vgg'), "model='vgg'.*lenet5"), (dict(model='mlp'), "model='mlp'"),
    (dict(opt='lion'), "opt='lion'.*adam or sgd"), (dict(probe='cauchy', spect_reg=1), "probe='cauchy'.*gaussian"),
    (dict(data='nothing'), 'nothing'), (dict(bs=51), 'bs=51'), (dict(data='sin'), "model='lenet5' on sin"),
    (dict(data='sin', model='mlp', bn=True), 'bn=True'), (dict(model='resnet18', p_drop=.5), 'p_drop=0.5')])
def test_what_cannot_work_says_why(kwargs, words):
    with pytest.raises(ValueError, match=words): run(replace(DIGITS, **kwargs))


def test_without_git(monkeypatch):
    monkeypatch.setenv('PATH', '')
    runs._commit.cache_clear()
    try: assert run(replace(SIN, iters=1))['commit'] == ''
    finally: runs._commit.cache_clear()


def test_shared_probe():
    one, all_ = run(replace(SIN, spect_reg=.1)), run(replace(SIN, spect_reg=.1, shared_probe=True))
    assert one['weight_norm'] != all_['weight_norm']  # one logit only: the two draw other numbers


def test_trace_changes_nothing():
    plain, traced = run(replace(DIGITS, spect_reg=.1, iters=8)), run(replace(DIGITS, spect_reg=.1, iters=8, trace=4))
    assert metrics(plain) == metrics(traced)
    assert {f'jac_{k}@{s}' for k in ('train', 'test', 'between', 'noise') for s in (0, 1, 2, 4, 8)} < set(traced)
    assert traced['jac_train@8'] == traced['jac_train'] and traced['valid@8'] == traced['valid'] and not any('@' in k for k in plain)


def test_a_trained_learner_predicts():
    learn = runs.train(DIGITS)
    pred,y = learn.get_preds(dl=learn.dls.test)
    test = learn.dls.test.dataset
    torch.testing.assert_close(pred.float(), learn.model(test.x).detach().cpu(), rtol=1e-4, atol=1e-5)
    assert torch.equal(y, test.y.cpu())


def test_only_weights_get_a_gradient():
    seen = []
    class Look(Callback):
        def after_backward(self): seen.append((self.xb[0].requires_grad, self.xb[0].grad, [p.grad for p in self.model.parameters()]))
    runs._learner(replace(DIGITS, spect_reg=.1, iters=1), None).fit(1, cbs=Look())
    (required, of_x, of_weights), = seen
    assert required and of_x is None and all(g is not None for g in of_weights)


def test_the_commit_is_that_of_the_package(monkeypatch, tmp_path):
    runs._commit.cache_clear()
    here = runs._commit()
    runs._commit.cache_clear()
    monkeypatch.chdir(tmp_path)  # no repository, or somebody else's
    assert runs._commit() == here


def test_half_sum_loss_does_not_broadcast():
    with pytest.raises(ValueError, match=r'\(4, 1\) and targets \(4,\)'): runs.HalfSumLoss()(torch.zeros(4, 1), torch.ones(4))
    assert runs.HalfSumLoss()(torch.zeros(4, 1), torch.ones(4, 1)) == 2


@pytest.mark.parametrize('name', ['jac_reg', 'confidence_penalty'])
def test_penalties_of_probabilities_refuse_one_output(name):
    with pytest.raises(ValueError, match=r'outputs of shape \(25, 1\).*two classes'): run(replace(SIN, **{name: 1.}))


def test_without_the_resource_module(monkeypatch, flat):  # Windows
    monkeypatch.setattr(runs, 'resource', None)
    assert np.isnan(run(SIN)['peak_mb']) or torch.cuda.is_available()


def test_mps_gives_way_to_the_cpu(monkeypatch, learners):
    monkeypatch.setattr(runs, 'default_device', lambda: torch.device('mps'))
    run(SIN)
    assert learners[0].dls.device.type == 'cpu'


def test_data_are_read_once_and_again_when_the_file_is_another(monkeypatch, tmp_path):
    monkeypatch.setenv('GRADREG_DATA', str(tmp_path))
    def write(seed): np.savez(tmp_path/'mine.npz', **arrays(seed=seed))
    write(0)
    first = runs._arrays('mine')
    assert runs._arrays('mine') is first
    write(1)
    os.utime(tmp_path/'mine.npz', (1, 1))
    np.testing.assert_array_equal(runs._arrays('mine').x_train, arrays(seed=1)['x_train'])
    (tmp_path/'other').mkdir()
    (tmp_path/'mine.npz').rename(tmp_path/'other'/'mine.npz')
    monkeypatch.setenv('GRADREG_DATA', str(tmp_path/'other'))
    second = runs._arrays('mine')
    np.testing.assert_array_equal(second.x_train, arrays(seed=1)['x_train'])
    assert runs._arrays('digits').x_train.shape == (797, 28, 28)  # no file at all
    assert runs._arrays('digits') is runs._arrays('digits')
