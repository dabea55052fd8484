"""The YAML files of configs/, from the working directory or as they come with the package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())
"""Inside the installed package, or beside it in a checkout."""


def find_config(name: str | Path) -> Path:
    """The file `name`. One that begins with configs/ and is not below the working directory is that of the package.

    Raises:
        FileNotFoundError: if it is in neither place.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.parts[:1] == ("configs",) and (shipped := CONFIGS.joinpath(*path.parts[1:])).is_file():
        return shipped
    raise FileNotFoundError(f"config={str(name)!r} does not exist; the files that come with adasam_hf are in {CONFIGS}")


def read_text(path: Path, where: str) -> str:
    """A text file in UTF-8.

    Raises:
        ValueError: if it is no such file; the message begins with `where`.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8 ({error}); save it as such") from None
