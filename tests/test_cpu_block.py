"""The whole block in C++."""

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from seaattn_kernels import SeaAttention, budget, ops, reference, verify

pytestmark = pytest.mark.usefixtures("library")

LOW = (torch.float32, torch.bfloat16, torch.float16)
# Maps that are kept whole, maps that are not, and those in strips of columns.
SIZES = [(1, 1), (1, 17), (33, 1), (7, 7), (100, 3), (75, 100), (9, 1000), (260, 130), (1000, 9)]


def make(channels=16, key_dim=4, heads=2, ratio=2.0, activation="relu6", hard=True):
    module = SeaAttention(channels, key_dim, heads, ratio, activation, backend="cpu")
    if not hard:
        module.sigmoid = nn.Sigmoid()
    return verify.randomise(module).eval()


@torch.no_grad()
def run(module, x):
    return module(x)


@torch.no_grad()
def exact(module, x):
    return reference.sea_attention(copy.deepcopy(module).double(), x.double())


def assert_right(module, x, tolerance=2e-5):
    ours, truth = run(module, x), exact(module, x)
    assert not ours.isnan().any()
    torch.testing.assert_close(
        ours.double(), truth, atol=tolerance * max(1.0, float(truth.abs().max())), rtol=0
    )


def _layout(x, channels_last):
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


# --- the error budget ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", verify.BLOCK_CASES, ids=str)
def test_odd_shapes_keep_the_budget(case, dtype):
    verdict = verify.block_verdict(case, "cpu", dtype)
    assert verdict.ok, verdict


REAL = [(128, 16, 4, 7), (192, 24, 6, 8), (192, 16, 8, 16), (256, 20, 8, 14), (192, 16, 8, 33)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "key_dim", "heads", "side"), [*REAL, (64, 16, 4, 80)])
def test_real_shapes_keep_the_budget(channels, key_dim, heads, side, channels_last):
    module = make(channels, key_dim, heads)
    maps = [_layout(torch.randn(1, channels, side, side), channels_last) for _ in budget.SEEDS]
    with torch.no_grad():
        eager = [reference.sea_attention(module, x) for x in maps]
    verdict = budget.judge(
        [run(module, x) for x in maps], eager, [exact(module, x) for x in maps], torch.float32
    )
    assert verdict.ok, verdict


GOLDEN = {path.stem: verify.load_golden(path) for path in sorted(verify.GOLDEN.glob("*.npz"))}
BLOCKS = [name for name, golden in GOLDEN.items() if golden.meta["kind"] == "sea_attention"]
MODELS = [name for name in GOLDEN if name not in BLOCKS]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_golden_block_keeps_the_budget(name, dtype):
    golden = GOLDEN[name]
    module = golden.model("cpu").to(dtype).eval()
    x = golden.random("x").to(dtype)
    with torch.no_grad():
        eager = reference.sea_attention(module, x)
    verdict = budget.judge([run(module, x)], [eager], [golden.arrays["eval/out"]], dtype)
    assert verdict.ok, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_golden_model_keeps_the_budget(name, dtype):
    """The classifier and the segmenter: logits, and the outputs of the stages."""
    golden = GOLDEN[name]
    x = golden.random("x").to(dtype)
    found = {}
    for backend in ("cpu", "eager"):
        model = golden.model("cpu").to(dtype).eval()
        if backend == "eager":
            for module in model.modules():
                if isinstance(module, SeaAttention):
                    module.forward = lambda x, module=module: reference.sea_attention(module, x)
        with torch.no_grad():
            found[backend] = verify.stage_outputs(model, x)
    names = [name for name in golden.arrays if name in found["cpu"]]
    assert "logits" in names
    scale = {name: float(golden.arrays[name].abs().max()) for name in names}
    ours, eager, truth = (
        [table[name].double() / scale[name] for name in names]
        for table in (found["cpu"], found["eager"], golden.arrays)
    )
    verdict = budget.judge(ours, eager, truth, dtype)
    assert verdict.ok, verdict


# --- any size, layout, width -----------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_of_any_size(size, channels_last):
    assert_right(make(3, 10, 1), _layout(torch.randn(2, 3, *size), channels_last))


