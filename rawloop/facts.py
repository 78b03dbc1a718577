"""Facts of ranks, such as settings and digests: which of them differ, and on which ranks."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 3  # differences in a line


def as_text(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return facts with their values as text; a value is one that JSON can hold."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def differences(shares: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the facts that are not the same on all ranks: name -> each rank's value, in order of rank."""
    values = {
        name: [share.get(name, "nothing") for share in shares]
        for name in dict.fromkeys(name for share in shares for name in share)
    }
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def in_words(differing: Mapping[str, Sequence[str]]) -> str:
    """Return the first differences in a line, or an empty string."""
    found = []
    for name, values in differing.items():
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        found.append(f"rank {others[0]}{more} has {name} {values[others[0]]}, rank 0 has {values[0]}")
    found[MOST:] = [f"and {len(found) - MOST} more differences"] if len(found) > MOST else []
    return "; ".join(found)
