"""Models of torchvision: classifiers, detectors, segmentation, video and optical flow. LIGHT are the smallest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.inputs import Models, adder, masks, normal, sum_of_losses

MODELS: Models = {}
_add = adder("torchvision", MODELS)


def _module(path: str) -> Any:
    """Import a module of torchvision; beside a torch of another build, with a stand-in for its compiled part."""
    import importlib

    with contextlib.suppress(ImportError):
        from _torchvision import ensure_torchvision

        ensure_torchvision()
    return importlib.import_module(f"torchvision.models{path}")


def _model(name: str, *inputs: Any, path: str = "", classes: int = 10, key: str = "", **settings: Any) -> None:
    def build() -> nn.Module:
        return getattr(_module(path), name)(num_classes=classes, **settings)

    _add(key or name, build, *inputs)


SMALL = normal((4, 3, 32, 32))
IMAGES = normal((2, 3, 64, 64))
CLIP = normal((1, 3, 4, 32, 32))
NO_WEIGHTS = dict(weights=None, weights_backbone=None)

# Classifiers.
_model("resnet18", SMALL)
_model("squeezenet1_1", normal((4, 3, 64, 64)))
_model("shufflenet_v2_x0_5", SMALL)
_model("mobilenet_v2", SMALL)
_model("mobilenet_v3_small", SMALL)
_model("mnasnet0_5", normal((4, 3, 64, 64)))
_model("efficientnet_b0", IMAGES)
_model("regnet_y_400mf", SMALL)
_model("googlenet", normal((4, 3, 64, 64)), init_weights=False, aux_logits=False)
_model("DenseNet", SMALL, key="densenet", growth_rate=16, block_config=(2, 2, 2), num_init_features=16)
_model(
    "DenseNet", SMALL, key="densenet, memory_efficient", growth_rate=16, block_config=(2, 2, 2), num_init_features=16,
    memory_efficient=True,
)
_model(
    "VisionTransformer", SMALL, key="vit", image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64,
    mlp_dim=128,
)
_model(
    "SwinTransformer", normal((4, 3, 64, 64)), key="swin", patch_size=[4, 4], embed_dim=32, depths=[1, 1],
    num_heads=[1, 2], window_size=[4, 4],
)

# Segmentation and video.
_model("deeplabv3_mobilenet_v3_large", IMAGES, path=".segmentation", classes=4, **NO_WEIGHTS)
_model("lraspp_mobilenet_v3_large", IMAGES, path=".segmentation", classes=4, **NO_WEIGHTS)
for _name in ("r3d_18", "mc3_18", "r2plus1d_18"):
    _model(_name, CLIP, path=".video", classes=5)


def _raft() -> nn.Module:
    return _module(".optical_flow").raft_small(weights=None)


_add("raft_small", _raft, normal((1, 3, 128, 128)), normal((1, 3, 128, 128), 1), num_flow_updates=2)


# ---- detectors ------------------------------------------------------------------------------------------------------


def _targets(with_masks: bool = False) -> list[dict[str, torch.Tensor]]:
    boxes = torch.tensor([[5.0, 5.0, 30.0, 30.0], [20.0, 20.0, 50.0, 60.0]])
    found = [{"boxes": boxes.clone(), "labels": torch.tensor([1, 2])} for _ in range(2)]
    for target in found if with_masks else ():
        target["masks"] = masks(2, 64).to(torch.uint8)
    return found


def _detector(name: str, settings: Callable[[], dict[str, Any]], with_masks: bool = False) -> None:
    def build() -> nn.Module:
        pyramid = _module(".detection.backbone_utils").resnet_fpn_backbone
        options = settings()
        body = pyramid(backbone_name="resnet18", weights=None, trainable_layers=5, **options.pop("body", {}))
        return getattr(_module(".detection"), name)(body, 4, min_size=64, max_size=64, **options)

    images = [normal((3, 64, 64), seed).sigmoid() for seed in (1, 2)]
    _add(name, build, images, _targets(with_masks), loss=sum_of_losses, evaluation=((images,), {}))


def _few_boxes() -> dict[str, Any]:
    counts = dict(rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=20, rpn_pre_nms_top_n_test=50)
    return dict(**counts, rpn_post_nms_top_n_test=10, box_batch_size_per_image=8)


def _dense() -> dict[str, Any]:
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    return {"body": dict(returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))}


_detector("MaskRCNN", _few_boxes, with_masks=True)
_detector("FasterRCNN", _few_boxes)
_detector("FCOS", _dense)
_detector("RetinaNet", _dense)
