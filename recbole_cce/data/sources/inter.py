"""RecBole's atomic files: a header of `name:type` cells, then a line for each row; cells are what separators separate.

One reader for the data sets of all models. RecBole has pandas guess: a token that begins with a quote then swallows
lines, tokens such as NA and null are missing values, and so is what a line that was cut short lacks.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO, cast

import numpy as np
import pandas as pd
from recbole.utils import FeatureSource, FeatureType

from recbole_cce.data.columns import checked, describe, needed, note
from recbole_cce.errors import UserError

# The C engine's way to parse numbers as the Python engine does, which RecBole asks for; from pandas 3.1 it has no
# other, and the option is deprecated.
PANDAS_VERSION = tuple(int(part) for part in pd.__version__.split(".")[:2])
SAME_NUMBERS: dict[str, Any] = {"float_precision": "high"} if PANDAS_VERSION < (3, 1) else {}
LINES_AT_A_TIME = 2**21
NO_TOKEN = [""]
NO_NUMBER = ["", "nan", "NaN", "NAN", "-nan", "-NaN", "NA", "N/A", "n/a", "<NA>", "#N/A", "null", "NULL", "None"]
ONE_BYTE = "\x1f"  # stands for a longer separator, which pandas' C engine does not take
SURPLUS = ":"  # column of what a line has after its last one; no name in a header holds a colon


@dataclass(frozen=True)
class AtomicFile:
    """One file.

    Attributes:
        path: where it is.
        separator: what stands between its cells.
        encoding: of its text; None is UTF-8. A byte order mark is skipped.
    """

    path: str
    separator: str
    encoding: str | None

    def open(self) -> TextIO:
        """The file as text, every line with \\n at its end."""
        encoding = self.encoding or "utf-8"
        return open(self.path, encoding="utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)

    def not_text(self, error: UnicodeError) -> UserError:
        """What to say of an error of decoding."""
        return UserError(f"encoding: {self.path} is not {self.encoding or 'utf-8'} text ({error}); set its encoding")

    def header(self) -> dict[str, FeatureType]:
        """Names and types of the columns.

        Raises:
            UserError: a cell is not `name:type`, a name is there twice, the file is in another encoding.
        """
        try:
            with self.open() as file:
                cells = file.readline().rstrip("\n").split(self.separator)
        except UnicodeError as error:
            raise self.not_text(error) from None
        types = {ftype.value: ftype for ftype in FeatureType}
        columns: dict[str, FeatureType] = {}
        for cell in cells:
            name, _, ftype = cell.partition(":")
            if not name or ftype not in types:
                raise UserError(
                    f"{self.path}: the header cell {cell!r} is not 'name:type' with a type of {', '.join(types)}; "
                    f"columns are separated by field_separator {self.separator!r}"
                )
            if name in columns:
                raise UserError(f"{self.path}: the column {name!r} is twice in the header; a column has one name")
            columns[name] = types[ftype]
        return columns

    def read(self, columns: dict[str, FeatureType]) -> pd.DataFrame:
        """Some of its columns: numbers as fp64, tokens as categories, so that their strings are kept and compared once
        for all lines, sequences as text.

        Raises:
            UserError: a line has more cells than the header, or text in a column of numbers; names the first one.
        """
        try:
            return joined(self.chunks(columns), columns)
        except SurplusError as error:
            raise UserError(
                f"{self.path}: line {self.line(error.row)} has more cells than the header; cells are separated by "
                f"field_separator {self.separator!r}"
            ) from None
        except UnicodeError as error:
            raise self.not_text(error) from None
        except ValueError as error:
            raise self.not_a_number(columns) or UserError(f"{self.path} cannot be read: {error}") from None

    def chunks(self, columns: dict[str, FeatureType]) -> Iterator[pd.DataFrame]:
        """The lines, LINES_AT_A_TIME of them at a time; a last column has what is surplus in them."""
        numbers = [name for name, ftype in columns.items() if ftype == FeatureType.FLOAT]
        others = [*(name for name in columns if name not in numbers), SURPLUS]
        separator = self.separator if len(self.separator.encode()) == 1 else ONE_BYTE
        first = separator.join([*self.header(), SURPLUS]) + "\n"
        with (
            self.open() as file,
            pd.read_csv(
                cast(Any, Headed(first, file, self.separator, separator)),  # has of a file what pandas asks for
                sep=separator,
                engine="c",
                **SAME_NUMBERS,
                usecols=[*columns, SURPLUS],
                # Python strings: pandas 3 has Arrow strings for `str`, slow to iterate
                dtype={**dict.fromkeys(numbers, np.float64), **dict.fromkeys(others, object)},
                na_values={**dict.fromkeys(numbers, NO_NUMBER), **dict.fromkeys(others, NO_TOKEN)},
                keep_default_na=False,
                quoting=csv.QUOTE_NONE,
                chunksize=LINES_AT_A_TIME,
            ) as chunks,
        ):
            yield from chunks

    def not_a_number(self, columns: dict[str, FeatureType]) -> UserError | None:
        """What to say of the first text in a column of numbers."""
        numbers = {name: FeatureType.TOKEN for name, ftype in columns.items() if ftype == FeatureType.FLOAT}
        for name, values in self.read(numbers).items() if numbers else ():
            texts = values.cat.categories
            texts = texts[pd.isna(pd.to_numeric(texts.to_numpy(), errors="coerce")) & ~texts.isin(NO_NUMBER)]
            if len(texts):
                row = int(values.isin(texts).to_numpy().argmax())
                where = f"{self.path}: line {self.line(row)}"
                return UserError(f"{where} has {values[row]!r} in the column {name!r}, which takes numbers")
        return None

    def line(self, row: int) -> int:
        """The line of a row, both counted from the top of the file; empty lines, which are no rows, count."""
        blank = " \t".replace(self.separator, "") + "\n"
        with self.open() as file:
            filled = (number for number, line in enumerate(file, 1) if line.strip(blank))
            return next(number for count, number in enumerate(filled, -1) if count == row)


class SurplusError(Exception):
    """A line has more cells than the header."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


