"""What users had before, against plain Python."""

import torch

from recbole_cce.nn.history import UserHistories, listed


def naive(items):
    """{item: age} of a history, oldest item first."""
    return {item: len(items) - place for place, item in enumerate(items)}


def pairs(history, rows):
    found = [{} for _ in range(rows)]
    for row, item, age in zip(*(part.tolist() for part in history), strict=True):
        assert item not in found[row], "each item once"
        found[row][item] = age
    return found


def test_histories_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    users = torch.repeat_interleave(torch.arange(1, 40), torch.randint(1, 30, (39,), generator=generator))
    items = torch.randint(1, 9, (len(users),), generator=generator)
    end = torch.randint(1, len(users) + 1, (200,), generator=generator)  # also one past a user's last
    expected = []
    for stop in end.tolist():
        first = int((users == users[stop - 1]).nonzero()[0])
        expected.append(naive(items[first:stop].tolist()))
    assert pairs(UserHistories(users, items).before(end), len(end)) == expected


def test_lists_are_histories():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 13, (50,), generator=generator)
    items = torch.randint(1, 6, (50, 12), generator=generator).masked_fill_(torch.arange(12) >= lengths[:, None], 0)
    expected = [naive(row[:length].tolist()) for row, length in zip(items, lengths, strict=True)]
    assert pairs(listed(items, lengths), 50) == expected


def test_rows_of_nothing():
    history = listed(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    assert [len(part) for part in history] == [0, 0, 0]
