"What a reader of chapter 03_data need not see: broken files, interrupted writes, no network, determinism, fastai's ways of use"
import hashlib, importlib.util, io, os, random, signal, subprocess, sys, types, zipfile
from pathlib import Path
from urllib.error import URLError

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from PIL import Image
from torch import nn

from gradreg import data
from gradreg.data import (ArrayDL, ArrayDS, Arrays, balanced_idxs, channel_stats, find_arrays, image_dls, load_arrays, scale,
                          sin_dls, split_idxs)

TINY = 'tiny-imagenet-200'


def real(name): return pytest.mark.skipif(find_arrays(name) is None, reason=f'{name} is not on this machine (GRADREG_DATA)')


def sha(a): return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16]


def arrays(n_train=60, n_test=20, shape=(8, 8), n_classes=4, seed=0):
    "Small random arrays in which no two images are alike"
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n_train + n_test, *shape)).astype(np.uint8)
    y = np.arange(n_train + n_test) % n_classes
    return dict(x_train=x[:n_train], y_train=y[:n_train], x_test=x[n_train:], y_test=y[n_train:])


@pytest.fixture
def given(tmp_path, monkeypatch):
    "An empty GRADREG_DATA folder and an empty cache, and no network"
    folder = tmp_path/'given'
    folder.mkdir()
    monkeypatch.setenv('GRADREG_DATA', str(folder))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    def no_network(*args, **kwargs): raise URLError('no network')
    monkeypatch.setattr('urllib.request.urlopen', no_network)
    return folder


@pytest.fixture
def cache(given, tmp_path, monkeypatch):
    "Like `given`, without GRADREG_DATA: the folder of the cache"
    monkeypatch.delenv('GRADREG_DATA')
    return tmp_path/'cache'/'gradreg'


def snapshot(folder): return {p.relative_to(folder): (p.stat().st_mtime_ns, p.stat().st_size) for p in Path(folder).rglob('*')}


# files

def npz_bytes(**d):
    f = io.BytesIO()
    np.savez_compressed(f, **d)
    return f.getvalue()


def flipped(b, at=0.5):
    i = int(len(b)*at)
    return b[:i] + bytes([b[i] ^ 255]) + b[i+1:]


def npy_bytes():
    f = io.BytesIO()
    np.save(f, np.arange(3))
    return f.getvalue()


def zip_bytes(**members):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z:
        for k,v in members.items(): z.writestr(k, v)
    return f.getvalue()


@pytest.mark.parametrize('content', [
    b'', b'not an archive at all', npz_bytes(**arrays())[:2000], npz_bytes(**arrays())[:-30], npy_bytes(),
    flipped(npz_bytes(**arrays())), npz_bytes(x_train=np.array([{}])), zip_bytes(**{'x_train.npy': b'\x93NUMPY\x01\x00junk'}),
    zip_bytes(**{'x_train.npy': npy_bytes()[:-10]})],
    ids=['empty', 'text', 'cut', 'end lost', 'npy', 'flipped byte', 'pickle', 'bad header', 'short member'])
@pytest.mark.parametrize('where', ['given', 'cache'])
def test_unreadable_files(content, where, given, tmp_path):
    folder = given if where == 'given' else tmp_path/'cache'/'gradreg'
    folder.mkdir(parents=True, exist_ok=True)
    f = folder/'mnist.npz'
    f.write_bytes(content)
    with pytest.raises(ValueError, match=r'mnist\.npz is not a readable \.npz file .*replace it, or delete it'): load_arrays('mnist')
    assert f.read_bytes() == content


def test_a_pickle_in_a_file_is_not_run(given):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(given/'evil'),)
    np.savez(given/'evil.npz', **{**arrays(), 'classes': np.array([Evil()], object)})
    with pytest.raises(ValueError, match='allow_pickle=False'): load_arrays('evil')
    assert not (given/'evil').exists()


good = arrays()

