"""Train a YOLO from its yaml in NVFP4 with the ultralytics trainer.

    python examples/frameworks/ultralytics_yolo.py --model yolo11n.yaml --epochs 4

A subclass of the trainer enters the context around training; everything else is ultralytics'. A subclass and not
model.add_callback, because the processes that it starts for several GPUs import the trainer's class and know no
callbacks, and because no callback runs where it halves the batch size after running out of memory. What it hides:
- Its autocast is float16 with a GradScaler (amp=True), after a check that downloads a model; "bf16" needs no scaler.
- Its EMA is a copy of the model, and validation scores the EMA: in NVFP4 here, since it runs inside of train(). What
  you load afterwards, and val() on it, runs in high precision unless you enter the context again.
- compile=True compiles the model before the first batch, inside of the context.
- Its checkpoints are pickles of the EMA in half precision. They hold what set_precision notes at a layer, and need
  te_nvfp4_cv to be loaded if anything was noted (here: nothing). They hold no random state: a resume is not exact.
- fuse() at the end folds batch norms into convolutions, as in any other run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import _setup  # noqa: F401  isort: skip
import numpy as np
import torch
from PIL import Image
from ultralytics.models.yolo.detect import DetectionTrainer

import te_nvfp4_cv as nv


def draw(folder: Path, count: int = 16, size: int = 64) -> Path:
    """Write noisy images of a bright or a dark square in ultralytics' layout, and return the path of its data.yaml."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        image, half, kind = random.normal(128, 20, (size, size, 3)), size // 2, number % 2
        x, y = random.integers(0, half, 2)
        image[y : y + half, x : x + half] += 100 if kind else -100
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.png")
        box = f"{kind} {(x + half / 2) / size} {(y + half / 2) / size} 0.5 0.5\n"
        (folder / "labels" / f"{number}.txt").write_text(box)
    (folder / "data.yaml").write_text(f"path: {folder.resolve()}\ntrain: images\nval: images\nnames: [dark, bright]\n")
    return folder / "data.yaml"


class NVFP4Trainer(DetectionTrainer):
    """A DetectionTrainer that trains and validates in NVFP4."""

    def train(self) -> None:
        self.losses = []
        self.add_callback("on_train_epoch_end", lambda own: own.losses.append(float(sum(own.tloss.values()))))
        with nv.nvfp4_autocast("default"):
            super().train()


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, print what ran in NVFP4, and return the mean losses of the epochs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="yolo11n.yaml")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/yolo"))
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    settings = dict(
        model=options.model, data=str(draw(options.folder / "data")), epochs=options.epochs, imgsz=64, batch=8, nbs=8,
        workers=0, amp="bf16" if gpu else False, device=0 if gpu else "cpu", project=str(options.folder.resolve()),
        exist_ok=True, plots=False, pretrained=False, warmup_epochs=0, optimizer="AdamW", lr0=2e-3, mosaic=0,
    )
    trainer = NVFP4Trainer(overrides=settings)
    trainer.train()
    share = nv.coverage(trainer.model.train(), torch.rand(8, 3, 64, 64, device=trainer.device)).nvfp4_flops_share
    print(f"loss {trainer.losses[0]:.2f} -> {trainer.losses[-1]:.2f}, {share:.0%} of FLOPs in NVFP4")
    return trainer.losses


if __name__ == "__main__":
    main()
