"""Lineage for people: a tree of indented lines, in which days in a row that say the same are one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import date, timedelta

from encode.lineage import Node
from encode.lineage_names import DAILY, SHORT
from encode.schema import canonical_json, number_of

_MOST_SHOWN = 8
"""Lines of siblings."""
_DAY = re.compile(rf"({'|'.join(DAILY)})/dt=(\d{{4}}-\d{{2}}-\d{{2}})")


def tree(node: Node) -> Iterator[str]:
    """Yield the lines of a tree; days in a row that say the same are one line."""
    yield from _lines([node], 0, "")


def _lines(nodes: Sequence[Node], depth: int, arrow: str) -> Iterator[str]:
    indent = "  " * depth
    runs = list(_runs(nodes))
    for run in runs[:_MOST_SHOWN]:
        first, last = run[0], run[-1]
        name = first.name if len(run) == 1 else f"{first.name} .. {last.name.rpartition('/')[2]} ({len(run)} days)"
        yield f"{indent}{arrow}{name}  {_told(run)}".rstrip()
        yield from (f"{indent}  ! {problem}" for problem in first.problems)
        for way, sign in (("made_from", "from "), ("goes_into", "into ")):
            below = [one for node in run for one in getattr(node, way)]
            yield from _lines(_each_once(below), depth + 1, sign)
    left = [node for run in runs[_MOST_SHOWN:] for node in run]
    if left:
        yield f"{indent}{arrow}{len(left):,} more; --json tells all"
        yield from (f"{indent}  ! {line}" for node in left for line in node.all_problems())


def _each_once(nodes: Sequence[Node]) -> list[Node]:
    """Leave out what days in a row have in common: the files of the log that all of them were split from."""
    return list({canonical_json(node.as_json()): node for node in nodes}.values())


def _runs(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Join daily partitions of days in a row that were made alike and have no problem."""
    run: list[Node] = []
    for node in nodes:
        if run and not _follows(run[-1], node):
            yield run
            run = []
        run.append(node)
    if run:
        yield run


def _follows(before: Node, node: Node) -> bool:
    """Tell whether a partition is of the day after and says the same."""
    first, second = _day(before), _day(node)
    in_a_row = first is not None and second is not None and second - first == timedelta(days=1)
    return in_a_row and _alike(before) is not None and _alike(before) == _alike(node)


def _day(node: Node) -> date | None:
    """Return the day of a partition; what a replay added to one stands for itself."""
    found = _DAY.fullmatch(node.name)
    return date.fromisoformat(found[2]) if found else None


def _alike(node: Node) -> bytes | None:
    if node.problems or any(one.goes_into or one.problems for one in (node, *node.made_from)):
        return None
    told = {name: node.facts.get(name) for name in ("settings", "version", "git_commit", "verified")}
    return canonical_json({"kind": node.kind, **told, "from": len(node.made_from)})


def _told(run: Sequence[Node]) -> str:
    facts = run[0].facts
    words = [word for word in ("served", "current") if facts.get(word)]
    words += [f"as of {facts['as_of']}"] if "as_of" in facts else []
    words += [", ".join(facts["aliases"])] if facts.get("aliases") else []
    counts = [one.facts.get("counts", {}) for one in run]
    for name in ("rows", "rejected", "users", "behaviors", "interests", "items", "categories"):
        if name in counts[0] and (len(run) == 1 or name != "users"):  # a user may be there on each of the days
            words.append(f"{sum(one.get(name, 0) for one in counts):,} {name}")
    user = facts.get("user", {})
    if "days" in user:
        words.append(
            f"user {user['user_id']}: {number_of(user['behaviors'], 'behavior')} on "
            f"{number_of(len(user['days']), 'day')}"
        )
    if "problem" in user:
        words.append(f"user {user['user_id']}: {user['problem']}")
    if facts.get("grown_since"):
        words.append("more users were erased since")
    for name in ("version", "git_commit", "settings", "digest", "model", "run"):
        if facts.get(name) and (len(run) == 1 or name != "digest"):
            words.append(f"{name.replace('git_', '')} {str(facts[name])[:SHORT]}")
    return ", ".join(words)
