"""Directions that become gradients."""

import pytest
import torch


def half_directions():
    """[500, 24] fp64, what fp16 keeps of it, what it leaves out, and an upstream gradient of each row."""
    exact = torch.randn(500, 24, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    high = exact.half()
    grad = torch.rand(500, generator=torch.Generator().manual_seed(1)) + 0.5
    return exact, high, (exact - high).half(), grad


def check_residual(uniform):
    """Rounded once: within half a unit in the last digit, which is 2^-11 of the number at most."""
    from recbole_cce.ops.triton.direction import scale_direction

    exact, high, low, grad = half_directions()
    upstream = grad[:1].expand(500) if uniform else grad
    scaled = high.clone()
    scale_direction(scaled, upstream, None, low)
    truth = exact * upstream[:, None].double()
    assert ((scaled - truth).abs() <= truth.abs() * 2.0**-11 * 1.001 + 1e-7).all()
    twice = (high * upstream[:, None]).half()
    assert not ((twice - truth).abs() <= truth.abs() * 2.0**-11 * 1.001 + 1e-7).all()


def check_unit(uniform):
    from recbole_cce.ops.triton.direction import scale_direction

    exact, _, _, grad = half_directions()
    upstream = grad[:1].expand(500) if uniform else grad
    scaled = exact.float()
    scale_direction(scaled, upstream, torch.tensor(0.125), None)
    assert torch.allclose(scaled, (exact * upstream[:, None].double() / 0.125).float(), rtol=1e-6)


def check_nothing_to_scale():
    from recbole_cce.ops.triton.direction import scale_direction

    _, high, _, grad = half_directions()
    unit = torch.tensor(0.125)
    scaled = high.clone()
    scale_direction(scaled, unit.expand(500), unit, None)
    assert torch.equal(scaled, high)
    scale_direction(scaled[:0], grad[:0], None, None)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("check", [check_residual, check_unit])
def test_scaling_in_the_interpreter(interpreter, check, uniform):
    interpreter(check, uniform)


def test_nothing_to_scale_in_the_interpreter(interpreter):
    interpreter(check_nothing_to_scale)
