"The relatives in a Learner: strength zero, accumulation, lazy batches, scaled gradients, what they leave alone"
import copy, math
from types import SimpleNamespace
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.optimizer import SGD
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from gradreg.callbacks import DoubleBack
from gradreg.relative_callbacks import (DataGrad, FiniteDifference, Layerwise, Sobolev, SpectralNormReg, SpectralNorms,
                                        TangentProp, TwoSided, own_losses)
from gradreg.runs import Run
from gradreg.training import run
from nets import Once, rowwise, weights

rng = torch.Generator().manual_seed(0)
X, Y = torch.rand(16, 1, 8, 8, generator=rng), torch.arange(16) % 3

def net(n_out=3, *more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), *more, nn.Linear(27, n_out))

ORACLE = net(3, nn.Tanh())

CASES = {'TangentProp': lambda lam=.1, **kw: TangentProp(lam, probe=rowwise, **kw),
         'DataGrad': lambda lam=1., **kw: DataGrad(lam, eps=.3, **kw),
         'FiniteDifference': lambda lam=5., **kw: FiniteDifference(lam, **kw),
         'Layerwise': lambda lam=.01, **kw: Layerwise(lam, probe=rowwise, **kw),
         'Sobolev': lambda lam=1., **kw: Sobolev(lam, oracle=ORACLE, probe=rowwise, **kw),
         'SpectralNorms': lambda lam=.05, **kw: SpectralNorms(lam, **kw),
         'SpectralNorms of operators': lambda lam=.05, **kw: SpectralNorms(lam, operators=True, **kw),
         'SpectralNormReg': lambda lam=1., **kw: SpectralNormReg(lam, tol=1e-5, **kw),
         'TwoSided': lambda lam=1., **kw: TwoSided(lam, **kw)}
each = pytest.mark.parametrize('name', CASES)

def learner(*cbs, name='', bs=8, model=None, n=16, loss_func=None):
    one = name == 'TwoSided'
    y = Y.float() if one else Y
    data = list(zip(X, y))[:n]
    return Learner(DataLoaders(DataLoader(data, bs=bs), DataLoader(data, bs=bs)), model or net(1 if one else 3),
                   loss_func=loss_func or (MSELossFlat() if one else nn.CrossEntropyLoss()), opt_func=SGD, cbs=cbs)

def fit(*cbs, epochs=2, **kw):
    torch.manual_seed(1)
    learn = learner(*cbs, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, .1)
    return learn

@each
def test_no_strength_no_change(name):
    assert_close(weights(fit(CASES[name](0.), name=name)), weights(fit(name=name)), rtol=0, atol=0)

