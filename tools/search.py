"""Full-text search over a corpus of the user's, in SQLite FTS5.

The corpus is a JSONL file of {"title", "text"} objects; its index lies beside it as `<file>.fts.db` and is made anew
when the file has changed. BM25 ranks; there are no embeddings, so there is no second model to serve.
"""

from __future__ import annotations

import json
import re
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from langchain_core.tools import BaseTool, tool
from sqlite_utils import Database

_SNIPPET_WORDS = 40
_MOST_WORDS = 50
"""Of a query: each costs a look into the index."""


def search_tool(corpus: Path) -> BaseTool:
    """A `search` tool over the corpus. Raises ValueError where it is not one, or its index cannot be written."""
    index = _open_index(corpus)

    @tool
    def search(query: str, num_results: int = 3) -> str:
        """Find passages in the document collection. Give the words that the passage should contain."""
        words = list(dict.fromkeys(re.findall(r"\w+", query)))[:_MOST_WORDS]
        if not words:
            raise ValueError("the query has no words to search for")
        matches = _best_matches(index, words, max(1, min(num_results, 10)))
        return "\n\n".join(f"{title}: {snippet}" for title, snippet in matches) or "No passage matches these words."

    return search


def _best_matches(index: Path, words: list[str], limit: int) -> list[tuple[str, str]]:
    # A connection a call: tools run on worker threads, and a SQLite connection belongs to one thread.
    db = Database(str(index))
    try:
        expression = " OR ".join(f'"{word}"' for word in words)
        return db.execute(
            "select title, snippet(documents, 1, '', '', ' ... ', ?) from documents where documents match ? "
            "order by rank limit ?",
            [_SNIPPET_WORDS, expression, limit],
        ).fetchall()
    finally:
        db.close()


def _open_index(corpus: Path) -> Path:
    if not corpus.is_file():
        raise ValueError(f"the search corpus {corpus} is not a file")
    index = corpus.with_name(corpus.name + ".fts.db")
    try:
        if not index.exists() or _version_of(index) != _fingerprint(corpus):
            _build_index(corpus, index)
    except sqlite3.Error as error:
        raise ValueError(f"the search index {index} cannot be written: {error}") from error
    return index


def _fingerprint(corpus: Path) -> int:
    """Tells a changed file from the one that was indexed, also where an older file took its place."""
    stat = corpus.stat()
    return zlib.crc32(f"{stat.st_size} {stat.st_mtime_ns}".encode()) & 0x7FFFFFFF


def _version_of(index: Path) -> int | None:
    db = Database(str(index))
    try:
        return db.execute("pragma user_version").fetchone()[0]
    except sqlite3.DatabaseError:  # not an index: it is written anew
        return None
    finally:
        db.close()


def _build_index(corpus: Path, index: Path) -> None:
    half_made = index.with_name(f"{index.name}.{uuid4().hex}.part")  # another process may be making it too
    db = Database(str(half_made))
    try:
        db.execute("create virtual table documents using fts5(title, text, tokenize = 'porter unicode61')")
        with db.atomic():
            for number, line in enumerate(_lines(corpus), start=1):
                if line.strip():
                    db.execute("insert into documents (title, text) values (?, ?)", _document(corpus, number, line))
        db.execute(f"pragma user_version = {_fingerprint(corpus)}")
    finally:
        db.close()
    half_made.replace(index)


def _lines(corpus: Path) -> Iterator[str]:
    try:
        with corpus.open(encoding="utf-8") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"the search corpus {corpus} is not UTF-8 text: {error}") from error


def _document(corpus: Path, number: int, line: str) -> tuple[str, str]:
    try:
        document = json.loads(line)
        return str(document["title"]), str(document["text"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{corpus} line {number}: each line must be a JSON object with title and text") from error
