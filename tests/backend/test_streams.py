"""What is kept between calls is read on another CUDA stream only after the stream that wrote it; with streams that run
nothing. tests/gpu/test_gpu_streams.py has real ones.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import devices
from te_nvfp4_cv.distributed import collectives
from te_nvfp4_cv.layer import deferred, delayed_scaling, shared_amax
from tests.helpers import values

DELAYED = nv.NVFP4BlockScaling(tensor_scale="delayed")


class Stream:
    def __init__(self):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


@pytest.fixture
def streams(monkeypatch):
    """The current stream, which tests change; and what `follow` was asked on it."""
    found = SimpleNamespace(now=Stream(), followed=[])

    def follow(before, tensors):
        found.followed.append((before, found.now, len(tensors)))
        return found.now

    monkeypatch.setattr(devices, "stream_of", lambda x: found.now)
    monkeypatch.setattr(devices, "follow", follow)
    return found


def test_a_stream_waits_for_the_one_before_and_keeps_its_memory(monkeypatch):
    one, other, capturing = Stream(), Stream(), False
    used = []
    monkeypatch.setattr(devices, "stream_of", lambda x: other)
    monkeypatch.setattr(devices, "capturing", lambda x: capturing)
    monkeypatch.setattr(devices, "used_here", used.extend)
    assert devices.follow(None, ["x"]) is devices.follow(other, ["x"]) is other and not used
    assert devices.follow(one, ["x", "y"]) is other
    assert other.waited_for == [one] and used == ["x", "y"]
    capturing = True
    assert devices.follow(one, ["x"]) is other and len(other.waited_for) == 1


def test_frozen_codes(streams):
    conv, x, made = nn.Conv2d(16, 16, 1), values((1, 16, 2, 2)), streams.now
    with nv.frozen_weights(conv), nv.nvfp4_autocast():
        conv(x)
        streams.now = Stream()
        conv(x)
    assert streams.followed[-1] == (made, streams.now, 5)  # two faces and the amax


def test_delayed_scales(streams):
    conv, x, before = nn.Conv2d(16, 16, 1), values((1, 16, 2, 2)), streams.now
    for number in range(2):
        with nv.nvfp4_autocast(DELAYED):
            conv(x).sum().backward()
        if number == 0:
            streams.followed.clear()
            streams.now = Stream()
    assert streams.followed == [(before, streams.now, 4)]


def test_readers_of_delayed_scales(streams):
    conv, x, before = nn.Conv2d(16, 16, 1), values((1, 16, 2, 2)), streams.now
    with nv.nvfp4_autocast(DELAYED):
        conv(x).sum().backward()
    (state,) = delayed_scaling.states_of(conv.weight).values()
    readers = {
        "extra_state": lambda: nv.extra_state(conv),
        "saturated": lambda: delayed_scaling.saturated(conv.weight),
        "trained_amax": lambda: delayed_scaling.trained_amax(conv.weight, DELAYED, conv.weight),
        "to": lambda: state.to(x.device),
    }
    for name, read in readers.items():
        streams.followed.clear()
        streams.now = Stream()
        read()
        assert streams.followed == [(before, streams.now, 4)] and state.stream is streams.now, name
        before = streams.now


def test_a_capture_before_any_step_leaves_no_state(monkeypatch):
    """Its memory would be the graph's, and its zeros only written by a replay."""
    conv, x = nn.Conv2d(16, 16, 1), values((1, 16, 2, 2))
    with monkeypatch.context() as under, nv.nvfp4_autocast(DELAYED):
        under.setattr(devices, "capturing", lambda x: True)
        with pytest.raises(RuntimeError, match="warm-up steps"):
            conv(x)
    assert not delayed_scaling.has_state(conv.weight)


def test_an_activation_that_was_deferred_is_written_on_its_own_stream(streams, monkeypatch):
    """Others on that stream, who find it written, read it without waiting for the stream that asked."""
    z = values((16, 16, 2, 2)).contiguous(memory_format=torch.channels_last)
    home, written = streams.now, []
    one = torch.ones(16)
    producer = deferred.Producer(z, None, None, None, 0, "relu", one, one, one)

    @contextlib.contextmanager
    def on(stream):
        before, streams.now = streams.now, stream
        yield
        streams.now = before

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(deferred.ops, "norm_apply", lambda *_: written.append(streams.now))
    y = deferred.attach(deferred.empty_like(z), producer)
    streams.now = other = Stream()
    assert not producer.serves(SimpleNamespace(input=None), True, None)
    deferred.settle(y)
    assert written == [home] and other.waited_for == [home] and y.untyped_storage().nbytes()


def test_a_message_may_be_waited_for_on_another_stream(monkeypatch):
    used = []
    monkeypatch.setattr(devices, "used_here", used.extend)
    monkeypatch.setattr(collectives, "all_gather_flat", lambda message, *_: (message.repeat(2, 1), None))
    data = torch.arange(4, dtype=torch.uint8)
    pending = collectives.PendingParts([[(4,), (4,)]], [(data, 0)], data, None, True)
    assert pending.wait()[0].tolist() == [0, 1, 2, 3] * 2
    assert [t.numel() for t in used] == [4, 8]


def test_numbers_of_other_streams_are_waited_for_and_a_capture_holds_none(streams, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "Event", lambda device: SimpleNamespace(record=lambda: None, query=lambda: True))
    later, made = shared_amax.Later(), streams.now
    later.add(shared_amax._tags("a.weight", "input", torch.device("cpu")), "input, 'a.weight'")
    streams.now = Stream()
    later.look()
    assert later.waits and not later.sent and not streams.followed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    later.look()
    assert not later.waits and streams.followed == [(made, streams.now, 1)]
