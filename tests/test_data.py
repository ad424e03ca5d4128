"What a reader of chapter 06_data need not see: determinism, scaling, fastai's ways of use"
import hashlib, importlib.util, random, sys, types

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_basics import Pipeline, TensorImage
from fastai.vision.augment import RandTransform
from PIL import Image
from torch import nn

from gradreg import data
from gradreg.arrays import Arrays, load_arrays
from gradreg.data import (ArrayDL, ArrayDS, PixelTfms, balanced_idxs, channel_stats, image_dls, image_loaders, scale,
                          sin_dls, sin_loaders, split_idxs)
from samples import arrays, real


def sha(a): return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16]


# subsets

def test_uniform_is_numpys_double_from_the_same_bits():
    for seed in ((0,), (7, 2, 3), (2**40,)):
        want = np.random.Generator(np.random.PCG64(seed)).random(1000)
        np.testing.assert_allclose(data._uniform(1000, *seed), want, rtol=0, atol=2**-53)
    assert 0 < data._uniform(10**5, 1).min() and data._uniform(10**5, 1).max() < 1
    with pytest.raises(ValueError, match='the seed -1 is negative'): data._uniform(3, -1)


def test_subsets_are_pinned():
    "These hashes may change only with the protocol: other machines and older results count on them"
    y = np.arange(60000)*7919 % 10
    assert sha(balanced_idxs(y, 200, 0)) == '31ee7d08feceda7b'
    assert sha(balanced_idxs(y, 20, 12345)) == 'fc708d25518571ae'
    assert [sha(o) for o in split_idxs(y, 200, 10_000, 3)] == ['d5f1f1eae568ee09', '3e9fcabef7114038']
    dl = ArrayDL(ArrayDS(torch.arange(1000.)[:,None], torch.arange(1000)), 50, shuffle=True, seed=1)
    assert [sha(torch.cat([y for _,y in dl]).numpy()) for _ in range(2)] == ['b784ba09359ebebe', '9de16548489196c9']


def test_balanced_idxs_against_a_loop():
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(5), [9, 30, 12, 50, 8]))
    for seed in range(5):
        u, want = data._uniform(len(y), seed), []
        for c in range(5): want += sorted((u[i], i) for i in range(len(y)) if y[i] == c)[:8]
        idxs = balanced_idxs(y, 8, seed)
        assert idxs.tolist() == sorted(i for _,i in want) and idxs.dtype == np.int64
        assert np.bincount(y[idxs]).tolist() == [8]*5


def test_every_point_has_the_same_chance():
    y, seeds = np.repeat([0, 1], [20, 60]), 600
    counts = sum(np.bincount(balanced_idxs(y, 10, s), minlength=80) for s in range(seeds))
    p = np.repeat([1/2, 1/6], [20, 60])
    assert np.abs((counts - seeds*p)/np.sqrt(seeds*p*(1 - p))).max() < 4.5
    valid = sum(np.bincount(split_idxs(y, 10, 20, s)[1], minlength=80) for s in range(seeds))
    q = (1 - p)*20/60
    assert np.abs((valid - seeds*q)/np.sqrt(seeds*q*(1 - q))).max() < 4.5


@pytest.mark.parametrize('args, message', [
    ((np.arange(20) % 2, 11), 'class 0 has 10 points, per_class=11 is too many'),
    ((np.array([0, 0, 2, 2]), 1), 'class 1 has 0 points'),
    ((np.arange(20) % 2, 0), 'per_class=0: at least 1'),
    ((np.arange(20) % 2, 2, -3), 'seed -3 is negative')])
def test_balanced_idxs_refuses(args, message):
    with pytest.raises(ValueError, match=message): balanced_idxs(*args)


@pytest.mark.parametrize('n_valid', [0, 11, -1])
def test_too_few_validation_points(n_valid):
    with pytest.raises(ValueError, match=f'n_valid={n_valid}: 10 of the 20 points .* leaves 1 to 10'):
        split_idxs(np.arange(20) % 2, 5, n_valid)