@pytest.mark.parametrize(
    ("channels", "key_dim", "heads", "ratio"),
    [
        (1, 2, 1, 0.5),
        (3, 2, 1, 2),
        (33, 10, 3, 1.5),
        (130, 20, 2, 1),
        (16, 24, 1, 2),
        (7, 64, 1, 2),
        (90, 3, 5, 3),
        (600, 16, 4, 2),
    ],
)
def test_channels_of_any_number(channels, key_dim, heads, ratio):
    assert_right(make(channels, key_dim, heads, ratio), torch.randn(2, channels, 5, 9), 4e-5)


@pytest.mark.parametrize("size", [(6, 5), (70, 80)], ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("hard", [True, False])
def test_activations_and_gates(activation, hard, size):
    module = make(activation=activation, hard=hard)
    assert_right(module, torch.randn(2, 16, *size))


def test_slope_of_a_leaky_relu():
    assert_right(make(activation=nn.LeakyReLU(0.3)), torch.randn(2, 16, 6, 5))


@pytest.mark.parametrize("size", [(5, 6), (80, 90)], ids=str)
def test_outside_the_map_the_depthwise_input_is_zero_and_not_the_bias(size):
    """A map of zeros: qkv is its bias everywhere, and only the halo makes pixels differ."""
    module = make()
    x = torch.zeros(1, 16, *size)
    assert_right(module, x)
    out = run(module, x)
    assert not torch.allclose(out[:, :, 0], out[:, :, 2], atol=1e-3)
    torch.testing.assert_close(
        out[:, :, 1:-1, 1:-1], out[:, :, 2:3, 2:3].expand(1, 16, size[0] - 2, size[1] - 2)
    )


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
    if kind == "channels of a wider map, NHWC":
        return _layout(torch.cat([x, x], dim=1), True)[:, c:]
    return _layout(x, True)


VIEWS = (
    "sliced",
    "transposed",
    "expanded",
    "same everywhere",
    "channels of a wider map",
    "channels of a wider map, NHWC",
    "NHWC",
)


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("size", [(5, 6), (1, 7), (7, 1), (1, 1), (70, 90)], ids=str)
def test_any_strides(kind, size):
    module = make()
    x = _view(torch.randn(2, 16, *size), kind)
    before = x.clone()
    assert_right(module, x)
    out = run(module, x)
    assert reference.is_channels_last(out) == reference.is_channels_last(x)
    assert out.is_contiguous() or reference.is_channels_last(out)
    assert torch.equal(x, before)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, n) for n in (3, 40, 30, 30)]),
    key_dim=st.integers(1, 20),
    heads=st.integers(1, 4),
    ratio=st.sampled_from([1, 1.5, 2]),
    dtype=st.sampled_from(LOW),
    kind=st.sampled_from(VIEWS),
    seed=st.integers(0, 2**31),
)
def test_any_block(shape, key_dim, heads, ratio, dtype, kind, seed):
    torch.manual_seed(seed)
    module = make(shape[1], key_dim + 1, heads, ratio).to(dtype)
    x = _view(torch.randn(shape), kind).to(dtype)
    assert_right(module, x, 8 * torch.finfo(dtype).eps + 2e-5)


def test_empty_batch():
    out = run(make(), torch.randn(0, 16, 5, 6))
    assert out.shape == (0, 16, 5, 6)


@pytest.mark.parametrize("size", [(7, 9), (70, 80)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["relu6", "silu", "relu", "leaky_relu"])
def test_nan_and_infinity_go_where_eager_sends_them(value, activation, size):
    module = make(activation=activation)
    x = torch.randn(2, 16, *size)
    x[1, 3, 2, 4] = value
    with torch.no_grad():
        eager = reference.sea_attention(module, x)
    out = run(module, x)
    assert torch.equal(out.isnan(), eager.isnan())
    assert out[0].isfinite().all()
    assert out[1].isnan().any()


# --- threads and memory ----------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 7, 7), (1, 1, 1), (3, 14, 13), (1, 75, 100), (5, 70, 90), (1, 300, 9)], ids=str
)
def test_the_same_bits_on_any_number_of_threads(shape, channels_last, dtype, threads):
    batch, height, width = shape
    module = make(40, 10, 3).to(dtype)
    x = _layout(torch.randn(batch, 40, height, width), channels_last).to(dtype)
    threads(1)
    expected = run(module, x)
    assert torch.equal(run(module, x), expected)
    for count in (2, 3, 4, 7, 64):
        threads(count)
        assert torch.equal(run(module, x), expected), count


