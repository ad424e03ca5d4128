"What a reader of chapter 13_training need not see: each field in what it trains, traces, machines, own entries."
import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from torch import nn
from torch.utils.data import TensorDataset

from gradreg import callbacks, penalties, training
from gradreg.data import ArrayDataLoaders
from gradreg.runs import REGULARIZERS, Run, Task, resolve
from gradreg.training import HalfSumLoss, loaders, network, rehearse, run, task_of, top5
from samples import DIGITS, METRICS, SIN, metrics


@pytest.fixture
def flat(monkeypatch):
    "`run` without the slopes, its slowest part here"
    monkeypatch.setattr(training, 'jac_norms', lambda model, x: torch.zeros(1))


@pytest.fixture
def learners(monkeypatch):
    "The Learners that `run` makes, in order"
    made, original = [], training.learner
    def spy(*args):
        made.append(original(*args))
        return made[-1]
    monkeypatch.setattr(training, 'learner', spy)
    return made


# one run; the loop written by hand that it is compared with stands in the chapter

def distance(a, b): return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize('r', [replace(SIN, iters=9, seed=2), replace(DIGITS, iters=8, seed=1)], ids=['sin', 'digits'])
def test_the_row_is_the_networks(r, learners):
    "Its numbers, computed from the trained network without our measures"
    row = run(r)
    dls, model = learners[0].dls, learners[0].model.eval()
    for name, dl in zip(('train', 'valid', 'test'), dls):
        with torch.no_grad(): pred, y = model(dl.dataset.x), dl.dataset.y
        expected = (pred - y).square().mean() if r.data == 'sin' else (pred.argmax(1) == y).float().mean()
        assert row[name] == pytest.approx(expected.item(), rel=1e-3)
    weights = sum(p.square().sum().item() for p in model.parameters() if p.ndim > 1)
    assert row['weight_norm'] == pytest.approx(weights, rel=1e-5)
    x = dls.train.dataset.x[:50].clone().requires_grad_()
    J = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x)  # the sum takes the examples apart
    assert row['jac_train'] == pytest.approx(J.transpose(0, 1).flatten(1).norm(dim=1).mean().item(), rel=1e-4)
    assert 'test_top5' not in row


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
    about = {'seconds', 'peak_mb', 'device', 'threads', 'python', 'torch', 'fastai', 'commit', 'spect_reg_end'}
    assert set(first) >= {f.name for f in fields(Run)} | about
    assert first['threads'] == 1 and first['torch'] == torch.__version__
    assert first['seconds'] > 0 and first['peak_mb'] > 50


@pytest.mark.parametrize('field', REGULARIZERS)
def test_regularizer_field(field, learners, flat):
    r = replace(DIGITS, **{field: .25}, every=2, probe='rademacher', iters=3)
    row = run(r)
    cb, = [o for o in learners[0].cbs if isinstance(o, callbacks.GradReg)]
    assert type(cb).__name__.lower() == field.replace('_', '') and (cb.lam, cb.every) == (.25, 2)
    assert len(cb.penalties) == 2 and row[f'{field}_end'] == pytest.approx(np.mean(cb.penalties))
    if field == 'spect_reg': assert cb.probe is penalties.rademacher and cb.generator is torch.default_generator
    run(replace(r, **{field: 0}))
    assert not [o for o in learners[1].cbs if isinstance(o, callbacks.GradReg)]
    assert distance(learners[0].model, learners[1].model) > 1e-5


def test_regularizers_combine(learners, flat):
    row = run(replace(SIN, spect_reg=.01, double_back=.02, iters=3))
    found = {(type(o).__name__, o.lam) for o in learners[0].cbs if isinstance(o, callbacks.GradReg)}
    assert found == {('SpectReg', .01), ('DoubleBack', .02)}
    assert row['spect_reg_end'] > 0 and row['double_back_end'] > 0


