"""Image classification with networks of Hugging Face folders.

`{"image"}` is a PNG, JPEG or WebP file in base64 or a list of them, `{"pixels"}` rows of rows of red, green and blue
from 0 to 255, or a list of such images. What `preprocessor_config.json` says is done with each: resize, crop, rescale,
normalise; all by Pillow (extra `images`), since answers depend on how one resizes. The result is
`{"predictions": [{"label", "score", "scores"}]}`, one for each image.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from divault.errors import InputInvalid, ModelFailed, SealedFileDamaged, UnsupportedModel
from divault.models.base import Answer, Description, Inputs
from divault.models.classifiers import Classifier
from divault.models.files import Folder
from divault.models.image_processors import settings_of, unsupported
from divault.models.torch_runtime import Hardware, runtime

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

MAX_IMAGES = 64
MAX_PIXELS = 16_000_000
"""Of one image, before and after it is resized: 48 MB as bytes, whatever its file claims."""
FORMATS = ("PNG", "JPEG", "WEBP")
_PER_PASS = 16
_TOGETHER = 16
_LARGEST_SIDE = 2048
_COLOURS = "RGB"
_SMALL = 384
"""Networks with `crop_pct` resize to more and crop below this size, and only resize from it on."""
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, AssertionError, OverflowError, IndexError, KeyError),
    struct.error,
)
"""Besides its own errors the library lets through what its assumptions on palettes, sizes and EXIF give."""
_EXAMPLE = {"pixels": [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]}
_EXPECTED = (
    '{"image": ...} with a PNG, JPEG or WebP file in base64, or {"pixels": ...} with rows of rows of three numbers '
    f"from 0 to 255; or a list of 1 to {MAX_IMAGES} of them"
)


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is done with an image before the network sees it."""

    height: int
    width: int
    crop: tuple[int, int] | None = None
    """Height and width that are cut out of the middle."""
    shortest: int | None = None
    """The shorter side's length, instead of height and width."""
    resample: int = 2
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    deviation: tuple[float, ...] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, folder: Folder, model_type: str) -> Preparation:
        """As the folder's image processor has it.

        Raises SealedFileDamaged; UnsupportedModel where it is missing, or the library that resizes images.
        """
        if find_spec("PIL") is None:
            raise UnsupportedModel(
                "Pillow is not installed here, and images are not prepared without it: pip install 'divault[images]'",
                seen="an image classifier",
                supported="image classifiers, with the extra `images`",
            )
        told = settings_of(folder, model_type)
        if not told["do_resize"]:
            raise unsupported("images as large as they come (do_resize)", "save an image processor that resizes")
        size, crop = _size(told["size"], shorter=not told["default_to_square"]), None
        shortest = size.get("shortest_edge")
        if told.get("do_center_crop"):
            cut = _size(told.get("crop_size"), shorter=False)
            crop = (cut.get("height", cut.get("shortest_edge", 0)), cut.get("width", cut.get("shortest_edge", 0)))
        share = told.get("crop_pct")
        if share is not None and told.get("do_center_crop"):
            raise unsupported("a second crop (do_center_crop beside crop_pct)", "save an image processor with one crop")
        if shortest is not None and isinstance(share, int | float) and 0.1 <= share <= 1:
            crop = (shortest, shortest)
            shortest = int(shortest / share) if shortest < _SMALL else None
        edge = size.get("shortest_edge", 0)
        return cls(
            size.get("height", edge),
            size.get("width", edge),
            crop if shortest is not None or told.get("do_center_crop") else None,
            shortest,
            _choice(told["resample"]),
            _number(told["rescale_factor"]) if told["do_rescale"] else 1.0,
            _colours(told["image_mean"]) if told["do_normalize"] else (0.0,) * 3,
            _colours(told["image_std"], divides=True) if told["do_normalize"] else (1.0,) * 3,
        )

    def apply(self, image: Image) -> NDArray[np.float32]:
        """float32 [3, height, width] of an RGB image."""
        if self.shortest is not None:
            longest = int(self.shortest * max(image.size) / min(image.size))
            size = (self.shortest, longest) if image.width <= image.height else (longest, self.shortest)
        else:
            size = (self.width, self.height)
        if size[0] * size[1] > MAX_PIXELS:
            _refuse("image", f"{image.width} x {image.height} pixels: too long for its width once it is resized")
        image = image.resize(size, self.resample)
        if self.crop is not None:
            top, left = (image.height - self.crop[0]) // 2, (image.width - self.crop[1]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        pixels = np.asarray(image, dtype=np.float32) * np.float32(self.scale)
        even = (pixels - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)
        return np.ascontiguousarray(even.transpose(2, 0, 1), dtype=np.float32)


