"The penalties in a fastai Learner: what is known to go wrong (by the number of the pitfall), and what users do"
import copy, gc, inspect, math, re, sys, warnings, weakref
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.hook import module_summary
from fastai.callback.rnn import RNNCallback
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.learner import CastToTensor, Learner, load_learner
from fastai.losses import (BCELossFlat, BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, FocalLossFlat,
                           L1LossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat)
from fastai.metrics import accuracy
from fastai.optimizer import Adam, SGD
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import EmbeddingDropout
from fastai.text.models.core import PoolingLinearClassifier, SentenceEncoder, SequentialRNN
from fastai.torch_core import TensorImage, params
from torch import nn
from torch.func import functional_call, grad_and_value, jacrev, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.data import TensorDataset
from gradreg.callbacks import ConfidencePenalty, DoubleBack, FrobReg, GradReg, JacReg, SpectReg
from gradreg.data import ArrayDL, ArrayDS
from gradreg.jacobians import NoSecondDerivative
from gradreg.penalties import (class_axis, frob_reg, gaussian, global_generator, one_direction, rademacher, spect_reg,
                               sphere)
from gradreg.runs import REGULARIZERS, resolve
from nets import F64, CPUMixedPrecision, rowwise

PENALTIES = [*map(resolve, REGULARIZERS.values())]

DEV = 'cuda' if torch.cuda.is_available() else 'cpu'
rng = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 1, 6, 6, dtype=F64, generator=rng), torch.arange(24) % 3
VALID = torch.randn(8, 1, 6, 6, dtype=F64, generator=rng), torch.arange(8) % 3

def seq(*layers): return nn.Sequential(*layers).double()
def conv():
    head = nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    return seq(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), *head)
def inplace(): return nn.Sequential(*((net := conv())[:1]), nn.ReLU(inplace=True), *net[2:])
def dropout(): return seq(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Dropout(.5), nn.Linear(16, 3))
def bnorm(): return seq(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

def loaders(x=X, y=Y, bs=8, valid=VALID, device=DEV, **kw):
    return DataLoaders(*(ArrayDL(ArrayDS(*o), bs, device=device, **kw) for o in ((x, y), valid)), device=device)

class Log32(Callback):
    "fastai's Recorder wants float32; what is differentiated stays float64"
    order = -1
    def after_loss(self): self.learn.loss = self.learn.loss.float()

def learner(*cbs, net=conv, dls=None, loss_func=None, opt_func=SGD, **kw):
    dls = dls or loaders()
    torch.manual_seed(0)
    loss_func = loss_func or nn.CrossEntropyLoss()
    return Learner(dls, net().to(dls.device), loss_func=loss_func, opt_func=opt_func, cbs=[Log32(), *cbs], **kw)

def run(learn, epochs=1, lr=.1, **kw):
    torch.manual_seed(1)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr, **kw)
    return learn

def fit(*cbs, epochs=1, lr=.1, **kw): return run(learner(*cbs, **kw), epochs, lr)
def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]
def same(a, b): return all(torch.equal(p, q) for p, q in zip(weights(a), weights(b)))

class Spy(Callback):
    "What the loop holds in each batch, after everybody else"
    order = 70
    def before_fit(self): self.batches, self.grads = [], []
    def before_batch(self):
        needs_grad = getattr(self.x, 'requires_grad', None)  # of several inputs, x is a tuple
        self.batches.append(SimpleNamespace(training=self.training, x=self.x, kind=type(self.x), needs_grad=needs_grad))
    def after_loss(self): vars(self.batches[-1]).update(y=self.y, loss=self.learn.loss.detach().clone())
    def before_step(self):
        self.grads.append({k: p.grad.clone() for k, p in self.model.named_parameters() if p.grad is not None})

# each callback at a strength, and its penalty of one example: g is the net, o an input, t target probabilities
def loss_of(z, t): return -(t*z.log_softmax(0)).sum()
def square(f, o): return jacrev(f)(o).square().sum()
def projected(z): return (z*(z.detach().cos() + .1)).sum()
CASES = {'DoubleBack': (lambda lam=5., **kw: DoubleBack(lam, **kw),
                        lambda g, o, t: square(lambda o: loss_of(g(o), t), o)),
         'FrobReg': (lambda lam=2., **kw: FrobReg(lam, **kw), lambda g, o, t: square(g, o)),
         'JacReg': (lambda lam=20., **kw: JacReg(lam, **kw), lambda g, o, t: square(lambda o: g(o).softmax(0), o)),
         'SpectReg': (lambda lam=2., **kw: SpectReg(lam, probe=rowwise, **kw),
                      lambda g, o, t: square(lambda o: projected(g(o)), o)),
         'ConfidencePenalty': (lambda lam=2., **kw: ConfidencePenalty(lam, **kw),
                               lambda g, o, t: (g(o).softmax(0)*g(o).log_softmax(0)).sum())}
each = pytest.mark.parametrize('name', CASES)
each_gradient = pytest.mark.parametrize('name', [k for k in CASES if k != 'ConfidencePenalty'])

def witness(net, x, t, name, lam, loss_of=loss_of, pen_of=None):
    "Mean penalty and gradients of mean loss + lam * mean penalty, by torch.func in float64, one example at a time"
    net, x, pen_of = copy.deepcopy(net).double(), x.detach().double(), pen_of or CASES[name][1]
    if t.is_floating_point(): t = t.double()
    def total(ps):
        g = lambda o: functional_call(net, ps, (o[None],))[0]
        pen = vmap(lambda o, t: pen_of(g, o, t), randomness='error')(x, t).mean()
        return vmap(lambda o, t: loss_of(g(o), t))(x, t).mean() + lam*pen, pen
    ps = {k: p.detach() for k, p in net.named_parameters()}
    grads, (_, pen) = grad_and_value(lambda ps: total(ps), has_aux=True)(ps)
    return pen.item(), grads

def onehot(y, c=3): return F.one_hot(torch.as_tensor(y), c)

def check_grads(got, want, rtol):
    assert got.keys() == want.keys()
    for k in want:
        atol = rtol*want[k].abs().max().item()
        assert_close(got[k].double(), want[k], rtol=rtol, atol=atol, msg=lambda m: f'{k}: {m}')

def first_step(cb, *cbs, **kw):
    "The fit, the spy, and the net as it was before"
    spy = Spy()
    learn = learner(cb, *cbs, spy, **kw)
    before = copy.deepcopy(learn.model)
    run(learn)
    return learn, spy, before


# 13, 14: the very gradient that is meant

@each
def test_pitfalls_13_14_the_gradient_of_a_step(name):
    "Four-dimensional inputs; the penalty reaches the weights with the strength it should have"
    cb = CASES[name][0]()
    learn, spy, before = first_step(cb)
    x, y = learn.dls.train.one_batch()
    pen, want = witness(before, x, onehot(y), name, cb.lam)
    _, plain = witness(before, x, onehot(y), name, 0)
    assert_close(cb.penalties[0], pen, rtol=1e-9, atol=0)
    check_grads(spy.grads[0], want, 1e-9)
    assert max(((want[k] - plain[k]).norm()/plain[k].norm()).item() for k in plain if plain[k].norm() > 0) > .05
    assert len(cb.penalties) == 3

@each
def test_every_kth_batch(name):
    "k times as strong on each k-th batch, and the plain step on the others"
    spy, cb = Spy(), CASES[name][0](every=2)
    learn = learner(cb, spy)
    before = copy.deepcopy(learn.model)
    run(learn, lr=0.)
    train = [b for b in spy.batches if b.training]
    for i, b in enumerate(train):
        lam = 2*cb.lam if i % 2 == 0 else 0
        check_grads(spy.grads[i], witness(before, b.x, onehot(b.y), name, lam)[1], 1e-9)
    assert [b.needs_grad for b in train] == [name != 'ConfidencePenalty', False, name != 'ConfidencePenalty']
    assert len(cb.penalties) == 2  # of three batches

def test_several_penalties_add_up():
    a, b, c = FrobReg(2.), ConfidencePenalty(2.), SpectReg(2., probe=rowwise)
    for cbs in (a, b, c), (c, b, a):
        learn, spy, before = first_step(*cbs)
        x, y = learn.dls.train.one_batch()
        parts = [witness(before, x, onehot(y), n, 2.)[1] for n in ('FrobReg', 'ConfidencePenalty', 'SpectReg')]
        plain = witness(before, x, onehot(y), 'FrobReg', 0)[1]
        check_grads(spy.grads[0], {k: sum(p[k] for p in parts) - 2*plain[k] for k in plain}, 1e-9)
        assert len(a.penalties) == len(b.penalties) == len(c.penalties) == 3

def test_two_of_one_class():
    cbs = SpectReg(1., probe=rowwise), SpectReg(3., probe=lambda z: 2*rowwise(z))
    learn, spy, before = first_step(*cbs, metrics=accuracy)
    x, y = learn.dls.train.one_batch()
    check_grads(spy.grads[0], witness(before, x, onehot(y), 'SpectReg', 1 + 3*4)[1], 1e-9)
    assert_close(cbs[1].penalties[0], 4*cbs[0].penalties[0], rtol=1e-9, atol=0)
    assert len(learn.recorder.values[-1]) == 5 and learn.metrics.attrgot('name') == ['accuracy']


# lam

@pytest.mark.parametrize('net,opt_func', [(conv, SGD), (dropout, Adam), (bnorm, SGD)])
@pytest.mark.parametrize('cb', PENALTIES)
def test_lam_0_changes_nothing_bit_for_bit(cb, net, opt_func):
    kw = dict(net=net, opt_func=opt_func, epochs=2)
    plain, spy = fit(**kw), Spy()
    off = fit(cb(0), spy, **kw)
    assert same(plain, off) and all(torch.equal(a, b) for a, b in zip(plain.model.buffers(), off.model.buffers()))
    assert plain.recorder.losses == off.recorder.losses
    assert not any(b.needs_grad for b in spy.batches)
    assert not same(plain, fit(cb(1e-3), **kw))