def test_dropout_and_batchnorm(learners, flat):
    run(replace(DIGITS, p_drop=.25, iters=1))
    run(replace(DIGITS, bn=True, iters=1))
    kinds = [{type(m): m for m in o.model.modules()} for o in learners]
    assert kinds[0][nn.Dropout].p == .25 and nn.BatchNorm1d not in kinds[0]
    assert nn.BatchNorm1d in kinds[1] and nn.Dropout not in kinds[1]


@pytest.mark.parametrize('kwargs,words', [
    (dict(n_train=55), 'n_train=55.*10 classes'), (dict(model='mlp'), r'mlp takes .*\(N,1\), not \(25, 784\)'),
    (dict(data='nothing'), 'nothing'), (dict(bs=51), 'bs=51'), (dict(n_valid=10**6), 'n_valid=1000000'),
    (dict(data='sin'), r'lenet5 takes .*\(N,1,28,28\), not \(25, 1\)'), (dict(model='cifar_resnet12'), r'\(N,3,H,W\)'),
    (dict(data='sin', model='mlp', bn=True), 'bn=True on mlp'),
    (dict(model='resnet18', p_drop=.5), 'p_drop=0.5 on resnet18'),
    (dict(model='no_such_room:net'), "no module 'no_such_room'"), (dict(model='gradreg.models:net'), "has no 'net'"),
    (dict(precision='tf32'), 'tf32.*only NVIDIA'), (dict(penalty='gradreg.models:mlp', strength=1.), 'mlp.*GradReg'),
    (dict(confidence_penalty=1., at='0'), "at='0'")])
def test_what_cannot_work_says_why(kwargs, words):
    for f in run, rehearse:
        with pytest.raises(ValueError, match=words): f(replace(DIGITS, **kwargs), 'cpu')


@pytest.mark.parametrize('device', ['cuda:99', 'gpu', 7.5, 'tpu'])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f'^device={device!r}'): run(SIN, device)


def test_a_rehearsal_sees_what_comes_at_the_end(monkeypatch):
    "And is a step long"
    with monkeypatch.context() as m:
        m.setattr(training, 'jac_norms', lambda model, x: 1/0)
        with pytest.raises(ZeroDivisionError): rehearse(replace(SIN, iters=10**9, trace=10**9))
    assert set(rehearse(replace(SIN, iters=10**9))) == {'status', *METRICS}


# the commit

@pytest.fixture
def no_git(monkeypatch):
    monkeypatch.setenv('PATH', '')
    training._git.cache_clear()
    yield monkeypatch
    training._git.cache_clear()


def test_without_git(no_git):
    assert run(replace(SIN, iters=1))['commit'] == ''
    no_git.setenv('GRADREG_COMMIT', 'abc1234')
    assert run(replace(SIN, iters=1))['commit'] == 'abc1234'


def test_the_commit_is_that_of_the_package(monkeypatch, tmp_path):
    training._git.cache_clear()
    here = training._git()
    training._git.cache_clear()
    monkeypatch.chdir(tmp_path)  # no repository, or somebody else's
    assert training._git() == here


def test_shared_probe():
    one, all_ = run(replace(SIN, spect_reg=.1)), run(replace(SIN, spect_reg=.1, shared_probe=True))
    assert one['weight_norm'] != all_['weight_norm']  # one logit only: the two draw other numbers


def test_trace_changes_nothing():
    plain, traced = run(replace(DIGITS, spect_reg=.1, iters=8)), run(replace(DIGITS, spect_reg=.1, iters=8, trace=4))
    assert metrics(plain) == metrics(traced)
    assert {f'jac_{k}@{s}' for k in ('train', 'test', 'between', 'noise') for s in (0, 1, 2, 4, 8)} < set(traced)
    assert traced['jac_train@8'] == traced['jac_train'] and traced['valid@8'] == traced['valid']
    assert not any('@' in k for k in plain)


def test_a_trained_learner_predicts():
    learn = training.train(DIGITS)
    pred,y = learn.get_preds(dl=learn.dls.test)
    test = learn.dls.test.dataset
    torch.testing.assert_close(pred.float(), learn.model(test.x).detach().cpu(), rtol=1e-4, atol=1e-5)
    assert torch.equal(y, test.y.cpu())


