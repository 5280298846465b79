"""Which documents and problems are held out: a checksum decides, so no run can move one across.

Every string (a document's name, a problem's question, the text of a document in shards) has a
bucket from 0 to 99, its CRC-32 modulo 100. With p per cent held out, val has the buckets 0 to
p - 1, test p to 2p - 1, and train the others.
"""

import zlib

SPLITS = ("train", "val", "test")
N_BUCKETS = 100


def bucket_of(text: str) -> int:
    """0 to 99, by the checksum of a string."""
    return zlib.crc32(text.encode()) % N_BUCKETS


def buckets_of(split: str, held_out_percent: int) -> range:
    """The buckets of `train`, `val` or `test`."""
    p = held_out_percent
    return {"val": range(p), "test": range(p, 2 * p), "train": range(2 * p, N_BUCKETS)}[split]
