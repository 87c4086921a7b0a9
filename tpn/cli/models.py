"""The commands list, info, check-model, convert, and publish."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tpn.cli.app import MODELS, app, complete_model, examples
from tpn.cli.console import err, print_result

if TYPE_CHECKING:
    from tpn.zoo.checkpoints import Checkpoint


@app.command("list", rich_help_panel=MODELS, epilog=examples("tpn list", "tpn list '*r101*' --weights"))
def list_(
    pattern: Annotated[str, typer.Argument(help="Wildcard for model names, such as 'tpn_*r101*'.")] = "*",
    weights: Annotated[
        bool, typer.Option("--weights", help="List every checkpoint, not only the default of each model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """List models with their size and reported accuracy."""
    from tpn.zoo.names import list_models

    names = list_models(pattern, pretrained=weights)
    if not names:
        raise ValueError(f"no model matches {pattern!r}; try '*{pattern}*', or tpn list for all models")
    if as_json:
        for name in names:
            print_result(json.dumps(_facts(name)))
        return
    rows = [_columns(name, weights=weights) for name in names]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0]:
        table.add_column(column, no_wrap=True, justify="left" if column in ("model", "dataset", "source", "weights") else "right")
    for row in rows:
        table.add_row(*row.values())
    console = Console(width=1000)  # more than any row needs: a narrow terminal wraps rows, and nothing is truncated
    console.print(table)
    legend = "\ntop-1, top-5: percent, reported upstream (* measured by this project). GMACs: one clip at the training size."
    console.print(legend, highlight=False)


@app.command(rich_help_panel=MODELS, epilog=examples("tpn info tpn_slowonly_r50_k400"))
def info(
    name: Annotated[
        str,
        typer.Argument(
            help="Model name, also with a tag (tpn_slowonly_r50_k400.scratch), folder of a saved model, or hf-hub:OWNER/NAME.",
            autocompletion=complete_model,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the properties of a model and its weights."""
    from tpn.zoo.names import is_saved

    if is_saved(name):
        facts = _saved_facts(name)
        shown = facts | {"labels": ", ".join(facts["labels"][:5]) + (", ..." if len(facts["labels"]) > 5 else "")}
    else:
        facts, shown = _facts(name), _columns(name, weights=True) | _details(name)
    if as_json:
        print_result(json.dumps(facts))
        return
    for key, value in shown.items():
        print_result(f"{key:<18} {value}")


@app.command("check-model", rich_help_panel=MODELS, epilog=examples("tpn check-model tpn_slowonly_r50_k400"))
def check_model(
    name: Annotated[
        str,
        typer.Argument(
            help="Model name, also with a tag, folder of a saved model, or hf-hub:OWNER/NAME.", autocompletion=complete_model
        ),
    ],
) -> None:
    """Verify the weights of a model against their SHA-256 in config.json or on the Hub.

    Damaged files in a cache are downloaded again.
    """
    from tpn.files import file_sha256
    from tpn.zoo import fetch
    from tpn.zoo.checkpoints import Embedded, get_checkpoint
    from tpn.zoo.create import saved_folder
    from tpn.zoo.load import read_weights
    from tpn.zoo.names import WEIGHTS_FILE
    from tpn.zoo.saved import open_saved, saved_sha256

    if saved := saved_folder(name, verify=True):
        open_saved(saved)
        path, known = saved / WEIGHTS_FILE, saved_sha256(saved) is not None
    else:
        entry = get_checkpoint(name)
        path, known = fetch.weights_file(entry, verify=True), not isinstance(entry.source, Embedded)
    count, sha256 = len(read_weights(path).tensors), file_sha256(path)
    verified = "verified" if known else "not verified: no SHA-256 is known"
    print_result(f"{path}: {count} tensors, SHA-256 {sha256}, {verified}")


@app.command(rich_help_panel=MODELS, epilog=examples("tpn convert checkpoint.pth --model tpn_slowonly_r50_k400 --output my-tpn"))
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="Weights file, .pth or .safetensors, saved by tpn, MMAction2, or the original TPN code.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Model name, with the checkpoint tag if the model has several.", autocompletion=complete_model
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write. Default: the cache, for pretrained=True.")
    ] = None,
) -> None:
    """Convert a checkpoint to model.safetensors and config.json.

    Load the result as local-dir:FOLDER, or with pretrained=True if it is in the cache.
    """
    from tpn.zoo import fetch
    from tpn.zoo.checkpoints import get_checkpoint
    from tpn.zoo.load import read_weights

    entry = get_checkpoint(model)
    path = fetch.store(entry, read_weights(checkpoint), output) if output else fetch.convert(entry, checkpoint)
    how = f'"local-dir:{path.parent}"' if output else f'"{entry.name}", pretrained=True'
    err.print(f"wrote {path.parent}; load it with tpn.create_model({how})")


