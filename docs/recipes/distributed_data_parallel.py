"DDP on the CPU: torchrun --standalone --nproc-per-node=2 distributed_data_parallel.py"
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from gradreg.double_backward import fast_double_backward
from gradreg.measures import jac_norms
from gradreg.penalties import spect_reg

digits = load_digits()
images = digits.images[:, None].astype('float32')/16
split = train_test_split(images, digits.target, train_size=200, random_state=0)
x, x_test, y, y_test = map(torch.tensor, split)


def train(lam):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
                        nn.Flatten(), nn.Linear(16*6*6, 10))
    model = DistributedDataParallel(net)
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    data = TensorDataset(x, y)
    sampler = DistributedSampler(data)
    torch.manual_seed(1 + distributed.get_rank())  # directions of its own
    for epoch in range(15):
        sampler.set_epoch(epoch)
        for xb, yb in DataLoader(data, batch_size=25, sampler=sampler):
            xb = xb.detach().requires_grad_()
            with fast_double_backward(): logits = model(xb)  # through the wrapper
            loss = F.cross_entropy(logits, yb) + lam*spect_reg(logits, xb).mean()
            opt.zero_grad()
            loss.backward(inputs=list(model.parameters()))  # one backward pass of the sum
            opt.step()
    return net.eval()


if __name__ == '__main__':
    distributed.init_process_group('gloo')
    for lam in 0, 0.003:
        model = train(lam)
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
        slope = jac_norms(model, x_test).mean()
        if distributed.get_rank() == 0:
            print(f'lam={lam}: accuracy {accuracy:.1%}, slope {slope:.2f}')
    distributed.destroy_process_group()
