"""The operators on maps whose BatchNorm is pending, of every backend, beside plain PyTorch.

The truth is the function of the same name in ``normalized``, in float64.
"""

import pytest
import torch
from guarded import Guarded
from torch._subclasses.fake_tensor import FakeTensorMode

from seaattn_kernels import normalized, overloads, reference
from seaattn_kernels.kernels import depthwise, normalize, squeeze

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU all of these are its tests.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

BACKENDS = ["triton", "cpu"] if DEVICE == "cpu" else ["triton"]
LOW = (torch.float16, torch.bfloat16, torch.float32)
IDENTITY, RELU, RELU6, LEAKY_RELU, SILU = range(5)
#: Those with an activation, and those that may add a row and a column to a gradient.
ACTIVATED = ("normalize", "normalize_sums", "normalize_backward", "normalize_add_backward")
GATED = ("normalize_gate", "normalize_gate_sums", "normalize_gate_backward")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpu":
        request.getfixturevalue("library")
    return request.param


def layout_of(x, layout):
    """The values of a map in another layout; a view lies in a map that is NaN elsewhere."""
    b, c, h, w = x.shape

    def nan(*shape):
        return torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)

    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        wide = nan(b, c + 3, h, w)
        wide[:, -c:] = x
        return wide[:, -c:]
    if layout == "slice of channels_last":
        wide = nan(b, c + 3, h, w).contiguous(memory_format=torch.channels_last)
        wide[:, -c:] = x
        return wide[:, -c:]
    if layout == "window":
        wide = nan(b + 1, c + 2, h + 3, 2 * w + 4)
        wide[1:, 1:-1, 2:-1, 3:-1:2] = x
        return wide[1:, 1:-1, 2:-1, 3:-1:2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:, :1, :, :1].expand(b, c, h, w)
    return x.contiguous()


OF_STATISTICS = ("normalize_affine", "normalize_terms")
LAYOUTS = ("contiguous", "channels_last", "slice", "slice of channels_last", "window",
           "transposed", "expanded")  # fmt: skip


def arguments(
    name, shape, dtype=torch.float32, layout="contiguous", activation=None, axes=None, hard=True,
    other=None,
):  # fmt: skip
    """Random arguments of an operator; ``other``: the layout of the maps beside the first."""
    generator = torch.Generator().manual_seed(sum(shape))
    b, c, h, w = shape

    def random(*sizes, dtype=torch.float32):
        return torch.randn(sizes, generator=generator).to(DEVICE, dtype)

    def any_map(layout=layout):
        return layout_of(random(*shape, dtype=dtype), layout)

    def affine():
        return torch.stack([random(c), random(c).abs() + 0.3, random(c)])

    y, of_others = any_map(), other or layout
    if name in ("moments", "axial_moments"):
        return (y,)
    if name in OF_STATISTICS:

        def vector(*sizes):  # of every other element, but for one layout
            x = random(*sizes, 2 * c)
            return x[..., :c].contiguous() if layout == "contiguous" else x[..., ::2]

        count = max(2, b * h * w)
        if name == "normalize_terms":
            return vector(2), vector().abs() + 0.3, count
        weight, bias = (vector(), vector()) if axes else (None, None)
        return vector(), count * vector().abs(), weight, bias, count, 1e-3
    if name in GATED:
        given = (y, any_map(of_others), affine(), affine())
        gradient = () if name == "normalize_gate" else (any_map(of_others),)
        terms = (random(2, c), random(2, c)) if name == "normalize_gate_backward" else ()
        return *gradient, *given, *terms, hard
    if name == "depthwise":
        bias = random(c, dtype=dtype) if axes else None
        return y, affine(), random(c, 1, 3, 3, dtype=dtype), bias
    if name == "depthwise_backward":
        return any_map(of_others), y, affine(), random(c, 1, 3, 3, dtype=dtype)
    of_gradient = name in ("normalize_sums", "normalize_backward")
    if axes is None:
        axes = name == "normalize_add_backward"
    if activation is None:
        activation = IDENTITY if axes and of_gradient else SILU
    row = column = None
    if axes:
        kind = torch.float32 if of_gradient else dtype
        # Of any strides: those of a (B, H, C) tensor, and every other element.
        row = random(b, h, c, dtype=kind).transpose(1, 2)
        column = random(b, c, 2 * w, dtype=kind)[..., ::2]
    gradient = () if name == "normalize" else (any_map(of_others),)
    terms = (random(2, c),) if name == "normalize_backward" else ()
    return *gradient, y, affine(), *terms, row, column, activation, 0.2


def run(name, backend, given):
    found = overloads.OVERLOADS[name][backend](*given)
    return found if isinstance(found, tuple) else (found,)


