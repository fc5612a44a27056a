"""Mutation testing: faults planted one at a time, each of which the regression suite must notice.

    python tests/regression/mutants.py                 all of them (make mutants)
    python tests/regression/mutants.py NAME...         some
    python tests/regression/mutants.py --list          what there is

Works in a copy of the checkout. A mutant is noticed where a test fails, crashes or hangs; a test
that cannot be collected, or an import that fails, says that the mutant is broken, not noticed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SUITE = "tests/regression"
#: Seconds that a run of the whole suite may take; it takes two minutes.
TIMEOUT = 900


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    what: str
    near: str  # the tests to run first, as pytest's -k; all the others follow where these pass

    @property
    def backend(self) -> str:
        if self.file.startswith("csrc/"):
            return "cpu"
        return "triton" if "kernels/kernels/" in self.file else "python"


_REFERENCE = "seaattn_kernels/reference.py"
_NORMALIZED = "seaattn_kernels/normalized.py"
_TRAINING = "seaattn_kernels/training.py"
_FOLD = "seaattn_kernels/fold.py"
_WATCH = "seaattn_kernels/watch.py"
_NORMS = "seaattn_kernels/norms.py"
_MODULE = "seaattn_kernels/module.py"
_OVERLOADS = "seaattn_kernels/overloads.py"
_KERNELS = "seaattn_kernels/kernels/"
_ATTENTION = _KERNELS + "axial_attention.py"
_BLOCK = _KERNELS + "block.py"
_CPU = "csrc/cpu/"

PYTHON = (
    Mutant(
        "scale-dropped",
        _REFERENCE,
        "(torch.matmul(q.transpose(2, 3), k) * scale).softmax",
        "torch.matmul(q.transpose(2, 3), k).softmax",
        "scores are not scaled",
        "test_float64",
    ),
    Mutant(
        "softmax-over-queries",
        _REFERENCE,
        "k) * scale).softmax(dim=-1)",
        "k) * scale).softmax(dim=-2)",
        "the softmax runs over the wrong axis",
        "test_float64",
    ),
    Mutant(
        "corners-aligned",
        _REFERENCE,
        "align_corners=False)",
        "align_corners=True)",
        "position tables are resampled corner to corner",
        "test_float64",
    ),
    Mutant(
        "attention-in-half",
        _REFERENCE,
        "return x.to(torch.promote_types(x.dtype, torch.float32))",
        "return x",
        "the softmax of half precision runs in half precision",
        "no_error_has_grown and axial and reference",
    ),
    Mutant(
        "encode-bias-missing",
        _REFERENCE,
        "+ bias[:, None]).to(x.dtype)",
        ").to(x.dtype)",
        "the encodes of the folded block have no bias",
        "test_float64",
    ),
    Mutant(
        "padded-before-bias",
        _REFERENCE,
        "qkv, dw_weight[:, None], dw_bias.to(x.dtype), padding=1, groups",
        'F.pad(qkv, (1, 1, 1, 1), mode="replicate"), dw_weight[:, None], dw_bias, groups',
        "outside of the map the depthwise convolution does not see zeros",
        "test_float64",
    ),
    Mutant(
        "columns-of-the-rows-length",
        _REFERENCE,
        "column = attend(height, width, column_weight",
        "column = attend(height, height, column_weight",
        "the second axis has the first one's length",
        "test_float64",
    ),
    Mutant(
        "gate-without-clamp",
        _REFERENCE,
        "weight = F.relu6(x + 3) / 6 if hard",
        "weight = (x + 3) / 6 if hard",
        "the hard gate is a line",
        "test_float64",
    ),
    Mutant(
        "eps-assumed",
        _FOLD,
        "norm.running_var.to(wide) + norm.eps)",
        "norm.running_var.to(wide) + 1e-5)",
        "the eps of a norm is not read",
        "folded_weights_follow",
    ),
    Mutant(
        "running-variance-biased",
        "seaattn_kernels/normalized.py",
        "inverse, deviations / (count - 1)",
        "inverse, deviations / count",
        "running averages take the biased variance",
        "training",
    ),
    Mutant(
        "mean-not-scaled",
        _FOLD,
        "bias = scale * (bias - norm.running_mean.to(wide))",
        "bias = scale * bias - norm.running_mean.to(wide)",
        "the folded bias takes the mean off unscaled",
        "test_float64",
    ),
    Mutant(
        "folded-in-half",
        _FOLD,
        "return weight.to(kept), bias.to(kept)",
        "return weight.half().to(kept), bias.to(kept)",
        "folded weights are rounded to half precision",
        "test_float64 or no_error_has_grown and block",
    ),
    Mutant(
        "stale-after-in-place",
        _WATCH,
        "if tensor is not None and id(tensor) not in counts and not tensor.is_inference()",
        "if tensor is not None and id(tensor) not in counts and tensor.is_inference()",
        "an update in place is not seen",
        "folded_weights_follow",
    ),
    Mutant(
        "stale-after-optimizer",
        _WATCH,
        'attributes = [(steps, "count", steps["count"])]',
        "attributes = []",
        "a fused optimizer's step is not seen",
        "folded_weights_follow",
    ),
    Mutant(
        "stale-after-eps",
        _WATCH,
        'for name in ("training", "eps")',
        'for name in ("training",)',
        "another eps is not seen",
        "folded_weights_follow",
    ),
    Mutant(
        "tables-of-the-rows-twice",
        _FOLD,
        "tables = self.tables[2:] if of_columns else self.tables[:2]",
        "tables = self.tables[:2]",
        "the columns take the tables of the rows",
        "test_float64",
    ),
    Mutant(
        "maps-kept-for-ever",
        _FOLD,
        "    for old in list(table)[: 1 - MAP_SIZES]:\n        table.pop(old, None)\n",
        "",
        "weights of every size of map are kept",
        "test_memory",
    ),
    Mutant(
        "stale-after-cast",
        _MODULE,
        '    def _apply(self, *args, **kwargs) -> "SeaAttention":\n        self._folds.drop()\n',
        '    def _apply(self, *args, **kwargs) -> "SeaAttention":\n',
        "the fold outlives .to() and .half()",
        "folded_weights_follow",
    ),
    Mutant(
        "stale-after-training",
        _MODULE,
        "            folds.drop_weights()\n",
        "            pass\n",
        "the fold outlives a forward with gradients",
        "folded_weights_follow",
    ),
    Mutant(
        "one-pass-variance",
        _NORMALIZED,
        "return mean, (y.to(mean.dtype) - mean[:, None, None]).square().sum(_MAP)",
        "return mean, y.to(mean.dtype).square().sum(_MAP) - mean**2 * (y.numel() // y.shape[1])",
        "the variance is a difference of large sums",
        "no_error_has_grown and moments and reference",
    ),
    Mutant(
        "shift-in-the-padding",
        _NORMALIZED,
        "return _like(F.conv2d(n, weight, bias, padding=1, groups=weight.shape[0]), y)",
        'padded = F.pad(n, (1, 1, 1, 1), mode="replicate")\n'
        "    return _like(F.conv2d(padded, weight, bias, groups=weight.shape[0]), y)",
        "outside of the map the normalised map is not zero",
        "test_float64",
    ),
    Mutant(
        "variance-without-gradient",
        _NORMALIZED,
        "(g.to(affine.dtype) - offset - (y.to(affine.dtype) - mean) * factor)",
        "(g.to(affine.dtype) - offset)",
        "the gradient does not pass through the variance",
        "test_float64",
    ),
    Mutant(
        "gradient-at-the-bounds",
        _NORMALIZED,
        "return torch.ops.aten.hardtanh_backward(gradient, z, 0.0, 6.0)",
        "return torch.where((z >= 0) & (z <= 6), gradient, torch.zeros_like(gradient))",
        "ReLU6 has a gradient at 0 and 6",
        "kinks",
    ),
    Mutant(
        "biased-running-variance",
        _NORMALIZED,
        "inverse, deviations / (count - 1)",
        "inverse, deviations / count",
        "running averages take the biased variance",
        "test_float64",
    ),
    Mutant(
        "momentum-assumed",
        _NORMS,
        "by_factor.setdefault(layer.momentum or 0.0,",
        "by_factor.setdefault(0.1,",
        "the momentum of a norm is not read",
        "norms_do",
    ),
    Mutant(
        "means-of-constant-statistics",
        _TRAINING,
        "if not rule.batch or rule.group is not None:\n            offset",
        "if rule.group is not None:\n            offset",
        "axial means of the map are those of its deviations",
        "test_float64",
    ),
    Mutant(
        "lengths-swapped",
        _TRAINING,
        "row.to(kind) / width, column.to(kind) / height",
        "row.to(kind) / height, column.to(kind) / width",
        "the gradient of a mean is divided by the other length",
        "test_float64",
    ),
    Mutant(
        "gradient-of-v-overwritten",
        _TRAINING,
        "dy[:, -dv.shape[1] :] += dv",
        "dy[:, -dv.shape[1] :] = dv",
        "v loses the gradient of the detail",
        "test_float64",
    ),
    Mutant(
        "gamma-unscaled",
        _TRAINING,
        "return torch.zeros_like(sums), sums[1] * self.inverse",
        "return torch.zeros_like(sums), sums[1]",
        "the gradient of a norm's weight by constant statistics is not divided by the deviation",
        "test_float64",
    ),
    Mutant(
        "one-axis-unscaled",
        _OVERLOADS,
        "q.shape[1] // heads, scale)[0]",
        "q.shape[1] // heads, 1.0)[0]",
        "attention along one axis drops its scale",
        "test_operator and axial_attention or no_error_has_grown",
    ),
    Mutant(
        "strides-ignored",
        _OVERLOADS,
        "    row, column, *tables = (t.contiguous() for t in (row, column, *tables))\n"
        "    return axial_attention.axial_attention_pair(",
        "    return axial_attention.axial_attention_pair(",
        "the Triton attention reads any strides as contiguous",
        "test_operator and triton and pair",
    ),
    Mutant(
        "layouts-ignored",
        _OVERLOADS,
        "gate.gate(*(reference.follow_layout(t, x) for t in (x, y)), hard)",
        "gate.gate(x, y, hard)",
        "the Triton gate takes two layouts for one",
        "test_operator and triton and gate",
    ),
)

TRITON = (
    Mutant(
        "mask-dropped",
        _ATTENTION,
        'return tl.where(j[None, :] < N, product, float("-inf"))',
        "return product",
        "keys beyond the axis take part in the softmax",
        "no_error_has_grown and axial_attention and triton",
    ),
    Mutant(
        "base-of-the-exponential",
        _ATTENTION,
        "N, q_len, inside) * (scale * _LOG2E)\n    largest",
        "N, q_len, inside) * scale\n    largest",
        "the softmax is of powers of two",
        "no_error_has_grown and axial_attention and triton",
    ),
    Mutant(
        "table-of-the-rows",
        _ATTENTION,
        "x_ptr, q_table, k_table, out_ptr = column_ptr, column_q_ptr, column_k_ptr, column_out_ptr",
        "x_ptr, q_table, k_table, out_ptr = column_ptr, column_q_ptr, row_k_ptr, column_out_ptr",
        "keys of the columns take the table of the rows",
        "no_error_has_grown and axial_attention and triton",
    ),
    Mutant(
        "head-stride",
        _ATTENTION,
        "v_at = (2 * heads * D + head * E) * N",
        "v_at = (2 * heads * D + head * D) * N",
        "the backward finds the values of a head at the stride of keys",
        "no_error_has_grown and axial_attention and triton",
    ),
    Mutant(
        "tables-of-one-image",
        _ATTENTION,
        "for _ in range(B):\n            dx +=",
        "for _ in range(1):\n            dx +=",
        "the gradient of a table is not summed over the batch",
        "no_error_has_grown and axial_attention_pair and triton",
    ),
    Mutant(
        "gradient-of-keys-scaled",
        _ATTENTION,
        "dk = (dk * _LN2).to",
        "dk = dk.to",
        "the gradient of the keys keeps a logarithm's base",
        "no_error_has_grown and axial_attention and triton",
    ),
    Mutant(
        "bands-scaled-twice",
        _KERNELS + "squeeze.py",
        "column_scale if way.bands == 1 else 1.0,\n",
        "column_scale,\n",
        "sums of several bands are divided twice",
        "test_operator and squeeze and triton",
    ),
    Mutant(
        "tail-of-the-rows",
        _KERNELS + "squeeze.py",
        "mask=here & in_h[:, None, :, None], other=0.0).to(tl.float32)\n        sums",
        "mask=here, other=0.0).to(tl.float32)\n        sums",
        "the last tile sums what lies behind the last row",
        "test_operator and squeeze and triton",
    ),
    Mutant(
        "nan-swallowed",
        _KERNELS + "broadcast_add.py",
        "return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)",
        "return tl.maximum(z, 0.0)",
        "ReLU makes a zero of NaN",
        "nan and triton",
    ),
    Mutant(
        "gradient-at-the-bounds-triton",
        _KERNELS + "broadcast_add.py",
        "tl.where((z <= 0) | (z >= 6), 0.0, gradient)",
        "tl.where((z < 0) | (z > 6), 0.0, gradient)",
        "ReLU6 has a gradient at 0 and 6",
        "kinks and triton",
    ),
    Mutant(
        "gate-without-clamp-triton",
        _KERNELS + "gate.py",
        "return t / 6.0",
        "return (x + 3.0) / 6.0",
        "the hard gate is a line",
        "no_error_has_grown and gate and triton",
    ),
    Mutant(
        "last-block-missing",
        _KERNELS + "gate.py",
        "launch(gate_kernel, cdiv(n, _BLOCK),",
        "launch(gate_kernel, n // _BLOCK,",
        "the elements of the last block are not written",
        "no_error_has_grown and gate and triton",
    ),
    Mutant(
        "halo-below",
        _BLOCK,
        "in_h = here & (h + di >= 1) & (h + di < H + 1)",
        "in_h = here & (h + di >= 1) & (h + di < H + 2)",
        "the convolution reads a row below the map",
        "no_error_has_grown and block and triton",
    ),
    Mutant(
        "position-of-the-rows",
        _BLOCK,
        "        position_ptr += H * 2 * keys\n",
        "        position_ptr += 0\n",
        "the columns take the positions of the rows",
        "no_error_has_grown and block and triton",
    ),
    Mutant(
        "encode-bias-of-the-rows",
        _BLOCK,
        "        bias_ptr += N\n",
        "        bias_ptr += 0\n",
        "the columns are encoded with the bias of the rows",
        "no_error_has_grown and block and triton",
    ),
    Mutant(
        "products-in-half",
        _BLOCK,
        "return tl.dot(a, b, total, input_precision=PRECISION)",
        "return tl.dot(a, b, total, input_precision=PRECISION).to(tl.float16).to(tl.float32)",
        "sums of products are rounded to half precision",
        "no_error_has_grown and block and triton",
    ),
    Mutant(
        "means-of-the-rows",
        _BLOCK,
        "x_ptr, N, across, parts = column_ptr, W, H, column_parts",
        "x_ptr, N, across, parts = row_ptr, W, H, column_parts",
        "the columns take the means of the rows",
        "ways_of",
    ),
    Mutant(
        "deviations-from-a-tile",
        _KERNELS + "normalize.py",
        "squares = tl.sum(tl.sum(squares, 2), 1) - offset * offset * size",
        "squares = tl.sum(tl.sum(squares, 2), 1)",
        "the variance is about the mean of the first tile",
        "no_error_has_grown and moments and triton",
    ),
    Mutant(
        "groups-of-parts-merged-wrong",
        _KERNELS + "normalize.py",
        "        squares += delta * delta * (count * share)\n",
        "",
        "the variance between groups of parts is lost",
        "test_stage and moments and triton",
    ),
    Mutant(
        "terms-dropped",
        _KERNELS + "normalize.py",
        "dy = scale * (g - offset - deviation * factor)",
        "dy = scale * (g - offset)",
        "the gradient does not pass through the variance",
        "no_error_has_grown and normalize_backward and triton",
    ),
    Mutant(
        "biased-running-variance-triton",
        _KERNELS + "normalize.py",
        "deviations / (count - 1.0), mask",
        "deviations / count, mask",
        "running averages take the biased variance",
        "test_stage and normalize_affine and triton",
    ),
    Mutant(
        "halo-on-the-left",
        _KERNELS + "depthwise.py",
        "left = load_normalized(y_ptr - y_w, here & (w > 0) & (w <= W), mean, scale, shift)",
        "left = load_normalized(y_ptr - y_w, here & (w <= W), mean, scale, shift)",
        "the convolution reads the row above on the left",
        "no_error_has_grown and depthwise and triton",
    ),
)

CPU = (
    Mutant(
        "no-maximum",
        _CPU + "axial_attention.cpp",
        "row[l] = exponential(row[l] - maximum[l]);",
        "row[l] = exponential(row[l]);",
        "the softmax does not take off the maximum",
        "test_operator and cpu and axial_attention",
    ),
    Mutant(
        "stale-after-in-place-cpu",
        "csrc/python/module.cpp",
        "_version() != (*self.versions)[i]",
        "_version() < (*self.versions)[i]",
        "the library does not see an update in place",
        "folded_weights_follow",
    ),
    Mutant(
        "tables-of-one-image-cpu",
        _CPU + "axial_attention.cpp",
        "b < batch; ++b) {\n#pragma omp simd\n    for (int64_t i = 0; i < n; ++i) sums[i]",
        "b < 1; ++b) {\n#pragma omp simd\n    for (int64_t i = 0; i < n; ++i) sums[i]",
        "the gradient of a table is not summed over the batch",
        "no_error_has_grown and pair and cpu",
    ),
    Mutant(
        "corners-aligned-cpu",
        _CPU + "axial_attention.cpp",
        "const double at = std::max(0.0, (i + 0.5) * step - 0.5);",
        "const double at = step > 0 ? double(i) * (points - 1) / std::max<int64_t>(1, n - 1) : 0;",
        "position tables are resampled corner to corner",
        "no_error_has_grown and pair and cpu",
    ),
    Mutant(
        "head-stride-cpu",
        _CPU + "axial_attention_pair.cpp",
        "of_v = 2 * keys + head * pair.e;",
        "of_v = 2 * keys + head * pair.d;",
        "the values of a head are found at the stride of keys",
        "no_error_has_grown and pair and cpu",
    ),
    Mutant(
        "last-band-alone",
        _CPU + "squeeze.cpp",
        "for (int64_t j = 0; j < width; ++j) total[j] += run[j];",
        "for (int64_t j = 0; j < width; ++j) total[j] = run[j];",
        "the column means are those of the last rows",
        "no_error_has_grown and axial_squeeze and cpu",
    ),
    Mutant(
        "column-of-the-first-pixel",
        _CPU + "broadcast_add.cpp",
        "(widen(row[c]) + widen(column[at]))",
        "(widen(row[c]) + widen(column[c]))",
        "all pixels of a channels_last row take its first column",
        "test_operator and cpu and broadcast",
    ),
    Mutant(
        "gradient-at-the-bounds-cpu",
        _CPU + "gate.cpp",
        "(shifted <= 0.0f) | (shifted >= 6.0f)",
        "(shifted < 0.0f) | (shifted > 6.0f)",
        "the hard gate has a gradient at its bounds",
        "kinks and cpu",
    ),
    Mutant(
        "gate-without-clamp-cpu",
        _CPU + "gate.cpp",
        "kHard ? clamp6(t + 3.0f) * kSixth",
        "kHard ? (t + 3.0f) * kSixth",
        "the hard gate is a line",
        "no_error_has_grown and gate and cpu",
    ),
    Mutant(
        "frame-of-ones",
        _CPU + "block.cpp",
        "std::fill_n(panel + place * kPanel, pixels * kPanel, 0.0f);",
        "std::fill_n(panel + place * kPanel, pixels * kPanel, 1.0f);",
        "outside of the map the depthwise convolution does not see zeros",
        "no_error_has_grown and block and cpu",
    ),
    Mutant(
        "scale-of-values",
        _CPU + "block.cpp",
        "std::sqrt(static_cast<float>(s_.key_dim))",
        "std::sqrt(static_cast<float>(s_.value_dim))",
        "scores are scaled by the width of the values",
        "no_error_has_grown and block and cpu",
    ),
    Mutant(
        "position-of-queries",
        _CPU + "block.cpp",
        "i.axis[k + d * line + n] += w_.position[k + d * line + n];",
        "i.axis[k + d * line + n] += w_.position[q + d * line + n];",
        "keys take the positions of queries",
        "no_error_has_grown and block and cpu",
    ),
    Mutant(
        "rows-beside-a-band",
        _CPU + "block.cpp",
        "const int64_t needed = std::min(end + 1, s_.height);",
        "const int64_t needed = std::min(end, s_.height);",
        "the row below a band of a large map is not made",
        "cpu_block_in_strips or large and block and cpu",
    ),
    Mutant(
        "column-of-the-first-pixel-block",
        _CPU + "stages.cpp",
        "(of_row[l] + of_column[p * kPanel + l])",
        "(of_row[l] + of_column[l])",
        "all pixels of a segment take its first column",
        "no_error_has_grown and block and cpu",
    ),
    Mutant(
        "shift-after-each-row",
        _CPU + "depthwise.cpp",
        "to[plane.width] = 0.0f;",
        "to[plane.width] = shift;",
        "between two rows stands the shift instead of zero",
        "no_error_has_grown and depthwise and cpu",
    ),
    Mutant(
        "variance-between-pixels",
        _CPU + "training.cpp",
        "squares[task * channels + c] + difference * difference * before * share;",
        "squares[task * channels + c];",
        "the variance between groups of pixels is lost",
        "no_error_has_grown and moments and cpu",
    ),
    Mutant(
        "eps-beside-the-root",
        _CPU + "training.cpp",
        "1.0 / std::sqrt(squares[c] / static_cast<double>(count) + eps)",
        "1.0 / (std::sqrt(squares[c] / static_cast<double>(count)) + eps)",
        "eps is added to the deviation, not to the variance",
        "test_stage and normalize_affine and cpu",
    ),
    Mutant(
        "variance-of-the-gradient",
        _CPU + "training.cpp",
        "gradient * factor[c] * share",
        "gradient * share",
        "the term of the variance is divided by the deviation once",
        "test_stage and normalize_terms and cpu",
    ),
    Mutant(
        "taps-not-mirrored",
        _CPU + "training.cpp",
        'taps_of("depthwise_backward", weight, map).flip(1);',
        'taps_of("depthwise_backward", weight, map);',
        "the gradient of a convolution is the convolution",
        "no_error_has_grown and depthwise and cpu",
    ),
)

MUTANTS = (*PYTHON, *TRITON, *CPU)


def mutated(mutant: Mutant, text: str) -> str:
    """The source with its fault. Raises ``ValueError`` unless the old text occurs once."""
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: its old text occurs {count} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


# --- a copy of the checkout ------------------------------------------------------------------


def make_copy(folder: Path) -> None:
    """What git tracks, as it is in the working tree, and the compiled library if there is one."""
    files = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    libraries = [str(path.relative_to(ROOT)) for path in ROOT.glob("seaattn_kernels/_C.*")]
    for name in (*files, *libraries):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def _environment() -> dict[str, str]:
    # A source that changes twice a second has the bytecode of neither.
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "SEAATTN_FORCE_BUILD": "1"}


def build(folder: Path) -> str | None:
    """Compile what has changed; the last lines of an error."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr[-2000:]


