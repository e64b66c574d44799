"""What the image processor of a Hugging Face folder is told.

`preprocessor_config.json` says it, and where that is silent the processor's class, as transformers has it.
"""

from __future__ import annotations

import re
from typing import Any

from divault.errors import UnsupportedModel
from divault.models.files import Folder

_FILE = "preprocessor_config.json"
_OF_TYPE = {
    "beit": "Beit",
    "convnext": "ConvNext",
    "convnextv2": "ConvNext",
    "deit": "DeiT",
    "dinov2": "Bit",
    "mobilenet_v2": "MobileNetV2",
    "resnet": "ConvNext",
    "swin": "ViT",
    "vit": "ViT",
}
"""Processors by model type, where the file names none."""
_KNOWN = frozenset(_OF_TYPE.values()) | {"CLIP", "MobileNetV1"}
_NAME = re.compile(r"(\w+?)(?:ImageProcessor|FeatureExtractor)(?:Fast|Pil)?", re.ASCII)
_MEMBERS = (
    *("size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "rescale_factor", "resample"),
    *("image_mean", "image_std", "crop_pct", "default_to_square"),
)


def settings_of(folder: Folder, model_type: str) -> dict[str, Any]:
    """All of `_MEMBERS` that the processor has. Raises UnsupportedModel without a file or for another processor."""
    import transformers

    if folder.find(_FILE) is None:
        raise unsupported("no preprocessor_config.json beside it", "save the image processor into the folder too")
    told = folder.json_object(_FILE)
    name = str(told.get("image_processor_type") or told.get("feature_extractor_type") or "")
    found = _NAME.fullmatch(name)
    kind = found[1] if found else "" if name else _OF_TYPE[model_type]
    if kind not in _KNOWN:
        raise unsupported(f"the image processor {name[:60]!a}", f"use one of {', '.join(sorted(_KNOWN))}")
    processor = getattr(transformers, f"{kind}ImageProcessorPil")
    return {
        member: told[member] if told.get(member) is not None else getattr(processor, member)
        for member in _MEMBERS
        if hasattr(processor, member) or (told.get(member) is not None and member != "crop_pct")
    }


def unsupported(seen: str, advice: str) -> UnsupportedModel:
    """The refusal of an image classifier with what was seen."""
    return UnsupportedModel(
        f"an image classifier with {seen}: {advice}",
        seen=f"an image classifier with {seen}",
        supported=f"preprocessor_config.json of {', '.join(sorted(_KNOWN))}",
    )
