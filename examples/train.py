"""Train a model on videos: the whole loop, to read and to change. For real runs there is `tpn train`, which does much more.

    python examples/train.py videos/train videos/val runs/mine

Each of the two folders has one folder of videos per class. The trained model is saved to `runs/mine`, for
`tpn predict VIDEO --model runs/mine` and `tpn.create_model("local-dir:runs/mine")`.
"""

import argparse
import math
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import tpn
from tpn.video.datasets import VideoFolder

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("train")
parser.add_argument("val")
parser.add_argument("output")
parser.add_argument("--model", default="tpn_slowonly_tiny_motion")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--weight-decay", type=float, default=0.05)
parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
parser.add_argument("--aux-weight", type=float, default=0.5)
parser.add_argument("--clip-grad", type=float, default=40.0)
parser.add_argument("--frame-interval", type=int, help="default: the model's")
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--seed", type=int, default=0)


def main() -> None:
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    # The clips: how many frames, at which interval, of which size. Flips swap the labels in `spec.flip_label_pairs`.
    spec = tpn.input_spec(args.model)
    spec = replace(spec, frame_interval=args.frame_interval or spec.frame_interval)
    train = VideoFolder(args.train, spec, train=True, seed=args.seed)
    val = VideoFolder(args.val, spec, train=False, classes=train.classes)
    batches = DataLoader(train, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=len(train) > args.batch_size)

    # The model: everything is loaded except the classifiers, which are new.
    model = tpn.create_model(args.model, pretrained=True)
    model.reset_classifier(len(train.classes))
    model.labels, model.input_spec = train.classes, spec
    model = model.to(device)

    # Norms and biases do not decay.
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    steps = args.epochs * len(batches)
    warmup = max(args.warmup * steps, 1)

    step = 0
    for epoch in range(args.epochs):
        train.set_epoch(epoch)  # other clips, crops and colors
        model.train()
        start = time.perf_counter()
        for frames, labels in batches:  # uint8 (B, T, 3, S, S), (B,)
            for group in optimizer.param_groups:  # linear warm-up, then half a cosine
                group["lr"] = args.lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
            frames, labels = frames.to(device), labels.to(device)
            with autocast:
                logits, aux_logits = model.forward_with_aux(spec.normalize(frames))
            loss = F.cross_entropy(logits.float(), labels)
            if aux_logits is not None:  # None for a model without neck
                loss = loss + args.aux_weight * F.cross_entropy(aux_logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            step += 1
        seconds = time.perf_counter() - start

        model.eval()
        hits = []
        with torch.inference_mode(), autocast:
            for frames, labels in DataLoader(val, args.batch_size):
                logits = model(spec.normalize(frames.to(device)))
                hits.append(logits.argmax(dim=1).cpu() == labels)
        accuracy = torch.cat(hits).float().mean()
        print(f"epoch {epoch}: loss {loss.item():.3f}, {len(train) / seconds:.1f} clips/s, top-1 {accuracy:.1%} of {len(val)}")

    print(f"saved to {tpn.save_pretrained(model, args.output)}")


if __name__ == "__main__":
    main()
