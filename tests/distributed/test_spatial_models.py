"""Models on images that are cut into rows: training, memory, bytes on the wire, other parallelism, refusals."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv.distributed.collectives import wire_bytes
from tests.distributed.launch import Ranks, ranks_test, two_ranks
from tests.distributed.test_spatial import PLAIN, SP, compare, mesh_of
from tests.helpers import relative_error, values


class Net(nn.Module):
    """Two levels of a UNet: strided, transposed, joined, normed."""

    def __init__(self, channels: int = 16, recompute: bool = False) -> None:
        super().__init__()
        c, self.recompute = channels, recompute
        self.first = nn.Sequential(nn.Conv2d(3, c, 3, padding=1), nn.GroupNorm(4, c), nn.ReLU(inplace=True))
        self.down = nn.Sequential(
            nn.MaxPool2d(2), nn.Conv2d(c, 2 * c, 3, padding=1), nn.BatchNorm2d(2 * c), nn.ReLU(inplace=True)
        )
        self.up = nn.ConvTranspose2d(2 * c, c, 2, 2)
        self.last = nn.Sequential(
            nn.Conv2d(2 * c, c, 3, padding=1), nn.GroupNorm(4, c), nn.ReLU(inplace=True), nn.Conv2d(c, 5, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = checkpoint(self.down, x, use_reentrant=False) if self.recompute else self.down(x)
        return self.last(torch.cat([x, self.up(y)], 1))


def on_ranks_training(ranks: Ranks) -> None:
    """The losses of a few steps are those of one process, whose wgrad groups rows otherwise."""
    curves = []
    for cut in (False, True):
        torch.manual_seed(0)
        net, mesh = Net(), mesh_of(ranks)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        losses = []
        for step in range(6):
            x, labels = values((2, 3, 16, 12), seed=step), (values((2, 16, 12), seed=step) > 0).long()
            given = (SP.shard(x, mesh), SP.shard(labels, mesh, dim=1)) if cut else (x, labels)
            with nv.nvfp4_autocast(PLAIN):
                loss = F.cross_entropy(net(given[0]), given[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-5)
    assert curves[0] == pytest.approx(curves[1], rel=0.02)
    assert curves[1][-1] < curves[1][0]


@two_ranks
def on_ranks_checkpointing(ranks: Ranks) -> None:
    torch.manual_seed(0)
    plain, x = Net(), values((2, 3, 16, 12), seed=1)
    again = Net(recompute=True)
    again.load_state_dict(plain.state_dict())
    grads = []
    for net in (plain, again):
        with nv.nvfp4_autocast(PLAIN):
            SP.whole(net(SP.shard(x, mesh_of(ranks)))).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def saved_bytes(run: Any) -> int:
    """Return the bytes that a forward pass saves for backward, each piece of memory once."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        plain = t.as_subclass(Tensor) if type(t) is not Tensor else t
        if not isinstance(t, nn.Parameter):
            storage = plain.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


def on_ranks_memory(ranks: Ranks) -> None:
    net, x = Net(), values((1, 3, 96, 64), seed=1)
    used = []
    for given in (x, SP.shard(x, mesh_of(ranks))):
        with nv.nvfp4_autocast(PLAIN):
            used.append(saved_bytes(lambda given=given: net(given)))
    # Weights' codes are whole on every rank, and so a little above 1/2 and 1/4.
    assert used[1] / used[0] <= {2: 0.55, 4: 0.32}[ranks.world], used


