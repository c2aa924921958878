"""RecBole's Trainer with the training loop, resuming and full ranking that large catalogues need."""

from __future__ import annotations

import math
import random
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.trainer.trainer import Trainer
from recbole.utils import EvaluatorType, get_gpu_usage, set_color
from torch import distributed
from torch.nn.utils.clip_grad import clip_grad_norm_
from tqdm import tqdm

from recbole_cce.data.dataset import RESIDENT_SHARE, ROW_NUMBER, LeanSequentialDataset
from recbole_cce.distributed import reductions
from recbole_cce.errors import UserError
from recbole_cce.nn import repeats
from recbole_cce.nn.batch import Counts
from recbole_cce.nn.losses.loss_sum import LossSum
from recbole_cce.training import average, checkpoint, interrupts, out_of_memory
from recbole_cce.training.batch_model import BatchModel
from recbole_cce.training.evaluation import TopK, auto_chunk_items, top_items, user_vectors
from recbole_cce.training.graph import GraphedStep, on_device
from recbole_cce.training.memory import MOMENTS
from recbole_cce.training.step_plan import StepPlan

# of checkpoint_interval: auto; at most this much of the time of a run, the first file being expected to take as long as
# a good disk needs for its bytes
SHARE_OF_SAVING, DISK = 0.05, 1e9


