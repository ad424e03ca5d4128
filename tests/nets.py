"What several tests differentiate: nets, a probe without chance, an operation differentiable once, mixed precision."
import pytest, torch
from fastai.callback.fp16 import MixedPrecision
from fastcore.foundation import L
from torch import nn

F64 = torch.float64

def mlp(c): return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, c))
def conv(c): return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2), nn.Tanh(),
                                  nn.Flatten(), nn.Linear(5, c))
NETS = {'mlp': (mlp, (12,)), 'conv': (conv, (2, 6, 6))}
each_net = pytest.mark.parametrize('kind', NETS)

def rowwise(z): return z.detach().cos() + .1  # the same for an example, whatever batch it is in

def weights(learn): return {k: p.detach() for k, p in learn.model.named_parameters()}

class Once(torch.autograd.Function):
    "tanh, whose derivative cannot be differentiated."
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x.tanh()
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return g*(1 - ctx.saved_tensors[0].tanh()**2)

class CPUMixedPrecision(MixedPrecision):
    "fastai's names CUDA; the CPU has all of it too."
    def __init__(self, dtype=torch.float16, **scaler):
        super().__init__(**scaler)
        self.dtype = dtype
    def before_fit(self):
        self.autocast, self.scales = torch.autocast('cpu', dtype=self.dtype), L()
        self.learn.scaler = torch.amp.GradScaler('cpu', enabled=self.dtype == torch.float16, **self.kwargs)
