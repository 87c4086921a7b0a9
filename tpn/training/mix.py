"""MixUp and CutMix for batches of clips."""

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2


class Mix(nn.Module):
    """Mix each clip of a batch with another one, and their targets in the same proportion.

    MixUp (arXiv:1710.09412) averages two clips. CutMix (arXiv:1905.04899) puts a rectangle of the other clip into every frame, at
    the same place; the proportion is its share of the area. Each batch gets one of them, at random if both are on. All draws come
    from PyTorch's CPU generator.

    Args:
        mixup_alpha: parameter of MixUp's Beta distribution of the proportion. 0 turns MixUp off.
        cutmix_alpha: parameter of CutMix's Beta distribution of the proportion. 0 turns CutMix off.
        num_classes: number of classes, K.

    Shape:
        clips float (B, C, T, H, W), targets float (B, K), one-hot or multi-hot → the same shapes
    """

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> None:
        super().__init__()
        self.methods = nn.ModuleList()
        for name, alpha, method in (("mixup_alpha", mixup_alpha, v2.MixUp), ("cutmix_alpha", cutmix_alpha, v2.CutMix)):
            if not alpha >= 0:
                raise ValueError(f"{name} must be at least 0, got {alpha}")
            if alpha:
                self.methods.append(method(alpha=alpha, num_classes=num_classes))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch's compiler fails on torchvision's tensor types
    def forward(self, clips: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        method = self.methods[int(torch.randint(len(self.methods), ()))]
        mixed, targets = method(tv_tensors.Video(clips), targets)  # torchvision takes batches of 5 dimensions as videos only
        return mixed.as_subclass(Tensor), targets
