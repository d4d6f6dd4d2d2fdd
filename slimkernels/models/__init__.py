"""Reference networks by name: the CIFAR VGGs of SlimNets, its students, and a small VGG for 8x8 digits.

Importing this package imports neither torch nor torchvision; a model's module is imported when the model is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from slimkernels.models.nin import nin_cifar
    from slimkernels.models.students import alexnet_cifar, cnn_cifar, snn_cifar
    from slimkernels.models.vgg import vgg11_cifar, vgg13_cifar, vgg16_cifar, vgg19_cifar, vgg_digits

__all__ = [
    "alexnet_cifar",
    "build",
    "cnn_cifar",
    "default_classes",
    "input_shape",
    "nin_cifar",
    "snn_cifar",
    "vgg11_cifar",
    "vgg13_cifar",
    "vgg16_cifar",
    "vgg19_cifar",
    "vgg_digits",
]

_MODULE_OF = {
    "alexnet_cifar": "students",
    "cnn_cifar": "students",
    "nin_cifar": "nin",
    "snn_cifar": "students",
    "vgg11_cifar": "vgg",
    "vgg13_cifar": "vgg",
    "vgg16_cifar": "vgg",
    "vgg19_cifar": "vgg",
    "vgg_digits": "vgg",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def build(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """A freshly initialised model: one of this package's, or else torchvision's model of that name.

    Args:
        options: the model's own keywords, such as ``width=0.5`` or ``batch_norm=True``.

    Raises:
        ValueError: no such model (near matches are listed), or ``num_classes`` is not positive.
        TypeError: one of this package's models has no such option; the message lists those it has.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"models.build: expected num_classes >= 1, got {num_classes!r}")
    if name in _MODULE_OF:
        import inspect

        function = __getattr__(name)
        known = [option for option in inspect.signature(function).parameters if option != "num_classes"]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"models.build: expected options of {name} among {', '.join(known)}, got {unknown[0]!r}")
        return function(num_classes=num_classes, **options)
    from torchvision import models as torchvision_models

    if name not in torchvision_models.list_models():
        import difflib

        near = difflib.get_close_matches(name, [*_MODULE_OF, *torchvision_models.list_models()], n=3)
        hint = f"; near matches: {', '.join(near)}" if near else ""
        ours = ", ".join(sorted(_MODULE_OF))
        raise ValueError(f"models.build: expected one of {ours}, or a torchvision model, got {name!r}{hint}")
    return torchvision_models.get_model(name, weights=None, num_classes=num_classes, **options)


def input_shape(name: str) -> tuple[int, int, int]:
    """``(channels, height, width)`` of the images that the model ``name`` is meant for."""
    if name == "vgg_digits":
        return (1, 8, 8)
    return (3, 32, 32) if name.endswith("_cifar") else (3, 224, 224)


def default_classes(name: str) -> int:
    """Classes of the data set that the model ``name`` is meant for: 10 here, ImageNet's 1000 for torchvision's."""
    return 10 if name in _MODULE_OF else 1000
