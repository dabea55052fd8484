"""Find the YAML files of configs/, in the working directory or in the package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())
"""Inside the installed package, or beside it in a checkout."""


def find_config(name: str | Path) -> Path:
    """The file `name`, or the package's copy if it begins with configs/ and the working directory lacks it.

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
    """The text of a UTF-8 file.

    Raises:
        ValueError: if it is not UTF-8; the message begins with `where`.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8 ({error}); save it as UTF-8") from None
