"The penalties in a fastai Learner: what is known to go wrong (by the number of the pitfall), and what users do"
import copy, gc, math, re, sys, weakref
from types import SimpleNamespace
import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import CastToTensor, Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam, SGD
from fastai.torch_core import TensorImage, params
from fastcore.foundation import L
from torch import nn
from torch.func import functional_call, grad_and_value, jacrev, vmap
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import TensorDataset
from gradreg.callbacks import ConfidencePenalty, DoubleBack, FrobReg, GradReg, JacReg, SpectReg
from gradreg.data import ArrayDL, ArrayDS
from gradreg.penalties import frob_reg, rademacher, spect_reg, sphere

F64, DEV = torch.float64, 'cuda' if torch.cuda.is_available() else 'cpu'
rng = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 1, 6, 6, dtype=F64, generator=rng), torch.arange(24) % 3
VALID = torch.randn(8, 1, 6, 6, dtype=F64, generator=rng), torch.arange(8) % 3

def seq(*layers): return nn.Sequential(*layers).double()
def conv():
    return seq(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
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

def rowwise(z): return z.detach().cos() + .1  # a probe without chance, the same for an example whatever batch it is in

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
        assert_close(got[k].double(), want[k], rtol=rtol, atol=rtol*want[k].abs().max().item(), msg=lambda m: f'{k}: {m}')

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
@pytest.mark.parametrize('cb', [SpectReg, DoubleBack, FrobReg, JacReg, ConfidencePenalty])
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
    with pytest.raises(ValueError, match=f'{re.escape(f"lam={lam!r}")}: .*finite number, at least 0'): CASES[name][0](lam)

def test_numpys_numbers_are_strengths(): assert not same(fit(), fit(FrobReg(np.float32(.1))))

@pytest.mark.parametrize('every', [0, -1, 1.5, 2., '2', None])
@each
def test_bad_every(name, every):
    with pytest.raises(ValueError, match=f"every={re.escape(repr(every))}: .*whole number, at least 1"): CASES[name][0](every=every)


# 1: mixed precision

class CPUMixedPrecision(MixedPrecision):
    "fastai's names CUDA; the CPU has all of it too"
    def __init__(self, dtype=torch.float16):
        super().__init__()
        self.dtype = dtype
    def before_fit(self):
        self.autocast, self.scales = torch.autocast('cpu', dtype=self.dtype), L()
        self.learn.scaler = torch.amp.GradScaler('cpu', enabled=self.dtype == torch.float16)

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
        if unscaled: cb.scaled = lambda penalty, y, *args: penalty(y, cb.x, *args)
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
    for cls in SpectReg, DoubleBack, FrobReg, JacReg, ConfidencePenalty:
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
    with pytest.raises(ValueError, match='x is torch.int64, .*output of the embedding layer'):
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
    with pytest.raises(TypeError, match='x is a tuple, not a tensor: call once for each input'):
        fit(CASES[name][0](), net=Sum, dls=two_inputs())

def test_pitfall_17_the_way_out_for_several_inputs():
    class Both(GradReg):
        def penalty(self):
            v = rowwise(self.pred)
            return sum(spect_reg(self.pred, x, v) for x in self.x if x.is_floating_point())
    joint, apart, part = SpectReg(2., probe=rowwise), Both(2.), Both(2.)
    a, b = fit(joint, net=Sum), fit(apart, net=Sum, dls=two_inputs())
    assert_close(weights(a), weights(b), rtol=1e-9, atol=1e-12)
    assert_close(joint.penalties, apart.penalties, rtol=1e-9, atol=0)
    fit(part, net=Sum, dls=two_inputs(X[..., :2].long()))  # integers beside floats are left alone
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
    with pytest.raises(ValueError, match=r'y has shape \(8, 3, 6, 6\), but its Jacobian needs \(N,C\)'):
        fit(FrobReg(1.), **kw)

class NoReduction(nn.Module):
    def forward(self, z, y): return F.cross_entropy(z, y)
def deaf(z, y, reduction='mean'): return F.cross_entropy(z, y)

@pytest.mark.parametrize('loss_func,match', [
    (lambda z, y: F.cross_entropy(z, y), 'gives no loss per example: .*needs a loss function with `reduction`'),
    (NoReduction(), 'NoReduction.* gives no loss per example'),
    (deaf, r"deaf.* shape \(\) for 8 examples: it must honour reduction='none'")])
def test_a_loss_without_reduction(loss_func, match):
    with pytest.raises(ValueError, match=match): fit(DoubleBack(1.), loss_func=loss_func)
    cb = SpectReg(1.)
    fit(cb, loss_func=loss_func)  # who needs no loss per example takes any
    assert len(cb.penalties) == 3

def test_a_failing_loss_keeps_its_reduction():
    loss_func = CrossEntropyLossFlat()
    class Fails(DoubleBack):
        def losses(self): super().losses(); raise RuntimeError('after the loss')
    with pytest.raises(RuntimeError, match='after the loss'): fit(Fails(1.), loss_func=loss_func)
    assert loss_func.reduction == 'mean'


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

@each
def test_no_synchronisation_in_a_batch(name, monkeypatch):
    "Every way from a tensor to Python is watched: gradreg takes one per epoch, after the last batch"
    def ours():
        f = sys._getframe(2)
        while f:
            if f.f_globals.get('__name__') in {f'gradreg.{m}' for m in ('callbacks', 'penalties', 'jacobians')}: return True
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
    assert calls == [('tolist', False)]*2

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

@pytest.mark.parametrize('e,at,n', [(CancelFitException, 4, 5), (CancelTrainException, 1, 5), (CancelTrainException, 4, 5)])
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
    with pytest.raises(TypeError, match=r'GradReg has no penalty\(\) of its own: subclass GradReg'): fit(GradReg(1.))
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
    def inplace():
        net = conv()
        net[1] = nn.ReLU(inplace=True)
        return net
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
