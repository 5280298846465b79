"""Documents of token ids, in memory or in memory-mapped files, and the parts that are read of them.

Both kinds are the same two arrays: all tokens in a row, and where in them each document starts.
To find the document of a token is a binary search in the starts.
"""

import random
from collections.abc import Iterable

import numpy as np


def join(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of some documents in a row, and where each document starts, the end included."""
    return np.concatenate(documents), _sums(map(len, documents))


def _sums(n: Iterable[int]) -> np.ndarray:
    """0 and the cumulative sums."""
    return np.cumsum([0, *n], dtype=np.int64)


class Documents:
    """A sequence of documents, each an array of tokens that is read when it is asked for.

    parts: pairs (tokens, starts): document i of a part is tokens[starts[i] : starts[i + 1]].
    """

    def __init__(self, parts: list[tuple[np.ndarray, np.ndarray]]):
        self.parts = parts
        self.tokens_before = _sums(int(starts[-1] - starts[0]) for _, starts in parts)
        self.documents_before = _sums(len(starts) - 1 for _, starts in parts)

    @property
    def n_tokens(self) -> int:
        """Of all documents."""
        return int(self.tokens_before[-1])

    def __len__(self) -> int:
        return int(self.documents_before[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        """The tokens of document i."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = _place(self.documents_before, i)
        return self._document(k, i - int(self.documents_before[k])).astype(np.int32)

    def window(self, rng: random.Random, length: int) -> np.ndarray:
        """Up to `length` tokens in a row of one document, chosen in proportion to its length."""
        _, document, _ = self._draw(rng)
        start = rng.randrange(max(1, len(document) - length + 1))
        return document[start : start + length].astype(np.int32)

    def position(self, rng: random.Random, before: int,
                 after: int) -> tuple[int, np.ndarray, np.ndarray]:
        """A position, uniform over all tokens that have a token before them and, with themselves,
        `after` tokens to come; of a document too short for that, over all with a token before them.

        Returns the index of its document, up to `before` tokens before it, and up to `after` tokens
        from it on. At least one document must have two tokens.
        """
        while True:  # of documents of two tokens or more, one in after + 1 is taken or more
            i, document, t = self._draw(rng)
            if t >= 1 and (t + after <= len(document) or len(document) <= after):
                context, target = document[max(0, t - before) : t], document[t : t + after]
                return i, context.astype(np.int32), target.astype(np.int32)

    def _draw(self, rng: random.Random) -> tuple[int, np.ndarray, int]:
        """A token, each equally likely: its document's index, the document, its place there."""
        at = rng.randrange(self.n_tokens)
        k = _place(self.tokens_before, at)
        starts = self.parts[k][1]
        at += int(starts[0] - self.tokens_before[k])
        i = _place(starts, at)
        return int(self.documents_before[k]) + i, self._document(k, i), at - int(starts[i])

    def _document(self, k: int, i: int) -> np.ndarray:
        """Document i of part k: a view, so what is not used of it is not read."""
        tokens, starts = self.parts[k]
        return tokens[starts[i] : starts[i + 1]]


def _place(starts: np.ndarray, at: int) -> int:
    """The last i with starts[i] <= at. (searchsorted copies `starts` unless `at` is an int64.)"""
    return int(np.searchsorted(starts, np.int64(at), side="right")) - 1
