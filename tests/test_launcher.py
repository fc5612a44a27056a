"""The launches of the block, recorded in Python and repeated by the library.

Without a GPU a stand-in for the driver calls back, and the interpreter runs what was launched.
"""

import ctypes
import os
import subprocess
import sys
import threading
from collections import defaultdict
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from seaattn_kernels import SeaAttention, verify
from seaattn_kernels.kernels import block, launch, squeeze

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the driver is real")

ROOT = Path(__file__).parents[1]
LOW = (torch.float16, torch.bfloat16, torch.float32)
WAYS = ("direct", "squeezed")
KERNELS = {
    block: ("project_kernel", "attend_kernel", "encode_kernel", "finish_kernel"),
    squeeze: ("squeeze_kernel",),
}
#: What a parameter of a kernel is in memory, by its type to Triton.
TYPES = {"*": ctypes.c_void_p, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)


def read(parameters, kinds):
    """The values of the parameters, after which come two scratches that must be null."""
    types = [TYPES[kind if kind in TYPES else kind[0]] for kind in kinds if kind != "constexpr"]
    *values, one, other = (
        type_.from_address(parameters[at]).value
        for at, type_ in enumerate([*types, ctypes.c_void_p, ctypes.c_void_p])
    )
    assert one is None
    assert other is None
    return values


class Described:
    """An interpreted kernel that is described as a compiled one would be."""

    def __init__(self, name, kernel, driver):
        self.name, self.kernel, self.driver = name, kernel, driver

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            if not self.driver.dry:
                self.kernel[grid](*arguments, **constants)
            return self.driver.describe(self.name, self.kernel, arguments, constants)

        return run


def kind_of(argument):
    if isinstance(argument, Tensor):
        return "*"
    if isinstance(argument, float):
        return "fp32"
    return "constexpr" if argument == 1 else "i64" if argument >= 2**31 else "i32"


class Driver:
    """Of Triton: describes ``kernels``. Of CUDA: notes what was ``launched``, and runs it.

    ``dry``: run nothing. ``answers``: of the launches to come, 0 where there is none.
    """

    def __init__(self, path):
        self.kernels, self.launched, self.answers, self.dry = [], [], [], False
        self.metadata = {"num_ctas": 1, **dict.fromkeys(launch._NEEDS, 0)}
        self.maps = defaultdict(list)  # the addresses of x, by thread
        self.lock = threading.Lock()
        self.callback = _LAUNCH(self.launch)
        ctypes.CDLL(path).set_launch(self.callback)

    def describe(self, name, kernel, arguments, constants):
        kinds = [kind_of(argument) for argument in arguments]
        parameters = sum(kind != "constexpr" for kind in kinds) + 2
        with self.lock:
            self.kernels.append((name, kernel, kinds, arguments, constants))
            handle = len(self.kernels)
        numbers = {"num_warps": constants["num_warps"], "shared": 1000 + handle, **self.metadata}
        signature = {**{str(at): kind for at, kind in enumerate(kinds)}, "BLOCK": "constexpr"}
        return SimpleNamespace(
            function=handle,
            metadata=SimpleNamespace(**numbers),
            src=SimpleNamespace(signature=signature),
            asm={"ptx": f"// .param\n.entry k({'.param .b64 p,' * parameters}) {{ .param }}"},
        )

    def launch(self, function, programs, threads, shared, stream, parameters):
        name, kernel, kinds, arguments, constants = self.kernels[function - 1]
        self.launched.append((programs, threads, stream))
        values = read(parameters, kinds)
        if name == "project_kernel":
            self.maps[threading.get_ident()].append(values[0])
        if shared != 1000 + function or threads != 32 * constants["num_warps"]:
            return 1
        if not self.dry:
            kernel[(programs,)](*restored(kinds, arguments, values), **constants)
        return self.answers.pop(0) if self.answers else 0


def restored(kinds, recorded, values):
    """Arguments from parameters; of what was recorded only dtypes, and the number 1."""
    values = iter(values)
    for kind, argument in zip(kinds, recorded, strict=True):
        if kind == "*":  # as much of it as has an address
            memory = (ctypes.c_char * 64).from_address(next(values))
            yield torch.frombuffer(memory, dtype=argument.dtype)
        else:
            yield argument if kind == "constexpr" else next(values)


