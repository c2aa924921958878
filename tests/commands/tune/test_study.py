"""The proposals, on functions whose best place is known: found, interrupted, ended early, all tried."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from recbole_cce.commands.tune.space import Parameter
from recbole_cce.commands.tune.study import Study

RATE, KIND = Parameter("rate", low=1e-4, high=1.0, log=True), Parameter("kind", ("a", "b", "c"))
SIZE = Parameter("size", low=1, high=64, log=True, only=("kind", "b"))
DEFAULT = {"rate": 0.5, "kind": "a"}


def study(space=(RATE, KIND, SIZE), default=None, **options):
    options = {"seed": 1, "bigger": True, "first_rung": 2} | options
    return Study(Path("journal.log"), list(space), DEFAULT if default is None else default, **options)


def height(values):
    """1 at rate .01, kind b, size 8; less elsewhere."""
    off = (
        abs(math.log10(values["rate"] / 0.01))
        + (values["kind"] != "b")
        + abs(math.log2(values.get("size", 64) / 8)) / 3
    )
    return 1 - off / 4


def whole(one, function=height):
    """A trial that is trained to its end."""
    proposal = one.ask()
    values = one.values()[proposal.number]
    one.tell(proposal.number, function(values), True)
    return proposal.number, values


def test_the_defaults_come_first_and_the_best_is_found():
    one = study()
    found = dict(whole(one) for _ in range(60))
    assert found[0] == DEFAULT and list(found) == list(range(60))
    best = max(found.values(), key=height)
    assert height(best) > 0.85 > height(DEFAULT)
    assert all(("size" in values) == (values["kind"] == "b") for values in found.values())
    late = [height(found[number]) for number in range(40, 60)]
    assert sum(late) / 20 > sum(height(found[number]) for number in range(1, 11)) / 10 + 0.1  # it learns
    importances = one.importances({number: height(values) for number, values in found.items()})
    assert set(importances) == {"rate", "kind", "size"}
    assert sum(importances.values()) == pytest.approx(1)


def test_a_lower_value_may_be_the_better_one():
    one = study(bigger=False)
    found = dict(whole(one, lambda values: -height(values)) for _ in range(40))
    assert max(map(height, found.values())) > 0.8


def test_the_first_trial_has_settings_of_none():
    one = study()
    assert one.ask().settings == {}
    second = one.ask()
    assert second.settings == one.values()[1] != {}


def test_the_seed_decides():
    first = [whole(one)[1] for one in [study()] for _ in range(5)]
    Path("journal.log").unlink()
    assert [whole(one)[1] for one in [study()] for _ in range(5)] == first
    Path("journal.log").unlink()
    assert [whole(one)[1] for one in [study(seed=2)] for _ in range(5)][1:] != first[1:]


def test_after_an_interruption_no_trial_is_lost():
    """Those under way, at a kill in the middle of a line of the journal, come first, with the settings they had."""
    one = study()
    ended = dict(whole(one) for _ in range(4))
    under_way = [one.ask(), one.ask()]
    one.is_behind(under_way[0].number, 2, 0.5)
    one.spend(12.5)
    kept = one.values()
    with open("journal.log", "ab") as file:
        file.write(b'{"op_code": 6, "worker_id": "x", "tri')
    again = study()
    assert again.seconds == 12.5
    assert again.values() == kept
    assert [again.ask(), again.ask()] == under_way
    assert again.is_behind(under_way[0].number, 2, 0.5) is False  # reported before
    for proposal in under_way:
        again.tell(proposal.number, height(proposal.settings), True)
    number, values = whole(again)
    assert number == 6 and values not in [*ended.values(), *(each.settings for each in under_way)]
    assert study().values().keys() == set(range(7))  # every line can be read


def test_the_default_is_interrupted_too():
    assert study().ask() == study().ask()
    one = study()
    assert one.ask().number == 0
    one.tell(0, 0.1, True)


def test_default_outside_of_the_space():
    one = study(default={"rate": 5.0, "kind": "z"})
    found = dict(whole(one, lambda values: 0.0 if values["kind"] == "z" else height(values)) for _ in range(30))
    assert found[0] == {"rate": 5.0, "kind": "z"}
    assert all(RATE.contains(values["rate"]) for number, values in found.items() if number)


def curve(quality, epoch):
    return quality * (1 - 0.5**epoch)


def test_the_worse_half_ends_at_each_rung():
    """Trials of known quality, one after another, and each rung's survivors counted here."""
    one = study(first_rung=2)
    qualities = [0.5, *[(7 * place % 31) / 31 for place in range(1, 31)]]
    reached = {}
    for quality in qualities:
        number = one.ask().number
        for epoch in range(1, 17):
            if one.is_behind(number, epoch, curve(quality, epoch)):
                break
        reached[number] = epoch
        one.tell(number, curve(quality, epoch), epoch == 16)
    assert reached[0] == 16
    assert set(reached.values()) <= {2, 4, 8, 16}
    rungs = {rung: [number for number, epoch in reached.items() if epoch >= rung] for rung in (2, 4, 8, 16)}
    assert len(rungs[2]) == 31 > len(rungs[4]) > len(rungs[8]) >= len(rungs[16])
    assert len(rungs[4]) <= 20
    assert max(range(31), key=lambda number: qualities[number]) in rungs[16]
    for number in rungs[4]:  # each was in the better half of those before it
        if number >= 3:
            before = sorted([qualities[other] for other in range(number + 1)], reverse=True)
            assert before.index(qualities[number]) < max(1, len(before) // 2)


def test_the_defaults_are_never_ended_nor_are_others_among_a_few():
    one = study(first_rung=1)
    first, *others = (one.ask().number for _ in range(6))
    assert [one.is_behind(number, 1, value) for number, value in zip(others, (0.9, 0.1, 0.2), strict=False)] == [
        False
    ] * 3
    assert not one.is_behind(first, 1, 0.0)
    assert one.is_behind(others[3], 1, 0.15)
    assert not one.is_behind(others[4], 1, 0.95)


def test_a_small_space_ends():
    one = study([KIND, Parameter("flag", (True, False))], {"kind": "a", "flag": True})
    tried = []
    while (proposal := one.ask()) is not None:
        tried.append(tuple(one.values()[proposal.number].values()))
        one.tell(proposal.number, None if proposal.number == 2 else 0.5, True)  # one of them fails
    assert sorted(tried) == sorted((kind, flag) for kind in "abc" for flag in (True, False))
    assert one.importances({0: 1.0}) == {}
