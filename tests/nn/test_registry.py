"""Registering a loss: what it may be called and declare, and how its keys are shown."""

from __future__ import annotations

from unittest import mock

import pytest

from recbole_cce.errors import UserError
from recbole_cce.keys import Key, integer, one_of, real
from recbole_cce.nn.losses import LOSSES, Loss, SampledLoss, register_loss
from recbole_cce.nn.losses.registry import declared
from recbole_cce.plugin import config_keys, registration


@pytest.fixture(autouse=True)
def afterwards_as_before():
    with mock.patch.dict(LOSSES):
        yield


class Other(SampledLoss):
    keys = SampledLoss.keys | {"margin": Key(0.5, real(0, 1), "how far above")}


def test_a_loss_brings_its_name_keys_and_defaults():
    assert register_loss("Other")(Other) is Other
    assert LOSSES["Other"] is Other
    assert declared()["margin"].help == "Other: how far above"
    assert declared()["num_negatives"].help.startswith("CCE-, CE-, BCE, gBCE, Other: ")
    assert declared()["loss_backend"].help == LOSSES["CE"].keys["loss_backend"].help  # of all losses
    table = config_keys.of_our_models()
    assert table["loss_type"].accepts("Other")
    assert table["margin"].accepts(1)
    assert not table["margin"].accepts(2)
    assert registration.defaults("SASRecCCE")["margin"] == 0.5
    register_loss("Other")(Other)  # again


def test_defaults_of_our_losses_are_their_own_values():
    for name, key in declared().items():
        assert key.accepts(key.default), name


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("auto", {}, "loss 'auto': the name is not valid"),
        ("A,B", {}, "loss 'A,B': the name is not valid"),
        ("CCE", {}, r"loss name 'CCE' is taken: recbole_cce\.nn\.losses\.full has it; choose another"),
        (
            "New",
            {"margin": Key(2, real(0, 1), "")},
            "default of margin, 2, is not valid; it takes a number",
        ),
        ("New", {"num_negatives": Key(1, integer(1), "")}, "declares the key 'num_negatives' in another way than CCE-"),
    ],
)
def test_what_cannot_be_registered(name, keys, message):
    cls = type("New", (Loss,), {"keys": Loss.keys | keys})
    before = dict(LOSSES)
    with pytest.raises(UserError, match=message):
        register_loss(name)(cls)
    assert before == LOSSES


def test_what_is_no_loss():
    with pytest.raises(UserError, match=r"it takes a subclass of recbole_cce\.nn\.losses\.Loss"):
        register_loss("New")(dict)


def test_a_key_that_recbole_has():
    register_loss("New")(type("New", (Loss,), {"keys": Loss.keys | {"shuffle": Key("a", one_of("a"), "")}}))
    with pytest.raises(UserError, match="a loss declares the key 'shuffle', which has another meaning already"):
        config_keys.keys_of_package()
