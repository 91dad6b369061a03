"""Plain English paragraphs out of HTML pages and manual pages."""

from __future__ import annotations

import gzip
import html.parser
import re
from pathlib import Path

DROPPED_TAGS = {"pre", "script", "style", "head", "svg", "nav", "footer"}
INLINE_TAGS = {
    *("a", "abbr", "acronym", "b", "big", "cite", "code", "em", "font", "i", "kbd", "q", "s"),
    *("samp", "small", "span", "strong", "sub", "sup", "tt", "u", "var"),
}


class ProseExtractor(html.parser.HTMLParser):
    """Collect the paragraphs of an HTML page; code listings and page furniture are dropped."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._words: list[str] = []
        self._dropping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in DROPPED_TAGS:
            self._dropping += 1
        if tag not in INLINE_TAGS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in DROPPED_TAGS:
            self._dropping = max(0, self._dropping - 1)
        if tag not in INLINE_TAGS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self._dropping:
            self._words.append(data)

    def flush(self) -> None:
        """End the paragraph under construction."""
        self.paragraphs.append("".join(self._words))
        self._words = []


def html_paragraphs(text: str) -> list[str]:
    """Paragraphs of an HTML page."""
    parser = ProseExtractor()
    parser.feed(text)
    parser.flush()
    return parser.paragraphs


def man_paragraphs(text: str) -> list[str]:
    """Paragraphs of a pod2man manual page; verbatim blocks and comments are dropped."""
    body = text[text.find(".SH") :]
    body = re.sub(r"^\.Vb.*?^\.Ve", "", body, flags=re.M | re.S)
    paragraphs: list[str] = []
    lines: list[str] = []
    for line in body.splitlines():
        if line.startswith("."):
            if re.match(r"\.(SH|SS|PP|IP|TP|LP|P|RS|RE)\b", line):
                paragraphs.append(" ".join(lines))
                lines = []
            continue
        plain = re.sub(r"\\f[A-Z]|\\s-?\d|\\&|\\\||\\/|\\,", "", line)
        plain = re.sub(r"\\\*\([LR]\"", '"', plain)
        plain = re.sub(r"\\\*\(C[`']", '"', plain).replace("\\*(Aq", "'")
        plain = plain.replace("\\-", "-").replace("\\(em", "-").replace("\\e", "\\")
        lines.append(re.sub(r"\\\*\(..|\\\(..", "", plain))
    return [*paragraphs, " ".join(lines)]


def clean_paragraph(paragraph: str) -> str | None:
    """Normalised paragraph, or None where it is no English sentence (labels, tables, code)."""
    paragraph = paragraph.translate(
        str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u00a0", "''\"\"-- ")
    )
    paragraph = " ".join(paragraph.replace("\u00b6", "").split())
    paragraph = paragraph.encode("ascii", "ignore").decode()
    words = paragraph.split()
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    if len(words) < 6 or letters < 0.85 * len(paragraph) or paragraph[-1] not in ".:;?!,)\"'":
        return None
    return paragraph


def read_document(path: Path, kind: str) -> list[str]:
    """Raw paragraphs of one HTML page or manual page."""
    if kind == "man":
        return man_paragraphs(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
    return html_paragraphs(path.read_text(encoding="utf-8", errors="replace"))