def test_the_training_subset_does_not_depend_on_n_valid():
    y = np.arange(500) % 10
    splits = [split_idxs(y, 10, n, 4) for n in (1, 100, 400)]
    for train, valid in splits:
        np.testing.assert_array_equal(train, balanced_idxs(y, 10, 4))
        assert not set(train) & set(valid)
    assert set(splits[0][1]) < set(splits[1][1]) < set(splits[2][1])
    assert set(splits[2][0]) | set(splits[2][1]) == set(range(500))


# scaling and splits, as they arrive in the loaders

def named(**kwargs): return Arrays(**(d := arrays(**kwargs)), classes=np.unique(d['y_train']).astype(str))


def pixels(ds):
    x = ds.x.permute(0, 2, 3, 1)*torch.tensor(ds.sd) + torch.tensor(ds.mean)
    return [o.tobytes() for o in x.round().numpy().astype(np.uint8)]


@pytest.mark.parametrize('shape', [(8, 8), (6, 5, 1), (8, 6, 3)])
def test_parts_do_not_overlap_and_are_what_they_should_be(shape):
    a = named(shape=shape)
    dls = image_dls(a, 5, 30, seed=2, bs=10, device='cpu')
    train, valid, test = (pixels(o.dataset) for o in dls)
    i, j = split_idxs(a.y_train, 5, 30, 2)
    assert train == [o.tobytes() for o in a.x_train[i]] and valid == [o.tobytes() for o in a.x_train[j]]
    assert test == [o.tobytes() for o in a.x_test]
    assert len({*train, *valid, *test}) == 20 + 30 + 20
    for dl, y in zip(dls, (a.y_train[i], a.y_train[j], a.y_test)): np.testing.assert_array_equal(dl.y, y)
    for dl in dls: assert dl.x.dtype == torch.float32 and dl.x.is_contiguous(memory_format=torch.channels_last)


def test_scaling_is_fitted_on_the_training_subset_only():
    a = named(shape=(8, 6, 3))
    dls, i = image_dls(a, 5, 30, bs=10, device='cpu'), balanced_idxs(a.y_train, 5)
    rest = np.setdiff1d(np.arange(60), i)
    b = a._replace(x_train=a.x_train.copy(), x_test=np.full_like(a.x_test, 3))
    b.x_train[rest] = 250
    other = image_dls(b, 5, 30, bs=10, device='cpu')
    assert torch.equal(dls.train.x, other.train.x) and not torch.equal(dls.valid.x, other.valid.x)
    f = a.x_train[i].astype(np.float64)
    mean, sd = f.mean((0,1,2)), f.std((0,1,2))
    for dl, x in zip(dls, (a.x_train[i], None, a.x_test)):
        if x is not None: np.testing.assert_allclose(dl.x.permute(0, 2, 3, 1), (x - mean)/sd, atol=2e-6)
    np.testing.assert_allclose(other.valid.x[0,:,0,0], (250 - mean)/sd, rtol=1e-5)


def test_channel_stats_do_not_overflow():
    x = np.full((3000, 64, 64), 255, np.uint8)
    x[0] = 0
    np.testing.assert_allclose(channel_stats(x), np.array([[255*2999/3000], [255*np.sqrt(2999)/3000]]), rtol=1e-9)
    mean, sd = channel_stats(np.full((4, 2, 2, 3), 9, np.uint8))
    assert mean.tolist() == [9]*3 and sd.tolist() == [1]*3
    assert torch.isfinite(scale(np.full((4, 2, 2, 3), 9, np.uint8), mean, sd)).all()


# loaders

def loader(n=103, **kwargs):
    return ArrayDL(ArrayDS(torch.arange(float(n))[:,None], torch.arange(n)), **{'bs': 10, **kwargs})


def test_an_epoch_holds_each_point_once():
    for dl, n in ((loader(), 103), (loader(shuffle=True), 103), (loader(shuffle=True, drop_last=True), 100)):
        for _ in range(3):
            b = list(dl)
            y = torch.cat([y for _,y in b])
            assert len(b) == len(dl) and len(y) == len(set(y.tolist())) == n
            assert all(torch.equal(x[:,0], y.float()) for x,y in b)
            assert {len(y) for _,y in b} <= ({10} if dl.drop_last else {10, 3})
            if not dl.shuffle: assert y.tolist() == list(range(103))
    dropped = set.union(*(set(range(103)) - set(torch.cat([y for _,y in dl]).tolist()) for _ in range(5)))
    assert len(dropped) > 3                                                         # not always the same three


