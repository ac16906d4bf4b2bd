"""Which devices of a store have missed nothing: what was deleted must not return with one that was away.

Theory of operation. All devices that take part in a start carry one mark, (boot, start): a number that grows,
and a random one, so that two halves of a store that went on without each other are told apart. A store *goes
on* under a mark: blocks are written, and deletes acknowledged. A device that lacks the newest mark under
which the store went on was away then, blocks on it may have been deleted meanwhile, and so all of its blocks
are given up, before it gets a new mark. The same is done when a device is lost under way: those that remain
get a new mark before the next delete is acknowledged. (A start with none of the devices that were there last
has nobody who could know better.)

Several devices cannot be written at once, and a kill in between must not cost what is on the other half. So
a new mark is written twice::

     begin:  (boot, start, STARTING, prior mark)   on every device
     go on:  (boot, start)                         on every device; then, and not before, the store goes on

If a mark is found as STARTING only, the store never went on under it, and the prior mark counts in its place.
If one device has it without STARTING, every device that took part has it, STARTING or not. What this does not
cover: a kill among the writes of the second step, and then a start with a part of the devices only.
"""

from __future__ import annotations

from collections.abc import Sequence

from .format import Superblock

Mark = tuple[int, int]


def mark_of(block: Superblock) -> Mark:
    return block.boot, block.start


def prior_of(block: Superblock) -> Mark:
    return block.prior_boot, block.prior_start


def standing(blocks: Sequence[Superblock]) -> tuple[Mark, list[bool]]:
    """The newest mark under which the store went on, and of each device whether it was there.

    A device that no store has gone on with yet (boot 0) is empty: it has missed nothing.
    """
    latest = max(prior_of(block) if block.starting else mark_of(block) for block in blocks)
    there = [latest == mark_of(b) or (b.starting and latest == prior_of(b)) for b in blocks]
    return latest, [was or not b.boot for was, b in zip(there, blocks, strict=True)]


def begun(block: Superblock, mark: Mark, prior: Mark, count: int) -> Superblock:
    """The first of the two superblocks that carry a new mark."""
    return block.next(
        boot=mark[0],
        start=mark[1],
        prior_boot=prior[0],
        prior_start=prior[1],
        count=count,
        starting=True,
        clean=False,
    )


def gone_on(block: Superblock) -> Superblock:
    """The second."""
    return block.next(starting=False)
