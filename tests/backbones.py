"""Small models on networks of timm and torchvision, and on modules, for tests."""

import torch
from torch import nn

import tpn

SMALL = tpn.InputSpec(2, 4, short_side=72, crop_size=64, three_crop_size=64)
FIXED = {"img_size": 64}  # networks that are built for one size

BACKBONES = {
    "timm/resnet18": {},
    "timm/regnety_002": {"temporal_shift": True},
    "timm/convnext_atto": {},
    "timm/mobilenetv3_small_050": {},
    "timm/swin_tiny_patch4_window7_224": {"backbone_args": FIXED | {"depths": (1, 1, 1, 1), "embed_dim": 24, "window_size": 2}},
    "timm/vit_tiny_patch16_224": {"backbone_args": FIXED, "out_indices": (5, 11)},
    "timm/xcit_nano_12_p8_224": {},
    "torchvision/r3d_18": {"num_frames": 4},
}
"""Small networks of the main families, with arguments that make them cheap."""

MORE_BACKBONES = {
    "timm/seresnet18": {"temporal_shift": True},
    "timm/resnetv2_50": {"temporal_shift": True, "backbone_args": {"width_factor": 0.25}},
    "timm/rexnet_100": {"in_chans": 2},  # 185 channels
    "timm/mambaout_femto": {},  # channels last
    "timm/maxvit_rmlp_pico_rw_256": {"backbone_args": FIXED},
    "timm/eva02_tiny_patch14_224": {"backbone_args": {"img_size": 56}, "crop_size": 56},
    "torchvision/mc3_18": {"num_frames": 4, "out_indices": (0, 1, 2, 3)},
    "timm/inception_v3": {"crop_size": 139},  # convolutions without padding
    "timm/hrnet_w18_small": {},
    "torchvision/r2plus1d_18": {"num_frames": 4},
    "torchvision/s3d": {"num_frames": 14, "out_indices": (2, 3, 4)},
    "torchvision/swin3d_t": {"num_frames": 4},
    "timm/resnest14d": {},
    "timm/res2net50_14w_8s": {},
    "timm/convnextv2_atto": {},
    "timm/mobilenetv4_conv_small": {},
    "timm/efficientnet_b0": {},
    "timm/ghostnet_050": {},
    "timm/densenet121": {},
    "timm/repvgg_a0": {},
    "timm/dla46_c": {},
    "timm/poolformer_s12": {},
    "timm/pvt_v2_b0": {},
    "timm/edgenext_xx_small": {},
    "timm/mobilevit_xxs": {},
    "timm/fastvit_t8": {},
    "timm/inception_next_atto": {},
    "timm/starnet_s1": {},
    "timm/mixer_s32_224": {"backbone_args": FIXED},
}
"""Further families, for slow tests."""

WITHOUT_GRADIENT = {
    "timm/xcit_nano_12_p8_224": r"backbone\.net\.model\.cls_token$",  # timm 1.0.16 keeps it
    "timm/hrnet_w18_small": r"backbone\.net\.(stage4\.0\.fuse_layers\.[01]\.|incre_modules\.[01]\.)",
}
"""Parameters that only finer maps depend on."""


def small(name, **kwargs):
    """A model on a backbone of the table, for clips of 64 x 64."""
    torch.manual_seed(0)
    args = {**(BACKBONES | MORE_BACKBONES).get(name, {}), **kwargs}
    size = args.pop("crop_size", 64)
    frames = args.get("num_frames", 2)
    spec = tpn.InputSpec(frames, 4, short_side=size, crop_size=size, three_crop_size=size)
    return tpn.create_model("tpn", backbone=name, num_classes=5, input_spec=spec, **args)


def clips(model, batch=2):
    spec = model.input_spec
    return torch.randn(batch, model.in_chans, spec.num_frames, spec.crop_size, spec.crop_size)


def assert_same(a, b):
    """Two models compute the same and describe themselves alike."""
    x = torch.randn(1, a.in_chans, a.input_spec.num_frames, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(a.eval().forward_with_aux(x), b.eval().forward_with_aux(x), rtol=0, atol=0)
    assert a.config == b.config


def switch_on(model):
    """Fill parameters that start at zero: many networks start with branches switched off."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


class Pyramid(nn.Module):
    """A backbone that returns three maps, each half as long and wide as the one before."""

    def __init__(self, channels=(6, 10, 9), as_dict=False):
        super().__init__()
        self.as_dict = as_dict
        before = (3, *channels)
        self.stages = nn.ModuleList(nn.Conv3d(before[i], channels[i], 3, 2, 1) for i in range(len(channels)))

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x).relu()
            maps.append(x)
        return {str(i): m for i, m in enumerate(maps)} if self.as_dict else maps


SPEC = tpn.InputSpec(16, 1, short_side=48, crop_size=48, three_crop_size=48)
