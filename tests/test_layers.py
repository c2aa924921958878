"""The encoder against RecBole's own, module and mask, in fp64."""

from __future__ import annotations

import pytest
import torch
from recbole.model.layers import TransformerEncoder

from recbole_cce.layers import encode

ATTENTION = ["auto", "sdpa", "packed", "recbole"]


def encoder(n_heads=2, hidden_act="gelu", **dropout):
    dropout = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, **dropout}
    torch.manual_seed(0)
    return TransformerEncoder(2, n_heads, 8, 16, hidden_act=hidden_act, **dropout).double()


def batch(length):
    """Embedded rows, and where they are real: of every length, the full one among them."""
    lengths = torch.cat([torch.arange(1, length + 1), torch.tensor([length])])
    embedded = torch.randn(len(lengths), length, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    return embedded, torch.arange(length) < lengths[:, None]


def stock(module, embedded, valid):
    """As SequentialRecommender.get_attention_mask: a query sees the real positions up to its own."""
    length = valid.size(1)
    mask = torch.zeros(len(valid), 1, length, length, dtype=torch.double)
    for row in range(len(valid)):
        for query in range(length):
            for key in range(length):
                mask[row, 0, query, key] = 0.0 if key <= query and valid[row, key] else -10000.0
    return module(embedded, mask)[-1]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("n_heads", [1, 2, 8])
def test_equals_recbole_at_real_positions(attention, length, n_heads):
    module, (embedded, valid) = encoder(n_heads), batch(length)
    grads = []
    for run in (stock, lambda *args: encode(*args, attention)):
        module.zero_grad()
        leaf = embedded.clone().requires_grad_()
        hidden = run(module, leaf, valid)[valid]
        hidden.sin().sum().backward()
        grads.append([hidden.detach(), leaf.grad[valid], *[p.grad.clone() for p in module.parameters()]])
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("hidden_act", ["relu", "swish", "tanh", "sigmoid"])
def test_activations(attention, hidden_act):
    module, (embedded, valid) = encoder(hidden_act=hidden_act), batch(5)
    torch.testing.assert_close(encode(module, embedded, valid, attention)[valid], stock(module, embedded, valid)[valid])


@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_changes_nothing(attention):
    module, (embedded, valid) = encoder(), batch(6)
    changed = torch.where(valid[:, :, None], embedded, 1e3)
    one, two = (encode(module, rows, valid, attention) for rows in (embedded, changed))
    assert torch.equal(one[valid], two[valid])
    if attention == "packed":
        assert (one[~valid] == 0).all()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attn_dropout_prob"])
def test_dropout_in_training_only(attention, where):
    """Twice the same in evaluation, and other numbers in training."""
    module, (embedded, valid) = encoder(**{where: 0.5}), batch(6)
    module.eval()
    kept = encode(module, embedded, valid, attention)[valid]
    assert torch.equal(kept, encode(module, embedded, valid, attention)[valid])
    module.train()
    dropped = encode(module, embedded, valid, attention)[valid]
    assert (dropped - kept).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "packed"])
def test_attention_dropout_has_the_mean_and_variance_of_recbole(attention):
    """One layer's attention, without the norm after it, over many draws."""
    module, (embedded, valid) = encoder(attn_dropout_prob=0.3), batch(5)
    block = module.layer[0].multi_head_attention
    block.LayerNorm = torch.nn.Identity()
    after = module.layer[0].feed_forward  # made to pass on what it gets
    after.LayerNorm = torch.nn.Identity()
    after.dense_2.requires_grad_(False)
    after.dense_2.weight.zero_(), after.dense_2.bias.zero_()
    module.layer = module.layer[:1]
    rows = 4000
    embedded, valid = embedded[-1:].expand(rows, -1, -1), valid[-1:].expand(rows, -1)
    torch.manual_seed(0)
    ours = encode(module, embedded, valid, attention)
    theirs = encode(module, embedded, valid, "recbole")
    spread = theirs.std(0) + ours.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * spread / rows**0.5 + 1e-9).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.1, atol=1e-9)
