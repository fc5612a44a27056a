"""What became of the blocks of a model: a table to read, and data."""

import itertools
import textwrap
from dataclasses import dataclass, field

from seaattn_kernels.budget import Verdict


@dataclass
class Row:
    """What there is to say about one block of a model."""

    name: str  # of the module within the model
    kind: str  # its class
    variant: str | None = None  # norm, activation, gate
    shape: str | None = None  # C, heads, D, E
    backend: str | None = None  # None where the block runs its own forward
    reason: str | None = None  # why it does so, or why "auto" does not take the preferred backend
    error: float | None = None  # in float64, relative
    verdicts: dict[str, Verdict] = field(default_factory=dict)  # on the maps of real calls

    def _cells(self) -> tuple[str, str, str]:
        """As text: variant, shape, backend or reason."""
        variant = f"{self.kind}: {self.variant}" if self.variant else self.kind
        if self.backend:
            runs = f"seaattn_kernels: {self.backend}" + f" ({self.reason})" * bool(self.reason)
        else:
            runs = "own forward" + f": {self.reason}" * bool(self.reason)
        return variant, self.shape or "-", runs


class Report(dict[str, Row]):
    """By name of the module, what became of each block that looks like Sea_Attention.

    ``print(report)`` shows a table. A name maps to a :class:`Row`; its ``backend`` is None where
    the block runs its own forward, and ``reason`` says why.
    """

    _HEAD = ("module", "variant", "shape", "runs on", "error")
    _WIDTHS = (42, 19, 14, 28, 19)

    def __init__(self, model: str, modules: int) -> None:
        super().__init__()
        self.model = model
        self.modules = modules
        self.swapped = False

    def __str__(self) -> str:
        if not self:
            return (
                f"{self.model}: none of its {self.modules} modules looks like Sea_Attention (with "
                "layers to_q, to_k, to_v, proj_encode_row, pos_emb_rowq, ...): nothing to replace"
            )
        fused = sum(row.backend is not None for row in self.values())
        verb = "run" if self.swapped else "can run"
        lines = [
            f"{self.model}: {len(self)} of its {self.modules} modules look like Sea_Attention, "
            f"{fused} of them {verb} on seaattn_kernels",
            "",
        ]
        # Blocks of which the same is to be said share their cells.
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.values():
            groups.setdefault(row._cells(), []).append(row)
        table = [[[title] for title in self._HEAD]]
        for cells, rows in groups.items():
            names = (textwrap.wrap(row.name or "(the model)", self._WIDTHS[0]) for row in rows)
            table.append([list(itertools.chain(*names))])
            for cell, width in zip((*cells, _error(rows)), self._WIDTHS[1:], strict=True):
                table[-1].append(textwrap.wrap(cell, width, break_on_hyphens=False))
        widths = [max(len(line) for row in table for line in row[i]) for i in range(5)]
        for row in table:
            for texts in itertools.zip_longest(*row, fillvalue=""):
                cells = (f"{text:<{width}}" for text, width in zip(texts, widths, strict=True))
                lines.append("  ".join(cells).rstrip())
            lines.append("")
        return "\n".join([*lines, *textwrap.wrap(self._legend(), 100)])

    __repr__ = __str__

    def _legend(self) -> str:
        legend = "C: channels of the map; D, E: channels of a key and of a value in a head. "
        if any(row.verdicts for row in self.values()):
            return legend + (
                "error: against float64 on the maps of real calls, root mean square, beside that "
                "of the block's own forward."
            )
        return legend + (
            "error: largest relative difference from the block's own forward and backward, in "
            "float64 on a random copy."
        )


def _error(rows: list[Row]) -> str:
    """The worst of some rows: of the calls that were compared, else of the probe."""
    if verdicts := [verdict for row in rows for verdict in row.verdicts.values()]:
        worst = max(verdicts, key=lambda verdict: verdict.rms)
        return f"{worst.rms:.0e} (eager {worst.eager_rms:.0e})"
    errors = [row.error for row in rows if row.error is not None]
    return f"{max(errors):.0e}" if errors else "-"