class Headed:
    """A text file as pandas' C engine reads it: with another first line, and a separator of one byte."""

    def __init__(self, first: str, file: TextIO, separator: str, one_byte: str) -> None:
        file.readline()
        self.first = first
        self.file = file
        self.separator = separator
        self.one_byte = one_byte

    def read(self, size: int) -> str:
        """About so many characters more."""
        if self.first:
            text, self.first = self.first, ""
            return text
        if self.separator == self.one_byte:
            return self.file.read(size)
        return "".join(self.file.readlines(size)).replace(self.separator, self.one_byte)

    def __iter__(self) -> Iterator[str]:
        """pandas asks for it, and does not iterate."""
        return iter(self.file)


def joined(chunks: Iterable[pd.DataFrame], columns: dict[str, FeatureType]) -> pd.DataFrame:
    """The chunks of a file as one frame: tokens as categories, no sequence missing."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    ids: dict[str, dict[str, int]] = {name: {} for name, ftype in columns.items() if ftype == FeatureType.TOKEN}
    for chunk in chunks:
        surplus = chunk[SURPLUS].notna().to_numpy()
        if surplus.any():
            raise SurplusError(int(chunk.index[int(surplus.argmax())]))
        for name, ftype in columns.items():
            values = chunk[name]
            if name in ids:
                codes, tokens = pd.factorize(values.to_numpy())
                known = ids[name]
                code = [known.setdefault(token, len(known)) for token in tokens]
                part = np.array([*code, -1], dtype=np.int32)[codes]  # -1, its last, is that of a missing one
            else:
                part = (values if ftype == FeatureType.FLOAT else values.fillna("")).to_numpy()
            parts[name].append(part)
    table: dict[str, Any] = {}
    for name in columns:
        table[name] = np.concatenate(parts.pop(name))  # the chunks of one column at a time are there twice
        if name in ids:
            categories = pd.Index(list(ids[name]), dtype=object)
            table[name] = pd.Categorical.from_codes(table[name], categories=categories)
    return pd.DataFrame(table, copy=False)


def sequences(cells: pd.Series, ftype: FeatureType, separator: str) -> list[np.ndarray]:
    """The tokens, or numbers, of each cell of a sequence; equal tokens are one string."""
    if ftype == FeatureType.FLOAT_SEQ:
        return [np.array([float(number) for number in cell.split(separator) if number]) for cell in cells]
    known: dict[str, str] = {}
    return [
        np.array([known.setdefault(token, token) for token in cell.split(separator) if token], dtype=object)
        for cell in cells
    ]


def load(
    dataset: Any, filepath: str, source: FeatureSource | str, loaded: set[str] | None, unloaded: set[str] | None
) -> pd.DataFrame | None:
    """The columns of a file that are asked for, without lines that lack one which is read.

    Args:
        dataset: is told of the columns and of what was left out.
        filepath: the file.
        source: which of a data set's files it is.
        loaded, unloaded: names of columns to read, None for all, and of those to leave out.

    Raises:
        UserError: names the file, and what is wrong with it or with the option that asks for a column.
    """
    if loaded == set():
        return None
    file = AtomicFile(filepath, dataset.config["field_separator"], dataset.config["encoding"])
    header = file.header()
    columns = {
        name: ftype
        for name, ftype in header.items()
        if (loaded is None or name in loaded) and name not in (unloaded or ())
    }
    columns = checked(dataset, source, filepath, header, columns)
    if not columns:
        dataset.logger.warning(f"No columns has been loaded from [{source}]")
        return None
    if source != "link":
        describe(dataset, source, columns)
    frame = file.read(columns)
    for name, ftype in columns.items():
        if ftype.value.endswith("seq"):
            try:
                values: list[Any] = sequences(frame[name], ftype, dataset.config["seq_separator"])
            except ValueError as error:
                raise UserError(f"{filepath}: the column {name!r} takes numbers: {error}") from None
            longest = max(map(len, values), default=0)
            length = min((dataset.config["seq_len"] or {}).get(name, longest), longest)
            frame[name] = [value[:length] for value in values] if length < longest else values
            dataset.field2seqlen[name] = length
    return complete(dataset, file, frame, *needed(dataset, source, columns))


def complete(dataset: Any, file: AtomicFile, frame: pd.DataFrame, needed: list[str], key: str | None) -> pd.DataFrame:
    """The lines that have a value in each column of `needed`; of those with one `key`, the first. A warning counts the
    others.

    Raises:
        UserError: no line is left.
    """
    lacking = [frame[name].map(len) == 0 if frame[name].dtype == object else frame[name].isna() for name in needed]
    reasons = {f"they have no {name}": lacks.to_numpy() for name, lacks in zip(needed, lacking, strict=True)}
    if key is not None:
        reasons[f"an earlier line has the same {key}"] = frame[key].duplicated().to_numpy()
    left_out = np.zeros(len(frame), dtype=bool)
    notes = []
    for reason, of_it in reasons.items():
        lines = of_it & ~left_out
        left_out |= lines
        if lines.any():
            count, first = f"{lines.sum()} of {len(frame)} lines", file.line(int(lines.argmax()))
            notes.append(f"{file.path}: {count} are left out, {reason}; the first is line {first}")
    if not notes:
        return frame
    if left_out.all():
        raise UserError(f"{file.path}: no line has {' and '.join(needed)}")
    for message in notes:
        note(dataset, message)
    return frame[~left_out].reset_index(drop=True)
