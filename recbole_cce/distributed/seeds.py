"""Random numbers of several processes: no stream of one seed is that of another seed or of another process.

Neighbouring seeds are what people compare, so nothing is added to a seed: numpy's SeedSequence hashes it with the
number of the stream.
"""

from __future__ import annotations

import numpy as np

ORDER = 0  # the stream that the order of rows has; rank 0 draws from the seed itself, as a single process does


def of_rank(seed: int, rank: int) -> int:
    """What a process of a run with `seed` seeds its generators with: 32 bits."""
    return _of_stream(seed, rank) if rank else seed


def of_order(seed: int) -> int:
    """What all processes take the order of rows from, with the number of the epoch added: 32 bits."""
    return _of_stream(seed, ORDER)


def _of_stream(seed: int, number: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1)[0])