def test_the_order_depends_on_seed_and_epoch_only():
    def epochs(dl, n=3): return [torch.cat([y for _,y in dl]).tolist() for _ in range(n)]
    want = epochs(loader(shuffle=True, seed=5))
    assert len({*map(tuple, want)}) == 3 and epochs(loader(shuffle=True, seed=6)) != want
    dl = loader(shuffle=True, seed=5)
    torch.manual_seed(123), np.random.seed(123), random.seed(123)
    def states(): return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    before = states()
    dl.one_batch(), dl.one_batch()
    assert epochs(dl) == want
    assert states() == before
    dl.epoch = 1
    assert epochs(dl, 2) == want[1:]                                                # an interrupted training can go on
    assert epochs(dl.new(), 1) == want[:1] and epochs(dl.new(seed=6), 1) != want[:1]


def test_a_batch_is_a_copy():
    dl = loader()
    dl.one_batch()[0].fill_(-1)
    next(iter(dl))[0].fill_(-1)
    assert dl.x.min() == 0


def test_no_batch():
    assert list(loader(n=0)) == [] and list(loader(n=5, drop_last=True)) == []
    with pytest.raises(ValueError, match='5 points give no batch of bs=10'): loader(n=5, drop_last=True).one_batch()
    with pytest.raises(ValueError, match='bs=50 is not from 1 to 20'): image_dls(named(), 5, 10)


def test_after_batch_is_called():
    dl = loader().new(after_batch=lambda b: (b[0] + 1, b[1]))
    assert all(torch.equal(x[:,0], y + 1.) for x,y in dl) and torch.equal(dl.one_batch()[0][:,0], torch.arange(1., 11))


def test_several_gpus_share_an_epoch(monkeypatch):
    if not importlib.util.find_spec('accelerate'): # fastai.distributed wants it; its loader does not use it
        monkeypatch.setitem(sys.modules, 'accelerate', types.SimpleNamespace(Accelerator=type('Accelerator', (), {})))
    from fastai.distributed import DistributedDL
    class Shared(DistributedDL):
        def _broadcast(self, t, rank): return t
    parts = [Shared(loader(n=100, shuffle=True, seed=1), rank=r, world_size=2) for r in range(2)]
    orders = []
    for _ in range(2):
        got = [torch.cat([y for _,y in p]).tolist() for p in parts]
        assert sorted(got[0] + got[1]) == list(range(100)) and len(got[0]) == 50
        orders.append(got)
    assert orders[0] != orders[1]


def test_the_data_move_to_the_device():
    dls = image_dls(named(), 5, 10, bs=10, device='cpu').to('meta')
    for dl in dls: assert dl.x.device.type == dl.y.device.type == dl.device.type == 'meta'
    assert dls.device == 'meta' or dls.device.type == 'meta'


# fastai

def learner(dls, n_in=64, n_out=4):
    torch.manual_seed(0)
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(n_in, n_out)), loss_func=nn.CrossEntropyLoss())


def test_learner(tmp_path):
    a = named()
    dls = image_dls(a, 10, 20, bs=8, valid_bs=7, device='cpu')
    learn = learner(dls)
    with learn.no_logging(): learn.fit(2, 1e-2)
    for i in range(3): # also the shuffled training points, in their order
        preds, targs = learn.get_preds(ds_idx=i)
        assert torch.equal(targs, dls[i].y)
        torch.testing.assert_close(preds, learn.model(dls[i].x).detach())
    preds, targs = learn.get_preds(dl=dls.train)
    assert torch.equal(targs, dls.train.y)
    assert np.isclose(learn.validate(dl=dls.test)[0], F.cross_entropy(learn.model(dls.test.x), dls.test.y).item())

    want = learn.get_preds(dl=dls.test)[0]
    torch.testing.assert_close(learn.get_preds(dl=dls.test_dl(a.x_test))[0], want)
    with pytest.raises(ValueError, match='test_items: the images are float64'): dls.test_dl(a.x_test/255)
    with pytest.raises(ValueError, match=r'images of \(8, 4\), those to train on are \(8, 8\)'):
        dls.test_dl(a.x_test[:,:,:4])
    with pytest.raises(ValueError, match='3 channels, but a scale for 1'): dls.test_dl(np.stack([a.x_test]*3, -1))
    learn.path = tmp_path
    learn.export('a.pkl')
    loaded = load_learner(tmp_path/'a.pkl')
    torch.testing.assert_close(loaded.get_preds(dl=loaded.dls.test_dl(a.x_test))[0], want)
    assert [len(o.dataset) for o in loaded.dls] == [0, 0, 0] and loaded.dls.vocab == list('0123')


