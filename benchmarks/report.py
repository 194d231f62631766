"""The figures of a run as Markdown: goal by goal, and what the others reach."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpchannel.bench.channels import shown, shown_part
from mpchannel.bench.figures import LOWER, significant
from mpchannel.bench.goals import count_met, shown_goal, typical
from mpchannel.bench.kinds import OURS, PIPE

Row = Mapping[str, Any]


def markdown(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    loop = about["same_loop_ms"]
    least, median, most = min(loop), statistics.median(loop), max(loop)
    peers = ", ".join(f"{name} {version}" for name, version in about["peers"].items())
    lines = [
        ", ".join(
            [
                f"{about['date']}: mpchannel {about['mpchannel']}",
                about["python"],
                about["system"],
                about["processor"],
                f"cores: {about['cores']}",
                f"rounds: {about['rounds']}",
                f"scale: {about['scale']:g}.",
            ]
        ),
        f"Peers: {peers or 'none installed'}.",
        f"Noise, as the same loop took it: {least:.1f} / {median:.1f} / {most:.1f} ms (least, median, most).",
        "",
        "Medians of the rounds. *ratio*: mpchannel's divided by Pipe's, or by that of the row that the goal names.",
        "*noise*: the middle half of the rounds' figures, as a part of the median.",
        "",
        *_goals(rows),
        "",
        f"{count_met(rows).capitalize()}.",
        "",
        "What others reach: the median, and how it compares with Pipe's.",
        "",
        *_peers(rows),
        "",
    ]
    return "\n".join(lines)


def _goals(rows: Sequence[Row]) -> list[str]:
    heads = ("work", "unit", "Pipe", "mpchannel", "ratio", "goal", "met", "p99 Pipe", "p99 mpchannel", "noise of both")
    table = []
    for row in rows:
        goal, met = shown_goal(row)
        table.append(
            [
                row["scenario"],
                row["unit"],
                *(shown(typical(row["figures"].get(kind.name, ()))) for kind in (PIPE, OURS)),
                "-" if row["ratio"] is None else significant(row["ratio"]),
                f"{goal} ({row['goal']['row']})" if row["goal"] and row["goal"]["row"] else goal,
                f"**{met}**" if met == "NO" else met,
                *(shown(typical(row["p99"].get(kind.name, ()))) for kind in (PIPE, OURS)),
                " / ".join(shown_part(row["noise"].get(kind.name)) for kind in (PIPE, OURS)),
            ]
        )
    return _table(heads, table)


def _peers(rows: Sequence[Row]) -> list[str]:
    others = {name: None for row in rows for name in row["figures"] if name not in (PIPE.name, OURS.name)}
    with_others = [row for row in rows if others.keys() & row["figures"].keys()]
    table = [
        [row["scenario"], row["unit"], *(_compared(row, name) for name in (PIPE.name, OURS.name, *others)), _best(row)]
        for row in with_others
    ]
    return _table(("work", "unit", PIPE.name, OURS.name, *others, "best"), table)


def _compared(row: Row, name: str) -> str:
    figure, pipe = (typical(row["figures"].get(each, ())) for each in (name, PIPE.name))
    if name == PIPE.name or not isinstance(figure, float) or not isinstance(pipe, float):
        return shown(figure)
    return f"{shown(figure)} ({significant(figure / pipe)}x)"


def _best(row: Row) -> str:
    """Whoever has the best median, of all."""
    medians: dict[str, Any] = {name: typical(outcomes) for name, outcomes in row["figures"].items()}
    names = [name for name, median in medians.items() if isinstance(median, float)]
    return (min if row["better"] == LOWER else max)(names, key=medians.__getitem__)


def _table(heads: Sequence[str], table: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        f"|---|---{'|--:' * (len(heads) - 2)}|",
        *(f"| {' | '.join(line)} |" for line in table),
    ]