@pytest.mark.parametrize('changed, message', [
    (dict(x_train=None), 'lacks x_train, holds y_train, x_test, y_test'),
    (dict(y_train=None, y_test=None), 'lacks y_train, y_test'),
    (dict(x_train=good['x_train'].astype(np.int64)), 'x_train is int64, not uint8'),
    (dict(x_test=good['x_test']/255), 'x_test is float64'),
    (dict(y_train=good['y_train'].astype(float)), 'y_train is float64, not integer'),
    (dict(y_test=np.array(['0']*20)), 'y_test is <U1, not integer'),
    (dict(x_train=good['x_train'].reshape(60, 64)), r'x_train has the shape \(60, 64\)'),
    (dict(x_train=good['x_train'].reshape(15, 4, 8, 8)), 'x_train has the shape .* channels last'),
    (dict(x_train=good['x_train'][..., None]), r'training images are \(8, 8, 1\), test images \(8, 8\)'),
    (dict(x_train=good['x_train'][:0], y_train=good['y_train'][:0]), 'x_train is empty'),
    (dict(y_train=good['y_train'][:-1]), r'y_train has the shape \(59,\), not one label for each of 60 images'),
    (dict(y_train=good['y_train'][:, None]), r'y_train has the shape \(60, 1\)'),
    (dict(y_test=good['y_test'] + 1), 'labels run from 0 to 4, but there are 4 classes'),
    (dict(y_train=good['y_train'] - 1), 'labels run from -1'),
    (dict(y_train=good['y_train']*10**12), 'labels run from 0 to 3000000000000, but there are 4 classes'),
    (dict(classes=np.array(['a', 'b'])), 'labels run from 0 to 3, but there are 2 classes'),
    (dict(classes=np.array(0.5)), 'classes is not a row of different names'),
    (dict(classes=np.array(list('aabc'))), 'classes is not a row of different names'),
])
def test_wrong_arrays(changed, message, given):
    np.savez(given/'mine.npz', **{k: v for k,v in {**good, **changed}.items() if v is not None})
    with pytest.raises(ValueError, match=r'mine\.npz: ' + message): load_arrays('mine')
    if all(v is not None for v in changed.values()):
        d = {'classes': np.arange(4), **good, **changed}
        with pytest.raises(ValueError, match='the arrays: '): image_dls(Arrays(**d), 2, 5, bs=4)


@pytest.mark.parametrize('dtype', [np.uint8, np.int32, np.uint64])
def test_own_file(dtype, given):
    d = arrays(shape=(6, 5, 3))
    np.savez(given/'my-own.v2.npz', **{k: v.astype(dtype) if k[0] == 'y' else v for k,v in d.items()}, classes=list('abcd'), extra=1.5)
    a = load_arrays('my-own.v2')
    for k,v in d.items(): np.testing.assert_array_equal(getattr(a, k), v)
    assert a.y_train.dtype == a.y_test.dtype == np.int64 and a.classes.tolist() == list('abcd')
    assert image_dls('my-own.v2', 3, 10, bs=4).vocab == list('abcd')


@pytest.mark.parametrize('name, message', [
    ('MNIST', 'Did you mean mnist'), ('cifar-10', 'Did you mean cifar10'), ('tinyimagenet', 'Did you mean tiny_imagenet'),
    ('digit', 'Did you mean digits'), ('minee', 'Did you mean mine'),
    ('qqq', "no data set is called 'qqq'. There are cifar10, cifar100, digits, mine, mnist, tiny_imagenet.*qqq.npz in it")])
def test_unknown_names(name, message, given):
    np.savez(given/'mine.npz', **good)
    with pytest.raises(ValueError, match=message): load_arrays(name)


@pytest.mark.parametrize('name', ['../mine', '/etc/passwd', 'a/b', r'a\b', '', '.hidden', 'mine\n'])
def test_names_that_are_paths(name, given):
    np.savez(given.parent/'mine.npz', **good)
    with pytest.raises(ValueError, match='is not a name'): load_arrays(name)


