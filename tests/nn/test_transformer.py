"""The encoder against RecBole's own, module and mask, in fp64."""

from __future__ import annotations

import contextlib
import copy
import itertools
from unittest import mock

import pytest
import torch
from recbole.model.layers import TransformerEncoder
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_cce.nn import attention as attention_module
from recbole_cce.nn import transformer
from recbole_cce.nn.packing import pack, unpack
from recbole_cce.nn.transformer import encode

ATTENTION = ["auto", "sdpa", "packed", "recbole"]


def encoder(n_heads=2, hidden_act="gelu", width=8, **dropout):
    dropout = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, **dropout}
    torch.manual_seed(0)
    return TransformerEncoder(2, n_heads, width, 16, hidden_act=hidden_act, **dropout).double()


def batch(length, width=8):
    """Embedded rows, and where they are real: of every length, the full one among them."""
    lengths = torch.cat([torch.arange(1, length + 1), torch.tensor([length])])
    embedded = torch.randn(len(lengths), length, width, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    return embedded, torch.arange(length) < lengths[:, None]


@contextlib.contextmanager
def kernels():
    """Names of the ops that are called."""

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.found.add(function.name())
            return function(*args, **(kwargs or {}))

    with Names() as names:
        yield names.found


def run(module, embedded, valid, attention, left_over=0):
    """encode(), packed ones put back to their places."""
    if attention != "packed":
        return encode(module, embedded, valid, attention)
    packing = pack(valid.sum(1), valid.size(1), int(valid.sum()) + left_over)
    filler = embedded.new_full((1, embedded.size(-1)), 7.0)
    packed = torch.cat([embedded.flatten(0, 1), filler])[packing.source]
    return unpack(encode(module, packed, packing), packing)


def stock(module, embedded, valid):
    """As SequentialRecommender.get_attention_mask: a query sees the real positions up to its own."""
    length = valid.size(1)
    mask = torch.zeros(len(valid), 1, length, length, dtype=torch.double)
    for row in range(len(valid)):
        for query in range(length):
            for key in range(length):
                mask[row, 0, query, key] = 0.0 if key <= query and valid[row, key] else -10000.0
    return module(embedded, mask)[-1]


def assert_same_as_recbole(module, embedded, valid, function, rtol, atol):
    """Hidden states at real positions and all gradients."""
    results = []
    for encoded in (stock, function):
        module.zero_grad()
        leaf = embedded.clone().requires_grad_()
        hidden = encoded(module, leaf, valid)[valid]
        hidden.sin().sum().backward()
        results.append([hidden.detach(), leaf.grad[valid], *[p.grad.clone() for p in module.parameters()]])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("n_heads", [1, 2, 8])
def test_equals_recbole_at_real_positions(attention, length, n_heads):
    module, (embedded, valid) = encoder(n_heads), batch(length)
    assert_same_as_recbole(module, embedded, valid, lambda *args: run(*args, attention), 1e-9, 1e-11)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("hidden_act", ["relu", "swish", "tanh", "sigmoid"])
def test_activations(attention, hidden_act):
    module, (embedded, valid) = encoder(hidden_act=hidden_act), batch(5)
    torch.testing.assert_close(run(module, embedded, valid, attention)[valid], stock(module, embedded, valid)[valid])


@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_changes_nothing(attention):
    module, (embedded, valid) = encoder(), batch(6)
    changed = torch.where(valid[:, :, None], embedded, 1e3)
    one, two = (run(module, rows, valid, attention) for rows in (embedded, changed))
    assert torch.equal(one[valid], two[valid])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attn_dropout_prob"])
def test_dropout_in_training_only(attention, where):
    """Twice the same in evaluation, and other numbers in training."""
    module, (embedded, valid) = encoder(**{where: 0.5}), batch(6)
    module.eval()
    kept = run(module, embedded, valid, attention)[valid]
    assert torch.equal(kept, run(module, embedded, valid, attention)[valid])
    module.train()
    dropped = run(module, embedded, valid, attention)[valid]
    assert (dropped - kept).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "packed"])
