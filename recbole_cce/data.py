"""A sequential data set without augmentation copies, and rows that train every position.

RecBole writes one row per target and copies the user's history into it: [interactions, MAX_ITEM_LIST_LENGTH] for
every field. Here the interactions stay in one flat table, sorted by user and time; a row only knows where its target
is in it and how long its history is, and the lists are gathered when a batch is built. RecBole's splitters only index
rows, so each split holds the rows it holds in stock RecBole.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data.dataset import SequentialDataset
from recbole.data.dataset import dataset as recbole_dataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

# of train_batch_size: auto. With RecBole's default of 2,048, small data sets need more epochs to as good a model.
TARGETS_PER_BATCH = 1024
RECBOLE_BATCH_SIZE = 2048  # rows of one target each

# Column of inter_feat: where in the flat table the row's target is. In a batch only with exclude_seen.
TARGET_ROW = "target_row"
# Field of a training batch: how many of a row's last positions are trained.
TARGET_COUNT = "target_count"
# The C engine's way to parse numbers as the Python engine does; from pandas 3.1 it has no other, and the option is
# deprecated.
PANDAS_VERSION = tuple(int(part) for part in pd.__version__.split(".")[:2])
SAME_NUMBERS = {"float_precision": "high"} if PANDAS_VERSION < (3, 1) else {}


class Rows(Interaction):
    """An Interaction that takes rows by a tensor. RecBole's makes a Python list of each index: seconds at 1M rows."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (list, range)):
            index = np.asarray(index) if len(index) else np.empty(0, dtype=np.int64)
        if isinstance(index, np.ndarray):
            index = torch.from_numpy(index)
        if isinstance(index, torch.Tensor):
            return Rows({field: values[index] for field, values in self.interaction.items()})
        return super().__getitem__(index)


class CReader:
    """pandas for RecBole's reader: its read_csv runs the C engine, ten times faster than the Python engine.

    Numbers are parsed to the same bits. Tokens are Python strings, which RecBole counts one by one: pandas 3 has
    Arrow strings for `str`, slow to iterate. What the C engine cannot read (long separators, bad lines) goes to the
    Python engine that RecBole asks for, whose errors name the column.
    """

    def __init__(self, pandas: Any) -> None:
        self.pandas = pandas

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pandas, name)

    def read_csv(self, *args: Any, **kwargs: Any) -> pd.DataFrame:
        """pandas.read_csv."""
        dtypes = {column: object if dtype is str else dtype for column, dtype in kwargs["dtype"].items()}
        try:
            return self.pandas.read_csv(*args, **{**kwargs, **SAME_NUMBERS, "engine": "c", "dtype": dtypes})
        except ValueError:
            return self.pandas.read_csv(*args, **kwargs)


