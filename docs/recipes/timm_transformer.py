"timm: fused attention has no second derivative; switch it off, then make the network."
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.layers import set_fused_attn
from timm.optim import create_optimizer_v2
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from gradreg.measures import jac_norms
from gradreg.penalties import spect_reg

digits = load_digits()
images = digits.images[:, None].astype('float32')/16
split = train_test_split(images, digits.target, train_size=200, random_state=0)
x, x_test, y, y_test = map(torch.tensor, split)


def train(lam):
    torch.manual_seed(0)
    set_fused_attn(False)
    model = timm.create_model('test_vit', depth=2, img_size=8, patch_size=4, in_chans=1,
                              num_classes=10).train()
    opt = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.01)
    loader = DataLoader(TensorDataset(x, y), batch_size=25, shuffle=True)
    for epoch in range(20):
        for xb, yb in loader:
            xb = xb.detach().requires_grad_()
            logits = model(xb)
            loss = F.cross_entropy(logits, yb) + lam*spect_reg(logits, xb).mean()
            opt.zero_grad()
            loss.backward(inputs=list(model.parameters()))
            opt.step()
    return model.eval()


if __name__ == '__main__':
    for lam in 0, 0.001:
        model = train(lam)
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
        slope = jac_norms(model, x_test).mean()
        print(f'lam={lam}: accuracy {accuracy:.1%}, slope {slope:.2f}')
