"""For mkdocs: what the pages take from the code and from results/, so that each text exists once.

    python scripts/docs_hooks.py    writes docs/tutorial.ipynb from docs/tutorial.md

A page may have one of these lines, and has in its place, on the site:

    <!-- arguments -->   a table of this package's training arguments, from the fields' help
    <!-- commands -->    what `adasam --help` prints, and the same for each command

Fenced blocks of the language `math` become MathML, which browsers draw by themselves.
"""

import contextlib
import html
import io
import json
import os
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
ARGUMENTS, COMMANDS = "<!-- arguments -->", "<!-- commands -->"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """The pictures and reports of results/ belong to the site. Pages link them as GitHub finds them."""
    for path in sorted((ROOT / "results").rglob("*")):
        if path.suffix in (".png", ".md"):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))


def on_page_markdown(markdown: str, **_: object) -> str:
    markdown = markdown.replace("](../results/", "](results/")
    markdown = re.sub(r"^```math\n(.*?)^```$", _mathml, markdown, flags=re.MULTILINE | re.DOTALL)
    for marker, made in ((ARGUMENTS, argument_table), (COMMANDS, command_help)):
        if marker in markdown:
            markdown = markdown.replace(marker, made())
    return markdown


def _mathml(block: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    return f'<div class="equation">{convert(block[1].strip(), display="block")}</div>'


# ---- arguments ----


def package_fields() -> list[Field[Any]]:
    """The training arguments that this package adds or redefines, in the order of the class."""
    from adasam_hf import AdaSAMTrainingArguments
    from adasam_hf.defaults import AdamDefaultsMixin
    from adasam_hf.training_args import SharpnessAwareArgumentsMixin

    ours = {*SharpnessAwareArgumentsMixin.__annotations__, *AdamDefaultsMixin.__annotations__}
    found = [f for f in fields(AdaSAMTrainingArguments) if f.name in ours and f.metadata["help"] != "==SUPPRESS=="]
    return sorted(found, key=lambda f: (f.name != "optim", not f.name.startswith("sam_")))


def argument_table() -> str:
    from adasam_hf import AdaSAMTrainingArguments

    types = get_type_hints(AdaSAMTrainingArguments)
    rows = ["| argument | | default |", "|---|---|---|"]
    for field in package_fields():
        choices = [value for value in get_args(types[field.name]) if isinstance(value, str)]
        one_of = f" One of {', '.join(f'`{value}`' for value in choices)}." if choices else ""
        rows.append(f"| `--{field.name}` | {_linked(field.metadata['help'])}{one_of} | {_default(field)} |")
    return "\n".join(rows)


def _default(field: Field[Any]) -> str:
    if field.name in ("adam_beta2", "adam_epsilon"):
        return "follows `optim`"
    if field.default is None or field.default is MISSING:
        return "unset"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"`{field.default}`"


def _linked(text: str) -> str:
    text = text.replace("|", "\\|")
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


# ---- commands ----


def command_help() -> str:
    from adasam_hf.benchmarks.command import BENCHMARKS
    from adasam_hf.cli import COMMANDS, usage

    parts = [_listing(usage("adasam"))]
    for name, command in COMMANDS.items():
        parts += [f"## `adasam {name}`", f"{command.summary[0].upper()}{command.summary[1:]}."]
        for words in [[name], *([name, what] for what in BENCHMARKS if name == "benchmark")]:
            shown = _help_of(words)
            if shown.count("\n") > 150:  # with all arguments of Transformers
                shown = f'<details markdown="1"><summary>All arguments</summary>\n\n{_listing(shown)}\n\n</details>'
                parts.append(shown)
            else:
                parts.append(_listing(shown))
    return "\n\n".join(parts)


def _help_of(words: list[str]) -> str:
    from adasam_hf.cli import run_command

    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run_command(words[0], [*words[1:], "--help"])
    return out.getvalue()


def _listing(text: str) -> str:
    return f'<pre class="help"><code>{html.escape(text.strip())}</code></pre>'


# ---- the notebook ----


def notebook(markdown: str) -> str:
    """A page as a Jupyter notebook: its Python blocks are the code cells."""
    cells: list[dict[str, object]] = []
    for index, part in enumerate(re.split(r"^```python\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)):
        if text := part.strip():
            source = text.splitlines(keepends=True)
            cell: dict[str, object] = {"cell_type": "markdown", "id": f"cell-{index}", "metadata": {}, "source": source}
            if index % 2:
                cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
            cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    page = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(page, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    text = notebook((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    (ROOT / "docs" / "tutorial.ipynb").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