def test_an_image_has_the_same_bits_in_any_batch():
    module = make(40, 10, 3)
    x = torch.randn(3, 40, 9, 8)
    alone = torch.cat([run(module, x[i : i + 1]) for i in range(3)])
    assert torch.equal(run(module, x), alone)
    assert torch.equal(run(module, _layout(x, True)), alone)


def test_four_threads_on_one_module():
    module = make(40, 10, 3)
    maps = [torch.randn(1 + i, 40, 9 + i, 8) for i in range(4)]
    expected = [run(module, x) for x in maps]
    wrong = []

    def work(i):
        for k in range(40):
            i = (i + k) % 4
            if not torch.equal(run(module, maps[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_memory_full_of_nan_does_not_show(size, channels_last, dtype, threads):
    """What the result and the scratch hold before the call, and what lies past an axis."""
    module = make(7, 5, 3).to(dtype)
    x = _layout(torch.randn(2, 7, *size), channels_last).to(dtype)
    expected = run(module, x)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        assert torch.empty(8).isnan().all()
        for count in (1, 3):
            threads(count)
            assert torch.equal(run(module, x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


# --- the contract ----------------------------------------------------------------------------


def arguments(module, x):
    folded = module._folds.get(module)
    weights = list(folded.weights(x.dtype, *x.shape[2:], backend="cpu"))
    return [x, weights, folded.heads, folded.key_dim, folded.activation_code, 0.0, folded.hard]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last, dtype):
    module = make()
    x = _layout(torch.randn(2, 16, 5, 6), channels_last).to(dtype)
    with torch.no_grad():
        overload = torch.ops.seaattn_kernels.sea_attention.cpu
        torch.library.opcheck(overload, arguments(module, x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    torch._dynamo.reset()
    module = make()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for width in (5, 6):
        x = torch.randn(2, 16, 4, width)
        torch.testing.assert_close(run(compiled, x), run(module, x))  # folds in the graph


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    module = make()
    x = torch.randn(2, 16, 5, 6)
    with torch.autocast("cpu", dtype):
        out = run(module, x)
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), exact(module, x).float(), atol=0.1, rtol=0.1)


def test_auto_takes_it():
    module = make()
    x = torch.randn(1, 16, 5, 6)
    expected = run(module, x)
    module.backend = "auto"
    assert torch.equal(run(module, x), expected)
    assert ops.choose("sea_attention", "auto", x.device, x.dtype) == "cpu"


def test_follows_its_weights():
    module = make()
    x = torch.randn(1, 16, 5, 6)
    before = run(module, x)
    with torch.no_grad():
        module.pos_emb_rowq.pos_embed.mul_(2)
        module.proj_encode_column[1].bn.weight.mul_(-1)
    assert not torch.allclose(before, run(module, x), atol=1e-3)
    assert_right(module, x)


def test_refusals():
    x = torch.randn(1, 16, 5, 6)
    with pytest.raises(RuntimeError, match="does not compute in float64"):
        run(make().double(), x.double())
    with torch.no_grad():
        folded = make()._folds.get(make())
    with pytest.raises(RuntimeError, match="no backward"):
        ops.sea_attention(x.requires_grad_(), folded, "cpu")


@torch.no_grad()
def test_the_kernel_checks_what_it_is_given():
    """Also where nothing in Python did."""
    overload = torch.ops.seaattn_kernels.sea_attention.cpu
    module = make()
    good = arguments(module, torch.randn(1, 16, 5, 6))
    assert overload(*good).shape == (1, 16, 5, 6)

    def call(index, value):
        return overload(*good[:index], value, *good[index + 1 :])

    for x, words in (
        (torch.randn(16, 5, 6), "must be"),
        (torch.randn(1, 16, 0, 6), "must be"),
        (torch.randn(1, 15, 5, 6), "qkv_weight"),
        (torch.randn(1, 16, 50, 6), "position"),
        (torch.randn(1, 16, 5, 6).double(), "not implemented for 'Double'"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call(0, x)
    weights = good[1]
    with pytest.raises(RuntimeError, match="eleven"):
        call(1, weights[:-1])
    for k, weight in enumerate(weights):
        for wrong in (weight.double(), weight[1:], weight.new_zeros(1).expand(weight.shape)):
            with pytest.raises(RuntimeError, match="sea_attention: "):
                call(1, [*weights[:k], wrong, *weights[k + 1 :]])
    for index, value in ((2, 0), (2, 3), (3, 0), (3, 5), (4, 5), (4, -1)):
        with pytest.raises(RuntimeError, match="sea_attention: "):
            call(index, value)
