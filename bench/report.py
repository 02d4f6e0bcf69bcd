"""What all benchmarks share: options, medians, the closing JSON line, and a plot."""

from __future__ import annotations

import argparse
import html
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

__all__ = ["Figure", "arguments", "median_of", "publish"]

_DOCS = Path(__file__).parent.parent / "docs" / "bench"


class Figure(Struct, frozen=True):
    """One published number with its yardstick from the same run."""

    name: str
    value: float
    unit: str
    yardstick: float | None
    """The same measure of what we compare with."""
    ratio: float | None
    """Cost of ours by cost of the yardstick: below 1 is better than it."""
    target: float | None
    """Largest ratio (or, without a yardstick, value) that we aim at; None: only reported."""

    @property
    def met(self) -> bool | None:
        """Say whether the target is met; None if there is none."""
        measured = self.ratio if self.ratio is not None else self.value
        return None if self.target is None else measured <= self.target


def arguments(description: str | None) -> argparse.Namespace:
    """Read the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs: shows that it works, not how fast")
    parser.add_argument("--plot", action="store_true", help="also write docs/bench/NAME.svg")
    parser.add_argument("--runs", type=int, default=0, help="counted runs")
    return parser.parse_args()


def median_of(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def publish(name: str, figures: Sequence[Figure], options: argparse.Namespace) -> None:
    """Print the figures as lines for people, then one JSON line for programs; draw them if asked to."""
    for figure in figures:
        beside = f", yardstick {figure.yardstick:.4g} {figure.unit}, ratio {figure.ratio:.3g}" if figure.ratio is not None else ""
        aim = f", target {figure.target:g}: {'met' if figure.met else 'missed'}" if figure.target is not None else ""
        print(f"{figure.name}: {figure.value:.4g} {figure.unit}{beside}{aim}")
    if options.plot:
        _DOCS.mkdir(parents=True, exist_ok=True)
        (_DOCS / f"{name}.svg").write_text(_bars(name, figures), encoding="utf-8")
    rows = [{**msgspec.structs.asdict(figure), "met": figure.met} for figure in figures]
    print(msgspec.json.encode({"bench": name, "figures": rows}).decode())


def _bars(name: str, figures: Sequence[Figure]) -> str:
    """Return a bar chart: ours above the yardstick, per figure scaled to the larger of the two."""
    rows, y = [], 40
    for figure in figures:
        pair = [("deskgrid", figure.value, "#2a6f97")]
        if figure.yardstick is not None:
            pair.append(("yardstick", figure.yardstick, "#a9a9a9"))
        most = max(value for _, value, _ in pair) or 1
        rows.append(f'<text x="10" y="{y}" font-weight="bold">{html.escape(figure.name)} ({html.escape(figure.unit)})</text>')
        for label, value, colour in pair:
            y += 22
            width = 380 * value / most
            rows.append(
                f'<text x="20" y="{y}">{label}</text><rect x="110" y="{y - 12}" width="{width:.0f}" height="16" fill="{colour}"/>'
            )
            rows.append(f'<text x="{118 + width:.0f}" y="{y}">{value:.4g}</text>')
        y += 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="620" height="{y}" font-family="sans-serif" font-size="14">'
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="18" font-size="16">bench/{html.escape(name)}.py</text>'
        f"{''.join(rows)}</svg>\n"
    )
