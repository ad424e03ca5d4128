"`lam_find`: leaves no trace, is right or says that it does not know, works for each penalty, names what is wrong."
import math, random
from functools import partial
import numpy as np
import pytest, torch
import fastai.callback.schedule  # noqa: F401 (gives the Learner fit_one_cycle)
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy, accuracy_multi
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from gradreg import callbacks, relative_callbacks
from gradreg.callbacks import ConfidencePenalty, DoubleBack, FrobReg, GradReg, SpectReg
from gradreg.data import image_dls
from gradreg.lam_find import Found, Short, as_it_was, judge, lam_find, mistakes, strengths_around
from gradreg.relative_callbacks import Sobolev, TwoSided
from nets import CPUMixedPrecision
from samples import real

# ---------------------------------------------------------------- small Learners

class Counts(nn.Module):
    "Holds a buffer that no state dict has."
    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(()), persistent=False)
    def forward(self, x):
        self.calls = self.calls + 1  # another tensor under the same name
        return x

def net(n_out=3):
    return nn.Sequential(Counts(), nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(.3),
                         nn.Linear(12, n_out))

def learner(*cbs, opt_func=Adam, loss_func=None, n_valid=30, plain=False, n_out=3, **kw):
    set_seed(0)
    x, y = torch.randn(60, 1, 4, 4), torch.randint(n_out, (60,))
    if isinstance(loss_func, nn.MSELoss): y = torch.randn(60, n_out)
    train, valid = list(zip(x[:30], y[:30])), list(zip(x[30:30 + n_valid], y[30:]))
    loader = torch.utils.data.DataLoader if plain else DataLoader
    size = dict(batch_size=8) if plain else dict(bs=8)
    loaders = [loader(train, shuffle=True, drop_last=True, **size)] + [loader(valid, **size)]*bool(n_valid)
    loss_func = loss_func or CrossEntropyLossFlat()
    return Learner(DataLoaders(*loaders), net(n_out), loss_func, opt_func=opt_func, cbs=cbs, lr=.01, **kw)

def fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn

def find(learn, penalty=SpectReg, n=2, lams=(.01, .1, 1), orders=1, **kw):
    return learn.lam_find(penalty, n=n, lams=lams, orders=orders, show_plot=False, **kw)

# ---------------------------------------------------------------- no trace

def state(learn):
    "All that a training changes, by value."
    cbs = [(getattr(cb, 'read', 0), len(getattr(cb, 'values', []))) for cb in learn.cbs]
    opt = learn.opt and [[o.clone() for o in s.values() if torch.is_tensor(o)] for s in learn.opt.state_dict()['state']]
    return dict(weights=[o.clone() for o in (*learn.model.parameters(), *learn.model.buffers())], cbs=cbs, opt=opt,
                grads=[p.grad is None or p.grad.clone() for p in learn.model.parameters()],
                modes=[m.training for m in learn.model.modules()], metrics=len(learn.metrics), lr=learn.lr,
                numbers=(random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state()))

def names(learn): return sorted(vars(learn)), [cb.name for cb in learn.cbs]

def same(a, b): assert_close(a, b, rtol=0, atol=0)

@pytest.mark.parametrize('plain', [False, True])
@pytest.mark.parametrize('epochs', [0, 2])
def test_the_learner_stays_as_it_is(epochs, plain):
    learn = learner(FrobReg(.1), metrics=accuracy, plain=plain)
    if epochs: fit(learn, epochs)
    learn.model.eval()
    for p in learn.model.parameters(): p.grad = torch.ones_like(p)
    before, opt, cbs, named = state(learn), learn.opt, list(learn.cbs), names(learn)
    find(learn)
    same(state(learn), before)
    assert learn.opt is opt and names(learn) == named and all(a is b for a, b in zip(learn.cbs, cbs, strict=True))

def trained_on(excursion, **kw):
    learn = fit(learner(SpectReg(.1, generator=torch.Generator().manual_seed(3)), **kw), 2)
    excursion(learn)
    return [p.detach() for p in fit(learn, 2).model.parameters()]

wrapped = partial(OptimWrapper, opt=torch.optim.AdamW)

@pytest.mark.parametrize('opt_func', [Adam, SGD, wrapped])
def test_a_training_goes_on_as_if_nothing_had_been(opt_func):
    kw = dict(opt_func=opt_func)
    same(trained_on(lambda learn: find(learn, FrobReg), **kw), trained_on(lambda learn: None, **kw))