def test_only_weights_get_a_gradient():
    seen = []
    class Look(Callback):
        def after_backward(self):
            x = self.xb[0]
            seen.append((x.requires_grad, x.grad, [p.grad for p in self.model.parameters()]))
    training.learner(replace(DIGITS, spect_reg=.1, iters=1)).fit(1, cbs=Look())
    (required, of_x, of_weights), = seen
    assert required and of_x is None and all(g is not None for g in of_weights)


def test_half_sum_loss_does_not_broadcast():
    with pytest.raises(ValueError, match=r'\(4, 1\) and targets \(4,\)'):
        HalfSumLoss()(torch.zeros(4, 1), torch.ones(4))
    assert HalfSumLoss()(torch.zeros(4, 1), torch.ones(4, 1)) == 2


@pytest.mark.parametrize('name', ['jac_reg', 'confidence_penalty'])
def test_penalties_of_probabilities_refuse_one_output(name):
    with pytest.raises(ValueError, match=r'outputs of shape \(25, 1\).*two classes'): run(replace(SIN, **{name: 1.}))


def test_without_the_resource_module(monkeypatch, flat):  # Windows
    monkeypatch.setattr(training, 'resource', None)
    assert np.isnan(run(SIN)['peak_mb']) or torch.cuda.is_available()


def test_mps_gives_way_to_the_cpu(monkeypatch, learners):
    monkeypatch.setattr(training, 'default_device', lambda: torch.device('mps'))
    run(SIN)
    assert learners[0].dls.device.type == 'cpu'


# precision

def test_bf16_is_coarser_and_nothing_else(learners, flat):
    r = replace(DIGITS, spect_reg=.1, opt='sgd', lr=.01)
    fine, coarse = run(r), run(replace(r, precision='bf16'))
    a, b = (o.model for o in learners)
    assert 0 < distance(a, b) < .1*distance(a, training.learner(r).model)
    assert all(p.dtype == torch.float32 for p in b.parameters())
    assert coarse['spect_reg_end'] == pytest.approx(fine['spect_reg_end'], rel=.05) and coarse['precision'] == 'bf16'
    assert not torch.is_autocast_enabled('cpu')


def test_bf16_is_for_the_forward_pass():
    seen = []
    def look(x): seen.append((x.dtype, torch.is_autocast_enabled('cpu')))
    class Look(Callback):
        def after_pred(self): look(self.pred)
        def after_loss(self): look(self.loss_grad)
    r = replace(DIGITS, precision='bf16', spect_reg=.1, iters=1)
    learn = training.learner(r)
    learn.model[-1].register_forward_hook(lambda m, i, o: look(o))
    with training.arithmetic(r, learn): learn.fit(1, cbs=Look())
    assert seen == [(torch.bfloat16, True), (torch.float32, False), (torch.float32, False)]
    learn.model[-1].register_forward_hook(lambda m, i, o: 1/0)
    with pytest.raises(ZeroDivisionError), training.arithmetic(r, learn): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu')  # although the forward pass broke


def test_float32_is_float32(monkeypatch):
    "No TF32 in a run's convolutions and products, and PyTorch's setting again afterwards"
    seen = []
    def look(*args): seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
    monkeypatch.setattr(training, '_outcome', lambda *args: look() or {})
    monkeypatch.setattr(training.Iterations, 'before_batch', look)
    before = torch.backends.cudnn.allow_tf32
    run(replace(SIN, iters=1))
    assert seen == [(False, False)]*2 and torch.backends.cudnn.allow_tf32 == before


# entries of one's own

