"Objectives with parts of the package that stand above them: batches in parts."
import pytest
import torch
from torch import nn

from flip_nb.loss import clamped_exp, info_nce, normalize
from flip_nb.objectives.sigmoid import sigmoid_loss
from flip_nb.objectives.words import row_word_loss, word_loss, word_weights
from flip_nb.scale.accumulate import cached_backward, split_batch
from small import WORDS, rng, tiny_flip


class Worded(nn.Module):
    "FLIP with a bias and a layer for the words; the losses of the rows come as a table with one column."
    def __init__(self):
        super().__init__()
        self.flip = tiny_flip().double()
        self.words = nn.Linear(16, self.flip.config.vocab_size).double()
        self.bias = nn.Parameter(torch.tensor([-3.]).double())
        self.weights = word_weights(WORDS, self.flip.tokenizer).double()

    def forward(self, images, ids, mask_ratio):
        feature = self.flip.image_encoder(images, mask_ratio)
        v,t = normalize(self.flip.image_proj(feature)),self.flip.encode_text(ids, mask_ratio)
        rows = row_word_loss(self.words(feature), ids, self.weights)
        return v, t, clamped_exp(self.flip.logit_scale), self.bias, rows[:, None]


def both(v, t, scale, bias, rows): return sigmoid_loss(v, t, scale, bias) + info_nce(v, t, scale) + rows.mean()


def gradients(model, way):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    value = way(model)
    return value.detach(), {n: p.grad.clone() for n,p in model.named_parameters()}


@pytest.mark.parametrize('part', (1, 4, 5, 11))
def test_words_and_contrast_in_parts_are_one_graph(part):
    model,texts = Worded(),[WORDS[i % len(WORDS)] for i in range(10)] + ['']
    batch = dict(images=torch.randn(11, 3, 16, 16, generator=rng()).double(), ids=model.flip.tokenizer(texts), mask_ratio=.5)
    parts = split_batch(batch, part)
    def one_graph(model):
        out = list(zip(*(model(**p) for p in parts)))
        value = both(*(torch.cat(out[i]) if i in (0, 1, 4) else out[i][0] for i in range(5)))
        value.backward()
        return value
    truth,wanted = gradients(model, one_graph)
    value,found = gradients(model, lambda m: cached_backward(m, parts, both))
    torch.testing.assert_close(value, truth, rtol=0, atol=1e-12)
    assert found.keys() == wanted.keys() and wanted['words.weight'].norm() > .01 and wanted['bias'].norm() > .01
    for n,g in wanted.items(): torch.testing.assert_close(found[n], g, rtol=0, atol=1e-12)


def test_words_alone_in_parts_are_plainly_added():
    flip = tiny_flip()
    weights,ids = word_weights(WORDS, flip.tokenizer),flip.tokenizer(WORDS[:4] + ['', 'zzz'])
    logits = torch.randn(6, len(weights), generator=rng()).double().requires_grad_()
    whole, = torch.autograd.grad(word_loss(logits, ids, weights), logits)
    parts = sum(word_loss(z, i, weights)*len(i)/6 for z,i in zip(logits.split(4), ids.split(4)))
    torch.testing.assert_close(torch.autograd.grad(parts, logits)[0], whole, rtol=0, atol=1e-15)