def test_order_of_the_folders(given, tmp_path):
    here, there = arrays(seed=1), arrays(seed=2)
    data._write_npz(tmp_path/'cache'/'gradreg'/'mnist.npz', Arrays(**there, classes=np.arange(4).astype(str)))
    np.testing.assert_array_equal(load_arrays('mnist').x_train, there['x_train'])
    np.savez(given/'mnist.npz', **here)
    np.testing.assert_array_equal(load_arrays('mnist').x_train, here['x_train'])
    assert find_arrays('mnist') == given/'mnist.npz' and find_arrays('cifar10') is None


def test_a_folder_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv('GRADREG_DATA', str(tmp_path/'gone'))
    with pytest.raises(ValueError, match='GRADREG_DATA=.*gone is not a folder'): load_arrays('mnist')
    monkeypatch.setenv('GRADREG_DATA', '')
    assert data._folders() == [data._cache()]


# writing

def test_an_interrupted_write_leaves_what_was_there(cache, monkeypatch):
    f, a = cache/'mine.npz', Arrays(**good, classes=np.arange(4).astype(str))
    real_savez = np.savez
    def interrupted(f, **d):
        f.write(b'half of it')
        raise KeyboardInterrupt
    for before in (None, 'old'):
        if before: real_savez(f, **arrays(seed=5))
        monkeypatch.setattr(np, 'savez', interrupted)
        with pytest.raises(KeyboardInterrupt): data._write_npz(f, a)
        monkeypatch.setattr(np, 'savez', real_savez)
        assert [o.name for o in cache.iterdir()] == (['mine.npz'] if before else [])
    np.testing.assert_array_equal(load_arrays('mine').x_train, arrays(seed=5)['x_train'])


def test_kill_9_in_the_middle_of_a_write(cache):
    code = '''if True:
        import os, signal, numpy as np
        from pathlib import Path
        from gradreg import data
        def dies(f, **d):
            f.write(b'PK half of it'); f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        np.savez = dies
        data._write_npz(data._cache()/'mine.npz', data._digits())'''
    r = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(Path(data.__file__).parents[1])},
                       capture_output=True)
    assert r.returncode == -signal.SIGKILL, r.stderr
    assert len(list(cache.iterdir())) == 1 and find_arrays('mine') is None       # the temporary file, which nobody reads
    with pytest.raises(ValueError, match='no data set is called .mine.. There are cifar10, cifar100, digits, mnist, tiny'):
        load_arrays('mine')
    data._write_npz(cache/'mine.npz', Arrays(**good, classes=np.arange(4).astype(str)))
    np.testing.assert_array_equal(load_arrays('mine').x_train, good['x_train'])


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('in the way')
    with pytest.warns(UserWarning, match='could not be written .*XDG_CACHE_HOME'):
        data._write_npz(tmp_path/'file'/'gradreg'/'mine.npz', Arrays(**good, classes=np.arange(4)))


# downloads

@pytest.mark.parametrize('name', ['mnist', 'cifar10', 'cifar100', 'tiny_imagenet'])
def test_no_network(name, cache):
    with pytest.raises(ConnectionError, match=rf'{name} could not be downloaded .*no network.*{name}\.npz .*set GRADREG_DATA'):
        load_arrays(name)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize('name', ['mnist', 'cifar10', 'cifar100', 'tiny_imagenet'])
def test_a_download_with_a_wrong_checksum(name, cache, monkeypatch):
    class Response(io.BytesIO):
        url, length = None, 4
    monkeypatch.setattr('urllib.request.urlopen', lambda *args, **kwargs: Response(b'junk'))
    with pytest.raises(ConnectionError, match=f'{name} could not be downloaded .*corrupted'): load_arrays(name)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize('name, shape, classes', [('mnist', (28, 28), ['0 - zero', '1 - one']), ('cifar10', (32, 32, 3), ['airplane', 'frog'])])