@pytest.mark.parametrize('lam', [-1, -1e-12, math.nan, math.inf, -math.inf, None, [1], '1', 1j])
@each
def test_bad_lam(name, lam):
    said = re.escape(f'lam={lam!r}') + ': .*finite number, at least 0'
    with pytest.raises(ValueError, match=said): CASES[name][0](lam)

def test_numpys_numbers_are_strengths(): assert not same(fit(), fit(FrobReg(np.float32(.1))))

@pytest.mark.parametrize('every', [0, -1, 1.5, 2., '2', None])
@each
def test_bad_every(name, every):
    said = re.escape(f'every={every!r}') + ': .*whole number, at least 1'
    with pytest.raises(ValueError, match=said): CASES[name][0](every=every)


# 1: mixed precision

def floats(**kw):
    dls = loaders(X.float(), valid=(VALID[0].float(), VALID[1]), device='cpu', **kw)
    return dict(dls=dls, net=lambda: conv().float())

@pytest.mark.parametrize('dtype,rtol', [(torch.float16, .02), (torch.bfloat16, .15)])
@each
def test_pitfall_01_mixed_precision_gives_the_gradient_of_float64(name, dtype, rtol):
    cb, amp = CASES[name][0](), CPUMixedPrecision(dtype)
    learn, spy, before = first_step(cb, amp, **floats())
    x, y = learn.dls.train.one_batch()
    pen, want = witness(before, x, onehot(y), name, cb.lam)
    assert abs(cb.penalties[0]/pen - 1) < rtol
    for k, g in spy.grads[0].items(): assert (g - want[k]).norm() < rtol*want[k].norm() + 1e-6, k
    assert len(spy.grads) == 3  # no step was skipped
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())

def test_a_scaler_in_the_model_is_no_gradient_scaler():
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(*conv())
            self.scaler = nn.Identity()
        def forward(self, x):
            for layer in list(self)[:-1]: x = layer(x)
            return self.scaler(x)
    cb = SpectReg(1.)
    run(learner(cb, net=lambda: Net().double()), lr=1e-3)
    assert all(p > 0 for p in cb.penalties)

@each_gradient
def test_pitfall_01_fp16_does_not_underflow(name):
    "Three layers with modest weights, whose product is less than fp16 can hold; the strength makes up for it"
    def tiny():
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.Linear(32, 32), nn.Linear(32, 3))
        for layer in net[1:]: layer.weight.data.mul_(.005)
        return net
    def step(lam, *cbs, unscaled=False):
        cb, spy = CASES[name][0](lam), Spy()
        if unscaled: cb.scaled = lambda penalty, y, *args, **kw: penalty(y, cb.x, *args, **kw)
        run(learner(cb, spy, *cbs, **{**floats(), 'net': tiny}), lr=1e-20)
        return cb.penalties[0], torch.cat([spy.grads[0][k].flatten() for k in spy.grads[0] if 'weight' in k])
    pen, plain = step(1e-30)
    lam = 1e-5/pen  # the penalty's gradient comes to a hundredth, a number that fp16 holds well
    full, g_full = step(lam)
    half, g_half = step(lam, CPUMixedPrecision())
    bare, g_bare = step(lam, CPUMixedPrecision(), unscaled=True)
    size = (g_full - plain).norm()
    assert .005 < size < .05 and (g_half - g_full).norm() < .05*size < .9*size < (g_bare - g_full).norm()
    assert abs(half/full - 1) < .01 and abs(bare/full - 1) > .5

def test_pitfall_01_an_overflow_skips_the_step():
    "The scaler sees an infinite penalty like any other overflow: no weight changes, the scale is halved"
    def steep():
        net = conv().float()
        net[-1].weight.data.mul_(3e4)
        return net
    cb, amp, spy = FrobReg(1.), CPUMixedPrecision(), Spy()
    learn = learner(cb, amp, spy, **{**floats(), 'net': steep})
    before, scales = weights(learn), []
    def scale(self):
        if self.training: scales.append(self.learn.scaler.get_scale())
    run(learn, cbs=Callback(after_batch=scale))
    assert spy.grads == [] and all(torch.equal(a, b) for a, b in zip(before, weights(learn)))
    assert scales == [2.**15, 2.**14, 2.**13]

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_pitfall_01_autocast_is_off_around_the_penalty(dtype):
    seen = []
    class Look(SpectReg):
        def penalty(self):
            seen.append((torch.is_autocast_enabled('cpu'), self.pred.dtype, self.x.dtype))
            out = super().penalty()
            seen.append(out.dtype)
            return out
    inside = []
    forward = Callback(after_pred=lambda self: inside.append(torch.is_autocast_enabled('cpu')))
    fit(Look(1.), CPUMixedPrecision(dtype), forward, **floats())
    assert seen == [(False, torch.float32, torch.float32), torch.float32]*3 and all(inside[:3])


# 2: order of the callbacks

def test_pitfall_02_order():
    assert MixUp.order <= 0 < GradReg.order < GradientAccumulation.order < MixedPrecision.order
    for cls in PENALTIES:
        assert cls.order == GradReg.order and not cls.run_valid

@each
def test_pitfall_02_gradient_accumulation(name):
    f = CASES[name][0]
    whole = fit(f(), GradientAccumulation(8), dls=loaders(bs=8))
    parts = fit(f(), GradientAccumulation(8), dls=loaders(bs=1))
    assert_close(weights(whole), weights(parts), rtol=1e-9, atol=1e-12)
    assert_close(weights(whole), weights(fit(f())), rtol=1e-9, atol=1e-12)
    late = f()
    late.order = GradientAccumulation.order + 1  # behind the division: eight times too strong
    wrong = fit(late, GradientAccumulation(8), dls=loaders(bs=1))
    assert max((a - b).abs().max() for a, b in zip(weights(whole), weights(wrong))) > 1e-4

@each
def test_pitfall_02_accumulation_and_fp16_together(name):
    f = CASES[name][0]
    whole, parts = (fit(f(), CPUMixedPrecision(), GradientAccumulation(8), **floats(bs=bs)) for bs in (8, 2))
    start = learner(**floats())
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights(whole), weights(start))])
    apart = torch.cat([(a - b).flatten() for a, b in zip(weights(whole), weights(parts))])
    assert apart.norm() < .02*moved.norm()

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@each
def test_pitfall_02_mixup_and_cutmix(name, mix):
    "The penalty is taken at the mixed inputs, DoubleBack's of the mixed loss: target probabilities say it by hand"
    cb, mixer, grabbed = CASES[name][0](), mix(), []
    loss_func = CrossEntropyLossFlat()
    def grab(self):
        if self.training: grabbed.append([o.detach().clone() for o in (self.x, self.y, mixer.yb1[0], mixer.lam)])
    learn, spy, before = first_step(cb, mixer, Callback(after_pred=grab), loss_func=loss_func, **floats())
    x, y, y1, lam = grabbed[0]
    lam = lam.double().view(-1, 1)
    t = lam*onehot(y) + (1 - lam)*onehot(y1)
    plain, _ = learn.dls.train.one_batch()
    assert not torch.equal(x, plain) and ((t > 0).sum(1) > 1).any()
    pen, want = witness(before, x, t, name, cb.lam)
    assert abs(cb.penalties[0]/pen - 1) < 1e-4
    check_grads(spy.grads[0], want, 1e-3)
    unmixed, _ = witness(before, x, onehot(y), name, cb.lam)
    assert (abs(unmixed/pen - 1) > .01) == (name == 'DoubleBack')  # the others do not know the loss
    assert learn.loss_func is loss_func and loss_func.reduction == 'mean'

def test_pitfall_02_the_logged_loss_stays_the_plain_loss():
    plain, on = (fit(*cbs, lr=0.) for cbs in ((), (FrobReg(100.),)))
    assert plain.recorder.losses == on.recorder.losses and plain.recorder.values[0] == on.recorder.values[0][:2]


# 3: tensor subclasses

def images(b): return b[0].as_subclass(TensorImage), b[1]

def fit_images(*cbs, cast, lr=.1, **kw):
    learn = learner(*cbs, dls=loaders(after_batch=images), **kw)
    if not cast: learn.remove_cb(CastToTensor)  # older habits: the model sees fastai's types
    return run(learn, lr=lr)

@pytest.mark.parametrize('cast', [True, False])
@each_gradient
def test_pitfall_03_tensor_images(name, cast):
    off, spy = Spy(), Spy()
    fit_images(off, cast=cast)
    assert {b.kind for b in off.batches} == {torch.Tensor if cast else TensorImage}
    on = fit_images(CASES[name][0](), spy, cast=cast)
    assert_close(weights(on), weights(fit(CASES[name][0]())), rtol=1e-9, atol=1e-12)
    assert [(o.kind, o.needs_grad) for o in spy.batches if o.training] == [(torch.Tensor, True)]*3


# 4: validation

@each
def test_pitfall_04_validation_is_untouched(name):
    spy = Spy()
    kw = dict(net=dropout, metrics=accuracy, lr=0., cast=False)
    plain, on = fit_images(**kw), fit_images(CASES[name][0](), spy, **kw)
    assert plain.recorder.values[0] == on.recorder.values[0][:3]  # train_loss, valid_loss, accuracy
    assert [(b.kind, b.needs_grad) for b in spy.batches if not b.training] == [(TensorImage, False)]
    with on.no_bar(): assert plain.validate() == on.validate() and torch.equal(plain.get_preds()[0], on.get_preds()[0])

def test_pitfall_04_validate_and_get_preds_outside_of_a_fit():
    "fastai sends `before_fit` for these too: no column, the record stays, and a compiled model may predict"
    cb = FrobReg(1.)
    learn = learner(cb, metrics=accuracy)
    with learn.no_bar(): before = learn.validate()
    assert len(before) == 2
    run(learn)
    record, mets = list(cb.penalties), list(learn.metrics)
    with learn.no_bar():
        assert len(learn.validate()) == 2 and len(learn.validate(ds_idx=0)) == 2
        want = learn.get_preds()[0]
        assert not want.requires_grad and cb.penalties == record and len(record) == 3
        learn.model = torch.compile(learn.model, backend='eager')
        assert torch.equal(learn.get_preds()[0], want)
    assert list(learn.metrics) == mets


