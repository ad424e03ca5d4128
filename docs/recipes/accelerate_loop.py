"Accelerate: forward through the prepared model, one `accelerator.backward` of the sum."
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from gradreg.double_backward import fast_double_backward
from gradreg.measures import jac_norms
from gradreg.penalties import spect_reg

digits = load_digits()
images = digits.images[:, None].astype('float32')/16
split = train_test_split(images, digits.target, train_size=200, random_state=0)
x, x_test, y, y_test = map(torch.tensor, split)


def train(lam, **options):
    set_seed(0)
    accelerator = Accelerator(cpu=True, **options)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
                          nn.Flatten(), nn.Linear(16*6*6, 10))
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=25, shuffle=True)
    model, opt, loader = accelerator.prepare(model, opt, loader)
    for epoch in range(15):
        for xb, yb in loader:
            with accelerator.accumulate(model):
                xb = xb.detach().requires_grad_()
                with fast_double_backward(): logits = model(xb)
                loss = F.cross_entropy(logits, yb) + lam*spect_reg(logits, xb).mean()
                accelerator.backward(loss)
                opt.step()
                opt.zero_grad()
    return accelerator.unwrap_model(model).eval()


if __name__ == '__main__':
    for lam in 0, 0.003:
        model = train(lam)
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
        slope = jac_norms(model, x_test).mean()
        print(f'lam={lam}: accuracy {accuracy:.1%}, slope {slope:.2f}')
