"""Train a model on videos, or fine-tune a published one, on a CPU, a GPU or several GPUs.

    python examples/train.py --train videos/train --val videos/val --output runs/mine --pretrained
    torchrun --nproc_per_node 8 examples/train.py ...                 # on eight GPUs

`videos/train` is a folder with a folder of videos for each class, or a list of videos. The trained model is saved to `runs/mine`,
for `tpn predict --model local-dir:runs/mine` and `create_model("local-dir:runs/mine")`. The best epoch's model is saved to
`runs/mine/best`. `--resume auto` resumes an interrupted run. See docs/pages/training.md.
"""

import argparse
import inspect
import json
import math
import os
import time
import zlib
from argparse import BooleanOptionalAction
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import tpn
from tpn import training
from tpn.models.layers import channels_last, freeze_batch_norm
from tpn.training import class_weights, positive_int, run_cli
from tpn.video.datasets import VideoDataset, open_dataset

SMALL = {"optimizer": "adamw", "lr": 0.003, "lr_batch": 32, "weight_decay": 0.05, "warmup": 1, "ema": 0.99, "amp": "bfloat16"}
PUBLISHED = {"epochs": 150, "lr": 0.01, "lr_batch": 64, "schedule": "multistep", "milestones": [75, 125], "batch_size": 8}
RECIPES: dict[str, dict[str, Any]] = {  # the published recipes, for eight GPUs, and the recipe of the model that ships with tpn
    "k400-scratch": PUBLISHED | {"model": "tpn_slowonly_r50_k400", "weight_decay": 1e-4, "clip_grad": 40.0},
    "k400-in1k": PUBLISHED | {"model": "tpn_slowonly_r50_k400", "weight_decay": 1e-4, "clip_grad": 40.0, "imagenet": True},
    "sthv1-tsm": PUBLISHED | {"model": "tpn_tsm_r50_sthv1", "weight_decay": 5e-4, "clip_grad": 20.0, "imagenet": True},
    "motion": SMALL
    | {"model": "tpn_slowonly_tiny_motion", "epochs": 12, "batch_size": 32, "crop_area": [0.5, 1.0], "color_jitter": False},
}
MUTABLE_ON_RESUME = (
    *("output", "resume", "workers", "device", "checkpointing", "val", "max_bad"),
    *("log_interval", "checkpoint_interval", "val_interval"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, help="set the defaults of the other options")
    add("--train", required=True, help="folder of class folders, or list of videos")
    add("--val", help="like --train, for validation")
    add("--output", required=True, type=Path, help="folder for the model, the checkpoint and the metrics")
    add("--root", help="base folder of relative paths in lists; default: the list's folder")
    add("--frames", metavar="TEMPLATE", help="file names of extracted frames, such as img_{:05d}.jpg")
    add("--first-frame", type=int, default=1, help="number of the first frame")
    add("--target-fps", type=float, help="sample as if every video had this frame rate")
    add("--max-bad", type=float, default=0.05, help="largest share of unreadable videos")
    add("--workers", type=int, default=4, help="loader processes per device")
    add("--model", default="tpn_slowonly_r50_k400", help="name from tpn list, local-dir:FOLDER or hf-hub:OWNER/NAME")
    add("--model-args", type=json.loads, default={}, metavar="JSON", help='such as \'{"flow_order": "parallel"}\'')
    add("--pretrained", action="store_true", help="start from the model's published weights")
    add("--imagenet", action=BooleanOptionalAction, default=False, help="start the backbone from ImageNet weights")
    add("--checkpoint", help="start from a file in the layout of tpn, MMAction2 or the original TPN")
    add("--freeze", choices=["none", "bn", "backbone"], default="none", help="bn: running statistics; backbone: also its weights")
    add("--sync-bn", action="store_true", help="share batch norm's statistics among GPUs")
    add("--short-side", type=int, help="pixels, before the crop in validation; default: the model's")
    add("--crop-size", type=int, help="pixels; default: the model's")
    add("--frame-interval", type=positive_int, help="use every n-th frame; default: the model's")
    add("--crop-area", type=float, nargs=2, default=[0.08, 1.0], help="range of areas of training crops, as shares")
    add("--flip-prob", type=float, default=0.5, help="probability of a horizontal flip; 0 if left and right matter")
    add("--color-jitter", action=BooleanOptionalAction, default=True)
    add("--epochs", type=positive_int, default=30)
    add("--batch-size", type=positive_int, default=8, help="clips per device and forward pass")
    add("--accumulate", type=positive_int, default=1, help="forward passes per step")
    add("--optimizer", default="sgd", help="name of a timm optimizer; sgd has Nesterov momentum")
    add("--lr", type=float, default=0.01, help="learning rate for steps of --lr-batch clips; scaled linearly")
    add("--lr-batch", type=positive_int, default=64)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--layer-decay", type=float, help="factor of the learning rate from each layer to the layer before it")
    add("--schedule", choices=["cosine", "multistep"], default="cosine")
    add("--milestones", type=int, nargs="+", default=[75, 125], help="epochs after which multistep divides the rate by 10")
    add("--warmup", type=int, default=0, metavar="EPOCHS")
    add("--clip-grad", type=float, default=40.0, help="largest gradient norm; 0: no limit")
    add("--aux-weight", type=float, default=0.5, help="weight of the auxiliary loss; 0: no auxiliary loss")
    add("--label-smoothing", type=float, default=0.0)
    add("--class-weights", action="store_true", help="weight the loss inversely to the size of the class")
    add("--balanced", action="store_true", help="draw all classes equally often, with replacement")
    add("--ema", type=float, metavar="DECAY", help="validate and save an average of the weights; such as 0.999")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", choices=["float32", "bfloat16", "float16"], default="bfloat16" if torch.cuda.is_available() else "float32")
    add("--channels-last", action=BooleanOptionalAction, default=True)
    add("--checkpointing", action="store_true", help="recompute activations to save memory")
    add("--compile", action="store_true")
    add("--seed", type=int, default=0)
    add("--deterministic", action="store_true", help="same results in every run; PyTorch warns where that is impossible")
    add("--val-interval", type=positive_int, default=1, metavar="EPOCHS")
    add("--log-interval", type=positive_int, default=20, metavar="STEPS", help="also logs at the end of each epoch")
    add("--checkpoint-interval", type=positive_int, metavar="STEPS", help="also saves within an epoch")
    add("--resume", choices=["auto", "never"], default="never", help="auto: from the checkpoint in --output, if any")
    parser.set_defaults(**RECIPES.get(parser.parse_known_args(argv)[0].recipe, {}))
    return parser.parse_args(argv)


class TrainingLoss(nn.Module):
    """Model and loss in one module, CE(logits) + aux_weight * CE(aux_logits), to compile and to distribute.

    The loss is a mean over clips, even with class weights. Its mean over processes and forward passes is the loss of the step.

    Shape:
        frames uint8 (B, T, 3, H, W), labels (B,) → loss (), logits (B, K)
    """

    def __init__(self, model: tpn.TPNClassifier, aux_weight: float = 0.5, weights: Tensor | None = None, smoothing: float = 0):
        super().__init__()
        self.model, self.aux_weight, self.smoothing = model, aux_weight, smoothing
        self.register_buffer("weights", weights)

    def forward(self, frames: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, aux_loss, logits = self.losses(self.model.input_spec.normalize(frames), labels)
        return loss + aux_loss, logits

    def losses(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, aux_logits = self.model.forward_with_aux(clips) if self.aux_weight else (self.model(clips), None)
        loss = self.cross_entropy(logits, labels)
        aux_loss = torch.zeros_like(loss) if aux_logits is None else self.aux_weight * self.cross_entropy(aux_logits, labels)
        return loss, aux_loss, logits

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.float(), labels, self.weights, reduction="none", label_smoothing=self.smoothing)
        return losses.mean()


def start(args: argparse.Namespace) -> tuple[int, int, torch.device]:
    """Initialize PyTorch; return the rank, the number of processes and the device."""
    rank, world, device = training.join_processes(args.device)
    if args.resume == "never" and training.run_on_rank0((args.output / "checkpoint.pt").exists):
        raise ValueError(f"{args.output} already has a checkpoint. Pass --resume auto to resume, or choose another --output")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.manual_seed(args.seed)
    return rank, world, device


def build(args: argparse.Namespace, device: torch.device) -> tuple[tpn.TPNClassifier, VideoDataset, VideoDataset | None]:
    """Return the model and the datasets. The classifiers are replaced if the training data has other classes than the model."""
    weights = {"checkpoint_path": args.checkpoint, "backbone_pretrained": "imagenet" if args.imagenet else None}
    model_args = {"num_classes": 0, **args.model_args} if args.model == "tpn" else args.model_args  # classifiers follow below
    model = tpn.create_model(args.model, args.pretrained, **weights, **model_args)
    changes = {"short_side": args.short_side, "three_crop_size": args.short_side, "crop_size": args.crop_size}
    changes |= {"frame_interval": args.frame_interval}
    spec = model.input_spec = replace(model.input_spec, **{name: value for name, value in changes.items() if value})
    options = {"root": args.root, "template": args.frames, "first": args.first_frame, "max_bad": args.max_bad, "seed": args.seed}
    options |= {"target_fps": args.target_fps} if args.target_fps else {}
    train = open_dataset(args.train, spec, train=True, **options)
    numbers = tuple(f"class {i}" for i in range(model.num_classes))
    if model.labels and (train.classes == numbers or set(train.classes) == set(model.labels)):  # keep the model's order
        train = open_dataset(args.train, spec, train=True, classes=model.labels, **options)
    else:
        if (args.pretrained or args.checkpoint or ":" in args.model) and training.rank_and_world_size()[0] == 0:
            new = "head.fc" if model.aux_head is None else "head.fc and aux_head.fc"
            print(f"{args.train} has {len(train.classes)} classes, not the model's {model.num_classes}; new and untrained: {new}")
        model.reset_classifier(len(train.classes))
        model.labels, spec = train.classes, model.input_spec
    draws = {"crop_area": args.crop_area, "flip_prob": args.flip_prob, "color_jitter": args.color_jitter}
    train.transform = spec.train_transform(**draws, normalize=False)
    val = open_dataset(args.val, spec, train=False, classes=model.labels, **options) if args.val else None
    if args.checkpointing:
        model.set_grad_checkpointing()
    model.backbone.requires_grad_(args.freeze != "backbone")
    if model.aux_head is not None:
        model.aux_head.requires_grad_(args.aux_weight > 0)
    if args.channels_last:
        channels_last(model)
    return model.to(device), train, val


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rank, world, device = start(args)
    amp = getattr(torch, args.amp)
    model, train, val = build(args, device)
    weights = class_weights(train.labels, model.num_classes) if args.class_weights else None
    network: Any = TrainingLoss(model, args.aux_weight, weights, args.label_smoothing).to(device)
    if args.sync_bn and world > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if world > 1:
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    if args.compile:
        network = torch.compile(network)
    batch = args.batch_size * args.accumulate * world
    epoch_steps = len(train) // batch
    if epoch_steps == 0:
        raise ValueError(f"{len(train)} videos are less than one step of {batch} clips; decrease --batch-size")
    lr = args.lr * batch / args.lr_batch
    decay = {"weight_decay": args.weight_decay, "layer_decay": args.layer_decay, "filter_bias_and_bn": args.optimizer != "sgd"}
    kind = get_optimizer_class(args.optimizer, bind_defaults=False)
    fused = "fused" in inspect.signature(kind).parameters and device.type in ("cuda", "cpu")
    if kind is torch.optim.SGD and args.amp == "float16":
        fused = False  # if the first step overflows, as it often does, fused SGD keeps an uninitialized momentum buffer
    options = {"momentum": args.momentum} | decay | ({"fused": True} if fused else {})
    optimizer = create_optimizer_v2(model, args.optimizer, lr, **options)
    milestones = [m + 0.5 / epoch_steps for m in args.milestones]  # timm counts steps from 1
    shape = {"warmup_epochs": args.warmup, "warmup_lr": lr / 100, "step_on_epochs": False, "updates_per_epoch": epoch_steps}
    schedule, _ = create_scheduler_v2(optimizer, args.schedule, args.epochs, decay_milestones=milestones, **shape)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "float16")
    ema = ModelEmaV3(model, args.ema, use_warmup=True) if args.ema else None
    saved_model = ema.module if ema else model

    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler} | ({"ema": ema.module} if ema else {})
    settings = {k: v for k, v in vars(args).items() if k not in MUTABLE_ON_RESUME}
    settings |= {"devices": world, "videos": len(train), "checksum of their labels": zlib.crc32(repr(train.labels).encode())}
    checkpoint = training.Checkpoint(args.output / "checkpoint.pt", parts, settings)
    step, best, means = 0, -1.0, training.RunningMeans(device)
    if args.resume == "auto" and (progress := checkpoint.load()):
        step, best = progress["step"], progress["best"]
        means.restore(progress["sums"])
    log = training.MetricsLog(args.output, step) if rank == 0 else None
    if log:
        print(f"{len(train)} videos, {model.num_classes} classes, {epoch_steps} steps per epoch, {args.amp} on {device}")
        print(f"{batch} clips per step: {args.batch_size} x {args.accumulate} forward passes x {world} devices")
        print(f"learning rate {lr:.4g}, scaled from {args.lr:g} for {args.lr_batch} clips per step")
        print(f"step {step} of {args.epochs * epoch_steps}", flush=True)

    def save_checkpoint() -> None:
        sums = means.collect()
        if log:
            checkpoint.save({"step": step, "best": best, "sums": sums})

    while step < args.epochs * epoch_steps:
        epoch = step // epoch_steps
        train.set_epoch(epoch)
        order = {"accumulate": args.accumulate, "balanced": args.balanced, "rank": rank, "world_size": world}
        batches = training.epoch_batches(train.labels, args.batch_size, seed=args.seed, epoch=epoch, **order)
        batches = batches[step % epoch_steps * args.accumulate :]  # a resumed epoch
        clips = iter(DataLoader(train, batch_sampler=batches, num_workers=args.workers, pin_memory=device.type == "cuda"))
        model.train()
        if args.freeze != "none":
            freeze_batch_norm(model if args.freeze == "bn" else model.backbone)
        start_time, start_step, waited = time.perf_counter(), step, 0.0
        while step < (epoch + 1) * epoch_steps:
            torch.manual_seed((args.seed * world + rank) * 1_000_003 + step)  # a resumed run has the same dropout
            schedule.step_update(step)
            for i in range(args.accumulate):
                wait_start = time.perf_counter()
                frames, labels = next(clips)
                waited += time.perf_counter() - wait_start
                frames, labels = frames.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                with nullcontext() if world == 1 or i == args.accumulate - 1 else network.no_sync():
                    with torch.autocast(device.type, amp, enabled=amp != torch.float32):
                        loss, logits = network(frames, labels)
                    scaler.scale(loss / args.accumulate).backward()
                means.add(loss, logits.argmax(dim=1) == labels)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            if ema:
                ema.update(model, step)
            if step % args.log_interval == 0 or step % epoch_steps == 0:
                values = {"epoch": epoch} | means.read() | {"lr": max(group["lr"] for group in optimizer.param_groups)}
                seconds = time.perf_counter() - start_time
                values |= {"clips_per_s": (step - start_step) * batch / seconds, "data_wait": waited / seconds}
                if log:
                    log.write(step, values | {"grad_norm": float(norm)})
                start_time, start_step, waited = time.perf_counter(), step, 0.0
            if args.checkpoint_interval and step % args.checkpoint_interval == 0 and step % epoch_steps:
                save_checkpoint()
        del clips  # ends the loader processes
        training.broadcast_bn_stats(model, saved_model)
        if val and ((epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs):
            loader = {"batch_size": args.batch_size, "workers": args.workers}
            values = {"epoch": epoch} | training.validate(saved_model, val, **loader, amp=amp)
            if log:
                log.write(step, values)
                if values["val_top1"] > best:
                    tpn.save_pretrained(saved_model, args.output / "best")
            best = max(best, values["val_top1"])
        bad = training.report_bad_files(args.output / "bad_files.txt", train, *([val] if val else []))
        if log and bad:
            print(f"{bad} unreadable videos were replaced by others; see {args.output / 'bad_files.txt'}")
        save_checkpoint()
    if log:
        tpn.save_pretrained(saved_model, args.output)
        print(f"saved; use it with: tpn predict --model local-dir:{args.output} VIDEO")


if __name__ == "__main__":
    run_cli(main)
