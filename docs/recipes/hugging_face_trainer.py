"Hugging Face Trainer: `compute_loss` penalises in the embeddings of the words."
import tempfile
import torch
from transformers import (BertConfig, BertForSequenceClassification, Trainer,
                          TrainingArguments, set_seed)
from gradreg.measures import jac_norms
from gradreg.penalties import spect_reg

g = torch.Generator().manual_seed(0)
ids = torch.randint(1, 51, (1300, 12), generator=g)  # 0 would be padding
labels = (ids <= 25).sum(1).ge(6).long()  # is half of it in the first half?
rows = [dict(input_ids=i, labels=k) for i, k in zip(ids, labels)]


class Regularized(Trainer):
    def __init__(self, *args, lam, **kwargs):
        super().__init__(*args, **kwargs)
        self.lam = lam
        self.model_accepts_loss_kwargs = False  # average accumulated batches

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        embed = self.model.get_input_embeddings()
        inputs = dict(inputs)
        embedded = embed(inputs.pop('input_ids'))
        outputs = model(inputs_embeds=embedded, **inputs)
        loss = outputs.loss + self.lam*spect_reg(outputs.logits, embedded).mean()
        return (loss, outputs) if return_outputs else loss


def train(lam, **arguments):
    set_seed(0)
    config = BertConfig(vocab_size=51, hidden_size=32, num_hidden_layers=2,
                        intermediate_size=64, num_attention_heads=2, num_labels=2,
                        attn_implementation='eager')
    model = BertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as tmp:
        args = TrainingArguments(tmp, num_train_epochs=10, per_device_train_batch_size=25,
                                 learning_rate=2e-3, use_cpu=True, report_to='none',
                                 save_strategy='no', disable_tqdm=True, **arguments)
        Regularized(model, args, train_dataset=rows[:1000], lam=lam).train()
    return model.eval()


if __name__ == '__main__':
    for lam in 0, 0.003:
        model = train(lam)
        accuracy = (model(ids[1000:]).logits.argmax(1) == labels[1000:]).float().mean()
        embedded = model.get_input_embeddings()(ids[1000:])
        slope = jac_norms(lambda e: model(inputs_embeds=e).logits, embedded).mean()
        print(f'lam={lam}: accuracy {accuracy:.1%}, slope {slope:.2f}')
