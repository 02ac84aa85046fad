"""Vision and audio models of transformers, built from configurations of a few thousand parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.inputs import Models, adder, classes, distance, masks, normal, own_loss, pixel_classes

MODELS: Models = {}
_add = adder("transformers", MODELS)


def _model(name: str, config: str, *inputs: Any, loss: Any = own_loss, settings: dict[str, Any], **kwargs: Any) -> None:
    """Add the model of that class, made from a configuration of the other class."""

    def build() -> nn.Module:
        import transformers

        own = {key: value() if callable(value) else value for key, value in settings.items()}
        return getattr(transformers, name)(getattr(transformers, config)(**own))

    _add(name, build, *inputs, loss=loss, **kwargs)


def _config(kind: str, **settings: Any) -> Any:
    """Return a function that makes a backbone's configuration, once transformers is imported."""

    def make() -> Any:
        import transformers

        return getattr(transformers, kind)(**settings)

    return make


FOUR = [1, 1, 1, 1]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
IMAGES = normal((4, 3, 64, 64))
HEADS = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)


def _boxes(count: int) -> list[dict[str, torch.Tensor]]:
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.3], [0.3, 0.4, 0.2, 0.2]])
    return [{"class_labels": torch.tensor([1, 2]), "boxes": boxes.clone()} for _ in range(count)]


# Classification.
_model(
    "ConvNextV2ForImageClassification", "ConvNextV2Config", pixel_values=IMAGES, labels=classes(4),
    settings=dict(hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 2, 1], num_labels=10),
)
_model(
    "ResNetForImageClassification", "ResNetConfig", pixel_values=IMAGES, labels=classes(4),
    settings=dict(embedding_size=16, hidden_sizes=[32, 64, 128, 128], depths=FOUR, num_labels=10),
)
_model(
    "SwinForImageClassification", "SwinConfig", pixel_values=IMAGES, labels=classes(4),
    settings=dict(image_size=64, embed_dim=32, depths=[1, 1, 2], num_heads=[1, 2, 4], window_size=4, num_labels=10),
)
_model(
    "ViTForImageClassification", "ViTConfig", pixel_values=IMAGES, labels=classes(4),
    settings=dict(**HEADS, image_size=64, patch_size=16, num_labels=10),
)
_model(
    "Dinov2ForImageClassification", "Dinov2Config", pixel_values=normal((4, 3, 56, 56)), labels=classes(4),
    settings=dict(image_size=56, patch_size=14, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_labels=10),
)
_model("CLIPVisionModel", "CLIPVisionConfig", pixel_values=IMAGES, loss=distance,
       settings=dict(**HEADS, image_size=64, patch_size=16))
_model(
    "VideoMAEForVideoClassification", "VideoMAEConfig", pixel_values=normal((4, 4, 3, 32, 32)), labels=classes(4, 5),
    settings=dict(**HEADS, image_size=32, patch_size=16, num_frames=4, num_labels=5),
)