def test_a_learner_finds_its_loss_in_the_data_of_classes():
    dls = image_dls(named(), 10, 20, bs=8, device='cpu')
    x, y = dls.valid.dataset[:]
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, dls.c)))
    assert np.isclose(learn.validate()[0], F.cross_entropy(learn.model(x), y).item())
    for other in sin_dls(20, n_valid=10, bs=8), types.SimpleNamespace(train_ds=ArrayDS(x)): # values, no targets
        with pytest.raises(AssertionError, match='loss function'): Learner(other, learn.model)


def test_fastais_interpretation_counts_each_class():
    from fastai.interpret import ClassificationInterpretation
    learn = learner(image_dls(named(), 10, 20, bs=8, device='cpu'))
    learn.loss_func = CrossEntropyLossFlat()                                        # it knows how to decode predictions
    cm = ClassificationInterpretation.from_learner(learn).confusion_matrix()
    want = np.zeros((4, 4), int)
    np.add.at(want, (learn.dls.valid.y.numpy(), learn.model(learn.dls.valid.x).argmax(1).numpy()), 1)
    np.testing.assert_array_equal(cm, want)


def test_an_export_holds_no_data(tmp_path):
    a = named(n_train=4000, shape=(16, 16))
    learn = learner(image_dls(a, 500, 100, device='cpu'), 256)
    learn.path = tmp_path
    learn.export('a.pkl')
    assert (tmp_path/'a.pkl').stat().st_size < 200_000 < learn.dls.train.x.nbytes


def test_the_same_training_twice():
    def weights():
        learn = learner(image_dls(named(), 10, 20, bs=8, seed=1, device='cpu'))
        with learn.no_logging(): learn.fit(2, 1e-2)
        return learn.model[1].weight
    assert torch.equal(weights(), weights())


@pytest.mark.parametrize('shape, cmap', [((8, 8), True), ((8, 6, 3), False)])
def test_show_batch_of_images(shape, cmap):
    a = named(shape=shape)
    dls = image_dls(a, 5, 10, bs=10, device='cpu')
    dls.show_batch(max_n=5)
    axs = plt.gcf().axes
    x, y = dls.one_batch()
    assert [ax.get_title() for ax in axs] == [a.classes[c] for c in y[:5]]
    shown = np.stack([np.asarray(ax.images[0].get_array()) for ax in axs]).reshape(5, -1)
    train = a.x_train[balanced_idxs(a.y_train, 5)].reshape(20, -1)
    assert all((train == o).all(1).any() for o in shown)                            # the very pixels
    dls.test_dl(a.x_test).show_batch(max_n=30)
    assert sum(len(ax.images) for ax in plt.gcf().axes) == 20
    plt.close('all')


# however a data set is given, whatever of it is wanted

def test_from_anything_that_holds_arrays(tmp_path):
    a = named()
    np.savez(tmp_path/'mine.npz', **a._asdict())
    want = image_dls(a, 5, 20, bs=10, device='cpu')
    items = [[(Image.fromarray(o), c) for o,c in zip(x, y)] for x,y in (a[:2], a[2:4])]
    for given in a._asdict(), tmp_path/'mine.npz', str(tmp_path/'mine.npz'), tuple(items):
        got = image_dls(given, 5, 20, bs=10, device='cpu')
        for o,p in zip(got, want, strict=True): assert torch.equal(o.x, p.x) and torch.equal(o.y, p.y)
        assert got.vocab == want.vocab == list('0123')


