"""The models of the zoo as functions, for timm's registry, for torch.hub, and for `from tpn import NAME`.

One function per model of the table, and `tpn` for a backbone of your choice. Each is `create_model` with its name filled in, and
takes timm's arguments besides.
"""

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from torch import nn

from tpn.models.timm_cfg import timm_cfg
from tpn.zoo.checkpoints import CHECKPOINTS, Checkpoint, Embedded, get_checkpoint
from tpn.zoo.names import CONFIG_FILE


def _timm_cfg(entry: Checkpoint) -> dict[str, Any]:
    """Describe an entry in timm's terms."""
    config, source = entry.config, entry.source
    has_aux_head = config.aux_head is not None
    cfg = timm_cfg(config.input_spec, config.num_classes, has_aux_head=has_aux_head, first_conv="backbone.conv1")
    return cfg | {"url": source.url or "", "file": str(source.path) if isinstance(source, Embedded) else None}


default_cfgs = generate_default_cfgs({name: _timm_cfg(entry) for name, entry in CHECKPOINTS.items()})
__all__: list[str] = []


def _register(name: str, doc: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{doc}\n\nSee `tpn.create_model` for the arguments."
    setattr(sys.modules[__name__], name, entrypoint)
    with warnings.catch_warnings():  # a second import of this module replaces its own entries
        warnings.filterwarnings("ignore", f"Overwriting {name} in registry with {__name__}", UserWarning)
        register_model(entrypoint)


def _create(
    name: str,
    pretrained: bool,
    *,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_model_args: Mapping[str, Any] | None = None,
    features_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Call `create_model` for timm, which has resolved a tag, a folder, or a Hub repository to `pretrained_cfg`."""
    # Not at the top: timm's import is followed by that of this module, and may come from a backbone that these import.
    from tpn.models.classifier import TPNClassifier
    from tpn.zoo.create import create_model, saved_folder
    from tpn.zoo.overrides import override
    from tpn.zoo.saved import open_saved

    if features_only:
        raise ValueError("features_only is timm's wrapper for images and not valid here; model.backbone(x) returns feature maps")
    if isinstance(pretrained_cfg, str):
        return create_model(f"{name}.{pretrained_cfg}", pretrained, **kwargs)
    cfg = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else dict(pretrained_cfg or {})
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    if cfg.get("source") in ("hf-hub", "local-dir"):
        name = f"{cfg['source']}:{cfg['hf_hub_id' if cfg['source'] == 'hf-hub' else 'file']}"
        folder = cast("Path", saved_folder(name, kwargs.get("cache_dir"), weights=pretrained))
        # timm passes the arguments that version 0.1.0 saved in config.json as if they were the caller's.
        saved = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("model_args", {})
        kwargs = {key: value for key, value in kwargs.items() if key not in saved or value != saved[key]}
        if not pretrained:
            modules = {kind: kwargs[kind] for kind in ("backbone", "neck") if isinstance(kwargs.get(kind), nn.Module)}
            kwargs = {key: value for key, value in kwargs.items() if key not in ("cache_dir", "backbone")}
            return TPNClassifier.from_config(override(open_saved(folder, weights=False), **kwargs), **modules)
        return create_model(f"local-dir:{folder}", pretrained_cfg_overlay=overlay, **kwargs)
    name = f"{name}.{cfg['tag']}" if cfg.get("tag") else name
    overlay = {key: cfg[key] for key in ("state_dict", "file", "hf_hub_id", "url") if cfg.get(key)} | overlay
    return create_model(name, pretrained, pretrained_cfg_overlay=overlay, **kwargs)


for _model in dict.fromkeys(entry.model for entry in CHECKPOINTS.values()):
    _entry = get_checkpoint(_model)
    _spec = _entry.config.input_spec
    _frames = f"{_spec.num_frames} x {_spec.frame_interval}" if _spec.sampling == "dense" else f"{_spec.num_frames} segments"
    _neck = "a baseline without neck" if _entry.config.neck is None else "TPN"
    _register(_model, f"{_neck} on {_entry.config.backbone.name}, {_frames}, {_entry.dataset}.")
_register("tpn", "TPN on a backbone of your choice.")
