"CudaGraph: a stand-in on the CPU shows that the step is pure and trains as without; on a GPU the graph itself"
from functools import partial
import pytest, torch
from fastai.callback import schedule
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from gradreg import training
from gradreg.callbacks import ConfidencePenalty, DoubleBack, FrobReg, GradReg, JacReg, SpectReg
from gradreg.capture import CudaGraph
from gradreg.runs import Run
from nets import CPUMixedPrecision

on_each_device = pytest.mark.parametrize('device', ['cpu', 'cuda'])
sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True, fused=True)
adam = partial(OptimWrapper, opt=torch.optim.Adam, fused=True)
capturable = partial(OptimWrapper, opt=torch.optim.Adam, capturable=True)

class Watch(TorchDispatchMode):
    "No number is waited for; inputs of the step lie where they lay."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default: raise RuntimeError('a graph cannot wait for a number')
        return func(*args, **(kwargs or {}))

class StandIn:
    def __init__(self): self.recorded, self.replayed, self.generators = 0, 0, []
    def aside(self, f): f()
    def record(self, f, generators=()):
        self.recorded += 1
        self.generators += generators
        def replay():
            self.replayed += 1
            with Watch(): f()
        return replay

def net():
    return nn.Sequential(nn.Conv2d(1, 32, 5, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(.3),
                         nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32*4*4, 4))

def learner(*cbs, device='cpu', opt_func=sgd, n=48, model=None):
    torch.manual_seed(0)
    model = (model or net()).to(device)
    x, y = torch.randn(n, 1, 28, 28, device=device), torch.arange(n, device=device) % 4
    ds = [list(zip(x, y)), list(zip(x[:6], y[:6]))]
    dls = DataLoaders.from_dsets(*ds, bs=6, shuffle=False, drop_last=False, num_workers=0, device=device)
    return Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=opt_func, cbs=cbs)

def fit(*cbs, epochs=3, lr=.01, cycle=False, **kw):
    learn = learner(*cbs, **kw)
    train = schedule.Learner.fit_one_cycle if cycle else Learner.fit
    with learn.no_bar(), learn.no_logging(): train(learn, epochs, lr)
    return learn

def graph(device='cpu', **kw): return CudaGraph(recorder=StandIn() if device == 'cpu' else None, **kw)

def compare(make, device='cpu', **kw):
    ours, theirs = fit(*make(), graph(device), device=device, **kw), fit(*make(), device=device, **kw)
    close = dict(rtol=1e-4, atol=1e-5) if device == 'cpu' else dict(rtol=1e-2, atol=1e-3)  # GPUs add in any order
    assert_close(list(ours.model.state_dict().values()), list(theirs.model.state_dict().values()), **close)
    assert_close(torch.stack(ours.recorder.losses), torch.stack(theirs.recorder.losses), **close)
    for a, b in zip(ours.cbs, theirs.cbs):
        if isinstance(a, GradReg): assert_close(a.penalties, b.penalties, rtol=close['rtol'], atol=close['atol'])
    return ours

PENALTIES = {'none': lambda: [], 'spect_reg': lambda: [SpectReg(.1)], 'frob_reg': lambda: [FrobReg(.1)],
             'jac_reg': lambda: [JacReg(.1)], 'double_back': lambda: [DoubleBack(.1)],
             'lazy': lambda: [SpectReg(.1, every=2), ConfidencePenalty(.1)],
             'own generator': lambda: [SpectReg(.1, generator=None), SpectReg(.1)]}

@on_each_device
@pytest.mark.parametrize('name', PENALTIES)
def test_trains_as_without(name, device):
    learn = compare(PENALTIES[name], device)
    assert learn.cuda_graph.graphs == {} and not vars(learn.model).get('forward')

@on_each_device
@pytest.mark.parametrize('opt_func', [sgd, adam, pytest.param(capturable, marks=pytest.mark.cuda)])
def test_a_learning_rate_that_changes_at_each_step(opt_func, device):
    if device == 'cpu' and opt_func is capturable: pytest.skip('capturable needs CUDA')
    if opt_func is capturable: compare(PENALTIES['spect_reg'], device, opt_func=opt_func, cycle=True)
    class Fall(Callback):
        def before_batch(self): self.opt.set_hypers(lr=.01/(1 + self.train_iter))
    learn = compare(lambda: [Fall(), SpectReg(.1)], device, opt_func=opt_func)
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(.01/25)  # the validation batch came last

def test_one_graph_for_each_kind_of_batch():
    cb = graph()
    fit(SpectReg(.1, every=2), cb, n=50)  # the last batch of an epoch has two examples
    given = cb.given
    assert given.recorded == 2 and given.replayed == 27 - 3 - 3*2  # the short ones are never more than warm-up

def test_a_strength_that_changes_makes_a_graph_of_its_own():
    class Double(Callback):
        def before_epoch(self): self.learn.spect_reg.lam = .1*(1 + (self.epoch > 0))
    learn = compare(lambda: [SpectReg(.1), Double()])
    assert learn.cuda_graph.given.recorded == 2

