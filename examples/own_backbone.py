"""Put the pyramid on a network of your own, on one of timm's, and on one of torchvision's; save one and read it back.

python examples/own_backbone.py
"""

import torch
from torch import nn

import tpn


class Slow(nn.Module):
    """Three feature maps of a clip (B, 3, T, H, W), each half as fine as the one before, in time as well as in space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 32, (1, 4, 4), (1, 4, 4))
        self.stages = nn.ModuleList(nn.Conv3d(32 * 2**i, 64 * 2**i, 3, 2, 1) for i in range(3))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]).relu())
        return maps[1:]


def main() -> None:
    # Channels, lengths and sizes are found out by showing the module a clip. input_spec says what your clips look like.
    spec = tpn.InputSpec(num_frames=16, frame_interval=2, short_side=128, crop_size=112, three_crop_size=112)
    models = {
        "own": tpn.build(Slow(), num_classes=12, input_spec=spec),
        # backbone_pretrained=True starts it from ImageNet; temporal_shift lets its residual blocks look at neighbouring frames.
        "timm": tpn.create_model("tpn", backbone="timm/resnet18", num_frames=8, num_classes=12, temporal_shift=True),
        "torchvision": tpn.create_model("tpn", backbone="torchvision/r3d_18", num_frames=16, num_classes=12),
        "no pyramid": tpn.create_model("tpn", backbone="timm/resnet18", num_frames=8, num_classes=12, neck=None),
    }
    for name, model in models.items():
        size = model.input_spec.crop_size
        clips = torch.randn(2, 3, model.input_spec.num_frames, size, size)
        logits = model(clips)
        levels = "none" if model.neck is None else dict(zip(model.neck.in_channels, model.neck.num_frames, strict=True))
        print(f"{name}: clips {tuple(clips.shape)}, levels (channels: frames) {levels}, logits {tuple(logits.shape)}")

    folder = tpn.save_pretrained(models["own"].eval(), "my-own-tpn")
    again = tpn.create_model(f"local-dir:{folder}", backbone=Slow()).eval()
    clips = torch.randn(1, 3, 16, 112, 112)
    print("the same after saving:", torch.equal(again(clips), models["own"](clips)))


if __name__ == "__main__":
    main()
