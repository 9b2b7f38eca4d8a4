"""What messages call an optimizer's parameters."""

from typing import Any


def name_of(group: dict[str, Any], group_index: int, index: int) -> str:
    """How messages call parameter `index` of a group."""
    names = group.get("param_names")
    return repr(names[index]) if names else f"parameter {index} of group {group_index}"


def names_of(optimizer: Any) -> list[str]:
    """A name for every parameter of an optimizer, in order."""
    return [
        name_of(group, group_index, i)
        for group_index, group in enumerate(optimizer.param_groups)
        for i in range(len(group["params"]))
    ]
