"""Pointwise functions as one kernel: the same numbers as the plain ones, and a way on for machines that cannot compile."""

import pytest
import torch

from grurcn.models import gru
from grurcn.models import gru_kernels as module
from grurcn.models.gru_kernels import fused

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def maps(channels, device="cpu"):
    generator = torch.Generator().manual_seed(channels)
    x = torch.rand(2, channels, 5, 6, generator=generator).contiguous(memory_format=torch.channels_last)
    return x.to(device)


def arguments(device="cpu"):
    """For each function: its arguments, of which some are written to."""
    gates, h, c, d_h = maps(8, device), maps(4, device), maps(4, device) - 0.5, maps(4, device)
    return {
        gru.first_state: (gates, c, torch.zeros_like(h)),
        gru.open_gates: (gates, maps(8, device), h),
        gru.next_state: (c, maps(4, device), gates, h, torch.zeros_like(h)),
        gru.first_state_grad: (d_h, gates, c, torch.zeros_like(gates), torch.zeros_like(c)),
        gru.next_state_grad: (d_h, gates, c, h, torch.zeros_like(gates), torch.zeros_like(c), torch.zeros_like(h)),
        gru.open_gates_grad: (d_h, maps(4, device), gates, h, torch.zeros_like(gates)),
    }


def run(function, tensors):
    """What comes out, and what was written into the arguments."""
    copies = [tensor.clone() for tensor in tensors]
    out = function(*copies)
    return [tensor.cpu() for tensor in ([] if out is None else [out]) + copies]


def test_traced_functions_give_the_numbers_of_the_plain_ones():
    # All of torch.compile but the code for a device, which the tests on a GPU see: in-place results among them.
    for function, tensors in arguments().items():
        compiled = torch.compile(function.__wrapped__, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(run(compiled, tensors), run(function, tensors))


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_fused_functions_give_the_numbers_of_the_cpu():
    for (function, tensors), on_gpu in zip(arguments().items(), arguments("cuda").values(), strict=True):
        torch.testing.assert_close(run(function, on_gpu), run(function, tensors))


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_states_and_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    layer, x = gru.ConvGRU(8, 16).double(), torch.randn(2, 5, 8, 6, 7, dtype=torch.float64)
    layer(x).square().sum().backward()
    other = gru.ConvGRU(8, 16).double().cuda()
    other.load_state_dict(layer.state_dict())
    other(x.cuda()).square().sum().backward()
    torch.testing.assert_close(other(x.cuda()).cpu(), layer(x))
    for one, two in zip(layer.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        torch.testing.assert_close(two.grad.cpu(), one.grad)


def test_on_a_cpu_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert torch.equal(fused(torch.sigmoid)(torch.zeros(2)), torch.full((2,), 0.5))


def test_a_machine_that_cannot_compile_is_told_so_once(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C compiler\nand a long trace")

    module.can_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(
        UserWarning, match=r"torch\.compile does not work here \(no C compiler\); pointwise functions run"
    ):
        assert not module.can_compile()
    assert not module.can_compile()
    module.can_compile.cache_clear()