def peak_bytes(run: Any) -> int:
    """Return the most bytes that tensors made in run() take at one time, as torch's allocator counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def on_ranks_peak_memory_of_a_step(ranks: Ranks) -> None:
    net, x, used = Net(), values((1, 3, 192, 64), seed=1), []
    for image in (x, SP.shard(x, mesh_of(ranks))):

        def step(image: Any = image) -> None:
            with nv.nvfp4_autocast(PLAIN):
                loss = net(image).square().mean()
            loss.backward()

        step()  # buffers that stay, and gradients
        net.zero_grad(set_to_none=False)
        used.append(peak_bytes(step))
    assert used[1] / used[0] <= {2: 0.55, 4: 0.32}[ranks.world], used


@two_ranks
def on_ranks_networks_of_others(ranks: Ranks) -> None:
    from torchvision import models
    from unet_coco.unet import UNet

    mesh, x = mesh_of(ranks), values((1, 3, 64, 48), seed=1)
    nets = {
        "unet": UNet(3, 0.25),
        "resnet50": models.resnet50(weights=None, num_classes=10),
        "deeplab": models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5),
    }
    for name, net in nets.items():
        net.eval()
        results = []
        for cut in (False, True):
            net = SP.parallelize(net, mesh, outputs="whole") if cut else net
            with torch.no_grad():
                high = net(x)
                with nv.nvfp4_autocast(PLAIN):
                    low = net(x)
            results.append([y["out"] if name == "deeplab" else y for y in (high, low)])
        errors = [relative_error(found, expected) for found, expected in zip(results[1], results[0], strict=True)]
        print(name, errors)
        assert errors[0] <= 1e-5 and errors[1] <= 0.05, (name, errors)


def on_ranks_bytes_on_the_wire(ranks: Ranks) -> None:
    layer, mesh = nn.Conv2d(64, 64, 3, padding=1), mesh_of(ranks)
    leaf = values((16, 64, 8 * ranks.world, 64), seed=1).requires_grad_()
    x = SP.shard(leaf, mesh)
    received = []
    for recipe in (None, PLAIN):
        with nv.nvfp4_autocast(recipe, enabled=recipe is not None), wire_bytes() as forward:
            y = layer(x)
        with wire_bytes() as backward:
            torch.autograd.grad(y.square().sum(), leaf)
        received.append((forward.received, backward.received))
    neighbours = 2 if 0 < ranks.rank < ranks.world - 1 else 1
    halo = neighbours * 16 * 64 * 64  # one row of each neighbour
    assert received[0][0] == 4 * halo  # fp32
    for part in (0, 1):  # bf16: 2 bytes a value
        amaxes = 64 * ranks.world
        # Forward: x rowwise. Backward: dy rowwise for dx, and x columnwise for dw.
        assert received[1][part] - amaxes <= (1 + part) * 0.29 * 2 * halo, received


def on_ranks_beside_other_parallelism(ranks: Ranks) -> None:
    if ranks.world < 4:
        return
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh(ranks.device.type, (2, 2), mesh_dim_names=("data", "rows"))
    x = values((4, 3, 16, 12), seed=1)
    half = x.chunk(2)[mesh["data"].get_local_rank()]
    torch.manual_seed(0)
    base = Net()
    base.down[2] = nn.GroupNorm(4, 32)  # batch norm of each half is another one
    single = copy.deepcopy(base)
    single(x).square().mean().backward()
    expected = [p.grad for p in single.parameters()]

    data = DistributedDataParallel(copy.deepcopy(base), process_group=mesh["data"].get_group())
    sharded = copy.deepcopy(base)
    for block in (sharded.first, sharded.down, sharded.last):
        fully_shard(block, mesh=mesh["data"])
    fully_shard(sharded, mesh=mesh["data"])
    for net in (data, sharded):
        for recipe in (None, nv.NVFP4BlockScaling()):
            net.zero_grad()
            with nv.nvfp4_autocast(recipe, enabled=recipe is not None):
                loss = net(SP.shard(half, mesh["rows"])).square().mean()
            loss.backward()
            for p, wanted in zip(net.parameters(), expected, strict=True):
                found = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                assert relative_error(found, wanted) <= (1e-4 if recipe is None else 1.0)


def on_ranks_refusals(ranks: Ranks) -> None:
    mesh = mesh_of(ranks)
    x = values((2, 4, 8, 6), seed=1)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(192, 2))
    SP.parallelize(net, mesh)
    with pytest.raises(ValueError, match=r"flatten in 1 \(Flatten\) has no form for an image that is cut into rows"):
        net(x)
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        y = SP.shard(x, mesh)
        F.scaled_dot_product_attention(y, y, y)
    with pytest.raises(ValueError, match="cut differently"):
        SP.shard(x, mesh) + SP.shard(x[:, :, :6], mesh)
    rows = SP.shard(x, mesh).placed.mine.size
    with pytest.raises(ValueError, match="the ranks' rows are not one image"):
        SP.from_piece(x[:, :, : rows + (ranks.rank == 0)], mesh, 8)
    assert torch.equal(SP.whole(SP.from_piece(SP.shard(x, mesh).piece, mesh, 8)), x)
    shift = nv.NVFP4BlockScaling(activation_shift="mean")
    with nv.nvfp4_autocast(shift), pytest.raises(ValueError, match="takes no activation_shift"):
        nn.Conv2d(16, 16, 3)(SP.shard(values((2, 16, 8, 6), seed=1), mesh))
    with pytest.raises(TypeError, match="this is no mesh"):
        SP.shard(x, ranks.group)
    with pytest.raises(ValueError, match="no such dimension"):
        SP.shard(x, mesh, 4)
    with pytest.raises(TypeError, match="not pickled"):
        copy.copy(SP.shard(x, mesh))
    dtensor = SP.to_dtensor(SP.shard(x, mesh))
    assert torch.equal(dtensor.full_tensor(), x)
    assert torch.equal(SP.whole(SP.shard(dtensor, mesh)), x)
    outside = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert type(SP.parallelize(outside, mesh)(x)) is Tensor  # sums over the image are whole


# ---- random networks ------------------------------------------------------------------------------------------------


def random_net(draw: random.Random) -> tuple[nn.Module, Tensor]:
    """Return a random network of 3 to 6 layers and an image for it."""
    height = draw.randint(1, 24)
    x = values((draw.choice((1, 2, 3)), 16, height, draw.randint(8, 16)), seed=draw.randint(0, 99))
    layers: list[nn.Module] = []
    for _ in range(draw.randint(3, 6)):
        k = draw.randint(1, 7)
        s, d = draw.randint(1, 3), draw.randint(1, 3)
        layer = draw.choice(
            [
                nn.Conv2d(16, 16, k, s, d * (k // 2), d),
                nn.ConvTranspose2d(16, 16, k, s, min(k // 2, 1), min(s - 1, 1)),
                nn.MaxPool2d(3, s, 1),
                nn.AvgPool2d(3, s, 1),
                nn.GroupNorm(4, 16),
                nn.BatchNorm2d(16),
                nn.Upsample(scale_factor=2, mode=draw.choice(("nearest", "bilinear"))),
                nn.ReLU(inplace=True),
                nn.ReflectionPad2d((1, 1, 0, 0)),
            ]
        )
        layers.append(layer)
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), *layers), x


def run_random(ranks: Ranks, seeds: range) -> int:
    """Compare random networks on rows and whole; return how many ran."""
    ran = 0
    for seed in seeds:
        torch.manual_seed(seed)
        net, x = random_net(random.Random(seed))
        try:
            y = copy.deepcopy(net)(x)
            y.square().sum().backward()  # torch refuses two in-place ReLUs, one after the other
            small = y.numel() > 2**18 or 0 in y.shape
        except (ValueError, RuntimeError):  # torch refuses it: an output that would be empty, one value to normalize
            continue
        if small:
            continue
        compare(ranks, copy.deepcopy(net), x, tolerance=0.01)  # norms of few values cancel
        given = SP.shard(x, mesh_of(ranks))
        with nv.nvfp4_autocast():  # random bits: its steps end on all ranks, and give finite numbers
            out = SP.whole(net(given))
        out.square().mean().backward()
        assert out.isfinite().all()
        ran += 1
    return ran


def on_ranks_random_networks(ranks: Ranks) -> None:
    assert run_random(ranks, range(8)) >= 5


FOUR = ("memory", "peak_memory_of_a_step", "beside_other_parallelism", "random_networks")
test_on_ranks = ranks_test(globals(), four=FOUR)
