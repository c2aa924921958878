"""The Philox stream and the samplers inside kernels: Triton's stream, and bit for bit the same draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_cce.ops import Popularity, Uniform, negatives
from tests.ops.test_negatives import boundaries

triton = pytest.importorskip("triton", "3.4")  # before, tl.randint draws another stream; the kernels spell this one out
tl = triton.language

from recbole_cce.ops.triton.negatives import choose, draw_rows  # noqa: E402

SEEDS = [0, 7, 2**31 + 5, 2**40 + 7, 2**62 - 1]
OFFSETS = [0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**32 + 3, 2**45 + 11]
COUNTS = np.arange(700) % 50 + 1


@triton.jit
def stream_kernel(seed_ptr, offset_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    seed = tl.load(seed_ptr)
    offset = tl.load(offset_ptr + i)
    words = tl.randint4x(seed, offset)
    for word in tl.static_range(4):
        tl.store(out_ptr + word * N + i, words[word].to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(out_ptr + 4 * N + i, tl.randint(seed, offset).to(tl.uint32, bitcast=True).to(tl.int64))


@triton.jit
def draw_kernel(seed_ptr, offset_ptr, table_ptr, out_ptr, num_items, N: tl.constexpr, POPULARITY: tl.constexpr):
    i = tl.arange(0, N)
    rows = draw_rows(tl.load(seed_ptr), tl.load(offset_ptr + i), table_ptr, num_items, 3, POPULARITY)
    tl.store(out_ptr + i, rows)


@triton.jit
def choose_kernel(word_ptr, out_ptr, size, n, N: tl.constexpr):
    i = tl.arange(0, N)
    words = [tl.load(word_ptr + k * n + i, mask=i < n, other=0).to(tl.uint32) for k in tl.static_range(2)]
    tl.store(out_ptr + i, choose(words[0], words[1], size), mask=i < n)


def check_stream(seed):
    """tl.randint4x and tl.randint with 64-bit offsets."""
    offsets = torch.tensor(OFFSETS)
    out = torch.zeros(5, len(offsets), dtype=torch.int64)
    stream_kernel[(1,)](torch.tensor([seed]), offsets, out, len(offsets))
    words = negatives.philox(seed, offsets)
    assert out.tolist() == [word.tolist() for word in (*words, words[0])]


def check_draws(seed, popularity):
    offsets = torch.tensor(OFFSETS)
    sampler, size = (Popularity(COUNTS), len(COUNTS)) if popularity else (Uniform(), 10**8)
    rows = torch.zeros(len(offsets), dtype=torch.int64)
    table = sampler.table if popularity else None
    draw_kernel[(1,)](torch.tensor([seed]), offsets, table, rows, size, len(offsets), popularity)
    drawn = sampler.draw(*negatives.random_words(seed, offsets), size)
    assert rows.tolist() == negatives.to_rows(drawn, 3).tolist()


def check_choice():
    numbers, items = boundaries(10**8)
    words = torch.tensor([[number >> 32 for number in numbers], [number & 0xFFFFFFFF for number in numbers]])
    chosen = torch.zeros(len(numbers), dtype=torch.int64)
    choose_kernel[(1,)](words, chosen, 10**8, len(numbers), 512)
    assert chosen.tolist() == items


@pytest.mark.parametrize("seed", SEEDS)
def test_the_stream_is_that_of_triton(interpreter, seed):
    interpreter(check_stream, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("popularity", [False, True], ids=["uniform", "popularity"])
def test_kernels_draw_the_same_rows(interpreter, popularity, seed):
    interpreter(check_draws, seed, popularity)


def test_kernels_choose_by_64_bits(interpreter):
    interpreter(check_choice)
