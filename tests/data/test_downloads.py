"""Downloads: from file:// addresses, which RecBole's own functions fetch as any other."""

from __future__ import annotations

import multiprocessing
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.dataset import Dataset
from recbole.utils import url

from recbole_cce.data import downloads
from recbole_cce.errors import UserError

LINES = ["user_id:token\titem_id:token\ttimestamp:float", *(f"u{n % 3}\ti{n % 5}\t{n}" for n in range(30))]


@pytest.fixture
def archive(tmp_path):
    """A whole archive, as RecBole's portal names what is in it."""
    file = tmp_path / "Served.zip"
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("Served.inter", "\n".join(LINES) + "\n")
    return file


def load(address, folder, model="SASRecCCE"):
    """A data set that RecBole knows by this address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "_get_download_url", lambda self, table, allow_none=False: address)
        settings = {"data_path": str(folder), "gpu_id": "", "state": "ERROR", "cache_data": False, "load_col": None}
        own = {"train_neg_sample_args": None} if model == "SASRec" else {}
        return create_dataset(Config(model, "known", config_dict={**settings, **own}))


def names(folder: Path) -> list[str]:
    """All that is below a folder."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def cut(archive):
    archive.write_bytes(archive.read_bytes()[:-100])


def one_bit(archive):
    content = bytearray(archive.read_bytes())
    content[100] ^= 1
    archive.write_bytes(content)


def without_interactions(archive):
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("readme.txt", "no data")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda archive: archive.write_text("<html>Log in</html>"), r"gave no whole zip archive, but b'<html>Log in"),
        (cut, "gave no whole zip archive"),
        (one_bit, "gave no whole zip archive.*CRC"),
        (without_interactions, r"an archive without an \.inter file: it holds readme\.txt; nothing is kept"),
    ],
    ids=["page", "cut", "bit", "other files"],
)
def test_what_is_no_archive_of_data_leaves_nothing(tmp_path, archive, damage, message):
    whole = archive.read_bytes()
    damage(archive)
    with pytest.raises(UserError, match=message):
        load(archive.as_uri(), tmp_path / "data")
    assert names(tmp_path / "data") == []
    archive.write_bytes(whole)
    assert len(load(archive.as_uri(), tmp_path / "data").inter_feat) == 30
    assert names(tmp_path / "data") == ["known", "known/known.inter"]


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRec", "BPR"])
def test_what_an_interrupted_download_of_recboles_left_is_repaired(tmp_path, archive, model):
    folder = tmp_path / "data" / "known"
    folder.mkdir(parents=True)
    for left in (None, "Served.zip"):
        if left:
            (folder / "known.inter").unlink()
            (folder / left).write_bytes(archive.read_bytes()[:50])
        assert len(load(archive.as_uri(), tmp_path / "data", model).inter_feat) == 30
        assert names(folder) == ["known.inter"]


def test_data_that_are_there_are_left_alone(tmp_path):
    folder = tmp_path / "data" / "known"
    folder.mkdir(parents=True)
    (folder / "known.inter").write_text("\n".join(LINES[:20]) + "\n")
    assert len(load("file:///nowhere.zip", tmp_path / "data").inter_feat) == 19


def test_no_connection(tmp_path):
    with pytest.raises(ConnectionError, match=r"file:///nowhere\.zip could not be downloaded: .*No such file"):
        load("file:///nowhere.zip", tmp_path / "data")
    assert names(tmp_path / "data") == []


@pytest.mark.parametrize(("cause", "raised"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, ConnectionError)])
def test_a_download_that_is_broken_off(tmp_path, archive, monkeypatch, cause, raised):
    class Broken:
        def read(self, size):
            raise cause("gone")

        def info(self):
            return {"Content-Length": "1000"}

    monkeypatch.setattr(url.ur, "urlopen", lambda address: Broken())
    with pytest.raises(raised):
        load(archive.as_uri(), tmp_path / "data")
    assert names(tmp_path / "data") == []


def test_a_page_of_unknown_length(tmp_path, archive, monkeypatch):
    class Page:
        def info(self):
            return {"Content-Length": None}

    monkeypatch.setattr(url.ur, "urlopen", lambda address: Page())
    with pytest.raises(UserError, match="gives no file of a known length"):
        load(archive.as_uri(), tmp_path / "data")


def test_a_data_set_that_nobody_knows(tmp_path):
    with pytest.raises(UserError, match=r"dataset: Neither .*unknown\] exists .* nor \[unknown\] a known dataset name"):
        create_dataset(Config("SASRecCCE", "unknown", config_dict={"data_path": str(tmp_path / "data"), "gpu_id": ""}))


def test_a_killed_download_is_cleared_away(tmp_path, archive):
    left = tmp_path / "data" / ".known.123.download"
    left.mkdir(parents=True)
    (left / "Served.zip").write_text("half")
    load(archive.as_uri(), tmp_path / "data")
    assert names(tmp_path / "data") == ["known", "known/known.inter"]


def fetched(arguments) -> tuple[int, int]:
    """How many interactions a process has, and how often it downloaded."""
    address, folder = arguments
    calls = []
    original = downloads._fetched
    downloads._fetched = lambda *arguments: calls.append(1) or original(*arguments)
    return len(load(address, folder).inter_feat), len(calls)


def test_of_several_processes_one_downloads(tmp_path, archive):
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as pool:
        results = list(pool.map(fetched, [(archive.as_uri(), tmp_path / "data")] * 3))
    assert [count for count, _ in results] == [30] * 3
    assert sum(calls for _, calls in results) == 1
    assert names(tmp_path / "data") == ["known", "known/known.inter"]
