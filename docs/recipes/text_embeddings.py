"Text: `outputs_of` keeps what the embedding layer gives, and the penalty is in that."
import torch
from torch import nn
from torch.nn import functional as F
from gradreg.measures import jac_norms
from gradreg.penalties import outputs_of, spect_reg

words = ('good great fine lovely warm bad awful poor cold dull '
         'the a film plot cast score is was very quite').split()
verdict = torch.tensor([1]*5 + [-1]*5 + [0]*10)
g = torch.Generator().manual_seed(0)
ids = torch.randint(len(words), (600, 12), generator=g)
keep = verdict[ids].sum(1) != 0
ids, labels = ids[keep], verdict[ids].sum(1)[keep].gt(0).long()  # more praise than blame?


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(words), 16)
        self.gru, self.head = nn.GRU(16, 32, batch_first=True), nn.Linear(32, 2)

    def read(self, embedded): return self.head(self.gru(embedded)[0][:, -1])

    def forward(self, ids): return self.read(self.embed(ids))


def train(lam):
    torch.manual_seed(0)
    model = Reader()
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    for epoch in range(40):
        for batch in torch.randperm(200).split(25):
            with outputs_of(model, 'embed', len(batch)) as embedded:
                with torch.backends.cudnn.flags(enabled=False): logits = model(ids[batch])
            penalty = spect_reg(logits, embedded[0]).mean()
            loss = F.cross_entropy(logits, labels[batch]) + lam*penalty
            opt.zero_grad()
            loss.backward()
            opt.step()
    return model.eval()


if __name__ == '__main__':
    for lam in 0, 0.01:
        model = train(lam)
        accuracy = (model(ids[200:]).argmax(1) == labels[200:]).float().mean()
        slope = jac_norms(model.read, model.embed(ids[200:])).mean()
        print(f'lam={lam}: accuracy {accuracy:.1%}, slope {slope:.2f}')
