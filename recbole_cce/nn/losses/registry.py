"""The losses by the names that `loss_type` takes."""

from __future__ import annotations

from recbole_cce.nn.losses.base import Loss
from recbole_cce.nn.losses.binary import BCE, GBCE
from recbole_cce.nn.losses.full import CCE, CE
from recbole_cce.nn.losses.sampled import CCEMinus, CEMinus
from recbole_cce.nn.losses.scalable import SCE

LOSSES: dict[str, type[Loss]] = {
    "CE": CE,
    "CCE": CCE,
    "CCE-": CCEMinus,
    "CE-": CEMinus,
    "SCE": SCE,
    "BCE": BCE,
    "gBCE": GBCE,
}
