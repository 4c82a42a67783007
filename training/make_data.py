"""Write the two small data sets that ship with fewstep.

``digits.safetensors``: the 1,797 handwritten 8x8 digits of scikit-learn, with labels.
``patches.safetensors``: grey 16x16 patches of seven photographs found inside the installed
scikit-image and scikit-learn wheels. Nothing is downloaded. Licences are in the data card,
``src/fewstep/exact/data/README.md``.

Needs scikit-learn, scikit-image and pillow (JPEG decoders differ by a grey level between
versions, so a rebuilt patch file may differ slightly from the stored one).

    python training/make_data.py
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

Bytes = NDArray[np.uint8]

DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / "src" / "fewstep" / "exact" / "data"

# (package, path inside it). All are photographs; drawings, scans, microscopy and textures that
# also ship with scikit-image are left out.
PHOTOGRAPHS: tuple[tuple[str, str], ...] = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
SIDE = 16
PATCHES_PER_PHOTOGRAPH = 600
# A patch whose grey levels have a standard deviation below this (of 255) counts as flat: sky,
# out-of-focus ground. At most FLAT_SHARE of the patches of one photograph may be flat.
FLAT_STD = 4.0
FLAT_SHARE = 0.1


def digits() -> dict[str, Bytes]:
    """The scikit-learn digits: images (1797, 8, 8) with values 0..16, labels (1797,)."""
    pixels, labels = load_digits(return_X_y=True)
    return {
        "images": np.asarray(pixels).astype(np.uint8).reshape(-1, 8, 8),
        "labels": np.asarray(labels).astype(np.uint8),
    }


def tiles(grey: Bytes) -> Bytes:
    """Cut (H, W) into the non-overlapping squares (n, SIDE, SIDE) of a grid at its centre."""
    rows, cols = grey.shape[0] // SIDE, grey.shape[1] // SIDE
    top, left = (grey.shape[0] - rows * SIDE) // 2, (grey.shape[1] - cols * SIDE) // 2
    body = grey[top : top + rows * SIDE, left : left + cols * SIDE]
    return body.reshape(rows, SIDE, cols, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE)


def photograph_patches(image: Image.Image, rng: np.random.Generator) -> Bytes:
    """Draw PATCHES_PER_PHOTOGRAPH distinct patches of one photograph at full and half size.

    Half size adds patches with more structure, and the statistics of photographs change little
    with scale.
    """
    grey = image.convert("L")
    half = grey.resize((grey.width // 2, grey.height // 2), Image.Resampling.BOX)
    pool = np.concatenate([tiles(np.asarray(grey)), tiles(np.asarray(half))])
    pool = np.unique(pool, axis=0)  # exact copies (saturated sky) would be one atom twice
    pool = rng.permutation(pool)
    flat = pool.std(axis=(1, 2)) < FLAT_STD
    n_flat = min(int(flat.sum()), int(FLAT_SHARE * PATCHES_PER_PHOTOGRAPH))
    structured = pool[~flat][: PATCHES_PER_PHOTOGRAPH - n_flat]
    return np.concatenate([structured, pool[flat][:n_flat]])


def patches(seed: int) -> dict[str, Bytes]:
    """Patches of all photographs in random order, (N, 16, 16)."""
    rng = np.random.default_rng(seed)
    parts: list[Bytes] = []
    for package, name in PHOTOGRAPHS:
        file = resources.files(package).joinpath(name)
        with resources.as_file(file) as path, Image.open(path) as image:
            part = photograph_patches(image, rng)
        n_flat = int((part.std(axis=(1, 2)) < FLAT_STD).sum())
        print(f"{package}/{name}: {len(part)} patches, {n_flat} of them flat")
        parts.append(part)
    return {"images": np.ascontiguousarray(rng.permutation(np.concatenate(parts)))}


def main() -> None:
    """Write both files and print what is in them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    sets = {
        "digits": (
            digits(),
            (
                "scikit-learn load_digits: test part of the UCI data set Optical Recognition of "
                "Handwritten Digits (E. Alpaydin, C. Kaynak, 1998)"
            ),
            "images / 8 - 1",
        ),
        "patches": (
            patches(args.seed),
            "grey 16x16 patches of photographs shipped with scikit-image and scikit-learn: "
            + ", ".join(f"{package}/{name}" for package, name in PHOTOGRAPHS),
            "images / 127.5 - 1",
        ),
    }
    for name, (tensors, source, to_float) in sets.items():
        path = args.folder / f"{name}.safetensors"
        save_file(tensors, path, metadata={"source": source, "to_float": to_float})
        shapes = {key: value.shape for key, value in tensors.items()}
        print(f"{path.name}: {shapes}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
