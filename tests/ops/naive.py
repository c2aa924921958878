"""The formulas of the losses as one would write them down: fully materialised, any dtype. The truth of the tests."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def candidates(weight, padding_idx):
    mask = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    if padding_idx is not None:
        mask[padding_idx] = True
    return mask


def linear(hidden, weight, target, padding_idx=0):
    logits = (hidden @ weight.T).masked_fill(candidates(weight, padding_idx), -math.inf)
    own = (hidden * weight[target]).sum(1)
    return logits.logsumexp(1) - own


def sampled_logits(hidden, weight, target, drawn):
    """[N, K] logits of each position's negatives `drawn` [N, K], -inf where one is the target."""
    scores = torch.einsum("nd,nkd->nk", hidden, weight[drawn])
    return scores.masked_fill(drawn == target[:, None], -math.inf)


def sampled(hidden, weight, target, drawn, correction):
    """`correction` [N, K]: log(K q) of each negative, 0 without the correction."""
    own = (hidden * weight[target]).sum(1)
    negative = sampled_logits(hidden, weight, target, drawn) - correction
    return torch.cat([own[:, None], negative], dim=1).logsumexp(1) - own


def sampled_binary(hidden, weight, target, drawn, beta):
    own = (hidden * weight[target]).sum(1)
    negative = sampled_logits(hidden, weight, target, drawn)
    return -(beta * F.logsigmoid(own) + F.logsigmoid(-negative).sum(1)) / (drawn.size(1) + 1)


def bucket_losses(hidden, weight, target, positions, items):
    """For each position a list of its losses in the buckets that have it, in order, one pair at a time; -1 is none."""
    own = (hidden * weight[target]).sum(1)
    losses = [[] for _ in hidden]
    for position, item in zip(positions.tolist(), items, strict=True):
        for i in position:
            if i >= 0:
                others = item[item != target[i]]
                losses[i].append(torch.cat([own[i : i + 1], weight[others] @ hidden[i]]).logsumexp(0) - own[i])
    return losses


def scalable(hidden, weight, target, positions, items):
    """Largest loss of each position over its buckets (first of equals), and coverage."""
    losses = bucket_losses(hidden, weight, target, positions, items)
    zero = (hidden * weight[target]).sum(1) * 0
    covered = torch.tensor([len(some) > 0 for some in losses])
    return torch.stack([max(some, default=none) for some, none in zip(losses, zero, strict=True)]), covered


def published_scalable(hidden, weight, target, directions, size_x, size_y):
    """The mean loss as the authors of SCE compute it, from whole score matrices; row 0 of `weight` is padding."""
    with torch.no_grad():
        positions = (directions @ hidden.T).topk(size_x, dim=1).indices
        items = (directions @ weight[1:].T).topk(size_y, dim=1).indices + 1
    logits = hidden[positions] @ weight[items].transpose(1, 2)
    logits = logits.masked_fill(items[:, None, :] == target[positions][:, :, None], -math.inf)
    own = (hidden * weight[target]).sum(1)[positions]
    logits = torch.cat([logits, own[:, :, None]], dim=2).flatten(0, 1)
    last = torch.full((len(logits),), size_y, device=logits.device)
    loss = F.cross_entropy(logits, last, reduction="none")
    largest = loss.new_zeros(len(hidden)).scatter_reduce(0, positions.flatten(), loss, "amax", include_self=False)
    return largest[largest != 0].mean()


def attention(query, key, value, lengths, keep=None, dropout_p=0.0):
    """All weights of all positions [P, P]; `keep` [H, P, P]: which ones dropout keeps."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(query.device)
    mask = (row[:, None] == row) & torch.ones_like(row[:, None] == row).tril()
    logits = torch.einsum("mhd,nhd->hmn", query, key) / math.sqrt(query.size(-1))
    weights = logits.masked_fill(~mask, -math.inf).softmax(-1)
    if keep is not None:
        weights = torch.where(keep, weights / (1 - dropout_p), 0)
    return torch.einsum("hmn,nhd->mhd", weights, value)
