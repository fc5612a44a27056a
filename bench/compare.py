"""Two result files beside each other: what became slower, and whose error grew.

Machines differ from run to run, and a machine from hour to hour. So by default times are compared
as ratios to eager's of the same run.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import NamedTuple

#: What makes two rows the same measurement.
_KEYS = (
    "kind", "what", "mode", "case", "height", "width", "batch", "dtype", "device", "threads",
    "provider", "way",
)  # fmt: skip
#: By how much an error may grow: other instruction sets add in other orders.
ERROR_GROWTH = 1.1


class Compared(NamedTuple):
    """A row in both files: new time over old, the interval of that ratio, errors old and new."""

    key: tuple
    ratio: float
    low: float
    high: float
    old_error: float
    new_error: float

    def slower(self, threshold: float) -> bool:
        """By more than the threshold, and beyond what the intervals leave open."""
        return self.ratio > threshold and self.low > 1

    @property
    def worse(self) -> bool:
        """An error has grown."""
        return not self.new_error <= ERROR_GROWTH * self.old_error


def pair(old: Sequence[Mapping], new: Sequence[Mapping], absolute: bool = False) -> list[Compared]:
    """The rows that both files have, but eager's own, which are the measure.

    With ``absolute`` times themselves are compared, eager's too. The interval of a ratio of
    independent medians is the sum of their relative half-widths in squares.
    """
    before, after = ({_key(row): row for row in rows} for rows in (old, new))
    found = []
    for key in before.keys() & after.keys():
        provider = key[_KEYS.index("provider")]
        if provider == "eager" and not absolute:
            continue
        sides = []
        for rows in (before, after):
            measured = [rows[key]]
            if not absolute:
                eager = list(key)
                eager[_KEYS.index("provider")] = "eager"
                measured.append(rows.get(tuple(eager)))
            sides.append(measured)
        if any(row is None for side in sides for row in side):
            continue
        (a, *eager_a), (b, *eager_b) = sides
        ratio = b["ms"] / a["ms"]
        if not absolute:
            ratio *= eager_a[0]["ms"] / eager_b[0]["ms"]
        rows = [a, b, *eager_a, *eager_b]
        down = sqrt(sum((1 - row["ms_low"] / row["ms"]) ** 2 for row in rows))
        up = sqrt(sum((row["ms_high"] / row["ms"] - 1) ** 2 for row in rows))
        found.append(
            Compared(
                key, ratio, ratio * max(0.0, 1 - down), ratio * (1 + up),
                a["rms_error"], b["rms_error"],
            )
        )  # fmt: skip
    return sorted(found, key=lambda row: tuple(map(str, row.key)))


def _key(row: Mapping) -> tuple:
    # Older files have no modes, and only blocks.
    defaults = {"what": "block", "mode": "forward", "way": "call", "threads": None}
    return tuple(row.get(name, defaults.get(name)) for name in _KEYS)


def table(rows: Sequence[Compared], threshold: float) -> str:
    """A line for each row, and how many are slower or worse."""
    lines = []
    for row in rows:
        _, what, mode, case, height, width, batch, dtype, _, threads, provider, way = row.key
        said = "SLOWER" if row.slower(threshold) else ""
        said += " ERROR GREW" if row.worse else ""
        lines.append(
            f"{what:<21}{mode:<8}{case:<11}{f'{height}x{width}':>8} x{batch:<3}{dtype:<9}"
            f"{threads or '-':>3} {provider:<14}{way:<6}{row.ratio:>7.3f} "
            f"[{row.low:.3f}, {row.high:.3f}]  error {row.old_error:.2e} -> {row.new_error:.2e}"
            f"  {said}".rstrip()
        )
    slower, worse = sum(row.slower(threshold) for row in rows), sum(row.worse for row in rows)
    lines.append(
        f"{len(rows)} pairs: {slower} slower by over {100 * (threshold - 1):g} % and beyond the "
        f"noise, {worse} with a larger error"
    )
    return "\n".join(lines)
