"""Commands about models: list, info, convert, publish."""

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

import tpn
from tpn.cli.app import app, err
from tpn.zoo import publish as publishing
from tpn.zoo import sources
from tpn.zoo.registry import count
from tpn.zoo.weights import WEIGHTS, get_weights


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Wildcard, such as 'tpn_*r101*'.")] = "*",
    weights: Annotated[bool, typer.Option("--weights", help="Every checkpoint, not only each model's default.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List the models with the accuracy that the publisher of their default weights reports."""
    names = tpn.list_models(pattern, pretrained=weights)
    if not names:
        raise ValueError(f"no model matches {pattern!r}; tpn list shows all")
    rows = [_facts(name) for name in names]
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["model", "params", "GMACs", "frames x interval", "dataset", "top-1", "top-5", "source"]
    if weights:
        columns.append("weights")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="left" if column in ("model", "dataset", "source", "weights") else "right")
    for row in rows:
        table.add_row(row["model" if weights else "architecture"], *(row["shown"][c] for c in columns[1:]))
    console = Console()
    console.width = max(console.width, 140)  # a row is a line, also in a pipe
    console.print(table)
    legend = "\ntop-1, top-5: percent, reported upstream (* measured by this project). GMACs: one clip at the training size."
    console.print(legend, highlight=False)


@app.command()
def info(
    name: Annotated[
        str,
        typer.Argument(
            help="A model, with or without a tag: tpn_slowonly_r50_k400.scratch; local-dir:FOLDER, hf-hub:OWNER/NAME."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what is known of a model and its weights."""
    if ":" in name:
        facts = _saved_facts(name)
        shown = facts | {"labels": ", ".join(facts["labels"][:5]) + (", ..." if len(facts["labels"]) > 5 else "")}
    else:
        facts = _facts(name)
        shown = {"model": facts["model"], **facts["shown"], **facts["details"]}
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for key, value in shown.items():
        typer.echo(f"{key:<18} {value}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth of MMAction2 or of the original TPN, or a .safetensors.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model it holds, with a tag if it has several.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. Default: the cache, so that pretrained=True finds it.")
    ] = None,
) -> None:
    """Write a checkpoint as safetensors with its configuration, for local-dir:FOLDER or pretrained=True."""
    weights = get_weights(model)
    path = sources.store(weights, checkpoint, output) if output else sources.convert(weights, checkpoint)
    how = f'"local-dir:{path.parent}"' if output else f'"{weights.name}", pretrained=True'
    err.print(f"wrote {path.parent}; load it with tpn.create_model({how})")


@app.command()
def publish(
    namespace: Annotated[str, typer.Option(help="Your account or organisation on the Hugging Face Hub.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make new repositories private.")] = False,
) -> None:
    """Upload the published checkpoints to the Hub, converted: all that are in the cache or have a direct link.

    The others have to be fetched by hand, and are listed with the way to do it. Needs HF_TOKEN, or `hf auth login`.
    """
    failed = False
    for done in publishing.publish(namespace, dry_run=dry_run, private=private):
        typer.echo(f"{done.state:<20} {done.repo_id}" + (f"  {done.detail}" if done.detail else ""))
        failed |= done.state == "failed"
    if failed:
        raise typer.Exit(1)


def _saved_facts(name: str) -> dict[str, Any]:
    """Return what `info` prints of somebody's own model."""
    model = tpn.create_model(name)
    spec, args = tpn.input_spec(model), dict(model.model_args or {})
    params, gmacs = count(model)
    return {
        "model": name,
        "architecture": cast("Any", model).pretrained_cfg["architecture"],
        **{key: args[key] for key in sorted(args.keys() - {"num_frames"})},
        "params": params,
        "GMACs": round(gmacs, 2),
        "num_frames": spec.num_frames,
        "frame_interval": spec.frame_interval if spec.sampling == "dense" else None,
        "views": f"{spec.num_clips}x{spec.num_crops}",
        "crop_size": spec.crop_size,
        "num_classes": model.num_classes,
        "labels": list(model.labels or ()),
    }


def _facts(name: str) -> dict[str, Any]:
    """Return what `list` and `info` print of "model" or "model.tag"."""
    about = tpn.model_info(name)
    w, spec = about.weights, about.weights.input
    here = (sources.cache_folder(w) / "model.safetensors").is_file()
    interval = f"x{spec.frame_interval}" if spec.sampling == "dense" else " segments"
    measured = "not yet" if w.measured_top1 is None else f"{w.measured_top1:.2f}"
    top1 = f"{measured}*" if w.reported_top1 is None else f"{w.reported_top1:.2f}"
    place = "in the package" if w.embedded else "in the cache" if here else "by hand" if w.manual else "direct link"
    return {
        "architecture": w.model,
        "model": w.name,
        "params": about.params,
        "gmacs": round(about.gmacs, 2),
        "num_frames": spec.num_frames,
        "frame_interval": spec.frame_interval,
        "dataset": w.dataset.title,
        "reported_top1": w.reported_top1,
        "reported_top5": w.reported_top5,
        "measured_top1": w.measured_top1,
        "measured_top5": w.measured_top5,
        "protocol": w.protocol,
        "source": w.source,
        "url": w.url,
        "sha256": w.sha256,
        "repo_id": w.repo_id,
        "license": w.license,
        "cached": here,
        "shown": {
            "params": f"{about.params / 1e6:.1f} M",
            "GMACs": f"{about.gmacs:.1f}",
            "frames x interval": f"{spec.num_frames}{interval}",
            "dataset": w.dataset.title,
            "top-1": top1,
            "top-5": "" if w.reported_top5 is None else f"{w.reported_top5:.2f}",
            "source": w.source,
            "weights": place,
        },
        "details": {
            "accuracy": f"{'reported upstream; ' if w.reported_top1 else ''}measured by this project: {measured}",
            "protocol": w.protocol,
            "classes": str(w.dataset.num_classes),
            "initialised from": w.initialised_from or "random",
            "note": w.note,
            "license": w.license,
            "link": w.url or "none, it comes with tpn",
            "other tags": ", ".join(e.tag for e in WEIGHTS.values() if e.model == w.model and e is not w) or "none",
        },
    }
