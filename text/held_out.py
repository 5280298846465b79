"""Which documents and problems are held out: a checksum decides, so no run can move one across.

Every string has a bucket from 0 to 99, its CRC-32 modulo 100. With p per cent held out, val has the
buckets 0 to p - 1, test p to 2p - 1, and train the others. What is alike shares a string:

    documents   the smallest name of their cluster of near duplicates (see `clusters_of`)
    problems    their canonical form: the question up to renaming and order (see problems.py)
    shards      the text of each document: copies stay together, near duplicates are not looked for,
                for that would need the whole corpus in memory
"""

import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

SPLITS = ("train", "val", "test")
N_BUCKETS = 100


def bucket_of(text: str) -> int:
    """0 to 99, by the checksum of a string."""
    return zlib.crc32(text.encode(errors="surrogateescape")) % N_BUCKETS  # of file names too


def buckets_of(split: str, held_out_percent: int) -> range:
    """The buckets of `train`, `val` or `test`."""
    p = held_out_percent
    return {"val": range(p), "test": range(p, 2 * p), "train": range(2 * p, N_BUCKETS)}[split]


def draw_of_split(make: Callable[[], Any], split: str, held_out_percent: int, none: str,
                  others: str) -> Any:
    """A problem or a computed document of a split: made anew until its bucket is the split's.
    Raises ValueError, with the words of `none` and `others`, if none of 10,000 draws is."""
    buckets, seen = buckets_of(split, held_out_percent), set()
    for _ in range(10_000):
        made = make()
        if bucket_of(made.canonical) in buckets:
            return made
        seen.add(made.canonical)
    raise ValueError(f"{none} of the {split} split in 10,000 draws; let it make more than "
                     f"{len(seen)} different {others}")


def clusters_of(documents: list[tuple[str, str]]) -> dict[str, str]:
    """For the name of each (name, text): the smallest name in its cluster.

    Names that share a passage are in one cluster, and so on from name to name. A passage in more
    than 8 names and more than one in 20 of them is boilerplate (a licence): it would join all.
    Of Python's own text this leaves .5 % of the held-out lines of 40 characters or more in training
    texts, such as a lone `if isinstance(...)`; by names alone it would be 5 %.
    """
    # 1. Who shares what.
    parent = {name: name for name, _ in documents}
    sharers: dict[str, set[str]] = {}
    for name, text in documents:
        for passage in _passages(text):
            sharers.setdefault(passage, set()).add(name)

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]  # halves the way for the next search
        return name

    # 2. Clusters are joined under the smaller name, so a root is the smallest of its cluster.
    most = max(8, len(parent) // 20)
    for names in sharers.values():
        if len(names) <= most:
            first, *others = sorted(map(root, names))
            parent.update(dict.fromkeys(others, first))
    return {name: root(name) for name in parent}


def _passages(text: str) -> Iterator[str]:
    """Each two long lines that follow one another, shorter ones left out, and each very long one:
    80 characters or more, so that a heading or a common statement is none."""
    lines = [line for line in map(str.strip, text.splitlines()) if len(line) >= 40]
    yield from map("\n".join, itertools.pairwise(lines))
    yield from (line for line in lines if len(line) >= 80)
