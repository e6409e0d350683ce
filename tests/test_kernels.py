"""What GPUs run instead of torch's operations: attention over short sequences, dropout by a hash."""

import os
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condenser.models import short_attention as short
from condenser.models.attention import bounds_of
from condenser.models.dropout import Seeds, drawn, drop, hashed

BEGINS = [0, 5, 5, 133, 200, 201]  # an empty sequence, one of 128 tokens, one of a single token


def outputs_and_gradients(attention, states, pull):
    states = states.clone().requires_grad_()
    context = attention(states)
    context.backward(pull)
    return [context.detach().double(), states.grad.double()]


def one_by_one(states):
    rows = [states[a:b].transpose(0, 2) for a, b in pairwise(BEGINS) if b > a]  # [A, 3, L, D]
    return torch.cat([F.scaled_dot_product_attention(*row.unbind(1)).transpose(0, 1) for row in rows])


def check_against_torch(device, dtype, size, tolerance):
    """Of each sequence alone, in fp64; tolerance: of the relative error of outputs and gradients as a whole."""
    torch.manual_seed(0)
    states = torch.randn(BEGINS[-1], 3, 2, size).to(dtype)
    pull = torch.randn(BEGINS[-1], 2, size).to(dtype)
    bounds = torch.tensor(BEGINS, dtype=torch.int32, device=device)
    found = outputs_and_gradients(lambda each: short.short_attention(each, bounds), states.to(device), pull.to(device))
    for ours, right in zip(found, outputs_and_gradients(one_by_one, states.double(), pull.double()), strict=True):
        assert float((ours.cpu() - right).norm() / right.norm()) < tolerance, (device, dtype, size)


@pytest.mark.skipif(short.triton is None, reason="triton is not installed")
def test_attention_over_short_sequences_equals_torchs_over_each_alone():
    """On a CPU, where triton interprets its kernels if it is told so before they are made."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    calls = [("float32", 64, 1e-5), ("float16", 16, 2e-3)]
    program = "import test_kernels, torch\n" + "\n".join(
        f"test_kernels.check_against_torch('cpu', torch.{dtype}, {size}, {tolerance})"
        for dtype, size, tolerance in calls
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("size", short.SIZES)
def test_on_a_gpu_attention_over_short_sequences_equals_torchs(size):
    check_against_torch("cuda", torch.bfloat16, size, 5e-3)


@pytest.mark.parametrize(("device", "longest", "size"), [("cpu", 40, 64), ("cuda", 136, 64), ("cuda", 40, 80)])
def test_other_devices_sequences_and_heads_are_left_to_torch(device, longest, size):
    assert not short.is_short(torch.device(device), longest, size)


@pytest.fixture
def dropouts():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Dropout(0.1))
    Seeds(model).draw()
    return model[1:]


@pytest.mark.parametrize("way", ["compiled", "cpu"])
def test_each_state_is_dropped_with_its_probability_whatever_its_place_module_and_pass(dropouts, way):
    n, shape = 3_000_000, torch.Size((4000, 750))

    def kept(module, p=0.1):
        return hashed(module.seed, shape, p) if way == "compiled" else drawn(shape, p)

    first, second = (kept(module).double() - 0.9 for module in dropouts)
    noise = (0.09 / n) ** 0.5
    assert abs(first.mean()) < 4 * noise
    assert abs((first * second).mean()) < 4 * 0.09 / n**0.5  # of two modules: not correlated
    for apart in (1, 2, 4, 8, 32, 64, 750, 1024):
        flat = first.flatten()
        assert abs((flat[apart:] * flat[:-apart]).mean()) < 4.5 * 0.09 / n**0.5
    for axis in (0, 1):  # rows and columns differ by chance alone
        means = first.mean(axis)
        assert means.var() * shape[axis] / 0.09 == pytest.approx(1, abs=4.5 * (2 / len(means)) ** 0.5)
    assert kept(dropouts[0], 0.0).all()
    assert kept(dropouts[0], 1.0).double().mean() < 1e-4
    Seeds(dropouts.append(nn.Linear(1, 1))).draw()  # the next pass
    assert abs((first * (kept(dropouts[0]).double() - 0.9)).mean()) < 4 * 0.09 / n**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_dropout_of_a_cpu_is_the_generators_and_keeps_the_mean_forwards_and_backwards(dropouts, p, dtype):
    dropouts[0].p = p
    states = torch.ones(333, 77, dtype=dtype, requires_grad=True)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(drop(states, dropouts[0]))
    assert outputs[0].dtype == dtype
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2]) == (p != 0.1)
    outputs[0].backward(outputs[0].detach())
    scale = 1 / (1 - p) if p < 1 else 0.0
    torch.testing.assert_close(states.grad, outputs[0].detach() * scale)
    assert set(outputs[0].unique().tolist()) <= {0.0, torch.tensor(scale, dtype=dtype).item()}
    assert outputs[0].mean().item() == pytest.approx(float(p < 1), abs=0.02)
    assert drop(states, dropouts[0].eval()) is states


def test_seeds_of_a_pass_come_from_the_generator_and_are_all_different(dropouts):
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        seeds = Seeds(nn.Sequential(nn.Linear(1, 1), *(nn.Dropout(0.1) for _ in range(50))))
        seeds.draw()
        found.append(seeds.values[:, :2].tolist())
    assert found[0] == found[1] != found[2]
    assert len({tuple(each) for each in found[0] + found[2]}) == 100


@pytest.mark.parametrize("p", [0.1, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.0, 1.0))])
def test_compiled_dropout_drops_the_same_forwards_and_backwards(dropouts, p):
    dropouts[0].p = p
    states = torch.randn(300, 64, requires_grad=True)
    compiled = torch.compile(drop, dynamic=False, fullgraph=True)
    output = compiled(states, dropouts[0])
    output.sum().backward()
    keep = hashed(dropouts[0].seed, states.shape, p)
    expected = torch.where(keep, 1 / (1 - p) if p < 1 else 0.0, 0.0)
    torch.testing.assert_close(output, states * expected)
    torch.testing.assert_close(states.grad, expected.expand_as(states))
    dropouts.eval()
    assert torch.equal(compiled(states, dropouts[0]), states)


@pytest.mark.parametrize("longest", [24, pytest.param(128, marks=pytest.mark.slow)])
def test_what_a_decoder_sees_is_the_same_compiled(longest):
    """The hash's products would wrap around in 32 bits, which C++ leaves undefined: by 24 it went another way."""
    from condenser.models.retromae import RetroMAE  # which takes seconds, in the process of the interpreter too

    decoder = SimpleNamespace(decoder_mask_rate=0.7)
    rows = bounds_of(torch.arange(4) * longest, longest, 3 * longest, kernel=False)
    keys = torch.randint(-(2**31), 2**31, (3,), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda keys: RetroMAE.seen(decoder, keys, rows), dynamic=False, fullgraph=True)
    assert torch.equal(compiled(keys), RetroMAE.seen(decoder, keys, rows))
