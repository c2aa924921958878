"""Where a trainer of RecBole can be watched from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from recbole.evaluator.base_metric import TopkMetric


def put_around(
    trainer: Any,
    *,
    fit: Callable,
    train_epoch: Callable,
    valid_epoch: Callable,
    full_sort_batch: Callable,
    neg_sample_batch: Callable,
    topk_result: Callable,
) -> None:
    """Put functions around methods of one trainer; each gets the method before the method's own arguments.

    Args:
        trainer: RecBole's, or a subclass's.
        fit, train_epoch, valid_epoch: around the run, an epoch and its validation.
        full_sort_batch, neg_sample_batch: around the scores of a batch, in full ranking and against sampled negatives.
        topk_result: around the average that each metric of ranks takes over its rows.
    """
    for name, around in {
        "fit": fit,
        "_train_epoch": train_epoch,
        "_valid_epoch": valid_epoch,
        "_full_sort_batch_eval": full_sort_batch,
        "_neg_sample_batch_eval": neg_sample_batch,
    }.items():
        setattr(trainer, name, partial(around, getattr(trainer, name)))
    for metric in trainer.evaluator.metric_class.values():
        if isinstance(metric, TopkMetric):
            metric.topk_result = partial(topk_result, metric.topk_result)
