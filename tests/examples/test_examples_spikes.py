"""examples/unet_coco/spikes.py and rebuild.py: what counts as a spike, and a bundle of a step of a training loop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from unet_coco.rebuild import build
from unet_coco.spikes import Spike, SpikeWatch, write_bundle
from unet_coco.unet import UNet

import te_nvfp4_cv as nv
from te_nvfp4_cv import cli
from te_nvfp4_cv.sensitivity import diagnose
from tests.helpers import same_bits

ARGUMENTS = {
    "options": {"task": "semantic", "scale": 0.25, "activation": "silu", "dropout": 0.2},
    "image_size": [16, 16],
    "classes": ["background", "thing"],
    "class_weights": None,
}


def noisy(count: int, level: float = 1.0, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (level + 0.05 * torch.randn(count, generator=generator)).tolist()


def told(watch: SpikeWatch, losses: list[float], start: int = 0) -> list[int]:
    found = [watch.check(step, torch.tensor(loss)) for step, loss in enumerate(losses, start)]
    return [spike.step for spike in found if spike is not None]


def test_spikes_in_noise_are_found_and_noise_is_not():
    losses = noisy(200)
    assert told(SpikeWatch(), losses) == []
    losses[57], losses[120] = 3.0, 2.5
    assert told(SpikeWatch(), losses) == [57, 120]
    assert told(SpikeWatch(factor=2.8), losses) == [57]
    assert told(SpikeWatch(deviations=100.0), losses) == []


def test_both_conditions_are_needed():
    smooth = [1.0 - 0.001 * step for step in range(50)]
    assert told(SpikeWatch(), [*smooth, 1.5]) == []  # far outside the MAD, not twice the median
    wild = [0.2 * (7 * step % 20) for step in range(50)]
    assert told(SpikeWatch(), [*wild, 4.5]) == []  # twice the median, inside the spread
    assert told(SpikeWatch(), [0.0] * 20 + [0.1]) == [20]


def test_what_is_not_finite_counts_at_once_and_stays_out_of_the_window():
    watch = SpikeWatch(least=10, window=20)
    losses = [math.nan, 1.0, math.inf, -math.inf, *noisy(20)]
    assert told(watch, losses) == [0, 2, 3] and all(map(math.isfinite, watch.known))
    assert told(SpikeWatch(least=10), [1.0] * 9 + [50.0]) == [] and told(SpikeWatch(least=10), [1.0] * 10 + [50.0]) == [
        10
    ]


def test_a_new_level_becomes_normal():
    watch = SpikeWatch(window=20)
    found = told(watch, [*noisy(30), *noisy(40, level=5.0)])
    assert found[0] == 30 and len(found) <= 11 and told(watch, noisy(20, level=5.0)) == []


def test_what_a_spike_says():
    watch = SpikeWatch()
    losses = [*noisy(40), 9.0, *noisy(10), math.nan]
    found = [watch.check(step, torch.tensor(loss)) for step, loss in enumerate(losses)]
    assert [spike.step for spike in found if spike] == [40, 51]
    assert "median of the last 40 losses 0.99" in found[40].reason and found[51].reason == "loss nan"


def test_gradients_are_checked():
    watch, loss = SpikeWatch(), torch.tensor(1.0)
    huge = torch.full((4,), 3e38)
    assert watch.check(0, loss, [None, torch.ones(3), huge]) is None  # finite, though their sum is not
    found = watch.check(1, loss, [torch.ones(3), torch.tensor([1.0, math.inf])])
    assert found == Spike(1, 1.0, "a gradient is not finite (loss 1)")


@pytest.mark.parametrize(
    "options", [{"factor": 1.0}, {"factor": math.nan}, {"deviations": 0.0}, {"least": 1}, {"window": 5, "least": 6}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match="out of range"):
        SpikeWatch(**options)


def test_rebuild():
    model, loss = build(ARGUMENTS)
    assert isinstance(model, UNet) and model.head.out_channels == 2 and model.dropout.p == 0.2
    assert model.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert loss(model, (torch.randn(1, 3, 16, 16), torch.ones(1, 16, 16, dtype=torch.int64))).shape == ()
    for task in ("instance", "detection"):
        options = {"task": task, "scale": 0.0625, "instances": 3, "learn_scales": "none"}
        model, loss = build(ARGUMENTS | {"options": options, "image_size": [32, 32]})
        box = torch.tensor([[4.0, 4.0, 20.0, 20.0]])
        masks = torch.zeros(1, 32, 32, dtype=torch.bool)
        masks[:, 4:20, 4:20] = True
        target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "masks": masks}
        target["crowd"] = torch.zeros(1, dtype=torch.bool)
        assert loss(model, (torch.randn(1, 3, 32, 32), [target])).shape == ()
    with pytest.raises(ValueError, match="unknown here"):
        build(ARGUMENTS | {"options": {"no such": 1}})
    for arguments in ({}, ARGUMENTS | {"more": 1}):
        with pytest.raises(ValueError, match="not the arguments of a bundle"):
            build(arguments)


def test_the_step_of_a_spike_in_a_training_loop_is_replayed(tmp_path: Path, capsys):
    """As a trainer would: check before optimizer.step(), write the bundle, and the command finds the same loss."""
    torch.manual_seed(0)
    model, loss_function = build(ARGUMENTS)
    recipe = nv.load_recipe("unet")
    nv.set_precision(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watch, path = SpikeWatch(window=4, least=4, factor=1.3, deviations=3.0), tmp_path / "step.pt"
    for step in range(6):
        images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
        masks = torch.zeros(2, 16, 16, dtype=torch.int64)
        if step == 5:  # a bad batch
            masks = 1 - masks
        state = nv.extra_state(model)
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        with nv.nvfp4_autocast(recipe):
            loss = loss_function(model, (images, masks))
        loss.backward()
        spike = watch.check(step, loss, (p.grad for p in model.parameters()))
        if spike is not None:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()
            write_bundle(
                path,
                state=model.state_dict(),
                batch=(images, masks),
                seed=100 + step,
                recipe_text=recipe.to_toml(),
                autocast=None,
                arguments=ARGUMENTS,
                spike=spike,
                nvfp4_state=state,
            )
            break
        optimizer.step()
    assert spike is not None and spike.step == 5
    found = diagnose(path)
    assert found.nvfp4.loss == found.recorded_loss == float(loss.detach())
    assert found.nvfp4.gradient_norm == pytest.approx(float(gradient), rel=1e-12)
    assert found.step == 5 and found.reason == spike.reason
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    assert cli.main(["diagnose", str(path)]) == 0 and spike.reason in capsys.readouterr().out
