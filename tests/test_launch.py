"""Quick launches of kernels: as Triton's own ones, whatever the arguments are; on a CUDA device.

python -m pytest tests/test_launch.py -m gpu
"""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter launches nothing: needs a GPU"),
]
pytest.importorskip("triton", reason="the kernels need Triton, which comes with torch for CUDA on Linux")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.jit import KernelInterface  # noqa: E402

from bhlib.kernels.launch import KNOWN_VERSIONS, QuickKernel, quick  # noqa: E402


@triton.jit
def _scale(x_ptr, out_ptr, width, stride, factor, ROWS: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """``factor * x + SHIFT`` of ROWS rows, which are `stride` apart."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * stride + column, mask=column < width, other=0.0)
        tl.store(out_ptr + row * width + column, factor * x + SHIFT, mask=column < width)


def check(kernel, x, factor=2.0, shift=1):
    """Launch once; the result must be what torch gives."""
    rows, width = x.shape
    out = torch.zeros(rows, width, dtype=x.dtype, device=x.device)
    kernel[(triton.cdiv(width, 64),)](x, out, width, x.stride(0), factor, ROWS=rows, BLOCK=64, SHIFT=shift, num_warps=1)
    assert torch.equal(out, factor * x + shift)
    return out


@pytest.fixture
def own_launches(monkeypatch):
    """How many launches were Triton's own."""
    launches = []

    def launch(kernel, grid, own=KernelInterface.__getitem__):
        launches.append(kernel)
        return own(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    return launches


def numbers(rows, width, dtype=torch.float32):
    return torch.arange(rows * width, device="cuda").reshape(rows, width).to(dtype)


def test_only_the_first_launch_of_a_kind_is_tritons_own(own_launches):
    kernel = quick(_scale)
    for factor in (2.0, 3.0, 0.5):
        check(kernel, numbers(3, 192), factor)
        check(kernel, numbers(3, 320), factor)  # a multiple of 16, too
    assert len(own_launches) == 1


def test_what_triton_compiles_another_kernel_for_is_another_kind(own_launches):
    """Each of these alone, after the first: a kernel that was compiled for the first would compute or read amiss."""
    kernel = quick(_scale)
    wide = numbers(3, 512)
    kinds = [
        (wide[:, :192], {}),
        (wide[:, 1:193], {}),  # not at a multiple of 16 bytes
        (wide[:, :190], {}),  # width no multiple of 16
        (numbers(3, 192 + 8)[:, :192], {}),  # the stride is none
        (wide[:2, :192], {}),  # a constant
        (wide[:, :192], {"shift": 2}),
        (wide[:, :192].to(torch.float16), {}),
        (wide[:, :1], {}),  # width 1 is a constant for Triton
        (wide[:, :192], {"factor": 2}),  # an integer
    ]
    for number, (x, options) in enumerate(kinds, 1):
        for _ in range(2):
            check(kernel, x, **options)
        assert len(own_launches) == number, number
    for x, options in kinds:
        check(kernel, x, **options)
    assert len(own_launches) == len(kinds)


def test_a_far_stride():
    """Beyond 32 bits: the number is passed in 64."""
    kernel = quick(_scale)
    x = numbers(1, 192)
    check(kernel, x)
    far = x.as_strided((1, 192), (2**33, 1))
    check(kernel, far)
    check(kernel, far)


def test_a_launch_is_captured():
    kernel, x = quick(_scale), numbers(3, 192)
    check(kernel, x)
    out = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel[(3,)](x, out, 192, 192, 2.0, ROWS=3, BLOCK=64, SHIFT=1, num_warps=1)
    x.add_(5)
    graph.replay()
    assert torch.equal(out, 2 * x + 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_each_device_has_its_own():
    kernel = quick(_scale)
    for device in (0, 1, 0, 1):
        with torch.cuda.device(device):
            check(kernel, numbers(3, 192))


def test_unknown_versions_launch_as_usual(monkeypatch):
    assert isinstance(quick(_scale), QuickKernel)
    for version in ("3.2.0", KNOWN_VERSIONS[1]):
        monkeypatch.setattr("triton.__version__", version)
        assert quick(_scale) is _scale
