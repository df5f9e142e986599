"""Hold the documentation to what it says.

Without an argument: every python block of README.md runs, every path that README.md, CONTRIBUTING.md
and docs/ name exists, and every name in routed_peft.__all__ has a docstring. The blocks of
docs/ run in tests/test_docs_models.py and tests/test_docs_training.py, on tiny models.
With a heading of README.md as argument, say Tests: print the first code block under it.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/models.md", "docs/training.md"]
BLOCK_SECONDS = 300

SOURCE_SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".sh", ".yml"}
BARE_FILES = {"Makefile", "LICENSE", "CMakeLists.txt", ".clang-format", ".gitignore"}
NOT_SOURCES = {".git", ".venv", "build", "dist", "__pycache__"}


class Block(NamedTuple):
    heading: str
    language: str
    line: int  # of the first line of code, from 1
    code: str


def blocks(markdown: str) -> Iterator[Block]:
    """The fenced code blocks, each with the heading it stands under."""
    heading, fence, language, start, code = "", "", "", 0, []
    for number, line in enumerate(markdown.splitlines(), 1):
        mark = re.match(r"(`{3,}|~{3,})\s*(\S*)", line)
        if fence:
            if mark and mark[1].startswith(fence) and not mark[2]:
                yield Block(heading, language, start, "\n".join(code) + "\n")
                fence = ""
            else:
                code.append(line)
        elif mark:
            fence, language, start, code = mark[1], mark[2], number + 1, []
        elif title := re.match(r"#+\s+(.*?)\s*#*$", line):
            heading = title[1]
    if fence:
        raise SystemExit(f"line {start - 1}: a code block is opened and never closed")


def command(heading: str) -> str:
    """The first code block under a heading of README.md."""
    for block in blocks((ROOT / "README.md").read_text()):
        if block.heading == heading:
            return block.code
    raise SystemExit(f'README.md has no code block under a heading "{heading}"')


def failing_blocks() -> Iterator[str]:
    """Run README.md's python blocks, each in a fresh interpreter and an empty directory."""
    examples = [b for b in blocks((ROOT / "README.md").read_text()) if b.language == "python"]
    if not examples:
        yield "README.md: no python block at all"
    for block in examples:
        with tempfile.TemporaryDirectory() as scratch:
            # Padded with empty lines, so that a traceback shows README.md's own line numbers.
            script = Path(scratch, "README.md")
            script.write_text("\n" * (block.line - 1) + block.code)
            run = [sys.executable, script.name]
            try:
                subprocess.run(run, cwd=scratch, check=True, timeout=BLOCK_SECONDS)
            except subprocess.SubprocessError as error:
                yield f"README.md:{block.line}: the python block fails: {error}"


def missing_paths() -> Iterator[str]:
    """Paths in backticks and in relative links that lead nowhere."""
    top_level = {entry.name for entry in ROOT.iterdir()}
    sources = list(source_files())

    def exists(name: str) -> bool:
        bare = "/" not in name
        return (ROOT / name).exists() or bare and any(path.name == name for path in sources)

    for document in DOCUMENTS:
        for number, line in enumerate((ROOT / document).read_text().splitlines(), 1):
            links = re.findall(r"\]\(([^)\s]+)\)", line)
            named = [link for link in links if not re.match(r"[a-z]+:|#", link)]
            named += [word for word in re.findall(r"`([^`]+)`", line) if is_path(word, top_level)]
            for name in named:
                path = re.split(r"#|::?", name)[0]  # not the anchor, the line or the test
                if not exists(path):
                    yield f"{document}:{number}: {name} does not exist"


def is_path(word: str, top_level: set[str]) -> bool:
    """Whether a word in backticks names a file or folder of this repository."""
    if re.search(r"[^\w./:#-]", word) or re.match(r"[a-z]+://|/|~|\.venv\b|build/|dist/", word):
        return False  # code, a pattern, an address, or something that is only there after a build
    path = re.split(r"#|::?", word)[0]
    if path in BARE_FILES or Path(path).suffix in SOURCE_SUFFIXES:
        return True
    return "/" in path and (path.endswith("/") or path.split("/")[0] in top_level)


def source_files() -> Iterator[Path]:
    for path in ROOT.rglob("*"):
        if path.is_file() and not NOT_SOURCES & set(path.relative_to(ROOT).parts):
            yield path


def undocumented_names() -> Iterator[str]:
    import routed_peft

    for name in routed_peft.__all__:
        doc = getattr(routed_peft, name).__doc__
        # A dataclass without a docstring gets its own signature as one.
        if not doc or doc.startswith(f"{name}("):
            yield f"routed_peft.{name} has no docstring"


def main() -> None:
    if len(sys.argv) > 1:
        print(command(sys.argv[1]), end="")
        return
    problems = [*missing_paths(), *undocumented_names(), *failing_blocks()]
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
