"torch.compile: not of the model, but of the loss that holds the penalty."
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from gradreg.measures import jac_norms
from gradreg.penalties import spect_reg

torch._dynamo.config.trace_autograd_ops = True  # the penalty is itself a derivative

digits = load_digits()
images = digits.data.astype('float32')/16
split = train_test_split(images, digits.target, train_size=200, random_state=0)
x, x_test, y, y_test = map(torch.tensor, split)


@torch.compile(fullgraph=True)
def loss_of(model, xb, yb, v, lam):
    logits = model(xb)
    return F.cross_entropy(logits, yb) + lam*spect_reg(logits, xb, v).mean()


def train(lam):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(30):
        for batch in torch.randperm(200).split(25):
            xb, v = x[batch].requires_grad_(), torch.randn(len(batch), 10)
            loss = loss_of(model, xb, y[batch], v, lam)
            opt.zero_grad()
            loss.backward(inputs=list(model.parameters()))
            opt.step()
    return model.eval()


if __name__ == '__main__':
    for lam in 0., 0.003:
        model = train(lam)
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
        slope = jac_norms(model, x_test).mean()
        print(f'lam={lam}: accuracy {accuracy:.1%}, slope {slope:.2f}')