# Segmentation, depth and detection.
_model(
    "SegformerForSemanticSegmentation", "SegformerConfig", pixel_values=IMAGES, labels=pixel_classes(4, 64, 64),
    settings=dict(depths=FOUR, hidden_sizes=[16, 32, 64, 128], decoder_hidden_size=64, num_labels=4),
)
_model(
    "UperNetForSemanticSegmentation", "UperNetConfig", pixel_values=IMAGES[:2], labels=pixel_classes(2, 64, 64),
    settings=dict(
        backbone_config=_config("ConvNextConfig", hidden_sizes=[16, 32, 64, 96], depths=FOUR, out_features=STAGES),
        hidden_size=32, num_labels=4, auxiliary_in_channels=64, auxiliary_channels=32,
    ),
)
_model(
    "DepthAnythingForDepthEstimation", "DepthAnythingConfig", pixel_values=normal((2, 3, 56, 56)), loss=distance,
    settings=dict(
        backbone_config=_config(
            "Dinov2Config", image_size=56, patch_size=14, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            out_features=STAGES, reshape_hidden_states=False,
        ),
        reassemble_hidden_size=64, patch_size=14, neck_hidden_sizes=[16, 32, 64, 64], fusion_hidden_size=32,
        head_in_channels=32,
    ),
)
_model(
    "Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", pixel_values=IMAGES[:2],
    mask_labels=[masks(2, 64), masks(2, 64)], class_labels=[torch.tensor([0, 1]), torch.tensor([2, 3])],
    evaluation=((), {"pixel_values": IMAGES[:2]}),
    settings=dict(
        backbone_config=_config(
            "SwinConfig", image_size=64, embed_dim=32, depths=FOUR, num_heads=[1, 2, 4, 4], window_size=4,
            out_features=STAGES,
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=4, num_queries=8, dim_feedforward=64, encoder_feedforward_dim=64, num_labels=4,
        train_num_points=64,
    ),
)
_model(
    "DetrForObjectDetection", "DetrConfig", pixel_values=IMAGES[:2], labels=_boxes(2),
    evaluation=((), {"pixel_values": IMAGES[:2]}),
    settings=dict(
        backbone_config=_config(
            "ResNetConfig", embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=FOUR, out_features=["stage4"]
        ),
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=64, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=128, decoder_ffn_dim=128, encoder_attention_heads=4,
        decoder_attention_heads=4, num_queries=10, num_labels=4, dropout=0.0, auxiliary_loss=False,
    ),
)
_model(
    "RTDetrForObjectDetection", "RTDetrConfig", pixel_values=IMAGES[:2], labels=_boxes(2),
    evaluation=((), {"pixel_values": IMAGES[:2]}),
    settings=dict(
        backbone_config=_config(
            "RTDetrResNetConfig", embedding_size=16, hidden_sizes=[32, 48, 64, 96], depths=FOUR,
            layer_type="bottleneck", out_features=STAGES[1:],
        ),
        encoder_hidden_dim=32, encoder_in_channels=[48, 64, 96], encoder_layers=1, encoder_ffn_dim=64,
        encoder_attention_heads=4, d_model=32, num_queries=10, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64,
        decoder_layers=1, decoder_attention_heads=4, num_denoising=0, num_labels=4, anchor_image_size=None,
        dropout=0.0,
    ),
)

# Sound: convolutions along time.
NO_DROPOUT = dict(hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0)
_model(
    "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", input_values=normal((4, 4000)), labels=classes(4, 5),
    settings=dict(
        **{**HEADS, "num_hidden_layers": 1}, **NO_DROPOUT, conv_dim=(32,) * 7, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, num_labels=5, classifier_proj_size=32, layerdrop=0.0, mask_time_prob=0.0,
        mask_feature_prob=0.0,
    ),
)
_model(
    "EncodecModel", "EncodecConfig", input_values=normal((2, 1, 4000)), loss=distance,
    settings=dict(num_filters=16, hidden_size=32, codebook_dim=32, num_lstm_layers=1, codebook_size=64),
)
_model(
    "DacModel", "DacConfig", input_values=normal((2, 1, 2000)), loss=distance,
    settings=dict(
        encoder_hidden_size=16, downsampling_ratios=[2, 4], decoder_hidden_size=64, n_codebooks=2, codebook_size=32,
        codebook_dim=8, upsampling_ratios=[4, 2], hidden_size=64,
    ),
)
_model(
    "SpeechT5HifiGan", "SpeechT5HifiGanConfig", normal((2, 10, 80)), loss=distance,
    settings=dict(
        model_in_dim=80, upsample_initial_channel=64, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8]
    ),
)


def _whisper() -> nn.Module:
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(
        transformers.WhisperConfig(
            d_model=64, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=128, num_mel_bins=80,
            max_source_positions=50,
        )
    )


_add("WhisperEncoder", _whisper, input_features=normal((4, 80, 100)))
