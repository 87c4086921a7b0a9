"""Checkpoints of the two reference code bases, renamed to ours: every source tensor once, none left over.

The layouts differ in names only; shapes and values are the same.

- "mmaction2": `backbone.layer1.0.conv1.conv.weight`, `neck.level_fusion_1...`, `cls_head.fc_cls...`
- "original" (decisionforce/TPN): `backbone.layer1.0.conv1.weight`, `necks.level_fusion_op2...`, `cls_head.fc_cls...`
- "tpn": ours, `backbone.layer1.0.conv1.weight`, `neck.top_down_fusion...`, `head.fc...`
"""

import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

Layout = Literal["tpn", "mmaction2", "original"]

_BATCH_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"

_HEAD = [(r"cls_head\.fc_cls\.(weight|bias)", r"head.fc.\1")]

_MMACTION2 = [
    (r"backbone\.conv1\.conv\.weight", r"backbone.conv1.weight"),
    (rf"backbone\.conv1\.bn\.{_BATCH_NORM}", r"backbone.bn1.\1"),
    (r"backbone\.(layer\d\.\d+)\.conv(\d)\.conv\.(?:net\.)?weight", r"backbone.\1.conv\2.weight"),
    (rf"backbone\.(layer\d\.\d+)\.conv(\d)\.bn\.{_BATCH_NORM}", r"backbone.\1.bn\2.\3"),
    (r"backbone\.(layer\d\.\d+)\.downsample\.conv\.weight", r"backbone.\1.downsample.0.weight"),
    (rf"backbone\.(layer\d\.\d+)\.downsample\.bn\.{_BATCH_NORM}", r"backbone.\1.downsample.1.\2"),
    (r"neck\.spatial_modulation\.spatial_modulation\.(\d+\.\d+)\.(.*)", r"neck.spatial_modulation.\1.\2"),
    (r"neck\.temporal_modulation_ops\.(\d+)\.conv\.conv\.weight", r"neck.temporal_modulation.\1.conv.weight"),
    (r"neck\.downsample_ops\.(\d+)\.conv\.conv\.weight", r"neck.bottom_up.\1.conv.weight"),
    (r"neck\.level_fusion_1\.downsamples\.(\d+)\.conv\.(.*)", r"neck.top_down_fusion.mix.\1.\2"),
    (r"neck\.level_fusion_1\.fusion_conv\.(.*)", r"neck.top_down_fusion.fuse.\1"),
    (r"neck\.level_fusion_2\.downsamples\.(\d+)\.conv\.(.*)", r"neck.bottom_up_fusion.mix.\1.\2"),
    (r"neck\.level_fusion_2\.fusion_conv\.(.*)", r"neck.bottom_up_fusion.fuse.\1"),
    (r"neck\.pyramid_fusion\.(.*)", r"neck.pyramid_fusion.\1"),
    (r"neck\.aux_head\.conv\.(.*)", r"aux_head.conv.\1"),
    (r"neck\.aux_head\.fc\.(weight|bias)", r"aux_head.fc.\1"),
    *_HEAD,
]

_ORIGINAL = [
    (r"backbone\.((?:conv1|bn1|layer\d\.).*)", r"backbone.\1"),
    (r"necks\.spatial_modulation\.spatial_modulation\.(\d+\.\d+)\.(.*)", r"neck.spatial_modulation.\1.\2"),
    (r"necks\.temporal_modulation_ops\.(\d+)\.conv\.weight", r"neck.temporal_modulation.\1.conv.weight"),
    (r"necks\.downsampling_ops\.(\d+)\.conv\.weight", r"neck.bottom_up.\1.conv.weight"),
    (r"necks\.level_fusion_op2\.ops\.(\d+)\.conv\.weight", r"neck.top_down_fusion.mix.\1.conv.weight"),
    (rf"necks\.level_fusion_op2\.ops\.(\d+)\.norm\.{_BATCH_NORM}", r"neck.top_down_fusion.mix.\1.bn.\2"),
    (r"necks\.level_fusion_op2\.fusion_conv\.0\.weight", r"neck.top_down_fusion.fuse.conv.weight"),
    (rf"necks\.level_fusion_op2\.fusion_conv\.1\.{_BATCH_NORM}", r"neck.top_down_fusion.fuse.bn.\1"),
    (r"necks\.level_fusion_op\.ops\.(\d+)\.conv\.weight", r"neck.bottom_up_fusion.mix.\1.conv.weight"),
    (rf"necks\.level_fusion_op\.ops\.(\d+)\.norm\.{_BATCH_NORM}", r"neck.bottom_up_fusion.mix.\1.bn.\2"),
    (r"necks\.level_fusion_op\.fusion_conv\.0\.weight", r"neck.bottom_up_fusion.fuse.conv.weight"),
    (rf"necks\.level_fusion_op\.fusion_conv\.1\.{_BATCH_NORM}", r"neck.bottom_up_fusion.fuse.bn.\1"),
    (r"necks\.pyramid_fusion_op\.0\.weight", r"neck.pyramid_fusion.conv.weight"),
    (rf"necks\.pyramid_fusion_op\.1\.{_BATCH_NORM}", r"neck.pyramid_fusion.bn.\1"),
    (r"necks\.aux_head\.convs\.(.*)", r"aux_head.conv.\1"),
    (r"necks\.aux_head\.fc\.(weight|bias)", r"aux_head.fc.\1"),
    *_HEAD,
]