@each
def test_it_changes_the_training_and_is_logged(name):
    cb = CASES[name]()
    learn = fit(cb, name=name)
    assert len(cb.penalties) == 4 and all(map(math.isfinite, cb.penalties)) and cb.name in learn.recorder.metric_names
    assert not torch.allclose(weights(learn)['0.weight'], weights(fit(name=name))['0.weight'], rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('name', [k for k in CASES if 'Norms' not in k])  # these take a power step in each half
def test_accumulated_halves_are_the_whole(name):
    whole = fit(CASES[name](), name=name, bs=16)
    halves = fit(CASES[name](), GradientAccumulation(16), name=name, bs=8)
    assert_close(weights(halves), weights(whole), rtol=1e-3, atol=1e-5)

@each
def test_lazy_is_stronger_on_fewer_batches(name):
    lazy, eager = CASES[name](every=2), CASES[name]()
    fit(lazy, name=name, bs=4)
    fit(eager, name=name, bs=4)
    assert len(lazy.penalties) == 4 and len(eager.penalties) == 8
    once, double = (fit(CASES[name](.04/k, every=k), name=name, bs=16, epochs=1) for k in (2, 1))
    assert_close(weights(once), weights(double))

class Scaler(Callback):
    "Scales as MixedPrecision does, and unscales."
    order = 10
    def before_fit(self): self.learn.scaler = SimpleNamespace(scale=lambda t: 1024*t)
    def after_fit(self): del self.learn.scaler

@each
def test_scaling_changes_nothing_in_full_precision(name):
    plain, scaled = CASES[name](), CASES[name]()
    want, got = fit(plain, name=name), fit(scaled, Scaler(), name=name)
    assert_close(scaled.penalties, plain.penalties, rtol=1e-3, atol=1e-6)
    assert_close(weights(got), weights(want), rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('cb', [TangentProp, DataGrad, FiniteDifference, Layerwise, SpectralNormReg, SpectralNorms])
def test_the_dropout_and_the_order_of_the_training_are_its_own(cb):
    "At next to no strength the weights are those without a penalty: what is drawn for it is drawn elsewhere."
    with_dropout = net(3, nn.Dropout(.5))
    torch.manual_seed(1)
    want = fit(model=copy.deepcopy(with_dropout))
    state = torch.get_rng_state()
    got = fit(cb(1e-12), model=copy.deepcopy(with_dropout))
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(weights(got), weights(want))

@pytest.mark.parametrize('cb', [DataGrad, FiniteDifference])
def test_two_passes_are_one_network(cb):
    pens = []
    for more in (), (nn.Dropout(0.),), (nn.Dropout(.5),):
        pen = cb(1e-9)
        fit(pen, model=net(3, *more), epochs=1)
        pens.append(pen.penalties[0])
    assert pens[0] == pytest.approx(pens[1]) and pens[2] < 20*pens[0]  # another mask would make it thousands

REDUCED = {'class weights': nn.CrossEntropyLoss(weight=torch.tensor([.1, 1., 5.])),
           'ignored': nn.CrossEntropyLoss(ignore_index=1),
           'sum': nn.CrossEntropyLoss(reduction='sum'),
           'smoothed': LabelSmoothingCrossEntropyFlat(), 'function': F.cross_entropy}

@pytest.mark.parametrize('name', REDUCED)
def test_losses_are_those_of_the_learner(name):
    "By N times the derivative of the reduced loss in each example's outputs, or by the derivative of the sum."
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y, loss = torch.tensor([0, 2, 1, 0, 1, 2]), copy.deepcopy(REDUCED[name])
    if hasattr(loss, 'weight') and loss.weight is not None: loss = loss.double()
    whole = loss(z, y)
    want, = torch.autograd.grad(whole*(1 if name == 'sum' else 6), z)
    ours = own_losses(loss, z, y)
    for i in range(6):
        g, = torch.autograd.grad(ours[i], z, retain_graph=True)
        assert_close(g[i], want[i], rtol=1e-5, atol=1e-6)
    assert_close(ours.sum() if name == 'sum' else ours.mean(), whole.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)
    assert getattr(loss, 'reduction', 'mean') != 'none'  # left as it was

def test_all_ignored_is_no_loss():
    z = torch.randn(2, 3, requires_grad=True)
    assert own_losses(nn.CrossEntropyLoss(ignore_index=0), z, torch.zeros(2, dtype=torch.long)).tolist() == [0, 0]

def test_mixed_targets():
    cb = FiniteDifference(5.)
    fit(cb, MixUp(.4), loss_func=CrossEntropyLossFlat())
    assert len(cb.penalties) == 4 and all(o > 0 for o in cb.penalties)

def test_a_loss_without_terms_is_refused():
    def mean(z, y, reduction='mean'): return z.mean()
    for loss, said in (lambda z, y: z.mean(), 'needs a `reduction`'), (mean, 'for 2 examples'):
        with pytest.raises(ValueError, match=said): own_losses(loss, torch.randn(2, 3), torch.zeros(2))

def test_several_inputs_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(64, 3)
        def forward(self, a, b): return self.last((a + b).flatten(1))
    data = list(zip(X, X, Y))
    dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8))
    for d in dls: d.n_inp = 2
    learn = Learner(dls, Two(), nn.CrossEntropyLoss(), cbs=DataGrad(1.))
    with pytest.raises(ValueError, match='batches have 2'): learn.fit(1)

def test_finite_difference_is_double_back_without_double_backward():
    pens = DoubleBack(5.), FiniteDifference(5., h=.001)
    a, b = (weights(fit(cb)) for cb in pens)
    assert_close(a, b, rtol=1e-2, atol=1e-3)

    class Tanh(nn.Module):
        def forward(self, x): return Once.apply(x)
    model = net()
    model[1] = Tanh()
    assert_close(weights(fit(FiniteDifference(5., h=.001), model=model)), b, rtol=1e-2, atol=1e-3)

def test_the_oracle_learns_nothing():
    oracle = net()
    before = copy.deepcopy(oracle.state_dict())
    fit(Sobolev(1., oracle=oracle))
    assert_close(oracle.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in oracle.parameters())

def test_vectors_follow_the_model():
    cb = SpectralNorms(.1)
    learn = fit(cb)
    first = cb.vectors
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert set(first) == {'0', '4'} and set(cb.vectors) == {'1'}

def test_layers_need_an_order():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()
        def forward(self, x): return self.body(x)
    with pytest.raises(TypeError, match='layers have no order'): fit(Layerwise(.1), model=Net())

FACTS = {TangentProp: (1, ('probe',)), DataGrad: (1, ()), FiniteDifference: (1, ()), Layerwise: (1, ('probe',)),
         Sobolev: (2, ('probe',)), SpectralNorms: (0, ()), SpectralNormReg: (21, ()), TwoSided: (1, ())}

@pytest.mark.parametrize('cb', FACTS, ids=lambda o: o.__name__)
def test_what_a_class_says_of_itself(cb): assert (cb.passes(10), cb.takes) == FACTS[cb]

# ---------------------------------------------------------------- in a study

SMALL = dict(data='digits', n_train=10, n_valid=10, bs=5, iters=3)

WITHOUT_MORE = [TangentProp, DataGrad, FiniteDifference, Layerwise, SpectralNorms, SpectralNormReg, TwoSided]

@pytest.mark.parametrize('cb', WITHOUT_MORE)
def test_a_run_takes_it_by_its_path(cb):
    kind = dict(SMALL, data='sin', model='mlp') if cb is TwoSided else SMALL
    path = f'gradreg.relative_callbacks:{cb.__name__}'
    rows = [run(Run(**kind, penalty=path, strength=lam), torch.device('cpu')) for lam in (.5, .5, 1e-9)]
    assert all(o['status'] == 'ok' for o in rows)
    assert rows[0]['weight_norm'] == rows[1]['weight_norm'] != rows[2]['weight_norm']
