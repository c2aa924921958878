"""Do users return to items they had? A term of the scores that says so, fitted to the training data.

An inner product puts what a user had a moment ago on top, also where nobody ever returns to an item. The score of an
item of the user's own history gets one more number, by how long ago the user last had it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from recbole_cce import ops
from recbole_cce.nn.history import History

# The ages from which each number is for: 1, 2, 3 and 4 interactions ago, 5 to 8, 9 to 16, ...
AGES = torch.tensor([1, 2, 3, 4, 5, 9, 17, 33, 65, 129])
ROWS = 2**14  # training rows that the numbers are fitted to, at most
PRIOR = 0.01  # weight of a normal prior about 0, which keeps the numbers finite where nobody returns
# repeat_bias: auto validates without the term, too, where so large a share of targets was had before: a loss over few
# negatives seldom sees a user's own items among them, and what it makes of those may suit a ranking as it is
OFTEN = 0.02
PAIR_NUMBERS = 2**24  # numbers of the vectors of pairs that are held at a time
NEWTON_STEPS = 50


def wanted(config: Mapping[str, Any]) -> bool:
    """Whether a configuration asks for the term; models without the key have none."""
    return config["repeat_bias"] in ("auto", "learned")


def age_group(age: torch.Tensor) -> torch.Tensor:
    """[...] int64 ages from 1 on -> which of AGES each one belongs to."""
    return torch.bucketize(age, AGES.to(age.device), right=True) - 1


def fit(model: Any, hidden: torch.Tensor, target: torch.Tensor, history: History) -> torch.Tensor:
    """The numbers r [len(AGES)], fp32 on the CPU, that make the targets of training rows the likeliest.

    maximise  sum_i [ r(y_i) - log(sum_{j not own} e^{s_ij} + sum_{j own} e^{s_ij + r(j)}) ] - PRIOR/2 |r|^2

    where r(j) is the number of the age of item j, and r(y) = 0 for a target the user never had; concave in r.

    Args:
        model: its `item_embedding` is the item table.
        hidden: [N, D] user vectors.
        target: [N] int64 items that came next, on the device of `hidden`.
        history: of the N rows, on any device.
    """
    weight = model.item_embedding.weight.detach()
    row, item, age = (part.to(hidden.device) for part in history)
    target_score = (hidden * weight[target]).sum(1)
    log_sum = ops.linear_cross_entropy(hidden, weight, target, reduction="none") + target_score
    share = hidden.new_zeros(len(hidden), len(AGES), dtype=torch.float64)  # of each row's mass, by age
    group = age_group(age)
    for part in torch.arange(len(row), device=row.device).split(max(1, PAIR_NUMBERS // hidden.size(1))):
        score = (hidden[row[part]] * weight[item[part]]).sum(1)
        mass = (score - log_sum[row[part]]).double().exp()
        share.index_put_((row[part], group[part]), mass, accumulate=True)
    returned = torch.bincount(group[item == target[row]], minlength=len(AGES)).double()
    return maximise(share.cpu(), returned.cpu()).float()


def maximise(share: torch.Tensor, returned: torch.Tensor) -> torch.Tensor:
    """Newton's method for fit(): the numbers [G] of shares [N, G] of the mass and `returned` [G] rows, in fp64."""

    others = (1 - share.sum(1)).clamp(min=1e-9)  # shares of fp32 scores may add up to more than all

    def value(number: torch.Tensor) -> torch.Tensor:
        mass = others + share @ number.exp()
        return (returned * number).sum() - mass.log().sum() - PRIOR / 2 * number.square().sum()

    number = torch.zeros_like(returned)
    for _ in range(NEWTON_STEPS):
        part = share * number.exp() / (others + share @ number.exp())[:, None]  # each age's share of the mass
        gradient = returned - part.sum(0) - PRIOR * number
        curvature = part.sum(0).diag() - part.T @ part + PRIOR * torch.eye(len(number), dtype=number.dtype)
        step = torch.linalg.solve(curvature, gradient)
        step = step.clamp(-2, 2)
        while value(number + step) < value(number) and step.abs().max() > 1e-9:
            step = step / 2
        number = number + step
        if step.abs().max() < 1e-6:
            break
    return number


def described(number: torch.Tensor) -> str:
    """The factors e^r by age, for the log."""
    ages = AGES.tolist()
    spans = [f"{age}" if after == age + 1 else f"{age}-{after - 1}" for age, after in pairwise(ages)]
    spans.append(f"{ages[-1]}+")
    return ", ".join(f"{span}: x {factor:.3g}" for span, factor in zip(spans, number.exp().tolist(), strict=True))
