"""What is kept between calls, read on another stream than the one that still writes it; tests/backend/test_streams.py
has the same without a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from tests.networks import NO_SR

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def layer() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Conv2d(32, 32, 3, padding=1).to(CUDA), torch.randn(16, 32, 8, 8, device=CUDA)


def behind_work(stream: torch.cuda.Stream, run):
    """Run it on a stream that is busy for some milliseconds."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        return run()


@pytest.mark.parametrize("scale", ["current", "delayed"])
def test_a_layer_on_two_streams_at_once(scale):
    """The second call waits for codes and scales that the first one makes, and for nothing else of it."""
    recipe = nv.NVFP4BlockScaling(tensor_scale=scale, disable_stochastic_rounding=True)

    def two_calls(first: torch.cuda.Stream, second: torch.cuda.Stream) -> list[torch.Tensor]:
        conv, x = layer()
        with nv.nvfp4_autocast(recipe):
            conv(x).sum().backward()
            torch.cuda.synchronize()
            with nv.frozen_weights(conv):
                second.wait_stream(torch.cuda.current_stream())
                y = behind_work(first, lambda: conv(x * 3))
                with torch.cuda.stream(second):
                    z = conv(x)
                torch.cuda.synchronize()
        return [y, z]

    one = torch.cuda.Stream()
    expected, found = two_calls(one, one), two_calls(torch.cuda.Stream(), torch.cuda.Stream())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_activation_that_another_stream_asks_for():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1)).to(CUDA)
    net, x = nv.fuse(net.to(memory_format=torch.channels_last)), torch.randn(16, 32, 8, 8, device=CUDA)
    side, kept = torch.cuda.Stream(), []

    def on_the_side(module, args):
        side.wait_stream(torch.cuda.current_stream())
        kept.append(behind_work(side, lambda: args[0] + 1))

    with nv.nvfp4_autocast(NO_SR):
        expected = net(x)
        last = [module for module in net.modules() if isinstance(module, nn.Conv2d)][-1]
        last.register_forward_pre_hook(on_the_side)
        found = net(x)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(found, expected) and len(kept) == 1