class Interrupt(Callback):
    "Ctrl-C at the k-th time that an event comes."
    def __init__(self, event, k):
        self.left = [k]  # a list, for attributes are set back before each mock training
        setattr(self, event, self.stop)
    def stop(self):
        self.left[0] -= 1
        if not self.left[0]: raise KeyboardInterrupt

@pytest.mark.parametrize('k', [1, 7])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'before_step', 'after_batch', 'before_validate'])
def test_ctrl_c_leaves_no_trace(event, k):
    def excursion(learn):
        learn.add_cb(cb := Interrupt(event, k))
        with pytest.raises(KeyboardInterrupt): find(learn, FrobReg)
        learn.remove_cb(cb)
        assert not [c.name for c in learn.cbs if c.name in ('frob_reg', 'lr_finder')]
    same(trained_on(excursion), trained_on(lambda learn: None))

def test_a_generator_of_ones_own_is_set_back():
    g = torch.Generator().manual_seed(7)
    before = g.get_state()
    find(learner(), partial(SpectReg, generator=g))
    same(g.get_state(), before)

def test_nothing_is_saved(tmp_path):
    find(learner(SaveModelCallback(), path=tmp_path))
    assert not list(tmp_path.rglob('*'))

def test_the_history_of_a_training_stays(tmp_path):
    learn = fit(learner(CSVLogger(), path=tmp_path), 2)
    before = (tmp_path/'history.csv').read_text()
    find(learn)
    assert (tmp_path/'history.csv').read_text() == before and before.count('\n') == 3 and learn.csv_logger in learn.cbs

class Converted(Callback):
    "Trains in another type, or on another device, than the model has."
    def __init__(self, to): self.to = to
    def before_fit(self): self.model.to(self.to)
    def before_batch(self):
        self.learn.xb = [o.to(self.to) for o in self.xb]
        if self.to == 'cuda': self.learn.yb = [o.to(self.to) for o in self.yb]

@pytest.mark.parametrize('to', [torch.float64, 'cuda'], ids=str)
def test_what_a_callback_converts_is_converted_back(to):
    learn = learner(Converted(to))
    for p in learn.model.parameters(): p.grad = torch.ones_like(p)
    before = state(learn)
    find(learn)
    same(state(learn), before)  # types and devices too

def test_an_excursion_is_an_excursion():
    "What happens within changes the Learner, or the tests above would say nothing."
    learn = learner()
    before = state(learn)
    with as_it_was(learn):
        fit(learn)
        assert not torch.equal(state(learn)['weights'][0], before['weights'][0])
        assert learn.opt
    same(state(learn), before)

# ---------------------------------------------------------------- what is measured

def test_scores_and_penalty_are_those_of_a_loop_by_hand():
    "One strength of the table, trained by plain PyTorch on the batches in their order."
    kw = dict(opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    table = find(plain_net(learner(**kw)), FrobReg, n=4).table
    learn = plain_net(learner(**kw))
    model, opt = learn.model, torch.optim.SGD(learn.model.parameters(), lr=.01)
    def epoch(): return [(x.clone().requires_grad_(), y) for x, y in learn.dls.train]
    for x, y in epoch()[:2] + epoch()[:2]:  # two fits of two batches, each from a new epoch
        z = model(x)
        rows = torch.stack([torch.autograd.grad(z[:, c].sum(), x, create_graph=True)[0] for c in range(3)])
        opt.zero_grad()
        (F.cross_entropy(z, y) + 1.*rows.square().flatten(2).sum((0, 2)).mean()).backward()
        opt.step()
    x, y = (torch.cat(o) for o in zip(*learn.dls.valid))
    assert_close(table.end[1.], F.cross_entropy(model(x), y).item(), rtol=1e-4, atol=0)

def plain_net(learn, n_out=3):
    torch.manual_seed(1)
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, n_out))
    return learn

def test_all_strengths_see_the_same_batches():
    seen = []
    class Spy(Callback):
        def before_batch(self): seen.append((self.training, self.x.sum().item()))
    find(learner(Spy()), lams=[1e-6, 2e-6, 3e-6], n=3, orders=2)
    train = np.array([x for t, x in seen if t][4:]).reshape(4, 2, -1)[:, :, :3]  # after the first look; rows: strengths
    assert (train == train[:1]).all() and (train[:, 0] != train[:, 1]).all()

