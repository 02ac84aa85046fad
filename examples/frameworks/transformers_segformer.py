"""Train a Segformer in NVFP4 with the Hugging Face Trainer, and resume it bit for bit.

    python examples/frameworks/transformers_segformer.py --steps 12
    python examples/frameworks/transformers_segformer.py --steps 16 --resume

Two things differ from a plain script: compute_loss_context_manager enters the context, for training and evaluation, and
NVFP4Callback keeps nv.extra_state in the checkpoints. What the Trainer hides from the context:
- bf16=True is accelerate's: it wraps model.forward in torch.autocast, inside of the context, and they work together.
- torch_compile=True compiles the model before the first step and traces the context.
- With several GPUs and no launcher the Trainer uses nn.DataParallel, whose threads the context does not reach: start
  the script with torchrun or accelerate launch.
- It has no EMA. Its checkpoints hold random states, and so the position in the stream of stochastic rounding; delayed
  scales (--recipe delayed) come from the callback.
"""

import argparse
from collections.abc import Sequence

import _setup  # noqa: F401  isort: skip
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

import te_nvfp4_cv as nv
from te_nvfp4_cv.integrations.transformers import NVFP4Callback

CLASSES, SIZE = 3, 64


class Squares(torch.utils.data.Dataset):
    """Noisy images with a bright and a dark square, and the class of each pixel."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        image, labels = torch.randn(3, SIZE, SIZE, generator=generator), torch.zeros(SIZE, SIZE, dtype=torch.long)
        for kind, shade in ((1, 2.0), (2, -2.0)):
            y, x = torch.randint(0, SIZE // 2, (2,), generator=generator).tolist()
            labels[y : y + SIZE // 2, x : x + SIZE // 2] = kind
            image[:, y : y + SIZE // 2, x : x + SIZE // 2] += shade
        return {"pixel_values": image, "labels": labels}


class NVFP4Trainer(Trainer):
    """A Trainer whose forward pass and loss run in NVFP4."""

    def __init__(self, *args, recipe: str, **kwargs) -> None:
        super().__init__(*args, **kwargs, callbacks=[NVFP4Callback()])
        nv.set_precision(self.model, {"decode_head.classifier": None})
        self.nvfp4 = nv.nvfp4_autocast(recipe)

    def compute_loss_context_manager(self):
        stack = super().compute_loss_context_manager()  # what the Trainer enters itself
        stack.enter_context(self.nvfp4)
        return stack


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, print what ran in NVFP4, and return the losses of all steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="in total, those before a resume too")
    parser.add_argument("--recipe", default="delayed")
    parser.add_argument("--folder", default="runs/segformer")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --folder")
    options = parser.parse_args(arguments)
    settings = TrainingArguments(
        options.folder, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=2e-3, save_steps=4,
        logging_steps=1, bf16=torch.cuda.is_available(), lr_scheduler_type="constant", report_to="none",
    )
    torch.manual_seed(0)
    config = SegformerConfig(hidden_sizes=[16, 32, 64, 128], depths=[1] * 4, decoder_hidden_size=64, num_labels=CLASSES)
    model = SegformerForSemanticSegmentation(config)
    trainer = NVFP4Trainer(model, settings, train_dataset=Squares(), recipe=options.recipe)
    trainer.train(resume_from_checkpoint=options.resume)
    batch = {name: value[None].to(settings.device) for name, value in Squares()[0].items()}
    print(nv.coverage(model, recipe=options.recipe, **batch))
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    main()
