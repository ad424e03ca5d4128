"skorch: the strength is a parameter like any other, and a grid search chooses it."
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from skorch import NeuralNetClassifier
from skorch.dataset import unpack_data
from skorch.utils import to_tensor
from torch import nn
from gradreg.measures import jac_norms
from gradreg.penalties import spect_reg

digits = load_digits()
images, labels = digits.data.astype('float32')/16, digits.target
x, x_test, y, y_test = train_test_split(images, labels, train_size=200, random_state=0)


class Regularized(NeuralNetClassifier):
    def __init__(self, *args, lam=0., **kwargs):
        super().__init__(*args, **kwargs)
        self.lam = lam

    def train_step_single(self, batch, **fit_params):
        xb, yb = unpack_data(batch)
        xb = to_tensor(xb, device=self.device).detach().requires_grad_()
        return super().train_step_single((xb, yb), **fit_params)

    def get_loss(self, y_pred, y_true, X=None, training=False):
        loss = super().get_loss(y_pred, y_true, X, training)
        return loss + self.lam*spect_reg(y_pred, X).mean() if training else loss


def net(lam):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Regularized(module, lam=lam, criterion=nn.CrossEntropyLoss,
                       optimizer=torch.optim.Adam, lr=2e-3, max_epochs=30, batch_size=25,
                       iterator_train__shuffle=True, verbose=0)


def train(lam): return net(lam).fit(x, y)


if __name__ == '__main__':
    for lam in 0., 0.003:
        model = train(lam)
        slope = jac_norms(model.module_, torch.tensor(x_test)).mean()
        print(f'lam={lam}: accuracy {model.score(x_test, y_test):.1%}, slope {slope:.2f}')
    strengths = {'lam': [0., 0.001, 0.003, 0.01, 0.03]}
    search = GridSearchCV(net(0.), strengths, cv=4).fit(x, y)
    print(f'four folds of the training points choose lam={search.best_params_["lam"]}')
