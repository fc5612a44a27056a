"""The whole block in Triton: interpreted on a CPU, compiled on a GPU."""

import copy
import threading

import pytest
import torch
from guarded import Guarded
from torch import nn

from bench.cases import CASES
from seaattn_kernels import SeaAttention, budget, ops, reference, verify
from seaattn_kernels.kernels import block, squeeze
from seaattn_kernels.layers import make_activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU all of these are its tests.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

LOW = (torch.float16, torch.bfloat16, torch.float32)
WAYS = ("direct", "squeezed")


def make(channels=16, key_dim=4, heads=2, ratio=2.0, activation="relu6", hard=True):
    module = SeaAttention(channels, key_dim, heads, ratio, activation, backend="triton")
    if not hard:
        module.sigmoid = nn.Sigmoid()
    return verify.randomise(module).to(DEVICE).eval()


@pytest.fixture(autouse=True)
def _from_python(monkeypatch):
    """On a GPU, not the launches of an earlier test, repeated by the library."""
    if DEVICE == "cuda":
        plan = torch.ops.seaattn_kernels.sea_attention_plan.triton
        by_backend = ops.OVERLOADS["sea_attention"]
        monkeypatch.setitem(by_backend, "triton", lambda *arguments: plan(*arguments)[0])


@torch.no_grad()
def run(module, x):
    return module(x)


@torch.no_grad()
def exact(module, x):
    return reference.sea_attention(copy.deepcopy(module).double(), x.double())


def assert_right(module, x, tolerance=2e-5):
    ours, truth = run(module, x), exact(module, x)
    torch.testing.assert_close(
        ours.double(), truth, atol=tolerance * max(1.0, float(truth.abs().max())), rtol=0
    )


@pytest.fixture
def force(monkeypatch):
    """Take a way, or tiles, whatever the shape."""

    def force(way=None, tile=None):
        if way is not None:
            monkeypatch.setattr(block, "plan", lambda *arguments: way)
        if tile is not None:
            monkeypatch.setattr(block, "product_tile", lambda *arguments: block.ProductTile(*tile))

    return force


# --- the error budget ------------------------------------------------------------------------

# The largest maps take the interpreter longest.
SWEEP = [
    pytest.param(case, dtype, marks=[pytest.mark.slow] * (case.height * case.width > 60))
    for case in verify.BLOCK_CASES
    for dtype in LOW
    if case.height * case.width < 400 or dtype is torch.float16 or DEVICE == "cuda"
]


@pytest.mark.parametrize(("case", "dtype"), SWEEP, ids=str)
def test_odd_shapes_keep_the_budget(case, dtype):
    verdict = verify.block_verdict(case, "triton", dtype, DEVICE)
    assert verdict.ok, verdict


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_way_keeps_the_budget(way, dtype, force):
    force(way)
    case = verify.BlockCase(2, 24, 17, 20, 10, 3, 1.5, "relu6")
    verdict = verify.block_verdict(case, "triton", dtype, DEVICE)
    assert verdict.ok, verdict


GOLDEN = {path.stem: verify.load_golden(path) for path in sorted(verify.GOLDEN.glob("*.npz"))}
BLOCKS = [name for name, golden in GOLDEN.items() if golden.meta["kind"] == "sea_attention"]
MODELS = [name for name in GOLDEN if name not in BLOCKS]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_golden_block_keeps_the_budget(name, dtype):
    golden = GOLDEN[name]
    module = golden.model("triton").to(DEVICE, dtype).eval()
    x = golden.random("x").to(DEVICE, dtype)
    with torch.no_grad():
        eager = reference.sea_attention(module, x)
    verdict = budget.judge([run(module, x)], [eager], [golden.arrays["eval/out"]], dtype)
    assert verdict.ok, verdict


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_golden_model_keeps_the_budget(name, dtype):
    """The classifier and the segmenter: logits, and the outputs of the stages.

    A single map says little of a ratio: on a GPU as many are pooled as the budget asks for.
    """
    golden = GOLDEN[name]
    pooled = [], [], []
    for seed in budget.SEEDS if DEVICE == "cuda" else (0,):
        x = golden.random("x" if seed == 0 else f"x{seed}")
        truth = golden.arrays if seed == 0 else outputs(golden, x, torch.float64, "eager")
        ours, eager = (outputs(golden, x, dtype, backend) for backend in ("triton", "eager"))
        names = [name for name in golden.arrays if name in ours]
        assert "logits" in names
        for name in names:
            scale = float(golden.arrays[name].abs().max())
            for pool, table in zip(pooled, (ours, eager, truth), strict=True):
                pool.append(table[name].cpu().double() / scale)
    verdict = budget.judge(*pooled, dtype)
    assert verdict.ok, verdict


