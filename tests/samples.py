"What several tests share: small arrays, and the mark of a test that wants real data."
import numpy as np
import pandas as pd
import pytest
from gradreg.arrays import find_arrays


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
