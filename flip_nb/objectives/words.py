import torch
def word_weights(captions, tokenizer):
    n=torch.zeros(tokenizer.vocab_size)
    for row in tokenizer(list(captions)): n[row.unique()]+=1
    w=(len(captions)/n.clamp(min=1)).log(); w[0]=0
    return w
def word_loss(logits, ids, weights):
    t=torch.zeros_like(logits).scatter_(1, ids, 1.)*weights.to(logits.dtype)
    s=t.sum(1,keepdim=True); t=t/s.clamp(min=1e-9)
    return -(t*logits.log_softmax(1)).sum(1).mean()
