"""Where the time of training steps goes, by torch.profiler: when the GPU is busy, and with which part of a step."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from recbole.trainer import Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("data", "encoder", "head", "table", "optimizer", "other")
# of an epoch are profiled: torch.profiler takes seconds for the operations of one
BUSY_STEPS, SHARE_STEPS = 8, 2


@contextmanager
def first_steps(trainer: Trainer, steps: int) -> Iterator[None]:
    """Our trainer's epochs end after `steps`; RecBole's are short here."""
    if hasattr(trainer, "_batches"):
        batches = trainer._batches
        trainer._batches = lambda data: itertools.islice(batches(data), steps)
    try:
        yield
    finally:
        trainer.__dict__.pop("_batches", None)


def busy_share(trainer: Trainer, epoch: Callable[[], Any]) -> float:
    """The union of the intervals of kernels and copies over the time from the first to the last. `epoch` runs one."""
    with first_steps(trainer, BUSY_STEPS), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        epoch()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    busy, end = 0.0, spans[0][0]
    for begin, stop in spans:
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return busy / (end - spans[0][0])


@contextmanager
def named_parts(trainer: Trainer) -> Iterator[None]:
    """Record ranges `part: head` and `part: encoder` around a model's loss and all that it computes."""
    model = trainer.model
    name = "loss_sum" if hasattr(model, "loss_sum") else "calculate_loss"
    whole = getattr(model, name)
    head = model.loss if hasattr(model, "loss") else model.loss_fct
    forward = head.forward

    def in_range(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"part: {name}"):
                return function(*args, **kwargs)

        return call

    setattr(model, name, in_range("encoder", whole))
    head.forward = in_range("head", forward)
    try:
        yield
    finally:
        setattr(model, name, whole)
        head.forward = forward


def part_of(event: Any, forward_parts: dict[int, str]) -> str:
    """Where an event on the host belongs: to the innermost named range around it, or to its forward operation's."""
    while event is not None:
        if event.name.startswith("part: "):
            return event.name.removeprefix("part: ")
        if event.name.startswith("Optimizer.step") or event.name.startswith("Optimizer.zero_grad"):
            return "optimizer"
        if "AccumulateGrad" in event.name:
            return "table"
        if event.name.startswith("autograd::engine::evaluate_function"):
            return forward_parts.get(event.sequence_nr, "other")
        if "_DataLoader" in event.name:
            return "data"
        event = event.cpu_parent
    return "other"


def shares(trainer: Trainer, epoch: Callable[[], Any]) -> dict[str, float]:
    """The share of each part in the time of all kernels. `epoch` runs one."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with named_parts(trainer), first_steps(trainer, SHARE_STEPS), profile(activities=activities) as profiler:
        epoch()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    forward_parts: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::engine"):
            part = part_of(event, {})
            if part in ("encoder", "head"):
                forward_parts[event.sequence_nr] = part  # the last of a number made the node
    found: Counter[str] = Counter()
    for event in events:
        for kernel in event.kernels:
            if kernel.name == event.name:
                continue  # a named range, shown on the GPU too
            copy = "Memcpy HtoD" in kernel.name
            found["data" if copy else part_of(event, forward_parts)] += kernel.duration
    total = sum(found.values())
    return {part: found[part] / total for part in PARTS}
