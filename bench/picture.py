"""The photograph that models are run on."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor

SIDE = 512
# Of ImageNet, as the official models were trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def photograph(path: Path | str | None) -> Tensor:
    """``(1, 3, 512, 512)``, normalised; the sample that comes with matplotlib if None."""
    with Image.open(path or get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        pixels = np.array(picture.convert("RGB"), dtype=np.float32) / 255
    x = torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)[None]
    return F.interpolate(
        x.contiguous(), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True
    )
