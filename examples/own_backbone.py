"""Build a pyramid on your backbone, and on backbones from timm and torchvision. Save a model and load it.

python examples/own_backbone.py
"""

import torch
from torch import nn

import tpn


class ConvBackbone(nn.Module):
    """Map clips (B, 3, T, H, W) to three feature maps. Each stage halves T, H and W."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 32, (1, 4, 4), (1, 4, 4))
        self.stages = nn.ModuleList(nn.Conv3d(32 * 2**i, 64 * 2**i, 3, 2, 1) for i in range(3))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x).relu()
            features.append(x)
        return features


def main() -> None:
    # tpn.build runs the backbone on a clip of this spec to find the shapes of its feature maps.
    spec = tpn.InputSpec(num_frames=16, frame_interval=2, short_side=128, crop_size=112, three_crop_size=112)
    models = {
        "your own": tpn.build(ConvBackbone(), num_classes=12, input_spec=spec),
        # temporal_shift exchanges features between neighboring frames; backbone_pretrained=True loads ImageNet weights.
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

    folder = tpn.save_pretrained(models["your own"].eval(), "my-own-tpn")
    loaded = tpn.create_model(f"local-dir:{folder}", backbone=ConvBackbone()).eval()
    clips = torch.randn(1, 3, 16, 112, 112)
    print("same logits after loading:", torch.equal(loaded(clips), models["your own"](clips)))


if __name__ == "__main__":
    main()
