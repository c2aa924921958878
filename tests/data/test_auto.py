"""What `auto` chooses: by the loader and the model of a real data set, and the rules at their corners."""

import pytest
from recbole.config import Config
from recbole.data import create_dataset, data_preparation

from recbole_cce.data import auto
from tests.build import experiment


def chosen(settings, model="SASRecCCE"):
    """Configuration and training loader, once the data are known."""
    config = Config(model, "ml-100k", config_dict={"use_gpu": False, "gpu_id": "", "state": "ERROR", **settings})
    train, *_ = data_preparation(config, create_dataset(config))
    return config, train


def test_batches_and_rate_of_ml100k():
    config, train = chosen({})
    targets = train.dataset.n_targets
    assert targets == 100_000 - 943 * 3  # all but each user's first, validation and test
    per_step = targets / len(train)
    assert 3_500 < per_step < 4_500  # a hundredth of them is less than 4,000
    assert config["learning_rate"] == pytest.approx(0.001 * (4_000 / 5_000) ** 0.5, rel=0.02)
    assert 0.1 < config["hidden_dropout_prob"] < 0.5
    assert config["loss_type"] == "CCE"


def test_the_rate_is_that_of_the_batch_that_is_given():
    config, train = chosen({"train_batch_size": 700})
    per_row = train.dataset.n_targets / len(train.dataset)
    assert config["learning_rate"] == pytest.approx(min(0.002, 0.001 * (700 * per_row / 5_000) ** 0.5), rel=1e-3)
    assert config["train_batch_size"] == 700


def test_last_targets_train_as_in_recbole():
    config, train = chosen({"train_targets": "last"})
    assert (config["train_batch_size"], config["learning_rate"]) == (2048, 0.001)
    assert len(train) == -(-(100_000 - 943 * 3) // 2048)


@pytest.mark.parametrize("given", [{"num_negatives": 2048}, {"negative_sharing": "none"}])
def test_a_key_of_negatives_asks_for_them(given):
    assert chosen(given)[0]["loss_type"] == "CCE-"


def test_what_is_given_stays():
    given = {"loss_type": "SCE", "hidden_dropout_prob": 0.3, "learning_rate": 0.01, "train_batch_size": 7}
    config, _ = chosen(given)
    assert {key: config[key] for key in given} == given


def test_the_model_has_what_was_chosen(tiny_config):
    run = experiment("SASRecSCE", {**tiny_config, "hidden_dropout_prob": "auto", "learning_rate": "auto"})
    assert run.model.dropout.p == run.config["hidden_dropout_prob"]
    assert run.trainer.optimizer.param_groups[0]["lr"] == run.config["learning_rate"]


def test_rules():
    assert auto.loss_type(65_536, {}) == "CCE"
    assert auto.loss_type(65_537, {}) == "CCE-"
    # rows of 10 targets: 4,000 of 100,000, a hundredth of a million, 16,000 of a hundred million
    sizes = [auto.batch_size(10 * rows, rows) for rows in (10_000, 100_000, 10_000_000)]
    assert sizes == [400, 1_000, 1_600]
    assert auto.batch_size(5_000_000, 5) == 1  # a row longer than a step
    assert [auto.learning_rate(targets) for targets in (10, 5_000, 10**7)] == [0.0005, 0.001, 0.002]
    # from sparse to dense, never outside
    found = [auto.dropout(targets, 10_000) for targets in (10**4, 10**5, 3 * 10**5, 10**7)]
    assert found[0] == 0.5 and found[-1] == 0.1 and found == sorted(found, reverse=True) and found[1] > found[2]