def my_loaders(n_train, n_valid, seed, bs, device):
    "Plain fastai over plain tensors: two numbers in, twelve classes out"
    g = torch.Generator().manual_seed(seed)
    def part(n):
        x = torch.randn(n, 2, generator=g)
        return TensorDataset(x, (6*x[:, 0].sigmoid()).long() + 6*(x[:, 1] > 0))
    dls = DataLoaders.from_dsets(part(n_train), part(n_valid), bs=bs, device=device, shuffle=True)
    dls.test, dls.task, dls.c = dls.valid.new(dataset=part(64)), 'classification', 12
    return dls


def my_net(n_out): return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, n_out))


class GapReg(callbacks.GradReg):
    def penalty(self): return self.scaled(penalties.frob_reg, self.pred)


class Mine:  # a loss and a score: the sum of errors in millimetres, the less the better
    task = Task(nn.L1Loss, lambda model, x, y: (model(x) - y).abs().mean().item(), 'error', more=False, unit=' mm',
                scale=1)
    @staticmethod
    def loaders(*args):
        dls = resolve('gradreg.data:sin_loaders')(*args)
        dls.task = Mine.task
        return dls


def mine(name): return f'{__name__}:{name}'


def test_ones_own_data_network_and_penalty(learners):
    r = Run(data=mine('my_loaders'), model=mine('my_net'), penalty=mine('GapReg'), strength=.1, n_train=200, n_valid=64,
            bs=20, iters=60, lr=1e-2)
    row = run(r)
    model, (x, y) = learners[0].model, learners[0].dls.test.dataset.tensors
    assert row['status'] == 'ok' and row['gap_reg_end'] > 0 and row['test'] > .25  # chance: .08
    assert row['test'] == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    place = (model(x) > model(x).gather(1, y[:, None])).sum(1)
    assert row['test_top5'] == pytest.approx((place < 5).float().mean().item()) and row['test_top5'] > row['test']
    assert task_of(r).metric == 'accuracy' and metrics(run(r)) == metrics(row)
    assert run(replace(r, strength=0, iters=1))['penalty'] == mine('GapReg')


def test_ones_own_task(monkeypatch, learners):
    monkeypatch.setattr('sys.modules', {**__import__('sys').modules, 'mine': Mine})
    r = replace(SIN, data='mine:loaders')
    row = run(r)
    data = learners[0].dls.valid.dataset
    assert row['valid'] == pytest.approx((learners[0].model(data.x) - data.y).abs().mean().item(), rel=1e-4)
    assert task_of(r) is Mine.task and 'test_top5' not in row


@pytest.mark.parametrize('lacks', ['test', 'task', 'c'])
def test_loaders_that_lack_something(lacks, monkeypatch):
    def load(*args):
        dls = my_loaders(*args)
        delattr(dls, lacks)
        return dls
    monkeypatch.setattr(training, 'image_loaders', lambda name, *args: load(*args))
    with pytest.raises(ValueError, match=f'have no {lacks}'): loaders(DIGITS, 'cpu')


def test_an_unknown_task(monkeypatch):
    monkeypatch.setattr(ArrayDataLoaders, 'task', 'chess', raising=False)
    with pytest.raises(ValueError, match="task='chess'.*classification"): run(DIGITS)


def test_builders():
    class Net(nn.Linear):  # a class is a builder too, and an argument of one's own with a default stays as it is
        def __init__(self, n_out, bn=False, width=2): super().__init__(width, n_out + bn)
    training.NETWORKS['net'] = Net
    try: assert network(Run(model='net', bn=True), 3).out_features == 4
    finally: del training.NETWORKS['net']


def test_an_error_inside_ones_own_module_is_not_hidden(monkeypatch, tmp_path):
    (tmp_path/'my_broken.py').write_text('import no_such_library')
    (tmp_path/'my_wrong.py').write_text('1/0')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match='no_such_library'): resolve('my_broken:net')
    with pytest.raises(ZeroDivisionError): resolve('my_wrong:net')
    with pytest.raises(ValueError, match="no module 'my_absent.nets'"): resolve('my_absent.nets:net')


def test_top5_of_few_classes_is_all():
    assert top5(nn.Identity(), torch.randn(9, 5), torch.arange(9) % 5) == 1