def truth(name, given):
    """The plain function in float64."""
    given = [t.double() if isinstance(t, torch.Tensor) else t for t in given]
    if name in ACTIVATED:
        given[-2] = reference.ACTIVATIONS[given[-2]]
    found = getattr(normalized, name)(*given)
    return found if isinstance(found, tuple) else (found,)


def assert_right(name, backend, given):
    found = run(name, backend, given)
    rounding = max(torch.finfo(t.dtype).eps for t in found)  # sums may be of rounded gradients
    for ours, expected in zip(found, truth(name, given), strict=True):
        eps = rounding if name == "normalize_add_backward" else torch.finfo(ours.dtype).eps
        tolerance = 16 * eps if eps < 1e-6 else eps
        scale = max(1.0, float(expected.abs().max()))
        assert ours.shape == expected.shape
        torch.testing.assert_close(
            ours.double(), expected, rtol=0, atol=tolerance * scale, equal_nan=True
        )
    return found


#: One pixel, one row, one column of programs and more, nothing a power of two.
SHAPES = ((1, 1, 1, 1), (2, 3, 1, 17), (1, 5, 100, 3), (2, 33, 15, 8), (3, 8, 20, 25))
SMALL = (2, 5, 6, 7)


@pytest.mark.parametrize("name", overloads.STAGES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_shapes(name, shape, layout, backend):
    either = name in (*ACTIVATED[:3], "depthwise", "normalize_affine")
    for axes in (False, True) if either else (None,):
        assert_right(name, backend, arguments(name, shape, layout=layout, axes=axes))


@pytest.mark.parametrize("name", overloads.STAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name, layout, backend):
    """Also of gradients that are laid out in another way than the map."""
    for other in ("expanded", "channels_last"):
        given = arguments(name, SMALL, layout=layout, other=other)
        assert_right(name, backend, given)


@pytest.mark.parametrize("name", overloads.STAGES)
@pytest.mark.parametrize("dtype", LOW[:2])
def test_half_precision(name, dtype, backend):
    """What is read is exact, so that a result has the error of one rounding."""
    for layout in ("contiguous", "slice of channels_last"):
        assert_right(name, backend, arguments(name, (2, 9, 15, 8), dtype, layout))


@pytest.mark.parametrize("name", ACTIVATED)
@pytest.mark.parametrize("activation", range(len(reference.ACTIVATIONS)))
def test_activations(name, activation, backend):
    for axes in {name in ("normalize", "normalize_add_backward"), name == ACTIVATED[3]}:
        assert_right(name, backend, arguments(name, SMALL, activation=activation, axes=axes))


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("hard", [True, False])
def test_gates(name, hard, backend):
    assert_right(name, backend, arguments(name, SMALL, hard=hard))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 3, 24, 40), "contiguous"), ((2, 3, 24, 40), "channels_last"),
     ((1, 2, 9, 300), "contiguous")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "name",
    ["moments", "axial_moments", "normalize_sums", "normalize_add_backward",
     "normalize_gate_sums", "depthwise_backward"],
)  # fmt: skip
def test_sums_of_many_programs_and_their_order(name, shape, layout, backend, monkeypatch):
    """A map in bands and strips; the same bits at every call."""
    for module in (squeeze, normalize, depthwise):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 64)
    monkeypatch.setattr(squeeze, "bands", lambda *sizes: 2)
    given = arguments(name, shape, layout=layout)
    found = assert_right(name, backend, given)
    for ours, again in zip(found, run(name, backend, given), strict=True):
        assert torch.equal(ours, again)


# --- values that are hard --------------------------------------------------------------------


def test_statistics_far_from_zero(backend):
    """A mean of 1000 deviations, and one tile far from all the others."""
    y = torch.randn(2, 3, 40, 11, device=DEVICE) + 1000
    steps = torch.randn(1, 2, 200, 8, device=DEVICE)
    steps[:, :, :32] += 1000
    flat = torch.full((2, 2, 5, 9), 1e4 / 3, device=DEVICE)
    for given in (y, steps, flat, y.to(memory_format=torch.channels_last)):
        mean, squares = truth("moments", (given,))
        _, _, row, column = truth("axial_moments", (given,))
        found = run("axial_moments", backend, (given,))
        for ours in (found, run("moments", backend, (given,))):
            torch.testing.assert_close(ours[0].double(), mean, rtol=2e-7, atol=0)
            torch.testing.assert_close(ours[1].double(), squares, rtol=1e-5, atol=1e-4)
            assert (ours[1] >= 0).all()
        # Deviations are from the mean that was found; sums of large ones may be small.
        size = max(1.0, float((given - mean[:, None, None]).abs().max()))
        offset = (found[0].double() - mean)[:, None]
        for ours, expected in ((found[2], row), (found[3], column)):
            torch.testing.assert_close(ours.double() + offset, expected, rtol=0, atol=1e-6 * size)


