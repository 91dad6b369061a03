"""Build the text corpus of the tiny example language model from Debian packages.

Every package is downloaded with ``apt-get download``, unpacked with ``dpkg -x`` (nothing is
installed), turned into plain prose and split *by document* into training, calibration and
held-out text.  Paragraphs of the two small splits that nearly repeat text of another split
are dropped, so that the three texts share no passage worth speaking of.

Run ``python examples/tiny_lm_corpus.py --work /tmp/tinylm`` or let ``train_tiny_lm.py`` call it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny_lm_text import clean_paragraph, read_document

SHINGLE_WORDS = 8
MAX_SHARED = 0.4
SMALL_SPLIT_BYTES = 430_000


@dataclass(frozen=True)
class Source:
    """One Debian package and the files of it that hold prose."""

    package: str
    licence: str
    kind: str
    patterns: tuple[str, ...]
    skip: str = r"$^"


SOURCES = (
    Source("bible-kjv-text", "public domain", "bible", ("usr/lib/bible.data",)),
    Source(
        "sqlite3-doc",
        "public domain",
        "html",
        (
            "usr/share/doc/sqlite3/*.html",
            "usr/share/doc/sqlite3/c3ref/*.html",
            "usr/share/doc/sqlite3/session/*.html",
        ),
        skip=r"doc_|changes|news|chronology|keyword_index|sitemap|capi3ref|requirements|cves|"
        r"pressrelease|doclist|toc|crew|famous",
    ),
    Source(
        "postgresql-doc-15",
        "PostgreSQL licence",
        "html",
        ("usr/share/doc/postgresql-doc-15/html/*.html",),
        skip=r"release|bookindex|biblio|acronyms|features|errcodes|keywords|legalnotice",
    ),
    Source("libssl-doc", "Apache-2.0", "man", ("usr/share/man/man*/*.gz",)),
)
BIBLE_READER = "bible-kjv"  # only run to decompress the text; its own code is not used


def apt_download(package: str, work: Path) -> tuple[Path, str]:
    """Download and unpack one package; returns its tree and its version."""
    debs, tree = work / "debs", work / "unpacked" / package
    debs.mkdir(parents=True, exist_ok=True)
    if not list(debs.glob(f"{package}_*.deb")):
        debs.chmod(0o777)
        subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
    deb = sorted(debs.glob(f"{package}_*.deb"))[-1]
    if not tree.exists():
        tree.mkdir(parents=True)
        subprocess.run(["dpkg", "-x", str(deb), str(tree)], check=True)
    return tree, deb.name.split("_")[1].replace("%3a", ":")


def bible_documents(text_tree: Path, work: Path) -> Iterator[list[str]]:
    """Chapters of the King James Bible, one verse a paragraph."""
    reader, _ = apt_download(BIBLE_READER, work)
    command = [str(reader / "usr/bin/bible"), "-f", "-p", str(text_tree / "usr/lib")]
    dump = subprocess.run(
        [*command, "Gen1:1-Rev22:21"],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    ).stdout
    chapters: dict[str, list[str]] = {}
    for chapter, verse in re.findall(r"^(\d?[A-Za-z]+\d+):\d+ (.*)$", dump, flags=re.M):
        chapters.setdefault(chapter, []).append(verse)
    yield from chapters.values()


def source_documents(source: Source, tree: Path, work: Path) -> Iterator[list[str]]:
    """Cleaned paragraphs of each document of a package."""
    if source.kind == "bible":
        raw = bible_documents(tree, work)
    else:
        paths = sorted({path for pattern in source.patterns for path in tree.glob(pattern)})
        paths = [
            p
            for p in paths
            if p.is_file() and not p.is_symlink() and not re.search(source.skip, p.name)
        ]
        raw = (read_document(path, source.kind) for path in paths)
    for paragraphs in raw:
        yield [clean for paragraph in paragraphs if (clean := clean_paragraph(paragraph))]


def collect(work: Path) -> tuple[list[list[str]], list[dict[str, object]]]:
    """All documents, exact repeats of paragraphs removed, and a record of each package."""
    seen: set[bytes] = set()
    documents, records = [], []
    for source in SOURCES:
        tree, version = apt_download(source.package, work)
        size = 0
        for paragraphs in source_documents(source, tree, work):
            kept = []
            for paragraph in paragraphs:
                digest = hashlib.md5(paragraph.lower().encode(), usedforsecurity=False).digest()
                if digest not in seen:
                    seen.add(digest)
                    kept.append(paragraph)
            if kept:
                documents.append(kept)
                size += sum(len(paragraph) + 1 for paragraph in kept) + 1
        record = {
            "package": source.package,
            "version": version,
            "licence": source.licence,
            "bytes": size,
        }
        print(f"corpus {record}", flush=True)
        records.append(record)
    return documents, records


def shingles(paragraph: str) -> set[int]:
    """Hashes of all runs of SHINGLE_WORDS lower-case words (of the whole when it is shorter)."""
    words = re.findall(r"[a-z0-9]+", paragraph.lower())
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    return {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(count)}


def drop_near_duplicates(documents: list[list[str]], known: set[int]) -> list[list[str]]:
    """Documents without the paragraphs that share over MAX_SHARED of their shingles."""
    result = []
    for paragraphs in documents:
        kept = []
        for paragraph in paragraphs:
            marks = shingles(paragraph)
            if len(marks & known) <= MAX_SHARED * len(marks):
                kept.append(paragraph)
        if 2 * sum(map(len, kept)) >= sum(map(len, paragraphs)):
            result.append(kept)
    return result


def join(documents: list[list[str]]) -> str:
    """One paragraph a line, one empty line between documents."""
    return "\n\n".join("\n".join(paragraphs) for paragraphs in documents) + "\n"


def take(documents: list[list[str]], size: int) -> tuple[list[list[str]], list[list[str]]]:
    """Leading documents up to about `size` bytes, and the rest."""
    total = 0
    for index, paragraphs in enumerate(documents):
        if total >= size:
            return documents[:index], documents[index:]
        total += sum(len(paragraph) + 1 for paragraph in paragraphs) + 1
    raise ValueError(f"the corpus is smaller than {size} bytes")


def build_corpus(work: Path, seed: int = 0) -> list[dict[str, object]]:
    """Write train.txt, calibration.txt, heldout.txt and sources.json under `work`."""
    if (work / "sources.json").exists():
        return json.loads((work / "sources.json").read_text())
    documents, records = collect(work)
    random.Random(seed).shuffle(documents)
    heldout, rest = take(documents, SMALL_SPLIT_BYTES)
    calibration, train = take(rest, SMALL_SPLIT_BYTES)
    known = set().union(*(shingles(p) for paragraphs in train for p in paragraphs))
    calibration = drop_near_duplicates(calibration, known)
    known.update(*(shingles(p) for paragraphs in calibration for p in paragraphs))
    heldout = drop_near_duplicates(heldout, known)
    for name, split in (("train", train), ("calibration", calibration), ("heldout", heldout)):
        text = join(split)
        (work / f"{name}.txt").write_text(text)
        print(f"corpus {name}: {len(split)} documents, {len(text)} bytes", flush=True)
    (work / "sources.json").write_text(json.dumps(records, indent=1))
    return records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tinylm"))
    build_corpus(parser.parse_args().work)