# 5: batch size

@each
def test_pitfall_05_strength_does_not_depend_on_the_batch_size(name):
    "Every example twice, in batches of twice the size: the same gradient"
    def spy(k): return first_step(CASES[name][0](), dls=loaders(X[:4].repeat(k, 1, 1, 1), Y[:4].repeat(k), bs=4*k))[1]
    one, two = spy(1), spy(2)
    check_grads(two.grads[0], one.grads[0], 1e-9)


# 6, 7: batch statistics, masks, one forward pass

def test_pitfall_06_batchnorm_in_train_mode_has_the_cross_terms():
    probe = lambda z: z.detach().sin()
    cb = SpectReg(1., probe=probe)
    learn, spy, before = first_step(cb, net=bnorm)
    x, _ = learn.dls.train.one_batch()
    full = torch.autograd.functional.jacobian(before.train(), x).flatten(3)  # (N,C,N,D)
    v = probe(before(x))
    assert_close(cb.penalties[0], torch.einsum('mcnd,mc->nd', full, v).square().sum().item()/8, rtol=1e-9, atol=0)
    own = torch.stack([v[i] @ full[i, :, i] for i in range(8)]).square().sum()/8
    assert abs(cb.penalties[0]/own.item() - 1) > .01

def test_pitfall_21_the_exact_penalties_do_not_cancel():
    "The exact penalties add the squares of all blocks of the batch's Jacobian: random signs keep them from cancelling"
    cb, dls = FrobReg(1.), loaders()
    learn = learner(cb, net=bnorm, dls=dls)
    x = dls.train.one_batch()[0]
    full = torch.autograd.functional.jacobian(copy.deepcopy(learn.model).train(), x)  # (N,C,N,*D)
    seen = []
    for _ in range(400):
        run(learn, lr=0.)
        seen.append(cb.penalties[0])
    mean, se = np.mean(seen), np.std(seen)/400**.5
    blocks = full.square().sum().item()/8
    own = torch.stack([full[i, :, i] for i in range(8)]).square().sum().item()/8
    cancelled = full.sum(0).square().sum().item()/8
    assert abs(mean - blocks) < 4*se < min(abs(mean - own), abs(mean - cancelled))

@each
def test_pitfall_07_one_forward_pass(name):
    "Running statistics and dropout masks are those of a plain fit, and the model is called once per batch"
    calls, spies = [], [Spy(), Spy()]
    def stats(*cbs, net):
        learn = learner(*cbs, net=net)
        learn.model.register_forward_hook(lambda *_: calls.append(1))
        run(learn, lr=0.)
        return list(learn.model.buffers())
    assert_close(stats(net=bnorm), stats(CASES[name][0](), net=bnorm), rtol=0, atol=0)
    assert len(calls) == 2*(3 + 1)
    stats(spies[0], net=dropout), stats(CASES[name][0](), spies[1], net=dropout)
    assert [b.loss for b in spies[0].batches] == [b.loss for b in spies[1].batches]


# 10: compiled models

def compiled(net): return torch.compile(net, backend='eager')
def compiled_inside(net): net[4] = torch.compile(net[4], backend='eager'); return net
def compiled_in_place(net): net.compile(backend='eager'); return net
def compiled_child_in_place(net): net[4].compile(backend='eager'); return net

@pytest.mark.parametrize('how', [compiled, compiled_inside, compiled_in_place, compiled_child_in_place])
def test_pitfall_10_a_compiled_model_is_refused(how):
    learn = learner(SpectReg(1.))
    learn.model = how(learn.model)
    before = weights(learn)
    with pytest.raises(ValueError, match='the model is compiled, .* cannot be differentiated again'): run(learn)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(learn)))

@pytest.fixture
def process_group():
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

def test_a_static_graph_is_refused(process_group):
    "Its gradients of a penalty would silently not be averaged over the processes; without it they are"
    def distributed(**kwargs):
        learn = learner(SpectReg(1., probe=rowwise))
        learn.model = DistributedDataParallel(learn.model, **kwargs)
        return learn
    with pytest.raises(ValueError, match='leave static_graph out'): run(distributed(static_graph=True))
    assert same(run(distributed(find_unused_parameters=True)), fit(SpectReg(1., probe=rowwise)))

def test_pitfall_10_the_way_out():
    learn = learner(SpectReg(1., probe=rowwise))
    learn.model = torch.compile(learn.model, backend='eager')
    learn.model = learn.model._orig_mod
    assert same(run(learn), fit(SpectReg(1., probe=rowwise)))


# 11, 12: memory, NaN

class Leaky(FrobReg):
    def after_loss(self): self.loss_grad.backward(create_graph=True)

@pytest.mark.filterwarnings('ignore:Using backward')
@each
def test_pitfall_11_memory_does_not_grow(name):
    "Without the help of the cycle collector, an input dies when the next batch has run"
    def most(*cbs):
        refs, alive = [], []
        class Count(Callback):
            order = GradReg.order + 1  # sees the leaf, before fastai casts it
            def before_batch(self):
                refs.append(weakref.ref(self.x))
                alive.append(sum(r() is not None for r in refs))
        gc.disable()
        try: fit(*cbs, Count(), dls=loaders(bs=2))
        finally: gc.enable()
        return max(alive)
    assert most(CASES[name][0]()) <= 2
    if name == 'FrobReg': assert most(Leaky(1.)) > 6  # what the design forbids, seen by the same count

@each
def test_pitfall_12_no_nan_at_a_vanishing_jacobian(name):
    def zero():
        net = conv()
        for p in net.parameters(): nn.init.zeros_(p)
        return net
    learn = fit(CASES[name][0](), net=zero, epochs=2)
    assert all(w.isfinite().all() for w in weights(learn)) and weights(learn)[-1].abs().sum() > 0


# 17: inputs that cannot be differentiated, frozen layers

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(7, 4), nn.Linear(12, 3)
    def forward(self, x): return self.out(self.emb(x).flatten(1))

IDS = torch.arange(72).view(24, 3) % 7
WORDS = dict(net=Words, dls=loaders(IDS, valid=(IDS[:8], VALID[1])))

@each_gradient
def test_pitfall_17_integer_inputs(name):
    with pytest.raises(ValueError, match=r"the inputs are int64 \(8, 3\): only a float tensor .*at='emb'"):
        fit(CASES[name][0](), **WORDS)

def test_pitfall_17_integer_inputs_with_a_penalty_that_needs_no_gradient():
    cb = ConfidencePenalty(1.)
    fit(cb, **WORDS)
    assert len(cb.penalties) == 3 and not same(fit(**WORDS), fit(ConfidencePenalty(1.), **WORDS))

def test_pitfall_17_the_way_out_for_integers():
    "The output of the embedding layer, grabbed by a hook"
    class OfWords(GradReg):
        def before_fit(self):
            super().before_fit()
            self.hook = self.model.emb.register_forward_hook(lambda m, i, o: setattr(self, 'words', o))
        def penalty(self): return frob_reg(self.pred, self.words)
        def after_fit(self): self.hook.remove(); super().after_fit()
    cb, start = OfWords(1.), learner(**WORDS).model
    fit(cb, **WORDS)
    assert abs(cb.penalties[0]/start.out.weight.square().sum().item() - 1) < 1e-5

class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv()
    def forward(self, x): return self.net(x.detach())

@each_gradient
def test_pitfall_17_a_model_that_cuts_the_graph(name):
    with pytest.raises(ValueError, match='does not depend on x'): fit(CASES[name][0](), net=Detached)

@each_gradient
def test_pitfall_17_a_frozen_body(name):
    "The slope runs through the frozen layers; only the head is trained, by the right gradient"
    spy, cb = Spy(), CASES[name][0]()
    learn = learner(cb, spy, splitter=lambda m: [params(m[:4]), params(m[4:])])
    learn.freeze()
    before = copy.deepcopy(learn.model)
    run(learn)
    x, y = learn.dls.train.one_batch()
    want = witness(before, x, onehot(y), name, cb.lam)[1]
    check_grads(spy.grads[0], {k: g for k, g in want.items() if k[0] != '0'}, 1e-9)
    assert torch.equal(before[0].weight, learn.model[0].weight)
    assert not torch.equal(before[4].weight, learn.model[4].weight)

class Sum(nn.Module):
    "A net of two inputs that is a net of their concatenation"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    def forward(self, *xs): return self.net(torch.cat([x.double() for x in xs], -1))

def two_inputs(a=X[..., :2], b=X[..., 2:]):
    return DataLoaders(*(DataLoader(TensorDataset(a, b, Y), bs=8) for _ in range(2)), device=DEV)

@each_gradient
def test_pitfall_17_several_inputs(name):
    "The penalty of two inputs is that of both as one, with one probe; integers beside floats are left alone"
    f, _ = CASES[name]
    a, b = f(), f()
    assert_close(weights(fit(a, net=Sum)), weights(fit(b, net=Sum, dls=two_inputs())), rtol=1e-9, atol=1e-12)
    assert_close(a.penalties, b.penalties, rtol=1e-9, atol=0)
    part = f()
    fit(part, net=Sum, dls=two_inputs(X[..., :2].long()))
    assert len(part.penalties) == 3 and min(part.penalties) > 0

# DoubleBack and the loss function