@app.command(rich_help_panel=MODELS, epilog=examples("tpn publish --namespace my-name --dry-run"))
def publish(
    namespace: Annotated[str, typer.Option(help="Your user or organization name on the Hugging Face Hub.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the uploads without doing them.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Create private repositories.")] = False,
) -> None:
    """Convert the published checkpoints and upload them to the Hugging Face Hub.

    Checkpoints that need a manual download are listed with instructions. Set HF_TOKEN or run hf auth login first.
    """
    from tpn.zoo import publish as publishing

    failed = False
    for done in publishing.publish(namespace, dry_run=dry_run, private=private):
        print_result(f"{done.state:<20} {done.repo_id}" + (f"  {done.detail}" if done.detail else ""))
        failed |= done.state == "failed"
    if failed:
        raise typer.Exit(1)


def _saved_facts(name: str) -> dict[str, Any]:
    """Return the properties of a saved model for `info`."""
    import torch

    from tpn.models.classifier import TPNClassifier
    from tpn.zoo.create import count, saved_folder
    from tpn.zoo.saved import open_saved

    folder = saved_folder(name, weights=False)
    assert folder is not None
    config = open_saved(folder, weights=False)
    with torch.device("meta"):
        params, gmacs = count(TPNClassifier.from_config(config))
    spec = config.input_spec
    parts = {"backbone": config.backbone, **({"neck": config.neck} if config.neck else {})}
    return {
        "model": name,
        "architecture": config.architecture,
        **{kind: " ".join([part.name, *(f"{key}={value}" for key, value in part.args.items())]) for kind, part in parts.items()},
        "params": params,
        "GMACs": round(gmacs, 2),
        "num_frames": spec.num_frames,
        "frame_interval": spec.frame_interval if spec.sampling == "dense" else None,
        "views": f"{spec.num_clips}x{spec.num_crops}",
        "crop_size": spec.crop_size,
        "num_classes": config.num_classes,
        "temperature": round(config.head.temperature, 4),
        "labels": list(config.labels or ()),
    }


def _facts(name: str) -> dict[str, Any]:
    """Return the properties of "model" or "model.tag" as JSON values."""
    from tpn.zoo.checkpoints import HubFiles
    from tpn.zoo.names import model_info

    about = model_info(name)
    entry, source, spec = about.checkpoint, about.checkpoint.source, about.checkpoint.config.input_spec
    return {
        "architecture": entry.model,
        "model": entry.name,
        "params": about.params,
        "gmacs": round(about.gmacs, 2),
        "num_frames": spec.num_frames,
        "frame_interval": spec.frame_interval,
        "num_classes": entry.config.num_classes,
        "dataset": entry.dataset,
        "reported_top1": entry.reported_top1,
        "reported_top5": entry.reported_top5,
        "measured_top1": entry.measured_top1,
        "measured_top5": entry.measured_top5,
        "protocol": entry.protocol,
        "source": entry.publisher,
        "url": source.url,
        "sha256": source.sha256,
        "repo_id": source.repo_id if isinstance(source, HubFiles) else entry.mirror,
        "license": entry.license,
        "initialized_from": entry.initialized_from,
        "note": entry.note,
        "cached": _is_cached(entry),
    }


def _columns(name: str, *, weights: bool) -> dict[str, str]:
    """Return a row of the table of models, with `weights` a row about a checkpoint."""
    from tpn.zoo.names import model_info

    about = model_info(name)
    entry, spec = about.checkpoint, about.checkpoint.config.input_spec
    interval = f"x{spec.frame_interval}" if spec.sampling == "dense" else " segments"
    row = {
        "model": entry.name if weights else entry.model,
        "params": f"{about.params / 1e6:.1f} M",
        "GMACs": f"{about.gmacs:.1f}",
        "frames x interval": f"{spec.num_frames}{interval}",
        "dataset": entry.dataset,
        "top-1": f"{_measured(entry)}*" if entry.reported_top1 is None else f"{entry.reported_top1:.2f}",
        "top-5": "" if entry.reported_top5 is None else f"{entry.reported_top5:.2f}",
        "source": entry.publisher,
    }
    return row | {"weights": "in the cache" if _is_cached(entry) else entry.source.access} if weights else row


def _details(name: str) -> dict[str, str]:
    """Return what `info` adds to the columns of the table."""
    from tpn.zoo.checkpoints import CHECKPOINTS, get_checkpoint

    entry = get_checkpoint(name)
    tags = [other.tag for other in CHECKPOINTS.values() if other.model == entry.model and other is not entry]
    return {
        "accuracy": f"{'reported upstream; ' if entry.reported_top1 else ''}measured by this project: {_measured(entry)}",
        "protocol": entry.protocol,
        "classes": str(entry.config.num_classes),
        "initialized from": entry.initialized_from,
        "note": entry.note,
        "license": entry.license,
        "link": entry.source.url or entry.source.access,
        "other tags": ", ".join(tags) or "none",
    }


def _measured(entry: "Checkpoint") -> str:
    return "not yet" if entry.measured_top1 is None else f"{entry.measured_top1:.2f}"


def _is_cached(entry: "Checkpoint") -> bool:
    from tpn.zoo.names import WEIGHTS_FILE, weights_folder

    return (weights_folder(entry) / WEIGHTS_FILE).is_file()
