"""The binary copy of a data set: the same bits as the files, and never those of other files or settings."""

from __future__ import annotations

import multiprocessing
import os
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.utils import FeatureSource, FeatureType

from recbole_cce.data import columns, dataset, tokens
from recbole_cce.data.dataset import LeanSequentialDataset
from recbole_cce.data.sources import cache, inter
from recbole_cce.plugin import repairs
from tests.conftest import write_inter
from tests.data.test_dataset import ML100K, SPLITS, ml100k, presplit, with_sequences  # noqa: F401  fixtures

NAME = "tiny-LeanSequentialDataset.npz"


def load(dataset: str = "tiny", **settings):
    return create_dataset(Config("SASRecCCE", dataset, config_dict={"gpu_id": "", "state": "ERROR", **settings}))


@pytest.fixture
def readings(monkeypatch):
    """Names of the data sets that were read from their files."""
    read = []
    original = LeanSequentialDataset._load_data

    def load_data(self, token, path):
        read.append(token)
        return original(self, token, path)

    monkeypatch.setattr(LeanSequentialDataset, "_load_data", load_data)
    return read


def assert_same(one, two):
    """Two data sets, before and after they are split."""
    for name in ("field2type", "field2source", "field2seqlen", "field2bucketnum", "field2token_id", "feat_name_list"):
        assert getattr(one, name) == getattr(two, name), name
    assert one.field2id_token.keys() == two.field2id_token.keys()
    for field, names in one.field2id_token.items():
        assert names.dtype == two.field2id_token[field].dtype
        assert np.array_equal(names, two.field2id_token[field]), field
    assert str(one) == str(two)
    for name in one.feat_name_list:
        assert_equal_fields(getattr(one, name), getattr(two, name))
    for first, second in zip(one.build(), two.build(), strict=True):
        assert first.list_fields == second.list_fields
        if len(first):
            assert_equal_fields(first[np.arange(len(first))], second[np.arange(len(second))])


def assert_equal_fields(one, two):
    assert one.columns == two.columns
    for field in one.columns:
        assert one[field].dtype == two[field].dtype, field
        assert torch.equal(one[field], two[field]), field


def of_fixture(request, name):
    """Name and settings of the data set that a fixture of test_data.py makes."""
    made = request.getfixturevalue(name)
    if name == "ml100k":
        lines = ["vector_id:token\tvector:float_seq", *(f"{item}\t{item / 7} {item / 9}" for item in range(1, 100))]
        (Path(made["data_path"]) / "ranked" / "ranked.vector").write_text("\n".join(lines) + "\n")
        return "ranked", {
            **made,
            "load_col": {**made["load_col"], "vector": ["vector_id", "vector"]},
            "additional_feat_suffix": ["vector"],
            "alias_of_item_id": ["vector_id"],
            "preload_weight": {"vector_id": "vector"},
        }
    if name == "presplit":
        return "split", made[0]
    columns = ["user_id", "item_id", "rating", "timestamp", "tags", "scores"]
    return "tagged", {"data_path": str(made), "load_col": {"inter": columns}, "numerical_features": ["rating"]}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("fixture", ["ml100k", "with_sequences", "presplit"])
def test_the_copy_is_the_data_set(request, readings, fixture, split):
    dataset, settings = of_fixture(request, fixture)
    files = load(dataset, **settings, **split)
    copy = load(dataset, **settings, **split)
    assert readings == [dataset]
    assert_same(files, copy)
    assert files._preloaded_weight.keys() == copy._preloaded_weight.keys() == set(settings.get("preload_weight", ()))
    for field, matrix in files._preloaded_weight.items():
        assert np.array_equal(matrix, copy._preloaded_weight[field])


def test_what_is_made_after_the_copy_may_differ(readings, tiny_config):
    """One copy serves every split and every length."""
    load(**tiny_config)
    others = [{"MAX_ITEM_LIST_LENGTH": 3}, {"train_targets": "last"}, {"seed": 1}, *SPLITS.values()]
    others += [{"data_path": os.path.relpath(tiny_config["data_path"])}]
    for settings in others:
        copy = load(**{**tiny_config, **settings})
        assert readings == ["tiny"]
        assert_same(copy, load(**{**tiny_config, **settings, "cache_data": False}))
        readings.pop()


