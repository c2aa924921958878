"""Negative items: the Philox stream they are drawn from, samplers, and who shares a draw.

Negatives are never stored. Draw k of group g is a pure function of (seed, g * K + k), so that a backward pass, another
backend or another device draws the same ones again. The stream is that of Triton's tl.randint4x (Philox4x32-10, Salmon
et al., SC 2011): the counter's 64 bits in the first two words, the seed's in the key.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

SHARINGS = ("tile", "none", "batch")
TILE = 128  # positions that share one draw of K negatives with sharing="tile"

_MASK = 0xFFFFFFFF


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[Any, Any], rounds: int = 10
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32: four words of counter and two of key (int64 in [0, 2^32)) -> four random words, likewise.

    Products of two words wrap: their 64 bits are right, their sign is not. Only what is multiplied or returned is cut
    to 32 bits, for higher ones do not reach lower ones.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((product2 >> 32) ^ c1 ^ k0) & _MASK, ((product0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = product2, product0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1 & _MASK, c2, c3 & _MASK


def philox(
    seed: int | torch.Tensor, counter: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four words of tl.randint4x(seed, counter): int64 tensors in [0, 2^32), shaped as `counter` (int64).

    `seed`: an integer or a 0-d int64 tensor, which is never brought to the host.
    """
    zero = torch.zeros_like(counter)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    return philox4x32((counter & _MASK, (counter >> 32) & _MASK, zero, zero), key)


