"Segmentation: the penalty is a sum over pixels and the loss a mean, so divide."
import torch
from torch import nn
from torch.nn import functional as F
from gradreg.double_backward import fast_double_backward
from gradreg.measures import sampled_jac_norms
from gradreg.penalties import spect_reg

size, unknown = 24, 255


def discs(n, seed):
    "Noisy images of a disc; of each pixel: 0 outside, 1 inside, or `unknown` on the rim."
    g = torch.Generator().manual_seed(seed)
    at = torch.rand(n, 2, 1, 1, generator=g)*12 + 6
    radius = torch.rand(n, 1, 1, generator=g)*4 + 3
    i = torch.arange(size)
    away = ((i[:, None] - at[:, 0])**2 + (i - at[:, 1])**2).sqrt() - radius
    mask = (away < 0).long().masked_fill(away.abs() < 1, unknown)
    return (away < 0).float()[:, None] + torch.randn(n, 1, size, size, generator=g), mask


def train(lam):
    torch.manual_seed(0)
    x, y = discs(100, seed=1)
    model = nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(),
                          nn.Conv2d(16, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 2, 1))
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    for epoch in range(10):
        for batch in torch.randperm(len(x)).split(10):
            xb = x[batch].requires_grad_()
            with fast_double_backward(): logits = model(xb)
            penalty = spect_reg(logits, xb).mean()/size**2
            loss = F.cross_entropy(logits, y[batch], ignore_index=unknown) + lam*penalty
            opt.zero_grad()
            loss.backward(inputs=list(model.parameters()))
            opt.step()
    return model.eval()


if __name__ == '__main__':
    x, y = discs(100, seed=2)
    for lam in 0, 0.1:
        model = train(lam)
        right = (model(x).argmax(1) == y)[y != unknown].float().mean()
        slope = sampled_jac_norms(model, x)[0].mean()/size
        print(f'lam={lam}: {right:.1%} of the pixels right, slope {slope:.2f} a pixel')