class LoadedImages:
    """An image classifier in memory."""

    def __init__(
        self, module: torch.nn.Module, preparation: Preparation, classifier: Classifier, hardware: Hardware
    ) -> None:
        self._module = module
        self._preparation = preparation
        self._classifier = classifier
        self._hardware = hardware
        self._description = Description(
            format="huggingface",
            task="image-classification",
            device=hardware.name,
            input_schema=_input_schema(),
            output_schema={
                "type": "object",
                "required": ["predictions"],
                "properties": {"predictions": {"type": "array", "items": classifier.schema()}},
            },
            example=_EXAMPLE,
            runtime=runtime("huggingface", hardware, ("transformers", "safetensors", "pillow")),
            together=_TOGETHER,
            tolerance=hardware.tolerance,
        )
        self.predict([Inputs(_EXAMPLE, {})])

    @property
    def description(self) -> Description:
        """What it is and takes."""
        return self._description

    def predict(self, batch: Sequence[Inputs]) -> list[Answer]:
        """One answer per caller; images of all callers share passes. Raises InputInvalid, ModelFailed."""
        callers = [_images(inputs) for inputs in batch]
        # Each is drawn when its turn comes: as pixels they are a hundred times as large as they were sent.
        images = (self._preparation.apply(draw()) for mine in callers for draw in mine)
        rows: list[list[float]] = []
        while some := list(islice(images, _PER_PASS)):
            rows += self._pass(some)
        row = iter(rows)
        return [
            Answer({"predictions": [self._classifier.prediction(next(row)) for _ in mine]}, len(mine))
            for mine in callers
        ]

    def _pass(self, images: list[NDArray[np.float32]]) -> list[list[float]]:
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack(images)).to(self._hardware.device, self._hardware.dtype)
            scores = self._classifier.scores(self._module(pixel_values=pixels).logits)
        if scores.shape[-1] != len(self._classifier.labels):
            raise ModelFailed("the network has another number of outputs than labels", kind="output_shape")
        if not torch.isfinite(scores).all():
            raise ModelFailed("the model gave a number that is not finite", kind="not_finite")
        rows: list[list[float]] = scores.cpu().tolist()
        return rows


def _images(inputs: Inputs) -> list[Callable[[], Image]]:
    """What draws each image of a caller; drawing raises InputInvalid too."""
    data = inputs.data
    if inputs.parameters:
        _refuse("parameters", "this model has no parameters")
    if not isinstance(data, dict) or len(data) != 1 or not data.keys() <= {"image", "pixels"}:
        _refuse("input_data", "exactly one of image and pixels is taken")
    ((name, value),) = data.items()
    if name == "image":
        files = value if isinstance(value, list) else [value]
        return [partial(_decoded, file) for file in _some(name, files)]
    alone = not (isinstance(value, list) and value and isinstance(value[0], list) and _is_image(value[0]))
    return [partial(_drawn, rows) for rows in _some(name, [value] if alone else value)]


def _some(name: str, values: list[Any]) -> list[Any]:
    if not 1 <= len(values) <= MAX_IMAGES:
        _refuse(name, f"{len(values)} images")
    return values


