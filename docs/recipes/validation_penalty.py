"Validation: `no_grad` leaves nothing to differentiate, so switch gradients on."
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from gradreg.penalties import spect_reg

digits = load_digits()
images = digits.data.astype('float32')/16
split = train_test_split(images, digits.target, train_size=200, random_state=0)
x, x_test, y, y_test = map(torch.tensor, split)


@torch.no_grad()
def validate(model, x, y):
    model.eval()
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
    g = torch.Generator().manual_seed(0)  # the same directions at each epoch
    directions = torch.randn(logits.shape, generator=g)
    penalty = spect_reg(logits, x, directions).mean().item()
    model.train()
    return accuracy, penalty


def train(lam):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    history = []
    for epoch in range(30):
        for batch in torch.randperm(200).split(25):
            xb = x[batch].requires_grad_()
            logits = model(xb)
            loss = F.cross_entropy(logits, y[batch]) + lam*spect_reg(logits, xb).mean()
            opt.zero_grad()
            loss.backward(inputs=list(model.parameters()))
            opt.step()
        history.append((*validate(model, x, y), *validate(model, x_test, y_test)))
    return model.eval(), history


if __name__ == '__main__':
    for lam in 0, 0.001:
        model, history = train(lam)
        for epoch in 0, 9, 29:
            said = 'training: accuracy {:.1%}, penalty {:.1f}; validation: {:.1%}, {:.1f}'
            print(f'lam={lam}, epoch {epoch + 1:2},', said.format(*history[epoch]))