def test_numbers_that_are_no_tensors_make_graphs_of_their_own():
    class Drop(Callback):
        def before_epoch(self): self.opt.set_hypers(lr=.01/(1 + self.epoch))
    plain_sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)
    assert compare(lambda: [Drop()], opt_func=plain_sgd).cuda_graph.given.recorded == 3

def test_too_many_kinds_are_said():
    class Fall(Callback):
        def before_batch(self): self.opt.set_hypers(lr=.01/(1 + self.train_iter))
    with pytest.raises(ValueError, match='4 kinds of batches'):
        fit(Fall(), graph(limit=4), opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))

def test_generators_of_the_penalties_are_registered():
    g, cb = torch.Generator().manual_seed(3), graph()
    fit(SpectReg(.1, generator=g), FrobReg(.1, generator=g), ConfidencePenalty(.1), cb)
    assert cb.given.generators[0] is g and len(cb.given.generators) == 2

class Waits(GradReg):
    def penalty(self): return self.pred.square().sum(1)*self.pred.sum().item()

def test_a_penalty_that_waits_for_a_number_is_seen():
    with pytest.raises(RuntimeError, match='wait for a number'): fit(Waits(.1), graph())

@pytest.mark.parametrize('cbs,kw,words', [
    ([GradientAccumulation(4)], {}, 'gradient_accumulation acts within'),
    ([GradientClip(1.)], {}, 'gradient_clip acts'), ([], dict(opt_func=Adam), 'opt_func=partial'),
    ([], dict(opt_func=partial(OptimWrapper, opt=torch.optim.Adam)), 'fused')])
def test_refused(cbs, kw, words):
    with pytest.raises(ValueError, match=words): fit(*cbs, graph(), **kw)

def test_mixed_precision_is_refused():
    class Half(CPUMixedPrecision):
        def before_batch(self): pass  # a batch that is refused would never leave autocast
    with pytest.raises(ValueError, match='half acts within'): fit(Half(torch.bfloat16), graph())

def test_only_cuda():
    with pytest.raises(ValueError, match='leave it out'): fit(CudaGraph())

def test_declared_callbacks_may_act_within():
    class Clamp(Callback):
        capturable = True
        def before_step(self):
            for p in self.model.parameters(): p.grad.clamp_(-.01, .01)
    compare(lambda: [SpectReg(.1), Clamp()])

def test_a_broken_fit_can_be_followed_by_another():
    class Break(Callback):
        def after_batch(self):
            if self.training and self.train_iter == 6: raise CancelFitException
    learn = learner(SpectReg(.1), graph())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, .01, cbs=Break())
        learn.fit(1, .01)
    assert len(learn.spect_reg.penalties) == 8 and learn.validate()[0] > 0

# ---------------------------------------------------------------- the study's training

def trained(r, *cbs):
    learn = training.learner(r, 'cpu')
    with training.one_thread(), training.arithmetic(r, learn): learn.fit(5, r.lr, cbs=cbs)
    return learn

@pytest.mark.parametrize('kw', [dict(spect_reg=.03, every=4), dict(double_back=1., frob_reg=.01, p_drop=.5),
                                dict(spect_reg=.03, bn=True, precision='bf16'), dict(spect_reg=.03, trace=3)], ids=str)
def test_a_run_trains_as_without(kw):
    r = Run(data='digits', n_train=100, n_valid=100, bs=25, iters=20, opt='sgd', lr=.01, **kw)
    stand_in = StandIn()
    ours, theirs = trained(r, CudaGraph(recorder=stand_in, warmup=1)), trained(r)
    assert stand_in.replayed > 5
    close = dict(rtol=1e-4, atol=1e-6)
    assert_close(list(ours.model.parameters()), list(theirs.model.parameters()), **close)
    if r.trace: assert ours.trace.found == pytest.approx(theirs.trace.found, rel=1e-3)
    for a, b in zip(ours.cbs, theirs.cbs):
        if isinstance(a, GradReg): assert_close(a.penalties, b.penalties, rtol=1e-3, atol=1e-6)

@pytest.mark.cuda
@pytest.mark.parametrize('kw', [
    dict(spect_reg=.03, every=4), dict(double_back=1., p_drop=.5), dict(frob_reg=.01, bn=True),
    dict(spect_reg=.03, precision='bf16'), dict(spect_reg=.03, trace=3, opt='sgd', lr=.01)], ids=str)
def test_a_run_on_cuda_trains_as_without(kw):
    r = Run(data='digits', n_train=100, n_valid=100, bs=25, iters=60, **kw)
    with_graph, without = training.learner(r, 'cuda'), training.learner(r, 'cuda')
    without.remove_cb(without.cuda_graph)
    for learn in with_graph, without:
        with training.arithmetic(r, learn): learn.fit(15, r.lr)
    assert_close(list(with_graph.model.parameters()), list(without.model.parameters()), rtol=.05, atol=5e-3)