class LeanSequentialDataset(SequentialDataset):
    """RecBole's SequentialDataset with histories gathered on demand.

    `train_targets: all` keeps of the training split, for each user, its longest row and, where that does not hold the
    history, windows of MAX_ITEM_LIST_LENGTH before it. Windows overlap by half, and of a full one the last half is
    trained: every target is predicted once an epoch, and never from less than half of the history that a test row
    would show. `train_targets: last` keeps RecBole's rows. Validation and test rows are RecBole's in both.

    Attributes:
        flat: all interactions, sorted by user and time.
        list_fields: name of each list field -> the flat field it is gathered from.
        windows: the rows of a training split that make batches, or None for all of them. `inter_feat` holds all rows
            either way, so that counts and RecBole's statistics do not depend on `train_targets`.
    """

    def __init__(self, config: Config) -> None:
        self.flat: Interaction | None = None
        self.list_fields: dict[str, str] = {}
        self.windows: np.ndarray | None = None
        super().__init__(config)

    # Reading: one clear error for each mistake in the files and the options that name their columns

    def _load_feat(self, filepath: str, source: FeatureSource | str) -> pd.DataFrame | None:
        columns = self._read_header(filepath)
        if source == FeatureSource.INTERACTION:
            loaded, unloaded = self._get_load_and_unload_col(source)
            for option in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD"):
                field = self.config[option]
                if field not in columns:
                    raise ValueError(f"{option}: {field!r} is not a column of {filepath}; it has {', '.join(columns)}")
                if (loaded is not None and field not in loaded) or (unloaded is not None and field in unloaded):
                    raise ValueError(
                        f"load_col: the column {field!r} ({option}) of {filepath} is not loaded; set "
                        f"load_col: {{inter: [{', '.join(self._required_fields())}]}}"
                    )
        pandas = recbole_dataset.pd
        recbole_dataset.pd = CReader(pandas)
        try:
            return super()._load_feat(filepath, source)
        except (ValueError, pd.errors.ParserError) as error:
            raise ValueError(f"{filepath} cannot be read: {error}") from error
        finally:
            recbole_dataset.pd = pandas

    def _required_fields(self) -> list[str]:
        return [self.config[option] for option in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]

    def _read_header(self, filepath: str) -> list[str]:
        with open(filepath, encoding=self.config["encoding"]) as file:
            cells = file.readline().rstrip("\r\n").split(self.config["field_separator"])
        types = [ftype.value for ftype in FeatureType]
        for cell in cells:
            name, _, ftype = cell.partition(":")
            if not name or ftype not in types:
                raise ValueError(
                    f"{filepath}: the header cell {cell!r} is not 'name:type' with a type of {', '.join(types)}; "
                    f"columns are separated by field_separator {self.config['field_separator']!r}"
                )
        return [cell.partition(":")[0] for cell in cells]

    def _reset_index(self) -> None:
        if self.inter_feat.empty:
            filters = ("user_inter_num_interval", "item_inter_num_interval", "val_interval", "rm_dup_inter")
            raise ValueError(
                f"no interaction of {self.dataset_name} is left after filtering with "
                + ", ".join(f"{name}: {self.config[name]!r}" for name in filters)
            )
        super()._reset_index()

    # Rows instead of copies

    def _change_feat_format(self) -> None:
        if self.config["benchmark_filename"] is None:
            # RecBole sorts after its cast to float32, which cannot tell seconds since 1970 apart within 128 s.
            time = self.inter_feat[self.time_field].to_numpy()
            order = np.lexsort((time, self.inter_feat[self.uid_field].to_numpy()))
            self.inter_feat = self.inter_feat.iloc[order]
            self.exact_time = time[order]
        super()._change_feat_format()

    def data_augmentation(self) -> None:
        """Replace the interactions by rows: each interaction but a user's first is the target of one."""
        self._aug_presets()
        self.flat = self.inter_feat
        self.list_fields = {
            getattr(self, f"{field}_list_field"): field for field in self.flat if field != self.uid_field
        }
        uid = self.flat[self.uid_field].numpy()
        index = np.arange(len(uid))
        is_first = np.diff(uid, prepend=-1) != 0
        first = np.maximum.accumulate(np.where(is_first, index, 0))
        target = index[~is_first]
        if len(target) == 0:
            raise ValueError(f"no user of {self.dataset_name} has two interactions: there is nothing to predict")
        rows = torch.from_numpy(target)
        self.inter_feat = Rows({field: self.flat[field][rows] for field in self.flat})
        length = np.minimum(target - first[target], self.max_item_list_len)
        self.inter_feat[self.item_list_length_field] = torch.from_numpy(length)
        self.inter_feat[TARGET_ROW] = rows

    def _with_lists(self, rows: Interaction, width: int) -> Interaction:
        """Add the list fields, `width` long and padded with 0 on the right, to rows of inter_feat."""
        if TARGET_ROW not in rows:  # pre-split benchmark files bring their lists with them
            return rows
        fields = dict(rows.interaction)
        end, length = fields.pop(TARGET_ROW)[..., None], fields[self.item_list_length_field][..., None]
        offset = torch.arange(width)
        padding = offset >= length
        index = (end - length + offset).masked_fill_(padding, 0)
        for list_field, field in self.list_fields.items():
            fields[list_field] = self.flat[field][index]
            fields[list_field][padding] = 0
        return Interaction(fields)

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        """The rows with their lists, as RecBole's data set returns them."""
        if self.windows is not None:
            index = self.windows[index]
        of_index = self.inter_feat[index]
        rows = self._with_lists(of_index, self.max_item_list_len)
        if self.windows is not None:
            rows.update(Interaction({TARGET_COUNT: self._target_counts(rows)}))
        elif self.config["exclude_seen"] and TARGET_ROW in of_index:
            rows.update(Interaction({TARGET_ROW: of_index[TARGET_ROW]}))
        return self.join(rows) if join else rows

    def seen(self, rows: Interaction) -> tuple[torch.Tensor, torch.Tensor]:
        """[P] numbers of rows of a batch and [P] items that their users had before the target, however long ago.

        Pre-split benchmark files show no more than the row's own list.
        """
        if TARGET_ROW not in rows:
            number, place = rows[self.item_id_list_field].nonzero(as_tuple=True)
            return number, rows[self.item_id_list_field][number, place]
        return self.items_before(rows[TARGET_ROW])

    def latest(self, users: torch.Tensor) -> Interaction:
        """A row for each of `users` [U], as a test row of the next interaction would be: its list holds the last items.

        Raises:
            ValueError: the interactions come from pre-split benchmark files.
        """
        if self.flat is None:
            raise ValueError("benchmark_filename: pre-split files do not tell a user's last interactions")
        uid = self.flat[self.uid_field]
        first, end = torch.searchsorted(uid, users), torch.searchsorted(uid, users, right=True)
        length = (end - first).clamp(max=self.max_item_list_len)
        rows = Interaction({self.uid_field: users, self.item_list_length_field: length, TARGET_ROW: end})
        listed = self._with_lists(rows, self.max_item_list_len)
        listed.update(Interaction({TARGET_ROW: end}))
        return listed

    def items_before(self, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of rows `end` [N] of the flat table (or one past a user's last): [P] numbers 0 to N - 1 and [P] items of
        the same user that come before."""
        uid = self.flat[self.uid_field]
        first = torch.searchsorted(uid, uid[end - 1])
        count = end - first
        number = torch.arange(len(end)).repeat_interleave(count)
        place = torch.arange(len(number)) - (count.cumsum(0) - count - first)[number]
        return number, self.flat[self.iid_field][place]

    def __len__(self) -> int:
        return len(self.inter_feat if self.windows is None else self.windows)

    def sort(self, by: str | list[str], ascending: bool | list[bool] = True) -> None:
        """As RecBole's; by time, it uses the timestamps before their cast to float32."""
        if by == self.time_field and ascending is True and TARGET_ROW in self.inter_feat:
            time = self.exact_time[self.inter_feat[TARGET_ROW].numpy()]
            self.inter_feat._reindex(torch.from_numpy(np.argsort(time, kind="stable")))
        else:
            super().sort(by, ascending)

    def _grouped_index(self, group_by_list: np.ndarray) -> list[list[int]]:
        """As RecBole's, without its loop over rows: the rows of each user, users in the order of their first row."""
        order = np.argsort(group_by_list, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(group_by_list[order])) + 1)
        return [group.tolist() for group in sorted(groups, key=lambda group: group[0])]

    def _drop_unused_col(self) -> None:
        # RecBole finds list fields in inter_feat: a stand-in lets it name and forget those that are unused
        unused = (self.config["unused_col"] or {}).get("inter", [])
        for field in [field for field in unused if self.list_fields.pop(field, None)]:
            self.inter_feat[field] = self.inter_feat[self.uid_field]
        super()._drop_unused_col()

    def inter_matrix(self, form: str = "coo", value_field: str | None = None) -> Any:
        """As RecBole's: it reads a user's first item from the first place of a list."""
        with_first_item = self.copy(self._with_lists(self.inter_feat, width=1))
        return super(LeanSequentialDataset, with_first_item).inter_matrix(form, value_field)

    # Training rows

    def build(self) -> list[LeanSequentialDataset]:
        """Split as RecBole does; the training split then makes its batches from `windows`."""
        datasets = super().build()
        train = datasets[0]
        if len(train) == 0:
            raise ValueError(f"eval_args: {self.config['eval_args']} leaves no training row")
        if TARGET_ROW not in train.inter_feat:
            width = train.inter_feat[self.item_id_list_field].size(1)
            if width > self.max_item_list_len:
                raise ValueError(
                    f"MAX_ITEM_LIST_LENGTH: {self.max_item_list_len} is less than the {width} items of the longest "
                    f"list in the benchmark files; raise it or cut the lists with seq_len"
                )
        if self.config["train_targets"] == "all":
            rows = train.inter_feat
            train.windows = np.flatnonzero(self._starts_window(rows) if TARGET_ROW in rows else self._is_longest(rows))
        if self.config["train_batch_size"] == "auto":
            self.config["train_batch_size"] = train._sequences_per_batch()
        return datasets

    @property
    def window_step(self) -> int:
        """Targets from one window to the next."""
        return -(-self.max_item_list_len // 2)

    def _starts_window(self, rows: Interaction) -> np.ndarray:
        """Rows a multiple of window_step before the user's last training target, down to the first that is not full."""
        uid, target = rows[self.uid_field].numpy(), rows[TARGET_ROW].numpy()
        last = np.zeros(self.user_num, dtype=np.int64)
        np.maximum.at(last, uid, target)
        before = last[uid] - target
        reaches = rows[self.item_list_length_field].numpy() >= self.max_item_list_len - self.window_step
        return (before % self.window_step == 0) & (reaches | (before == 0))

    def _target_counts(self, rows: Interaction) -> torch.Tensor:
        """How many of its last positions each window trains: those of a full one that the window before does not."""
        length = rows[self.item_list_length_field]
        if TARGET_ROW not in self.inter_feat:
            return length
        return length.where(length < self.max_item_list_len, self.window_step)

    @property
    def n_targets(self) -> int:
        """Targets of the rows that make batches."""
        return len(self) if self.windows is None else int(self._target_counts(self.inter_feat[self.windows]).sum())

    def _sequences_per_batch(self) -> int:
        """As many rows as have TARGETS_PER_BATCH targets on average."""
        if self.windows is None:
            return RECBOLE_BATCH_SIZE
        return max(1, round(TARGETS_PER_BATCH * len(self) / self.n_targets))

    def target_capacity(self, rows: int) -> int | None:
        """Targets that a batch of `rows` random rows practically never exceeds: six deviations above their mean.

        None where each row has one.
        """
        if self.windows is None:
            return None
        counts = self._target_counts(self.inter_feat[self.windows]).double()
        deviation = counts.std(correction=0) * rows**0.5
        most = counts.topk(min(rows, len(counts))).values.sum()
        return math.ceil(min(rows * counts.mean() + 6 * deviation, most))

    def _is_longest(self, rows: Interaction) -> np.ndarray:
        """Rows of pre-split files that no other row of the same user goes on from."""
        lists = rows[self.item_id_list_field]
        length = rows[self.item_list_length_field]
        full = torch.cat([lists, lists.new_zeros(len(lists), 1)], dim=1)
        full.scatter_(1, length[:, None], rows[self.iid_field][:, None])  # history and target
        keys = {
            (user, items[:size].tobytes())
            for user, items, size in zip(rows[self.uid_field].tolist(), lists.numpy(), length.tolist(), strict=True)
        }
        return np.array(
            [
                (user, items[: size + 1].tobytes()) not in keys
                for user, items, size in zip(rows[self.uid_field].tolist(), full.numpy(), length.tolist(), strict=True)
            ]
        )
