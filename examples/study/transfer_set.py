#!/usr/bin/env python
"""
Pairs of sentences without labels, for a teacher to label (`run_glue_dynsparse.py --transfer_file`): the training pairs
of a GLUE task with words left out, swapped or taken from elsewhere, and sentences of MNLI and of an encyclopaedia,
each beside an altered self, its neighbour, or any other. Nothing of a development set.

    python examples/study/transfer_set.py --task_name stsb --glue_dir glue_data --text wiki_train.txt.gz \
        --output stsb_pairs.tsv.gz
"""

import argparse
import gzip
import random
from pathlib import Path

from sentences import text_sentences

from hf_dynsparse.data import GLUE_TASKS, read_glue


# What the second sentence of a pair is, and in which parts.
ALTERED_PAIR, ALTERED_SELF, NEIGHBOUR, ANY = "altered pair", "altered self", "neighbour", "any"
PARTS = {ALTERED_PAIR: 6, ALTERED_SELF: 2, NEIGHBOUR: 1, ANY: 1}


def main() -> None:
    """Read, pair, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pairs = [name for name, task in GLUE_TASKS.items() if len(task.sentences) == 2]
    parser.add_argument("--task_name", required=True, choices=pairs, metavar="TASK", help=", ".join(pairs))
    parser.add_argument("--glue_dir", type=Path, required=True, help="folder with the official files")
    parser.add_argument("--text", type=Path, required=True, help="a paragraph a line, plain or .gz")
    parser.add_argument("--count", type=int, default=40_000, help="pairs, beside those of MNLI")
    parser.add_argument("--output", type=Path, required=True, help=".tsv.gz with the columns of the task")
    args = parser.parse_args()
    draw = random.Random(0)
    first, second = GLUE_TASKS[args.task_name].sentences
    rows = read_glue(str(args.glue_dir), args.task_name)["train"]
    own = list(zip(rows[first], rows[second], strict=True))
    mnli = (
        read_glue(str(args.glue_dir), "mnli")["train"]
        if args.task_name != "mnli"
        else {"premise": [], "hypothesis": []}
    )
    others = list(zip(mnli["premise"], mnli["hypothesis"], strict=True))
    text = list(text_sentences(args.text, 20_000))
    chosen = draw.choices(list(PARTS), list(PARTS.values()), k=args.count)
    made = [*others, *(make_pair(kind, own, [*(a for a, _ in others), *text], draw) for kind in chosen)]
    written = sorted({(a.strip(), b.strip()) for a, b in made} - set(own))
    draw.shuffle(written)
    with gzip.open(args.output, "wt", encoding="utf-8") as file:
        file.write(f"{first}\t{second}\n")
        file.writelines(f"{a}\t{b}\n" for a, b in written if a and b and not {"\t", "\n", "\r"} & {*a, *b})
    print(f"{args.output}: {len(written):,} pairs")


def make_pair(kind: str, own: list[tuple[str, str]], text: list[str], draw: random.Random) -> tuple[str, str]:
    """One pair of a kind of `PARTS`."""
    if kind == ALTERED_PAIR:
        a, b = draw.choice(own)
        other = draw.choice(own)[1]
        return (altered(a, other, draw), b) if draw.random() < 0.5 else (a, altered(b, other, draw))
    place = draw.randrange(len(text) - 1)
    sentence, neighbour = text[place : place + 2]
    if kind == ALTERED_SELF:
        return sentence, altered(sentence, neighbour, draw)
    return sentence, neighbour if kind == NEIGHBOUR else draw.choice(text)


def altered(sentence: str, other: str, draw: random.Random) -> str:
    """A sentence of which up to a third of the words are left out, swapped with the next, or taken from another."""
    words, theirs = sentence.split(), other.split()
    for _ in range(draw.randint(1, max(1, len(words) // 3))):
        place, what = draw.randrange(len(words)), draw.randrange(3)
        if what == 0 and len(words) > 3:
            del words[place]
        elif what == 1 and place + 1 < len(words):
            words[place], words[place + 1] = words[place + 1], words[place]
        else:
            words[place] = draw.choice(theirs)
    return " ".join(words)


if __name__ == "__main__":
    main()
