"""What the columns of RecBole's files are for: which ones a data set reads, of which type, and which it makes itself.

RecBole takes any type for any column: a time in tokens is sorted by the order in which it appears, items in numbers are
one item.
"""

from __future__ import annotations

from typing import Any

from recbole.data.dataset import SequentialDataset
from recbole.utils import FeatureSource, FeatureType

from recbole_cce import keys
from recbole_cce.errors import UserError

# Columns of tokens that a line is nothing without -> the options that name them.
ROLES: dict[FeatureSource | str, tuple[str, ...]] = {
    FeatureSource.INTERACTION: ("USER_ID_FIELD", "ITEM_ID_FIELD"),
    FeatureSource.USER: ("USER_ID_FIELD",),
    FeatureSource.ITEM: ("ITEM_ID_FIELD",),
    FeatureSource.KG: ("HEAD_ENTITY_ID_FIELD", "RELATION_ID_FIELD", "TAIL_ENTITY_ID_FIELD"),
    "link": ("ITEM_ID_FIELD", "ENTITY_ID_FIELD"),
}


def is_presplit(dataset: Any) -> bool:
    """Whether histories come from files that are split already."""
    return isinstance(dataset, SequentialDataset) and dataset.config["benchmark_filename"] is not None


def reads_time(dataset: Any) -> bool:
    """Whether interactions are sorted by their time."""
    config = dataset.config
    if config["benchmark_filename"] is not None:
        return False
    return (
        isinstance(dataset, SequentialDataset)
        or config["rm_dup_inter"] is not None
        or config["eval_args"]["order"] == "TO"
    )


def item_list(dataset: Any) -> str:
    """The column of pre-split files that has the histories."""
    return dataset.config["ITEM_ID_FIELD"] + dataset.config["LIST_SUFFIX"]


def checked(
    dataset: Any,
    source: FeatureSource | str,
    path: str,
    header: dict[str, FeatureType],
    columns: dict[str, FeatureType],
) -> dict[str, FeatureType]:
    """`columns`, of those in the header the ones to load, with a time in tokens as the numbers that it has to be.

    Raises:
        UserError: one that is read is not there, not loaded or of a wrong type; one has the name of what the data set
            makes, or of a column of another file; `val_interval` cannot be of its column.
    """
    config = dataset.config
    if source == FeatureSource.INTERACTION and isinstance(dataset, SequentialDataset):
        _check_presence(dataset, path, header, columns)
    columns = dict(columns)
    time = config["TIME_FIELD"]
    if source == FeatureSource.INTERACTION and time in columns and reads_time(dataset):
        if columns[time] == FeatureType.TOKEN:
            columns[time] = FeatureType.FLOAT
        if columns[time] != FeatureType.FLOAT:
            raise UserError(f"TIME_FIELD: {path} has {time}:{columns[time].value}; it takes {time}:float")
    for option in ROLES.get(source, ()):
        _check_type(option, path, columns, config[option], FeatureType.TOKEN)
    if source == FeatureSource.INTERACTION and is_presplit(dataset):
        _check_type("benchmark_filename", path, columns, item_list(dataset), FeatureType.TOKEN_SEQ)
    keys_of_file = {config[option] for option in ROLES.get(source, ())}
    for name in columns.keys() & made(dataset, columns):
        raise UserError(
            f"{path}: the column {name!r} has the name of one that the data set makes itself; give it another name, or "
            "leave it out of load_col"
        )
    for name, ftype in columns.items():
        _check_name(dataset, source, path, name, ftype, name in keys_of_file)
        if name in (config["val_interval"] or {}):
            _check_values(config["val_interval"][name], name, ftype)
    return columns


