"""Entry points of torch.hub: one per model."""

from adfeatures.factory import (  # noqa: F401
    adpretrain_clip_base,
    adpretrain_clip_large,
    adpretrain_dinov2_base,
    adpretrain_dinov2_large,
    adpretrain_efficientnet_lite,
    adpretrain_imagebind_huge,
    adpretrain_timm,
    residual_lite,
    residual_timm,
)

dependencies = ["torch", "timm", "huggingface_hub", "safetensors", "PIL", "numpy"]