def test_a_download_is_cached(name, shape, classes, cache, monkeypatch):
    d, calls = arrays(shape=shape, n_classes=2), []
    class Fake:
        def __init__(self, root, train, download):
            calls.append(Path(root))
            s = 'train' if train else 'test'
            x, y = d[f'x_{s}'], d[f'y_{s}'].tolist()
            self.data, self.targets = (torch.from_numpy(x), torch.tensor(y)) if name == 'mnist' else (x, y)
            self.classes = classes
    monkeypatch.setattr(f'torchvision.datasets.{name.upper()}', Fake)
    first = load_arrays(name)
    assert len(calls) == 2 and not calls[0].exists() and [o.name for o in cache.iterdir()] == [f'{name}.npz']
    again = load_arrays(name)
    assert len(calls) == 2
    for k,v in d.items():
        np.testing.assert_array_equal(getattr(first, k), v)
        np.testing.assert_array_equal(getattr(again, k), v)
    assert again.classes.tolist() == first.classes.tolist() == [o.split(' ')[0] for o in classes]


def test_the_cache_is_not_compressed(cache):
    "What makes a large set load fast: `make bench` says how fast"
    a = Arrays(np.zeros((600, 28, 28), np.uint8), np.arange(600) % 10, np.zeros((10, 28, 28), np.uint8), np.arange(10), np.arange(10).astype(str))
    data._write_npz(cache/'mnist.npz', a)
    with zipfile.ZipFile(cache/'mnist.npz') as z: assert {o.compress_type for o in z.infolist()} == {zipfile.ZIP_STORED}
    np.testing.assert_array_equal(load_arrays('mnist').y_train, a.y_train)


# Tiny ImageNet's zip

def jpeg(colour, size=(64, 64), mode='RGB'):
    b = io.BytesIO()
    Image.new(mode, size, colour).save(b, 'JPEG')
    return b.getvalue()


def tiny_members():
    "name -> content of a small archive; each image has one colour, from which its place is known"
    t = {f'{TINY}/wnids.txt': 'n07\nn03\n', f'{TINY}/words.txt': 'n03\tbullfrog, Rana\nn05\tcat\nn07\tgoldfish\n',
         f'{TINY}/val/val_annotations.txt': 'val_0.JPEG\tn07\t0\t0\t9\t9\nval_1.JPEG\tn03\t0\t0\t9\t9\n',
         f'{TINY}/train/n03/n03_boxes.txt': '', f'{TINY}/test/images/test_0.JPEG': jpeg((1, 1, 1))}
    for i in (11, 2): t[f'{TINY}/train/n03/images/n03_{i}.JPEG'] = jpeg((i*10, 0, 0))
    t[f'{TINY}/train/n07/images/n07_0.JPEG'] = jpeg(70, mode='L')
    for i in (0, 1): t[f'{TINY}/val/images/val_{i}.JPEG'] = jpeg((0, 0, 100 + 100*i))
    return t


def write_zip(path, members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for k,v in members.items(): z.writestr(k, v)
    return path


def test_tiny_imagenet(given, tmp_path):
    f = write_zip(given/f'{TINY}.zip', tiny_members())
    before = snapshot(given)
    for _ in range(2): # decoded, then from the cache
        a = load_arrays('tiny_imagenet')
        assert a.classes.tolist() == ['bullfrog', 'goldfish'] and a.x_train.shape == (3, 64, 64, 3)
        assert a.y_train.tolist() == [0, 0, 1] and a.y_test.tolist() == [1, 0]
        near = lambda x: (x[:,0,0].astype(int) + 3)//10*10
        assert near(a.x_train).tolist() == [[20, 0, 0], [110, 0, 0], [70, 70, 70]]  # by class, then by number; grey as RGB
        assert near(a.x_test).tolist() == [[0, 0, 100], [0, 0, 200]]
    assert snapshot(given) == before
    cached = list((tmp_path/'cache'/'gradreg').iterdir())
    assert [o.name for o in cached] == [f'{TINY}-{hashlib.md5(f.read_bytes()).hexdigest()}.npz']
    write_zip(f, {k: v for k,v in tiny_members().items() if 'n03_11' not in k})
    assert len(load_arrays('tiny_imagenet').x_train) == 2                           # another zip is not taken for the first


@pytest.mark.parametrize('member', ['../evil.txt', '/evil.txt', f'{TINY}/../../evil.txt', r'..\evil.txt', r'C:\evil.txt', '..'])
def test_a_member_that_leads_outside(member, given, tmp_path):
    write_zip(given/f'{TINY}.zip', {**tiny_members(), member: 'x'})
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=rf'{TINY}\.zip .* leads outside'): load_arrays('tiny_imagenet')
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('change, message', [
    ({f'{TINY}/wnids.txt': None}, 'no item named .*wnids.txt'),
    ({f'{TINY}/val/images/val_1.JPEG': None}, 'no item named .*val_1.JPEG'),
    ({f'{TINY}/val/images/val_1.JPEG': b'no picture'}, 'cannot identify image'),
    ({f'{TINY}/train/n03/images/n03_2.JPEG': jpeg((0, 0, 0))[:400]}, '[Tt]runcated'),
    ({f'{TINY}/train/n03/images/n03_2.JPEG': jpeg((0, 0, 0), (64, 32))}, r'n03_2.JPEG has \(64, 32\) pixels'),
    ({f'{TINY}/wnids.txt': 'n03\n'}, "n07"),
    ({f'{TINY}/words.txt': 'n03\tbullfrog\n'}, "n07")])