def test_without_a_test_part():
    a = {k: v for k,v in arrays().items() if 'train' in k}
    dls = image_dls(a, 5, 20, bs=10, device='cpu')
    assert [len(o.dataset) for o in dls] == [20, 20]
    with pytest.raises(ValueError, match='this data set has no test part: x_test and y_test'): dls.test
    learn = learner(dls)
    assert learn.get_preds(dl=dls.test_dl(a['x_train']))[0].shape == (60, 4)


def test_all_points():
    y = np.random.default_rng(0).integers(0, 7, 500)
    for n_valid, n in (100, 100), (0.25, 125), (0.001, None), (1, 1), (499, 499):
        if n is None:
            with pytest.raises(ValueError, match='n_valid=0.001: 1 of the 500 points'): split_idxs(y, None, n_valid)
            continue
        train, valid = split_idxs(y, None, n_valid, seed=3)
        assert len(valid) == n and np.array_equal(np.sort(np.r_[train, valid]), np.arange(500))
        assert (np.diff(train) > 0).all() and (np.diff(valid) > 0).all()
    assert set(split_idxs(y, None, 50)[1]) < set(split_idxs(y, None, 0.3)[1]) != set(split_idxs(y, None, 0.3, 1)[1])
    assert len(split_idxs(y, 10, 0.5)[1]) == 250 and len(split_idxs(y, 10, np.int32(7))[1]) == 7


@pytest.mark.parametrize('n_valid', [500, 0.9999, 0, 0., 1., 2.5, -0.1, float('nan'), float('inf'), 10**400])
def test_a_share_that_is_none(n_valid):
    with pytest.raises(ValueError, match='n_valid=.*: 1 of the 500 points are for training, which leaves 1 to 499'):
        split_idxs(np.arange(500) % 7, None, n_valid)


@pytest.mark.parametrize('bs', [0, -1, 21])
def test_a_batch_has_points(bs):
    with pytest.raises(ValueError, match=f'bs={bs} is not from 1 to 20, the number of training points'):
        image_dls(named(), 5, 10, bs=bs)


# batch transforms

class Dim(RandTransform):
    "Half as bright, where fastai does random things"
    def encodes(self, x:TensorImage): return x/2


def dimmed(**kwargs): return image_dls(named(shape=(8, 6, 3)), 5, 30, bs=10, device='cpu', **kwargs)


@pytest.mark.parametrize('tfms', [Dim(p=1.), [Dim(p=1.)], Pipeline([Dim(p=1.)])], ids=['one', 'list', 'pipeline'])
def test_batch_transforms_see_pixels_and_train_alone(tfms):
    plain, dls, a = dimmed(), dimmed(batch_tfms=tfms), named(shape=(8, 6, 3))
    f = a.x_train[balanced_idxs(a.y_train, 5)].astype(np.float64)
    mean, sd = f.mean((0,1,2)), f.std((0,1,2))
    (x, y), (x0, y0) = dls.train.one_batch(), plain.train.one_batch()
    pixels = x0.permute(0, 2, 3, 1).double().numpy()*sd + mean
    np.testing.assert_allclose(x.permute(0, 2, 3, 1), (pixels/2 - mean)/sd, atol=1e-5)
    assert torch.equal(y, y0) and type(x) is torch.Tensor and x.is_contiguous(memory_format=torch.channels_last)
    for i in 1, 2:
        for (x, y), (x0, y0) in zip(dls[i], plain[i], strict=True):
            torch.testing.assert_close(x, x0, atol=1e-5, rtol=1e-5)
            assert torch.equal(y, y0)
    assert dls.test_dl(a.x_test).one_batch()[0].allclose(plain.test.one_batch()[0], atol=1e-5)
    dls.show_batch()
    shown = np.asarray(plt.gcf().axes[0].images[0].get_array())
    assert np.abs(shown - pixels[0]/2).max() <= 0.51
    plt.close('all')


def test_what_a_transform_makes_too_bright_is_shown_white():
    dls = dimmed()
    x = torch.full((1, 3, 8, 6), 1e4)
    dls.train.show_batch((torch.cat([x, -x]), torch.tensor([0, 1])))
    shown = [np.asarray(ax.images[0].get_array()) for ax in plt.gcf().axes]
    assert (shown[0] == 255).all() and (shown[1] == 0).all()
    plt.close('all')


