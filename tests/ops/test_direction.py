"""Directions that become gradients."""

import pytest

from tests.ops.compiling import POINTERS, compiled
from tests.ops.test_sampled_kernels import run_python


@pytest.mark.parametrize("capability", [80, 90, 100], ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("residual", [True, False])
def test_kernel_compiles(residual, capability):
    pytest.importorskip("triton")
    from recbole_cce.ops.triton.direction import scale_kernel

    constants = {"D": 48, "BLOCK": 256, "UNIFORM": False, **({} if residual else {"residual_ptr": None})}
    assert compiled(scale_kernel, capability, constants, POINTERS | {"residual_ptr": "*bf16"}).asm["cubin"]


def test_scaling_in_the_interpreter():
    pytest.importorskip("triton")
    run_python(
        """
        import torch
        from recbole_cce.ops.triton.direction import scale_direction

        exact = torch.randn(500, 24, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        grad = torch.rand(500, generator=torch.Generator().manual_seed(1)) + 0.5
        high = exact.half()
        low = (exact - high).half()
        for upstream in (grad, grad[:1].expand(500)):
            scaled = high.clone()
            scale_direction(scaled, upstream, None, low)
            truth = exact * upstream[:, None].double()
            # rounded once: within half a unit in the last place, which is 2^-11 of the number at most
            assert ((scaled - truth).abs() <= truth.abs() * 2.0**-11 * 1.001 + 1e-7).all()
            twice = (high * upstream[:, None]).half()
            assert not ((twice - truth).abs() <= truth.abs() * 2.0**-11 * 1.001 + 1e-7).all()

            unit = torch.tensor(0.125)
            scaled = exact.float()
            scale_direction(scaled, upstream, unit, None)
            assert torch.allclose(scaled, (truth / 0.125).float(), rtol=1e-6)

        # nothing is left to be scaled
        scaled = high.clone()
        scale_direction(scaled, unit.expand(500), unit, None)
        assert torch.equal(scaled, high)
        scale_direction(scaled[:0], grad[:0], None, None)
        """,
        TRITON_INTERPRET="1",
    )
