"""Images in memory: scikit-learn's digits, CIFAR, folders and archives of classes; decoded once,
augmented on the device."""

from __future__ import annotations

from slimkernels.data.datasets import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    CIFAR100_MEAN,
    CIFAR100_STD,
    Loaders,
    cifar10_loaders,
    cifar100_loaders,
    digits_loaders,
    image_folder_loaders,
    loaders_for,
)
from slimkernels.data.tensor_loader import TensorLoader

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "CIFAR100_MEAN",
    "CIFAR100_STD",
    "Loaders",
    "TensorLoader",
    "cifar10_loaders",
    "cifar100_loaders",
    "digits_loaders",
    "image_folder_loaders",
    "loaders_for",
]
