"What a reader of chapter 05_arrays need not see: broken files, interrupted writes, no network"
import hashlib, io, os, re, signal, subprocess, sys, tempfile, tracemalloc, zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as given_of, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import gradreg
from gradreg.arrays import (Arrays, _cache, _folders, _write_npz, as_arrays, find_arrays, load_arrays,
                            shown, whole_file)
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


def snapshot(folder):
    return {p.relative_to(folder): (p.stat().st_mtime_ns, p.stat().st_size) for p in Path(folder).rglob('*')}


def python(code):
    "`code` run by itself"
    env = {**os.environ, 'PYTHONPATH': str(Path(gradreg.__file__).parents[1])}
    return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)


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


def zip_bytes(packing=zipfile.ZIP_DEFLATED, **members):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', packing) as z:
        for k,v in members.items(): z.writestr(k, v)
    return f.getvalue()


@pytest.mark.parametrize('content', [
    b'', b'not an archive at all', npz_bytes(**arrays())[:2000], npz_bytes(**arrays())[:-30], npy_bytes(),
    flipped(npz_bytes(**arrays())), npz_bytes(x_train=np.array([{}])),
    zip_bytes(**{'x_train.npy': b'\x93NUMPY\x01\x00junk'}),
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
    (dict(x_test=None), 'lacks x_test, holds'),
    (dict(y_train=good['y_train'] + 1, y_test=good['y_test'] + 1), 'labels run from 1 to 4, .* from 0: subtract 1'),
    (dict(y_train=good['y_train']*2, y_test=good['y_test']*2), r'labels run from 0 to 6, .*return_inverse=True\)\[1\]'),
    (dict(classes=np.array(list('abcd')).astype('S')), r"classes are bytes: give np.char.decode\(classes, 'utf-8'\)"),
    (dict(classes=np.arange(61)), 'there are 61 classes, but 60 training images'),
    (dict(y_test=good['y_test'] + 1), 'labels run from 0 to 4, but there are 4 classes'),
    (dict(y_train=good['y_train'] - 1), 'labels run from -1'),
    (dict(y_train=good['y_train']*10**12), 'labels run from 0 to 3000000000000, but there are 4 classes'),
    (dict(classes=np.array(['a', 'b'])), 'labels run from 0 to 3, but there are 2 classes'),
    (dict(classes=np.array(list('abcdef'))), r"there are no training images of \['e', 'f'\]"),
    (dict(y_train=good['y_train']//2*2, classes=np.array(list('0123'))), r"there are no .* of \['1', '3'\]"),
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
    labels = {k: v.astype(dtype) for k,v in d.items() if k[0] == 'y'}
    np.savez(given/'my-own.v2.npz', **{**d, **labels}, classes=list('abcd'), extra=1.5)
    a = load_arrays('my-own.v2')
    for k,v in d.items(): np.testing.assert_array_equal(getattr(a, k), v)
    assert a.y_train.dtype == a.y_test.dtype == np.int64 and a.classes.tolist() == list('abcd')
    assert image_dls('my-own.v2', 3, 10, bs=4).vocab == list('abcd')


@pytest.mark.parametrize('name, message', [
    ('MNIST', 'Did you mean mnist'), ('cifar-10', 'Did you mean cifar10'), ('digit', 'Did you mean digits'),
    ('tinyimagenet', 'Did you mean tiny_imagenet'), ('minee', 'Did you mean mine'),
    ('qqq', "no data set is called 'qqq'. There are cifar10, .*, digits, mine, mnist, tiny_imagenet.*qqq.npz in it")])
def test_unknown_names(name, message, given):
    np.savez(given/'mine.npz', **good)
    with pytest.raises(ValueError, match=message): load_arrays(name)


@pytest.mark.parametrize('name', ['../mine', '/etc/passwd', 'a/b', r'a\b', '', '.hidden', 'mine\n'])
def test_names_that_are_paths(name, given):
    np.savez(given.parent/'mine.npz', **good)
    with pytest.raises(ValueError, match='is not a name'): load_arrays(name)


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


def device(path): path.symlink_to(os.devnull)


@pytest.mark.parametrize('make', [Path.mkdir, os.mkfifo, device])
def test_only_files_are_replaced(make, tmp_path):
    make(tmp_path/'b')
    with pytest.raises(FileExistsError, match='is a folder, a pipe or a device'), whole_file(tmp_path/'b'): pass
    assert os.listdir(tmp_path) == ['b'] and not Path(os.devnull).is_file()


def test_whole_file_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    with whole_file('~/b.txt', 'w', encoding='utf-16', newline='\r\n') as f: f.write('\u00e4\n')
    assert (tmp_path/'b.txt').read_bytes().decode('utf-16') == '\u00e4\r\n'


def test_arrays_needs_neither_torch_nor_fastai():
    code = "import sys; import gradreg.arrays; print({'torch', 'fastai', 'fastcore', 'torchvision'} & set(sys.modules))"
    r = python(code)
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
    r = python(code)
    assert r.returncode == -signal.SIGKILL, r.stderr
    assert len(list(cache.iterdir())) == 1 and find_arrays('mine') is None # the temporary file, which nobody reads
    with pytest.raises(ValueError, match='no data set is called .mine.. There are .*, digits, mnist, tiny'):
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
    message = rf'{name} could not be downloaded .*no network.*{name}\.npz .*set GRADREG_DATA'
    with pytest.raises(ConnectionError, match=message): load_arrays(name)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize('name', ['mnist', 'cifar10', 'cifar100', 'tiny_imagenet'])
def test_a_download_with_a_wrong_checksum(name, cache, monkeypatch):
    class Response(io.BytesIO):
        url, length = None, 4
    monkeypatch.setattr('urllib.request.urlopen', lambda *args, **kwargs: Response(b'junk'))
    with pytest.raises(ConnectionError, match=f'{name} could not be downloaded .*corrupted'): load_arrays(name)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize('name, shape, classes', [
    ('mnist', (28, 28), ['0 - zero', '1 - one']), ('cifar10', (32, 32, 3), ['airplane', 'frog'])])
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
    x, y = np.zeros((600, 28, 28), np.uint8), np.arange(600) % 10
    a = Arrays(x, y, x[:10], y[:10], np.arange(10).astype(str))
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
        assert near(a.x_train).tolist() == [[20, 0, 0], [110, 0, 0], [70, 70, 70]] # by class and number; grey as RGB
        assert near(a.x_test).tolist() == [[0, 0, 100], [0, 0, 200]]
    assert snapshot(given) == before
    cached = list((tmp_path/'cache'/'gradreg').iterdir())
    assert [o.name for o in cached] == [f'{TINY}-{hashlib.md5(f.read_bytes()).hexdigest()}.npz']
    write_zip(f, {k: v for k,v in tiny_members().items() if 'n03_11' not in k})
    assert len(load_arrays('tiny_imagenet').x_train) == 2 # another zip is not taken for the first


@pytest.mark.parametrize('member', [
    '../evil.txt', '/evil.txt', f'{TINY}/../../evil.txt', r'..\evil.txt', r'C:\evil.txt', '..'])
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


@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'foreign', flipped],
                         ids=['cut', 'empty', 'foreign', 'flipped'])
def test_a_damaged_zip(damage, given, tmp_path):
    f = write_zip(given/f'{TINY}.zip', tiny_members())
    f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(ValueError, match=rf'{TINY}\.zip cannot be read'): load_arrays('tiny_imagenet')
    assert not (tmp_path/'cache').exists()


def test_tiny_imagenet_where_the_cache_cannot_be_written(given, tmp_path, monkeypatch):
    write_zip(given/f'{TINY}.zip', tiny_members())
    (tmp_path/'file').write_text('in the way')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    with pytest.warns(UserWarning, match='could not be written'): assert len(load_arrays('tiny_imagenet').x_train) == 3


# a file decides neither what runs nor how much memory is taken

@pytest.fixture
def no_ghostscript(tmp_path, monkeypatch):
    "A program `gs` on the path that says when it is started"
    (gs := tmp_path/'bin'/'gs').parent.mkdir()
    gs.write_text(f'#!/bin/sh\ntouch {tmp_path}/started\necho 10.0\n')
    gs.chmod(0o755)
    monkeypatch.setenv('PATH', str(gs.parent), prepend=os.pathsep)
    monkeypatch.setattr('PIL.EpsImagePlugin.gs_binary', None)
    yield
    assert not (tmp_path/'started').exists()


EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n%%EOF\n'


def test_the_trap_for_ghostscript_works(tmp_path, no_ghostscript):
    with pytest.raises(Exception): Image.open(io.BytesIO(EPS)).load()
    (tmp_path/'started').unlink()


@pytest.mark.parametrize('kind', ['EPS', 'PNG', 'GIF', 'BMP', 'TIFF', 'PPM'])
def test_no_format_but_jpeg(kind, given, no_ghostscript):
    b = io.BytesIO(EPS)
    if kind != 'EPS': Image.new('RGB', (64, 64)).save(b := io.BytesIO(), kind)
    member = f'{TINY}/train/n03/images/n03_2.JPEG'
    write_zip(given/f'{TINY}.zip', {**tiny_members(), member: b.getvalue()})
    with pytest.raises(ValueError, match=f'{member}: is no JPEG image'): load_arrays('tiny_imagenet')


def outcome(f):
    try: return f()
    except ValueError as e: return str(e)


def peak(f):
    "Megabytes that `f` takes at most, and its outcome"
    outcome(f) # what it imports does not count
    tracemalloc.start()
    said = outcome(f)
    most = tracemalloc.get_traced_memory()[1]/1e6
    tracemalloc.stop()
    return most, said


def zeros_npz(megabytes, **d):
    b = io.BytesIO(npz_bytes(**d))
    with zipfile.ZipFile(b, 'a', zipfile.ZIP_DEFLATED) as z, z.open('other.npy', 'w') as f:
        for _ in range(megabytes): f.write(bytes(10**6))
    return b.getvalue()


def test_what_nobody_wants_is_not_unpacked(given):
    (given/'mine.npz').write_bytes(zeros_npz(300, **good))
    most, a = peak(lambda: load_arrays('mine'))
    assert most < 10 and len(a.x_train) == 60


@pytest.mark.parametrize('key', ['x_train', 'y_test', 'classes'])
def test_declared_sizes_have_a_bound(key, given, monkeypatch):
    np.savez_compressed(given/'mine.npz', **{**good, key: np.zeros(2*10**8, np.uint8)})
    monkeypatch.setenv('GRADREG_MAX_GB', '.1')
    most, said = peak(lambda: load_arrays('mine'))
    assert most < 10 and 'take 0.2 GB, more than GRADREG_MAX_GB=.1: raise it if you trust the file' in said
    monkeypatch.setenv('GRADREG_MAX_GB', '0.3')
    with pytest.raises(ValueError, match='mine.npz: (x_train|y_test|there are 2.* classes)'): load_arrays('mine')


@pytest.mark.parametrize('value', ['much', '0', '-1', 'nan', 'inf', '1e400', '1,5'])
def test_a_bound_that_is_none(value, given, monkeypatch):
    np.savez(given/'mine.npz', **good)
    monkeypatch.setenv('GRADREG_MAX_GB', value)
    with pytest.raises(ValueError, match=f'GRADREG_MAX_GB={value!r}: must be a number of gigabytes, above 0'):
        load_arrays('mine')
    monkeypatch.setenv('GRADREG_MAX_GB', '')
    load_arrays('mine')


def header(shape, dtype='|u1', version=(1, 0), length=None):
    "The start of an .npy file that says what it likes"
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = (len(text) if length is None else length).to_bytes(2 if version == (1, 0) else 4, 'little')
    return b'\x93NUMPY' + bytes(version) + size + text


@pytest.mark.parametrize('npy, message', [
    (header('(10**12,)'), 'x_train.npy: '), (header((1,), length=2**31, version=(2, 0)), 'EOF'),
    (header((10**12,)) + b'x', r'\(1000000000000,\) uint8, 1,000,000,000,000 bytes, but there are 1$'),
    (header((10**9, 10**9), '<f8'), 'bytes, but there are 0'), (header((10**9,), '<U0'), 'bytes, but there are 0'),
    (header((1,), '|V1000000000000'), 'x_train.npy: '), (header((-1,)) + b'x', 'x_train.npy: '),
    (header((0, 10**30)), 'x_train.npy: '), (header((1,)*100) + b'x', 'x_train.npy: '),
    (header((1,), '|O') + bytes(8), 'allow_pickle=False'), (header((1,), version=(9, 9)) + b'x', r'\(9, 9\)'),
    (header((1,), version=(3, 0)) + b'x', r'is of version \(3, 0\)'),
    (header('(' * 500), 'x_train.npy: '), (header('[' * 9000), 'x_train.npy: ')])
def test_headers_that_lie(npy, message, given):
    (given/'mine.npz').write_bytes(zip_bytes(**{'x_train.npy': npy, 'y_train.npy': npy_bytes()}))
    most, said = peak(lambda: load_arrays('mine'))
    assert most < 10 and len(said) < 500 and re.search(r'mine\.npz cannot be read \((.*)\): replace it', said)
    assert re.search(message, re.search(r'cannot be read \((.*)\): replace it', said)[1])


def test_members_that_a_damaged_directory_hides(given):
    "The comment on the second of four members swallows the last two, so a test part would be missed by nobody"
    b = bytearray(npz_bytes(**good))
    starts = [m.start() for m in re.finditer(b'PK\x01\x02', b)]
    hidden = b.index(b'PK\x05\x06') - starts[2]
    b[starts[1]+32:starts[1]+34] = hidden.to_bytes(2, 'little')
    (given/'mine.npz').write_bytes(b)
    with zipfile.ZipFile(given/'mine.npz') as z: assert z.namelist() == ['x_train.npy', 'y_train.npy']
    with pytest.raises(ValueError, match='2 of 4 members'): load_arrays('mine')


@pytest.mark.parametrize('member', [f'{TINY}/train/n03/images/n03_2.JPEG', f'{TINY}/train/n03/n03_boxes.txt'])
def test_members_that_a_damaged_directory_renames(member, given):
    "An image that no longer matches the pattern would be missed by nobody"
    b = write_zip(given/f'{TINY}.zip', tiny_members()).read_bytes()
    i = b.rindex(member.encode())
    (given/f'{TINY}.zip').write_bytes(b[:i] + member.replace('n03', 'm03').encode() + b[i+len(member):])
    with pytest.raises(ValueError, match='File name in directory .*m03.* and header .*n03.* differ'):
        load_arrays('tiny_imagenet')


@pytest.mark.parametrize('n', [65535, 65537])
def test_archives_of_any_number_of_members(n, given):
    b = io.BytesIO(npz_bytes(**good))
    with zipfile.ZipFile(b, 'a') as z:
        for i in range(n - 4): z.writestr(str(i), '')
    (given/'mine.npz').write_bytes(b.getvalue())
    assert len(load_arrays('mine').x_train) == 60


@pytest.mark.parametrize('packing', [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_that_unpack_without_bound(packing, given):
    (given/'mine.npz').write_bytes(zip_bytes(packing, **{f'{k}.npy': npy_bytes() for k in good}))
    with pytest.raises(ValueError, match=f'x_train.npy: is packed by method {packing}'): load_arrays('mine')


def lying(b, size, says):
    "The zip `b` in which a member of `size` bytes says that it has `says`"
    assert b.count(size.to_bytes(4, 'little')) == 2 # once before the member, once in the directory
    return b.replace(size.to_bytes(4, 'little'), says.to_bytes(4, 'little'))


def test_a_member_that_lies_about_its_size(given):
    npy = header((100,)) + bytes(2*10**8)
    b = zip_bytes(**{'x_train.npy': npy, 'y_train.npy': npy_bytes()})
    (given/'mine.npz').write_bytes(lying(b, len(npy), len(npy) - 2*10**8 + 100))
    most, said = peak(lambda: load_arrays('mine'))
    assert most < 20 and 'x_train.npy: Bad CRC-32' in said
    text = ('n03\n'*(5*10**7)).encode()
    members = {**tiny_members(), f'{TINY}/wnids.txt': text}
    b = write_zip(given/f'{TINY}.zip', members).read_bytes()
    (given/f'{TINY}.zip').write_bytes(lying(b, len(text), 100))
    most, said = peak(lambda: load_arrays('tiny_imagenet'))
    assert most < 30 and 'wnids.txt: Bad CRC-32' in said # 10 MB are the most of a text, and there is a copy


@pytest.mark.parametrize('member, content, message', [
    ('wnids.txt', 'n03\n'*3*10**6, 'wnids.txt: has 12,000,000 bytes, 10,000,000 are the most'),
    ('words.txt', b'n03\tfrog\nn05\tcat\nn07\tK\xe4se', "words.txt: 'utf-8' codec can't decode byte"),
    ('words.txt', 'n03\tbullfrog\nn05 cat\nn07\tgoldfish', r"words.txt: line 2 has 1 of 2 columns: \['n05 cat'\]"),
    ('words.txt', bytes(300), 'words.txt: line 1 has 1 of 2 columns'),
    ('wnids.txt', 'n07\nn03\n\n', "'' is a class, but not in both"),
    ('wnids.txt', 'n07\nn03\nn03\n', 'classes is not a row of different names'),
    ('wnids.txt', '\n'.join(f'n{i}' for i in range(3*10**5)), 'is a class, but not in both wnids.txt and words.txt'),
    ('val/val_annotations.txt', 'val_0.JPEG n07', 'val_annotations.txt: line 1 has 1 of 2 columns'),
    ('val/val_annotations.txt', '../../x\tn07', 'no item named .*x'),
    ('val/val_annotations.txt', 'val_0.JPEG\tn07\n'*10**5, r'its images take 1.23 GB, more than GRADREG_MAX_GB=1:'),
    ('train/n03/images/n03_2.JPEG', bytes(2*10**6), 'n03_2.JPEG: has 2,000,000 bytes, 1,000,000 are the most'),
    ('train/n03/images/n03_2.JPEG', b'', 'n03_2.JPEG: is no JPEG image'),
    ('train/n09/images/n09_2.JPEG', b'', "'n09' is a class, but not in both")])
def test_members_of_tiny_imagenet_with_faults(member, content, message, given, monkeypatch):
    monkeypatch.setenv('GRADREG_MAX_GB', '1')
    write_zip(given/f'{TINY}.zip', {**tiny_members(), f'{TINY}/{member}': content})
    with pytest.raises(ValueError, match=message) as e: load_arrays('tiny_imagenet')
    assert len(str(e.value)) < 600


def test_pixels_are_counted_before_they_are_decoded(given):
    b = io.BytesIO()
    Image.new('L', (20_000, 20_000)).save(b, 'JPEG') # 400 MB of pixels
    member = f'{TINY}/train/n03/images/n03_2.JPEG'
    write_zip(given/f'{TINY}.zip', {**tiny_members(), member: b.getvalue()[:10**6]})
    most, said = peak(lambda: load_arrays('tiny_imagenet'))
    assert most < 20 and 'n03_2.JPEG: ' in said


def broken_link(path): path.symlink_to('gone')
def circle(path): path.symlink_to(path)


@pytest.mark.parametrize('make', [Path.mkdir, os.mkfifo, device, broken_link, circle])
@pytest.mark.parametrize('name, file', [('mnist', 'mnist.npz'), ('mine', 'mine.npz'), ('tiny_imagenet', f'{TINY}.zip')])
def test_only_files_are_read(make, name, file, given, tmp_path):
    make(given/file)
    message = rf'{file} is a folder, a pipe, a device or a broken link: remove it, or put the file there'
    with pytest.raises(ValueError, match=message): load_arrays(name)
    (tmp_path/'cache'/'gradreg').mkdir(parents=True)
    (given/file).rename(tmp_path/'cache'/'gradreg'/file)
    with pytest.raises(ValueError, match=message): load_arrays(name)
    if file.endswith('.npz'):
        with pytest.raises(ValueError, match=message): load_arrays(tmp_path/'cache'/'gradreg'/file)


@pytest.mark.parametrize('names', [
    np.char.add('class ', np.arange(10**6).astype(str)), np.array(['\x1b]0;owned\x07\x1b[2J'*50, 'b', 'c', 'd', 'e']),
    np.array(['x'*10**6, 'b', 'c', 'd', 'e'])], ids=['a million', 'escapes', 'long'])
def test_errors_are_short_and_harmless(names, given):
    np.savez(given/'mine.npz', **{**good, 'classes': names})
    with pytest.raises(ValueError) as e: load_arrays('mine')
    assert len(str(e.value)) < 700 and str(e.value).isprintable()
    names[:4] = list('abcd')
    np.savez(given/'mine.npz', **{'\x1b[2J'*20 + str(i): np.zeros(0) for i in range(100)})
    with pytest.raises(ValueError, match='lacks x_train, y_train, holds ') as e: load_arrays('mine')
    assert len(str(e.value)) < 700 and str(e.value).isprintable()


@given_of(text=st.text(), width=st.integers(4, 80))
def test_shown_is_one_printable_line(text, width):
    line = shown(text, width)
    assert line.isprintable() and len(line) <= width
    if text.isprintable() and len(text) <= width: assert line == text


def test_a_user_who_is_unknown(monkeypatch):
    monkeypatch.setenv('GRADREG_DATA', '~nobody-of-that-name/data')
    with pytest.raises(ValueError, match='GRADREG_DATA=~nobody-of-that-name/data is not a folder'): load_arrays('mnist')


# any arrays, any damage

kinds = st.sampled_from(['u1', 'i1', '<i8', '>i4', 'u8', 'f4', 'b1', 'U2', 'S2', 'c8', 'M8[s]'])
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
any_array = hnp.arrays(kinds.map(np.dtype), shapes)


@st.composite
def nearly_arrays(draw):
    "What `Arrays` could hold, some of it spoilt: another type, another shape, missing"
    n, m, c = draw(st.integers(1, 6)), draw(st.integers(0, 4)), draw(st.integers(1, 3))
    shape = draw(st.sampled_from([(2, 3), (2, 3, 1), (2, 3, 3), (2,)]))
    def labels(k): return draw(hnp.arrays(np.int64, k, elements=st.integers(0, c - 1)))
    def part(k): return draw(hnp.arrays(np.uint8, (k, *shape))), labels(k)
    d = dict(zip(Arrays._fields, (*part(n), *part(m), np.arange(c).astype(str))))
    for k in draw(st.lists(st.sampled_from([*d]), max_size=2, unique=True)): d[k] = draw(st.none() | any_array)
    return {k: v for k,v in d.items() if v is not None}


@settings(deadline=None, max_examples=150)
@given_of(d=nearly_arrays())
def test_any_arrays_are_read_as_they_are_or_refused(d):
    "What a file gives is what the same arrays give without a file"
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f := Path(folder)/'mine.npz', **d)
        read, direct = (outcome(lambda: get(o)) for get,o in ((load_arrays, f), (as_arrays, d)))
    if isinstance(direct, str): assert read.split('mine.npz: ')[1] == direct.split('the arrays: ')[1]
    else:
        for a,b in zip(read, direct, strict=True): np.testing.assert_array_equal(a, b)
        assert sorted(set(direct.y_train)) == list(range(len(direct.classes))) and direct.x_train.dtype == np.uint8
        assert len(direct.x_test) == len(direct.y_test) and direct.x_test.shape[1:] == direct.x_train.shape[1:]


whole = npz_bytes(**good, classes=np.array(list('abcd')))


@settings(deadline=None, max_examples=300)
@given_of(at=st.integers(0, len(whole) - 1), cut=st.integers(0, 40), put=st.binary(max_size=40))
def test_a_damaged_file_gives_the_same_arrays_or_an_error(at, cut, put):
    "The checksums of the zip see to it"
    with tempfile.TemporaryDirectory() as folder:
        (f := Path(folder)/'mine.npz').write_bytes(whole[:at] + put + whole[at+cut:])
        a = outcome(lambda: load_arrays(f))
    if isinstance(a, str): assert len(a) < 900 and a.isprintable() and 'mine.npz' in a
    else:
        for k,v in good.items(): np.testing.assert_array_equal(getattr(a, k), v)


# data sets in memory

def test_a_path(given, tmp_path, monkeypatch):
    np.savez(tmp_path/'b.npz', **good)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for o in tmp_path/'b.npz', str(tmp_path/'b.npz'), 'b.npz', '~/b.npz':
        np.testing.assert_array_equal(load_arrays(o).x_train, good['x_train'])
    with pytest.raises(FileNotFoundError, match='no file .*gone.npz, seen'): load_arrays(tmp_path/'gone.npz')
    with pytest.raises(ValueError, match='is not a name'): load_arrays(tmp_path/'b')
    with pytest.raises(ValueError, match='is not a name'): load_arrays('x'*10**6)


def test_no_test_part(given):
    train = {k: v for k,v in good.items() if 'train' in k}
    np.savez(given/'mine.npz', **train)
    for a in load_arrays('mine'), as_arrays(train), as_arrays(as_arrays(train)):
        assert a.x_test.shape == (0, 8, 8) and a.y_test.shape == (0,) and len(a.x_train) == 60


class Items(list):
    "Like torchvision's data sets: (PIL image, label) by number"
    def __init__(self, items, classes=None):
        super().__init__(items)
        if classes is not None: self.classes = classes


def items(x, y, **kwargs): return Items([(Image.fromarray(o), c) for o,c in zip(x, y.tolist())], **kwargs)


@pytest.mark.parametrize('shape', [(8, 8), (8, 6, 3), (5, 5, 4)])
def test_data_sets_of_items(shape):
    d = arrays(shape=shape)
    train, test = items(d['x_train'], d['y_train'], classes=list('abcd')), items(d['x_test'], d['y_test'])
    a, only = as_arrays((train, test)), as_arrays(train)
    for k,v in d.items(): np.testing.assert_array_equal(getattr(a, k), v)
    assert a.classes.tolist() == only.classes.tolist() == list('abcd') and len(only.x_test) == 0
    np.testing.assert_array_equal(only.x_train, d['x_train'])


def test_a_palette_is_colours():
    im = Image.new('P', (4, 4), 1)
    im.putpalette([0, 0, 0, 10, 20, 30])
    assert as_arrays(Items([(im, 0)])).x_train[0,0,0].tolist() == [10, 20, 30]


def test_torchvisions_data_sets(tmp_path):
    from torchvision.datasets import FakeData, ImageFolder
    from torchvision.transforms import Resize, ToTensor
    fake = FakeData(20, (3, 6, 5), 2)
    a = as_arrays(fake)
    np.testing.assert_array_equal(a.x_train, [np.asarray(im) for im,_ in fake])
    assert a.y_train.tolist() == [int(c) for _,c in fake]
    for part in 'train', 'test':
        for c,size in ('cat', (6, 5)), ('dog', (5, 6)):
            (tmp_path/part/c).mkdir(parents=True)
            Image.new('RGB', size, c == 'cat' and (9, 9, 9) or (0, 0, 0)).save(tmp_path/part/c/'1.png')
    folders = lambda tfm: tuple(ImageFolder(tmp_path/o, transform=tfm) for o in ('train', 'test'))
    a = as_arrays(folders(Resize((4, 4))))
    assert a.classes.tolist() == ['cat', 'dog'] and a.x_test.shape == (2, 4, 4, 3) and a.x_train[0].max() == 9
    with pytest.raises(ValueError, match='train: give images one size, as Resize'): as_arrays(folders(None))
    with pytest.raises(ValueError, match='gives a Tensor, not a PIL image: it must not transform to tensors'):
        as_arrays(folders(ToTensor()))
    (tmp_path/'test'/'dog').rename(tmp_path/'test'/'elk')
    with pytest.raises(ValueError, match="other classes: .*'dog'.*'elk'"): as_arrays(folders(Resize((4, 4))))


# digits

def test_digits_against_torchs_interpolation(cache):
    from sklearn.datasets import load_digits
    d, a = load_digits(), load_arrays('digits')
    x, y = np.concatenate([a.x_train, a.x_test]), np.concatenate([a.y_train, a.y_test])
    np.testing.assert_array_equal(y, d.target)
    want = F.interpolate(torch.tensor(d.images)[:,None]*255/16, (28, 28), mode='bilinear', align_corners=False)[:,0]
    assert np.abs(x - want.numpy()).max() <= 1.51 # rounded thrice, by 0.5 at most
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
