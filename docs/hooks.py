"""MkDocs hooks: fill in the tables of models and the command line reference from the package, and inline drawings."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from tpn import model_info
from tpn.cli.commands import app
from tpn.zoo.checkpoints import CHECKPOINTS

ATTRIBUTES = re.compile(r"<b><code>(<span[^>]*>)(\w+,)</span></code></b>\s*\(<code>(.*?)</code>\)", re.DOTALL)
"""Attributes documented as "first, last: ..." are parsed as an attribute "first," of type "last"."""

DRAWING = re.compile(r'<p><img [^>]*src="([^"]+\.svg)"[^>]*></p>')


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. Columns whose title ends in ":" are aligned to the right."""
    aligned = ("---:" if column.endswith(":") else "---" for column in columns)
    lines = [[column.rstrip(":") for column in columns], list(aligned), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def copyable(text: str) -> str:
    """Return HTML for text that is copied when it is clicked."""
    return f'<code class="copy" title="copy">{text}</code>'


def escape(text: str) -> str:
    """Escape Markdown."""
    return re.sub(r"([*_<|`\\[\]])", r"\\\1", text)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def models() -> str:
    """Return the table of architectures with weights."""
    rows = []
    for model in dict.fromkeys(entry.model for entry in CHECKPOINTS.values()):
        about = model_info(model)
        entry = about.checkpoint
        spec = entry.config.input_spec
        frames = f"{spec.num_frames} × {spec.frame_interval}" if spec.sampling == "dense" else f"{spec.num_frames} segments"
        tags = ", ".join(each.tag for each in CHECKPOINTS.values() if each.model == model)
        params, gmacs = f"{about.params / 1e6:.1f} M", f"{about.gmacs:.1f}"
        rows.append((copyable(model), frames, entry.dataset, params, gmacs, tags))
    return table(("model", "frames × interval", "data", "parameters:", "GMACs:", "checkpoints"), rows)


def accuracies() -> str:
    """Return the table of accuracies and test protocols, by checkpoint."""
    rows = []
    for entry in CHECKPOINTS.values():
        measured = percent(entry.measured_top1) or "not yet"
        reported = (percent(entry.reported_top1), percent(entry.reported_top5))
        spec = entry.config.input_spec
        protocol = f"{spec.num_clips} × {spec.num_crops}, {spec.view_size} px" + (", mirrored" if spec.flip else "")
        rows.append((copyable(entry.name), *reported, measured, protocol, entry.initialized_from))
    return table(("checkpoint", "top-1:", "top-5:", "measured here:", "tested with", "starts from"), rows)


def files() -> str:
    """Return the table of downloads and licenses, by checkpoint."""

    rows = []
    for entry in CHECKPOINTS.values():
        source = entry.source
        sha256 = f"`{source.sha256}…`" if source.sha256 else ""
        download = f"[{source.access}]({source.url})" if source.url else source.access
        rows.append((copyable(entry.name), entry.publisher, download, sha256, entry.license, entry.note))
    return table(("checkpoint", "published by", "download", "SHA-256", "license", "note"), rows)


def commands() -> str:
    """Return the reference of the command line, one section per command."""
    group: Any = typer.main.get_command(app)
    parts = []
    for command in group.commands.values():
        rows, usage = [], ["tpn", command.name]
        for param in (param for param in command.params if not param.hidden):
            is_option = param.param_type_name == "option"
            metavar = param.metavar or (param.name.upper() if param.required else f"[{param.name.upper()}]")
            names = ", ".join(f"`{opt}`" for opt in param.opts) if is_option else f"`{metavar}`"
            default = "required" if param.required else escape(f"{param.default}")
            hidden = param.default is None or param.default is False
            rows.append((names, escape(param.help or ""), "" if hidden and not param.required else default))
            usage += [] if is_option else [metavar]
        description = "\n\n".join(" ".join(paragraph.split()) for paragraph in command.help.split("\n\n"))
        usage = " ".join([*usage, "[OPTIONS]"])
        parts += [f"## tpn {command.name}", escape(description), f"```text\n{usage}\n```", table(("option", "", "default"), rows)]
    return "\n\n".join(parts)


GENERATED: dict[str, Callable[[], str]] = {
    "<!-- models -->": models,
    "<!-- accuracies -->": accuracies,
    "<!-- files -->": files,
    "<!-- commands -->": commands,
}


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    for marker, write in GENERATED.items():
        if marker in markdown:
            markdown = markdown.replace(marker, write())
    return markdown


def on_page_content(html: str, **kwargs: object) -> str:
    """Join the names of attributes that share a description."""

    def join_names(match: re.Match[str]) -> str:
        return f"<b><code>{match[2]} {re.sub('<[^>]+>', '', match[3])}</code></b>"

    return ATTRIBUTES.sub(join_names, html)


def on_post_page(output: str, page, config, **kwargs: object) -> str:
    """Inline drawings, so that they have the colors of the page."""

    def inline(match: re.Match[str]) -> str:
        path = Path(config["docs_dir"], page.file.src_uri).parent / match[1]
        return f'<figure class="drawing">{path.read_text(encoding="utf-8")}</figure>'

    return DRAWING.sub(inline, output)
