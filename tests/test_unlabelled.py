"Unlabelled batches in a Learner: what sees them and what does not, accumulation, lazy penalties, errors"
import copy
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from torch import nn
from torch.testing import assert_close
from gradreg.callbacks import ConfidencePenalty, DoubleBack, FrobReg, JacReg, SpectReg
from gradreg.relative_callbacks import FiniteDifference, SpectralNorms
from gradreg.unlabelled import Unlabelled
from nets import weights

rng = torch.Generator().manual_seed(0)
X, Y, U = torch.rand(24, 1, 8, 8, generator=rng), torch.arange(24) % 3, torch.rand(12, 1, 8, 8, generator=rng)

def net(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), *more, nn.Linear(108, 3))

class Spy(Callback):
    "Shapes of what the loop holds, after everybody else."
    order = 70
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append([self.training, len(self.x)])
    def after_pred(self): self.seen[-1].append(len(self.pred))
    def before_backward(self): self.seen[-1].append(len(self.pred))
    def after_batch(self): self.seen[-1].append(len(self.pred))

class TrainMetrics(Callback):
    def before_fit(self): self.learn.recorder.train_metrics = True

def fit(*cbs, model=None, bs=8, epochs=2, **kw):
    data = list(zip(X, Y))
    dls = DataLoaders(DataLoader(data, bs=bs), DataLoader(data, bs=bs))
    learn = Learner(dls, model or net(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=cbs, **kw)
    torch.manual_seed(1)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, .1)
    return learn


def test_loss_and_metrics_see_the_labelled_only():
    spy = Spy()
    learn = fit(SpectReg(.1), Unlabelled([U]), spy, TrainMetrics(), metrics=accuracy, epochs=1)
    assert spy.seen == [[True, 20, 8, 8, 8]]*3 + [[False, 8, 8, 8]]*3
    assert len(learn.recorder.values[0]) >= 5  # loss and accuracy of both parts, and the penalty

@pytest.mark.parametrize('pen', [SpectReg, FrobReg, JacReg, ConfidencePenalty, SpectralNorms])
def test_no_strength_no_change(pen):
    assert_close(weights(fit(pen(0.), Unlabelled([U]))), weights(fit()))

def test_labelled_images_brought_again_change_nothing():
    "The mean over a batch and the same batch once more is the mean over the batch."
    for pen in FrobReg, JacReg, ConfidencePenalty:
        assert_close(weights(fit(pen(.5), Unlabelled(X.split(8)))), weights(fit(pen(.5))))

def test_the_penalty_is_the_mean_over_both():
    model, pen = net(), FrobReg(.1)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    fit(pen, Unlabelled([U]), model=linear, epochs=1)
    def of(x): return torch.func.vmap(torch.func.jacrev(lambda o: model(o[None])[0]))(x).flatten(1).square().sum(1)
    want, pen = of(torch.cat([X[:8], U])).mean().item(), FrobReg(1e-9)
    fit(pen, Unlabelled([U]), model=copy.deepcopy(model), epochs=1)
    assert pen.penalties[0] == pytest.approx(want, rel=1e-5)

def test_accumulated_halves_are_the_whole():
    whole = fit(FrobReg(.5), Unlabelled([U]), bs=24)
    halves = fit(FrobReg(.5), Unlabelled(U.split(6)), GradientAccumulation(24), bs=12)
    assert_close(weights(halves), weights(whole), rtol=1e-4, atol=1e-6)

def test_it_comes_after_mixup():
    pen = FrobReg(.1)
    fit(MixUp(.4), pen, Unlabelled([U]))
    assert len(pen.penalties) == 6

def test_a_penalty_now_and_then():
    lazy = FrobReg(.1, every=3)
    fit(lazy, Unlabelled([U]))
    assert len(lazy.penalties) == 2

def test_batches_come_in_turn_and_whole_loaders_begin_anew():
    seen = []
    class Watch(Callback):
        order = 70
        def before_batch(self):
            if self.training: seen.append(self.x[8:, 0, 0, 0].tolist())
    fit(SpectReg(.1), Unlabelled(DataLoader(list(zip(U, range(12))), bs=5)), Watch())
    assert seen == [U[i:i+5, 0, 0, 0].tolist() for i in (0, 5, 10)]*2

class OnTheTruth(FrobReg):
    "A penalty of one's own that is told which class is the true one"
    needs_labels = True
    def outputs(self): return self.pred.gather(1, self.y[:, None])

@pytest.mark.parametrize('pen', [DoubleBack, FiniteDifference, OnTheTruth])
def test_what_needs_labels_is_refused(pen):
    with pytest.raises(ValueError, match='needs labels'): fit(pen(1.), Unlabelled([U]))

@pytest.mark.parametrize('batches,said', [([], 'no iterator'), ([U[..., 1:]], 'do not fit')])
def test_wrong_batches_are_refused(batches, said):
    with pytest.raises(ValueError, match=said): fit(SpectReg(1.), Unlabelled(batches))
