"""What the site takes from the package while it is built: the tables of the models page, the command line, inlined drawings."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from tpn import model_info
from tpn.cli.app import app
from tpn.zoo.weights import WEIGHTS, Weights

ATTRIBUTES = re.compile(r"<b><code>(<span[^>]*>)(\w+,)</span></code></b>\s*\(<code>(.*?)</code>\)", re.DOTALL)
"""What "first, last: ..." becomes, which is read as an attribute "first," of type "last"."""

DRAWING = re.compile(r'<p><img [^>]*src="([^"]+\.svg)"[^>]*></p>')


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """columns: titles, with ":" at the end of those to the right."""
    aligned = ("---:" if column.endswith(":") else "---" for column in columns)
    lines = [[column.rstrip(":") for column in columns], list(aligned), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name(text: str) -> str:
    """A name that a click copies."""
    return f'<code class="copy" title="copy">{text}</code>'


def plain(text: str) -> str:
    """Text that Markdown must not read."""
    return re.sub(r"([*_<|`\\[\]])", r"\\\1", text)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def models() -> str:
    """A row for each architecture that has weights."""
    rows = []
    for model in dict.fromkeys(entry.model for entry in WEIGHTS.values()):
        about = model_info(model)
        spec = about.weights.input
        frames = f"{spec.num_frames} × {spec.frame_interval}" if spec.sampling == "dense" else f"{spec.num_frames} segments"
        tags = ", ".join(entry.tag for entry in WEIGHTS.values() if entry.model == model)
        rows.append((name(model), frames, about.weights.dataset.title, f"{about.params / 1e6:.1f} M", f"{about.gmacs:.1f}", tags))
    return table(("model", "frames × interval", "data", "parameters:", "GMACs:", "checkpoints"), rows)


def accuracies() -> str:
    """A row for each checkpoint: what it reaches, and how that is tested."""
    rows = []
    for entry in WEIGHTS.values():
        measured = percent(entry.measured_top1) or "not yet"
        reported = (percent(entry.reported_top1), percent(entry.reported_top5))
        spec = entry.input
        size = spec.three_crop_size if spec.num_crops == 3 else spec.crop_size
        protocol = f"{spec.num_clips} × {spec.num_crops}, {size} px" + (", mirrored" if spec.flip else "")
        start = entry.initialised_from or "random"
        rows.append((name(entry.name), *reported, measured, protocol, start))
    return table(("checkpoint", "top-1:", "top-5:", "measured here:", "tested with", "starts from"), rows)


def files() -> str:
    """A row for each checkpoint: who publishes it, and where."""

    def link(entry: Weights) -> str:
        if entry.url is None:
            return "in the package"
        return f"[{'by hand' if entry.manual else 'by itself'}]({entry.url})"

    def digits(entry: Weights) -> str:
        return f"`{entry.sha256}…`" if entry.sha256 else ""

    rows = [(name(entry.name), entry.source, link(entry), digits(entry), entry.license, entry.note) for entry in WEIGHTS.values()]
    return table(("checkpoint", "published by", "download", "SHA-256", "license", "note"), rows)


def commands() -> str:
    """A section for each command of `tpn`."""
    group: Any = typer.main.get_command(app)
    parts = []
    for command in group.commands.values():
        rows, usage = [], ["tpn", command.name]
        for param in command.params:
            is_option = param.param_type_name == "option"
            metavar = param.metavar or (param.name.upper() if param.required else f"[{param.name.upper()}]")
            names = ", ".join(f"`{each}`" for each in param.opts) if is_option else f"`{metavar}`"
            default = "required" if param.required else plain(f"{param.default}")
            hidden = param.default is None or param.default is False
            rows.append((names, plain(param.help or ""), "" if hidden and not param.required else default))
            usage += [] if is_option else [metavar]
        about = "\n\n".join(" ".join(paragraph.split()) for paragraph in command.help.split("\n\n"))
        usage = " ".join([*usage, "[OPTIONS]"])
        parts += [f"## tpn {command.name}", plain(about), f"```text\n{usage}\n```", table(("option", "", "default"), rows)]
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
    """Attributes that share a description."""

    def joined(match: re.Match[str]) -> str:
        return f"<b><code>{match[2]} {re.sub('<[^>]+>', '', match[3])}</code></b>"

    return ATTRIBUTES.sub(joined, html)


def on_post_page(output: str, page, config, **kwargs: object) -> str:
    """Put drawings into the page, where they take its colours, light or dark; on narrow screens they scroll."""

    def inline(match: re.Match[str]) -> str:
        path = Path(config["docs_dir"], page.file.src_uri).parent / match[1]
        return f'<figure class="drawing">{path.read_text(encoding="utf-8")}</figure>'

    return DRAWING.sub(inline, output)