def test_attention_dropout_has_the_mean_and_variance_of_recbole(attention):
    """One layer's attention, without the norm after it, over many draws."""
    module, (embedded, valid) = encoder(attn_dropout_prob=0.3), batch(5)
    block = module.layer[0].multi_head_attention
    no_norm = torch.nn.Identity()
    no_norm.weight = block.LayerNorm.weight  # of the dtype to compute in
    block.LayerNorm = no_norm
    after = module.layer[0].feed_forward  # made to pass on what it gets
    after.LayerNorm = no_norm
    after.dense_2.requires_grad_(False)
    after.dense_2.weight.zero_(), after.dense_2.bias.zero_()
    module.layer = module.layer[:1]
    rows = 4000
    embedded, valid = embedded[-1:].expand(rows, -1, -1), valid[-1:].expand(rows, -1)
    torch.manual_seed(0)
    ours = run(module, embedded, valid, attention)
    theirs = run(module, embedded, valid, "recbole")
    spread = theirs.std(0) + ours.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * spread / rows**0.5 + 1e-9).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.1, atol=1e-9)


# Packed


@pytest.mark.parametrize("left_over", [0, 1, 5, 12, 40])
def test_packing(left_over):
    """Places, bounds of sequences and what is left over, of rows among which some are empty."""
    lengths, width = [3, 0, 5, 1, 0], 5
    packing = pack(torch.tensor(lengths), width, 9 + left_over)
    nowhere = [5 * width] * left_over
    assert packing.source.tolist() == [0, 1, 2, 10, 11, 12, 13, 14, 15, *nowhere]
    assert packing.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, *[place % width for place in range(left_over)]]
    assert packing.starts.tolist() == [0, 3, 3, 8, 9]
    bounds = packing.bounds.tolist()
    assert bounds[:6] == [0, 3, 3, 8, 9, 9] and bounds[-1] == 9 + left_over
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    assert min(sizes) == 0 and max(sizes) <= width
    assert packing.bounds.dtype == packing.spans.dtype == torch.int32
    spans = [[start, end] for start, end in itertools.pairwise(bounds) for _ in range(start, end)]
    assert packing.spans.tolist() == spans


def by_sequence(query, key, value, bounds, bounds_k, longest, longest_k, **causal):
    """torch's varlen_attn, one sequence at a time."""
    assert causal == attention_module.CAUSAL and longest == longest_k and torch.equal(bounds, bounds_k)
    sizes = bounds.diff().tolist()
    assert sum(sizes) == len(query) and max(sizes) <= longest
    parts = zip(*(part.split(sizes) for part in (query, key, value)), strict=True)
    contexts = [attention_module.padded_attention(*(part[None] for part in parts_of), 0.0)[0] for parts_of in parts]
    return torch.cat(contexts)


needs_varlen = pytest.mark.skipif(not attention_module.has_varlen(), reason="torch has no varlen_attn")
OPS = {"own": "recbole_cce::packed_attention", "varlen": "torch_attn::_varlen_attn"}


@pytest.mark.parametrize("left_over", [0, 20])
@pytest.mark.parametrize("op", ["own", pytest.param("varlen", marks=needs_varlen)])
def test_attention_over_sequences_of_their_own_lengths(op, left_over, monkeypatch):
    """What is passed to the ops, which run on GPUs: ours in plain torch, torch's one sequence at a time."""
    monkeypatch.setattr(transformer, "takes_kernels", lambda *_: op == "own")
    monkeypatch.setattr(transformer, "takes_variable_lengths", lambda query, dropout: op == "varlen")
    monkeypatch.setattr(attention_module, "varlen_attn", by_sequence)
    module, (embedded, valid) = encoder(), batch(7)
    assert_same_as_recbole(module, embedded, valid, lambda *args: run(*args, "packed", left_over), 1e-9, 1e-11)


