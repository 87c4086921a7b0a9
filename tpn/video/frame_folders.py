"""Read the images of a folder of extracted frames."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tpn.video.containers import MAX_PIXELS, VideoError, video_errors

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow's names of the formats that can be opened, whatever the suffix. Others run programs, such as Ghostscript for EPS."""


def read_image(path: Path) -> Tensor:
    """Return an image, uint8 RGB (3, H, W). Raises VideoError if it is damaged or larger than `MAX_PIXELS`, OSError as `open`."""
    with path.open("rb") as file, video_errors(path, lambda: "damaged image"):
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise VideoError(f"{path}: not an image") from error
        if image.width * image.height > MAX_PIXELS:
            raise VideoError(f"{path}: the image has {image.width}x{image.height} pixels, more than the limit of {MAX_PIXELS}")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
