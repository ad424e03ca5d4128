"Lightning: the penalty is one more term of what `training_step` returns."
import lightning
import torch
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


class Digits(lightning.LightningModule):
    def __init__(self, lam):
        super().__init__()
        self.lam = lam
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
                                 nn.Flatten(), nn.Linear(16*6*6, 10))

    def forward(self, x): return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.detach().requires_grad_()
        with fast_double_backward(): logits = self(x)
        loss, penalty = F.cross_entropy(logits, y), spect_reg(logits, x).mean()
        self.log_dict({'loss': loss, 'spect_reg': penalty})
        return loss + self.lam*penalty

    def configure_optimizers(self): return torch.optim.Adam(self.parameters(), lr=2e-3)


def train(lam):
    lightning.seed_everything(0, verbose=False)
    loader = DataLoader(TensorDataset(x, y), batch_size=25, shuffle=True)
    model = Digits(lam)
    trainer = lightning.Trainer(max_epochs=15, accelerator='cpu', logger=False,
                                enable_checkpointing=False, enable_progress_bar=False,
                                enable_model_summary=False)
    trainer.fit(model, loader)
    return model.eval()


if __name__ == '__main__':
    for lam in 0, 0.003:
        model = train(lam)
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
        slope = jac_norms(model, x_test).mean()
        print(f'lam={lam}: accuracy {accuracy:.1%}, slope {slope:.2f}')
