"""Steps captured in a CUDA graph against the same steps launched one kernel at a time; batches of a fixed size."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.utils import init_seed

from recbole_cce.nn.batch import Counts
from recbole_cce.nn.losses.registry import LOSSES
from recbole_cce.nn.packing import packs
from recbole_cce.training import graph, step_plan, trainer
from tests.build import experiment
from tests.conftest import write_inter
from tests.training.test_trainer import assert_same, fit, state

EXACT = {"loss_type": "CCE", "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "amp_dtype": "float32"}
GPU = {"use_gpu": True, "gpu_id": "0"}


def padded(batch, rows):
    """The batch with rows of zeros after it."""
    return Interaction(
        {
            field: torch.cat([values, values.new_zeros(rows - len(values), *values.shape[1:])])
            for field, values in batch.interaction.items()
        }
    )


@pytest.mark.parametrize("attention", ["sdpa", "packed", "auto"])
@pytest.mark.parametrize("train_targets", ["all", "last"])
def test_a_batch_of_fixed_size_has_the_same_loss_and_gradients(tiny_config, train_targets, attention):
    run = experiment("SASRecCCE", {**tiny_config, **EXACT, "train_targets": train_targets, "attention": attention})
    run.model.double().eval()
    batch = next(iter(run.train))
    exact = run.train.dataset.counts(batch)
    assert exact.positions <= 110 and exact.targets <= 99
    assert packs("auto", 110, padded=8 * (len(batch) + 30)) and not packs("auto", exact.positions, 8 * len(batch))
    results = []
    for counts, interaction in (
        (None, batch),
        (exact, batch),
        (Counts(110, 99), padded(batch, len(batch) + 30)),
        (Counts(360, 200), padded(batch, len(batch) + 30)),
    ):
        run.model.zero_grad()
        loss = run.model.loss_sum(run.model.batch(interaction, counts), packed=attention != "sdpa").mean
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in run.model.parameters())])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("train_targets", ["all", "last"])
def test_capacity(tiny_config, train_targets):
    """No random batch needs more places, and they are not many more than the largest of them needs."""
    train = experiment("SASRecCCE", {**tiny_config, "train_batch_size": 8, "train_targets": train_targets}).train
    data = train.dataset
    needed = [data.counts(batch) for _ in range(200) for batch in train if len(batch) == 8]
    for counts, capacity in zip(list(zip(*needed, strict=True))[:2], data.capacity(8)[:2], strict=True):
        assert max(counts) <= capacity <= 1.5 * max(counts)
    every = [data.counts(batch) for batch in train]
    assert data.capacity(len(data)) == (*map(sum, list(zip(*every, strict=True))[:2]), True)


def test_where_a_step_cannot_be_captured(tiny_config):
    run = experiment("SASRecCCE", {**tiny_config, "cuda_graph": True})
    with pytest.raises(ValueError, match="cuda_graph: True is not valid on cpu; it takes auto or False there"):
        fit(run)
    run = experiment("SASRecCCE", tiny_config)
    fit(run)
    assert run.trainer.graphed_step is None


@pytest.mark.cuda
@pytest.mark.parametrize(
    "settings",
    [{"loss_type": "SCE"}, {"cuda_graph": False}, {"MAX_ITEM_LIST_LENGTH": 16, "attention": "sdpa"}],
    ids=str,
)
def test_where_auto_captures_nothing(tiny_config, settings, monkeypatch):
    monkeypatch.setattr(LOSSES["SCE"], "capturable", False)  # as a loss that waits for the device would be
    monkeypatch.setattr(step_plan, "MAX_GRAPHED_POSITIONS", 16 * 8)
    fit(captured := experiment("SASRecCCE", {**tiny_config, **GPU}))
    assert captured.trainer.graphed_step is not None
    run = experiment("SASRecCCE", {**tiny_config, **GPU, **settings})
    fit(run)
    assert run.trainer.graphed_step is None


@pytest.mark.cuda
def test_what_no_graph_can_hold(tiny_config, monkeypatch):
    monkeypatch.setattr(LOSSES["SCE"], "capturable", False)
    run = experiment("SASRecCCE", {**tiny_config, **GPU, "loss_type": "SCE", "cuda_graph": True})
    with pytest.raises(ValueError, match="cuda_graph: True is not valid with loss_type: SCE"):
        fit(run)


def trained(settings, captured):
    """A finished run, the sum of its losses in each epoch, and the random numbers it left."""
    run = experiment("SASRecCCE", settings)
    fit(run)
    step = run.trainer.graphed_step
    assert (step is not None and step.graph is not None) == captured
    return run, torch.tensor(list(run.trainer.train_loss_dict.values())), torch.cuda.get_rng_state()


@pytest.mark.cuda
@pytest.mark.parametrize(
    "settings",
    [{}, {"train_targets": "last"}, {"clip_grad_norm": {"max_norm": 0.1}}, {"attention": "packed"}],
    ids=str,
)
def test_training_is_the_same_to_rounding(tiny_config, settings):
    """Against steps of exact size, without padding: nothing of a batch is left over in the next one."""
    settings = {**tiny_config, **GPU, **EXACT, "epochs": 6, "learning_rate": 0.01, **settings}
    launched, expected, _ = trained({**settings, "cuda_graph": False}, captured=False)
    run, losses, _ = trained(settings, captured=True)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    for name, value in launched.model.state_dict().items():
        if not name.endswith("key.bias"):  # it adds the same to all logits of a query: its gradient is all rounding
            torch.testing.assert_close(run.model.state_dict()[name], value, rtol=0.01, atol=0.003, msg=name)


class Recording:
    """Stands for GraphedStep on the CPU: whatever comes later, it reads the table it was made with."""

    def __init__(self, trainer, model, step, rows, capacity):
        self.trainer, self.model, self.step, self.resident = trainer, model, step, trainer.resident

    def __call__(self, interaction, counts):
        self.trainer.resident = self.resident
        return self.step(interaction, counts)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_second_fit_trains_the_data_it_is_given(tiny_config, tiny, monkeypatch, device):
    """Other rows of the same users and items, with more of them in a batch; then the first rows again."""
    header, *lines = (tiny / "tiny" / "tiny.inter").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    write_inter(tiny, "backwards", header, [(user, item, -int(time)) for user, item, time in rows])
    settings = {**tiny_config, **EXACT, "epochs": 3, "learning_rate": 0.01, "eval_step": 0}
    settings |= GPU if device == "cuda" else {}

    def weights(captured):
        run = experiment("SASRecCCE", {**settings, "cuda_graph": captured})
        other = experiment("SASRecCCE", {**settings, "train_batch_size": 24}, "backwards").train
        if captured and device == "cpu":
            monkeypatch.setattr(step_plan, "captures", lambda *_: True)
            make_resident = run.trainer._make_resident

            def make_resident_on_the_cpu(data):
                make_resident(data)
                run.trainer.resident = data.dataset.on_device(torch.device("cpu"))

            monkeypatch.setattr(run.trainer, "_make_resident", make_resident_on_the_cpu)
            monkeypatch.setattr(trainer, "GraphedStep", partial(Recording, run.trainer))
        for data in (run.train, other, run.train):
            run.trainer.fit(data, saved=False)
        return run.model.state_dict()

    expected = weights(captured=False)
    for name, value in weights(captured=True).items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(value, expected[name], rtol=0.01, atol=0.003, msg=name)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("loss_type", [name for name, loss in LOSSES.items() if loss.capturable])
@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_random_numbers_are_those_of_the_uncaptured_step(tiny_config, monkeypatch, loss_type, backend, amp_dtype):
    """Dropout, negatives and directions; another set in each step."""
    settings = {**tiny_config, **GPU, "loss_type": loss_type, "loss_backend": backend, "amp_dtype": amp_dtype}
    settings |= {"epochs": 4, "learning_rate": 0.01}
    run, losses, random_state = trained(settings, captured=True)
    batch = next(iter(run.trainer._batches(run.train)))
    counts = run.trainer._counts(run.train, batch)
    losses_again = {run.trainer.graphed_step(batch, counts).mean.item() for _ in range(3)}
    assert len(losses_again) == 3, "the same random numbers again"
    monkeypatch.setattr(graph, "WARM_UP_STEPS", 10**6)
    _, expected, expected_random_state = trained(settings, captured=False)
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
    assert torch.equal(random_state, expected_random_state)


@pytest.mark.cuda
def test_a_batch_that_does_not_fit_is_trained_uncaptured(tiny_config, monkeypatch):
    settings = {**tiny_config, **GPU, **EXACT, "epochs": 6, "learning_rate": 0.01}
    _, expected, _ = trained({**settings, "cuda_graph": False}, captured=False)
    run = experiment("SASRecCCE", settings)
    needed = [run.train.dataset.counts(batch) for batch in run.train]
    positions, targets, _ = zip(*needed, strict=True)
    middle = Counts(*((min(counts) + max(counts)) // 2 for counts in (positions, targets)), fixed=True)
    monkeypatch.setattr(type(run.train.dataset), "capacity", lambda *_: middle)
    _, losses, _ = trained(settings, captured=True)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)


@pytest.mark.cuda
def test_a_run_resumes_bit_for_bit(tiny_config):
    settings = {**tiny_config, **GPU, "epochs": 4, "learning_rate": 0.01, "reproducibility": True}
    torch.use_deterministic_algorithms(True)
    try:
        whole = experiment("SASRecCCE", settings)
        fit(whole)
        expected = state(whole)
        first = experiment("SASRecCCE", settings)
        first.trainer.epochs = 2
        fit(first)
        second = experiment("SASRecCCE", settings)
        init_seed(1, reproducibility=True)  # the checkpoint has the random numbers
        second.trainer.resume_checkpoint(first.trainer.saved_model_file)
        fit(second)
        assert second.trainer.graphed_step.graph is not None
        assert_same(state(second), expected)
    finally:
        torch.use_deterministic_algorithms(False)
