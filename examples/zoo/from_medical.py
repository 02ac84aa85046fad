"""Segmentation: networks of monai in two and three dimensions, and of segmentation-models-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.inputs import Models, adder, normal

MODELS: Models = {}
_add_monai = adder("monai", MODELS)
_add_smp = adder("smp", MODELS)


def _monai(name: str, shape: tuple[int, ...], *args: Any, key: str = "", call: Any = None, **settings: Any) -> None:
    def build() -> nn.Module:
        import monai.networks.nets as nets

        return getattr(nets, name)(*args, **settings)

    _add_monai(key or name, build, normal(shape), **(call or {}))


CUBE = (2, 1, 16, 16, 16)
LARGE = (1, 1, 32, 32, 32)
_monai("UNet", CUBE, 3, 1, 3, (16, 32, 64), (2, 2), num_res_units=2, key="UNet, 3-D")
_monai("UNet", (4, 1, 32, 32), 2, 1, 3, (16, 32, 64), (2, 2), num_res_units=2, norm="batch", key="UNet, 2-D")
_monai("DynUNet", CUBE, 3, 1, 3, (3, 3, 3), (1, 2, 2), (2, 2), filters=(16, 32, 64))
_monai(
    "DynUNet", LARGE, 3, 1, 3, (3,) * 4, (1, 2, 2, 2), (2, 2, 2), filters=(16, 32, 64, 64), deep_supervision=True,
    deep_supr_num=2, key="DynUNet, deep supervision",
)
_monai("SwinUNETR", (2, 1, 64, 64), 1, 3, feature_size=24, depths=(1,) * 4, num_heads=(1, 2, 4, 8), spatial_dims=2)
_monai("SegResNet", CUBE, 3, 16, 1, 3, blocks_down=(1, 1, 1), blocks_up=(1, 1))
_monai("VNet", LARGE, 3, 1, 3)
_monai("AttentionUnet", CUBE, 3, 1, 3, (16, 32, 64), (2, 2))
_monai("UNETR", LARGE, 1, 3, (32, 32, 32), feature_size=16, hidden_size=96, mlp_dim=128, num_heads=4)
_monai("BasicUNet", LARGE, 3, 1, 3, (16, 16, 32, 32, 32, 16))
_monai("DenseNet", (2, 1, 32, 32, 32), 3, 1, 5, block_config=(2, 2, 2))
_monai("HighResNet", (1, 1, 8, 8, 8), 3, 1, 3)
_monai(
    "MedNeXt", LARGE, 3, 16, 1, 3, encoder_expansion_ratio=2, decoder_expansion_ratio=2,
    bottleneck_expansion_ratio=2, blocks_down=(1,) * 4, blocks_bottleneck=1, blocks_up=(1,) * 4,
)
_monai(
    "DiffusionModelUNet", (4, 1, 16, 16), 2, 1, 1, channels=(32, 64), attention_levels=(False, True),
    num_res_blocks=1, num_head_channels=32, norm_num_groups=16,
    call={"timesteps": torch.tensor([1, 5, 10, 100])},
)
_monai(
    "AutoencoderKL", (4, 1, 32, 32), 2, 1, 1, channels=(32, 64), attention_levels=(False, False),
    num_res_blocks=(1, 1), norm_num_groups=16, latent_channels=4,
)


def _smp(architecture: str, encoder: str, size: int = 64, batch: int = 2, **settings: Any) -> None:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, architecture)(encoder_name=encoder, encoder_weights=None, classes=4, **settings)

    _add_smp(f"{architecture}, {encoder}", build, normal((batch, 3, size, size)))


DECODER = (64, 32, 32, 16, 16)
_smp("Unet", "tu-resnet10t", decoder_channels=DECODER)
_smp("Unet", "tu-test_resnet", batch=4, encoder_depth=4, decoder_channels=DECODER[1:])
_smp("Unet", "tu-mobilenetv3_small_075", decoder_channels=DECODER)
_smp("UnetPlusPlus", "mobilenet_v2", decoder_channels=DECODER)
_smp("MAnet", "mobilenet_v2", decoder_channels=DECODER)
_smp("Linknet", "mobilenet_v2")
_smp("FPN", "efficientnet-b0")
_smp("PSPNet", "mobilenet_v2")
_smp("PAN", "mobilenet_v2", size=128)
_smp("DeepLabV3Plus", "resnet18", size=32, batch=4)
_smp("UPerNet", "tu-convnext_atto", decoder_channels=32)
_smp("Segformer", "mit_b0")