def mean_square(z, t): return (z - t).square().mean()
def entropy2(z, t): return -(t*F.logsigmoid(z) + (1 - t)*F.logsigmoid(-z)).mean()
def smooth(z, t, eps=.1): return loss_of(z, (1 - eps)*t + eps/3)
VALUES = torch.rand(24, 3, dtype=F64, generator=rng)
LOSSES = {'CrossEntropyLossFlat': (CrossEntropyLossFlat, Y, loss_of),
          'LabelSmoothingCrossEntropyFlat': (LabelSmoothingCrossEntropyFlat, Y, smooth),
          'nn.CrossEntropyLoss': (nn.CrossEntropyLoss, Y, loss_of),
          'label smoothing': (lambda: nn.CrossEntropyLoss(label_smoothing=.1), Y, smooth),
          'soft labels': (nn.CrossEntropyLoss, VALUES/VALUES.sum(1, keepdim=True), loss_of),
          'F.cross_entropy': (lambda: F.cross_entropy, Y, loss_of),
          'MSELossFlat': (MSELossFlat, VALUES, mean_square),
          'nn.MSELoss': (nn.MSELoss, VALUES, mean_square),
          'F.mse_loss': (lambda: F.mse_loss, VALUES, mean_square),
          'BCEWithLogitsLossFlat': (lambda: BCEWithLogitsLossFlat(floatify=False), VALUES, entropy2)}

@pytest.mark.parametrize('loss', LOSSES)
def test_double_back_by_the_learners_loss(loss):
    make, y, by_hand = LOSSES[loss]
    cb, loss_func = DoubleBack(5.), make()
    learn, spy, before = first_step(cb, loss_func=loss_func, dls=loaders(X, y, valid=(X[:8], y[:8])))
    x, t = learn.dls.train.one_batch()
    t = onehot(t) if t.ndim == 1 else t
    pen, want = witness(before, x, t, None, cb.lam, by_hand, lambda g, o, t: square(lambda o: by_hand(g(o), t), o))
    assert_close(cb.penalties[0], pen, rtol=1e-6, atol=0)  # fastai's own losses are float32
    check_grads(spy.grads[0], want, 1e-6)
    assert getattr(loss_func, 'reduction', 'mean') == 'mean'

def test_double_back_of_many_losses_per_example():
    "Segmentation: a class for each pixel, the loss of an example is the mean over its pixels"
    net = lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)).double()
    masks = torch.randint(3, (24, 6, 6), generator=torch.Generator().manual_seed(0))
    data = dict(dls=loaders(X, masks, valid=(X[:8], masks[:8])))
    by_hand = lambda z, t: -z.log_softmax(0).gather(0, t[None]).mean()
    for loss_func in CrossEntropyLossFlat(axis=1), nn.CrossEntropyLoss():
        cb = DoubleBack(500.)
        learn, spy, before = first_step(cb, net=net, loss_func=loss_func, **data)
        x, t = learn.dls.train.one_batch()
        pen, want = witness(before, x, t, None, cb.lam, by_hand, lambda g, o, t: square(lambda o: by_hand(g(o), t), o))
        assert_close(cb.penalties[0], pen, rtol=1e-6, atol=0)
        check_grads(spy.grads[0], want, 1e-6)
    kw = dict(net=net, loss_func=CrossEntropyLossFlat(axis=1), **data)
    assert min(fit(SpectReg(1.), **kw).spect_reg.penalties) > 0
    said = r'y has shape \(8, 3, 6, 6\), but its Jacobian needs \(N,C\): `vjp` and `spect_reg` take any'
    with pytest.raises(ValueError, match=said):
        fit(FrobReg(1.), **kw)

class NoReduction(nn.Module):
    def forward(self, z, y): return F.cross_entropy(z, y)
def deaf(z, y, reduction='mean'): return F.cross_entropy(z, y)
def summed(z, y): return F.cross_entropy(z, y)*len(z)

@pytest.mark.parametrize('loss_func', [lambda z, y: F.cross_entropy(z, y), NoReduction(), deaf, summed,
                                       nn.CrossEntropyLoss(reduction='sum'), partial(F.cross_entropy, reduction='sum')])
def test_any_loss_has_examples(loss_func):
    "Means and sums, with and without an argument for it: the examples' own losses are the same"
    want, got = DoubleBack(1e-9), DoubleBack(1e-9)
    fit(want, lr=0.), fit(got, loss_func=loss_func, lr=0.)
    assert_close(got.penalties, want.penalties, rtol=1e-6, atol=0)


# the log and the record

def test_the_column_and_the_record():
    cbs = SpectReg(1., every=2), FrobReg(1.), ConfidencePenalty(1.)
    learn = fit(*cbs, epochs=3, metrics=accuracy)
    columns = ['spect_reg', 'frob_reg', 'confidence_penalty']
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', *columns, 'time']
    assert [len(cb.penalties) for cb in cbs] == [5, 9, 9]  # of 9 batches
    assert all(type(p) is float for cb in cbs for p in cb.penalties)
    for epoch in range(3):
        row, at = learn.recorder.values[epoch], slice(3*epoch, 3*epoch + 3)
        assert_close(row[4:], [sum(cb.penalties[at])/3 for cb in cbs[1:]])
    parts = (0, 2), (2, 3), (3, 5)
    assert_close([r[3] for r in learn.recorder.values], [sum(cbs[0].penalties[a:b])/(b - a) for a, b in parts])
    run(learn)
    assert [len(cb.penalties) for cb in cbs] == [2, 3, 3]  # a fit's own
    assert learn.metrics.attrgot('name') == ['accuracy']

def test_an_epoch_without_a_penalty_shows_nan():
    learn = fit(SpectReg(0), FrobReg(1., every=4), epochs=2)  # batches 0 and 4
    for row in learn.recorder.values: assert math.isnan(row[2]) and not math.isnan(row[3])
    assert math.isnan(fit(FrobReg(1., every=7), epochs=2).recorder.values[1][2])

def test_the_column_can_be_monitored(tmp_path):
    save = SaveModelCallback(monitor='frob_reg', comp=np.less, fname='best')
    learn = fit(FrobReg(10.), save, epochs=3, path=tmp_path)
    assert save.best == min(r[2] for r in learn.recorder.values) and (tmp_path/'models'/'best.pth').exists()

OURS = 'gradreg.callbacks', 'gradreg.penalties', 'gradreg.jacobians'

@each
def test_no_synchronisation_in_a_batch(name, monkeypatch):
    "Every way from a tensor to Python is watched: gradreg takes one per epoch, after its batches, and one on the first"
    def ours():
        f = sys._getframe(2)
        while f:
            if f.f_globals.get('__name__') in OURS: return True
            f = f.f_back
    calls, in_batch = [], [False]
    for way in 'item', 'tolist', 'cpu', 'numpy', 'nonzero', '__float__', '__int__', '__bool__', '__index__':
        def watched(t, *args, _way=way, _true=getattr(torch.Tensor, way), **kw):
            if ours(): calls.append((_way, in_batch[0]))
            return _true(t, *args, **kw)
        monkeypatch.setattr(torch.Tensor, way, watched)
    def begin(self): in_batch[0] = True
    def end(self): in_batch[0] = False
    fit(CASES[name][0](), Callback(before_batch=begin, after_batch=end), CPUMixedPrecision(), epochs=2, **floats())
    assert calls == [('tolist', True), ('tolist', False), ('tolist', False)]

def test_metrics_are_as_they_were():
    learn = learner(metrics=accuracy)
    mets = list(learn.metrics)
    run(learn, cbs=SpectReg(1.))
    assert list(learn.metrics) == mets and not hasattr(learn, 'spect_reg')
    run(learn, cbs=[SpectReg(1.), FrobReg(1.)])
    assert list(learn.metrics) == mets
    cb = SpectReg(1.)
    learn.add_cb(cb); run(learn); learn.remove_cb(cb); run(learn)
    assert list(learn.metrics) == mets and learn.recorder.metric_names[-2:] == ['accuracy', 'time']

class Bomb(Callback):
    order = 80
    def __init__(self, e, at): self.e, self.at = e, at
    def after_batch(self):
        if self.training and self.epoch*3 + self.iter == self.at: raise self.e

@pytest.mark.parametrize('at', [1, 4])
@pytest.mark.parametrize('e', [KeyboardInterrupt, RuntimeError('boom')])
def test_a_fit_that_was_broken_off(e, at):
    "In the first epoch or in the second: metrics are as they were, and one can go on"
    learn = learner(metrics=accuracy)
    mets = list(learn.metrics)
    with pytest.raises((KeyboardInterrupt, RuntimeError)): run(learn, 2, cbs=[SpectReg(1.), Bomb(e, at)])
    assert list(learn.metrics) == mets
    with learn.no_bar(): learn.validate()
    assert len(run(learn).recorder.values[0]) == 3

    cb, bomb = SpectReg(1.), Bomb(e, at)
    learn.add_cbs([cb, bomb])
    with pytest.raises((KeyboardInterrupt, RuntimeError)): run(learn, 2)
    with learn.no_bar(): assert len(learn.validate()) == 2
    assert len(cb.penalties) == at + 1  # what was seen until then
    learn.remove_cb(bomb)
    assert len(run(learn).recorder.values[0]) == 4 and len(cb.penalties) == 3
    assert list(learn.metrics) == mets

@pytest.mark.parametrize('e,at,n', [(CancelFitException, 4, 5), (CancelTrainException, 1, 5),
                                    (CancelTrainException, 4, 5)])
def test_a_cancelled_fit_keeps_its_record(e, at, n):
    "TerminateOnNaN and lr_find end a fit in the middle of an epoch: what came before is what one wants to see"
    cb = SpectReg(1.)
    learn = fit(cb, Bomb(e, at), epochs=2, metrics=accuracy)
    assert len(cb.penalties) == n and learn.metrics.attrgot('name') == ['accuracy']

@each
def test_lr_find(name, tmp_path):
    cb = CASES[name][0]()
    learn = learner(cb, path=tmp_path, metrics=accuracy)
    before = weights(learn)
    with learn.no_bar():
        found = learn.lr_find(num_it=20, show_plot=False, stop_div=False, suggest_funcs=SuggestionMethod.Valley)
    assert 0 < found.valley < 10 and all(torch.equal(a, b) for a, b in zip(before, weights(learn)))
    assert len(learn.recorder.losses) == len(cb.penalties) == 20 and learn.metrics.attrgot('name') == ['accuracy']
    assert same(run(learn), fit(CASES[name][0]()))


