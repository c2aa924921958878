"""A sequential data set without augmentation copies, and rows that train every position.

RecBole writes one row per target and copies the user's history into it: [interactions, MAX_ITEM_LIST_LENGTH] for
every field. Here the interactions stay in one flat table, sorted by user and time; a row only knows where its target
is in it and how long its history is, and the lists are gathered when a batch is built. RecBole's splitters only index
rows, so each split holds the rows it holds in stock RecBole.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.api.types import union_categoricals
from recbole.config import Config
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_cce.data import auto, downloads
from recbole_cce.data.rows import TARGET_ROW, Gathered, Rows
from recbole_cce.data.sources import cache
from recbole_cce.errors import UserError
from recbole_cce.nn import repeats
from recbole_cce.nn.batch import Counts
from recbole_cce.nn.history import History, UserHistories, listed

# Field of a training batch: how many of a row's last positions are trained.
TARGET_COUNT = "target_count"
# Only field of a batch that is made on a GPU: the number of each row from 1 on, 0 for a row of padding.
ROW_NUMBER = "row_number"
# The most of a GPU's free memory that the data may take.
RESIDENT_SHARE = 1 / 8


def in_order(numbers: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the doubles: torch sorts integers by radix, several times as fast."""
    bits = (numbers.double() + 0.0).view(torch.int64)  # -0.0, which equals 0.0, becomes it
    return bits ^ ((bits >> 63) & (2**63 - 1))  # the bits of a negative one count down


