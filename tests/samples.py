"What several tests share: small arrays, Runs and tables, a picture, and the mark of a test that wants real data."
import numpy as np
import pandas as pd
import pytest
from gradreg.arrays import find_arrays
from gradreg.runs import Run

DIGITS = Run(data='digits', n_train=50, n_valid=50, bs=25, iters=4)
SIN = Run(data='sin', model='mlp', n_train=50, n_valid=50, bs=25, iters=4)  # trains in milliseconds
METRICS = ['test', 'valid', 'train', 'jac_train', 'jac_test', 'jac_between', 'jac_noise', 'weight_norm']
PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='


def metrics(row): return {k: row[k] for k in METRICS}


def real(name):
    return pytest.mark.skipif(find_arrays(name) is None, reason=f'{name} is not on this machine (GRADREG_DATA)')


def arrays(n_train=60, n_test=20, shape=(8, 8), n_classes=4, seed=0):
    "Small random arrays in which no two images are alike"
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n_train + n_test, *shape)).astype(np.uint8)
    y = np.arange(n_train + n_test) % n_classes
    return dict(x_train=x[:n_train], y_train=y[:n_train], x_test=x[n_train:], y_test=y[n_train:])


def table(seed=0, n=6):
    "Rows of three methods whose seeds share a level"
    rng = np.random.default_rng(seed)
    level = rng.normal(size=n)
    return pd.DataFrame([dict(method=m, bn=m == 'c', seed=s, test=level[s] + g + .3*rng.normal(), valid=rng.normal())
                         for m, g in (('b', .4), ('a', 0), ('c', -.2)) for s in rng.permutation(n)])