# --- one run ---------------------------------------------------------------------------------


class Run(NamedTuple):
    """``by``: the test that failed, or what else stopped the suite; None where it passed."""

    by: str | None
    broken: bool = False


#: Failures that say that a source is no program.
_NO_PROGRAM = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError")


def run_suite(folder: Path, expression: str = "") -> Run:
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", SUITE, "-x", "-q", "-p", "no:cacheprovider"]
    # The tests of the mutants would notice every one: its old text is gone.
    command += [f"--ignore={SUITE}/test_mutants.py", f"--junitxml={report}"]
    command += ["-k", expression] if expression else []
    try:
        done = subprocess.run(
            command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return Run("a timeout")
    if done.returncode < 0:
        return Run(f"a crash (signal {-done.returncode})")
    if done.returncode == 0:
        return Run(None)
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        failure = case.find("failure")
        if failure is not None:
            test = f"{case.get('classname', '').rpartition('.')[2]}.py::{case.get('name')}"
            message = failure.get("message", "")
            return Run(test, message.startswith(_NO_PROGRAM) or "CompilationError" in message)
    return Run((done.stdout + done.stderr)[-1000:], broken=True)


def try_mutant(folder: Path, mutant: Mutant, all_tests: bool = True) -> Run:
    """Plant a fault in the copy, run the suite, and put the source back."""
    path = folder / mutant.file
    text = path.read_text()
    path.write_text(mutated(mutant, text))
    try:
        if mutant.backend == "cpu" and (error := build(folder)):
            return Run(error, broken=True)
        found = run_suite(folder, mutant.near)
        return run_suite(folder) if all_tests and found.by is None else found
    finally:
        path.write_text(text)


def main(names: Sequence[str]) -> int:
    from tqdm import tqdm

    chosen = [m for m in MUTANTS if not names or m.name in names]
    unknown = set(names) - {m.name for m in MUTANTS}
    if unknown:
        sys.exit(f"no mutant {', '.join(sorted(unknown))}; --list shows them")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        make_copy(folder)
        if any(m.backend == "cpu" for m in chosen) or not list(folder.glob("seaattn_kernels/_C.*")):
            print("building the library of the copy", flush=True)
            if error := build(folder):
                sys.exit(error)
        print("running the suite without a fault", flush=True)
        if (clean := run_suite(folder)).by is not None:
            sys.exit(f"the suite fails without a fault: {clean.by}")
        noticed = 0
        # The library is the clean one until the last: those that need another one.
        progress = tqdm(chosen, unit="mutant")
        for mutant in progress:
            progress.set_postfix_str(mutant.name)
            found = try_mutant(folder, mutant)
            noticed += found.by is not None and not found.broken
            if found.broken:
                verdict = f"BROKEN: {found.by}"
            else:
                verdict = "UNNOTICED" if found.by is None else f"noticed by {found.by}"
            tqdm.write(f"{mutant.backend:<7} {mutant.name:<34} {verdict}", file=sys.stdout)
    unnoticed = len(chosen) - noticed
    minutes = (time.monotonic() - start) / 60
    print(f"{noticed} noticed, {unnoticed} unnoticed in {minutes:.1f} minutes")
    return int(unnoticed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        for mutant in MUTANTS:
            print(f"{mutant.backend:<7} {mutant.name:<34} {mutant.what}")
    else:
        sys.exit(main(options.names))
