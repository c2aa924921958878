"""The Philox stream against published vectors and Triton, the samplers against their distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from recbole_cce.ops import Popularity, Uniform, negatives

ONES = 0xFFFFFFFF
KNOWN = [  # Random123, kat_vectors, philox4x32 10 rounds: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = negatives.philox4x32(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(word.item() for word in words) == expected


def boundaries(size):
    """Pairs of the last 64-bit number that `size` equal parts of all of them give to item i - 1, and the first of i."""
    items = [
        1,
        2,
        3,
        size // 3,
        size // 2,
        size - 2,
        size - 1,
        *np.random.default_rng(0).integers(1, size, 200).tolist(),
    ]
    first = [-(-(item << 64) // size) for item in items]
    return [x for number in first for x in (number - 1, number)], [x for item in items for x in (item - 1, item)]


@pytest.mark.parametrize("size", [1000, 10**7, 10**8, 2**31 - 1])
def test_every_item_has_its_share_of_64_bits(size):
    """64 bits make 2^64 / size draws of each, one more or less: where each item begins, in integers."""
    numbers, items = boundaries(size)
    words = [torch.tensor([number >> shift & ONES for number in numbers]) for shift in (32, 0)]
    assert negatives.choose(*words, size).tolist() == items
    assert Uniform().draw(*words, None, size).tolist() == items


def test_a_popularity_draw_takes_its_coin_from_a_word_of_its_own():
    """Words that begin a column of a table, with the last word that keeps its item and the first one that does not."""
    counts = np.random.default_rng(0).zipf(1.5, 1000).clip(max=10**6)
    sampler = Popularity(counts)
    threshold, alias = sampler.table[:, 0].numpy().view(np.uint32).astype(np.int64), sampler.table[:, 1]
    column = torch.arange(1000)[torch.from_numpy(threshold) > 0]
    first = [-(-(number << 64) // 1000) for number in column.tolist()]
    words = [torch.tensor([number >> shift & ONES for number in first]) for shift in (32, 0)]
    coin = torch.from_numpy(threshold)[column]
    assert torch.equal(sampler.draw(*words, coin - 1, 1000), column)
    assert torch.equal(sampler.draw(*words, coin, 1000), alias[column].long())


def test_seed_may_be_a_tensor():
    offset = torch.arange(100)
    for one, two in zip(
        negatives.random_words(2**40 + 7, offset),
        negatives.random_words(torch.tensor(2**40 + 7), offset),
        strict=True,
    ):
        assert torch.equal(one, two)


def draw(sampler, v, padding_idx=0, n=200_000, seed=11):
    rows = v + (padding_idx is not None)
    groups = torch.arange(n // 100)
    return negatives.draw_negatives(sampler, seed, groups, 100, rows, padding_idx).flatten().numpy()


@pytest.mark.parametrize("v", [1, 2, 97, 1000])
def test_uniform_is_uniform(v):
    drawn = draw(Uniform(), v)
    assert drawn.min() >= 1 and drawn.max() <= v
    assert chisquare(np.bincount(drawn, minlength=v + 1)[1:]).pvalue > 1e-4 or v == 1


@pytest.mark.parametrize("alpha", [0.5, 1.0, 0.0])
def test_popularity_follows_the_counts(alpha):
    counts = np.random.default_rng(0).zipf(1.5, 500).clip(max=5000)
    counts[::10] = 0
    q = np.maximum(counts, 1.0) ** alpha
    q /= q.sum()
    drawn = draw(Popularity(counts, alpha), 500)
    assert chisquare(np.bincount(drawn, minlength=501)[1:], q * len(drawn)).pvalue > 1e-4
    sampler = Popularity(torch.from_numpy(counts), alpha)
    np.testing.assert_allclose(sampler.log_q(torch.arange(500), 500).double(), np.log(q), rtol=1e-6)


@pytest.mark.parametrize("padding_idx", [0, 3, 10, None])
def test_the_padding_row_is_never_drawn(padding_idx):
    v = 11 - (padding_idx is not None)
    drawn = draw(Uniform(), v, padding_idx)
    assert set(drawn) == set(range(11)) - {padding_idx}
    rows = torch.arange(11)[torch.arange(11) != (-1 if padding_idx is None else padding_idx)]
    assert torch.equal(negatives.to_items(rows, padding_idx), torch.arange(v))
    assert torch.equal(negatives.to_rows(torch.arange(v), padding_idx), rows)


@pytest.mark.parametrize("kind", ["pareto", "equal", "one large", "one small", "two", "single"])
def test_alias_table_gives_back_the_probabilities(kind):
    q = {
        "pareto": np.random.default_rng(0).pareto(0.8, 20_000) + 1e-3,
        "equal": np.ones(1000),
        "one large": np.r_[np.ones(999), 1e6],
        "one small": np.r_[np.ones(999), 1e-6],
        "two": np.array([0.9, 0.1]),
        "single": np.ones(1),
    }[kind]
    q = q / q.sum()
    table = negatives.alias_table(q)
    assert table.dtype == np.int32 and table.shape == (len(q), 2)
    alias, keep = table[:, 1], table[:, 0].view(np.uint32) / 2.0**32
    mass = np.zeros(len(q))
    np.add.at(mass, np.arange(len(q)), keep / len(q))
    np.add.at(mass, alias, (1 - keep) / len(q))
    np.testing.assert_allclose(mass, q, atol=2.0**-30 / len(q) * max(1, len(q) * q.max()))


def test_tables_are_no_part_of_the_state():
    assert not Popularity(torch.ones(5)).state_dict()


@pytest.mark.parametrize(
    ("counts", "alpha", "message"),
    [
        (torch.ones(2, 2), 1.0, r"counts: has shape \(2, 2\)"),
        (torch.tensor([1, -1]), 1.0, "counts: "),
        (torch.ones(0), 1.0, r"counts: has shape \(0,\)"),
        (torch.ones(2), -1.0, "alpha: -1.0"),
        (torch.ones(2), math.inf, "alpha: inf"),
    ],
)
def test_wrong_popularity(counts, alpha, message):
    with pytest.raises(ValueError, match=message):
        Popularity(counts, alpha)


@pytest.mark.parametrize("popularity", [False, True])
def test_the_estimate_of_the_partition_sum_is_unbiased(popularity):
    """Mean over seeds of sum exp(s - log(K q)), without the target, against the exact sum over the other items."""
    v, k, trials = 40, 16, 4000
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(v + 1, generator=generator, dtype=torch.double)
    target = 5
    sampler = Popularity(torch.arange(v)) if popularity else Uniform()
    drawn = negatives.draw_negatives(sampler, 3, torch.arange(trials), k, v + 1, 0)
    estimate = (scores[drawn] - sampler.log_q(drawn - 1, v) - math.log(k)).exp()
    estimate = torch.where(drawn == target, 0, estimate).sum(1)
    exact = scores[1:].exp().sum() - scores[target].exp()
    assert abs(estimate.mean() - exact) < 4 * estimate.std() / trials**0.5


@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000])
def test_tiles_spread_neighbours(n):
    groups = negatives.num_groups(n, "tile")
    tile = torch.arange(n) % groups
    assert torch.bincount(tile).max() <= negatives.TILE
    assert groups == 1 or (tile[1:] != tile[:-1]).all()
    assert negatives.num_groups(n, "none") == n and negatives.num_groups(n, "batch") == 1


def test_draws_do_not_depend_on_the_chunk():
    whole = negatives.draw_negatives(Uniform(), 5, torch.arange(6), 20, 30, 0)
    part = negatives.draw_negatives(Uniform(), 5, torch.arange(2, 4), 20, 30, 0)
    assert torch.equal(part, whole[2:4])
