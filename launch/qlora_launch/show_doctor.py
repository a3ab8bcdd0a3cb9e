"""A diagnosis as text for a person."""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any

from qlora_dist.diagnosis import Diagnosis, Finding

_WIDTH = 100
_INDENT = 16


def doctor_text(name: str, found: Diagnosis) -> str:
    """A diagnosis: what was read, then each event, what decides it, and what to change."""
    return "\n".join(_lines(name, found))


def doctor_json(found: Diagnosis) -> dict[str, Any]:
    """The same for programs."""
    return asdict(found)


def _lines(name: str, found: Diagnosis) -> Iterator[str]:
    yield f"{name} on {found.site}"
    if found.measured is None:
        yield from _row(
            "measured",
            "nothing yet, so how long a stop takes is not known: the longest micro-step, and up to "
            "two saves (one may be on its way)",
        )
    else:
        yield from _row(
            "measured",
            f"micro-step {found.measured.micro_s:.2f} s, save {found.measured.save_s:.1f} s, in "
            "the run's newest attempt",
        )
        yield from _row(
            "proposed",
            f"signal_lead_s: {found.signal_lead_s}, for a micro-step, two saves (one may be on its "
            "way) and the way back into the queue",
        )
    for event, group in groupby(found.findings, key=lambda finding: finding.event):
        yield ""
        yield event
        for finding in group:
            yield from _finding(finding)
    if found.unknown:
        yield ""
        yield "unknown"
        for line in found.unknown:
            yield from _row("not read", line)


def _finding(finding: Finding) -> Iterator[str]:
    yield from textwrap.wrap(
        finding.what, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False
    )
    if finding.can_lose is not None:
        lost = f"{finding.can_lose} steps at most" if finding.can_lose else "nothing"
        yield from _row("can lose", lost)
    if finding.decided_by:
        yield from _row("decided by", "; ".join(finding.decided_by))
    for change in finding.change:
        yield from _row("change", change)


def _row(name: str, text: str) -> Iterator[str]:
    head = f"    {name}".ljust(_INDENT)
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
