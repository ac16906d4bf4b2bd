"""Blocks that say what they are: every 8-byte word follows from the key and from how often that key was put.

    word i of put n of key k  =  (mix(k) ^ n · ODD)  +  i · STEP        (modulo 2⁶⁴)

From word 0 of what was received the put number comes back, if the block belongs to the key; all other words
have to agree with it. Two fills differ in every word, so that a single word of another one is noticed, if it
is looked at: every word of a block of up to 16 KiB is; of a longer one the first of each cache line, and the
last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int64]
Counts = npt.NDArray[np.uint32]

STEP = np.uint64(0x9E3779B97F4A7C15)
ODD = np.uint64(0xD1342543DE82EF95)
ODD_INVERSE = np.uint64(pow(int(ODD), -1, 1 << 64))
POISON = np.uint32(1 << 31)  # put numbers from here on are of fills that no block may ever show
WHOLE = 16 << 10  # blocks up to this many bytes are compared word by word
LINE_WORDS = 8


def _mix(x: Words) -> Words:
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def keys_of(ids: Ids) -> npt.NDArray[np.uint8]:
    """The keys (n, 16) of blocks that are numbered."""
    words = np.empty((len(ids), 2), np.uint64)
    words[:, 0] = _mix(ids.astype(np.uint64) + np.uint64(1))
    words[:, 1] = _mix(~ids.astype(np.uint64))
    return words.view(np.uint8).reshape(-1, 16)


def first_words(ids: Ids, puts: npt.NDArray[np.uint32]) -> Words:
    return _mix(ids.astype(np.uint64) + np.uint64(7)) ^ puts.astype(np.uint64) * ODD


@dataclass(frozen=True, slots=True)
class Ramp:
    """What all blocks of one size share."""

    ramp: Words
    seen: slice  # of the words that are looked at

    @classmethod
    def of(cls, nbytes: int) -> Ramp:
        return cls(
            np.arange(nbytes // 8, dtype=np.uint64) * STEP,
            slice(0, None, 1 if nbytes <= WHOLE else LINE_WORDS),
        )

    def fill(self, out: Words, ids: Ids, puts: Counts) -> None:
        """Writes blocks into ``out`` (n, words)."""
        np.add(first_words(ids, puts)[:, None], self.ramp, out=out)

    def judge(self, got: Words, ids: Ids, floor: Counts, begun: Counts) -> list[str]:
        """What is wrong with blocks that were accepted, one line each; [] if nothing is.

        :param got: (n, words).
        :param floor: puts below it were out of sight, and acknowledged so, before the get was called.
        :param begun: puts above it had not been asked for when the get had returned.
        """
        first = got[:, 0].copy()
        puts = (first ^ first_words(ids, np.zeros(len(ids), np.uint32))) * ODD_INVERSE
        expected = first[:, None] + self.ramp[self.seen]
        whole = (got[:, self.seen] == expected).all(axis=1) & (got[:, -1] == first + self.ramp[-1])
        good = whole & (puts >= floor) & (puts <= begun)
        return [
            self._describe(got[i], int(ids[i]), int(puts[i]), bool(whole[i]), int(floor[i]), int(begun[i]))
            for i in np.flatnonzero(~good)
        ]

    def _describe(self, got: Words, id: int, put: int, whole: bool, floor: int, begun: int) -> str:
        if put >= 1 << 32:
            return f"block {id}: its first word belongs to no put of this key: {int(got[0]):#x}"
        if not whole:
            off = np.flatnonzero(got != got[0] + self.ramp)
            where = (
                f"words {off[0]} to {off[-1]} of {len(got)}, {len(off)} of them"
                if len(off)
                else "it changed since"
            )
            return f"block {id}: a mixture: begins as put {put}, but not {where}"
        if put >= POISON:
            return f"block {id}: what its source held after the put had been given up"
        return f"block {id}: put {put}, but only {floor} to {begun} could be there"