def _is_image(value: list[Any]) -> bool:
    """Whether this is an image in a list of them: rows of rows of pixels."""
    return bool(value) and isinstance(value[0], list) and bool(value[0]) and isinstance(value[0][0], list)


def _decoded(text: Any) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        _refuse("image", "that is no base64")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(raw), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                _refuse("image", f"{image.width} x {image.height} pixels, over {MAX_PIXELS}")
            ImageOps.exif_transpose(image, in_place=True)  # as its camera was held
            return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        _refuse("image", f"no {', '.join(FORMATS)} file")
    except _DAMAGE as err:
        _refuse("image", f"a damaged file: {str(err)[:100]}")


def _drawn(rows: Any) -> Image:
    from PIL import Image

    if not isinstance(rows, list) or not rows or any(type(row) is not list or len(row) != len(rows[0]) for row in rows):
        _refuse("pixels", "its rows differ in length")
    dots = list(chain.from_iterable(rows))
    if not dots or any(type(dot) is not list or len(dot) != len(_COLOURS) for dot in dots):
        _refuse("pixels", "a pixel has three numbers")
    numbers = list(chain.from_iterable(dots))
    if set(map(type, numbers)) != {int} or not 0 <= min(numbers) <= max(numbers) <= 255 or len(dots) > MAX_PIXELS:
        _refuse("pixels", "a number is not a whole one from 0 to 255, or there are too many")
    pixels = np.array(numbers, np.uint8).reshape(len(rows), -1, len(_COLOURS))
    return Image.fromarray(pixels, "RGB")


def _size(told: Any, *, shorter: bool) -> dict[str, int]:
    """`shorter`: a number alone is the length of the shorter side, not of both."""
    size = ({"shortest_edge": told} if shorter else {"height": told, "width": told}) if isinstance(told, int) else told
    if not isinstance(size, dict):
        _damaged("size")
    if size.keys() not in ({"shortest_edge"}, {"height", "width"}):
        raise unsupported(
            f"a size of {', '.join(map(str, size))[:100] or 'nothing'}", "use shortest_edge, or both sides"
        )
    for side in size.values():
        if type(side) is not int or not 1 <= side <= _LARGEST_SIDE:
            _damaged("size")
    return size


def _choice(told: Any) -> int:
    if not isinstance(told, int) or isinstance(told, bool) or not 0 <= told <= 5:
        _damaged("resample")
    return int(told)


def _number(told: Any) -> float:
    if type(told) not in (int, float) or not 0 < told <= 255:
        _damaged("rescale_factor")
    return float(told)


def _colours(told: Any, *, divides: bool = False) -> tuple[float, ...]:
    fits = isinstance(told, list) and len(told) == 3 and all(type(one) in (int, float) for one in told)
    if not fits or (divides and min(told) <= 0):
        _damaged("image_mean or image_std")
    return tuple(map(float, told))


def _damaged(name: str) -> NoReturn:
    raise SealedFileDamaged(f"preprocessor_config.json: {name} doesn't hold", stage="payload")


def _refuse(field: str, what: str) -> NoReturn:
    raise InputInvalid(
        f"{field}: {what}; this model takes {_EXPECTED}", field=field, expected=_EXPECTED, example=_EXAMPLE
    )


def _input_schema() -> dict[str, Any]:
    file = {"type": "string", "contentEncoding": "base64"}
    colour = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}, "minItems": 3, "maxItems": 3}
    image = {"type": "array", "items": {"type": "array", "items": colour}}
    properties = {
        "image": {"anyOf": [file, {"type": "array", "items": file, "minItems": 1, "maxItems": MAX_IMAGES}]},
        "pixels": {"anyOf": [image, {"type": "array", "items": image, "minItems": 1, "maxItems": MAX_IMAGES}]},
    }
    return {"type": "object", "properties": properties, "minProperties": 1, "maxProperties": 1}
