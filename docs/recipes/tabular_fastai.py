"fastai tabular: the callback penalises in the continuous columns."
from functools import partial
import pandas as pd
from fastai.tabular.all import (CategoryBlock, Categorify, Normalize, RandomSplitter,
                                TabularPandas, accuracy, set_seed, tabular_learner)
from sklearn.datasets import load_breast_cancer
from gradreg.callbacks import SpectReg
from gradreg.measures import jac_norms

table = load_breast_cancer(as_frame=True).frame
sizes = ['tiny', 'small', 'medium', 'large', 'huge']
table['size'] = pd.cut(table.pop('mean radius'), 5, labels=sizes)
continuous = list(table.columns[:9])
rows = TabularPandas(table, procs=[Categorify, Normalize], cat_names=['size'],
                     cont_names=continuous, y_names='target', y_block=CategoryBlock(),
                     splits=RandomSplitter(0.7, seed=0)(table))


def train(lam):
    set_seed(0, reproducible=True)
    learn = tabular_learner(rows.dataloaders(bs=25), layers=[64, 32], metrics=accuracy,
                            cbs=SpectReg(lam))
    with learn.no_bar(), learn.no_logging(): learn.fit(20, 5e-3)
    return learn


if __name__ == '__main__':
    for lam in 0, 0.01:
        learn = train(lam)
        categories, values, _ = learn.dls.valid.new(bs=400).one_batch()
        network = partial(learn.model, categories)
        slope = jac_norms(network, values, bs=len(values)).mean()
        with learn.no_bar(): score = learn.validate()[1]
        print(f'lam={lam}: accuracy {score:.1%}, slope {slope:.2f}')