_RULES: dict[str, list[tuple[str, str]]] = {"mmaction2": _MMACTION2, "original": _ORIGINAL}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model."""


def detect_layout(state_dict: Mapping[str, Tensor]) -> Layout:
    """Tell by its names which code base a state dict comes from; CheckpointError if from none of the three."""
    if "backbone.conv1.conv.weight" in state_dict and "cls_head.fc_cls.weight" in state_dict:
        return "mmaction2"
    if "backbone.conv1.weight" in state_dict and "cls_head.fc_cls.weight" in state_dict:
        return "original"
    if any(name.startswith("backbone.") for name in state_dict) and not any(name.startswith("cls_head.") for name in state_dict):
        return "tpn"
    raise CheckpointError(
        "the tensors' names fit neither tpn's own layout nor mmaction2's or the original TPN repository's; "
        f"{len(state_dict)} tensors, the first are {_first(state_dict)}"
    )


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Layout]:
    """Rename a state dict of any of the three layouts to ours.

    Returns the renamed tensors, the very objects that came in, and the layout they came from. Raises
    CheckpointError if a name is unknown or two names become one.
    """
    layout = detect_layout(state_dict)
    if layout == "tpn":
        return dict(state_dict), layout
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state_dict.items():
        new = _rename(name, layout)
        if new is None:
            unknown.append(name)
        elif new in renamed:
            raise CheckpointError(f"two tensors of the checkpoint would both become {new}, the second is {name}")
        else:
            renamed[new] = tensor
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors have no place in tpn's {layout} conversion: {_first(unknown)}")
    return renamed, layout


def load_strict(model: nn.Module, state_dict: Mapping[str, Tensor], *, classifiers: tuple[str, ...] = ()) -> None:
    """Copy a state dict in our layout into `model`; every name and every shape must fit.

    classifiers: modules ("head.fc", "aux_head.fc") that keep their own, untrained values; their tensors are
        the only ones of the checkpoint that are ignored, and the only ones of the model that stay unfilled.
    """
    target = model.state_dict()
    dropped = {f"{c}.{leaf}" for c in classifiers for leaf in ("weight", "bias")}
    source = {name: tensor for name, tensor in state_dict.items() if name not in dropped}
    expected = {name: tensor for name, tensor in target.items() if name not in dropped}
    missing = sorted(expected.keys() - source.keys())
    unexpected = sorted(source.keys() - expected.keys())
    reshaped = [n for n in source if n in expected and source[n].shape != expected[n].shape]
    if missing or unexpected or reshaped:
        problems = []
        if missing:
            problems.append(f"{len(missing)} tensors of the model are missing from it ({_first(missing)})")
        if unexpected:
            problems.append(f"{len(unexpected)} of its tensors are not in the model ({_first(unexpected)})")
        if reshaped:
            shapes = (f"{n} {tuple(source[n].shape)} instead of {tuple(expected[n].shape)}" for n in reshaped[:3])
            problems.append(f"{len(reshaped)} have another shape ({', '.join(shapes)})")
        raise CheckpointError(f"the checkpoint, {describe(state_dict)}, does not fit the model: " + "; ".join(problems))
    for name, tensor in source.items():
        if tensor.is_floating_point() != target[name].is_floating_point():
            raise CheckpointError(f"{name} is {tensor.dtype}, expected {target[name].dtype} or another precision of it")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
    model.load_state_dict({**target, **source})


def describe(state_dict: Mapping[str, Tensor]) -> str:
    """Say in a few words what network a state dict in our layout holds, e.g. "a TPN on SlowOnly R50, 400 classes"."""
    blocks = len({name.split(".")[2] for name in state_dict if name.startswith("backbone.layer3.")})
    stem, fc = state_dict.get("backbone.conv1.weight"), state_dict.get("head.fc.weight")
    family = "an unknown backbone" if stem is None else "SlowOnly" if stem.ndim == 5 else "TSM"
    depth = {2: " R18", 6: " R50", 23: " R101"}.get(blocks, "")
    pyramid = "a TPN on " if any(name.startswith("neck.") for name in state_dict) else ""
    return f"{pyramid}{family}{depth}" + ("" if fc is None else f", {fc.shape[0]} classes")


def _rename(name: str, layout: Layout) -> str | None:
    for pattern, replacement in _RULES[layout]:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def _first(names: Mapping[str, Tensor] | list[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
