"""What a cleaning dropped and why: counts by reason and file, samples, as JSON and as a table in Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

#: Dropped records that a report shows of each reason.
SAMPLES = 3
#: Reasons that are counted one by one; a predicate may give any number.
MOST_REASONS = 200
OTHER = "other reasons"


@dataclass
class _Reason:
    records: int = 0
    characters: int = 0
    samples: list[tuple[int, dict]] = field(default_factory=list)
    """(place in a fixed random order, line of dropped.jsonl); the first of the order are kept."""


@dataclass
class Tally:
    """Counts while records pass."""

    files: dict[str, dict[str, int]] = field(default_factory=dict)
    """By file as given: records, dropped, characters, dropped_characters."""
    reasons: dict[str, _Reason] = field(default_factory=dict)

    def drop(self, line: dict, characters: int, lot: int) -> None:
        """Counts a dropped record.

        Args:
            line: of dropped.jsonl.
            characters: of its text.
            lot: a number drawn for the record, which decides whether the report shows it.
        """
        reason = line["reason"]
        if reason not in self.reasons and len(self.reasons) >= MOST_REASONS:
            reason = OTHER
        entry = self.reasons.setdefault(reason, _Reason())
        entry.records += 1
        entry.characters += characters
        if len(entry.samples) < SAMPLES or lot < entry.samples[-1][0]:
            entry.samples = sorted([*entry.samples, (lot, line)], key=lambda sample: sample[0])[:SAMPLES]


def summarise(tally: Tally, options: dict, comparing: dict) -> dict:
    """The report, ready for JSON.

    Args:
        options: of the cleaning.
        comparing: how duplicates were looked for, in figures.
    """
    totals = {name: sum(file[name] for file in tally.files.values()) for name in next(iter(tally.files.values()))}

    def change(before: int, dropped: int) -> dict[str, int]:
        return {"before": before, "dropped": dropped, "after": before - dropped}

    reasons = sorted(tally.reasons.items(), key=lambda item: (-item[1].records, item[0]))
    return {
        "records": change(totals["records"], totals["dropped"]),
        "characters": change(totals["characters"], totals["dropped_characters"]),
        "reasons": {
            name: {
                "records": entry.records,
                "characters": entry.characters,
                "samples": [line for _, line in entry.samples],
            }
            for name, entry in reasons
        },
        "files": [{"file": name, **change(file["records"], file["dropped"])} for name, file in tally.files.items()],
        "comparing": comparing,
        "options": options,
    }


def markdown(report: dict) -> str:
    """The report as tables and samples."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict) -> Iterator[str]:
    total = max(1, report["records"]["before"])
    yield "| | records | | characters |"
    yield "|---|---:|---:|---:|"
    for name in ("before", "dropped", "after"):
        records, characters = report["records"][name], report["characters"][name]
        yield f"| {name} | {records:,} | {100 * records / total:.2f}% | {characters:,} |"
    if report["reasons"]:
        yield ""
        yield "| dropped because | records | | characters |"
        yield "|---|---:|---:|---:|"
    for name, entry in report["reasons"].items():
        share = 100 * entry["records"] / total
        yield f"| {_cell(name)} | {entry['records']:,} | {share:.2f}% | {entry['characters']:,} |"
    if len(report["files"]) > 1:
        yield ""
        yield "| file | records | dropped |"
        yield "|---|---:|---:|"
        for file in report["files"]:
            yield f"| {_cell(file['file'])} | {file['before']:,} | {file['dropped']:,} |"
    for name, entry in report["reasons"].items():
        yield ""
        yield f"**{_cell(name)}**"
        yield ""
        for line in entry["samples"]:
            detail = json.dumps(line["detail"], ensure_ascii=False)
            yield f"- {_cell(line['file'])}, line {line['line']}: {_cell(line['text'])!r} {_cell(detail)}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
