"""The pages of the documentation, the blocks of code on them, and how a page is run: `python pages.py PAGE`, in page order.

Python blocks share one namespace, as if they were typed one after the other; bash blocks run between them, in bash.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES_FOLDER = ROOT / "docs" / "pages"
PAGES = {str(path.relative_to(ROOT)): path for path in [*sorted(ROOT.glob("*.md")), *sorted(PAGES_FOLDER.rglob("*.md"))]}

RUN, SHOWN = {"python", "bash"}, {"text", "json", "bibtex"}
"""Languages of blocks that are run, and of those that cannot be."""

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\s`]*)[^\n]*\n(?P<code>.*?)^(?P=indent)``` *$", re.MULTILINE | re.DOTALL)
OTHERS = re.compile(r"^(pip install|tpn demo|pytest|ruff|mypy|mkdocs|\.ci/run|git|NO_MKDOCS)\b.*\n?", re.MULTILINE)
"""Commands for which the continuous integration has steps of its own."""


@dataclass(frozen=True)
class Block:
    """A block of code. line: of its fence, from 1."""

    language: str
    code: str
    line: int

    @property
    def shorter(self):
        """A bash block that does the same in less time, without what is installed or tested elsewhere."""
        code = re.sub(r"^pip install .* && ", "", self.code, flags=re.MULTILINE)
        return re.sub(r"(write_dataset\('[^']+', )\d+", r"\g<1>1", OTHERS.sub("", code))


def blocks(page):
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        found.append(Block(match["language"], code, text.count("\n", 0, match.start()) + 1))
    return found


def run(page):
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        sys.stdout.flush()
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        elif block.language == "bash" and block.shorter.strip():
            done = subprocess.run(["bash", "-euc", block.shorter])
            if done.returncode:
                sys.exit(f"{page}:{block.line}: exit code {done.returncode}")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