def _check_presence(dataset: Any, path: str, header: dict[str, FeatureType], columns: dict[str, FeatureType]) -> None:
    config = dataset.config
    required = {option: config[option] for option in ("USER_ID_FIELD", "ITEM_ID_FIELD")}
    if is_presplit(dataset):
        required["benchmark_filename"] = item_list(dataset)
    else:
        required["TIME_FIELD"] = config["TIME_FIELD"]
    for option, field in required.items():
        if field not in header:
            of_lists = ", the history of each line" if option == "benchmark_filename" else ""
            raise UserError(f"{option}: {field!r}{of_lists} is not a column of {path}; it has {', '.join(header)}")
        if field not in columns:
            raise UserError(
                f"load_col: the column {field!r} ({option}) of {path} is not loaded; set load_col: "
                f"{{inter: [{', '.join(map(str, required.values()))}]}}"
            )


def _check_type(option: str, path: str, columns: dict[str, FeatureType], name: str, ftype: FeatureType) -> None:
    if columns.get(name, ftype) != ftype:
        raise UserError(f"{option}: {path} has {name}:{columns[name].value}; it takes {name}:{ftype.value}")


def _check_name(
    dataset: Any, source: FeatureSource | str, path: str, name: str, ftype: FeatureType, is_key: bool
) -> None:
    if not is_key and dataset.field2source.get(name, source) != source:
        raise UserError(
            f"{path}: the column {name!r} is in another file, too; give it another name, or leave it out of load_col"
        )
    if dataset.field2type.get(name, ftype) != ftype:
        raise UserError(f"{path} has {name}:{ftype.value}, another file {name}:{dataset.field2type[name].value}")


def _check_values(wanted: Any, name: str, ftype: FeatureType) -> None:
    if ftype == FeatureType.FLOAT:
        valid, is_valid = keys.INTERVAL, keys.is_interval(wanted)
    elif ftype == FeatureType.TOKEN:
        valid = "a list of tokens such as ['4', '5']"
        is_valid = isinstance(wanted, (list, tuple)) and all(isinstance(token, str) for token in wanted)
    else:
        keys.refuse("val_interval", name, f"columns of type token or float, not of {ftype.value}")
    if not is_valid:
        keys.refuse("val_interval", wanted, f"{valid} for the column {name}:{ftype.value}")


def made(dataset: Any, columns: dict[str, FeatureType]) -> set[str]:
    """Names that a data set gives to columns that it makes of those of the interactions."""
    names = set(getattr(dataset, "OWN_FIELDS", ()))
    if isinstance(dataset, SequentialDataset) and not is_presplit(dataset):
        lists = {name + dataset.config["LIST_SUFFIX"] for name in {**dataset.field2type, **columns}}
        names |= lists | {dataset.item_list_length_field}
    return names


def describe(dataset: Any, source: FeatureSource | str, columns: dict[str, FeatureType]) -> None:
    """Tell a data set where its columns are from, and of which type; the length of sequences is not known yet."""
    for name, ftype in columns.items():
        dataset.field2source[name] = source
        dataset.field2type[name] = ftype
        if not ftype.value.endswith("seq"):
            dataset.field2seqlen[name] = 1
        if "float" in ftype.value:
            dataset.field2bucketnum[name] = 2


def needed(dataset: Any, source: FeatureSource | str, columns: dict[str, FeatureType]) -> tuple[list[str], str | None]:
    """Columns that a line must have a value in, and the one that must be another in each line.

    A missing value would be filled in where it is read: a time or a rating with the mean, a user with padding.
    """
    config = dataset.config
    names = [config[option] for option in ROLES.get(source, ())]
    if source == FeatureSource.INTERACTION:
        names += [config["TIME_FIELD"]] * reads_time(dataset) + [item_list(dataset)] * is_presplit(dataset)
        names += [config["LABEL_FIELD"], *(config["threshold"] or ())]
    if config["benchmark_filename"] is None:
        names += config["val_interval"] or ()
    key = names[0] if source in (FeatureSource.USER, FeatureSource.ITEM) and names[0] in columns else None
    return [name for name in dict.fromkeys(names) if name in columns], key


def note(dataset: Any, message: str) -> None:
    """Warn of what was left out; `notes` keeps it for those who read a copy of the data set."""
    dataset.notes = [*getattr(dataset, "notes", ()), message]
    dataset.logger.warning(message)
