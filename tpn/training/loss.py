"""The loss of a training, the order of its clips, and weights for rare classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpn.models.classifier import TPNClassifier


class TrainingLoss(nn.Module):
    """Model and loss in one module, loss(logits) + aux_weight * loss(aux_logits), to compile and to distribute.

    The loss is cross-entropy, or binary cross-entropy for a multi-label model. It is a mean over clips, even with class weights.
    Its mean over processes and forward passes is the loss of the step.

    Args:
        model: a classifier.
        aux_weight: 0 leaves the auxiliary head out.
        weights: of the classes, (K,).
        smoothing: label smoothing.
        mix: exchanges parts of clips and targets, float32 (B, C, T, H, W) and (B, K), such as MixUp.

    Shape:
        frames uint8 (B, T, 3, H, W), targets float (B, K) → loss (), logits (B, K), targets after `mix` (B, K)
    """

    def __init__(
        self,
        model: TPNClassifier,
        aux_weight: float = 0.5,
        weights: Tensor | None = None,
        smoothing: float = 0.0,
        mix: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.aux_weight, self.smoothing, self.mix = model, aux_weight, smoothing, mix
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, frames: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clips = self.model.input_spec.normalize(frames)
        if self.mix is not None:
            clips, targets = self.mix(clips, targets)
        loss, aux_loss, logits = self.losses(clips, targets)
        return loss + aux_loss, logits, targets

    def losses(self, clips: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the weighted auxiliary loss, and the logits."""
        logits, aux_logits = self.model.forward_with_aux(clips) if self.aux_weight else (self.model(clips), None)
        loss = self._mean_loss(logits, targets)
        aux_loss = torch.zeros_like(loss) if aux_logits is None else self.aux_weight * self._mean_loss(aux_logits, targets)
        return loss, aux_loss, logits

    def _mean_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        if self.model.multi_label:
            smooth = targets * (1 - self.smoothing) + self.smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, smooth, self.weights)
        return F.cross_entropy(logits, targets, self.weights, reduction="none", label_smoothing=self.smoothing).mean()


def class_weights(targets: Tensor) -> Tensor:
    """Return loss weights for the classes, inversely proportional to their number of videos; 0 for a class without one.

    Args:
        targets: (N, K), 1 for the classes of each video and 0 for all others.

    Returns:
        weights (K,), float32, with a mean of 1 over the labels.
    """
    counts = targets.sum(dim=0)
    return targets.sum() / (counts > 0).sum() / counts.clamp(min=1) * (counts > 0)


def draw_weights(targets: Tensor) -> Tensor:
    """Return the weights (N,) with which videos are drawn so that all classes are equally frequent, given their targets (N, K).

    Videos without a class count as one more class.
    """
    without = (targets.sum(dim=1, keepdim=True) == 0).to(targets.dtype)
    targets = torch.cat((targets, without), dim=1)
    return (targets * class_weights(targets)).amax(dim=1)


def epoch_batches(
    count: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    accumulate: int = 1,
    weights: Tensor | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[tuple[int, int]]]:
    """Return the batches of one process for one epoch, as a `batch_sampler` for a DataLoader.

    A step uses the same videos for every division into processes and forward passes. Videos that do not fill the last step are
    dropped. To resume within an epoch, skip the first batches.

    Args:
        count: number of videos, N.
        batch_size: clips per process and forward pass.
        seed: determines the order, with `epoch`.
        epoch: determines the order, with `seed`.
        accumulate: forward passes per step.
        weights: (N,), with which videos are drawn with replacement. Default: every video once.
        rank: of this process.
        world_size: number of processes.

    Returns:
        a list of (index, draw) for each forward pass, the items that `VideoDataset` takes.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order, draws = torch.randperm(count, generator=rng), torch.zeros(count, dtype=torch.int64)
    if weights is not None:
        order = torch.multinomial(weights, count, replacement=True, generator=rng)
        draws = torch.arange(count)  # a video that is drawn twice gives two different clips
    step = batch_size * accumulate * world_size
    items = torch.stack((order, draws), dim=1)[: count // step * step]
    mine = items.view(-1, world_size, batch_size, 2)[:, rank]
    return [[(index, draw) for index, draw in batch] for batch in mine.tolist()]
