"""Networks for video as backbones: those of torchvision, or a module of your own that is a chain of stages."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tpn import hub, transfer
from tpn.config import InputDefaults
from tpn.errors import UnknownModelError
from tpn.files import StrPath, atomic_write, cache_folder, file_sha256
from tpn.models.backbones.timm import check_network_args, on_255
from tpn.models.layers import checkpointed
from tpn.models.registry import register_backbone


class StagedBackbone(nn.Module):
    """A video network that is a chain of stages. The outputs of some stages are its feature maps.

    Args:
        stages: modules, called one after the other. Stages after the last of `out_indices` are dropped.
        out_indices: stages to return, 0 = the first; negative ones count from the end.
        channels_last: the stages return (B, T, H, W, C). The returned maps are still (B, C, T, H, W).

    Shape:
        (B, C, T, H, W) float → one map (B, C_i, T_i, H_i, W_i) per index.
    """

    def __init__(self, stages: Sequence[nn.Module], out_indices: Sequence[int], *, channels_last: bool = False) -> None:
        super().__init__()
        positive = tuple(i + len(stages) if i < 0 else i for i in out_indices)
        if not positive or list(positive) != sorted(positive) or not 0 <= positive[0] <= positive[-1] < len(stages):
            raise ValueError(f"out_indices must be indices of {len(stages)} stages that never decrease, got {tuple(out_indices)}")
        self.out_indices = positive
        self.stages = nn.ModuleList(stages[: positive[-1] + 1])
        self.channels_last = channels_last
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            x = checkpointed(stage, x) if self.grad_checkpointing and self.training else stage(x)
            maps += [rearrange(x, "b t h w c -> b c t h w") if self.channels_last else x] * self.out_indices.count(i)
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable


def _input_defaults(name: str, args: Mapping[str, Any]) -> InputDefaults:
    transforms = _weights(name).transforms()
    sizes = transforms.crop_size[0], min(transforms.resize_size)
    return InputDefaults(*sizes, on_255(transforms.mean), on_255(transforms.std))


@register_backbone("torchvision/", input_defaults=_input_defaults)
def torchvision_backbone(
    name: str,
    *,
    out_indices: Sequence[int] = (-2, -1),
    in_chans: int = 3,
    pretrained: bool = False,
    cache_dir: StrPath | None = None,
    **args: Any,
) -> StagedBackbone:
    """Build one of torchvision's networks for video, a key of `STAGES`, as a backbone.

    Args:
        name: such as "r3d_18".
        out_indices: stages that are levels, finest first, 0 = the first; negative ones count from the end.
        in_chans: channels of the clips, 3.
        pretrained: load torchvision's default weights.
        cache_dir: where weights are stored.
        **args: further arguments of the network.

    Raises UnknownModelError, ValueError, WeightsUnavailableError.
    """
    from torchvision.models import get_model

    weights = _weights(name)
    if in_chans != 3:
        raise ValueError(f"in_chans must be 3 for torchvision/{name}, got {in_chans}; timm's networks take any number")
    check_network_args(args, out_indices)
    net = get_model(name, weights=None, **args)
    if pretrained:
        folder = cache_folder(cache_dir) or Path(torch.hub.get_dir(), "checkpoints")
        path = folder / weights.url.rpartition("/")[2]
        sha256 = path.stem.rpartition("-")[2]  # leading digits
        if not path.is_file() or not file_sha256(path).startswith(sha256):  # torchvision itself downloads without limits
            with hub.translate_errors(f"the weights of torchvision/{name}"), atomic_write(path) as file:
                transfer.download(weights.url, file, pauses=hub.PAUSES, sha256=sha256)
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return StagedBackbone(STAGES[name](net), out_indices, channels_last=name.startswith("swin"))


def _weights(name: str) -> Any:
    from torchvision.models import get_model_weights

    if name not in STAGES:
        raise UnknownModelError(f"torchvision/{name} is not a backbone here; available: {', '.join(STAGES)}")
    return get_model_weights(name).DEFAULT


def _residual(net: Any) -> Sequence[nn.Module]:
    return nn.Sequential(net.stem, net.layer1), net.layer2, net.layer3, net.layer4


def _s3d(net: Any) -> Sequence[nn.Module]:
    return [net.features[a:b] for a, b in ((0, 1), (1, 4), (4, 7), (7, 13), (13, 16))]


def _swin3d(net: Any) -> Sequence[nn.Module]:
    parts = net.features
    return nn.Sequential(net.patch_embed, net.pos_drop, parts[0]), parts[1:3], parts[3:5], nn.Sequential(*parts[5:7], net.norm)


STAGES: dict[str, Callable[[Any], Sequence[nn.Module]]] = {
    "r3d_18": _residual,
    "mc3_18": _residual,
    "r2plus1d_18": _residual,
    "s3d": _s3d,
    "swin3d_t": _swin3d,
    "swin3d_s": _swin3d,
    "swin3d_b": _swin3d,
}
"""The stages of each of torchvision's networks for video, from fine to coarse."""
