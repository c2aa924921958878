"""RecBole's downloads of data sets, whole or not at all.

RecBole downloads into the data set's folder and looks no further where there is one: an interrupted download, or the
page of a portal in place of an archive, stays for ever. Of several processes it lets one download and the others meet
it at a barrier, which a process that comes later never reaches.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import sys
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recbole.utils import url

from recbole_cce.errors import UserError
from recbole_cce.files import lock

Address = Callable[..., Any]  # RecBole's look-up of the address of a data set, in its table of that name


def ensure(dataset: Any, address_in: Address) -> None:
    """Download a data set that is not there, or of which RecBole's own download has left a folder without interactions.

    Raises:
        UserError, ConnectionError: as download().
    """
    folder = Path(dataset.dataset_path)
    if not _is_there(folder) and (not folder.exists() or address_in("url", allow_none=True)):
        download(dataset, address_in)


def download(dataset: Any, address_in: Address) -> None:
    """Download beside the folder of a data set, check, then rename to it. Other processes wait and find it there.

    Raises:
        UserError: RecBole does not know the data set, or its address gives no archive of one.
        ConnectionError: there is no connection, or not to the end.
    """
    try:
        address, folder = address_in("url"), Path(dataset.dataset_path)
    except ValueError as error:
        raise UserError(f"dataset: {error}") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent) as alone:
        if _is_there(folder):
            return
        if alone:
            for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.download"):
                shutil.rmtree(left, ignore_errors=True)
        part = folder.with_name(f".{folder.name}.{uuid.uuid4().int}.download")
        part.mkdir()
        try:
            dataset.logger.info(f"Prepare to download dataset [{dataset.dataset_name}] from [{address}].")
            archive = _fetched(address, part)
            _extract(address, archive, part)
            url.rename_atomic_files(str(part), archive.stem, dataset.dataset_name)
            (folder / archive.name).unlink(missing_ok=True)  # that of an interrupted download of RecBole's own
            _move(part, folder)
            dataset.logger.info("Downloading done.")
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _is_there(folder: Path) -> bool:
    return any(folder.glob("*.inter"))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Keep other processes from downloading into a folder; whether that is possible here."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folder
        yield False
        return
    try:
        yield lock(descriptor)
    finally:
        os.close(descriptor)


def _fetched(address: str, part: Path) -> Path:
    """The archive, in `part`."""
    try:
        if not url.decide_download(address):
            sys.exit("Stop download.")
        return Path(url.download_url(address, str(part)))
    except TypeError as error:  # RecBole takes the length as a number
        raise UserError(f"{address} gives no file of a known length: it is no archive of a data set") from error
    except RuntimeError as error:  # RecBole's, for whatever went wrong
        if not isinstance(error.__context__, Exception):  # Ctrl-C
            raise error.__context__ or error from None
        raise ConnectionError(f"{address} could not be downloaded: {error.__context__}") from error
    except OSError as error:
        raise ConnectionError(f"{address} could not be downloaded: {error}") from error


def _extract(address: str, archive: Path, part: Path) -> None:
    """Put the files of an archive, which has check sums, beside it and remove it."""
    try:
        url.extract_zip(str(archive), str(part))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        begin = archive.read_bytes()[:40]
        raise UserError(f"{address} gave no whole zip archive, but {begin!r}... ({error}): nothing is kept") from error
    archive.unlink()
    if not _is_there(part):
        names = ", ".join(sorted(file.name for file in part.iterdir())) or "nothing"
        raise UserError(f"{address} gave an archive without an .inter file: it holds {names}; nothing is kept")


def _move(part: Path, folder: Path) -> None:
    """Rename `part` to `folder`; where that holds other files already, put those of `part` there, interactions last."""
    with contextlib.suppress(OSError):
        folder.rmdir()  # an empty one
    if not folder.exists():
        part.rename(folder)
        return
    for file in sorted(part.iterdir(), key=lambda file: file.suffix == ".inter"):
        if file.is_file():
            file.replace(folder / file.name)
