"What a reader of chapter 05_arrays need not see: broken files, interrupted writes, no network"
import hashlib, io, os, signal, subprocess, sys, zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import gradreg
from gradreg.arrays import (Arrays, _cache, _folders, _write_npz, as_arrays, check_arrays, find_arrays, load_arrays, shown,
                            whole_file)
from gradreg.data import image_dls
from samples import arrays, real

TINY = 'tiny-imagenet-200'


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
    with pytest.raises(ValueError, match=r'mnist\.npz cannot be read .*replace it, or delete it'): load_arrays('mnist')
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
    (dict(classes=np.array(list('abcdef'))), r"there are no training images of \['e', 'f'\]"),
    (dict(y_train=good['y_train']//2*2, classes=np.array(list('0123'))), r"there are no training images of \['1', '3'\]"),
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
    with pytest.raises(ValueError, match='is neither a name'): load_arrays(name)


def test_order_of_the_folders(given, tmp_path):
    here, there = arrays(seed=1), arrays(seed=2)
    _write_npz(tmp_path/'cache'/'gradreg'/'mnist.npz', Arrays(**there, classes=np.arange(4).astype(str)))
    np.testing.assert_array_equal(load_arrays('mnist').x_train, there['x_train'])
    np.savez(given/'mnist.npz', **here)
    np.testing.assert_array_equal(load_arrays('mnist').x_train, here['x_train'])
    assert find_arrays('mnist') == given/'mnist.npz' and find_arrays('cifar10') is None


def test_a_folder_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv('GRADREG_DATA', str(tmp_path/'gone'))
    with pytest.raises(ValueError, match='GRADREG_DATA=.*gone is not a folder'): load_arrays('mnist')
    monkeypatch.setenv('GRADREG_DATA', '')
    assert _folders() == [_cache()]


# writing

@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_gets_the_mode_of_every_new_file(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with whole_file(tmp_path/'a'/'b.txt', 'w') as f: f.write('x')
    finally: os.umask(before)
    assert (tmp_path/'a'/'b.txt').stat().st_mode & 0o7777 == mode


@pytest.mark.parametrize('mode', [0o600, 0o644, 0o440, 0o777])
def test_an_old_file_keeps_its_mode(mode, tmp_path):
    (f := tmp_path/'b.txt').write_text('old')
    f.chmod(mode)
    with whole_file(f) as o:
        assert [p.stat().st_mode & 0o077 for p in tmp_path.iterdir() if p != f] == [0]  # nobody reads it before
        o.write(b'new')
    assert (f.stat().st_mode & 0o7777, f.read_text(), os.listdir(tmp_path)) == (mode, 'new', ['b.txt'])


def test_a_link_is_followed(tmp_path):
    (tmp_path/'there').mkdir()
    for o in 'link', 'link again': # at first to a file that is not there yet
        (link := tmp_path/o).symlink_to(tmp_path/'there'/'b.txt')
        with whole_file(link, 'w') as f: f.write(o)
        assert link.is_symlink() and (tmp_path/'there'/'b.txt').read_text() == o


@pytest.mark.parametrize('make', [Path.mkdir, os.mkfifo, lambda p: p.symlink_to(os.devnull)], ids=['folder', 'pipe', 'device'])
def test_only_files_are_replaced(make, tmp_path):
    make(tmp_path/'b')
    with pytest.raises(FileExistsError, match='is a folder, a pipe or a device'), whole_file(tmp_path/'b'): pass
    assert os.listdir(tmp_path) == ['b'] and not Path(os.devnull).is_file()


def test_whole_file_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    with whole_file('~/b.txt', 'w', encoding='utf-16', newline='\r\n') as f: f.write('\u00e4\n')
    assert (tmp_path/'b.txt').read_bytes().decode('utf-16') == '\u00e4\r\n'


def test_arrays_needs_neither_torch_nor_fastai():
    code = "import sys; import gradreg.arrays; print({'torch', 'fastai', 'fastcore', 'torchvision', 'pandas'} & set(sys.modules))"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(gradreg.__file__).parents[1])
    assert r.stdout.strip() == 'set()', r.stdout + r.stderr


def test_an_interrupted_write_leaves_what_was_there(cache, monkeypatch):
    f, a = cache/'mine.npz', Arrays(**good, classes=np.arange(4).astype(str))
    real_savez = np.savez
    def interrupted(f, **d):
        f.write(b'half of it')
        raise KeyboardInterrupt
    for before in (None, 'old'):
        if before: real_savez(f, **arrays(seed=5))
        monkeypatch.setattr(np, 'savez', interrupted)
        with pytest.raises(KeyboardInterrupt): _write_npz(f, a)
        monkeypatch.setattr(np, 'savez', real_savez)
        assert [o.name for o in cache.iterdir()] == (['mine.npz'] if before else [])
    np.testing.assert_array_equal(load_arrays('mine').x_train, arrays(seed=5)['x_train'])


def test_kill_9_in_the_middle_of_a_write(cache):
    code = '''if True:
        import os, signal, numpy as np
        from pathlib import Path
        from gradreg import arrays
        def dies(f, **d):
            f.write(b'PK half of it'); f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        np.savez = dies
        arrays._write_npz(arrays._cache()/'mine.npz', arrays._digits())'''
    r = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(Path(gradreg.__file__).parents[1])},
                       capture_output=True)
    assert r.returncode == -signal.SIGKILL, r.stderr
    assert len(list(cache.iterdir())) == 1 and find_arrays('mine') is None       # the temporary file, which nobody reads
    with pytest.raises(ValueError, match='no data set is called .mine.. There are cifar10, cifar100, digits, mnist, tiny'):
        load_arrays('mine')
    _write_npz(cache/'mine.npz', Arrays(**good, classes=np.arange(4).astype(str)))
    np.testing.assert_array_equal(load_arrays('mine').x_train, good['x_train'])


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('in the way')
    with pytest.warns(UserWarning, match='could not be written .*XDG_CACHE_HOME'):
        _write_npz(tmp_path/'file'/'gradreg'/'mine.npz', Arrays(**good, classes=np.arange(4)))


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
    _write_npz(cache/'mnist.npz', a)
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
    ({f'{TINY}/val/images/val_1.JPEG': b'no picture'}, 'val_1.JPEG: is no JPEG image'),
    ({f'{TINY}/train/n03/images/n03_2.JPEG': jpeg((0, 0, 0))[:400]}, 'n03_2.JPEG: .*[Tt]runcated'),
    ({f'{TINY}/train/n03/images/n03_2.JPEG': jpeg((0, 0, 0), (64, 32))}, r'n03_2.JPEG: has \(64, 32\) pixels'),
    ({f'{TINY}/wnids.txt': 'n03\n'}, "n07"),
    ({f'{TINY}/words.txt': 'n03\tbullfrog\n'}, "n07")])
