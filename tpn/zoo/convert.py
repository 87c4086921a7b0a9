"""Rename checkpoints of the two reference code bases: every source tensor is used once, none is left over.

The layouts differ in names only; shapes and values are the same.

- "mmaction2": `backbone.layer1.0.conv1.conv.weight`, `neck.level_fusion_1...`, `cls_head.fc_cls...`
- "original" (decisionforce/TPN): `backbone.layer1.0.conv1.weight`, `necks.level_fusion_op2...`, `cls_head.fc_cls...`
- "tpn": ours, `backbone.layer1.0.conv1.weight`, `neck.top_down_fusion...`, `head.fc...`
"""

import re
from collections.abc import Collection, Mapping
from typing import Literal

from torch import Tensor, nn

from tpn.errors import CheckpointError
from tpn.validation import clipped

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


def detect_layout(state_dict: Mapping[str, Tensor]) -> Layout:
    """Return the layout of a state dict, by its names; CheckpointError if it is none of the three."""
    if "cls_head.fc_cls.weight" in state_dict and "backbone.conv1.conv.weight" in state_dict:
        return "mmaction2"
    if "cls_head.fc_cls.weight" in state_dict and "backbone.conv1.weight" in state_dict:
        return "original"
    modules = {name.partition(".")[0] for name in state_dict}
    if "backbone" in modules and "cls_head" not in modules:
        return "tpn"
    raise CheckpointError(
        "the names of the tensors match neither tpn's layout nor mmaction2's or the original TPN repository's; "
        f"{len(state_dict)} tensors, the first are {_first(state_dict)}"
    )


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Layout]:
    """Return the tensors of a state dict of any of the three layouts under our names, and their layout.

    Raises CheckpointError if a name is unknown or two names become one.
    """
    layout = detect_layout(state_dict)
    if layout == "tpn":
        return dict(state_dict), layout
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state_dict.items():
        new = next((match.expand(ours) for theirs, ours in _RULES[layout] if (match := re.fullmatch(theirs, name))), None)
        if new is None:
            unknown.append(name)
        elif new in renamed:
            raise CheckpointError(f"two tensors of the checkpoint become {new}, the second is {name}")
        else:
            renamed[new] = tensor
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors are not part of the {layout} layout: {_first(unknown)}")
    return renamed, layout


def load_strict(model: nn.Module, state_dict: Mapping[str, Tensor], *, classifiers: Collection[str] = ()) -> None:
    """Copy a state dict in our layout into `model`; every name and every shape must match.

    Args:
        classifiers: modules ("head.fc", "aux_head.fc") that keep their own, untrained values. Their tensors in the checkpoint are
            ignored.

    Raises CheckpointError.
    """
    target = model.state_dict()
    dropped = {f"{c}.{leaf}" for c in classifiers for leaf in ("weight", "bias")}
    source = {name: tensor for name, tensor in state_dict.items() if name not in dropped}
    check_fit({name: tensor for name, tensor in target.items() if name not in dropped}, source)
    for name, tensor in source.items():
        dtype = target[name].dtype
        if tensor.is_floating_point() != dtype.is_floating_point:
            raise CheckpointError(f"{name} is {tensor.dtype}, expected {dtype} or another precision of it")
        if tensor.is_floating_point() and not _all_finite(tensor.to(dtype)):
            if _all_finite(tensor):
                raise CheckpointError(f"{name} holds values beyond the range of {dtype}, which would become infinite")
            raise CheckpointError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
    model.load_state_dict({**target, **source})


def _all_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. Their sum usually shows it, and is faster."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_fit(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if names or shapes of the tensors of a checkpoint, `source`, differ from those of a model."""
    shapes = {n: (tuple(source[n].shape), tuple(target[n].shape)) for n in sorted(source.keys() & target.keys())}
    problems = {
        "tensors of the model are missing": sorted(target.keys() - source.keys()),
        "tensors are not in the model": sorted(source.keys() - target.keys()),
        "have another shape": [f"{n} {theirs} instead of {ours}" for n, (theirs, ours) in shapes.items() if theirs != ours],
    }
    found = [f"{len(names)} {problem} ({_first(names)})" for problem, names in problems.items() if names]
    if found:
        names = describe(source), describe(target)
        raise CheckpointError(f"the checkpoint ({names[0]}) does not fit the model ({names[1]}): {'; '.join(found)}")


def describe(state_dict: Mapping[str, Tensor]) -> str:
    """Return a short name of the network in a state dict in our layout, such as "a TPN on SlowOnly R50, 400 classes"."""
    blocks = len({name.split(".")[2] for name in state_dict if name.startswith("backbone.layer3.")})
    stem, fc = state_dict.get("backbone.conv1.weight"), state_dict.get("head.fc.weight")
    family = "an unknown backbone" if stem is None else "SlowOnly" if stem.ndim == 5 else "TSM"
    depth = {2: " R18", 6: " R50", 23: " R101"}.get(blocks, "")
    pyramid = "a TPN on " if any(name.startswith("neck.") for name in state_dict) else ""
    return f"{pyramid}{family}{depth}" + (f", {len(fc)} classes" if fc is not None and fc.ndim else "")


def _first(names: Collection[str]) -> str:
    return ", ".join(map(clipped, list(names)[:3])) + (", ..." if len(names) > 3 else "")