@pytest.mark.parametrize('way', ['of the loaders', 'of the call'])
def test_tta(way):
    dls, plain, dark = dimmed(batch_tfms=[Dim(p=1.)]), dimmed(), {}
    learn = learner(dls if way == 'of the loaders' else plain, 8*6*3)
    preds, targs = learn.tta(beta=None) if way == 'of the loaders' else learn.tta(batch_tfms=Dim(p=1.), beta=None)
    mean, sd = (torch.tensor(o).float() for o in (plain.valid.mean, plain.valid.sd))
    pixels = plain.valid.x.permute(0, 2, 3, 1)*sd + mean
    dark = ((pixels/2 - mean)/sd).permute(0, 3, 1, 2)
    for got, x in zip(preds, (dark, plain.valid.x), strict=True):
        torch.testing.assert_close(got, learn.model(x).detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(targs, plain.valid.y) and dls.valid.dataset.split_idx == plain.valid.dataset.split_idx == 1
    with pytest.raises(ValueError, match='no items here: transform batches'): learn.tta(item_tfms=Dim())


def test_fastais_own_augmentation_is_finite_and_random():
    from fastai.vision.augment import aug_transforms
    dls = image_dls('digits', 10, 100, bs=20, device='cpu', batch_tfms=aug_transforms(size=28))
    dls.train.shuffle = False
    torch.manual_seed(0), random.seed(0)
    one, two = dls.train.one_batch()[0], dls.train.one_batch()[0]
    assert torch.isfinite(one).all() and one.shape == (20, 1, 28, 28) and not torch.equal(one, two)
    assert torch.equal(dls.valid.one_batch()[0], dls.valid.one_batch()[0])


def test_transforms_survive_an_export(tmp_path):
    learn = learner(dimmed(batch_tfms=[Dim(p=1.)]), 8*6*3)
    learn.path, a = tmp_path, named(shape=(8, 6, 3))
    want = learn.get_preds(dl=learn.dls.test_dl(a.x_test))[0]
    learn.export('a.pkl')
    loaded = load_learner(tmp_path/'a.pkl')
    torch.testing.assert_close(loaded.get_preds(dl=loaded.dls.test_dl(a.x_test))[0], want)
    assert isinstance(loaded.dls.train.after_batch, PixelTfms)


def test_transforms_are_for_images():
    with pytest.raises(ValueError, match=r'batch transforms are for images, not for \(20, 1\)'):
        ArrayDL(sin_dls(20, n_valid=10, bs=5).train.dataset, after_batch=[Dim()])


# titles

@pytest.mark.parametrize('name, title', [
    ('$x^2$', r'\$x^2\$'), (r'$\frac{', r'\$\frac{'), ('\x1b[31mred', r'\x1b[31mred'), ('x'*10**5, 'x'*13 + '...'),
    (r'\$\$', r'\\$\\$'), ('a\nb', r'a\nb'), ('K\u00e4se', 'K\u00e4se')])
def test_names_of_classes_are_no_markup(name, title):
    d = {**arrays(n_classes=2), 'classes': np.array([name, 'b'])}
    dls = image_dls(d, 5, 10, bs=9, device='cpu')
    with plt.rc_context({'text.usetex': True}): dls.show_batch() # one's own LaTeX gets no text from a data file
    assert not any(ax.title.get_usetex() for ax in plt.gcf().axes)
    dls.show_batch()
    assert {ax.get_title() for ax in plt.gcf().axes} == {title, 'b'}
    plt.gcf().canvas.draw()
    plt.close('all')


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_show_batch_of_any_number_of_channels(channels):
    image_dls(named(shape=(8, 6, channels)), 5, 10, bs=10, device='cpu').show_batch(cmap='viridis')
    plt.gcf().canvas.draw()
    plt.close('all')


# SIN

def test_sin():
    dls = sin_dls(n=60, noise=0., seed=3, bs=20, n_valid=40, device='cpu')
    assert [len(o.dataset) for o in dls] == [60, 40, 1000] and dls.c == 1 and dls.n_inp == 1
    for dl in dls:
        assert dl.x.shape == dl.y.shape == (len(dl.dataset), 1) and dl.x.dtype == dl.y.dtype == torch.float32
        torch.testing.assert_close(dl.y, torch.sin(5*dl.x.double()).float(), atol=1e-6, rtol=0)
    np.testing.assert_allclose(dls.test.x[:,0], np.linspace(-1, 1, 1000), atol=1e-6)
    dls.show_batch()
    assert len(plt.gca().lines[0].get_xdata()) == 20
    plt.close('all')


def test_sin_noise():
    from scipy.stats import kstest
    dls = sin_dls(n=5000, noise=0.3, seed=1, n_valid=5000, device='cpu')
    for dl in (dls.train, dls.valid):
        x, e = dl.x[:,0].numpy(), (dl.y - torch.sin(5*dl.x))[:,0].numpy()
        assert kstest((x + 1)/2, 'uniform').pvalue > 0.01 and kstest(e/0.3, 'norm').pvalue > 0.01
        assert abs(np.corrcoef(x, e)[0, 1]) < 4/5000**0.5
    assert not set(dls.train.x[:,0].tolist()) & set(dls.valid.x[:100,0].tolist())
    assert torch.equal(sin_dls(n=100, noise=0.3, seed=1, device='cpu').train.y, dls.train.y[:100])
    assert not torch.equal(sin_dls(n=100, noise=0.3, seed=2, device='cpu').train.y, dls.train.y[:100])


@pytest.mark.parametrize('kwargs', [dict(n=0), dict(n_valid=0), dict(noise=-0.1)])
def test_sin_refuses(kwargs):
    with pytest.raises(ValueError, match='must be 1 or more'): sin_dls(**kwargs)


# loaders for a study

def test_a_study_gets_the_same_points(monkeypatch):
    monkeypatch.setattr(data, 'load_arrays', lambda name, a=named(): a)
    data._read.cache_clear()
    images, sin = image_dls(named(), 5, 30, 2, 10, device='cpu'), sin_dls(60, 0.1, 2, 10, 40, 'cpu')
    for got, want, task in ((image_loaders('mnist', 20, 30, 2, 10, 'cpu'), images, 'classification'),
                            (sin_loaders(60, 40, 2, 10, 'cpu'), sin, 'sin')):
        assert got.task == want.task == task == got.test.dataset.task
        for o,p in zip(got, want, strict=True):
            assert torch.equal(o.x, p.x) and torch.equal(o.y, p.y)
            assert (o.bs, o.seed, o.shuffle) == (p.bs, p.seed, p.shuffle)
    data._read.cache_clear()


def test_a_sweep_reads_its_data_once(monkeypatch):
    calls = []
    monkeypatch.setattr(data, 'load_arrays', lambda name: calls.append(name) or named())
    data._read.cache_clear()
    for seed in range(3): image_loaders('digits', 20, 10, seed, 10, 'cpu')
    assert calls == ['digits']
    data._read.cache_clear()


@pytest.mark.parametrize('n', [0, -10, 7, 201])
def test_n_train_is_a_multiple_of_the_classes(n):
    with pytest.raises(ValueError, match=f'n_train={n}: .* multiple of 10'): image_loaders('digits', n, 100, 0, 5)


# real data, where they are

@real('mnist')
def test_real_mnist():
    a = load_arrays('mnist')
    assert a.x_train.shape == (60000, 28, 28) and a.x_test.shape == (10000, 28, 28)
    assert np.bincount(a.y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_allclose([a.x_train.mean()/255, a.x_train.std()/255], [0.1307, 0.3081], atol=5e-5)
    dls = image_dls('mnist', 200, device='cpu')
    assert [len(o.dataset) for o in dls] == [2000, 10000, 10000] and len(dls.train) == 40
    assert torch.bincount(dls.train.y).tolist() == [200]*10
    assert sha(balanced_idxs(a.y_train, 200, 0)) == 'e108d0e38ef216e9'


@real('cifar10')
def test_real_cifar10():
    dls = image_dls('cifar10', 200, n_valid=5000, bs=128, device='cpu')
    assert dls.vocab == ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
    x, y = dls.one_batch()
    assert x.shape == (128, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
    assert len(dls.test.dataset) == 10000