@pytest.mark.cuda
@pytest.mark.parametrize("left_over", [0, 20])
@pytest.mark.parametrize("length", [1, 50, 200])
@pytest.mark.parametrize("n_heads", [1, 4])
@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        *(("own", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *(pytest.param("varlen", dtype, marks=needs_varlen) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_packed_errs_no_more_than_padded(op, dtype, n_heads, length, left_over, monkeypatch):
    """Against fp64 on padded rows; outputs and gradients."""
    monkeypatch.setattr(attention_module, "KERNEL_WIDTH", dict.fromkeys((2, 4), 200 if op == "own" else 0))
    module, (embedded, valid) = encoder(n_heads, width=64), batch(length, width=64)
    results = []
    for attention, low in (("sdpa", False), ("sdpa", True), ("packed", True)):
        leaf = embedded.cuda().to(torch.float32 if low else torch.float64).requires_grad_()
        copied = copy.deepcopy(module).to(leaf)
        autocast = torch.autocast("cuda", dtype=dtype, enabled=low and dtype.itemsize == 2)
        with autocast, kernels() as used:
            hidden = run(copied, leaf, valid.cuda(), attention, left_over if attention == "packed" else 0)[valid.cuda()]
        assert {name for name in OPS.values() if name in used} == ({OPS[op]} if attention == "packed" else set())
        hidden.sin().sum().backward()
        # the key's bias adds the same to all logits of a query: its gradient is all rounding
        gradients = [p.grad for name, p in copied.named_parameters() if not name.endswith("key.bias")]
        results.append([hidden.detach(), leaf.grad[valid.cuda()], *gradients])
    for truth, padded, packed in zip(*results, strict=True):
        scale = truth.norm()
        assert (packed - truth).norm() <= 1.5 * (padded - truth).norm() + 1e-5 * scale


@pytest.mark.cuda
@needs_varlen
@pytest.mark.parametrize(("length", "op"), [(20, "own"), (100, "own"), (101, "varlen")])
def test_short_rows_take_our_kernels(length, op):
    module, (embedded, valid) = encoder(width=64), batch(length, width=64)
    with torch.autocast("cuda", dtype=torch.bfloat16), kernels() as used:
        run(module.float().cuda(), embedded.float().cuda(), valid.cuda(), "packed")
    assert {name for name in OPS.values() if name in used} == {OPS[op]}


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("settings", "own"),
    [({"dropout": 0.5}, True), ({"width": 40}, True), ({"width": 12}, False), ({"dtype": torch.float32}, False)],
    ids=str,
)
def test_packed_where_varlen_attn_does_not_go(settings, own):
    """Long rows with dropout and with heads of no multiple of 8 take our kernels; those of less than 8 columns and fp32
    are padded."""
    width, dropout = settings.get("width", 64), settings.get("dropout", 0.0)
    module, (embedded, valid) = encoder(width=width, attn_dropout_prob=dropout), batch(101, width=width)
    enabled = "dtype" not in settings
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled), kernels() as used:
        hidden = run(module.float().cuda(), embedded.float().cuda(), valid.cuda(), "packed")[valid.cuda()]
    assert OPS["varlen"] not in used and (OPS["own"] in used) == own and hidden.isfinite().all()


@needs_varlen
@pytest.mark.parametrize(("capability", "takes"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attention_needs_ampere(dtype, capability, takes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = mock.Mock(is_cuda=True, dtype=dtype, device=torch.device("cuda:0"), size=lambda dim: 32)
    assert attention_module.takes_variable_lengths(query, 0.0) == takes
    assert takes or not attention_module.takes_kernels(query, 20, 0.0)


@pytest.mark.cuda
@pytest.mark.parametrize("attention", ["sdpa", "packed"])
def test_nothing_waits_for_the_gpu(attention):
    module, (embedded, valid) = encoder(width=64), batch(20, width=64)
    module, embedded, valid = module.float().cuda(), embedded.float().cuda(), valid.cuda()
    lengths, places = valid.sum(1), int(valid.sum())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            if attention == "packed":
                packing = pack(lengths, 20, places + 30)
                hidden = encode(module, embedded.flatten(0, 1)[:1].expand(places + 30, -1), packing)
            else:
                hidden = encode(module, embedded, valid)
        hidden.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