def test_a_tiny_imagenet_with_faults(change, message, given):
    write_zip(given/f'{TINY}.zip', {k: v for k,v in {**tiny_members(), **change}.items() if v is not None})
    with pytest.raises(ValueError, match=rf'{TINY}\.zip cannot be read .*{message}'): load_arrays('tiny_imagenet')


@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'foreign', lambda b: flipped(b, 0.3)],
                         ids=['cut', 'empty', 'foreign', 'flipped'])
def test_a_damaged_zip(damage, given, tmp_path):
    f = write_zip(given/f'{TINY}.zip', {k: v*(20 if k.endswith('txt') and 'words' in k else 1) for k,v in tiny_members().items()})
    f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(ValueError, match=rf'{TINY}\.zip cannot be read'): load_arrays('tiny_imagenet')
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


@real('tiny_imagenet')
def test_real_tiny_imagenet(tmp_path, monkeypatch):
    folder = find_arrays('tiny_imagenet').parent
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    before = snapshot(folder)
    a = load_arrays('tiny_imagenet')
    assert a.x_train.shape[1:] == (64, 64, 3) and len(a.classes) == 200 == len({*a.classes})
    assert len({*np.bincount(a.y_train)}) == 1 and len({*np.bincount(a.y_test)}) == 1
    monkeypatch.setattr('gradreg.arrays._jpeg', None)  # decoded once
    np.testing.assert_array_equal(load_arrays('tiny_imagenet').x_test, a.x_test)
    assert snapshot(folder) == before
