"""For mkdocs: the pictures and reports of results/ belong to the site. Pages link them as GitHub finds them."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> None:
    root = Path(config.config_file_path).parent
    for path in sorted((root / "results").rglob("*")):
        if path.suffix in (".png", ".md"):
            name = path.relative_to(root).as_posix()
            files.append(File(name, str(root), config.site_dir, config.use_directory_urls))


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace("](../results/", "](results/")
