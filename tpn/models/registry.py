"""The names of backbones and necks, and the functions or classes that build them.

A registered part is built by name, saved by name, and built again from `config.json`. `PartConfig.args` are passed as keywords.
Other arguments are not saved, because the rest of the model determines them. A part receives those that its signature names:

- backbones: `in_chans`, `num_frames`, `crop_size` of the clips; `pretrained` and `cache_dir`, to start from weights of its own;
- necks: `in_channels`, `num_frames`, `spatial_scales` of the feature maps, one value per level, finest level first.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from tpn.config import InputDefaults, PartConfig
from tpn.errors import UnknownModelError, nearest

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])
FindDefaults = Callable[[str, Mapping[str, Any]], InputDefaults]


class Registry:
    """Functions or classes that build one kind of part, by name."""

    def __init__(self, kind: str, determined: set[str]) -> None:
        self.kind, self.determined = kind, determined
        self._entries: dict[str, tuple[Callable[..., nn.Module], FindDefaults | None]] = {}

    def register(self, name: str, *, input_defaults: FindDefaults | None = None) -> Callable[[Builder], Builder]:
        """Register a function or class under a name, as a decorator.

        A backbone maps clips (B, C, T, H, W) to feature maps, finest first. A neck maps feature maps to one map (B, out_channels,
        T, H, W), and has an attribute `out_channels`.

        Args:
            name: for `create_model(..., backbone=NAME)` or `neck=NAME`, and for `config.json`. "family/" registers all names that
                begin with it; the rest of the name is then the first argument.
            input_defaults: of a backbone, returns the frames that it expects: (rest of the name, arguments) → `InputDefaults`.

        Raises ValueError: another function or class has this name.

        Example:
            >>> @tpn.register_neck("concat")
            ... class Concat(nn.Module):
            ...     def __init__(self, in_channels, out_channels=256): ...
            >>> model = tpn.create_model("tpn_slowonly_r50_k400", neck="concat", out_channels=512)
        """

        if not isinstance(name, str) or name in ("", "auto") or ":" in name:
            raise TypeError(
                f"the name of a {self.kind} must be a string without ':', not 'auto', got {name!r}; "
                f"use @register_{self.kind}(NAME)"
            )

        def decorate(build: Builder) -> Builder:
            if name in self._entries and _identity(self._entries[name][0]) != _identity(build):
                raise ValueError(f"the {self.kind} {name!r} is already registered by {_identity(self._entries[name][0])}")
            self._entries[name] = build, input_defaults
            return build

        return decorate

    def arguments(self, part: PartConfig) -> Mapping[str, Any]:
        """Return the arguments that a part saves, with their defaults; none of a module that is not registered."""
        if part.is_module:
            return {}
        build, _, prefix = self._find(part.name)
        names = list(_parameters(build).items())[1 if prefix else 0 :]
        return {name: parameter.default for name, parameter in names if name not in self.determined}

    def takes(self, part: PartConfig, argument: str) -> bool:
        return not part.is_module and argument in _parameters(self._find(part.name)[0])

    def input_defaults(self, part: PartConfig) -> InputDefaults:
        """Return the frames that a backbone expects."""
        _, find_defaults, prefix = self._find(part.name)
        return InputDefaults() if find_defaults is None else find_defaults(part.name[len(prefix) :], part.args)

    def build(self, part: PartConfig, **determined: Any) -> nn.Module:
        """Build a part, and attach its config, from which the model's config is made."""
        build, _, prefix = self._find(part.name)
        if wrong := sorted(self.determined & part.args.keys()):
            raise ValueError(f"{', '.join(wrong)}: not arguments of the {self.kind} itself; the model determines them")
        rest = (part.name[len(prefix) :],) if prefix else ()
        known = {name: value for name, value in determined.items() if name in _parameters(build)}
        module = build(*rest, **part.args, **known)
        attach_config(module, part)
        return module

    def _find(self, name: str) -> tuple[Callable[..., nn.Module], FindDefaults | None, str]:
        """Return what is registered, and the name if that is a prefix."""
        prefix = name[: name.find("/") + 1]
        if name not in self._entries and prefix in self._entries:
            return *self._entries[prefix], prefix
        if name not in self._entries:
            raise UnknownModelError(
                f"no {self.kind} is registered as {name!r}; the nearest names are {nearest(name, self._entries)}. "
                f"Import the module that registers it, or pass {self.kind}=MODULE"
            )
        return *self._entries[name], ""


def attach_config(module: nn.Module, part: PartConfig) -> None:
    """Attach the config that a module was built from. It belongs to the module: a replacement has none."""
    module.part_config = part  # type: ignore[assignment]


def attached_config(module: nn.Module) -> PartConfig | None:
    return module.__dict__.get("part_config")


def part_of(module: nn.Module) -> PartConfig:
    """Return the attached config, otherwise one that names the class of the module."""
    return attached_config(module) or PartConfig.of_module(module)


def _parameters(build: Callable[..., nn.Module]) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: p for name, p in inspect.signature(build).parameters.items() if p.kind not in kinds}


def _identity(build: Callable[..., nn.Module]) -> str:
    return f"{build.__module__}.{build.__qualname__}"


BACKBONES = Registry("backbone", {"in_chans", "num_frames", "crop_size", "pretrained", "cache_dir"})
NECKS = Registry("neck", {"in_channels", "num_frames", "spatial_scales"})

register_backbone = BACKBONES.register
"""See `Registry.register`."""
register_neck = NECKS.register
"""See `Registry.register`."""
