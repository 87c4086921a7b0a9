"""Fine-tune a model on a folder with a folder of videos for each class: a minimal loop. For real runs, use `train.py`.

python examples/finetune.py videos/train videos/val
"""

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import tpn
from tpn.training import run_cli
from tpn.video.datasets import VideoFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("--model", default="tpn_slowonly_r50_k400")
    for name, default in (("--epochs", 5), ("--batch-size", 8), ("--lr", 0.001)):
        parser.add_argument(name, type=type(default), default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = replace(tpn.input_spec(args.model), flip_label_pairs=())  # no pairs of classes that a horizontal flip exchanges
    train = VideoFolder(args.train, spec, train=True)
    val = VideoFolder(args.val, spec, train=False, classes=train.classes)
    model = tpn.create_model(args.model, pretrained=True).to(device)
    model.reset_classifier(len(train.classes))  # of the head and the auxiliary head
    model.labels = tuple(train.classes)
    batches = DataLoader(train, args.batch_size, shuffle=True, num_workers=2, drop_last=len(train) >= args.batch_size)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * len(batches))

    for epoch in range(args.epochs):
        train.set_epoch(epoch)  # draws other clips
        model.train()
        for frames, labels in batches:
            logits, aux_logits = model.forward_with_aux(spec.normalize(frames.to(device)))
            loss = F.cross_entropy(logits, labels.to(device))
            if aux_logits is not None:  # None without a pyramid
                loss = loss + 0.5 * F.cross_entropy(aux_logits, labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 40)
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            hits = [model(spec.normalize(frames.to(device))).argmax(1).cpu() == labels for frames, labels in DataLoader(val, 8)]
        print(f"epoch {epoch}: loss {loss.item():.3f}, top-1 {torch.cat(hits).float().mean():.1%} of {len(val)}")
    print(f"saved to {tpn.save_pretrained(model, 'my-tpn')}; load it with tpn.create_model('local-dir:my-tpn')")


if __name__ == "__main__":
    run_cli(main)
