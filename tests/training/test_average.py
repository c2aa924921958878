"""The average of the weights: the plain formula in fp64, who sees it, and runs that go on."""

import pytest
import torch
from torch import nn

from recbole_cce.training import average
from recbole_cce.training.average import EVERY, MOST_PARAMETERS, SHARE, WeightAverage
from recbole_cce.training.trainer import EfficientTrainer
from tests.build import experiment


def of_polynomial_decay(samples, share):
    """a_n = (1 - (eta + 1) / (n + eta)) a_{n-1} + (eta + 1) / (n + eta) p_n, as Shamir and Zhang write it, in fp64."""
    eta, found = 1 / share - 1, 0.0
    for n, sample in enumerate(samples, 1):
        weight = (eta + 1) / (n + eta)
        found = (1 - weight) * found + weight * sample.double()
    return found


def trained(settings, epochs, **changes):
    run = experiment("SASRecCCE", {**settings, "epochs": epochs, "weight_average": 0.25, **changes})
    run.trainer.fit(run.train, run.valid, show_progress=False)
    return run


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("share", [0.1, 0.5, 1])
def test_polynomial_decay(share):
    layer = nn.Linear(3, 2)
    running = WeightAverage(layer, share)
    samples = []
    for step in range(5 * EVERY + 3):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 3))
        running.step()
        if (step + 1) % EVERY == 0:
            samples.append(layer.weight.detach().clone())
    samples.append(layer.weight.detach().clone())  # the end of an epoch
    running.show()
    assert torch.allclose(layer.weight.double(), of_polynomial_decay(samples, share), rtol=0, atol=1e-6)
    if share == 1:
        assert torch.allclose(layer.weight, torch.stack(samples).mean(0), atol=1e-6)
    running.hide()
    assert torch.equal(layer.weight, samples[-1])


def test_storages_stay_where_a_graph_finds_them():
    layer = nn.Linear(2, 2)
    address, running = layer.weight.data_ptr(), WeightAverage(layer, 0.1)
    running.step()
    running.show()
    assert layer.weight.data_ptr() != address
    running.hide()
    assert layer.weight.data_ptr() == address


def test_before_the_first_step_there_is_none():
    layer = nn.Linear(2, 2)
    before, running = layer.weight.detach().clone(), WeightAverage(layer, 0.1)
    running.show()
    assert torch.equal(layer.weight, before) and running.state() is None


def test_a_run_validates_and_saves_the_average_of_its_epochs(tiny_config, monkeypatch):
    """Of an epoch of 4 steps one sample is taken, its last."""
    samples, validated = [], []
    step, valid = WeightAverage.step, EfficientTrainer._valid_epoch

    def stepped(self):
        step(self)
        samples.append({name: value.detach().clone() for name, value in self.parameters.items()})

    def seen(self, *arguments, **keywords):
        validated.append({name: value.detach().clone() for name, value in self.model.named_parameters()})
        return valid(self, *arguments, **keywords)

    monkeypatch.setattr(WeightAverage, "step", stepped)
    monkeypatch.setattr(EfficientTrainer, "_valid_epoch", seen)
    run = trained(tiny_config, 3, stopping_step=10)
    steps = len(run.train)
    assert steps < EVERY and len(samples) == 3 * steps
    for epoch in range(3):
        ends = samples[steps - 1 : (epoch + 1) * steps : steps]
        for name, value in validated[epoch].items():
            expected = of_polynomial_decay([end[name] for end in ends], 0.25)
            assert torch.allclose(value.double(), expected, rtol=0, atol=1e-6), name
    saved = torch.load(run.trainer.saved_model_file, weights_only=True)
    best = validated[saved["epoch"]]
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in best.items())


def test_training_itself_is_the_same_with_and_without(tiny_config):
    """The running weights are those of a run that averages nothing."""
    with_it, without = trained(tiny_config, 2), trained(tiny_config, 2, weight_average="none")
    assert without.trainer.average is None
    assert with_it.trainer.train_loss_dict == without.trainer.train_loss_dict
    assert not same(weights(with_it), weights(without))
    with_it.trainer.average.hide()
    assert same(weights(with_it), weights(without))


@pytest.mark.parametrize(("changes", "suffix"), [({"eval_step": 0}, ".pth"), ({"learning_rate": 0.1}, ".last")])
def test_a_run_goes_on_exactly(tiny_config, monkeypatch, changes, suffix):
    """From the file of the best epoch, where that was the last one, and from that of the last."""
    monkeypatch.setattr(average, "EVERY", 3)  # within an epoch of 4 steps, too
    settings = {**tiny_config, "stopping_step": 10, "checkpoint_interval": 0, **changes}
    whole, part = trained(settings, 8), trained(settings, 6)
    resumed = experiment("SASRecCCE", {**settings, "epochs": 8, "weight_average": 0.25})
    file = part.trainer.newest[0]
    assert file.suffix == suffix
    resumed.trainer.resume_checkpoint(str(file))
    assert same(weights(resumed), weights(part))
    resumed.trainer.fit(resumed.train, resumed.valid, show_progress=False)
    assert same(weights(resumed), weights(whole))
    resumed.trainer.average.hide()
    whole.trainer.average.hide()
    assert same(weights(resumed), weights(whole))
    assert resumed.trainer.best_valid_score == whole.trainer.best_valid_score


def test_a_run_goes_on_without_it(tiny_config):
    settings = {**tiny_config, "eval_step": 0, "checkpoint_interval": 0}
    whole, part = trained(settings, 4, weight_average="none"), trained(settings, 2)
    resumed = experiment("SASRecCCE", {**settings, "epochs": 4, "weight_average": "none"})
    resumed.trainer.resume_checkpoint(part.trainer.saved_model_file)
    resumed.trainer.fit(resumed.train, show_progress=False)
    assert same(weights(resumed), weights(whole))


def test_what_auto_means():
    assert average.share("auto", MOST_PARAMETERS) == SHARE
    assert average.share("auto", MOST_PARAMETERS + 1) is None
    assert average.share(0.3, 2**40) == 0.3
    assert average.share("none", 1) is average.share(None, 1) is None  # a model without the key


@pytest.mark.cuda
def test_a_graph_goes_on_with_the_running_weights(tiny_config):
    settings = {**tiny_config, "gpu_id": "0", "use_gpu": True, "cuda_graph": True, "stopping_step": 10}
    with_it, without = trained(settings, 4), trained(settings, 4, weight_average="none")
    assert with_it.trainer.graphed_step.graph is not None
    with_it.trainer.average.hide()
    for name, value in weights(without).items():
        torch.testing.assert_close(weights(with_it)[name], value)
