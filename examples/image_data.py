"""Images for the long-tailed experiments: Fashion-MNIST where its files are, else scikit-learn's digits.

Nothing is downloaded. `load_images` returns a training set with a class profile, exponential if nothing else is asked
for (class 0 is the most frequent, the last class `imbalance_factor` times rarer), and a test set in which all classes
are equally frequent.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DIGITS_TEST_IMAGES_PER_CLASS = 60

FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


@dataclass(frozen=True)
class LongTailedImages:
    name: str
    class_names: tuple[str, ...]
    train_images: Tensor  # (N, 1, height, width), float32
    train_labels: Tensor  # (N,), int64
    test_images: Tensor
    test_labels: Tensor
    class_counts: Tensor  # (C,), int64: training images of each class, most frequent first

    def to(self, device: torch.device) -> LongTailedImages:
        moved = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in vars(self).items()}
        return LongTailedImages(**moved)


def exponential_profile(images_per_class: int, num_classes: int, imbalance_factor: int) -> list[int]:
    """Class k gets n_max * factor ** (-k / (C - 1)) images; n_max / n_min is the factor exactly."""
    rarest = images_per_class // imbalance_factor
    if rarest < 1:
        raise ValueError(
            f"imbalance_factor is {imbalance_factor}, but there are only {images_per_class} training images of a class"
        )
    steps = (1 - k / (num_classes - 1) for k in range(num_classes))
    return [round(rarest * imbalance_factor**step) for step in steps]


def step_profile(images_per_class: int, num_classes: int, imbalance_factor: int) -> list[int]:
    """The first half of the classes has as many images as there are, the second `imbalance_factor` times fewer."""
    frequent = num_classes - num_classes // 2
    ends = exponential_profile(images_per_class, 2, imbalance_factor)
    return [ends[0]] * frequent + [ends[1]] * (num_classes - frequent)


PROFILES = {"exponential": exponential_profile, "step": step_profile}


def _read_idx(folder: Path, stem: str) -> Tensor:
    """One file of the IDX format: two zero bytes, 8 (uint8), the number of dimensions, each as a big-endian int32."""
    path = next(path for path in (folder / stem, folder / f"{stem}.gz") if path.exists())
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of bytes")
    shape = numpy.frombuffer(data, ">i4", count=data[3], offset=4)
    values = numpy.frombuffer(data, numpy.uint8, offset=4 + 4 * data[3])
    return torch.from_numpy(values.reshape(shape).copy())


def find_fashion_mnist(folder: Path | None) -> Path | None:
    """The folder with the four IDX files, or None. A folder that was asked for and lacks them is an error."""
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    # the second is torchvision's layout
    candidates = [DEBIAN_FOLDER] if folder is None else [folder, folder / "FashionMNIST" / "raw"]
    for candidate in candidates:
        if all((candidate / stem).exists() or (candidate / f"{stem}.gz").exists() for stem in stems):
            return candidate
    if folder is not None:
        raise FileNotFoundError(f"--data {folder}: looked for {', '.join(stems)}, each also with .gz")
    return None


def _fashion_mnist(folder: Path) -> tuple[Tensor, ...]:
    return tuple(
        _read_idx(folder, f"{part}-{kind}-ubyte")
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )


def read_digits() -> tuple[Tensor, ...]:
    """Scikit-learn's 1797 digits of 8 x 8 pixels; the first images of every class are held out for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for k in range(10):
        is_test[(labels == k).nonzero()[:DIGITS_TEST_IMAGES_PER_CLASS]] = True
    return images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def load_images(
    folder: Path | None, imbalance_factor: int, seed: int, profile: str = "exponential", digits: bool = False
) -> LongTailedImages:
    """The seed draws which training images are kept; the test set is always the same. `digits` in any case, if so."""
    fashion = None if digits else find_fashion_mnist(folder)
    name = "Fashion-MNIST" if fashion else "scikit-learn digits"
    class_names = FASHION_CLASSES if fashion else tuple(str(k) for k in range(10))
    train_images, train_labels, test_images, test_labels = _fashion_mnist(fashion) if fashion else read_digits()

    images_per_class = int(train_labels.bincount().min())
    class_counts = PROFILES[profile](images_per_class, len(class_names), imbalance_factor)
    generator = torch.Generator().manual_seed(seed)
    members = [(train_labels == k).nonzero()[:, 0] for k in range(len(class_names))]
    kept = torch.cat(
        [
            rows[torch.randperm(len(rows), generator=generator)[:count]]
            for rows, count in zip(members, class_counts, strict=True)
        ]
    )

    mean, std = train_images.double().mean(), train_images.double().std()

    def normalise(images: Tensor) -> Tensor:
        return ((images - mean) / std).float()[:, None]

    return LongTailedImages(
        name=name,
        class_names=class_names,
        train_images=normalise(train_images[kept]),
        train_labels=train_labels[kept].long(),
        test_images=normalise(test_images),
        test_labels=test_labels.long(),
        class_counts=torch.tensor(class_counts),
    )