def test_normalize_far_from_zero(backend):
    y = torch.randn(2, 3, 5, 9, device=DEVICE) + 1000
    mean, squares = (t.float() for t in truth("moments", (y,)))
    scale = (squares / 90).rsqrt()
    affine = torch.stack([mean, scale, torch.randn(3, device=DEVICE)])
    assert_right("normalize", backend, (y, affine, None, None, IDENTITY, 0.0))
    gradient = torch.randn_like(y)
    assert_right("normalize_sums", backend, (gradient, y, affine, None, None, RELU, 0.0))


@pytest.mark.parametrize("name", overloads.STAGES)
def test_nan_goes_through(name, backend):
    for activation in range(len(reference.ACTIVATIONS)) if name in ACTIVATED else (None,):
        given = arguments(name, SMALL, activation=activation)
        y = given[name in ACTIVATED[1:] or "_backward" in name or name == GATED[1]]
        y[(1, 3, 2, 4) if y.dim() == 4 else (..., 3)] = float("nan")
        found, expected = run(name, backend, given), truth(name, given)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("activation", range(len(reference.ACTIVATIONS)))
def test_gradients_at_the_kinks_are_pytorchs(activation, backend):
    y = torch.tensor([-3.0, 0.0, 3.0, 6.0, -1e-7, 6.1], device=DEVICE).view(1, 1, 1, 6)
    affine = torch.tensor([[0.0], [1.0], [0.0]], device=DEVICE)
    terms, one = torch.zeros(2, 1, device=DEVICE), torch.ones_like(y)
    row, column = torch.zeros(1, 1, 1, device=DEVICE), torch.zeros(1, 1, 6, device=DEVICE)
    act = (activation, 0.1)
    assert_right("normalize_backward", backend, (one, y, affine, terms, None, None, *act))
    assert_right("normalize_add_backward", backend, (one, y, affine, row, column, *act))
    gated = (one, y, one, affine, affine, terms, terms)
    assert_right("normalize_gate_backward", backend, (*gated, True))


def test_padding_is_of_the_normalized_map(backend):
    """Outside of the map there is 0, not the shift."""
    y = torch.ones(1, 1, 3, 3, device=DEVICE)
    affine = torch.tensor([[1.0], [1.0], [5.0]], device=DEVICE)
    weight = torch.ones(1, 1, 3, 3, device=DEVICE)
    (out,) = run("depthwise", backend, (y, affine, weight, None))
    assert out.flatten().tolist() == [20, 30, 20, 30, 45, 30, 20, 30, 20]


# --- the contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", overloads.STAGES)
def test_opcheck(name, backend):
    overload = overloads.OVERLOADS[name][backend]
    for axes in (None, True) if name in (*ACTIVATED[:3], "depthwise") else (None,):
        given = arguments(name, SMALL, layout="channels_last", other="contiguous", axes=axes)
        torch.library.opcheck(overload, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", overloads.STAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fakes_and_layouts(name, layout, dtype, backend):
    """Dtype, shape and strides of a result are those that its fake and the reference give."""
    given = arguments(name, (2, 3, 4, 5), dtype, layout)
    found = run(name, backend, given)
    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in given]
        fakes = run(name, backend, faked)
    for ours, fake, plain in zip(found, fakes, run(name, "reference", given), strict=True):
        assert ours.dtype == fake.dtype == plain.dtype
        assert ours.shape == fake.shape == plain.shape
        assert ours.stride() == fake.stride()
        assert ours.dim() != 4 or ours.stride() == plain.stride() or name == "depthwise_backward"
        assert all(ours.data_ptr() != t.data_ptr() for t in given if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(
    ("name", "layout", "shape"),
    [(name, layout, SMALL) for name in overloads.STAGES for layout in LAYOUTS[:2]]
    + [(name, "contiguous", (1, 3, 24, 40)) for name in overloads.STAGES]
    + [("axial_moments", "channels_last", (1, 3, 24, 40))],
    ids=str,
)
def test_every_element_is_written_and_nothing_else(name, layout, shape, monkeypatch):
    """Of Triton, whose results torch allocates in Python; of C++ the sanitizers watch it."""
    given = arguments(name, shape, torch.bfloat16, layout)
    guarded = Guarded(monkeypatch)
    run(name, "triton", given)
    guarded.check()


@pytest.mark.parametrize("name", [name for name in overloads.STAGES if name not in OF_STATISTICS])
def test_empty_batch(name, backend):
    given = arguments(name, (0, 3, 4, 5))
    for ours, plain in zip(run(name, backend, given), truth(name, given), strict=True):
        assert ours.shape == plain.shape
        assert (ours == 0).all()
