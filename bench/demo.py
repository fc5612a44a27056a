"""The demonstration: an eager model, replaced, on a photograph; then its attention block."""

import argparse
import pickle
import sys
import textwrap
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from bench import results
from bench.cases import CASES, SWEEP_SIDES
from bench.eager import as_eager
from bench.measure import DTYPES, auto_backend, busy, device_argument, measure
from bench.models import same_class
from bench.picture import SIDE, photograph
from bench.plot import plot
from bench.works import Block, Model, Setting
from seaattn_kernels import replace_sea_attention, seaformer
from seaattn_kernels.budget import SEEDS
from seaattn_kernels.verify import randomise

LIMITS = {
    "cpu": "its matrix products alone, by torch.mm",
    "cuda": "its FLOP or bytes at the measured rates, and one launch",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :func:`run`, by the names of its arguments."""
    parser.add_argument("--checkpoint", type=Path, help="official weights (default: random)")
    parser.add_argument("--image", type=Path, help="a photograph (default: matplotlib's sample)")
    parser.add_argument(
        "--variant", choices=seaformer.CONFIGS, default="b", help="of SeaFormer (default: b)"
    )
    parser.add_argument(
        "--device", type=device_argument, help="default: cuda where there is one, else cpu"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--out", type=Path, help="folder of the results (default: out/demo)")
    parser.add_argument("--quick", action="store_true", help="three maps, less time on each")


def run(
    checkpoint: Path | str | None = None,
    image: Path | str | None = None,
    variant: str = "b",
    device: torch.device | str | None = None,
    dtype: str = "float32",
    out: Path | str | None = None,
    quick: bool = False,
) -> int:
    """Verify, time and chart; 0 where everything is right. Takes up to two minutes on two cores."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(out or "out/demo")
    seconds = 1.0 if quick else 3.0
    backend = auto_backend(device, DTYPES[dtype])
    print(f"ours is seaattn_kernels on {device} in {dtype}, the block by its backend {backend!r}")

    try:
        model, weights = _load(variant, checkpoint)
        picture = photograph(image)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        print(f"cannot be loaded: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    name = "matplotlib's sample photograph" if image is None else Path(image).name
    setting = Setting(device, DTYPES[dtype])
    work = Model(variant, setting, model, picture)
    print(f"{work.what}, {weights}, {name} at {SIDE}x{SIDE}")
    ok, model_row = _model(work, seconds)

    case = CASES[f"{variant.upper()}1"]
    print(f"\nThe attention block {case.name} (C={case.channels}, D={case.key_dim}, "
          f"{case.heads} heads) across resolutions; limit: {LIMITS[device.type]}\n"
          f"{'map':>9}{'eager ms':>12}{'ours ms':>12}{'speed-up':>10}{'limit ms':>12}")  # fmt: skip
    ours = "reference" if backend == "reference" else "auto"
    rows: list[dict] = []
    beaten = False
    sides = SWEEP_SIDES[:3] if quick else SWEEP_SIDES
    for side in tqdm(
        sides, desc="block", unit="map", leave=False, dynamic_ncols=True, disable=None
    ):
        found = {
            row["provider"]: row
            for row in measure(
                Block(case, (side, side), setting), [ours], seconds,
                seeds=SEEDS[:3] if quick else SEEDS, log=tqdm.write,
            )
        }  # fmt: skip
        rows += found.values()
        if ours not in found:
            ok = False
            continue
        row = found[ours]
        beaten |= row["of_limit"] < 1
        tqdm.write(
            f"{f'{side}x{side}':>9}{found['eager']['ms']:>12.3f}{row['ms']:>12.3f}"
            f"{row['speedup']:>9.2f}x{row['ms_limit']:>12.3f}"
        )
    if beaten and device.type == "cpu":
        print("the limit is beaten: another library than torch.mm's has faster products here")
    if line := busy([*model_row, *rows]):
        print(line)

    document = results.document([*model_row, *rows], device)
    results.write(folder / "demo.json", document)
    print("\neverything verified" if ok else "\nVERIFICATION FAILED")
    print(plot(document, folder / "demo.png")[0])
    return 0 if ok else 1


def _load(variant: str, checkpoint: Path | str | None) -> tuple[nn.Module, str]:
    """The segmenter, and what its weights are."""
    model = seaformer.seaformer_segmenter(variant)
    if checkpoint is None:
        return randomise(model), "random weights"
    missing, unexpected = seaformer.load_checkpoint(model, checkpoint)
    return model, (
        f"weights of {Path(checkpoint).name} "
        f"({len(missing)} keys missing, {len(unexpected)} unexpected)"
    )


def _model(work: Model, seconds: float) -> tuple[bool, list[dict]]:
    """The segmenter on the photograph: prints, and returns whether it is right, and its rows."""
    eager = as_eager(work.module)
    ours = as_eager(work.module)
    report = replace_sea_attention(ours)
    print("\n>>> print(replace_sea_attention(model))")
    print(textwrap.indent(str(report), "    "))
    rows = measure(work, ["auto"], seconds)
    if [row["provider"] for row in rows] != ["eager", "auto"]:
        return False, []
    row = rows[-1]
    print(
        f"  error against float64  rms {row['rms_error']:.2e} (eager {row['rms_error_eager']:.2e}),"
        f" max {row['max_error']:.2e} (eager {row['max_error_eager']:.2e})"
    )
    same = same_class(eager, ours, work.given(0))
    print(f"  same class as eager    {100 * same:.3f} % of the pixels")
    print(f"  eager {rows[0]['ms']:.1f} ms, ours {row['ms']:.1f} ms: {row['speedup']:.2f}x")
    return True, rows