def random_words(seed: int | torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three words that a draw takes, the first three of philox(seed, offset): 64 bits that choose one of V, the
    higher ones first, and 32 that choose between an item and its alias."""
    return philox(seed, offset)[:3]


def choose(word0: torch.Tensor, word1: torch.Tensor, size: int) -> torch.Tensor:
    """64 random bits, word0 the higher ones -> integers in [0, size), size < 2^31: the high word of their product.

    Each has probability 1 / size to a relative size / 2^64. One word alone would give size / 2^32: 2% at 10^8 items.
    """
    return (word0 * size + ((word1 * size) >> 32)) >> 32


def new_seed(device: torch.device) -> torch.Tensor:
    """A seed from the device's default generator (torch.manual_seed governs it), as a tensor: no wait for the GPU."""
    return torch.randint(0, 2**62, (), device=device)


def make_seed(seed: int | torch.Tensor | None, device: torch.device) -> int | torch.Tensor:
    """A seed that was given, or a new one.

    Raises:
        ValueError: no integer of 64 bits and no such tensor on `device`.
    """
    if seed is None:
        return new_seed(device)
    if isinstance(seed, torch.Tensor):
        if seed.shape != () or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(
                f"seed: a tensor of shape {tuple(seed.shape)}, {seed.dtype}, on {seed.device} is not valid; it takes a "
                f"0-d torch.int64 tensor on {device}"
            )
    elif not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: {seed!r} is not valid; it takes an integer of 64 bits or a 0-d int64 tensor")
    return seed


class Uniform(nn.Module):
    """q(item) = 1 / V."""

    def draw(self, word0: torch.Tensor, word1: torch.Tensor, word2: torch.Tensor, num_items: int) -> torch.Tensor:
        """Random words -> items in [0, V): two of them choose one, see choose()."""
        return choose(word0, word1, num_items)

    def log_q(self, items: torch.Tensor, num_items: int) -> torch.Tensor:
        """log q of items in [0, V), fp32."""
        return torch.full(items.shape, -math.log(num_items), dtype=torch.float32, device=items.device)


class Popularity(nn.Module):
    """q(item) proportional to count^alpha; every item counts at least once.

    Drawn with an alias table (Walker 1977): 8 bytes an item, three words a draw, exact to 2^-32 of a column. Buffers
    are no part of the state dict: they follow from the training data.

    Args:
        counts: [V] training counts of the items, without the padding row.
        alpha: power; 0 is uniform.

    Raises:
        ValueError: counts that are not one-dimensional, empty or negative; alpha that is negative or not finite.
    """

    table: torch.Tensor
    log_probability: torch.Tensor

    def __init__(self, counts: torch.Tensor | np.ndarray, alpha: float = 1.0) -> None:
        super().__init__()
        if isinstance(counts, torch.Tensor):
            counts = counts.detach().cpu().numpy()
        weights = np.asarray(counts, dtype=np.float64)
        if weights.ndim != 1 or len(weights) == 0 or not ((weights >= 0) & np.isfinite(weights)).all():
            raise ValueError(f"counts: has shape {weights.shape}; it takes [V] finite numbers >= 0, V >= 1")
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha: {alpha!r} is not valid; it takes a finite number >= 0")
        log_q = alpha * np.log(np.maximum(weights, 1.0))  # in logarithms: counts to a large power overflow
        log_q -= np.logaddexp.reduce(log_q)
        self.register_buffer("table", torch.from_numpy(alias_table(np.exp(log_q))), persistent=False)
        self.register_buffer("log_probability", torch.from_numpy(log_q.astype(np.float32)), persistent=False)

    def draw(self, word0: torch.Tensor, word1: torch.Tensor, word2: torch.Tensor, num_items: int) -> torch.Tensor:
        """Random words -> items in [0, V): two of them choose a column, see choose(), word2 its item or its alias."""
        self._check(num_items)
        column = choose(word0, word1, num_items)
        entry = self.table[column].long()
        keep = word2 < (entry[..., 0] & _MASK)
        return torch.where(keep, column, entry[..., 1])

    def log_q(self, items: torch.Tensor, num_items: int) -> torch.Tensor:
        """log q of items in [0, V), fp32."""
        self._check(num_items)
        return self.log_probability[items]

    def _check(self, num_items: int) -> None:
        if len(self.table) != num_items:
            raise ValueError(f"sampler: has counts of {len(self.table)} items, weight has {num_items}")


def alias_table(q: np.ndarray) -> np.ndarray:
    """Alias table of probabilities q [V] -> int32 [V, 2]: the bits of a uint32 threshold, and the alias.

    Column i gives i if a random word is less than its threshold, else its alias. A sweep without a loop, in whole
    units of 2^-32 of a column, so that the table holds exactly what q is rounded to: the columns below a fair share
    have gaps and the others surpluses, and both sums are equal. In order, each gap is filled by the large column
    whose surplus is being spent when the gap starts. A large column that so falls below its own share is filled by
    the next large one. V = 10^7 takes seconds.
    """
    fair = 2**32
    share = np.maximum(np.rint(q / q.sum() * (len(q) * float(fair))).astype(np.int64), 1)
    large = np.flatnonzero(share >= fair)
    if len(large) == 0:
        large = np.array([share.argmax()])
    # rounding left the sum up to V units off: spread that over the large columns, where it matters least
    missing, rest = divmod(len(q) * fair - int(share.sum()), len(large))
    share[large] += missing
    share[large[:rest]] += 1

    small, large = np.flatnonzero(share < fair), np.flatnonzero(share >= fair)
    threshold, alias = np.zeros(len(q), dtype=np.int64), np.arange(len(q))  # a full column is its own alias
    gap_end, surplus_end = np.cumsum(fair - share[small]), np.cumsum(share[large] - fair)
    gap_start = gap_end - (fair - share[small])
    threshold[small], alias[small] = share[small], large[np.searchsorted(surplus_end, gap_start, side="right")]
    # where a surplus ends inside a gap, the column has given what lies between there and the end of the gap too much
    gap = np.searchsorted(gap_end, surplus_end, side="right")
    overdrawn = np.flatnonzero(gap < len(small))
    overdrawn = overdrawn[gap_start[gap[overdrawn]] < surplus_end[overdrawn]]
    threshold[large[overdrawn]] = fair - (gap_end[gap[overdrawn]] - surplus_end[overdrawn])
    alias[large[overdrawn]] = large[overdrawn + 1]
    return np.stack([threshold.astype(np.uint32).view(np.int32), alias.astype(np.int32)], axis=1)


def num_groups(n: int, sharing: str) -> int:
    """How many draws of K negatives n positions share. Position i uses draw i mod G.

    So a tile of sharing="tile" holds the positions t, t + G, t + 2G, ...: neighbours, which belong to one user and
    whose joint negatives cost quality, are never in one tile.

    Raises:
        ValueError: `sharing` is none of tile, none, batch.
    """
    if sharing not in SHARINGS:
        raise ValueError(f"sharing: {sharing!r} is not valid; it takes one of {', '.join(SHARINGS)}")
    return max(1, {"none": n, "tile": -(-n // TILE), "batch": 1}[sharing])


def draw_negatives(
    sampler: Uniform | Popularity,
    seed: int | torch.Tensor,
    groups: torch.Tensor,
    num_negatives: int,
    num_rows: int,
    padding_idx: int | None,
) -> torch.Tensor:
    """Rows of the item table that groups draw.

    Args:
        sampler: Uniform or Popularity.
        seed: integer or 0-d int64 tensor.
        groups: [G] int64 group numbers.
        num_negatives: K.
        num_rows: rows of the item table, padding included.
        padding_idx: the row that is no item, or None.

    Returns:
        [G, K] int64 rows, never `padding_idx`.
    """
    draws = torch.arange(num_negatives, device=groups.device)
    num_items = num_rows - (padding_idx is not None)
    words = random_words(seed, groups[:, None] * num_negatives + draws)
    return to_rows(sampler.draw(*words, num_items), padding_idx)


def to_rows(items: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
    """Items in [0, V) -> rows of the table, which has the padding row among them."""
    return items if padding_idx is None else items + (items >= padding_idx).long()


def to_items(rows: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
    """Undo to_rows."""
    return rows if padding_idx is None else rows - (rows > padding_idx).long()