def define():
    """The schema of the library's kernel for CPU tensors."""
    library = torch.library.Library("seaattn_kernels", "FRAGMENT")
    schema = str(torch.ops.seaattn_kernels.sea_attention.triton._schema).partition("(")[2]
    library.define(f"sea_attention.launched({schema}")
    return library


# One for the process, whatever tests come between these: the library keeps to the driver that it
# found first.
@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    compiler = os.environ.get("CXX", "g++").split()
    command = [*compiler, "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "tests/driver.cpp"]
    subprocess.run([*command, "-o", path], cwd=ROOT, check=True, timeout=60)
    return str(path)


@pytest.fixture(scope="module")
def schema():
    library = define()
    yield
    library._destroy()


@pytest.fixture
def driver(library, stand_in, schema, monkeypatch):
    driver = Driver(stand_in)
    for module, names in KERNELS.items():
        for name in names:
            described = Described(name, getattr(module, name), driver)
            monkeypatch.setattr(module, name, described)
    return driver


@pytest.fixture
def plans(monkeypatch):
    """The plans that Python made."""
    found = []
    plan = launch.plan
    monkeypatch.setattr(launch, "plan", lambda *a: found.append(plan(*a)) or found[-1])
    return found


def arguments_of(x, key_dim=4):
    """The weights and numbers of a random block for a map."""
    _, channels, height, width = x.shape
    module = verify.randomise(SeaAttention(channels, key_dim, 2)).to(x.dtype).eval()
    with torch.no_grad():
        folded = module._folds.get(module)
    return (
        list(folded.weights(x.dtype, height, width, "triton")),
        folded.heads,
        folded.key_dim,
        folded.activation_code,
        folded.negative_slope,
        folded.hard,
    )


def launched(x, *arguments):
    return torch.ops.seaattn_kernels.sea_attention.launched(x, *arguments)


def in_python(x, *arguments):
    return torch.ops.seaattn_kernels.sea_attention.triton(x, *arguments)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_repeated_launches_give_the_same_bits(way, dtype, driver, plans, monkeypatch):
    monkeypatch.setattr(block, "plan", lambda *arguments: way)
    launches = 4 if way == "direct" else 5
    layout = torch.channels_last if way == "squeezed" else torch.contiguous_format
    for call in range(2):
        x = torch.randn(2, 16, 5, 6 + WAYS.index(way)).to(dtype, memory_format=layout)
        arguments = arguments_of(x)
        out = launched(x, *arguments)
        assert len(plans) == 1, "only the first call is Python's"
        assert len(driver.launched) == launches * call
        expected = in_python(x, *arguments)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
    assert all(programs > 0 and stream is None for programs, _, stream in driver.launched)


def test_a_map_that_is_copied_first(driver, plans):
    for call in range(2):
        x = torch.randn(1, 16, 4, 9)[:, :, :, 2:7]
        arguments = arguments_of(x)
        assert torch.equal(launched(x, *arguments), in_python(x, *arguments))
        assert len(plans) == 1
        assert len(driver.launched) == 4 * call


# --- which calls are like one before ---------------------------------------------------------


def moved(x):
    """The same values, at an address that is no multiple of 16."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


CHANGES = {
    "shape": lambda x, weights: (torch.randn(1, 16, 8, 3), weights),
    "strides": lambda x, weights: (x.to(memory_format=torch.channels_last), weights),
    "dtype": lambda x, weights: (x.half(), weights),
    "alignment": lambda x, weights: (moved(x), weights),
    "alignment of a weight": lambda x, weights: (
        x,
        [*weights[:5], moved(weights[5]), *weights[6:]],
    ),
    "type of a weight": lambda x, weights: (x, [*weights[:5], weights[5].double(), *weights[6:]]),
    "two weights that are one": lambda x, weights: (x, [*weights[:3], weights[1], *weights[4:]]),
    "nothing": lambda x, weights: (x, weights),
    "values": lambda x, weights: (torch.randn_like(x), arguments_of(x)[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_of_another_kind_is_recorded_anew(change, driver, plans):
    driver.dry = True
    x = torch.randn(1, 16, 3, 8)
    weights, *numbers = arguments_of(x)
    numbers[3] = 2.0 + list(CHANGES).index(change)  # which makes a first call of each
    launched(x, weights, *numbers)
    assert len(plans) == 1
    x, weights = CHANGES[change](x, weights)
    launched(x, weights, *numbers)
    assert len(plans) == (1 if change in ("nothing", "values") else 2)
    launched(x, weights, *numbers)
    assert len(plans) <= 2


@pytest.mark.parametrize("at", range(5))
def test_other_numbers_are_recorded_anew(at, driver, plans, monkeypatch):
    monkeypatch.setattr(block, "sea_attention", lambda x, weights, *rest: rest[-2])
    monkeypatch.setattr(launch, "plan", lambda *arguments: plans.append(arguments) or [16])
    x = torch.randn(1, 16, 3, 8)
    first = [2, 4, 1, 3.0 + 2 * at, True]
    second = [2, 4, 1, 3.0 + 2 * at, True]
    second[at] = False if at == 4 else second[at] + 1
    for numbers, recorded in ((first, 1), (second, 2), (first, 2), (second, 2)):
        launched(x, [x], *numbers)
        assert len(plans) == recorded


@pytest.mark.parametrize("switch", [torch.backends.cuda.matmul, torch.backends.cudnn.conv])
def test_the_switches_of_tf32_are_followed(switch, driver, plans, monkeypatch):
    driver.dry = True
    x = torch.randn(1, 16, 3, 9)
    weights, *numbers = arguments_of(x)
    numbers[3] = 2.0 if switch is torch.backends.cuda.matmul else 3.0
    for precision, recorded in (("ieee", 1), ("tf32", 2), ("ieee", 2), ("tf32", 2)):
        monkeypatch.setattr(switch, "fp32_precision", precision)
        launched(x, weights, *numbers)
        assert len(plans) == recorded


def test_plans_are_kept_for_the_last_maps(driver, plans, monkeypatch):
    monkeypatch.setattr(block, "sea_attention", lambda x, weights, *rest: rest[-2])
    monkeypatch.setattr(launch, "plan", lambda *arguments: plans.append(arguments) or [16])
    x = torch.randn(1, 16, 3, 10)

    def call(slope):
        launched(x, [x], 2, 4, 1, slope, True)
        return len(plans)

    assert call(0.0) == call(0.0) == 1
    for slope in range(1, 1025):
        call(float(slope))
    assert call(1024.0) == 1025
    assert call(0.0) == 1026


# --- what is not repeated --------------------------------------------------------------------


def assert_not_repeated(x, driver, plans):
    arguments = arguments_of(x)
    for calls in (1, 2):
        out = launched(x, *arguments)
        assert plans == [[]] * calls
    assert not driver.launched
    assert torch.equal(out, in_python(x, *arguments))


@pytest.mark.parametrize("need", [*launch._NEEDS, "num_ctas", "of another version", "parameters"])
def test_kernels_that_need_more_than_a_launch_gives(need, driver, plans, monkeypatch):
    if need == "parameters":
        monkeypatch.setattr(launch, "_parameters", lambda compiled: 3)
    elif need == "of another version":
        monkeypatch.setattr(launch, "_NEEDS", (*launch._NEEDS, "scratch_of_the_future"))
    else:
        driver.metadata[need] = 2
    assert_not_repeated(torch.randn(1, 16, 3, 4), driver, plans)


def test_an_empty_batch(driver, plans):
    assert_not_repeated(torch.randn(0, 16, 3, 5), driver, plans)


def test_numbers_that_no_kernel_takes_here():
    assert launch._bits(-1.5, "fp32") & 0xFFFFFFFF == 0xBFC00000
    assert launch._bits(2**40, "i64") == 2**40
    assert launch._bits(1.0, "fp64") is None


def test_only_the_launches_of_the_thread_are_recorded():
    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: None

    def work():
        launch.launch(Kernel(), 2, x)

    x = torch.zeros(1)
    with launch.recording() as launches:
        work()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    work()
    assert launches == [(None, (2, 1, 1), (x,))]


# --- errors and threads ----------------------------------------------------------------------


def test_an_error_of_the_driver_is_raised(driver):
    x = torch.randn(1, 16, 3, 11)
    arguments = arguments_of(x)
    launched(x, *arguments)
    driver.answers = [0, 700]
    message = r"launch 2 of 4 \(.* threads, .*\) failed: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"
    with pytest.raises(RuntimeError, match=message):
        launched(x, *arguments)
    assert len(driver.launched) == 2
    assert torch.equal(launched(x, *arguments), in_python(x, *arguments))


def test_two_threads_at_once(driver, plans):
    """Each launches on its own map, one of a new size among them now and then."""
    driver.dry = True
    maps = {}
    start = threading.Barrier(2)  # so that they are two: a name is given anew after an end

    def work(height):
        start.wait()
        mine = maps[threading.get_ident()] = []
        for call in range(40):
            x = torch.randn(1, 16, height, 12 + call // 10)
            launched(x, *arguments[x.shape])
            mine += [x] * (call % 10 > 0)  # that of a first call is not the driver's

    arguments = {}
    for height in (2, 3):
        for width in range(12, 16):
            x = torch.randn(1, 16, height, width)
            arguments[x.shape] = arguments_of(x)
    threads = [threading.Thread(target=work, args=(height,)) for height in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 8
    for thread, mine in maps.items():
        assert driver.maps[thread] == [x.data_ptr() for x in mine]


# --- as Triton compiles it -------------------------------------------------------------------


def hold_against_triton(path, way, dtype):
    """Compile for sm_90; what the library launches is what Triton was about to.

    In a process of its own, where nothing is interpreted.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    given, found = [], []

    class Launcher:
        def __init__(self, source, metadata):
            self.kinds = list(source.signature.values())

        def __call__(self, x, y, z, stream, function, packed, launch, enter, leave, *arguments):
            warps, _, shared = packed
            given.append(((function, x, 32 * warps, shared), self.kinds, arguments))

    class TritonDriver:
        launcher_cls = Launcher
        handles = count(4096)
        utils = SimpleNamespace(
            load_binary=lambda *_: (None, next(TritonDriver.handles), 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    @_LAUNCH
    def on_launch(function, programs, threads, shared, stream, parameters):
        values = read(parameters, given[len(found)][1])
        found.append(((function, programs, threads, shared), values))
        return 0

    driver.set_active(TritonDriver())
    launch.capability = lambda device: (9, 0)
    block.plan = lambda *arguments: way
    ctypes.CDLL(path).set_launch(on_launch)
    library = define()
    calls = []
    for _ in range(2):
        x = torch.randn(2, 32, 5, 9).to(getattr(torch, dtype))
        arguments = arguments_of(x, key_dim=16)
        calls.append([x, *arguments[0], launched(x, *arguments)])
    library._destroy()
    ours = {id(before): now.data_ptr() for before, now in zip(*calls, strict=True)}
    workspaces = set()
    assert len(given) == len(found) == (4 if way == "direct" else 5)
    for (launch_given, kinds, arguments), (launch_found, values) in zip(given, found, strict=True):
        assert launch_given == launch_found
        pairs = zip(kinds, arguments, strict=True)
        passed = [argument for kind, argument in pairs if kind != "constexpr"]
        for argument, value in zip(passed, values, strict=True):
            if not isinstance(argument, Tensor):
                single = ctypes.c_float(argument).value
                assert value == (single if isinstance(argument, float) else argument)
            elif id(argument) in ours:
                assert value == ours[id(argument)]
            else:
                offset = argument.data_ptr() - argument.untyped_storage().data_ptr()
                workspaces.add(value - offset)
    assert len(workspaces) == 1
    assert not workspaces & set(ours.values())


@pytest.mark.parametrize(
    ("way", "dtype"), [("direct", "float16"), ("squeezed", "float32"), ("squeezed", "bfloat16")]
)
def test_what_is_launched_is_what_triton_launches(way, dtype, library, stand_in):
    code = f"import test_launcher as t; t.hold_against_triton({stand_in!r}, {way!r}, {dtype!r})"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
