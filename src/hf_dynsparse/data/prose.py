"""English prose out of docstrings and comments: markup, code, tables and signatures are left behind."""

import inspect
import re
from collections.abc import Iterator


FENCES = re.compile(
    r"^[ \t]*(```|~~~).*?(^[ \t]*\1[ \t]*$|\Z)|\$\$.*?\$\$|<!--(?:(?!<!--).)*?-->", re.DOTALL | re.MULTILINE
)
# The indented content of these directives is prose; that of every other one (code, formulas, lists of names) is not.
PROSE_DIRECTIVES = re.compile(r"^(note|warning|tip|seealso|important|deprecated|versionadded|versionchanged|caution)$")
DIRECTIVE = re.compile(r"^\.\.(?:\s+([\w:-]+?)::\s*(.*)|\s.*|)$")
BULLET = re.compile(r"^(?:[-*+•]|\(?\d{1,2}[.)]|:(?:param|raises?|returns?|arg)\b[^:]*:)\s+")
# `name (type, optional):`, `name: type`, `name -- text`; the text behind it, if any, is what we want.
PARAMETER = re.compile(
    r"^\*{0,2}`{0,2}[\w.*]+(?:, [\w.*]+)*`{0,2}\s*(?:\([^()]*(?:\([^()]*\)[^()]*)*\)\s*(?::|--?)|--?\s|:(?=\s|$))\s*"
)

MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\s*<[^<>\s][^<>]{0,200}>`__?"), "`"),  # target of a reStructuredText link; its text stays
    (re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*\)"), r"\1"),
    (re.compile(r"\(?<?\b(?:https?|ftp)://[^\s<>`\"]*[\w/]>?\)?"), ""),
    (re.compile(r"</?[a-zA-Z][^<>]{0,80}>"), ""),
    (re.compile(r"\s?\[(?:\d+|#\w*)\]_?|\s\[\w+\]_"), ""),  # footnotes
    (re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)\s*(?:<[^`]*>)?`"), r"\1"),
    (re.compile(r"\[`[~!]?([^`]*)`\]"), r"\1"),
    (re.compile(r"`+[~!]?([^`]*?)`+_{0,2}"), r"\1"),
    (re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<![\w*])\*(?=[^\s*])([^*]+?)(?<=[^\s*])\*(?![\w*])"), r"\1"),
    (re.compile(r"\|([\w -]+)\|"), r"\1"),
    (re.compile(r"\s*\(\s*\)"), ""),
    (re.compile(r"::(?=\s|$)"), ":"),
    (re.compile(r"\s+([,.;:)])(?=\s|$)"), r"\1"),
    (re.compile(r"^[-:;,.*+•\s]+"), ""),
)
WORD = re.compile(r"^[(\"']*[A-Za-z]+(?:['-][A-Za-z]+)*[)\"']*[.,;:!?]?[)\"']*$")
PLAIN_START = re.compile(r"[a-z]+[,;]?\s")
MIN_LENGTH = 50
MAX_LENGTH = 10_000  # of a paragraph: a longer one is data, on which patterns take long
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by can for from has have if in is it its may must not of on or that the their then"
        " there they this to was we when which will with you your",
    )
)
CODE = re.compile(
    r"[\\{}$|~^]|[=<>!]=|->|=>|\w\(\w*\)\.\w|\w = \w|__|[^\x00-\x7f\u2018-\u201d\u2013\u2014é]|[#;/,(=]\s*$"
)


def clean_text(text: str) -> Iterator[str]:
    """
    The paragraphs of English prose in a docstring or comment, each on one line and without markup. It may be in plain
    text, reStructuredText, NumPy, Google or Markdown form; code, doctests, tables, headings, signatures and formulas
    are left out.
    """
    for lines in split_paragraphs(FENCES.sub("", inspect.cleandoc(text))):
        paragraph = " ".join(" ".join(lines).split())
        if not MIN_LENGTH <= len(paragraph) <= MAX_LENGTH:
            continue
        for pattern, replacement in MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        paragraph = PARAMETER.sub("", " ".join(paragraph.split()))
        if is_prose(paragraph):
            yield paragraph[0].upper() + paragraph[1:] if PLAIN_START.match(paragraph) else paragraph


def split_paragraphs(text: str) -> Iterator[list[str]]:
    """
    Split dedented text at blank lines, list items and changes of indentation, leaving literal blocks out: the stripped
    lines of each paragraph, without a leading bullet or parameter name.
    """
    lines: list[str] = []
    indent = 0
    literal: int | None = None  # everything indented deeper than this is code
    doctest = False  # a doctest with its output runs to the next blank line
    hanging = False  # a list item or parameter: its first line sticks out
    for raw in text.split("\n"):
        line = raw.strip()
        depth = len(raw) - len(raw.lstrip())
        doctest = bool(line) and (doctest or line.startswith(">>>"))
        if line and literal is not None:
            if depth > literal:
                continue
            literal = None
        directive = DIRECTIVE.match(line)
        bullet = BULLET.match(line)
        parameter = None if bullet or directive else PARAMETER.match(line)
        starts = not line or doctest or directive or bullet or parameter
        if starts or (lines and depth != indent and not (hanging and depth > indent)):
            # A paragraph that ends in "::" announces a literal block.
            if lines and lines[-1].endswith("::") and literal is None:
                literal = indent
                if depth > indent:
                    line = ""
            if lines:
                yield lines
            lines, hanging = [], False
        if doctest or not line:
            continue
        if directive:
            name, line = directive.group(1) or "", directive.group(2) or ""
            if not PROSE_DIRECTIVES.match(name):
                literal = depth
                continue
        elif bullet:
            line = line[bullet.end() :]
        elif parameter:
            # NumPy's `name : type` has the text on the lines below it.
            line = "" if " :" in parameter.group() else line[parameter.end() :]
        if not lines:
            indent, hanging = depth, bool(bullet or parameter or directive)
        elif hanging and depth > indent:
            indent, hanging = depth, False
        if line:
            lines.append(line)
    if lines:
        yield lines


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph without markup reads as English: mostly plain words, enough function words, no code."""
    words = paragraph.split()
    if len(paragraph) < MIN_LENGTH or len(words) < 8 or CODE.search(paragraph):
        return False
    plain = sum(1 for word in words if WORD.match(word))
    function = sum(1 for word in words if word.lower() in FUNCTION_WORDS)
    return plain >= 0.85 * len(words) and function >= 0.2 * len(words)