@pytest.mark.parametrize(
    "settings",
    [
        {"user_inter_num_interval": "[6,inf)"},
        {"item_inter_num_interval": "[6,inf)"},
        {"rm_dup_inter": "first"},
        {"val_interval": {"timestamp": "[1600003000,inf)"}},
        {"normalize_all": True},
        {"numerical_features": ["timestamp"]},
        {"load_col": {"inter": "*"}},
        {"TIME_FIELD": "rating", "load_col": {"inter": "*"}},
        {"encoding": "latin-1"},
    ],
    ids=str,
)
def test_other_settings_replace_the_copy(readings, caplog, tiny_config, settings):
    file = Path(tiny_config["data_path"]) / "tiny" / "tiny.inter"
    header, *lines = file.read_text().splitlines()
    lines = [f"{line}\t{len(line) * 7 % 5}" for line in lines]
    file.write_text("\n".join([header + "\trating:float", *lines]) + "\n")
    load(**tiny_config)
    load(**{**tiny_config, **settings})
    assert readings == ["tiny", "tiny"]
    copy = load(**{**tiny_config, **settings})
    assert readings == ["tiny", "tiny"]
    assert_same(copy, load(**{**tiny_config, **settings, "cache_data": False}))
    assert not caplog.records


def test_other_bytes_replace_the_copy(readings, caplog, tiny_config):
    """Of the same size and time, too."""
    file = Path(tiny_config["data_path"]) / "tiny" / "tiny.inter"
    load(**tiny_config)
    before = file.stat()
    text = file.read_text()
    file.write_text(text.replace("\ti1\t", "\ti2\t"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.read_text() != text
    assert "i1" not in load(**tiny_config).field2token_id["item_id"]
    assert readings == ["tiny", "tiny"]
    assert not caplog.records


def test_a_file_that_appears_replaces_the_copy(readings, tiny_config):
    settings = {**tiny_config, "load_col": {**tiny_config["load_col"], "item": ["item_id", "price"]}}
    assert load(**settings).item_feat is None
    lines = ["item_id:token\tprice:float", *(f"i{item}\t{item / 2}" for item in range(30))]
    (Path(tiny_config["data_path"]) / "tiny" / "tiny.item").write_text("\n".join(lines) + "\n")
    assert load(**settings).item_feat["price"].max() == 14.5
    assert readings == ["tiny", "tiny"]


def test_another_program_replaces_the_copy(readings, monkeypatch, tiny_config):
    load(**tiny_config)
    monkeypatch.setattr(cache, "version", lambda name: "0")
    load(**tiny_config)
    assert readings == ["tiny", "tiny"]


@pytest.mark.parametrize("module", [repairs, dataset, cache, columns, inter, tokens])
def test_a_changed_program_replaces_the_copy(readings, monkeypatch, tmp_path, tiny_config, module):
    load(**tiny_config)
    changed = tmp_path / Path(module.__file__).name
    changed.write_text(Path(module.__file__).read_text() + "# changed")
    monkeypatch.setattr(module, "__file__", str(changed))
    load(**tiny_config)
    assert readings == ["tiny", "tiny"]


def flip(file: Path, place: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0x10
    file.write_bytes(content)


def hold_objects(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive, archive.open("more.npy", "w") as entry:
        np.lib.format.write_array(entry, np.array([Path("x")], dtype=object))


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no data"),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "objects": hold_objects,
    "other arrays": lambda file: np.savez(file, one=np.ones(3)),
    **{f"bit at {place}": lambda file, place=place: flip(file, place) for place in (0.02, 0.3, 0.5, 0.7, 0.9)},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_copy_is_made_anew_with_one_warning(readings, caplog, tiny_config, damage):
    load(**tiny_config)
    file = Path(tiny_config["data_path"]) / "tiny" / NAME
    damage(file)
    again = load(**tiny_config)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"{file} is damaged (")
    assert_same(again, load(**tiny_config))
    assert readings == ["tiny", "tiny"]
    assert len(caplog.records) == 1


def test_where_it_is(readings, tmp_path, tiny_config):
    folder = Path(tiny_config["data_path"]) / "tiny"
    load(**tiny_config, cache_data=False)
    assert [file.name for file in folder.iterdir()] == ["tiny.inter"]
    for _ in range(2):
        load(**tiny_config, cache_data=str(tmp_path / "other" / "place"))
    assert [file.name for file in (tmp_path / "other" / "place").iterdir()] == [NAME]
    assert [file.name for file in folder.iterdir()] == ["tiny.inter"]
    for _ in range(2):
        load(**tiny_config)
    assert sorted(file.name for file in folder.iterdir()) == [NAME, "tiny.inter"]
    assert readings == ["tiny"] * 3


def test_none_in_the_folder_of_recbole():
    load("ml-100k")
    assert not list(ML100K.glob("*.npz"))


def test_a_folder_that_cannot_be_made(tmp_path, tiny_config):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_data: '.*file' is not valid.*it takes True, False or a folder"):
        load(**tiny_config, cache_data=str(tmp_path / "file"))


def test_a_full_disk_keeps_the_old_copy(monkeypatch, caplog, tiny_config):
    load(**tiny_config)
    folder = Path(tiny_config["data_path"]) / "tiny"
    old = (folder / NAME).read_bytes()

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    other = {**tiny_config, "user_inter_num_interval": "[6,inf)"}
    assert len(load(**other)) < len(load(**tiny_config))
    (record,) = caplog.records
    assert (
        record.message.startswith("cache_data: no copy of the data set is kept") and "No space left" in record.message
    )
    assert (folder / NAME).read_bytes() == old
    assert sorted(file.name for file in folder.iterdir()) == [NAME, "tiny.inter"]


def test_a_file_that_changes_while_it_is_read_leaves_no_copy(monkeypatch, tiny_config):
    folder = Path(tiny_config["data_path"]) / "tiny"
    original = LeanSequentialDataset._load_data

    def load_data(self, token, path):
        original(self, token, path)
        (folder / "tiny.inter").write_text((folder / "tiny.inter").read_text() + "u1\ti1\t9\n")

    monkeypatch.setattr(LeanSequentialDataset, "_load_data", load_data)
    load(**tiny_config)
    assert not (folder / NAME).exists()


@pytest.mark.parametrize("written_again", [False, True])
def test_what_a_killed_writer_left_is_removed(tiny_config, written_again):
    folder = Path(tiny_config["data_path"]) / "tiny"
    load(**tiny_config)
    (folder / f".{NAME}.{1:039}").write_bytes(b"half of it")
    load(**tiny_config, **{"user_inter_num_interval": "[6,inf)"} if written_again else {})
    assert sorted(file.name for file in folder.iterdir()) == [NAME, "tiny.inter"]


def test_a_subclass_has_none(tiny_config):
    class Other(LeanSequentialDataset):
        pass

    Other(Config("SASRecCCE", "tiny", config_dict=tiny_config))
    assert [file.name for file in (Path(tiny_config["data_path"]) / "tiny").iterdir()] == ["tiny.inter"]


def test_a_subclass_needs_no_files(tmp_path, tiny_config):
    table = {"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"], "timestamp": [1.0, 2.0, 3.0]}

    class InMemory(LeanSequentialDataset):
        def _load_data(self, token, dataset_path):
            for field in table:
                kind = FeatureType.FLOAT if field == "timestamp" else FeatureType.TOKEN
                self.set_field_property(field, kind, FeatureSource.INTERACTION, 1)
            self.inter_feat, self.user_feat, self.item_feat = pd.DataFrame(table), None, None

    data = InMemory(Config("SASRecCCE", "nowhere", config_dict={**tiny_config, "data_path": str(tmp_path)}))
    assert (data.user_num, data.item_num, len(data.inter_feat)) == (3, 3, 3)
    assert not (tmp_path / "nowhere").exists()


def total_of_first_split(settings) -> list[int]:
    train = load("race", **settings).build()[0]
    return [int(train[np.arange(len(train))]["item_id_list"].sum()), *train.inter_feat["item_id"].tolist()]


def test_processes_may_write_at_once(tmp_path):
    rng = np.random.default_rng(5)
    rows = [(f"u{u}", f"i{rng.integers(500)}", step) for u in range(300) for step in range(30)]
    header = "user_id:token\titem_id:token\ttimestamp:float"
    data = {
        "data_path": str(write_inter(tmp_path / "data", "race", header, rows)),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    }
    settings = [data, {**data, "user_inter_num_interval": "[1,inf)"}] * 6
    expected = total_of_first_split({**data, "cache_data": False})
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as pool:
        for total in pool.map(total_of_first_split, settings):
            assert total == expected
    names = sorted(file.name for file in (tmp_path / "data" / "race").iterdir())
    assert names == ["race-LeanSequentialDataset.npz", "race.inter"]