# files, subclasses, odd models

@pytest.mark.filterwarnings('ignore:load_learner')
@pytest.mark.parametrize('cbs', [lambda: [SpectReg(1.)], lambda: [SpectReg(1., probe=sphere), DoubleBack(1.)],
                                 lambda: [FrobReg(0)], lambda: [JacReg(1., every=2), ConfidencePenalty(1.)]])
def test_export_and_load(cbs, tmp_path):
    learn = fit(*cbs(), path=tmp_path, metrics=accuracy)
    with learn.no_bar(): want = learn.get_preds()[0]
    learn.export('a.pkl')
    again = load_learner(tmp_path/'a.pkl', cpu=DEV == 'cpu')
    names = [cb.name for cb in cbs()]
    for a, b in ((getattr(again, n), getattr(learn, n)) for n in names):
        assert a.penalties == b.penalties and a.lam == b.lam and a.every == b.every
    with again.no_bar(): assert torch.equal(again.get_preds(dl=learn.dls.valid)[0], want)
    again.dls = loaders()
    run(again)
    assert again.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', *names, 'time']

@pytest.mark.filterwarnings('ignore:load_learner')
def test_export_before_a_fit_and_after_a_broken_one(tmp_path):
    learn = learner(SpectReg(1.), path=tmp_path)
    learn.export('a.pkl')
    bomb = Bomb(RuntimeError('boom'), 1)
    with pytest.raises(RuntimeError): run(learn, cbs=bomb)
    learn.export('b.pkl')
    for f in 'ab':
        again = load_learner(tmp_path/f'{f}.pkl', cpu=DEV == 'cpu')
        again.dls = loaders()
        run(again)
        assert len(again.spect_reg.penalties) == 3 and len(again.recorder.values[0]) == 3

@pytest.mark.parametrize('probe,factor', [(sphere, 1/3), (rademacher, 1)])
def test_probes(probe, factor):
    "Over many repetitions of one example, within four standard errors"
    many = loaders(X[:1].expand(6000, -1, -1, -1), Y[:1].expand(6000), bs=3000)
    cb, exact, seen = SpectReg(1., probe=probe), FrobReg(1.), []
    def spread(self):
        if self.training: seen.append(spect_reg(self.pred, self.x, probe(self.pred)).std().item())
    run(learner(cb, exact, Callback(after_loss=spread), dls=many), lr=0.)
    for p, e, sd in zip(cb.penalties, exact.penalties, seen):
        assert abs(p - factor*e) < 4*sd/3000**.5 < abs(p - e/3/factor)

def test_a_penalty_of_ones_own():
    class Slope(GradReg):
        "The fourth power of the length of the first logit's gradient"
        def penalty(self): return spect_reg(self.pred[:, :1], self.x, torch.ones_like(self.pred[:, :1]))**2
    cb = Slope(3.)
    learn, spy, before = first_step(cb, metrics=accuracy)
    x, y = learn.dls.train.one_batch()
    pen, want = witness(before, x, onehot(y), None, 3., pen_of=lambda g, o, t: square(lambda o: g(o)[0], o)**2)
    assert_close(cb.penalties[0], pen, rtol=1e-9, atol=0)
    check_grads(spy.grads[0], want, 1e-9)
    assert learn.recorder.metric_names[-2] == 'slope'

def test_the_base_class_has_no_penalty():
    with pytest.raises(TypeError, match=r'GradReg has no penalty\(\) of its own'): fit(GradReg(1.))
    class Lazy(GradReg): pass
    with pytest.raises(TypeError, match='Lazy has no penalty'): fit(Lazy(1.))

class Twofold(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv()
    def forward(self, x): z = self.net(x); return z, z.tanh()

def test_a_model_with_several_outputs():
    class OfFirst(GradReg):
        def penalty(self): return frob_reg(self.pred[0], self.x)
    cb, plain = OfFirst(2.), FrobReg(2.)
    a = fit(cb, net=Twofold, loss_func=lambda z, y: F.cross_entropy(z[0], y))
    b = fit(plain)
    assert_close(cb.penalties, plain.penalties)
    assert_close(weights(a), weights(b))

def test_layers_in_place():
    "ReLU in place after the first layer, as torchvision's networks have it"
    for f, _ in CASES.values(): assert_close(weights(fit(f(), net=inplace)), weights(fit(f())), rtol=1e-9, atol=1e-12)

def test_channels_last():
    def last(): return conv().to(memory_format=torch.channels_last)
    dls = lambda: loaders(X.to(memory_format=torch.channels_last))
    for f, _ in CASES.values():
        assert_close(weights(fit(f(), net=last, dls=dls())), weights(fit(f())), rtol=1e-9, atol=1e-12)

def test_the_data_are_left_alone():
    "A loader may hand out the same tensor again and again"
    x, y = X[:8].to(DEV), Y[:8].to(DEV)
    before = x.clone()
    fit(FrobReg(1.), SpectReg(1.), dls=loaders(after_batch=lambda b: (x, y)), epochs=2)
    assert torch.equal(before, x) and not x.requires_grad and x.grad is None

def test_a_fit_without_progress_bars_is_a_fit():
    cb = FrobReg(1.)
    learn = learner(cb, metrics=accuracy)
    for quiet in learn.no_bar, learn.no_mbar, learn.no_logging:
        with quiet(): run(learn)
        assert len(cb.penalties) == 3 and learn.recorder.metric_names[-2] == 'frob_reg'
        assert len(learn.recorder.values[0]) == 4

# 23: the loss that is trained, by its gradient alone and by hand

def of_loss(net, loss_func, x, t):
    "Mean of the squared gradients of the examples' own losses: the loss times N, or as it is where it sums"
    x = x.detach().requires_grad_()
    g, = torch.autograd.grad(loss_func(net(x), t), x)
    return (len(x)*g).flatten(1).square().sum(1).mean().item()

W = torch.rand(3, dtype=F64, generator=rng) + .1
HARD = torch.rand(24, 3, dtype=F64, generator=rng).softmax(1)
AVERAGES = {'class weights': (nn.CrossEntropyLoss(weight=W), Y),
            'tiny class weights': (nn.CrossEntropyLoss(weight=torch.full((3,), 1/200, dtype=F64)), Y),
            'fastai, class weights': (CrossEntropyLossFlat(weight=W.float()), Y),
            'ignore_index': (nn.CrossEntropyLoss(ignore_index=2), Y),
            'weights and smoothing': (nn.CrossEntropyLoss(weight=W, label_smoothing=.2), Y),
            'batchmean': (lambda z, t: nn.KLDivLoss(reduction='batchmean')(z.log_softmax(1), t), HARD),
            'KL, mean': (lambda z, t: F.kl_div(z.log_softmax(1), t), HARD),
            'focal': (lambda z, t: ((1 - z.softmax(1).gather(1, t[:, None]))**2).mean() + F.cross_entropy(z, t), Y)}

@pytest.mark.parametrize('loss', AVERAGES)
def test_pitfall_23_the_gradient_of_the_loss_that_is_trained(loss):
    loss_func, y = AVERAGES[loss]
    cb = DoubleBack(1e-9)
    learn = learner(cb, loss_func=loss_func, dls=loaders(X, y, valid=(X[:8], y[:8])))
    before = copy.deepcopy(learn.model)
    run(learn, lr=0.)
    x, t = learn.dls.train.one_batch()
    assert_close(cb.penalties[0], of_loss(before, loss_func, x, t), rtol=1e-6, atol=0)

def test_pitfall_23_equal_class_weights_change_nothing():
    plain, weighted = DoubleBack(1e-9), DoubleBack(1e-9)
    fit(plain, lr=0.), fit(weighted, lr=0., loss_func=AVERAGES['tiny class weights'][0])
    assert_close(weighted.penalties, plain.penalties, rtol=1e-9, atol=0)

def test_pitfall_23_by_hand_with_class_weights():
    "The own losses by their formula, one example at a time"
    cb, loss_func = DoubleBack(5.), nn.CrossEntropyLoss(weight=W)
    learn, spy, before = first_step(cb, loss_func=loss_func)
    x, y = learn.dls.train.one_batch()
    own = lambda z, t: (t*W).sum()*loss_of(z, t)*8/W[y.cpu()].sum()
    pen, want = witness(before, x, onehot(y), None, cb.lam, own, lambda g, o, t: square(lambda o: own(g(o), t), o))
    assert_close(cb.penalties[0], pen, rtol=1e-9, atol=0)
    check_grads(spy.grads[0], want, 1e-9)

def pixels(): return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)).double()

def test_pitfall_23_pixels_to_ignore():
    "Nine tenths of the pixels are ignored: an example's own loss is its share of the mean over the others"
    g = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (24, 6, 6), generator=g)
    masks[torch.rand(masks.shape, generator=g) < .9] = 255
    cb, loss_func = DoubleBack(5.), CrossEntropyLossFlat(axis=1, ignore_index=255)
    dls = loaders(X, masks, valid=(X[:8], masks[:8]))
    learn, spy, before = first_step(cb, net=pixels, loss_func=loss_func, dls=dls)
    x, t = learn.dls.train.one_batch()
    seen = (t != 255).sum()
    def own(z, t):
        picked = z.log_softmax(0).gather(0, t.where(t != 255, 0)[None])[0]
        return -(picked*(t != 255)).sum()*8/seen
    pen, want = witness(before, x, t, None, cb.lam, own, lambda g, o, t: square(lambda o: own(g(o), t), o))
    assert_close(cb.penalties[0], pen, rtol=1e-6, atol=0)
    check_grads(spy.grads[0], want, 1e-6)

@pytest.mark.parametrize('loss_func', [nn.MSELoss(reduction='sum'), partial(F.mse_loss, reduction='sum'),
                                       lambda z, t: (z - t).square().sum()/2])
