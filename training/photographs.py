"""Crops (3, 32, 32) of the colour photographs inside the scikit-image and scikit-learn wheels.

Nothing is downloaded. Licences are in the data card, `src/fewstep/exact/data/README.md`. Every
photograph is reduced by 1.5, 2, 3 and 4; a crop is a random square of one of these at a random
place, mirrored half the time. The right 30 % of every photograph are held out: no training crop
reaches into them (resampling mixes a few pixels across the cut).
"""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Bytes = NDArray[np.uint8]

PHOTOGRAPHS: tuple[tuple[str, str], ...] = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
NAMES = tuple(path.split("/")[-1].split(".")[0] for _, path in PHOTOGRAPHS)
SIDE = 32
REDUCTIONS = (1.5, 2.0, 3.0, 4.0)
HELD_OUT = 0.3
#: A crop whose values (of 255) have a smaller standard deviation over its pixels, in each channel's
#: mean, is flat (sky, out-of-focus ground): four of five of them are left out.
FLAT_STD, FLAT_KEPT = 6.0, 0.2


class Photographs:
    """Random crops of all photographs, from the training part or the held-out part.

    Every photograph and every reduction is equally likely.
    """

    def __init__(self, held_out: bool = False) -> None:
        self.pictures: list[tuple[int, Bytes]] = []  # number of the photograph, (H, W, 3)
        for number, (package, name) in enumerate(PHOTOGRAPHS):
            file = resources.files(package).joinpath(name)
            with resources.as_file(file) as path, Image.open(path) as image:
                image = image.convert("RGB")
                for by in REDUCTIONS:
                    size = (round(image.width / by), round(image.height / by))
                    small = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
                    cut = round(small.shape[1] * (1 - HELD_OUT))
                    self.pictures.append((number, small[:, cut:] if held_out else small[:, :cut]))

    def crops(self, count: int, rng: np.random.Generator) -> tuple[Bytes, NDArray[np.int64]]:
        """Crops (count, 32, 32, 3) and the number of the photograph of each."""
        crops = np.empty((count, SIDE, SIDE, 3), np.uint8)
        labels = np.empty(count, np.int64)
        for i in range(count):
            while True:
                labels[i], picture = self.pictures[rng.integers(len(self.pictures))]
                top = rng.integers(picture.shape[0] - SIDE + 1)
                left = rng.integers(picture.shape[1] - SIDE + 1)
                crop = picture[top : top + SIDE, left : left + SIDE]
                if crop.std(axis=(0, 1)).mean() >= FLAT_STD or rng.random() < FLAT_KEPT:
                    break
            crops[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
        return crops, labels


def to_float(crops: Bytes) -> Tensor:
    """(B, 32, 32, 3) of 0..255 to (B, 3, 32, 32) of -1..1."""
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
