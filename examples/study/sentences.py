#!/usr/bin/env python
"""
Unlabelled sentences to recover a sentence encoder by: of MNLI, QNLI, CoLA, SST-2 and an encyclopaedia. None of STS-B,
which measures it, nor of MRPC, whose news it shares.

    python examples/study/sentences.py --glue_dir glue_data --text wiki_train.txt.gz --output sentences.txt.gz
"""

import argparse
import gzip
import random
import re
from collections.abc import Iterator
from pathlib import Path


# Columns with sentences, and the fewest words: SST-2 has many fragments.
GLUE = {"MNLI": ((1, 2), 3), "QNLI": ((1, 2), 3), "CoLA": ((3,), 3), "SST-2": ((0,), 8)}
END_OF_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]?\s+(?=[\"'(\[]?[A-Z0-9])")


def main() -> None:
    """Collect, shuffle, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue_dir", type=Path, required=True, help="folder with the official files")
    parser.add_argument("--text", type=Path, required=True, help="a paragraph a line, plain or .gz")
    parser.add_argument("--text_sentences", type=int, default=60_000, help="sentences from there")
    parser.add_argument("--output", type=Path, required=True, help="a sentence a line, .gz")
    args = parser.parse_args()
    found = {*glue_sentences(args.glue_dir), *text_sentences(args.text, args.text_sentences)}
    sentences = sorted(sentence for sentence in found if 3 <= len(sentence.split()) <= 40)
    random.Random(0).shuffle(sentences)
    with gzip.open(args.output, "wt", encoding="utf-8") as file:
        file.writelines(f"{sentence}\n" for sentence in sentences)
    print(f"{args.output}: {len(sentences):,} sentences")


def glue_sentences(folder: Path) -> Iterator[str]:
    """Those of the training files."""
    for task, (columns, fewest) in GLUE.items():
        rows = (folder / task / "train.tsv").read_text(encoding="utf-8").split("\n")
        for row in rows[task != "CoLA" :]:  # CoLA has no header
            cells = row.split("\t")
            yield from (cells[i].strip() for i in columns if row and len(cells[i].split()) >= fewest)


def text_sentences(file: Path, count: int) -> Iterator[str]:
    """The first `count` of 5 to 22 words, titles left out."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for line in lines:
            sentences = [] if line.startswith("= ") else END_OF_SENTENCE.split(line.strip())
            for sentence in sentences:
                if 5 <= len(sentence.split()) <= 22:
                    yield sentence.strip()
                    count -= 1
                    if not count:
                        return


if __name__ == "__main__":
    main()