def test_pitfall_23_a_sum_has_the_examples_own_terms(loss_func):
    cb = DoubleBack(1e-9)
    learn = learner(cb, loss_func=loss_func, dls=loaders(X, VALUES, valid=(X[:8], VALUES[:8])))
    before = copy.deepcopy(learn.model)
    run(learn, lr=0.)
    x, t = learn.dls.train.one_batch()
    own = lambda o, t: loss_func(before(o[None])[0], t)
    want = vmap(lambda o, t: jacrev(own)(o, t).square().sum())(x, t).mean()
    assert_close(cb.penalties[0], want.item(), rtol=1e-9, atol=0)


# 24: probabilities by the loss function

def test_pitfall_24_the_axis_of_the_loss():
    "(N,T,V) logits, the classes last: the mean over T of the negative entropy"
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 35), nn.Unflatten(1, (5, 7))).double()
    words = torch.randint(7, (24, 5), generator=torch.Generator().manual_seed(0))
    cb, loss_func = ConfidencePenalty(1e-9), CrossEntropyLossFlat(axis=-1)
    learn = learner(cb, net=net, loss_func=loss_func, dls=loaders(X, words, valid=(X[:8], words[:8])))
    before = copy.deepcopy(learn.model)
    run(learn, lr=0.)
    z = before(learn.dls.train.one_batch()[0])
    want = -torch.distributions.Categorical(logits=z).entropy().mean()
    wrong = -torch.distributions.Categorical(logits=z.transpose(1, 2)).entropy().mean()
    assert_close(cb.penalties[0], want.item(), rtol=1e-9, atol=0)
    assert abs(want - wrong) > .1
    for cls in JacReg, FrobReg: # their price is named, and who takes one pass for all
        kw = dict(net=net, loss_func=loss_func, dls=loaders(X, words, valid=(X[:8], words[:8])))
        with pytest.raises(ValueError, match='35') as e: fit(cls(1.), **kw)
        assert re.search('SpectReg|spect_reg', str(e.value))

def test_pitfall_24_segmentation():
    masks = torch.randint(3, (24, 6, 6), generator=torch.Generator().manual_seed(0))
    cb = ConfidencePenalty(1e-9)
    learn = learner(cb, net=pixels, loss_func=nn.CrossEntropyLoss(), dls=loaders(X, masks, valid=(X[:8], masks[:8])))
    z = copy.deepcopy(learn.model)(learn.dls.train.one_batch()[0])
    run(learn, lr=0.)
    want = -torch.distributions.Categorical(logits=z.movedim(1, -1)).entropy().mean()
    assert_close(cb.penalties[0], want.item(), rtol=1e-9, atol=0)

@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('loss_func', [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits,
                                       BCEWithLogitsLossFlat(floatify=False)])
def test_pitfall_24_a_sigmoid_for_each_output(loss_func, c):
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, c)).double()
    jac, conf, y = JacReg(1e-9), ConfidencePenalty(1e-9), VALUES[:, :c]
    learn = learner(jac, conf, net=net, loss_func=loss_func, dls=loaders(X, y, valid=(X[:8], y[:8])))
    before = copy.deepcopy(learn.model)
    run(learn, lr=0.)
    x = learn.dls.train.one_batch()[0]
    want = vmap(lambda o: square(lambda o: before(o[None])[0].sigmoid(), o))(x).mean()
    assert_close(jac.penalties[0], want.item(), rtol=1e-9, atol=0)
    entropy = torch.distributions.Bernoulli(logits=before(x)).entropy().mean()
    assert_close(conf.penalties[0], -entropy.item(), rtol=1e-9, atol=0)

class Focal(nn.Module):
    "A loss of somebody's own, which says by `activation` that its outputs are sigmoids"
    def forward(self, z, t): return F.binary_cross_entropy_with_logits(z, t)
    def activation(self, z): return z.sigmoid()

@pytest.mark.parametrize('loss_func,axis', [
    (nn.CrossEntropyLoss(), 1), (CrossEntropyLossFlat(), -1), (CrossEntropyLossFlat(axis=1), 1), (F.cross_entropy, 1),
    (LabelSmoothingCrossEntropyFlat(axis=2), 2), (FocalLossFlat(axis=1), 1), (DiceLoss(), 1), (nn.NLLLoss(), 1),
    (partial(F.cross_entropy, label_smoothing=.1), 1), (lambda z, t: 0, 1), (nn.BCEWithLogitsLoss(), None),
    (BCEWithLogitsLossFlat(), None), (nn.MultiLabelSoftMarginLoss(), None), (Focal(), None),
    (partial(F.binary_cross_entropy_with_logits, reduction='sum'), None)])
def test_pitfall_24_class_axis(loss_func, axis): assert class_axis(loss_func) == axis

@pytest.mark.parametrize('loss_func', [nn.MSELoss(), MSELossFlat(), L1LossFlat(), F.huber_loss, nn.BCELoss(),
                                       BCELossFlat(), partial(F.mse_loss, reduction='sum')])
@pytest.mark.parametrize('cls', [JacReg, ConfidencePenalty])
def test_pitfall_24_no_probabilities(cls, loss_func):
    y = VALUES[:, :1]
    net = lambda: seq(nn.Flatten(), nn.Linear(36, 1), nn.Sigmoid())
    with pytest.raises(ValueError, match='no probabilities of the outputs: take frob_reg or spect_reg'):
        fit(cls(1.), net=net, loss_func=loss_func, dls=loaders(X, y, valid=(X[:8], y[:8])))

@each
def test_masked_classes(name):
    "Logits of minus infinity, as where classes are masked out: the penalty is that of the others alone"
    class Masked(nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.net, self.fill = conv(), fill
        def forward(self, x):
            z = self.net(x)
            return torch.cat([z, z.new_full((len(z), 1), -math.inf)], 1) if self.fill else z
    plain, masked = CASES[name][0](), CASES[name][0]()
    if name == 'SpectReg': plain.probe = masked.probe = lambda z: z.detach().clamp(min=-9).cos()
    a, b = fit(plain, net=lambda: Masked(False)), fit(masked, net=lambda: Masked(True))
    assert_close(weights(b), weights(a), rtol=1e-9, atol=1e-12)
    assert_close(masked.penalties, plain.penalties, rtol=1e-9, atol=0)


# R19: random numbers

def global_draws(z): return torch.randn_like(z)
def numbered(z): return torch.randn(z.shape, dtype=z.dtype).to(z.device)  # on the CPU, wherever the network is

def draws_of(*cbs):
    "Batches, masks and the next numbers of a training with dropout, in shuffled order"
    seen, dls = [], loaders()
    dls.train.shuffle = True
    spy = Callback(after_pred=lambda self: seen.append(self.y.tolist()))
    kw = dict(net=dropout, dls=dls, lr=0., epochs=2)
    losses = fit(*cbs, spy, **kw).recorder.losses
    return seen, [o.item() for o in losses], torch.rand(3).tolist(), torch.rand(3, device=DEV).tolist()

@pytest.mark.parametrize('cb', [
    lambda: SpectReg(1e-12), lambda: SpectReg(1e-12, probe=sphere), lambda: SpectReg(1e-12, probe=rademacher),
    lambda: SpectReg(1e-12, probe=global_draws), lambda: SpectReg(1e-12, probe=numbered),
    lambda: SpectReg(1e-12, probe=torch.randn_like),
    lambda: SpectReg(1e-12, probe=one_direction(gaussian)), lambda: SpectReg(1e-12, probe=partial(gaussian)),
    lambda: FrobReg(1e-12), lambda: JacReg(1e-12), lambda: DoubleBack(1e-12), lambda: ConfidencePenalty(1e-12)])
def test_r19_the_training_draws_as_without_the_penalty(cb):
    assert draws_of(cb()) == draws_of()
    assert len(set(draws_of()[0][0])) > 1  # it is shuffled

@pytest.mark.parametrize('probe', [gaussian, global_draws, numbered])
def test_r19_a_probe_is_drawn_anew_and_again_by_the_same_seed(probe):
    a, b = SpectReg(1e-12, probe=probe), SpectReg(1e-12, probe=probe)
    run(learner(a), lr=0.), run(learner(b), lr=0.)
    assert a.penalties == b.penalties and len(set(a.penalties)) == 3
    run(learner(a), lr=0.)
    assert not set(a.penalties) & set(b.penalties)  # it goes on, no batch sees a number again
    c, d = SpectReg(1e-12, probe=probe), SpectReg(1e-12, probe=probe)
    run(learner(c, d), lr=0.)
    assert not set(c.penalties) & set(d.penalties)  # two of a Learner draw apart

def test_r19_a_generator_of_ones_own():
    make = lambda: SpectReg(1e-12, generator=torch.Generator(DEV).manual_seed(7))
    a, b = make(), make()
    run(learner(a), lr=0.)
    learn = learner(b)
    torch.manual_seed(99)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    assert a.penalties == b.penalties
    with pytest.raises(ValueError, match='generator=7: must be a torch.Generator'): SpectReg(1., generator=7)

def test_r19_the_global_generator_can_be_asked_for():
    cb = SpectReg(1e-12, generator=global_generator(torch.device(DEV)))
    assert draws_of(cb)[2:] != draws_of()[2:]

def test_pitfall_a_probe_that_is_none():
    for probe, why in [(lambda z: None, 'returned a NoneType'), (lambda z: z.mean(), 'one entry of v per output'),
                       (lambda z: z*math.nan, 'is nan, though the loss is')]:
        with pytest.raises((TypeError, ValueError), match=why): fit(SpectReg(1., probe=probe))
    with pytest.raises(ValueError, match="probe='gaussian': must be a function"): SpectReg(1., probe='gaussian')
    with pytest.raises(TypeError): SpectReg(.1, 4)


# 25: events that are no training

def datasets():
    tfms = [[X.float().__getitem__], [Y.__getitem__]]
    return Datasets(range(24), tfms=tfms, splits=[range(16), range(16, 24)]).dataloaders(bs=8, device=DEV)

def test_pitfall_25_summary_and_tta_keep_the_record():
    cb = SpectReg(1.)
    learn = Learner(datasets(), conv().float(), loss_func=CrossEntropyLossFlat(), cbs=cb, metrics=accuracy)
    run(learn)
    record, mets = list(cb.penalties), list(learn.metrics)
    assert len(record) == 2
    learn.model = torch.compile(learn.model, backend='eager')  # after training one may
    with learn.no_bar():
        assert "Total params" in module_summary(learn, learn.dls.one_batch()[0])
        learn.tta(n=2)
        learn.validate()
    assert cb.penalties == record and list(learn.metrics) == mets
    learn.model = learn.model._orig_mod
    run(learn)
    assert len(cb.penalties) == 2 and cb.penalties != record

def test_a_strength_that_changes():
    "It is decided before the batch whether a penalty is due; the strength is the one that stands when the loss is made"
    class Schedule(Callback):
        order = GradReg.order + 1
        def __init__(self, event, lams): self.event, self.lams = event, lams
        def before_batch(self): self.set('before_batch')
        def after_pred(self): self.set('after_pred')
        def set(self, event):
            if self.training and event == self.event: self.learn.frob_reg.lam = self.lams[self.iter]
    for event in 'before_batch', 'after_pred':
        cb = FrobReg(0)
        fit(cb, Schedule(event, [1., 2., 0.]))
        assert len(cb.penalties) == 2  # in the batches 1 and 2, the one after each that raised it
        with pytest.raises(ValueError, match='lam=-1'): fit(FrobReg(1), Schedule(event, [-1]*3))
    cb = FrobReg(1.)
    for bad in -1, math.nan, None, '1', 10**400, True:
        with pytest.raises(ValueError, match='lam='): cb.lam = bad
    with pytest.raises(ValueError, match='every=0'): cb.every = 0
    assert cb.lam == 1 and cb.every == 1

def test_one_object_twice():
    cb = FrobReg(1.)
    said = 'added to the Learner twice: add it once, or add a second FrobReg'
    with pytest.raises(ValueError, match=said): fit(cb, cb)

def test_two_objects_have_two_columns():
    a, b, c = SpectReg(1.), FrobReg(1.), SpectReg(1.)
    learn = fit(a, b, c, metrics=accuracy)
    assert learn.recorder.metric_names[3:] == ['accuracy', 'spect_reg', 'frob_reg', 'spect_reg_2', 'time']
    assert_close(learn.recorder.values[0][3:], [np.mean(o.penalties) for o in (a, b, c)])

@pytest.mark.parametrize('change,why', [
    (lambda p: p.mean(), r'returned float64 \(\), not one number per example, \(8,\)'),
    (lambda p: p[:4], r'float64 \(4,\)'),
    (lambda p: p.tolist(), 'a list of 8'), (lambda p: None, 'a NoneType'),
    (lambda p: p.detach(), 'no weight that is trained')])
def test_what_is_no_penalty(change, why):
    class Own(FrobReg):
        def penalty(self): return change(super().penalty())
    with pytest.raises(ValueError, match=why): fit(Own(1.))


# 26: inputs and outputs of every kind

def test_pitfall_26_tabular():
    "fastai's own: the penalty is taken in the continuous columns, the categories are left alone"
    dls = two_inputs(torch.randint(4, (24, 2), generator=rng), X[:, 0, 0, :3].float())
    net = lambda: TabularModel([(4, 2), (4, 2)], 3, 3, [8], use_bn=False, bn_cont=False)
    cb = FrobReg(1e-9)
    learn = learner(cb, net=net, dls=dls)
    before = copy.deepcopy(learn.model)
    run(learn, lr=0.)
    cat, cont = dls.train.one_batch()[:2]
    want = torch.stack([square(lambda o: before(c[None], o[None])[0], o) for c, o in zip(cat, cont)]).mean()
    assert_close(cb.penalties[0], want.item(), rtol=1e-4, atol=0)
    at = SpectReg(1e-9, at='emb_drop')  # and in their embeddings, by name
    run(learner(at, net=net, dls=dls), lr=0.)
    assert min(at.penalties) > 0

class Flat(nn.Module): # (N,) outputs
    def __init__(self):
        super().__init__()
        self.net = seq(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 1))
    def forward(self, x): return self.net(x)[:, 0]