class LeanSequentialDataset(SequentialDataset):
    """RecBole's SequentialDataset with histories gathered on demand.

    `train_targets: all` keeps of the training split, for each user, its longest row and, where that does not hold the
    history, windows of MAX_ITEM_LIST_LENGTH before it. Windows overlap by half, and of a full one the last half is
    trained: every target is predicted once an epoch, and never from less than half of the history that a test row
    would show. `train_targets: last` keeps RecBole's rows. Validation and test rows are RecBole's in both.

    Attributes:
        flat: all interactions, sorted by user and time.
        list_fields: name of each list field -> the flat field it is gathered from.
        time_rank: [interactions] the order of their times before RecBole's cast to float32, which confuses neighbours;
            None in pre-split files.
        windows: the rows of a training split that make batches, or None for all of them; a tensor on a GPU.
            `inter_feat` holds all rows either way, so that counts and RecBole's statistics do not depend on
            `train_targets`.
    """

    config: Any
    inter_feat: Any
    OWN_FIELDS = (TARGET_ROW, TARGET_COUNT, ROW_NUMBER)  # no column of a file may have these names

    def __init__(self, config: Config) -> None:
        self.flat: Interaction | None = None
        self.time_rank: torch.Tensor | None = None
        self.list_fields: dict[str, str] = {}
        self.windows: np.ndarray | torch.Tensor | None = None
        super().__init__(config)

    def _reset_index(self) -> None:
        if self.inter_feat.empty:
            filters = ("user_inter_num_interval", "item_inter_num_interval", "val_interval", "rm_dup_inter")
            raise UserError(
                f"no interaction of {self.dataset_name} is left after filtering with "
                + ", ".join(f"{name}: {self.config[name]!r}" for name in filters)
            )
        super()._reset_index()

    # Large files: what RecBole does for each interaction in Python, by columns

    def _concat_remaped_tokens(self, remap_list: list[tuple]) -> tuple[Any, np.ndarray]:
        """The tokens of all columns, one after another, and where each but the last one ends.

        Columns of categories stay categories, which pandas.factorize need not look into.
        """
        parts = [feat[field].array for feat, field, _ in remap_list]
        if all(isinstance(part, pd.Categorical) for part in parts):
            return union_categoricals(parts), np.cumsum([len(part) for part in parts])[:-1]
        return super()._concat_remaped_tokens(remap_list)

    @property
    def avg_actions_of_users(self) -> np.float64:
        """Interactions a user, of the users that have one."""
        return np.float64(len(self.inter_feat)) / self.inter_feat[self.uid_field].bincount().count_nonzero().item()

    @property
    def avg_actions_of_items(self) -> np.float64:
        """Interactions an item, of the items that have one."""
        return np.float64(len(self.inter_feat)) / self.inter_feat[self.iid_field].bincount().count_nonzero().item()

    # The table: made once, or read from the cache

    def _from_scratch(self) -> None:
        """Read the files, or the copy that an earlier run left (`cache_data`)."""
        self._get_preset()
        stored = None
        if type(self) is LeanSequentialDataset:  # a subclass may have no files, and keep more than the cache holds
            downloads.ensure(self, self._get_download_url)
            stored = cache.of(self)
        if stored is None:
            super()._from_scratch()
        elif not stored.read_into(self):
            config, self.config = self.config, cache.Reading(self.config)
            super()._from_scratch()
            config, self.config = self.config, config
            stored.write_from(self, config.values)

    @property
    def preloaded(self) -> dict[str, np.ndarray]:
        """Vectors of ids that `preload_weight` asks for, by the field of the ids."""
        return self._preloaded_weight

    @preloaded.setter
    def preloaded(self, vectors: dict[str, np.ndarray]) -> None:
        self._preloaded_weight = vectors

    def begin_restored(self) -> None:
        """Read the names of fields, before the cache puts in what they hold."""
        self._get_field_from_config()

    def end_restored(self) -> None:
        """Make what RecBole makes of the fields that are there now."""
        self._init_alias()
        self.feat_name_list = self._build_feat_name_list()

    def _data_processing(self) -> None:
        """Filter the frames and number their tokens, as RecBole does; then make tensors, sorted by user and time."""
        super()._data_processing()
        time = None
        if self.config["benchmark_filename"] is None:
            # RecBole sorts after its cast to float32, which cannot tell seconds since 1970 apart within 128 s.
            time = self.inter_feat[self.time_field]
            time = np.array(time.tolist())[:, 0] if time.dtype == object else time.to_numpy(copy=True)
        super(SequentialDataset, self)._change_feat_format()
        if time is not None:
            time = torch.from_numpy(time)
            by_time = in_order(time).argsort(stable=True)
            by_user = self.inter_feat[self.uid_field][by_time].argsort(stable=True)
            time = time[by_time]
            rank = torch.zeros(len(time), dtype=torch.int32)
            torch.cumsum(time[1:] != time[:-1], 0, out=rank[1:])
            self.time_rank = rank[by_user]
            self.inter_feat._reindex(by_time[by_user])

    def _benchmark_presets(self) -> None:
        """Name the lists of pre-split files, and count what is in each: here they are padded with 0."""
        for field in self.inter_feat:
            list_field = field + self.config["LIST_SUFFIX"]
            if list_field in self.inter_feat:
                setattr(self, f"{field}_list_field", list_field)
        self.set_field_property(self.item_list_length_field, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        self.inter_feat[self.item_list_length_field] = (self.inter_feat[self.item_id_list_field] > 0).sum(1)

    # Rows instead of copies

    def _change_feat_format(self) -> None:
        """Called by RecBole before it splits: only rows are left to make."""
        if self.config["benchmark_filename"] is None:
            self.data_augmentation()

    def data_augmentation(self) -> None:
        """Replace the interactions by rows: each interaction but a user's first is the target of one."""
        self._aug_presets()
        self.flat = self.inter_feat
        self.histories = UserHistories(self.flat[self.uid_field], self.flat[self.iid_field])
        self.list_fields = {
            getattr(self, f"{field}_list_field"): field for field in self.flat if field != self.uid_field
        }
        uid = self.flat[self.uid_field]
        count = uid.bincount()
        position = torch.arange(len(uid)) - (count.cumsum(0) - count)[uid]  # in the user's history
        target = position.nonzero().squeeze(1)
        if len(target) == 0:
            raise UserError(f"no user of {self.dataset_name} has two interactions: there is nothing to predict")
        table = self.flat.interaction | {self.item_list_length_field: position.clamp(max=self.max_item_list_len)}
        self.inter_feat = Rows(Gathered(table, {TARGET_ROW: target}, [*table, TARGET_ROW]))

    def _with_lists(self, rows: Interaction, width: int) -> Interaction:
        """Add the list fields, `width` long and padded with 0 on the right, to rows of inter_feat."""
        if TARGET_ROW not in rows:  # pre-split benchmark files bring their lists with them
            return rows
        assert self.flat is not None
        fields = dict(rows.interaction)
        end, length = fields.pop(TARGET_ROW)[..., None], fields[self.item_list_length_field][..., None]
        offset = torch.arange(width, device=end.device)
        padding = offset >= length
        index = (end - length + offset).masked_fill_(padding, 0)
        for list_field, field in self.list_fields.items():
            values = self.flat[field][index]
            fields[list_field] = values.masked_fill_(padding.view(padding.shape + (1,) * (values.dim() - 2)), 0)
        return Interaction(fields)

    def _with_lists_and_target_row(self, rows: Interaction) -> Interaction:
        """The same for history(), which looks up what came before the target's row, where there is one."""
        with_lists = self._with_lists(rows, self.max_item_list_len)
        if TARGET_ROW in rows:
            with_lists.update(Interaction({TARGET_ROW: rows[TARGET_ROW]}))
        return with_lists

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        """The rows with their lists, as RecBole's data set returns them."""
        if self.windows is not None:
            index = self.windows[index]
        of_index = self.inter_feat[index]
        rows = self._with_lists(of_index, self.max_item_list_len)
        if self.windows is not None:
            rows.update(Interaction({TARGET_COUNT: self._target_counts(rows)}))
        elif (self.config["exclude_seen"] or repeats.wanted(self.config)) and TARGET_ROW in of_index:
            rows.update(Interaction({TARGET_ROW: of_index[TARGET_ROW]}))
        return self.join(rows) if join else rows

    def history(self, rows: Interaction) -> History:
        """What the users of a batch had before the target, however long ago.

        Pre-split benchmark files show no more than the row's own list.
        """
        if TARGET_ROW not in rows:
            return listed(rows[self.item_id_list_field], rows[self.item_list_length_field])
        return self.histories.before(rows[TARGET_ROW])

    def history_lengths(self, users: torch.Tensor) -> torch.Tensor:
        """How many interactions each of `users` [U] has: none, where only a file of users names it.

        Raises:
            UserError: the interactions come from pre-split benchmark files.
        """
        return self._all_interactions()[self.uid_field].bincount(minlength=self.user_num)[users]

    def _all_interactions(self) -> Interaction:
        if self.flat is None:
            raise UserError("benchmark_filename: pre-split files do not tell a user's last interactions")
        return self.flat

    def latest(self, users: torch.Tensor) -> Interaction:
        """A row for each of `users` [U], as a test row of the next interaction would be: its list holds the last items.

        Raises:
            UserError: as history_lengths().
            ValueError: a user has no interaction.
        """
        count = self.history_lengths(users)
        if not count.all():
            raise ValueError(f"user {int(users[count == 0][0])} has no interaction")
        end = torch.searchsorted(self._all_interactions()[self.uid_field], users, right=True)
        length = count.clamp(max=self.max_item_list_len)
        rows = Interaction({self.uid_field: users, self.item_list_length_field: length, TARGET_ROW: end})
        return self._with_lists_and_target_row(rows)

    def some_targets(self, limit: int) -> Interaction:
        """Rows of at most `limit` random targets of a training split, always the same ones."""
        number = torch.arange(len(self.inter_feat))
        if len(number) > limit:
            number = torch.randperm(len(number), generator=torch.Generator().manual_seed(0))[:limit]
        return self._with_lists_and_target_row(self.inter_feat[number.numpy()])

    def __len__(self) -> int:
        return len(self.inter_feat if self.windows is None else self.windows)

    def sort(self, by: str | list[str], ascending: bool | list[bool] = True) -> None:
        """Sort the rows by a field; by time, it uses the timestamps before their cast to float32."""
        if by == self.time_field and ascending is True and TARGET_ROW in self.inter_feat:
            assert self.time_rank is not None
            self.inter_feat._reindex(self.time_rank[self.inter_feat[TARGET_ROW]].argsort(stable=True))
        else:
            super().sort(by, ascending)

    def _grouped_index(self, group_by_list: np.ndarray) -> list[np.ndarray]:
        """The rows of each user, users in the order of their first row; without RecBole's loop over rows."""
        order = torch.from_numpy(group_by_list).argsort(stable=True).numpy()
        key = group_by_list[order]
        groups = np.split(order, np.flatnonzero(key[1:] != key[:-1]) + 1)
        return sorted(groups, key=lambda group: group[0])

    def _split_index_by_leave_one_out(self, grouped_index: list[np.ndarray], leave_one_num: int) -> list[np.ndarray]:
        """Rows for training, and the last `leave_one_num` of each user, held out; without RecBole's loop over rows."""
        size = np.array([len(group) for group in grouped_index])
        index = np.concatenate(grouped_index)
        from_end = np.repeat(size.cumsum(), size) - np.arange(len(index))  # 1 for the last row of a user
        held_out = from_end <= np.repeat(np.minimum(leave_one_num, size - 1), size)
        part = np.where(held_out, leave_one_num + 1 - from_end, 0)
        return [index[part == number] for number in range(leave_one_num + 1)]

    def _drop_unused_col(self) -> None:
        # RecBole finds list fields in inter_feat: a stand-in lets it name and forget those that are unused
        unused = (self.config["unused_col"] or {}).get("inter", [])
        for field in [field for field in unused if self.list_fields.pop(field, None)]:
            self.inter_feat[field] = self.inter_feat[self.uid_field]
        super()._drop_unused_col()

    def inter_matrix(self, form: str = "coo", value_field: str | None = None) -> Any:
        """The sparse matrix of users and items; RecBole reads a user's first item from the first position of a list."""
        with_first_item = self.copy(self._with_lists(self.inter_feat, width=1))
        return super(LeanSequentialDataset, with_first_item).inter_matrix(form, value_field)

    # Training rows

    def build(self) -> list[LeanSequentialDataset]:
        """Split as RecBole does; the training split then makes its batches from `windows`."""
        datasets = super().build()
        train = datasets[0]
        if len(train) == 0:
            raise UserError(f"eval_args: {self.config['eval_args']} leaves no training row")
        if TARGET_ROW not in train.inter_feat:
            width = train.inter_feat[self.item_id_list_field].size(1)
            if width > self.max_item_list_len:
                raise UserError(
                    f"MAX_ITEM_LIST_LENGTH: {self.max_item_list_len} is less than the {width} items of the longest "
                    f"list in the benchmark files; raise it or cut the lists with seq_len"
                )
        if self.config["train_targets"] == "all":
            rows = train.inter_feat
            train.windows = np.flatnonzero(self._starts_window(rows) if TARGET_ROW in rows else self._is_longest(rows))
        auto.resolve(self.config, train)
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
        return length.masked_fill(length >= self.max_item_list_len, self.window_step)

    @property
    def n_targets(self) -> int:
        """Targets of the rows that make batches."""
        return int(self.sizes()[1].sum())

    def sizes(self) -> torch.Tensor:
        """[2, rows]: how many positions and how many targets each row that makes batches has."""
        if self.windows is None:
            length = self.inter_feat[self.item_list_length_field]
            return torch.stack([length, torch.ones_like(length)])
        rows = self.inter_feat[self.windows]
        return torch.stack([rows[self.item_list_length_field], self._target_counts(rows)])

    def counts(self, batch: Interaction) -> Counts:
        """Of a batch on the CPU."""
        length = batch[self.item_list_length_field]
        targets = int(batch[TARGET_COUNT].sum()) if TARGET_COUNT in batch else len(length)
        return Counts(int(length.sum()), targets)

    def capacity(self, rows: int) -> Counts:
        """Counts that a batch of `rows` random rows practically never exceeds: six deviations above the means."""

        def most(size: torch.Tensor) -> int:
            size = size.double()
            deviation = size.std(correction=0) * rows**0.5
            largest = size.topk(min(rows, len(size))).values.sum()
            return math.ceil(min(rows * size.mean() + 6 * deviation, largest))

        positions, targets = map(most, self.sizes())
        return Counts(positions, targets, fixed=True)

    # Batches made on a GPU

    def on_device(self, device: torch.device) -> LeanSequentialDataset | None:
        """A copy whose rows are gathered on a GPU, from a table there; of no use but batch().

        None where the table would take more than RESIDENT_SHARE of the free memory, the lists come from files, or
        batches have columns of other tables.
        """
        if self.flat is None or self.user_feat is not None or self.item_feat is not None:
            return None
        rows = self.inter_feat if self.windows is None else self.inter_feat[self.windows]
        columns = rows.interaction
        tensors = [*columns.table.values(), *columns.of_rows.values()]
        size = sum(values.numel() * values.element_size() for values in tensors)
        if device.type == "cuda" and size > RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            return None
        moved = copy.copy(self)
        table, of_rows = (
            {name: values.to(device) for name, values in part.items()} for part in (columns.table, columns.of_rows)
        )
        moved.flat = Interaction({name: table[name] for name in self.flat.interaction})
        moved.inter_feat = Rows(Gathered(table, of_rows, columns.names))
        if self.windows is not None:
            moved.windows = torch.arange(len(rows), device=device)  # no other row is there
        return moved

    def batch(self, number: torch.Tensor) -> Interaction:
        """The rows of ROW_NUMBER `number`, as the loader makes them; of 0, rows of zeros."""
        rows = self[(number - 1).clamp(min=0)]
        return Interaction(
            {
                field: values.masked_fill((number == 0).view(-1, *(1,) * (values.dim() - 1)), 0)
                for field, values in rows.interaction.items()
            }
        )

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
