"""Traces of requests that share prefixes: Mooncake's format, and a generator that stands in for a file.

One JSON object a line::

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, 2353, 2354]}

``hash_ids`` names the blocks of 512 tokens of the prompt, the last one perhaps not full; equal ids mean equal
blocks behind equal prefixes, and new ids are handed out in order of first appearance. ``timestamp`` is in
milliseconds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..rdma.errors import LocalError

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt. ``timestamp`` in milliseconds, lengths in tokens, ``ids`` of its blocks in order."""

    timestamp: int
    input_length: int
    output_length: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a trace implies where nothing is evicted: ``hits`` are blocks of leading runs that were seen
    before."""

    requests: int
    references: int
    distinct: int
    hits: int
    saved_tokens: int  # of prompts: what a prefill need not compute
    longest: int  # blocks of the longest prompt


def read(path: Path, limit: int | None = None) -> list[Request]:
    """The first ``limit`` requests of a file. LocalError names the line that is not one."""
    try:
        with path.open(encoding="utf-8") as lines:
            numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
            return [_request(line, f"{path}:{n}") for n, line in islice(numbered, limit)]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise LocalError(f"the trace {path} cannot be read: {why}", "--trace FILE") from None


def _request(line: str, where: str) -> Request:
    try:
        raw = json.loads(line)
        ids = tuple(raw["hash_ids"])
        times = [raw[name] for name in ("timestamp", "input_length", "output_length")]
    except (ValueError, KeyError, TypeError) as error:
        raise LocalError(
            f"{where}: not a request: {error!r}", "Mooncake's JSON lines, see docs/benchmarks.md"
        ) from None
    if any(type(n) is not int or n < 0 for n in (*ids, *times)) or len(set(ids)) != len(ids):
        raise LocalError(f"{where}: lengths and ids are integers from 0, and no id occurs twice")
    return Request(times[0], times[1], times[2], ids)


def write(path: Path, requests: Iterable[Request]) -> None:
    """Writes a trace that :func:`read` understands."""
    with path.open("w", encoding="utf-8") as out:
        for r in requests:
            record = {
                "timestamp": r.timestamp,
                "input_length": r.input_length,
                "output_length": r.output_length,
            }
            out.write(json.dumps(record | {"hash_ids": r.ids}) + "\n")


def prefix(ids: tuple[int, ...], known: set[int]) -> int:
    """How many leading ids are known."""
    return next((i for i, id in enumerate(ids) if id not in known), len(ids))


def summarise(requests: Iterable[Request]) -> Summary:
    """What a replay has to find."""
    known: set[int] = set()
    count = references = hits = saved = longest = 0
    for r in requests:
        held = prefix(r.ids, known)
        count += 1
        references += len(r.ids)
        hits += held
        saved += saved_tokens(r, held)
        longest = max(longest, len(r.ids))
        known.update(r.ids)
    return Summary(count, references, len(known), hits, saved, longest)


def saved_tokens(request: Request, held: int) -> int:
    """Tokens of the prompt that ``held`` leading blocks stand for."""
    return min(held * BLOCK_TOKENS, request.input_length)


def generate(
    requests: int,
    *,
    seed: int = 1,
    systems: int = 4,
    system_tokens: int = 3072,
    turn_tokens: int = 1200,
    answer_tokens: int = 400,
    turns: int = 6,
) -> list[Request]:
    """Multi-turn conversations, the same for the same arguments.

    A conversation begins with one of ``systems`` system prompts (the first is the most frequent: Zipf) and
    takes up to twice ``turns`` turns. Every turn's prompt is everything before it, the last answer included,
    and new tokens: about ``turn_tokens`` a turn and ``answer_tokens`` an answer, both exponential.
    Conversations overlap; one that has ended makes room for a new one. A block that is full stays the same in
    later turns, a last one that is not becomes another.
    """
    return list(
        islice(
            _conversations(random.Random(seed), systems, system_tokens, turn_tokens, answer_tokens, turns),
            requests,
        )
    )


@dataclass(slots=True)
class _Conversation:
    number: int
    system: int
    system_tokens: int
    tokens: int
    turns_left: int


def _conversations(
    rng: random.Random, systems: int, system_tokens: int, turn_tokens: int, answer_tokens: int, turns: int
) -> Iterator[Request]:
    names: dict[object, int] = {}
    weights = [1 / (k + 1) for k in range(systems)]
    lengths = [rng.randint(system_tokens // 2, system_tokens * 3 // 2) for _ in range(systems)]
    open_ones: list[_Conversation] = []
    started, now = 0, 0
    while True:
        if len(open_ones) < 8:
            system = rng.choices(range(systems), weights)[0]
            open_ones.append(
                _Conversation(
                    started, system, lengths[system], lengths[system], rng.randint(1, 2 * turns - 1)
                )
            )
            started += 1
        talk = rng.choice(open_ones)
        talk.tokens += 1 + int(rng.expovariate(1 / turn_tokens))
        answer = 1 + int(rng.expovariate(1 / answer_tokens))
        ids = tuple(names.setdefault(block, len(names)) for block in _blocks(talk))
        yield Request(now, talk.tokens, answer, ids)
        talk.tokens += answer
        talk.turns_left -= 1
        if not talk.turns_left:
            open_ones.remove(talk)
        now += int(rng.expovariate(1 / 500))


def _blocks(talk: _Conversation) -> Iterator[tuple[object, ...]]:
    """What makes each block of the prompt what it is."""
    for start in range(0, talk.tokens, BLOCK_TOKENS):
        end = start + BLOCK_TOKENS
        if end <= talk.system_tokens:
            yield "system", talk.system, start
        elif end <= talk.tokens:
            yield "full", talk.number, start
        else:
            yield "partial", talk.number, start, talk.tokens