@pytest.mark.parametrize('cls', [SpectReg, FrobReg, DoubleBack])
def test_pitfall_26_one_output(cls):
    "(N,) is (N,1)"
    data = lambda y: dict(loss_func=nn.MSELoss(), dls=loaders(X, y, valid=(X[:8], y[:8])))
    a, b = cls(1.), cls(1.)
    flat = fit(a, net=Flat, **data(VALUES[:, 0]))
    column = fit(b, net=lambda: Flat().net, **data(VALUES[:, :1]))
    assert_close(weights(flat), weights(column), rtol=1e-9, atol=1e-12)
    assert_close(a.penalties, b.penalties, rtol=1e-9, atol=0)

class Output(dict):
    "As Hugging Face's models return it"
    @property
    def logits(self): return self['logits']

class Wraps(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(7, 4).double(), nn.Linear(12, 3).double()
    def forward(self, batch): return Output(logits=self.out(self.emb(batch['input_ids']).flatten(1)))

@each
def test_pitfall_26_dicts_in_and_out(name):
    "The sentence says what to pass; with the layer named and the output picked it works"
    ids = [({'input_ids': i, 'attention_mask': torch.ones_like(i)}, y) for i, y in zip(IDS, Y)]
    kw = dict(net=Wraps, loss_func=lambda out, y: F.cross_entropy(out.logits, y),
              dls=DataLoaders(*(DataLoader(ids, bs=8) for _ in range(2)), device=DEV))
    at = {} if name == 'ConfidencePenalty' else dict(at='emb')
    if at:
        dict_in = r"the inputs are a dict of input_ids, attention_mask: only a float tensor has a derivative.*at='emb'"
        said = dict_in if name == 'DoubleBack' else 'inputs are a dict|not a tensor'
        with pytest.raises((ValueError, TypeError), match=said): fit(CASES[name][0](), **kw)
    cb = CASES[name][0](**at)
    if name != 'DoubleBack':
        with pytest.raises(TypeError, match=r'a Output of logits, not a tensor.*return self.pred.logits'): fit(cb, **kw)
        cls = type(cb)
        cb = type(cls.__name__, (cls,), dict(outputs=lambda self: self.pred.logits))(cb.lam, **at)
    fit(cb, **kw)
    plain = CASES[name][0](**at)
    if name == 'SpectReg': cb.probe = rowwise
    fit(cb, **kw)
    class Plain(Wraps):
        def forward(self, x): return super().forward(dict(input_ids=x)).logits
    fit(plain, net=Plain, dls=loaders(IDS, valid=(IDS[:8], VALID[1])))
    assert_close(cb.penalties, plain.penalties, rtol=1e-9, atol=0)

@pytest.mark.parametrize('name', [k for k in CASES if k != 'DoubleBack'])
def test_pitfall_26_several_outputs(name):
    kw = dict(net=Twofold, loss_func=lambda z, y: F.cross_entropy(z[0], y))
    said = r'a tuple of 2, not a tensor.*return self.pred\[0\]'
    with pytest.raises(TypeError, match=said): fit(CASES[name][0](), **kw)
    cb, plain = CASES[name][0](), CASES[name][0]()
    cb.__class__ = type(type(cb).__name__, (type(cb),), dict(outputs=lambda self: self.pred[0]))
    assert_close(weights(fit(cb, **kw)), weights(fit(plain)), rtol=1e-9, atol=1e-12)
    assert_close(cb.penalties, plain.penalties, rtol=1e-9, atol=0)


# at: the output of a layer

def of_layer(net, k):
    "The net up to layer k, and from there on"
    return net[:k+1], net[k+1:]

@pytest.mark.parametrize('k', [0, 1, 4, 5])
@each_gradient
def test_at_a_hidden_layer(name, k):
    "As if the layer's output were the input; the weights' gradients by torch.func, through both parts"
    cb = CASES[name][0](at=str(k))
    learn, spy, before = first_step(cb)
    x, y = learn.dls.train.one_batch()
    start, end = of_layer(before, k)
    f = CASES[name][1]
    def total(ps):
        net = lambda o: functional_call(before, ps, (o[None],))[0]
        parts = [{n: p for n, p in ps.items() if (int(n[0]) > k) == late} for late in (False, True)]
        first = lambda o: functional_call(start, parts[0], (o[None],))[0]
        last = lambda h: functional_call(end, parts[1], (h[None],))[0]
        pen = vmap(lambda o, t: f(last, first(o), t))(x, onehot(y)).mean()
        return vmap(lambda o, t: loss_of(net(o), t))(x, onehot(y)).mean() + cb.lam*pen, pen
    want, (_, pen) = grad_and_value(total, has_aux=True)({k: p.detach() for k, p in before.named_parameters()})
    assert_close(cb.penalties[0], pen.item(), rtol=1e-9, atol=0)
    check_grads(spy.grads[0], want, 1e-9)
    assert not any(b.needs_grad for b in spy.batches) and not before[k]._forward_hooks
    assert not learn.model._forward_hooks and not learn.model[k]._forward_hooks

def test_at_says_the_same_in_three_ways():
    want, cb = fit(FrobReg(1., at='4')), FrobReg(1.)
    assert same(want, fit(FrobReg(1., at=lambda model: model[4])))
    learn = learner(cb)
    cb.at = learn.model[4]
    assert same(want, run(learn))
    for at in 'head', '9', '', lambda model: None, 4:
        with pytest.raises(ValueError, match=r'is no layer: .*such as '): fit(FrobReg(1., at=at))

def test_at_a_layer_whose_output_is_overwritten():
    "ReLU in place behind it: the penalty is still in what the layer gave"
    for f, _ in CASES.values():
        if f is CASES['ConfidencePenalty'][0]: continue
        assert_close(weights(fit(f(at='0'), net=inplace)), weights(fit(f(at='0'))), rtol=1e-9, atol=1e-12)

class Twice(nn.Module):
    "One layer for both halves"
    def __init__(self):
        super().__init__()
        self.side, self.end = seq(nn.Flatten(), nn.Linear(18, 5), nn.Tanh()), seq(nn.Tanh(), nn.Linear(10, 3))
    def forward(self, x):
        a, b = x.chunk(2, 2)
        return self.end(torch.cat([self.side(a), self.side(b)], 1))

class Folded(Twice):
    "The halves as rows of one call"
    def forward(self, x):
        h = self.side(torch.cat([o.flatten(1)[:, None] for o in x.chunk(2, 2)], 1).flatten(0, 1))
        return self.end(h.view(len(x), 10))

class Part(Twice):
    "The layer sees three of the examples only, then all"
    def forward(self, x):
        a, b = x.chunk(2, 2)
        first = torch.cat([self.side(a[:3]), self.side(a[3:])])
        return self.end(torch.cat([first, self.side(b)], 1))

@pytest.mark.parametrize('net', [Twice, Folded, Part])
@each_gradient
def test_at_a_layer_that_is_called_several_times(name, net):
    "The sum over the calls, which together are the input of the rest"
    cb = CASES[name][0](at='side')
    learn, spy, before = first_step(cb, net=net)
    x, y = learn.dls.train.one_batch()
    h = torch.cat([before.side(o) for o in x.chunk(2, 2)], 1).detach()
    want = vmap(lambda o, t: CASES[name][1](lambda o: before.end(o[None])[0], o, t))(h, onehot(y)).mean()
    assert_close(cb.penalties[0], want.item(), rtol=1e-9, atol=0)

def test_at_a_layer_that_is_not_called():
    class Idle(Twice):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="at='unused': the forward pass of this batch did not call the layer"):
        fit(FrobReg(1., at='unused'), net=Idle)
    with pytest.raises(ValueError, match='y does not depend on x|depends on no weight'): fit(FrobReg(1., at='6'))

