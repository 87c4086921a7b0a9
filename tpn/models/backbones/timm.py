"""Networks for images as backbones: any network of timm, or a module of your own, run on each frame of a clip.

timm and torchvision take about as long to import as PyTorch: other models do not wait for them.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from einops import rearrange
from torch import Tensor, nn

from tpn import hub
from tpn.config import InputDefaults
from tpn.errors import UnknownModelError, WeightsUnavailableError, nearest
from tpn.files import StrPath, cache_folder
from tpn.models.backbones.tsm import FOLD, UNFOLD, shift_every, temporal_shift
from tpn.models.feature_maps import FeatureShape, measure, to_feature_list
from tpn.models.registry import register_backbone
from tpn.validation import check_bool

RESERVED = {"pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "weights", "features_only"}
"""Arguments of timm and torchvision that choose what to load: never those of a saved model, whose author may be anybody."""


class FoldedBackbone(nn.Module):
    """An image network that runs on each frame of a clip. Frames are folded into the batch.

    Args:
        net: (N, C, H, W) → a sequence or dictionary of maps (N, C_i, H_i, W_i), finest first, or one map.
        channels_last: the maps are (N, H_i, W_i, C_i) instead.
        repeats: how often each map is returned. Default: once.

    Shape:
        (B, C, T, H, W) float → one map (B, C_i, T, H_i, W_i) per map of `net`; any T, unless `add_temporal_shift` was called.
    """

    def __init__(self, net: nn.Module, *, channels_last: bool = False, repeats: Sequence[int] | None = None) -> None:
        super().__init__()
        self.net = net
        self.channels_last = channels_last
        self.repeats = repeats
        self.num_frames: int | None = None

    def forward(self, x: Tensor) -> list[Tensor]:
        num_frames = x.shape[2]
        if self.num_frames not in (None, num_frames):
            raise ValueError(f"num_frames must be {self.num_frames}, which the temporal shifts were built for, got {num_frames}")
        pattern = "(b t) h w c -> b c t h w" if self.channels_last else UNFOLD
        maps = [rearrange(each, pattern, t=num_frames) for each in to_feature_list(self.net(rearrange(x, FOLD)))]
        return [each for each, times in zip(maps, self.repeats or [1] * len(maps), strict=True) for _ in range(times)]

    def forward_frames(self, x: Tensor) -> list[Tensor]:
        """Return the maps, or the frames themselves if the blocks shift them."""
        return self(x) if self.num_frames is None else [x]

    def forward_clips(self, *maps: Tensor) -> Sequence[Tensor]:
        return maps if self.num_frames is None else self(*maps)

    def feature_shapes(self, clip: Tensor) -> list[FeatureShape]:
        """Return the shape of each feature map of a clip; one frame is enough to find it."""
        shapes = measure(self, clip if self.num_frames else clip[:, :, :1])
        return [shape._replace(frames=clip.shape[2]) for shape in shapes]

    @property
    def input_defaults(self) -> InputDefaults:
        """The mean and std of timm's network; its size may have been changed."""
        cfg = getattr(self.net, "pretrained_cfg", None)
        return InputDefaults(mean=on_255(cfg["mean"]), std=on_255(cfg["std"])) if cfg else InputDefaults()

    def add_temporal_shift(self, num_frames: int) -> int:
        """Shift the input of each residual block's first convolution along clips of `num_frames`; return the number of blocks.

        A residual block is a module with `conv1`, `conv2` (or `conv3`: Res2Net) and a shortcut, `downsample` or `shortcut`, which
        may be None: those of torchvision and timm. Blocks with the same parent form a stage. ValueError if there are none.
        """
        if self.num_frames is not None:
            raise ValueError(f"the blocks already shift frames, for clips of {self.num_frames}")
        stages: dict[str, list[Any]] = {}
        for name, module in self.net.named_modules():
            if _is_residual_block(module):
                stages.setdefault(name.rpartition(".")[0], []).append(module)
        if not stages:
            raise ValueError(
                "temporal_shift needs residual blocks: modules with conv1, conv2 and a shortcut named downsample or shortcut; "
                "this network has none"
            )
        every = shift_every(map(len, stages.values()))
        shifted = [block for blocks in stages.values() for block in blocks[::every]]
        for block in shifted:
            block.conv1 = TemporalShift(block.conv1, num_frames)
        self.num_frames = num_frames
        return len(shifted)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, if `net` can.

        timm's networks then update the running statistics of batch norms a second time.
        """
        if not hasattr(self.net, "set_grad_checkpointing"):
            raise ValueError(f"{type(self.net).__name__} has no set_grad_checkpointing")
        cast("Any", self.net).set_grad_checkpointing(enable)


class TemporalShift(nn.Module):
    """A convolution whose input exchanges channels between neighboring frames first (TSM, Lin et al., ICCV 2019).

    Shape:
        (B*T, C, H, W), the `num_frames` frames of a clip consecutive → the result of `conv`.
    """

    def __init__(self, conv: nn.Module, num_frames: int) -> None:
        super().__init__()
        self.conv = conv
        self.num_frames = num_frames

    def extra_repr(self) -> str:
        return f"num_frames={self.num_frames}"

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(temporal_shift(x, self.num_frames))


def _is_residual_block(module: nn.Module) -> bool:
    has = partial(hasattr, module)
    return has("conv1") and (has("conv2") or has("conv3")) and (has("downsample") or has("shortcut"))


def _input_defaults(name: str, args: Mapping[str, Any]) -> InputDefaults:
    import timm

    _check_name(name)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        return InputDefaults()
    size = args.get("img_size") or cfg.input_size[-1]
    size = size if isinstance(size, int) else min(size)
    return InputDefaults(size, round(size / 0.875), on_255(cfg.mean), on_255(cfg.std))


@register_backbone("timm/", input_defaults=_input_defaults)
def timm_backbone(
    name: str,
    *,
    out_indices: Sequence[int] = (-2, -1),
    temporal_shift: bool = False,
    in_chans: int = 3,
    num_frames: int = 8,
    pretrained: bool = False,
    cache_dir: StrPath | None = None,
    **args: Any,
) -> FoldedBackbone:
    """Build a network of timm as a backbone.

    Args:
        name: one of `timm.list_models()`. A tag selects the weights that `pretrained` loads.
        out_indices: stages that are levels, finest first, 0 = the first; negative ones count from the end.
        temporal_shift: shift channels along time in the residual blocks, as TSM does.
        in_chans: channels of the clips.
        num_frames: frames of the clips.
        pretrained: load timm's weights.
        cache_dir: where weights are stored.
        **args: further arguments of the network, such as `img_size`.

    Raises UnknownModelError; ValueError if timm cannot build it; WeightsUnavailableError.
    """
    import timm

    _check_name(name)
    check_bool("temporal_shift", temporal_shift)
    check_network_args(args, out_indices)
    path, stages = _weights(name, cache_dir) if pretrained else None, Counter(out_indices)
    try:
        with hub.translate_errors(f"the weights of timm/{name}"), _without_expected_warnings():
            net = timm.create_model(
                name,
                pretrained,
                features_only=True,
                out_indices=tuple(stages),
                in_chans=in_chans,
                cache_dir=cache_folder(cache_dir),
                pretrained_cfg_overlay=None if path is None else {"file": str(path)},
                **args,
            )
    except WeightsUnavailableError:
        raise
    except Exception as error:  # each family of networks raises its own type
        raise ValueError(
            f"timm cannot build {name} with out_indices={tuple(out_indices)} and backbone_args={args} "
            f"({type(error).__name__}: {error}). Choose others, another backbone, or wrap the network in a module that returns "
            "feature maps (B, C, T, H, W)"
        ) from error
    channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
    backbone = FoldedBackbone(net, channels_last=channels_last, repeats=tuple(stages.values()))
    if temporal_shift:
        backbone.add_temporal_shift(num_frames)
    return backbone


@contextmanager
def _without_expected_warnings() -> Iterator[None]:
    """Keep timm from warning that the weights of the classifier are not used."""
    logger = logging.getLogger("timm.models._builder")

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unexpected keys")

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def check_network_args(args: Mapping[str, Any], out_indices: Sequence[int]) -> None:
    """Raise ValueError for arguments that choose what to load, and for indices that decrease."""
    if reserved := sorted(RESERVED & args.keys()):
        raise ValueError(f"{', '.join(reserved)}: not valid in backbone_args, which are arguments of the network itself")
    integers = isinstance(out_indices, Sequence) and all(isinstance(i, int) for i in out_indices)
    if not integers or list(out_indices) != sorted(out_indices) or len({i < 0 for i in out_indices}) > 1:
        raise ValueError(f"out_indices must be indices of stages that never decrease, all >= 0 or all < 0, got {out_indices!r}")


def _check_name(name: str) -> None:
    import timm

    model = name.partition(".")[0]
    if not timm.is_model(model):
        near = nearest(name, timm.list_models())
        raise UnknownModelError(f"timm has no model {name!r}; the nearest are {near}; timm.list_models() lists all")
    if name != model and name not in (tags := timm.list_pretrained(f"{model}.*")):
        raise UnknownModelError(f"timm has no weights {name!r}; it has {', '.join(tags) or 'none for this model'}")


def _weights(name: str, cache_dir: StrPath | None) -> Any:
    """Fetch the weights like those of the zoo; None where only timm knows how."""
    import timm

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id or cfg.custom_load:
        return None
    file = cfg.hf_hub_filename or "model.safetensors"
    return hub.snapshot(cfg.hf_hub_id, file, cache_dir=cache_dir, prefer_cached=True) / file


def on_255(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(255 * v, 3) for v in values)
