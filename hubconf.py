"""Entry points of torch.hub: torch.hub.load("org/tpn", "tpn_slowonly_r50_k400", pretrained=True)."""

from tpn.zoo.entrypoints import *  # noqa: F403

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "einops", "numpy", "lazy_loader"]