@pytest.mark.parametrize('gives,why', [(lambda h: (h, h), 'gives a tuple, where one float tensor'),
                                       (lambda h: h.argmax(1, keepdim=True), 'gives torch.int64')])
def test_at_a_layer_that_gives_no_float_tensor(gives, why):
    class Gives(nn.Module):
        def forward(self, h): return gives(h)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.gives = conv(), Gives()
        def forward(self, x):
            z = self.net(x)
            self.gives(z)
            return z
    with pytest.raises(ValueError, match=why): fit(FrobReg(1., at='gives'), net=Net)

@pytest.mark.parametrize('frozen', [False, True])
@each_gradient
def test_at_the_embeddings_of_words(name, frozen):
    "Tokens have no derivative, their embeddings have, also where they are frozen or made without a graph"
    def net():
        net = Words().double()
        net.emb.weight.requires_grad_(not frozen)
        return net
    cb = CASES[name][0](at='emb')
    learn, spy, before = first_step(cb, **{**WORDS, 'net': net})
    x, y = learn.dls.train.one_batch()
    want = vmap(lambda o, t: CASES[name][1](lambda o: before.out(o.flatten()), o, t))(before.emb(x), onehot(y)).mean()
    assert_close(cb.penalties[0], want.item(), rtol=1e-9, atol=0)

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(20, 6, padding_idx=1), nn.RNN(6, 8, batch_first=True)
        self.encoder_dp = EmbeddingDropout(self.encoder, .5)
    def forward(self, ids): return self.rnn(self.encoder_dp(ids))[0]

@pytest.mark.parametrize('at', ['0.module.encoder_dp', lambda model: model[0].module.encoder_dp])
def test_at_the_embeddings_of_fastais_text_model(at):
    "Texts in pieces of four words: the encoder sees a part of the batch at a time, and what is too long is dropped"
    def net():
        head = PoolingLinearClassifier([24, 3], ps=[0.], bptt=4)
        return SequentialRNN(SentenceEncoder(4, Encoder(), pad_idx=1, max_len=8), head).double()
    ids = torch.randint(2, 20, (24, 12), generator=torch.Generator().manual_seed(0))
    for i, row in enumerate(ids): row[:i % 8] = 1  # padding in front, the longest texts first
    cb, calls, want = SpectReg(1e-9, probe=rowwise, at=at), [], []
    learn = learner(cb, RNNCallback(), net=net, dls=loaders(ids, valid=(ids[:8], VALID[1])))
    learn.model[0].module.encoder_dp.register_forward_hook(lambda m, i, o: calls.append(o))
    def by_hand(self):
        grads = torch.autograd.grad((self.pred*rowwise(self.pred)).sum(), calls, retain_graph=True, allow_unused=True)
        want.append((len(calls), sum(g.square().sum().item() for g in grads if g is not None)/8))
    class Look(Callback):
        run_valid = False
        def before_batch(self): calls.clear()
        def after_loss(self): by_hand(self)
    learn.add_cb(Look())
    run(learn, lr=0.)
    assert [n for n, _ in want] == [3]*3
    assert_close(cb.penalties, [p for _, p in want], rtol=1e-9, atol=0)

@pytest.mark.parametrize('dtype,rtol', [(torch.float16, .02), (torch.bfloat16, .15)])
@each_gradient
def test_at_in_mixed_precision(name, dtype, rtol):
    "The layer's output is half, the penalty is not"
    half, full = CASES[name][0](at='4'), CASES[name][0](at='4')
    fit(half, CPUMixedPrecision(dtype), lr=1e-20, **floats()), fit(full, lr=1e-20, **floats())
    assert_close(half.penalties, full.penalties, rtol=rtol, atol=0)

def test_around_the_forward_pass():
    "Entered when the model is called, in batches with a penalty only; left after it, also by an error"
    seen = []
    class Watched(FrobReg):
        def around(self): return [*super().around(), self.ctx()]
        @contextmanager
        def ctx(self):
            seen.append('in')
            try: yield
            finally: seen.append('out')
    learn = learner(Watched(1., every=2))
    learn.model[0].register_forward_hook(lambda *_: seen.append('layer'))
    learn.add_cb(Callback(after_pred=lambda self: seen.append('pred')))
    run(learn)
    assert seen == [*['in', 'layer', 'out', 'pred'], 'layer', 'pred', *['in', 'layer', 'out', 'pred'], 'layer', 'pred']
    seen.clear()
    def fail(*_): raise RuntimeError('out of memory')
    handle = learn.model[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match='out of memory'): run(learn)
    assert seen == ['in', 'layer', 'out']
    handle.remove(), seen.clear()
    run(learn)
    assert seen[:4] == ['in', 'layer', 'out', 'pred'] and not learn.model._forward_hooks


# 22: graphs that cannot be differentiated again

class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0., batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
        self.out = nn.Linear(36, 3).double()
    def forward(self, x): return self.out(self.body(x[:, 0]).flatten(1))

@each_gradient
def test_pitfall_22_the_layer_is_named(name):
    said = r'scaled_dot_product\w+ in body.layers.0.self_attn \(MultiheadAttention\).*SDPBackend.MATH'
    with pytest.raises(NoSecondDerivative, match=said) as e: fit(CASES[name][0](), net=Attends)
    assert e.value.layer == 'body.layers.0.self_attn (MultiheadAttention)'
    cb = CASES[name][0]()
    with sdpa_kernel(SDPBackend.MATH): fit(cb, net=Attends)
    assert min(cb.penalties) > 0
    fit(ConfidencePenalty(1.), net=Attends)  # needs no second derivative


# 27: the first batch

@pytest.mark.parametrize('every', [1, 2])
def test_pitfall_27_a_penalty_that_drowns_the_loss(every):
    cb = FrobReg(1e4, every=every)
    said = 'frob_reg: lam.penalty is .* times the loss. Start from lam='
    with pytest.warns(UserWarning, match=said) as found: fit(cb, lr=0.)
    assert len([w for w in found if 'times the loss' in str(w.message)]) == 1
    start = float(re.search('lam=([^ ,]+),', str(found[0].message))[1])
    learn = fit(calm := FrobReg(start, every=every), lr=0.)
    assert .04 < every*start*calm.penalties[0]/learn.recorder.losses[0].item() < .2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(FrobReg(50*start, every=every), lr=0.)

def test_pitfall_27_an_infinite_penalty_is_refused():
    def steep():
        net = conv()
        net[4].weight.data.mul_(1e160)
        net[5] = nn.Hardtanh()
        net[4].bias.data.zero_()
        return net
    with pytest.raises(ValueError, match='spect_reg: the penalty of the first batch is (inf|nan), though the loss is'):
        fit(SpectReg(1., probe=lambda z: z.detach()*1e200))


# facts

@pytest.mark.parametrize('c', [2, 3, 7])
@each
def test_the_passes_that_a_class_names(name, c, monkeypatch):
    "By the directions in which PyTorch is asked to differentiate"
    asked, true = [], torch.autograd.grad
    def counted(y, x, v, **kw):
        asked.append(v.numel()//y.numel())
        return true(y, x, v, **kw)
    monkeypatch.setattr(torch.autograd, 'grad', counted)
    net = lambda: nn.Sequential(*list(conv())[:-1], nn.Linear(8, c).double())
    cb = CASES[name][0]()
    fit(cb, net=net, dls=loaders(y=Y % c, valid=(VALID[0], VALID[1] % c)))
    assert sum(asked) == 3*type(cb).passes(c)

@pytest.mark.parametrize('cls', PENALTIES)
def test_the_arguments_that_a_class_names(cls):
    own = set(inspect.signature(cls).parameters) - {'lam', 'every', 'at', 'generator', 'fast'}
    assert set(cls.takes) == own and cls.passes(10) >= 0
    assert all(p.kind == p.KEYWORD_ONLY for k, p in inspect.signature(cls).parameters.items() if k != 'lam')