def test_a_tiny_imagenet_with_faults(change, message, given):
    write_zip(given/f'{TINY}.zip', {k: v for k,v in {**tiny_members(), **change}.items() if v is not None})
    with pytest.raises(ValueError, match=rf'{TINY}\.zip is not a whole .*{message}'): load_arrays('tiny_imagenet')


@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'foreign', lambda b: flipped(b, 0.3)],
                         ids=['cut', 'empty', 'foreign', 'flipped'])
def test_a_damaged_zip(damage, given, tmp_path):
    f = write_zip(given/f'{TINY}.zip', {k: v*(20 if k.endswith('txt') and 'words' in k else 1) for k,v in tiny_members().items()})
    f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(ValueError, match=rf'{TINY}\.zip is not a whole'): load_arrays('tiny_imagenet')
    assert not (tmp_path/'cache').exists()


def test_tiny_imagenet_where_the_cache_cannot_be_written(given, tmp_path, monkeypatch):
    write_zip(given/f'{TINY}.zip', tiny_members())
    (tmp_path/'file').write_text('in the way')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    with pytest.warns(UserWarning, match='could not be written'): assert len(load_arrays('tiny_imagenet').x_train) == 3


# digits

def test_digits_against_torchs_interpolation(cache):
    from sklearn.datasets import load_digits
    d, a = load_digits(), load_arrays('digits')
    x, y = np.concatenate([a.x_train, a.x_test]), np.concatenate([a.y_train, a.y_test])
    np.testing.assert_array_equal(y, d.target)
    want = F.interpolate(torch.tensor(d.images)[:,None]*255/16, (28, 28), mode='bilinear', align_corners=False)[:,0]
    assert np.abs(x - want.numpy()).max() <= 1.51                                   # rounded thrice, by 0.5 at most
    assert (len(a.x_train), len(a.x_test), x.min(), x.max()) == (797, 1000, 0, 255)
    assert not cache.exists()


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
    with pytest.raises(ValueError, match=f'n_valid={n_valid}: 10 of the 20 points .* leaves 1 to 10'): split_idxs(np.arange(20) % 2, 5, n_valid)


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


def pixels(ds): return [o.tobytes() for o in (ds.x.permute(0, 2, 3, 1)*torch.tensor(ds.sd) + torch.tensor(ds.mean)).round().numpy().astype(np.uint8)]


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

def loader(n=103, **kwargs): return ArrayDL(ArrayDS(torch.arange(float(n))[:,None], torch.arange(n)), **{'bs': 10, **kwargs})


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
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    dl.one_batch(), dl.one_batch()
    assert epochs(dl) == want
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()
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
    with pytest.raises(ValueError, match='bs=50 is more than the 20 training points'): image_dls(named(), 5, 10)


