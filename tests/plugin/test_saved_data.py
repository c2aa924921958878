"""save_dataset and save_dataloaders: every run has its own settings and the files as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import run_recbole


def of_run(model, settings, **more):
    """The data set of a run, and its training loader."""
    config = Config(model, "tiny", config_dict={**settings, **more})
    config["trust_checkpoint"] = True
    dataset = create_dataset(config)
    return dataset, data_preparation(config, dataset)[0]


@pytest.mark.parametrize("key", ["save_dataset", "save_dataloaders"])
def test_a_second_run_has_its_own_settings(tiny_config, caplog, key):
    """And a batch size that is chosen for it; nothing is saved that nobody reads."""
    settings = {**tiny_config, key: True, "epochs": 1, "train_batch_size": "auto"}
    first = run_recbole("SASRecCCE", "tiny", config_dict=dict(settings))
    assert run_recbole("SASRecCCE", "tiny", config_dict=dict(settings)) == first
    assert not list(Path("saved").glob("tiny-*"))
    assert f"{key}: True is not used: the data of SASRecCCE are made from their files" in caplog.text
    dataset, loader = of_run("SASRecCCE", settings, MAX_ITEM_LIST_LENGTH=3, exclude_seen=True)
    assert dataset.config["exclude_seen"] and loader.dataset.max_item_list_len == 3


@pytest.mark.parametrize("key", ["save_dataset", "save_dataloaders"])
def test_files_and_settings_that_changed_since(tiny_config, tiny, caplog, key):
    """Of RecBole's models, which read what was saved."""
    settings = {**tiny_config, key: True}
    _, loader = of_run("BPR", settings)
    size = len(loader.dataset)
    again, loader = of_run("BPR", settings, learning_rate=0.5)
    assert again.config["learning_rate"] == loader.dataset.config["learning_rate"] == 0.5
    assert len(loader.dataset) == size and not caplog.messages
    file = tiny / "tiny" / "tiny.inter"
    file.write_text(file.read_text() + "".join(f"u{user}\tnew\t1700000000\n" for user in range(40)))
    dataset, loader = of_run("BPR", settings)
    assert loader.dataset.item_num == dataset.item_num == again.item_num + 1
    assert caplog.messages == ["the data that were saved are of other files or settings: they are made anew"]
