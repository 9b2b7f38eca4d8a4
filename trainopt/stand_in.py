"""What makes a class of trainopt answer as torch's where it stands in torch's place."""

import sys
from abc import ABCMeta
from typing import Any


class StandIn(ABCMeta):
    """The class of trainopt's optimizer and loss classes.

    With `torch.optim.Adam = trainopt.Adam`, by hand or by `trainopt.patch()`, whoever asks `isinstance(optimizer,
    torch.optim.Adam)` means torch's class, from which trainopt's only derives: an optimizer made before, one of a class
    that derived from torch's, and an AdamW are Adams still. So as long as a class stands in torch's namespace under the
    name of the torch class that it derives from, isinstance and issubclass answer for that one; otherwise for itself.

    It is an ABCMeta, so that users can mix their classes with abstract ones, as they can torch's.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        asked = cls._stands_for()
        return super().__instancecheck__(instance) if asked is None else isinstance(instance, asked)

    def __subclasscheck__(cls, subclass: type) -> bool:
        asked = cls._stands_for()
        return super().__subclasscheck__(subclass) if asked is None else issubclass(subclass, asked)

    def _stands_for(cls) -> type | None:
        """The torch class in whose place this one stands, if it stands there now."""
        for base in cls.__mro__[1:]:
            if base.__name__ == cls.__name__ and base.__module__.startswith("torch."):
                package = ".".join(base.__module__.split(".")[:2])  # torch.optim, torch.nn
                places = (vars(sys.modules[name]) for name in (package, base.__module__))
                return base if any(place.get(cls.__name__) is cls for place in places) else None
        return None
