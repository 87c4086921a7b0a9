"""MkDocs hooks: fill in tables of models, the command line reference, and files of the repository, and inline drawings."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from tpn.cli.commands import app
from tpn.zoo.checkpoints import CHECKPOINTS

TRY_FILES = Path(__file__).parent / "pages" / "assets" / "try"
"""What docs/browser/build.py writes."""

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


def models() -> str:
    """Return the table of all checkpoints."""
    rows = []
    for entry in CHECKPOINTS.values():
        spec = entry.config.input_spec
        frames = f"{spec.num_frames} × {spec.frame_interval}" if spec.sampling == "dense" else f"{spec.num_frames} segments"
        top1 = f"{entry.reported_top1:.2f}" if entry.measured_top1 is None else f"{entry.measured_top1:.2f}*"
        top5 = "" if entry.reported_top5 is None else f"{entry.reported_top5:.2f}"
        cost = (f"{entry.gmacs:.1f}", f"{entry.params / 1e6:.1f}")
        protocol = f"{spec.num_clips} × {spec.num_crops}, {spec.view_size} px" + (", flipped" if spec.flip else "")
        rows.append((copyable(entry.name), top1, top5, *cost, frames, entry.dataset, protocol, entry.source.access))
    columns = ("checkpoint", "top-1:", "top-5:", "GMACs:", "params, M:", "input", "data", "tested with", "download")
    return table(columns, rows)


def files() -> str:
    """Return the table of downloads and licenses, by checkpoint."""
    rows = []
    for entry in CHECKPOINTS.values():
        source = entry.source
        sha256 = f"`{source.sha256}…`" if source.sha256 else ""
        download = f"[{source.access}]({source.url})" if source.url else source.access
        rows.append((copyable(entry.name), entry.publisher, download, sha256, entry.license, entry.initialized_from, entry.note))
    return table(("checkpoint", "published by", "download", "SHA-256", "license", "starts from", "note"), rows)


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
        examples = command.epilog.split("\n\n")[1:]
        usage = "\n".join([" ".join([*usage, "[OPTIONS]"]), "", *examples])
        parts += [f"## tpn {command.name}", escape(description), f"```text\n{usage}\n```", table(("option", "", "default"), rows)]
    return "\n\n".join(parts)


def read_from_root(name: str) -> str:
    """Return a Markdown file of the repository's root, with its links to pages relative to the pages."""
    return (Path(__file__).parents[1] / name).read_text(encoding="utf-8").replace("](docs/pages/", "](")


def runtime() -> str:
    """Return the button that loads the model in the browser, or how to build what it loads."""
    size = sum(path.stat().st_size for path in TRY_FILES.glob("*"))
    if not size:
        return "This build of the site lacks the model. Run `python docs/browser/build.py`, which needs npm, and build it again."
    return f'<button id="try-load" data-bytes="{size}">Load the model, {size / 1e6:.0f} MB</button>'


GENERATED: dict[str, Callable[[], str]] = {
    "<!-- models -->": models,
    "<!-- files -->": files,
    "<!-- commands -->": commands,
    "<!-- CHANGELOG.md -->": lambda: read_from_root("CHANGELOG.md"),
    "<!-- CONTRIBUTING.md -->": lambda: read_from_root("CONTRIBUTING.md"),
    "<!-- runtime -->": runtime,
}


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Replace each line that ends in a marker. Readers of the repository see what is before the marker."""
    for marker, write in GENERATED.items():
        if marker in markdown:
            before, _, after = re.split(f"^(.*{re.escape(marker)})$", markdown, maxsplit=1, flags=re.MULTILINE)
            markdown = before + write() + after
    return markdown


def on_post_page(output: str, page, config, **kwargs: object) -> str:
    """Inline drawings, so that they have the colors of the page, and do not ask GitHub for the numbers of the repository."""

    def inline(match: re.Match[str]) -> str:
        path = Path(config["docs_dir"], page.file.src_uri).parent / match[1]
        return f'<figure class="drawing">{path.read_text(encoding="utf-8")}</figure>'

    return DRAWING.sub(inline, output).replace('data-md-component="source"', "")