class EfficientTrainer(Trainer):
    """Trainer of SASRecCCE and SASRecSCE.

    What differs from RecBole's: autocast in `amp_dtype`, gradients unscaled before they are clipped, no wait of its
    own for the device in a step, batches made on the GPU from row numbers, small steps launched as one CUDA graph
    (`cuda_graph`), torch.compile of the encoder (`compile_encoder`), weights averaged over the last part of training
    (`weight_average`), checkpoints from which a run goes on exactly, full ranking in chunks of `eval_chunk_items`,
    metrics over the users of all processes.

    Of a model it needs, besides what RecBole's does: `loss`, one of LOSSES, `loss_sum` and `batch` of a BatchModel,
    `item_embedding`, and `forward` of lists and lengths that gives vectors whose inner products with `item_embedding`
    are the scores.
    """

    def __init__(self, config: Config, model: Any) -> None:
        super().__init__(config, model)
        needed = self.eval_collector.register.need
        if max(config["topk"]) >= model.n_items and (needed("rec.items") or needed("rec.topk")):
            raise UserError(
                f"topk: {config['topk']} is not valid; it takes at most {model.n_items - 1}, the number of items"
            )
        if config["exclude_seen"] and self.eval_collector.needs_scores():
            raise UserError(
                "exclude_seen: True is not valid with metrics: GAUC, which looks at the scores of all items"
            )
        self.amp_dtype = autocast_dtype(config["amp_dtype"], self.device, config["enable_amp"])
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.amp_dtype == torch.float16 or bool(config["enable_scaler"])
        )
        self.distributed = not config["single_spec"]
        if self.distributed:
            # it has made the processes begin with the same parameters; what it would do to gradients is done here
            del self.distributed_model
        self.accumulate_steps: int = config["accumulate_steps"] or 1
        share = average.share(config["weight_average"], sum(each.numel() for each in model.parameters()))
        self.average = None if share is None else average.WeightAverage(model, share)
        self.plan: StepPlan  # made with them
        self.prepared_for: tuple[Any, Callable | None] | None = None  # loader and loss that the next five belong to
        self.graphed_step: GraphedStep | None = None
        self.n_targets = 0
        self.resident: LeanSequentialDataset | None = None  # makes batches on the GPU
        self.sizes: torch.Tensor | None = None  # of the rows of the training data, on the CPU
        self.train_generator: torch.Generator | None = None
        self.random_states: list[dict[str, Any]] = []  # of each process
        self.resumed: dict[str, Any] | None = None
        self.valid_result: dict[str, float] | None = None
        self.best_valid_result: dict[str, float] | None = None
        self.saves, self.fit_begun = False, -math.inf
        self.trained_epoch = self.saved_epoch = self.fitted_epoch = -1
        self.writer = checkpoint.Writer()
        self.best_state: dict[str, Any] | None = None  # of the best epoch, where it is still to be written
        self.at_risk = False  # an epoch has been trained that is not saved
        self.signal: int | None = None  # that asked to end while it was
        self.newest: tuple[Path, int] | None = None  # file of this run, and its epoch
        self.fitting = False

    def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super()._build_optimizer(**kwargs)
        if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and self.device.type == "cuda":
            for group in optimizer.param_groups:
                group["fused"] = True  # one kernel, which passes once over the item table and its moments
            optimizer = type(optimizer)(optimizer.param_groups, fused=True)
        betas = self.config["adam_betas"]
        if betas is not None:
            for group in optimizer.param_groups:
                group["betas"] = tuple(betas)
        return optimizer

    def _train_epoch(
        self,
        train_data: Any,
        epoch_idx: int,
        loss_func: Callable[[Interaction], torch.Tensor] | None = None,
        show_progress: bool = False,
    ) -> float:
        """One epoch; returns the sum of the batch losses, as RecBole logs it.

        Raises:
            torch.OutOfMemoryError: says which settings to lower, and to what.
            UserError: a loss was NaN; names the first such step. The last checkpoint is from before.
        """
        self._save_last()  # the epoch before: only now its validation is over
        if self.average is not None:
            self.average.hide()
        self.model.train()
        if self.distributed and train_data.shuffle:
            train_data.sampler.set_epoch(epoch_idx)
        self._prepare(train_data, loss_func)
        progress = tqdm(
            self._batches(train_data),
            total=len(train_data),
            ncols=100,
            desc=set_color(f"Train {epoch_idx:>5}", "pink"),
            disable=not show_progress,
        )
        losses, remaining = [], iter(progress)
        while batches := list(islice(remaining, self.accumulate_steps)):
            counts = [self._counts(train_data, interaction) for interaction in batches]
            try:
                losses.append(self._step(batches, counts, loss_func))
            except torch.OutOfMemoryError as error:
                memory = out_of_memory.usage(error, self.device)
                model = type(self.model), self.model.n_items - 1
                advice = out_of_memory.training_advice(self.config, *model, self.plan, *memory)
                raise torch.OutOfMemoryError(f"{error}\nOut of memory in training: {advice}") from error
            if self.gpu_available and show_progress:
                progress.set_postfix_str(set_color("GPU RAM: " + get_gpu_usage(self.device), "yellow"), refresh=False)
        means, statistics = reductions.epoch_of(losses, self.distributed)
        if means.isnan().any():
            step = int(means.isnan().nonzero()[0])
            raise UserError(f"training loss is nan in epoch {epoch_idx}, first at step {step} of {len(means)}")
        if self.average is not None:
            self.average.show()
        for name, value in statistics.items():
            self.logger.info(
                set_color(f"epoch {epoch_idx} {self.model.loss_type}", "green")
                + f" [{set_color(name, 'blue')}: {value:.4f}]"
            )
            self.tensorboard.add_scalar(f"Loss/{name}", value, epoch_idx)
        self.trained_epoch, self.at_risk = epoch_idx, self.saves
        return means.sum().item()

    def _generate_train_loss_output(self, epoch_idx: int, s_time: float, e_time: float, losses: float) -> str:
        """RecBole's line with the speed over all processes and, on a GPU, the memory allocated at most so far."""
        line = super()._generate_train_loss_output(epoch_idx, s_time, e_time, losses)
        speed = self.n_targets / (e_time - s_time)
        self.tensorboard.add_scalar("Speed/targets per second", speed, epoch_idx)
        extra = f", {set_color('targets/s', 'blue')}: {speed:.0f}"
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            self.tensorboard.add_scalar("Memory/peak GiB", peak, epoch_idx)
            extra += f", {set_color('peak GPU memory', 'blue')}: {peak:.2f} GiB"
        return line[:-1] + extra + "]"

    def _step(
        self,
        batches: list[Interaction],
        counts: list[Counts],
        loss_func: Callable[[Interaction], torch.Tensor] | None = None,
    ) -> LossSum:
        """One step of the optimizer on all `batches` together, which are on the CPU; their loss, on the device.

        The gradient is that of the mean over the positions of all of them, and of all processes: as if they were one
        batch. A loss that knows only afterwards how many positions it counts (`counts_targets`) is divided by the
        number of targets first.
        """
        if self.graphed_step:
            loss = self.graphed_step(batches[0], counts[0])
        elif len(batches) == 1:
            self.optimizer.zero_grad()
            loss = self._forward_backward(loss_func, on_device(batches[0], self.device), counts[0])
        else:
            loss = self._accumulate(batches, counts, loss_func)
        if self.distributed:
            reductions.sum_gradients(self.model.parameters())
        if self.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.step()
        return loss

    def _accumulate(
        self,
        batches: list[Interaction],
        counts: list[Counts],
        loss_func: Callable[[Interaction], torch.Tensor] | None,
    ) -> LossSum:
        """The same of several batches: the gradients of one after another are added up."""
        self.optimizer.zero_grad()
        targets = torch.full((), sum(count.targets for count in counts), device=self.device)
        total = reductions.sum_over_processes(targets, self.distributed)
        parts = [
            self._forward_backward(loss_func, on_device(interaction, self.device), count, total)
            for interaction, count in zip(batches, counts, strict=True)
        ]
        loss = LossSum.total(parts)
        if self._has_sums(loss_func) and not self.model.loss.counts_targets:
            counted = reductions.sum_over_processes(loss.count, self.distributed)
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, total / counted.clamp(min=1))
        return loss

    def _forward_backward(
        self,
        loss_func: Callable[[Interaction], torch.Tensor] | None,
        interaction: Interaction,
        counts: Counts,
        total: torch.Tensor | None = None,
    ) -> LossSum:
        """The loss of a batch on the device; its gradients, divided by `total`, are added to the parameters'.

        Args:
            total: positions that the step's mean is over; None: those of this batch, in all processes.
        """
        if ROW_NUMBER in interaction:
            assert self.resident is not None  # it has given the numbers
            interaction = self.resident.batch(interaction[ROW_NUMBER])
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype != torch.float32):
            loss = self._loss_sum(loss_func, interaction, counts)
        if total is None:
            total = reductions.sum_over_processes(loss.count, self.distributed)
        self.scaler.scale(loss.over(total)).backward()
        return loss.detached()

    def _loss_sum(
        self, loss_func: Callable[[Interaction], torch.Tensor] | None, interaction: Interaction, counts: Counts
    ) -> LossSum:
        """What the model says of a batch; a function of RecBole's kind gives the mean over its targets."""
        if self._has_sums(loss_func):
            return self.model.loss_sum(self.model.batch(interaction, counts), self.plan.packed, self.plan.compiled)
        mean = (loss_func or self.model.calculate_loss)(interaction)
        return LossSum(mean, torch.full((), counts.targets, device=self.device))

    def _has_sums(self, loss_func: Callable[[Interaction], torch.Tensor] | None) -> bool:
        """Whether steps take a BatchModel's loss_sum(): where nobody gave another calculate_loss()."""
        function = getattr(self.model.calculate_loss, "__func__", None)
        return loss_func is None and function is BatchModel.calculate_loss

    def _prepare(self, train_data: Any, loss_func: Callable[[Interaction], torch.Tensor] | None) -> None:
        """Decide how steps are made, where the loader or the loss are not those of the epoch before."""
        if self.prepared_for == (train_data, loss_func):
            return
        self.prepared_for = self.graphed_step = None  # a graph reads the table that is freed next
        self._make_resident(train_data)
        self.plan = StepPlan.made(self.config, self.model.loss, train_data, self.device, self.distributed)
        if self.plan.captured:
            self.graphed_step = self._make_graphed_step(loss_func)
        self.prepared_for = train_data, loss_func

    def _make_resident(self, train_data: Any) -> None:
        """Count the training data; put them into the memory of the GPU, where batches are then made, if they fit well.

        A data set of one's own that makes its rows in another way, and worker processes, make them on the CPU.
        """
        data = train_data.dataset
        self.n_targets = data.n_targets
        self.resident = self.sizes = None
        if type(data).__getitem__ is LeanSequentialDataset.__getitem__:
            self.sizes = data.sizes()
            on_gpu = self.device.type == "cuda" and train_data.num_workers == 0
            self.resident = data.on_device(self.device) if on_gpu else None

    def _batches(self, train_data: Any) -> Iterator[Interaction]:
        """What the loader gives, or only the numbers of its rows, in the same order."""
        batches = iter(train_data)  # draws a random number; the order only with its first batch
        if self.resident is None:
            return batches
        # not through the loader's lists of numbers, which take as long as a small step
        order = iter(train_data.sampler)
        rows = (np.fromiter(islice(order, train_data.batch_size), dtype=np.int64) for _ in count())
        return (Interaction({ROW_NUMBER: torch.from_numpy(some) + 1}) for some in takewhile(len, rows))

    def _counts(self, train_data: Any, interaction: Interaction) -> Counts:
        """Of a batch on the CPU."""
        if ROW_NUMBER in interaction:
            assert self.sizes is not None
            return Counts(*self.sizes[:, interaction[ROW_NUMBER] - 1].sum(1).tolist())
        return train_data.dataset.counts(interaction)

    def _make_graphed_step(self, loss_func: Callable[[Interaction], torch.Tensor] | None) -> GraphedStep:
        def step(interaction: Interaction, counts: Counts) -> LossSum:
            self.optimizer.zero_grad()
            return self._forward_backward(loss_func, interaction, counts)

        return GraphedStep(self.model, step, self.plan.rows, self.plan.counts)

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[float, dict[str, float]]:
        """As RecBole's, and the last epoch is saved besides the best one; Ctrl-C and SIGTERM lose no whole epoch.

        After resume_checkpoint, data order and random numbers go on where they stopped.
        """
        self.saves, self.signal, self.fit_begun = saved, None, time.monotonic()
        self.train_generator = train_data.generator
        if self.distributed:
            checkpoint.share_file_name(self)
        if self.resumed is not None:
            self._resume_random_state(self.resumed["random_states"] or [])
            if self.resumed["scaler"]:  # empty where none was needed
                self.scaler.load_state_dict(self.resumed["scaler"])
            if (best := self.resumed["best_valid_result"]) is not None:
                self.valid_result = self.best_valid_result = OrderedDict(best)  # as RecBole's evaluator makes it
            if self.cur_step > self.stopping_step:
                self.epochs = self.start_epoch
                self.logger.info(
                    f"It had stopped early: with stopping_step {self.stopping_step}, nothing is left to train"
                )
            self.resumed = None
        self.fitting = True
        try:
            with interrupts.answered(self._interrupted):
                try:
                    result = super().fit(train_data, valid_data, verbose, saved, *args, **kwargs)
                    self._save_last(at_once=True)
                    self.writer.wait()
                except BaseException:
                    self._write_what_is_left()
                    raise
        finally:
            self.fitting = False
        if self.distributed:
            distributed.barrier()  # the others read what the first one has written
        return result

    def _resume_random_state(self, states: list[dict[str, Any]]) -> None:
        rank, processes = (distributed.get_rank(), distributed.get_world_size()) if self.distributed else (0, 1)
        if len(states) == processes:
            set_random_state(states[rank], self.device, self.train_generator)
        else:
            self.logger.warning(
                f"the checkpoint has the random numbers of {len(states)} processes, these are {processes}: training "
                "goes on with others"
            )

    @torch.no_grad()
    def _fit_repeats(self, limit: int) -> float:
        """Fit the model's `repeat_bias` to `limit` training targets, in the mode in which their loss was made small.

        Without dropout a model is surer of itself, and its numbers would answer that too.

        Returns:
            The share of these targets that their users had before; 0 where no term is wanted.
        """
        if not repeats.wanted(self.config) or self.config["exclude_seen"] or self.prepared_for is None:
            return 0.0
        self.fitted_epoch = self.trained_epoch
        data = self.prepared_for[0].dataset
        self.model.train()
        rows = data.some_targets(limit)
        target, history = rows[data.iid_field], data.history(rows)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config["seed"])
            vectors = user_vectors(self.model, rows)
        bias = repeats.fit(self.model, vectors, target.to(self.device), history).to(self.device)
        if self.distributed:  # devices may round in their own ways, and one model has one term
            distributed.broadcast(bias, 0)
        self.model.repeat_bias = bias.cpu()
        self.logger.info(set_color("own items", "blue") + f": {repeats.described(self.model.repeat_bias)}")
        return int((history.item == target[history.row]).sum()) / len(target)

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> tuple[float, dict[str, float]]:
        # as many rows as take as long as the validation at most
        returned = self._fit_repeats(min(repeats.ROWS, valid_data.sample_size))
        score, result = super()._valid_epoch(valid_data, show_progress)
        if self.config["repeat_bias"] == "auto" and returned >= repeats.OFTEN:
            learned, self.model.repeat_bias = self.model.repeat_bias, torch.zeros_like(self.model.repeat_bias)
            without, result_without = super()._valid_epoch(valid_data, show_progress)
            if without > score if self.valid_metric_bigger else without < score:
                self.logger.info(set_color("own items", "blue") + ": ranked as all others, which validates better")
                score, result = without, result_without
            else:
                self.model.repeat_bias = learned
        # RecBole saves a checkpoint when this result is the best, before it calls it so
        self.valid_result = result.copy()
        return score, result

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Save an epoch, as RecBole asks for it where it was the best; every process calls it, the first one writes.

        In fit() the best epoch is kept in memory where it is too early for another file, and files are written while
        training goes on.
        """
        if epoch < 0 < self.start_epoch:
            return  # no epoch is left of a resumed run: RecBole would write its file anew, as one of no epoch
        best, last = Path(self.saved_model_file), checkpoint.last_file(self.saved_model_file)
        file = kwargs.get("saved_model_file", best)
        if file == best:
            self.best_valid_result = self.valid_result
            if self.fitted_epoch != self.trained_epoch:  # nothing is validated
                self._fit_repeats(repeats.ROWS)
        state = random_state(self.device, self.train_generator)
        self.random_states = [state]
        if self.distributed:
            checkpoint.share_file_name(self)
            self.random_states = [state] * distributed.get_world_size()
            distributed.all_gather_object(self.random_states, state)
        self.saved_epoch = epoch
        if self.config["local_rank"] != 0:
            return
        state = checkpoint.plain(self._checkpoint_state(epoch))
        if file != best:
            self._write(state, last)
        elif self.fitting and not self._is_due():
            self.best_state = checkpoint.copied(state, self._device_of_copy(state))
        else:
            self.best_state = None
            self._write(state, best, then_remove=last)
            if verbose:
                self.logger.info(set_color("Saving current", "blue") + f": {best}")

    def _write(self, state: dict[str, Any], file: Path, then_remove: Path | None = None) -> None:
        self.writer.write(state, file, then_remove)
        self.newest = file, state["epoch"]
        if not self.fitting:
            self.writer.wait()

    def _write_best(self) -> None:
        """Write the best epoch if it was too early for it."""
        state, self.best_state = self.best_state, None
        if state is not None:
            self._write(state, Path(self.saved_model_file), checkpoint.last_file(self.saved_model_file))

    def _write_what_is_left(self) -> None:
        """The same, and wait for it, where an error or a signal ends training."""
        try:
            self._write_best()
            self.writer.wait()
        except Exception as error:
            self.logger.warning(f"not all checkpoints could be written: {error}")

    def _is_due(self) -> bool:
        """Whether `checkpoint_interval` is over.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        interval, busy = self.config["checkpoint_interval"], self.writer.is_busy()
        begun = self.writer.begun
        if interval in (None, "auto"):
            if begun == -math.inf:  # nothing has been written
                begun, seconds = self.fit_begun, self._bytes_of_state() / DISK
            else:
                seconds = self.writer.seconds
            interval = math.inf if busy else seconds / SHARE_OF_SAVING
        return time.monotonic() - begun >= interval

    def _bytes_of_state(self) -> int:
        """Of a checkpoint: parameters, what the optimizer keeps of each, and the running weights beside an average."""
        copies = 1 + MOMENTS.get(str(self.config["learner"]).lower(), 2) + (self.average is not None)
        return copies * sum(parameter.nbytes for parameter in self.model.parameters())

    def _device_of_copy(self, state: dict[str, Any]) -> torch.device | None:
        """None, for the device itself, where it can spare the memory: to the host it takes as long as some epochs."""
        if self.device.type != "cuda":
            return None
        needed = sum(value.nbytes for value in tensors_in(state))
        return None if needed <= RESIDENT_SHARE * torch.cuda.mem_get_info(self.device)[0] else torch.device("cpu")

    def _save_last(self, at_once: bool = False) -> None:
        """Save the last epoch, beside the best one unless that is the same: when it is due, at once, or on a signal."""
        if not self.saves:
            return
        due, signals, kept = at_once or self._is_due(), [self.signal], self.best_state is not None
        if self.distributed:
            answers = [(due, self.signal, kept)] * distributed.get_world_size()
            distributed.all_gather_object(answers, answers[0])
            (due, _, kept), signals = answers[0], [number for _, number, _ in answers]
        number = next((number for number in signals if number is not None), None)
        if due or number is not None:
            self._write_best()
            if self.trained_epoch != self.saved_epoch:
                last = checkpoint.last_file(self.saved_model_file)
                self._save_checkpoint(self.trained_epoch, verbose=False, saved_model_file=last)
            self.at_risk = False
        else:
            self.at_risk = kept or self.trained_epoch != self.saved_epoch
        if number is not None:
            self._interrupted(number)

    def _interrupted(self, number: int, frame: Any = None) -> None:
        """Ctrl-C or SIGTERM: end at once where every epoch is saved; if not, after this one, or the second time.

        Ctrl-C reaches all processes of a terminal, and the first of them then ends the others with SIGTERM: that is
        not the second time.
        """
        if self.at_risk and self.signal != number:
            self.signal = number
            return
        for each in interrupts.SIGNALS:  # what is being written becomes whole
            if signal.getsignal(each) == self._interrupted:
                signal.signal(each, signal.SIG_IGN)
        self._write_what_is_left()
        if self.newest is None:
            text = "interrupted: no epoch was over, nothing is saved"
        else:
            text = "interrupted: the same command with --resume={} goes on after epoch {}".format(*self.newest)
        if self.config["local_rank"] == 0:
            print(f"\n{text}" if self.config["show_progress"] else text, file=sys.stderr)
        interrupts.end(number, text)

    def _checkpoint_state(self, epoch: int) -> dict[str, Any]:
        return checkpoint.state_of(self, epoch) | {
            "scaler": self.scaler.state_dict(),
            "random_states": self.random_states,
            "best_valid_result": self.best_valid_result,
            "weight_average": self.average and self.average.state(),
        }

    def resume_checkpoint(self, resume_file: str) -> None:
        """Load a checkpoint, of the best or of the last epoch, to go on with fit().

        Raises:
            UserError: it is damaged, one of another run (names the first key), or the best epoch's file is gone.
        """
        best = checkpoint.best_file(resume_file)
        try:
            state = super().resume_checkpoint(resume_file)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):  # torch's, of parameters that differ in name or shape
                raise
            raise UserError(f"{resume_file} does not fit this model's settings: {error}") from error
        if state.get("best_valid_result") is not None and not best.is_file():
            raise UserError(f"{resume_file} needs {best} beside it, the best epoch of the same run")
        if (averaged := state.get("weight_average")) is not None:
            if self.average is None:
                average.load_running(self.model, averaged)
            else:
                self.average.load(averaged)
        self.saved_model_file = str(best)
        self.trained_epoch = self.saved_epoch = state["epoch"]
        self.newest = Path(resume_file), state["epoch"]
        self.resumed = {key: state.get(key) for key in ("random_states", "scaler", "best_valid_result")}

    def evaluate(self, eval_data: Any, *args: Any, **kwargs: Any) -> dict[str, float] | None:
        """As RecBole's; ranking metrics of several processes are computed over all their users together.

        Raises:
            torch.OutOfMemoryError: says which settings to lower, and to what.
        """
        if eval_data:
            self.eval_collector.n_samples = eval_data.sample_size
            self.evaluated = eval_data.dataset
        try:
            return super().evaluate(eval_data, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            chunk_items = self.config["eval_chunk_items"]
            if chunk_items == "auto":
                chunk_items = auto_chunk_items(self.config["eval_batch_size"])
            advice = out_of_memory.evaluation_advice(
                self.config,
                self.model,
                min(chunk_items, self.model.n_items),
                self.eval_collector.needs_scores(),
                *out_of_memory.usage(error, self.device),
            )
            raise torch.OutOfMemoryError(f"{error}\nOut of memory in evaluation: {advice}") from error

    def _map_reduce(self, result: dict[str, float], num_sample: int) -> dict[str, float]:
        # RecBole's average over the processes: only value metrics still need one
        return result if self.config["eval_type"] == EvaluatorType.RANKING else super()._map_reduce(result, num_sample)

    def _full_sort_batch_eval(
        self, batched_data: tuple
    ) -> tuple[Interaction, TopK | torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.eval_collector.needs_scores():
            return super()._full_sort_batch_eval(batched_data)
        interaction, _, positive_u, positive_i = batched_data
        exclude_seen = self.config["exclude_seen"]
        with_history = exclude_seen or repeats.wanted(self.config)
        _, items = top_items(
            self.model,
            interaction,
            max(self.config["topk"]),
            self.config["eval_chunk_items"],
            self.evaluated.history(interaction) if with_history else None,
            exclude_seen,
        )
        return interaction, TopK(items), positive_u, positive_i


def autocast_dtype(amp_dtype: str, device: torch.device, enable_amp: bool | None) -> torch.dtype:
    """What `amp_dtype` means on a device; float32 is no autocast. RecBole's enable_amp asks for some autocast."""
    if amp_dtype != "auto":
        return getattr(torch, amp_dtype)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if enable_amp:
        return torch.float16 if device.type == "cuda" else torch.bfloat16
    return torch.float32


def tensors_in(state: Any) -> Iterator[torch.Tensor]:
    """Those of a checkpoint."""
    if isinstance(state, torch.Tensor):
        yield state
    for item in state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ():
        yield from tensors_in(item)


def random_state(device: torch.device, generator: torch.Generator | None) -> dict[str, Any]:
    """The state of every random number generator that training uses, in types that torch.load reads safely."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "train_data": None if generator is None else generator.get_state(),
    }


def set_random_state(state: dict[str, Any], device: torch.device, generator: torch.Generator | None) -> None:
    """Undo random_state()."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    if state["train_data"] is not None and generator is not None:
        generator.set_state(state["train_data"])
