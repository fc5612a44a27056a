"""SyncBatchNorm in the attention and DistributedDataParallel: two gloo processes on the CPU."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from seaattn_kernels import SeaAttention, native, reference, verify

PROCESSES = 2
#: Images of each process.
EVEN, UNEVEN, ONE_EMPTY = (3, 3), (4, 1), (5, 0)
TOLERANCES = {"reference": 1e-10, "cpu": 2e-4}


class Model(nn.Module):
    """A stem, two blocks with residual connections, a head: no norm but those of the blocks."""

    def __init__(self, norm, backend):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.blocks = nn.ModuleList(
            [SeaAttention(16, 4, 2, norm_cfg={"type": norm}, backend=backend) for _ in range(2)]
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def make(norm, backend):
    model = verify.randomise(Model(norm, backend)).train()
    return model.double() if backend == "reference" else model


def data(model, images, seed):
    """Images and classes of one step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, 14, 12, generator=generator, dtype=torch.float64)
    return x.to(model.head.weight.dtype), torch.randint(5, (images,), generator=generator)


def state(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def train(model, forward, part=slice(None)):
    """Losses of three steps, and gradients and statistics after the last."""
    images = sum(EVEN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for seed in range(3):
        x, target = data(model, images, seed)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(x[part]), target[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **state(model)}


def one_block(block, x, upstream):
    """Output, gradients and statistics of a step; gradients are sums over the processes."""
    x = x.requires_grad_()
    out = block(x)
    out.backward(upstream)
    found = {"out": out.detach(), "x": x.grad}
    for name, parameter in block.named_parameters():
        if dist.is_initialized():
            dist.all_reduce(parameter.grad)
        found[name] = parameter.grad
    return found | dict(block.named_buffers())


def block_data(images):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, images, 16, 5, 6, generator=generator, dtype=torch.float64)


def part_of(rank, counts):
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def process(rank, folder, backends):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    for backend in backends:
        model = make("BN", backend)
        parallel = DistributedDataParallel(model)
        # After the wrapping, which refuses a SyncBatchNorm on a CPU.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        found = train(model, parallel, part_of(rank, EVEN))
        torch.save(found, f"{folder}/{backend}-{rank}.pt")
    for counts in (UNEVEN, ONE_EMPTY):
        block = verify.randomise(SeaAttention(16, 4, 2, norm_cfg={"type": "SyncBN"})).double()
        x, upstream = (t[part_of(rank, counts)].clone() for t in block_data(sum(counts)))
        torch.save(one_block(block, x, upstream), f"{folder}/{counts}-{rank}.pt")
    frozen = make("SyncBN", "reference")
    for module in frozen.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()
    x, _ = data(frozen, sum(EVEN), 0)
    torch.save(frozen(x[part_of(rank, EVEN)]).detach(), f"{folder}/frozen-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    backends = [name for name in TOLERANCES if name != "cpu" or native.REASON is None]
    multiprocessing.spawn(process, (str(folder), backends), nprocs=PROCESSES)
    return lambda name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(PROCESSES)]


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", TOLERANCES)
def test_two_processes_train_as_one_with_the_joined_batch(results, backend, request):
    """Losses, gradients, running statistics; without ``find_unused_parameters``."""
    if backend == "cpu":
        request.getfixturevalue("library")
    model = make("BN", backend)
    eager = copy.deepcopy(model)
    for block in eager.blocks:
        block.forward = lambda x, block=block: reference.sea_attention(block, x)
    expected = train(eager, eager)
    first, second = results(backend)
    joined = (first.pop("losses") + second.pop("losses")) / 2
    torch.testing.assert_close(joined, expected.pop("losses"), rtol=0, atol=TOLERANCES[backend])
    assert_same(first, expected, TOLERANCES[backend])
    for name, value in first.items():
        if "running" in name:
            assert torch.equal(value, second[name]), f"{name} differs between the processes"


@pytest.mark.parametrize("counts", [UNEVEN, ONE_EMPTY], ids=str)
def test_processes_may_have_different_numbers_of_images(results, counts):
    block = verify.randomise(SeaAttention(16, 4, 2)).double()
    x, upstream = (t.clone() for t in block_data(sum(counts)))
    expected = one_block(block, x, upstream)
    parts = results(str(counts))
    for name in ("out", "x"):
        joined = torch.cat([part.pop(name) for part in parts])
        torch.testing.assert_close(joined, expected.pop(name), rtol=0, atol=1e-11)
    for part in parts:
        assert_same(part, expected, 1e-11)


def test_frozen_statistics_stay_those_of_each_process(results):
    model = make("BN", "reference").eval()
    x, _ = data(model, sum(EVEN), 0)
    torch.testing.assert_close(torch.cat(results("frozen")), model(x).detach(), rtol=0, atol=1e-11)
