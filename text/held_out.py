"""Which documents and problems are held out: a checksum decides, so no run and no setting can move
one across."""

import zlib

SPLITS = ("train", "val", "test")


def split_of(name: str, held_out_percent: int) -> str:
    """`train`, `val` or `test`, by the checksum of a document's name or a problem's question."""
    bucket = zlib.crc32(name.encode()) % 100
    return (
        "val" if bucket < held_out_percent else "test" if bucket < 2 * held_out_percent else "train"
    )


N_BUCKETS = 100


# ----------------------------------------------------------------------------------------- building


def bucket_of(text: str) -> int:
    """0 to 99, by the checksum of a text."""
    return zlib.crc32(text.strip().encode()) % N_BUCKETS