def test_after_batch_is_called():
    dl = loader().new(after_batch=lambda b: (b[0] + 1, b[1]))
    assert all(torch.equal(x[:,0], y + 1.) for x,y in dl) and torch.equal(dl.one_batch()[0][:,0], torch.arange(1., 11))


def test_several_gpus_share_an_epoch(monkeypatch):
    if not importlib.util.find_spec('accelerate'): # fastai.distributed cannot be imported without; its loader does not use it
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
    for i in range(3):                                                              # also the shuffled training points, in their order
        preds, targs = learn.get_preds(ds_idx=i)
        assert torch.equal(targs, dls[i].y)
        torch.testing.assert_close(preds, learn.model(dls[i].x).detach())
    preds, targs = learn.get_preds(dl=dls.train)
    assert torch.equal(targs, dls.train.y)
    assert np.isclose(learn.validate(dl=dls.test)[0], F.cross_entropy(learn.model(dls.test.x), dls.test.y).item())

    want = learn.get_preds(dl=dls.test)[0]
    torch.testing.assert_close(learn.get_preds(dl=dls.test_dl(a.x_test))[0], want)
    with pytest.raises(ValueError, match='test_items: the images are float64'): dls.test_dl(a.x_test/255)
    with pytest.raises(ValueError, match=r'\(8, 4\) is not the shape'): dls.test_dl(a.x_test[:,:,:4])
    learn.path = tmp_path
    learn.export('a.pkl')
    loaded = load_learner(tmp_path/'a.pkl')
    torch.testing.assert_close(loaded.get_preds(dl=loaded.dls.test_dl(a.x_test))[0], want)
    assert [len(o.dataset) for o in loaded.dls] == [0, 0, 0] and loaded.dls.vocab == list('0123')


def test_a_learner_finds_its_loss_in_the_data():
    for dls,want in (image_dls(named(), 10, 20, bs=8, device='cpu'), F.cross_entropy), (sin_dls(20, n_valid=10, bs=8, device='cpu'), F.mse_loss):
        x,y = dls.valid.dataset[:]
        learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), dls.c)))
        assert np.isclose(learn.validate()[0], want(learn.model(x), y).item())
    with pytest.raises(AssertionError, match='loss function'): Learner(types.SimpleNamespace(train_ds=ArrayDS(x)), learn.model)  # no targets


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
        assert kstest(x, 'uniform', (-1, 2)).pvalue > 0.01 and kstest(e, 'norm', (0, 0.3)).pvalue > 0.01
        assert abs(np.corrcoef(x, e)[0, 1]) < 4/5000**0.5
    assert not set(dls.train.x[:,0].tolist()) & set(dls.valid.x[:100,0].tolist())
    assert torch.equal(sin_dls(n=100, noise=0.3, seed=1, device='cpu').train.y, dls.train.y[:100])
    assert not torch.equal(sin_dls(n=100, noise=0.3, seed=2, device='cpu').train.y, dls.train.y[:100])


@pytest.mark.parametrize('kwargs', [dict(n=0), dict(n_valid=0), dict(noise=-0.1)])
def test_sin_refuses(kwargs):
    with pytest.raises(ValueError, match='must be 1 or more'): sin_dls(**kwargs)


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
    assert x.shape == (128, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last) and len(dls.test.dataset) == 10000


@real('tiny_imagenet')
def test_real_tiny_imagenet(tmp_path, monkeypatch):
    folder = find_arrays('tiny_imagenet').parent
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    before = snapshot(folder)
    a = load_arrays('tiny_imagenet')
    assert a.x_train.shape[1:] == (64, 64, 3) and len(a.classes) == 200 == len({*a.classes})
    assert len({*np.bincount(a.y_train)}) == 1 and len({*np.bincount(a.y_test)}) == 1
    monkeypatch.setattr(data, '_jpeg', None)  # decoded once
    np.testing.assert_array_equal(load_arrays('tiny_imagenet').x_test, a.x_test)
    assert snapshot(folder) == before
