"""Classifiers of timm: convolutional, residual, with attention, with windows, with weights that are standardized."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.inputs import Models, adder, normal

MODELS: Models = {}
_add = adder("timm", MODELS)


def _model(name: str, size: int = 64, batch: int = 2, **settings: Any) -> None:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **settings)

    _add(name, build, normal((batch, 3, size, size)))


NARROW = dict(channels=(16, 32, 48, 64))
WINDOWS = dict(img_size=64, window_size=4, embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))

# Residual networks and their relatives.
_model("resnet18", batch=4, **NARROW)
_model("resnet50", layers=(1, 1, 1, 1), **NARROW)
_model("resnext50_32x4d", layers=(1, 1, 1, 1), **NARROW)
_model("skresnet18", **NARROW)
_model("resnext26ts", size=32)
_model("res2net50_14w_8s", batch=4)
_model("resnetv2_18", size=32)
_model("resnetv2_50x1_bit", size=32, batch=1)
_model("cspresnet50", batch=1)
_model("dla34", batch=1)
_model("hrnet_w18_small")
_model("densenet121", batch=4, growth_rate=16, block_config=(2, 3, 3, 2))
_model("vgg11_bn", mlp_ratio=0.03)
_model("regnetx_002", batch=4)
_model("regnety_002", batch=4)
_model("nf_regnet_b0")
_model("repvgg_a0")
_model("botnet26t_256", batch=1, img_size=64)
_model("lambda_resnet26t", batch=1, img_size=64)
_model("hgnetv2_b0")
_model("test_resnet", size=48, batch=4)
_model("test_byobnet", batch=4)
_model("test_nfnet", size=48, batch=4)

# Small networks for small machines.
_model("efficientnet_b0", size=48, batch=4)
_model("tf_efficientnet_lite0", size=48)
_model("tf_efficientnetv2_b0", size=48)
_model("mobilenetv3_small_050", batch=8)
_model("mobilenetv3_large_100")
_model("mobilenetv4_conv_small_050", batch=4)
_model("mobileone_s0", size=32)
for _name in ("ghostnet_050", "repghostnet_050", "lcnet_050"):
    _model(_name, batch=4)
_model("rexnet_100", size=48)
_model("starnet_s1")
_model("shvit_s1")
_model("fasternet_t0", batch=4)
for _name in ("mobilevit_xxs", "mobilevitv2_050", "repvit_m0_9"):
    _model(_name)
_model("efficientvit_b0", batch=4)
_model("test_efficientnet", size=48, batch=4)
_model("test_efficientnet_gn", size=48, batch=4)

# ConvNeXt and its relatives.
_model("convnext_atto", batch=4, depths=(1, 1, 2, 1))
_model("convnextv2_atto", batch=4, depths=(1, 1, 2, 1))
_model("inception_next_atto")
_model("mambaout_femto")
_model("edgenext_xx_small", batch=4)
_model("poolformer_s12", size=32)
_model("test_convnext", size=48, batch=4)
_model("test_mambaout", batch=4)

# Attention.
_model("vit_tiny_patch16_224", batch=4, img_size=64, depth=3)
_model("naflexvit_base_patch16_gap", depth=2, embed_dim=192, num_heads=3)
_model("swin_tiny_patch4_window7_224", batch=4, **WINDOWS)
_model("swinv2_tiny_window8_256", batch=4, **WINDOWS)
_model("davit_tiny", batch=4, depths=(1, 1, 1, 1), embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4))
_model("coatnet_pico_rw_224", img_size=64)
_model("maxvit_pico_rw_256", img_size=64)
_model("pvt_v2_b0")
_model("xcit_nano_12_p16_224", img_size=64)
_model("visformer_tiny", img_size=64)
_model("levit_128", size=224)
_model("tiny_vit_5m_224", size=224, batch=1)
_model("fastvit_t8", batch=4)
_model("mixer_s32_224", batch=4, img_size=64)
_model("test_vit", size=160, batch=4)
