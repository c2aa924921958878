"""Files of the user's own: named on the command line alone, imported under their names."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
from recbole.config import Config

from recbole_cce.errors import UserError
from recbole_cce.plugin import extensions


@pytest.fixture(autouse=True)
def afterwards_as_before(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with mock.patch.dict(extensions.FILES), mock.patch.dict(sys.modules):
        yield


def test_a_file_is_imported_once(tmp_path):
    (tmp_path / "of_mine.py").write_text("import pathlib\npathlib.Path('ran').write_text('')\n")
    extensions.load(["of_mine.py"])
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    extensions.load(["of_mine.py"])
    extensions.load_again(extensions.FILES)
    assert not (tmp_path / "ran").exists()
    assert extensions.FILES == {"of_mine": "of_mine.py"}


@pytest.mark.parametrize("name", ["nowhere.py", "data.inter", "."])
def test_what_is_no_python_file(tmp_path, name):
    (tmp_path / "data.inter").touch()
    with pytest.raises(UserError, match=r"--plugin: '.*' is not valid; it takes a Python file"):
        extensions.load([name])


@pytest.mark.parametrize("name", ["json.py", "my-losses.py", "sys.py"])
def test_a_name_that_cannot_be_imported(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="cannot be imported under its name"):
        extensions.load([name])
    assert not extensions.FILES


def test_no_configuration_names_one(tmp_path, tiny_config):
    (tmp_path / "own.yaml").write_text("plugin: of_mine.py\n")
    with pytest.raises(UserError, match="there is no key 'plugin'"):
        Config("SASRecCCE", "tiny", ["own.yaml"], tiny_config)
