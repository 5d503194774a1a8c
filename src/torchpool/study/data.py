"""The images a study trains on: scikit-learn's handwritten digits on a larger canvas, or the user's
own folder."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torchpool.study.task import DataError, split

CANVAS = 32
"""Height and width of the images, pixels."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Images:
    """Images and labels, split into a training and a held-out part that never change.

    Shapes: train (N, C, 32, 32) in [0, 1], labels (N,) int64.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = field(default=())

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        return int(self.train.shape[1])

    @property
    def digest(self) -> str:
        """Tells these images and labels from others."""
        parts = (self.train, self.train_labels, self.test, self.test_labels)
        made = hashlib.sha256()
        for part in parts:
            made.update(part.numpy().tobytes())
        return made.hexdigest()[:16]


def _place(small: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, 1, h, w) at a random position on an empty canvas."""
    n, c, h, w = small.shape
    canvas = torch.zeros(n, c, CANVAS, CANVAS)
    tops = torch.randint(CANVAS - h + 1, (n,), generator=generator)
    lefts = torch.randint(CANVAS - w + 1, (n,), generator=generator)
    for i, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
        canvas[i, :, top : top + h, left : left + w] = small[i]
    return canvas


def digits() -> Images:
    """The 1,797 handwritten digits of scikit-learn, doubled to 16x16, each somewhere on 32x32."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    labels = torch.tensor(raw.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    train, test = split(labels, generator)
    canvas = _place(images, generator)
    return Images(
        "handwritten digits at random positions",
        canvas[train],
        labels[train],
        canvas[test],
        labels[test],
        tuple(str(digit) for digit in range(10)),
    )


def folder(path: Path) -> Images:
    """A folder of class folders of images, scaled to 32x32 RGB.

    Images that cannot be read are skipped and named in `skipped`.

    Raises:
        DataError: no folder, fewer than two classes, or a class with fewer than two readable
        images.
    """
    if not path.is_dir():
        raise DataError(
            f"--data {path} is {'a file' if path.exists() else 'missing'}; give a folder that "
            "holds one folder of images per class (cats/1.png, dogs/1.png, ...)"
        )
    try:
        names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        files = {name: _image_files(path / name) for name in names}
    except OSError as error:
        raise DataError(
            f"--data {path}: {error.filename} cannot be read ({error.strerror}); give a folder "
            "that you may read"
        ) from None
    if len(names) < 2:
        raise DataError(
            f"--data {path} has {len(names)} class folders; it "
            f"needs one folder of images per class, "
            "at least two (cats/1.png, dogs/1.png, ...)"
        )
    images: list[Tensor] = []
    labels: list[int] = []
    skipped: list[str] = []
    for label, name in enumerate(names):
        before = len(images)
        for file in files[name]:
            try:
                images.append(_read(file))
                labels.append(label)
            except Exception as error:  # image formats have exceptions of their own
                skipped.append(f"{file.relative_to(path)} ({error})")
        if len(images) - before < 2:
            raise DataError(
                f"--data {path}: class {name!r} has {len(images) - before} readable images of "
                f"{len(files[name])}; every class needs at least two" + _first(skipped)
            )
    stacked, targets = torch.stack(images), torch.tensor(labels)
    train, test = split(targets, torch.Generator().manual_seed(0))
    return Images(
        str(path),
        stacked[train],
        targets[train],
        stacked[test],
        targets[test],
        tuple(names),
        tuple(skipped),
    )


def _image_files(folder: Path) -> list[Path]:
    """Images in a folder and the folders inside it; an unreadable folder raises OSError."""

    def refuse(error: OSError) -> None:
        raise error

    return sorted(
        file
        for place, _, names in os.walk(folder, onerror=refuse)
        for file in (Path(place, name) for name in names)
        if file.suffix.lower() in SUFFIXES
    )


def _first(skipped: list[str]) -> str:
    return f" (skipped: {skipped[0]}{', ...' if len(skipped) > 1 else ''})" if skipped else ""


def _read(file: Path) -> Tensor:
    from PIL import Image

    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB").resize((CANVAS, CANVAS)), dtype=np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1).contiguous()


def shifted(images: Tensor, seed: int, reach: int = 4) -> Tensor:
    """Each image moved by up to `reach` pixels along both axes; what comes in is empty."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randint(-reach, reach + 1, (len(images), 2), generator=generator).tolist()
    padded = F.pad(images, (reach,) * 4)
    height, width = images.shape[-2:]
    parts = [
        padded[i, :, reach - dy : reach - dy + height, reach - dx : reach - dx + width]
        for i, (dy, dx) in enumerate(moves)
    ]
    return torch.stack(parts)
