"""Train a Segformer in NVFP4 with the Hugging Face Trainer, and resume it bit for bit.

    python examples/frameworks/transformers_segformer.py --steps 12
    python examples/frameworks/transformers_segformer.py --steps 16 --resume

Two things differ from a plain script: compute_loss_context_manager enters the context, for training and evaluation, and
NVFP4Callback keeps nv.extra_state in the checkpoints. What the Trainer hides from the context:
- bf16=True is accelerate's: it wraps model.forward in torch.autocast, inside of the context. They work together.
- torch_compile=True compiles the model before the first step and traces the context.
- With several GPUs and no launcher it uses nn.DataParallel, whose threads the context does not reach: use torchrun.
- When it resumes, it passes by the weights of models whose names save_pretrained converts, Segformer's among them
  (5.23 only logs it): build the model from the checkpoint.
- It has no EMA. Its checkpoints hold the random state, and with it the position in the stream of stochastic rounding;
  delayed scales, as in this recipe, come from the callback.
"""

import argparse
from collections.abc import Sequence

import _setup  # noqa: F401  isort: skip
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv.integrations.transformers import NVFP4Callback

CLASSES, SIZE = 3, 64
RECIPE = nv.NVFP4BlockScaling(tensor_scale="delayed", precision={"decode_head.classifier": "high"})


def squares(index: int) -> dict[str, torch.Tensor]:
    """Return a noisy image with a bright and a dark square, and the class of each pixel."""
    generator = torch.Generator().manual_seed(index)
    image, labels = torch.randn(3, SIZE, SIZE, generator=generator), torch.zeros(SIZE, SIZE, dtype=torch.long)
    for kind, shade in ((1, 2.0), (2, -2.0)):
        y, x = (slice(at, at + SIZE // 2) for at in torch.randint(0, SIZE // 2, (2,), generator=generator).tolist())
        labels[y, x], image[:, y, x] = kind, image[:, y, x] + shade
    return {"pixel_values": image, "labels": labels}


class NVFP4Trainer(Trainer):
    """A Trainer whose forward pass and loss run in NVFP4."""

    def __init__(self, *args, recipe: nv.NVFP4BlockScaling, **kwargs) -> None:
        super().__init__(*args, **kwargs, callbacks=[NVFP4Callback()])
        self.nvfp4 = nv.prepare(self.model, recipe)

    def compute_loss_context_manager(self):
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.nvfp4)
        return stack


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, print what ran in NVFP4, and return the losses of all steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="in total, those before a resume too")
    parser.add_argument("--folder", default="runs/segformer")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    settings = TrainingArguments(
        options.folder, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=2e-3, save_steps=4,
        logging_steps=1, bf16=torch.cuda.is_available(), lr_scheduler_type="constant", report_to="none")
    torch.manual_seed(0)
    sizes = dict(hidden_sizes=[16, 32, 64, 128], depths=[1] * 4, decoder_hidden_size=64, num_labels=CLASSES)
    last, kind = get_last_checkpoint(options.folder) if options.resume else None, SegformerForSemanticSegmentation
    model = kind(SegformerConfig(**sizes)) if last is None else kind.from_pretrained(last)
    trainer = NVFP4Trainer(model, settings, train_dataset=[squares(i) for i in range(64)], recipe=RECIPE)
    trainer.train(resume_from_checkpoint=last)
    batch = {name: value[None].to(settings.device) for name, value in squares(0).items()}
    print(nv.coverage(model, recipe=RECIPE, **batch))
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    main()
