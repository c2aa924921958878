"""RecBole's Trainer with the training loop, resuming and full ranking that large catalogues need."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.trainer.trainer import Trainer
from recbole.utils import get_gpu_usage, set_color
from torch import nn
from torch.nn.utils.clip_grad import clip_grad_norm_
from tqdm import tqdm

from recbole_cce.compat import checkpoint_state
from recbole_cce.evaluation import TopK, auto_chunk_items, chunked_topk


class EfficientTrainer(Trainer):
    """Trainer of SASRecCCE and SASRecSCE.

    What differs from RecBole's: autocast in `amp_dtype`, gradients unscaled before they are clipped, no wait for the
    device in a step, checkpoints from which a run goes on exactly, full ranking in chunks of `eval_chunk_items`.
    """

    def __init__(self, config: Config, model: nn.Module) -> None:
        super().__init__(config, model)
        self.amp_dtype = autocast_dtype(config["amp_dtype"], self.device, config["enable_amp"])
        self.scaler = torch.amp.GradScaler(
            self.device.type,
            enabled=self.device.type == "cuda" and (self.amp_dtype == torch.float16 or config["enable_scaler"]),
        )
        self.train_generator: torch.Generator | None = None
        self.resumed: dict[str, Any] | None = None
        self.valid_result: dict[str, float] | None = None

    def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super()._build_optimizer(**kwargs)
        for group in optimizer.param_groups:
            if "betas" in group and self.config["adam_betas"] is not None:
                group["betas"] = tuple(self.config["adam_betas"])
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
            ValueError: a loss was NaN; names the first such step. Parameters are then NaN too.
        """
        self.model.train()
        loss_func = loss_func or self.model.calculate_loss
        distributed = not self.config["single_spec"]
        if distributed and train_data.shuffle:
            train_data.sampler.set_epoch(epoch_idx)
        progress = tqdm(
            train_data,
            total=len(train_data),
            ncols=100,
            desc=set_color(f"Train {epoch_idx:>5}", "pink"),
            disable=not show_progress,
        )
        losses = []
        for interaction in progress:
            interaction = interaction.to(self.device)
            self.optimizer.zero_grad()
            if distributed:
                self.set_reduce_hook()
            with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype != torch.float32):
                loss = loss_func(interaction)
            losses.append(loss.detach())
            if distributed:
                loss = loss + self.sync_grad_loss()
            self.scaler.scale(loss).backward()
            if self.clip_grad_norm:
                self.scaler.unscale_(self.optimizer)
                clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.gpu_available and show_progress:
                progress.set_postfix_str(set_color("GPU RAM: " + get_gpu_usage(self.device), "yellow"), refresh=False)
        losses = torch.stack(losses).double().cpu()
        if losses.isnan().any():
            step = int(losses.isnan().nonzero()[0])
            raise ValueError(f"training loss is nan in epoch {epoch_idx}, first at step {step} of {len(losses)}")
        for name, value in self.model.loss.statistics().items():
            self.logger.info(
                set_color(f"epoch {epoch_idx} {self.model.loss_type}", "green")
                + f" [{set_color(name, 'blue')}: {value:.4f}]"
            )
            self.tensorboard.add_scalar(f"Loss/{name}", value, epoch_idx)
        return losses.sum().item()

    def fit(self, train_data: Any, *args: Any, **kwargs: Any) -> tuple[float, dict[str, float]]:
        """As RecBole's; after resume_checkpoint, data order and random numbers go on where they stopped."""
        self.train_generator = train_data.generator
        if self.resumed is not None:
            set_random_state(self.resumed["random_state"], self.train_generator)
            self.scaler.load_state_dict(self.resumed["scaler"])
            self.best_valid_result = self.resumed["best_valid_result"]
            self.resumed = None
        return super().fit(train_data, *args, **kwargs)

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> tuple[float, dict[str, float]]:
        score, result = super()._valid_epoch(valid_data, show_progress)
        # RecBole saves a checkpoint when this result is the best, before it calls it so
        self.valid_result = {name: float(value) for name, value in result.items()}
        return score, result

    def _checkpoint_state(self, epoch: int) -> dict[str, Any]:
        return checkpoint_state(self, epoch) | {
            "scaler": self.scaler.state_dict(),
            "random_state": random_state(self.train_generator),
            "best_valid_result": self.valid_result,
        }

    def resume_checkpoint(self, resume_file: str) -> None:
        """Load a checkpoint to go on with fit().

        Raises:
            ValueError: it is one of another model or catalogue.
        """
        checkpoint = torch.load(resume_file, map_location="cpu")
        model = checkpoint["config"]["model"]
        if model != self.config["model"]:
            raise ValueError(f"{resume_file} is a checkpoint of {model}, not of {self.config['model']}")
        if "random_state" in checkpoint:
            self.resumed = {name: checkpoint[name] for name in ("scaler", "random_state", "best_valid_result")}
        super().resume_checkpoint(resume_file)

    def evaluate(self, eval_data: Any, *args: Any, **kwargs: Any) -> dict[str, float] | None:
        """As RecBole's; metrics of several processes are computed over all their users together."""
        if eval_data:
            self.eval_collector.n_samples = eval_data.sample_size
        return super().evaluate(eval_data, *args, **kwargs)

    def _full_sort_batch_eval(
        self, batched_data: tuple
    ) -> tuple[Interaction, TopK | torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.eval_collector.needs_scores():
            return super()._full_sort_batch_eval(batched_data)
        interaction, _, positive_u, positive_i = batched_data
        on_device = interaction.to(self.device)
        hidden = self.model.forward(on_device[self.model.ITEM_SEQ], on_device[self.model.ITEM_SEQ_LEN])
        chunk = self.config["eval_chunk_items"]
        items = chunked_topk(
            hidden,
            self.model.item_embedding.weight,
            max(self.config["topk"]),
            auto_chunk_items(len(hidden)) if chunk == "auto" else chunk,
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


def random_state(generator: torch.Generator | None) -> dict[str, Any]:
    """The state of every random number generator that training uses, in types that torch.load reads safely."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "train_data": None if generator is None else generator.get_state(),
    }


def set_random_state(state: dict[str, Any], generator: torch.Generator) -> None:
    """Undo random_state()."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.set_rng_state_all(state["cuda"])
    if state["train_data"] is not None:
        generator.set_state(state["train_data"])
