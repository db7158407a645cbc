"""Copies of a module tree that share its modules but for a few: to take weights away from one and not the other."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def shallow_copy(module: ModuleT) -> ModuleT:
    """The same submodules and weights, but tables of its own: what is set or hooked on the copy stays there."""
    other: Any = copy.copy(module)
    other.__dict__.update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    return other


def of_class(cls: type, module: nn.Module) -> Any:
    """A shallow copy of a module that is of another class, one that derives from its own."""
    other: Any = object.__new__(cls)
    other.__dict__.update(vars(shallow_copy(module)))  # to set its __class__ takes classes of the same layout
    return other


def without_parameters(module: ModuleT, names: Iterable[str]) -> ModuleT:
    """A copy in which these parameters and buffers (dotted names) are None; all other ones are shared."""
    return _copy_with(module, dict.fromkeys(names))


def with_stand_ins(module: ModuleT, shapes: Mapping[str, torch.Size], like: torch.Tensor) -> ModuleT:
    """A copy in which these parameters are zeros that take no memory, of the dtype and device of `like`.

    Good enough to trace a module, not to run it.
    """
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return _copy_with(
        module, {name: nn.Parameter(zero.expand(shape), requires_grad=False) for name, shape in shapes.items()}
    )


def own_submodule(root: nn.Module, path: str) -> nn.Module:
    """The submodule at a path of `root`, copied with all above it but `root` itself, so that changing it is private."""
    holder = root
    for name in path.split("."):
        holder._modules[name] = shallow_copy(holder.get_submodule(name))
        holder = holder.get_submodule(name)
    return holder


def _copy_with(root: ModuleT, values: Mapping[str, torch.Tensor | None]) -> ModuleT:
    copies: dict[str, nn.Module] = {"": shallow_copy(root)}

    def own(path: str) -> nn.Module:
        if path not in copies:
            parent, _, name = path.rpartition(".")
            holder = own(parent)
            copies[path] = shallow_copy(holder.get_submodule(name))
            holder._modules[name] = copies[path]
        return copies[path]

    for name, value in values.items():
        path, _, last = name.rpartition(".")
        holder = own(path)
        table: Any = holder._buffers if last in holder._buffers else holder._parameters
        table[last] = value
        if value is None:  # the module's own text may ask the weight for its shape
            holder.extra_repr = partial(str, "freed")  # type: ignore[method-assign]
    return copies[""]  # type: ignore[return-value]
