"""What the tests of the losses on a device share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def on(device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on tensors that are moved to the device, its results brought back; gradients find their way."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def there(*arguments: Any, **options: Any) -> Any:
        result = function(*map(moved, arguments), **{name: moved(value) for name, value in options.items()})
        return tuple(value.cpu() for value in result) if isinstance(result, tuple) else result.cpu()

    return there