def test_mistakes_are_one_minus_accuracy():
    z, y = torch.randn(40, 5), torch.arange(40) % 5
    assert_close(1 - mistakes(z, y).mean(), accuracy(z, y))
    learn = learner(metrics=accuracy)
    table = find(learn, score=mistakes, n=2, lr=0.).table
    with learn.no_bar(): assert math.isclose(table.end[0], 1 - learn.validate()[1], abs_tol=1e-6)

# ---------------------------------------------------------------- the verdict

def made_up(best, width, noise, gain, seed, k=9, n=200):
    "Scores over strengths 10**((i-4)/2): a parabola with its least at number `best`, and noise of points and orders."
    rng = np.random.default_rng(seed)
    gains = gain*(1 - ((np.arange(k) - best)/width)**2)
    means = 1 - np.concatenate([[0], gains])
    noise_of = dict(points=.3*rng.normal(size=(2, 1, k + 1, n)), orders=noise*rng.normal(size=(2, 2, k + 1, 1)))
    return means[:, None] + .3*rng.normal(size=n) + sum(noise_of.values())

@settings(max_examples=200, deadline=None, derandomize=True)
@given(best=st.floats(2, 6), width=st.floats(2, 20), noise=st.floats(.001, .3), gain=st.floats(.02, .5),
       seed=st.integers(0, 10**6))
def test_the_verdict_is_right_or_there_is_none(best, width, noise, gain, seed):
    lam, reason = judge(strengths_around(1.), made_up(best, width, noise, gain, seed), 100)
    truth = 10**((best - 4)/2)
    assert reason and (lam is None or max(lam/truth, truth/lam) < 3.5), (lam, truth)

def test_clear_cases_are_known():
    found = [judge(strengths_around(1.), made_up(5, 4., .01, .3, seed), 100)[0] for seed in range(50)]
    known = [o for o in found if o]
    assert len(known) > 25 and sum(not 10**.5/3 < o < 3*10**.5 for o in known) <= 1

def test_nothing_to_gain_is_not_known():
    found = [judge(strengths_around(1.), made_up(4, 1e6, .05, 0., seed), 100)[0] for seed in range(200)]
    assert sum(o is not None for o in found) <= 5

# ---------------------------------------------------------------- real data

def digits_or_mnist(name, seed, *cbs, c=1., n_valid=500):
    "A small network on inputs in units of `c`."
    set_seed(seed)
    dls = image_dls(name, per_class=10, n_valid=n_valid, bs=25, seed=seed, device='cpu')
    for dl in dls.loaders: dl.dataset.x = dl.dataset.x*c
    class Units(nn.Module):
        def forward(self, x): return x.flatten(1)/c
    model = nn.Sequential(Units(), nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=Adam, lr=5e-3, cbs=cbs)

def with_wrong_labels(name, *cbs):
    "Three labels in ten are drawn by lot, so that there is something to gain."
    learn = digits_or_mnist(name, 0, *cbs)
    y, g = learn.dls.train.dataset.y, torch.Generator().manual_seed(0)
    wrong = torch.rand(len(y), generator=g) < .3
    y[wrong] = torch.randint(10, (int(wrong.sum()),), generator=g)
    return learn