def outputs(golden, x, dtype, backend):
    """Of a whole model; "eager" has upstream's forward of the block."""
    model = golden.model("triton").to(DEVICE, dtype).eval()
    if backend == "eager":
        for module in model.modules():
            if isinstance(module, SeaAttention):
                module.forward = lambda x, module=module: reference.sea_attention(module, x)
    with torch.no_grad():
        return verify.stage_outputs(model, x.to(DEVICE, dtype))


# --- any size, layout, width -----------------------------------------------------------------

SIZES = [(1, 1, 1), (2, 1, 17), (3, 33, 1), (2, 7, 7), (1, 4, 40), (2, 19, 18)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_of_any_size(way, size, channels_last, force):
    force(way)
    batch, height, width = size
    x = torch.randn(batch, 16, height, width, device=DEVICE)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_right(make(), x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("channels", "key_dim", "heads", "ratio"),
    [
        (1, 2, 1, 0.5),
        (33, 10, 3, 1.5),
        (130, 20, 2, 1),
        (16, 24, 1, 2),
        (7, 64, 1, 2),
        (90, 3, 5, 3),
    ],
)
def test_channels_that_are_no_multiples_of_16(way, channels, key_dim, heads, ratio, force):
    force(way)
    x = torch.randn(2, channels, 5, 9, device=DEVICE)
    assert_right(make(channels, key_dim, heads, ratio), x, 4e-5)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("hard", [True, False])
def test_activations_and_gates(activation, hard):
    module = make(activation=activation, hard=hard)
    assert_right(module, torch.randn(2, 16, 6, 5, device=DEVICE))


def test_slope_of_a_leaky_relu():
    module = make(activation=nn.LeakyReLU(0.3))
    assert module.act.negative_slope == 0.3
    assert_right(module, torch.randn(2, 16, 6, 5, device=DEVICE))


CHOICES = sorted({choice[:4] for choice in (*block._PRODUCT, *block._FINISH, *block._EXACT)})


@pytest.mark.slow
@pytest.mark.parametrize("tile", CHOICES, ids=str)
def test_every_tile(tile, force):
    force(tile=tile)
    assert_right(make(40, 10, 3), torch.randn(2, 40, 7, 13, device=DEVICE))


@pytest.mark.slow
def test_the_way_of_large_maps_in_strips_and_bands(monkeypatch):
    """Sums of a map in parts, added by attend itself."""
    monkeypatch.setattr(squeeze, "bands", lambda *sizes: 3)
    x = torch.randn(1, 3, 70, 300, device=DEVICE)
    cut = squeeze.cut(x.shape, squeeze.lines(300, x.itemsize), x.device)
    assert (cut.strips, cut.bands) == (10, 3)
    assert_right(make(3, 4, 1), x)


def test_outside_the_map_the_depthwise_input_is_zero_and_not_the_bias():
    """A map of zeros: qkv is its bias everywhere, and only the halo makes pixels differ."""
    module = make()
    x = torch.zeros(1, 16, 5, 6, device=DEVICE)
    assert_right(module, x)
    out = run(module, x)
    assert not torch.allclose(out[:, :, 0], out[:, :, 2], atol=1e-3)
    torch.testing.assert_close(out[:, :, 1:-1, 1:-1], out[:, :, 2:3, 2:3].expand(1, 16, 3, 4))


def test_neighbours_in_memory_are_not_neighbours_in_the_map():
    """The last pixel of a line and the first of the next, the last of an image and the next's."""
    module = make()
    x = torch.randn(3, 16, 4, 4, device=DEVICE)
    alone = torch.cat([run(module, x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(run(module, x), alone, atol=1e-6, rtol=1e-5)
    assert_right(module, x)


def _view(x, kind):
    b, c, h, w = x.shape
    if kind == "sliced":
        wide = x.new_zeros(b + 1, c + 2, h + 3, w + 4)
        wide[1:, 1:-1, 2:-1, 3:-1] = x
        return wide[1:, 1:-1, 2:-1, 3:-1]
    if kind == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "expanded":
        return x[:1].expand(b, c, h, w)
    if kind == "same everywhere":
        return x[:, :, :1, :1].expand(b, c, h, w)
    if kind == "channels of a wider map":
        return torch.cat([x, x], dim=1)[:, c:]
    return x.contiguous(memory_format=torch.channels_last)


VIEWS = ("sliced", "transposed", "expanded", "same everywhere", "channels of a wider map", "NHWC")


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("size", [(5, 6), (1, 7), (7, 1), (1, 1)], ids=str)
def test_any_strides(kind, size):
    module = make()
    x = _view(torch.randn(2, 16, *size, device=DEVICE), kind)
    before = x.clone()
    assert_right(module, x)
    out = run(module, x)
    assert reference.is_channels_last(out) == reference.is_channels_last(x)
    assert out.is_contiguous() or reference.is_channels_last(out)
    assert torch.equal(x, before)


def test_empty_batch():
    out = run(make(), torch.randn(0, 16, 5, 6, device=DEVICE))
    assert out.shape == (0, 16, 5, 6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["relu6", "silu"])
def test_nan_and_infinity_go_where_eager_sends_them(way, value, activation, force):
    force(way)
    module = make(activation=activation)
    x = torch.randn(2, 16, 7, 9, device=DEVICE)
    x[1, 3, 2, 4] = value
    with torch.no_grad():
        eager = reference.sea_attention(module, x)
    out = run(module, x)
    assert torch.equal(out.isnan(), eager.isnan())
    assert out[0].isfinite().all()
    assert out[1].isnan().any()


# --- blocks and ways by the shape ------------------------------------------------------------


def test_plan():
    half, single = torch.float16, torch.float32
    # (B, H, W), NQ, dtype
    for shape, projected, dtype, way in (
        ((1, 8, 8), 768, half, "direct"),
        ((64, 16, 16), 512, half, "direct"),
        ((64, 16, 16), 512, single, "direct"),
        ((64, 17, 16), 512, half, "squeezed"),
        ((1, 17, 1), 512, half, "direct"),
        ((4, 32, 32), 512, half, "direct"),  # 4 MiB
        ((4, 32, 32), 512, single, "squeezed"),
        ((16, 32, 32), 512, half, "squeezed"),
        ((1, 33, 1), 512, half, "squeezed"),
        ((1, 3, 100), 512, half, "squeezed"),
        ((64, 64, 128), 512, half, "squeezed"),
    ):
        assert block.plan(*shape, projected, dtype) == way, (shape, dtype)


def test_tiles_fill_a_gpu_where_the_map_can(monkeypatch):
    monkeypatch.setattr(block, "INTERPRETED", False)

    def programs(choices, m, n, precision="ieee", dtype=torch.float16):
        tile = block.product_tile(choices, m, n, 132, dtype, precision)
        return tile, tile.programs(m, n)

    for choices in (block._PRODUCT, block._FINISH):
        large, count = programs(choices, 65536, 256)
        assert large == choices[0][:4]
        assert count >= 132
        small, count = programs(choices, 1024, 256)
        assert small.m * small.n < large.m * large.n
        assert count >= 0.75 * 132
        assert programs(choices, 16, 16)[0][:2] == (16, 16)
        half, single = (
            programs(choices, 65536, 256, "tf32", dtype)[0]
            for dtype in (torch.float16, torch.float32)
        )
        assert single.k == half.k // 2
    assert programs(block._FINISH, 65536, 256, "ieee", torch.float32)[0] == block._EXACT[0][:4]


@pytest.mark.parametrize(
    ("pixels", "tile"),
    [
        (49, (16, 32, 128, 8)),
        (256, (16, 32, 128, 8)),
        (1024, (16, 128, 64, 8)),
        (4096, (64, 128, 64, 8)),
        (16384, (64, 128, 32, 8)),
    ],
)
def test_the_tiles_of_finish_are_those_that_were_fast(pixels, tile, monkeypatch):
    """Of block B1 in float16 on an H200."""
    monkeypatch.setattr(block, "INTERPRETED", False)
    found = block.product_tile(block._FINISH, pixels, 192, 132, torch.float16, "ieee")
    assert found == tile


class Counter:
    """Stands in for ``launch``: counts, and launches nothing."""

    def __init__(self, monkeypatch):
        self.kernels = []
        for module in (block, squeeze):
            monkeypatch.setattr(module, "launch", self)

    def __call__(self, kernel, programs, *arguments, **constants):
        self.kernels.append(kernel.fn.__name__.removesuffix("_kernel"))


def _meta(case, batch, size, dtype):
    from bench import static

    x = torch.empty(batch, case.channels, *size, dtype=dtype, device="meta")
    static.whole_block(x, case.heads, case.key_dim, case.values // case.heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("processors", [1, 132])
def test_at_most_five_launches(dtype, processors, monkeypatch):
    monkeypatch.setattr(squeeze, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(block, "multiprocessors", lambda device: processors)
    counter = Counter(monkeypatch)
    seen = set()
    for case in CASES.values():
        for size in (*case.maps.values(), (1, 1), (100, 3), (300, 300), (1024, 1024)):
            for batch in (1, 64, 256):
                counter.kernels.clear()
                _meta(case, batch, size, dtype)
                assert len(counter.kernels) <= 5
                seen.add(tuple(counter.kernels))
    four = ("project", "attend", "encode", "finish")
    assert seen == {four, ("project", "squeeze", *four[1:])}


def test_the_launches_that_are_counted_are_those_that_run(monkeypatch):
    """Nothing but kernels works on the map: no operator of torch in between."""
    counter = Counter(monkeypatch)
    run(make(), torch.randn(1, 16, 5, 6, device=DEVICE))
    assert counter.kernels == ["project", "attend", "encode", "finish"]


# --- memory ----------------------------------------------------------------------------------


@pytest.fixture
def carved(monkeypatch):
    """The sizes of every workspace."""
    sizes = []
    carve = block.carve

    def record(x, *parts):
        sizes.append(parts)
        return carve(x, *parts)

    monkeypatch.setattr(block, "carve", record)
    return sizes


def test_the_workspace_is_the_map_and_little_more(carved, monkeypatch):
    """Half of a 4x4 map, and a quarter at most where a large map is squeezed."""
    Counter(monkeypatch)
    for case in CASES.values():
        for size in case.maps.values():
            _meta(case, 64, size, torch.float16)
            (parts,) = carved
            carved.clear()
            of_the_map = 64 * size[0] * size[1] * case.projected
            more = sum(parts) - of_the_map
            assert (4 if max(size) > 16 else 2) * more <= of_the_map, (case, size)


def test_the_workspace_is_one_allocation(monkeypatch):
    module = make()
    x = torch.randn(1, 16, 5, 6, device=DEVICE)
    run(module, x)
    allocated = []
    for name, owner in (("new_empty", torch.Tensor), ("empty", torch), ("empty_like", torch)):
        original = getattr(owner, name)

        def counted(*arguments, original=original, **options):
            if options.get("device") != "meta":
                allocated.append(1)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)
    Counter(monkeypatch)
    run(module, x)
    assert len(allocated) == 2  # with the result


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_element_is_written_and_nothing_else(way, channels_last, dtype, force, monkeypatch):
    """Each part of the workspace and the result, full of NaN, between guard bands."""
    force(way)
    module = make(48, 16, 2).to(dtype)
    x = torch.randn(2, 48, 6, 9, device=DEVICE, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    run(module, x)  # folds
    guarded = Guarded(monkeypatch)
    monkeypatch.setattr(block, "carve", lambda x, *sizes: [x.new_empty(size) for size in sizes])
    out = run(module, x)
    # The interpreter allocates tensors of no element.
    guarded.blocks = [block for block in guarded.blocks if block.numel() > 2 * guarded.BAND]
    assert len(guarded.blocks) == 4
    if way == "squeezed" and dtype is not torch.float32:  # of which halves may look like NaN
        scratch = guarded.blocks.pop()
        assert (scratch[: guarded.BAND] == 12288.0).all()
        assert (scratch[-guarded.BAND :] == 12288.0).all()
        assert not scratch[guarded.BAND : -guarded.BAND].view(torch.float32).isnan().any()
    guarded.check()
    assert out.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_padding_is_never_read(way, force, monkeypatch):
    """Channels that are no multiple of 16 leave gaps of NaN in o and e."""
    force(way)
    module = make(7, 5, 3)
    x = torch.randn(2, 7, 6, 9, device=DEVICE)
    expected = run(module, x)
    Guarded(monkeypatch)
    monkeypatch.setattr(block, "carve", lambda x, *sizes: [x.new_empty(size) for size in sizes])
    assert torch.equal(run(module, x), expected)


# --- the contract ----------------------------------------------------------------------------


def arguments(module, x):
    folded = module._folds.get(module)
    weights = list(folded.weights(x.dtype, *x.shape[2:], backend="triton"))
    return x, weights, folded.heads, folded.key_dim, folded.activation_code, 0.0, folded.hard


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    module = make()
    x = torch.randn(2, 16, 5, 6, device=DEVICE)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        overload = torch.ops.seaattn_kernels.sea_attention.triton
        torch.library.opcheck(overload, arguments(module, x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    torch._dynamo.reset()
    module = make()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for width in (5, 6):
        x = torch.randn(2, 16, 4, width, device=DEVICE)
        torch.testing.assert_close(run(compiled, x), run(module, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    module = make()
    x = torch.randn(2, 16, 5, 6, device=DEVICE)
    with torch.autocast(DEVICE, dtype):
        out = run(module, x)
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), exact(module, x).float(), atol=0.1, rtol=0.1)


def test_follows_its_weights():
    module = make()
    x = torch.randn(1, 16, 5, 6, device=DEVICE)
    before = run(module, x)
    with torch.no_grad():
        module.pos_emb_rowq.pos_embed.mul_(2)
        module.proj_encode_column[1].bn.weight.mul_(-1)
    after = run(module, x)
    assert not torch.allclose(before, after, atol=1e-3)
    assert_right(module, x)


def test_the_same_bits_twice_and_from_threads():
    module = make(40, 10, 3)
    x = torch.randn(2, 40, 9, 8, device=DEVICE)
    expected = run(module, x)
    found = [None, None]

    def work(index):
        found[index] = run(module, x)

    # One after the other where Triton interprets: its state is the process's.
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
        if DEVICE == "cpu":
            thread.join()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, expected) for out in found)


def test_refusals():
    x = torch.randn(1, 16, 5, 6, device=DEVICE)
    with pytest.raises(RuntimeError, match="does not compute in float64"):
        run(make().double(), x.double())
    with pytest.raises(RuntimeError, match=r"heads of at most D, E = .*got \(16, 144\)"):
        run(make(16, 16, 1, 9), x)
    with torch.no_grad():
        folded = make()._folds.get(make())
    with pytest.raises(RuntimeError, match="no backward"):
        ops.sea_attention(x.requires_grad_(), folded, "triton")


def test_a_new_activation_layer_is_followed():
    module = make()
    module.act = make_activation("silu")
    x = torch.randn(1, 16, 5, 6, device=DEVICE)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this block"):
        run(module, x)
