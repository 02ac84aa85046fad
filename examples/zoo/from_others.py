"""Models of diffusers, ultralytics, kornia and demucs: diffusion, real-time detection, features, music separation."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from zoo.inputs import Models, adder, masks, normal

MODELS: Models = {}


# ---- diffusers ------------------------------------------------------------------------------------------------------

_add = adder("diffusers", MODELS)
STEPS = torch.tensor([1, 5, 50, 500])
NOISY = normal((4, 4, 16, 16))


def _diffusers(name: str, *inputs: Any, settings: dict[str, Any], **kwargs: Any) -> None:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(norm_num_groups=16, **settings)

    _add(name, build, *inputs, **kwargs)


TWO = dict(layers_per_block=1, block_out_channels=(32, 64))
CODER = dict(
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(32, 64)
)
_diffusers(
    "UNet2DModel", normal((4, 3, 16, 16)), STEPS,
    settings=dict(
        **TWO, sample_size=16, in_channels=3, out_channels=3, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
)
_diffusers(
    "UNet2DConditionModel", NOISY, STEPS, normal((4, 7, 32)),
    settings=dict(
        **TWO, sample_size=16, in_channels=4, out_channels=4, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
)
_diffusers("AutoencoderKL", normal((4, 3, 32, 32)), settings=dict(**CODER, latent_channels=4))
_diffusers("VQModel", normal((4, 3, 32, 32)), settings=dict(**CODER, num_vq_embeddings=32))
_diffusers(
    "DiTTransformer2DModel", NOISY, timestep=STEPS, class_labels=torch.tensor([1, 2, 3, 4]),
    settings=dict(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=16,
        num_embeds_ada_norm=10,
    ),
)


# ---- ultralytics ----------------------------------------------------------------------------------------------------

_add_yolo = adder("ultralytics", MODELS)


def _yolo(name: str, kind: str = "DetectionModel") -> None:
    def build() -> nn.Module:
        from ultralytics.cfg import get_cfg
        from ultralytics.nn import tasks

        model = getattr(tasks, kind)(f"{name}.yaml", nc=4, verbose=False)
        model.args = get_cfg()  # the weights of the parts of its loss
        return model

    images = normal((2, 3, 64, 64)).sigmoid()
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.3], [0.6, 0.6, 0.5, 0.5]])
    batch: dict[str, Tensor] = {
        "img": images, "cls": torch.tensor([[1.0], [2.0], [0.0]]), "bboxes": boxes,
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
    }
    if kind == "SegmentationModel":
        batch["masks"] = masks(2, 16)
    if kind == "ClassificationModel":
        batch = {"img": images, "cls": torch.tensor([0, 1])}
    _add_yolo(name, build, batch, loss=lambda output: output[0].sum(), evaluation=((images,), {}))


_yolo("yolov5n")
_yolo("yolov8n")
_yolo("yolov8n-seg", "SegmentationModel")
_yolo("yolov8n-cls", "ClassificationModel")
_yolo("yolov9t")
_yolo("yolov10n")
_yolo("yolo11n")
_yolo("yolo12n")
_yolo("yolo26n")


# ---- kornia ---------------------------------------------------------------------------------------------------------

_add_kornia = adder("kornia", MODELS)


def _kornia(name: str, places: tuple[str, ...], shape: tuple[int, ...], **settings: Any) -> None:
    """Add a class of kornia, which has moved some of them from one module to another."""

    def build() -> nn.Module:
        for place in places[:-1]:
            try:
                return getattr(importlib.import_module(place), name)(**settings)
            except ImportError:
                continue
        return getattr(importlib.import_module(places[-1]), name)(**settings)

    _add_kornia(name, build, normal(shape))


_kornia("DexiNed", ("kornia.filters.dexined", "kornia.models.dexined"), (1, 3, 64, 64), pretrained=False)
_kornia("HardNet", ("kornia.feature",), (8, 1, 32, 32), pretrained=False)
_kornia("Unet", ("kornia.feature.disk._unets",), (2, 3, 64, 64), in_features=3, down=[16, 32, 64], up=[32, 65])
_kornia(
    "TinyViT", ("kornia.models.tiny_vit", "kornia.contrib.models.tiny_vit"), (4, 3, 64, 64), img_size=64,
    num_classes=10, embed_dims=[32, 64, 96, 128], depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4],
    window_sizes=[2, 2, 2, 2], drop_path_rate=0.0,
)


# ---- demucs ---------------------------------------------------------------------------------------------------------

_add_demucs = adder("demucs", MODELS)
def _demucs(module: str, name: str, samples: int, **settings: Any) -> None:
    def build() -> nn.Module:
        return getattr(importlib.import_module(f"demucs.{module}"), name)(sources=["a", "b"], **settings)

    _add_demucs(name, build, normal((2, 2, samples)))


_demucs("demucs", "Demucs", 2000, channels=16, depth=3, lstm_layers=1, resample=False)
_demucs(
    "htdemucs", "HTDemucs", 4000, channels=16, depth=3, nfft=512, t_layers=1, t_heads=4, bottom_channels=0, segment=0.2,
    samplerate=22050, use_train_segment=False, freq_emb=0, t_hidden_scale=2.0,
)