def trained(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(20, cbs=Short(10**9))  # without validation
    return learn

def validated(learn):
    with learn.no_bar(): return learn.validate()[0]

@pytest.mark.parametrize('name', ['digits', pytest.param('mnist', marks=real('mnist'))])
def test_within_a_factor_of_three_of_full_runs(name):
    losses = {lam: validated(trained(with_wrong_labels(name, SpectReg(lam)))) for lam in (.03, .1, .3, 1)}
    best = min(losses, key=losses.get)
    found = find(trained(with_wrong_labels(name)), n=80, lams=[.01, .03, .1, .3, 1, 3], orders=2)
    assert found.lam and max(found.lam/best, best/found.lam) < 3.1, (found, losses)

def test_a_network_that_still_learns_is_not_judged():
    "After 60 batches the best strength would be a thirtieth of what whole trainings choose."
    found = find(with_wrong_labels('digits'), n=60, lams=[.01, .1, 1], orders=1)
    assert found.lam is None and 'still learns after 60 batches' in found.reason

@pytest.mark.parametrize('c', [2.**-10, 2.**10])
def test_the_units_of_the_inputs_change_the_strength_and_nothing_else(c):
    "A first penalty of 1e5 or 1e-5: the derivative is 1/c of what it was, and the best strength c**2."
    here = find(digits_or_mnist('digits', 0, n_valid=200), n=8, lams=None)
    there = find(digits_or_mnist('digits', 0, c=c, n_valid=200), n=8, lams=[o*c**2 for o in here.table.index[1:]])
    np.testing.assert_allclose(there.table.end, here.table.end, rtol=1e-4)
    np.testing.assert_allclose(there.table.penalty*c**2, here.table.penalty, rtol=1e-3)
    grid = find(digits_or_mnist('digits', 0, c=c, n_valid=200), n=8, lams=None).table.index[1:]
    middle = here.table.end[0]/here.table.penalty[0]*c**2
    assert grid[0] < middle/30 and grid[-1] > 30*middle

# ---------------------------------------------------------------- every penalty, every kind of Learner

every = [o for m in (callbacks, relative_callbacks) for o in (getattr(m, n) for n in m.__all__)
         if isinstance(o, type) and issubclass(o, GradReg) and o is not GradReg]

@pytest.mark.parametrize('penalty', every, ids=lambda o: o.__name__)
def test_each_penalty(penalty):
    critic = penalty is TwoSided
    learn = plain_net(learner(loss_func=nn.MSELoss(), n_out=1), 1) if critic else plain_net(learner())
    made = partial(Sobolev, oracle=net()) if penalty is Sobolev else penalty
    table = find(learn, made, n=4).table
    assert np.isfinite(table.values).all() and table.penalty.ne(0).all()
    assert table.end.nunique() == 4  # the strength does something

@pytest.mark.parametrize('kw,cbs', [
    (dict(loss_func=nn.MSELoss()), []), (dict(loss_func=nn.CrossEntropyLoss(reduction='sum')), []),
    (dict(plain=True), []),
    ({}, [GradientAccumulation(16)]), ({}, [MixUp()]), ({}, [ConfidencePenalty(.1)]), (dict(metrics=accuracy), [])])
def test_each_learner(kw, cbs):
    found = find(learner(*cbs, **kw), DoubleBack)
    assert isinstance(found, Found) and np.isfinite(found.table.values).all()

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_says_the_same(dtype):
    "Up to rounding; a mock training of one batch takes no step while the scaler looks for its scale."
    seen = []
    spy = Callback(after_pred=lambda self: seen.append(torch.is_autocast_enabled('cpu')))
    half, whole = (find(learner(*cbs), n=4).table for cbs in ([CPUMixedPrecision(dtype, init_scale=2.**8), spy], []))
    assert seen and all(seen)
    np.testing.assert_allclose(half.drop(columns=['gain', 'error']), whole.drop(columns=['gain', 'error']), rtol=.03)

class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = net(), net()
    def forward(self, x, z): return self.left(x) + self.right(z)

@pytest.mark.parametrize('at', [None, 'right.4', lambda m: m.left[4]])
def test_several_inputs_and_a_layer(at):
    learn = learner()
    for dl in learn.dls.loaders: dl.dataset, dl.n_inp = [(x, x.flip(1), y) for x, y in dl.dataset], 2
    learn.model = TwoInputs()
    table = find(learn, partial(SpectReg, at=at)).table
    assert table.penalty.gt(0).all() and table.end.nunique() == 4

def several_labels(loss_func):
    learn = plain_net(learner(loss_func=loss_func, metrics=accuracy_multi))
    for dl in learn.dls.loaders: dl.dataset = [(x, torch.eye(3)[y]) for x, y in dl.dataset]
    return learn

@pytest.mark.parametrize('loss_func', [BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss(),
                                       F.binary_cross_entropy_with_logits])
def test_several_labels(loss_func):
    learn = several_labels(loss_func)
    table = find(learn, lr=0.).table
    with learn.no_bar(): assert_close(table.end[0], learn.validate()[0], rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r'score=lambda'): find(learn, score=mistakes)
    table = find(learn, lr=0., score=lambda z, y: ((z > 0) != y).float().mean(1)).table
    with learn.no_bar(): assert_close(1 - table.end[0], learn.validate()[1], rtol=1e-4, atol=0)

def share(pred, targ): return (pred.argmax(1) == targ).float().mean()

class Watch(Callback):
    "Reads what the Recorder wrote, as callbacks of one's own do."
    order = 60
    def before_fit(self): self.read = 0
    def after_epoch(self): self.read += len(self.recorder.values[-1])

def test_metrics_and_callbacks_of_ones_own():
    learn = fit(learner(Watch(), EarlyStoppingCallback(patience=1), metrics=[share, F1Score(average='macro')]))
    before, read = state(learn), learn.watch.read
    found = find(learn, n=6)  # whole epochs too
    same(state(learn), before)
    assert learn.watch.read == read and np.isfinite(found.table.values).all()

def test_it_is_a_function_too():
    a, b = find(learner()), lam_find(learner(), SpectReg, [1, .1, .01], 2, orders=1, show_plot=False)
    assert a.table.equals(b.table)

def test_lazy_penalties():
    found = find(learner(), partial(SpectReg, every=2))
    assert found.table.penalty.gt(0).all() and found.table.end.nunique() == 4

def test_a_strength_that_breaks_the_training_is_no_choice():
    found = find(plain_net(learner(opt_func=SGD)), FrobReg, lams=[1e-3, 1e-2, 1e12], n=8)
    assert found.lam != 1e12 and np.isfinite(found.table.gain).all() and found.table.gain[1e12] < 0

def test_the_picture():
    axs = find(learner()).plot()
    lines = [[line.get_ydata() for line in ax.lines] for ax in axs]
    assert [len(o) for o in lines] >= [4, 2] and axs[1].get_yscale() == 'log'
    assert find(learner(), ConfidencePenalty).plot()[1].get_yscale() == 'linear'  # minus an entropy

# ---------------------------------------------------------------- what is wrong is named

@pytest.mark.parametrize('penalty,kw,said', [
    (SpectReg(.1), {}, r'spect_reg has its strength: pass the class, SpectReg'),
    (partial(SpectReg, lam=.1), {}, 'multiple values for argument .lam.*the strength left open'),
    (Sobolev, {}, "missing 1 required keyword-only argument: 'oracle'"),
    (.1, {}, 'not callable.*pass a class such as SpectReg'),
    (lambda lam: MixUp(lam), {}, 'made a MixUp, not a penalty'),
    (SpectReg, dict(lams=[0, .1, 1]), 'lams holds 0'),
    (SpectReg, dict(lams=[.1, -.1, 1]), 'lams holds -0.1'),
    (SpectReg, dict(lams=[.1, math.inf, 1]), 'lams holds inf'),
    (SpectReg, dict(lams=[.1, True, 1]), 'lams holds True'),
    (SpectReg, dict(lams=[.1, .1, .1]), 'three strengths or more'),
    (SpectReg, dict(n=1), 'n=1: must be a whole number, at least 2'),
    (SpectReg, dict(n=2.5), 'n=2.5'),
    (SpectReg, dict(orders=0), 'orders=0'),
    (SpectReg, dict(score=lambda p, t: (p.argmax(1) != t).float().mean()), 'score gave .*not one number per example'),
    (SpectReg, dict(lr=1e30, lams=None), 'without a penalty the training diverges: take a smaller lr'),
    (SpectReg, dict(lr=1e30), 'without a penalty the training diverges')])
def test_wrong_use(penalty, kw, said):
    learn = learner()
    before = state(learn)
    with pytest.raises(ValueError, match=said): find(learn, penalty, **kw)
    same(state(learn), before)

def test_a_learner_that_has_the_penalty():
    with pytest.raises(ValueError, match=r'has a SpectReg of strength 0.3: .*learn.remove_cb\(learn.spect_reg\)'):
        find(learner(SpectReg(.3)))

def test_a_learner_without_validation_points():
    for learn in learner(n_valid=0), learner():
        learn.dls.loaders[1:] = [None]*(len(learn.dls.loaders) - 1)
        with pytest.raises(ValueError, match='no validation points'): find(learn)

def test_a_learner_without_a_whole_batch():
    learn = learner()
    learn.dls.train = learn.dls.train.new(bs=64)
    with pytest.raises(ValueError, match='no whole batch'): find(learn)

def test_a_loss_without_terms():
    with pytest.raises(ValueError, match='needs a `reduction`.*score='):
        find(learner(loss_func=lambda z, y: F.cross_entropy(z, y)))
    find(learner(loss_func=lambda z, y: F.cross_entropy(z, y)), score=mistakes)

def test_a_grid_that_cannot_be_placed():
    learn = plain_net(learner())
    for p in learn.model[1].parameters(): p.requires_grad_(False).zero_()  # the outputs do not depend on the inputs
    with pytest.raises(ValueError, match=r'the penalty is 0.0, .*lams='): find(learn, lams=None)
