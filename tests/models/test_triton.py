"""The fused kernels without a GPU: interpreted (values, gradients), and compiled ahead of time for three generations of GPUs.

Triton decides at import whether it interprets, so both run in processes of their own.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

pytest.importorskip("triton", reason="the triton package comes with PyTorch's CUDA builds only")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs inside test_kernels_when_interpreted")

# grid, prefix tokens, clamp, pool, head dimension
CASES = [
    ((3, 7), 1, 9.0, 1, 16),
    ((1, 5), 8, float("inf"), 1, 32),
    ((11, 1), 0, 16.0, 1, 12),
    ((10, 8), 5, 16.0, 2, 64),
    ((5, 9), 3, float("inf"), 1, 80),
]


@interpreted
@pytest.mark.parametrize(("grid", "prefix", "clamp", "pool", "dim"), CASES)
def test_equals_reference(grid, prefix, clamp, pool, dim):
    from test_attention import NAMES, make_inputs, run

    inputs = make_inputs(grid, prefix, dim=dim, batch=2, heads=2)
    expected, expected_grads = run("reference", inputs, grid, prefix, clamp=clamp, pool=pool, scale=0.2)
    out, grads = run("triton", inputs, grid, prefix, clamp=clamp, pool=pool, scale=0.2)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    for name, got, wanted in zip(NAMES, grads, expected_grads, strict=True):
        torch.testing.assert_close(
            got, wanted, atol=2e-6 * max(1.0, wanted.abs().max().item()), rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@interpreted
@pytest.mark.parametrize(("grid", "prefix", "n"), [((3, 7), 1, 9), ((9, 8), 5, 40)])
def test_kept_patches_equal_reference(grid, prefix, n):
    from test_attention import NAMES, cut, keep_some, make_inputs, run

    kept = keep_some(2, grid[0] * grid[1], n)
    inputs = cut(make_inputs(grid, prefix, dim=16, batch=2, heads=2), prefix, kept)
    expected, expected_grads = run("reference", inputs, grid, prefix, clamp=16.0, kept=kept)
    out, grads = run("triton", inputs, grid, prefix, clamp=16.0, kept=kept)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    for name, got, wanted in zip(NAMES, grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@interpreted
@pytest.mark.parametrize(("prefix", "clamp", "pool"), [(1, 9.0, 1), (4, float("inf"), 2)])
def test_packed_sequences_on_their_own_grids_equal_reference(prefix, clamp, pool):
    """One launch for runs of two sizes, with blocks that end in the middle of a sequence; outputs and gradients."""
    from ssl_locat.models.attention import Gaussian, gaussian_attention
    from ssl_locat.models.attention_packed import Run
    from ssl_locat.models.attention_triton_packed import packed_triton_attention

    torch.manual_seed(0)
    grids = [(8, 10), (2, 6)]  # 80 patches are three blocks of 32
    runs = [Run(batch, prefix + rows * cols) for batch, (rows, cols) in zip((2, 3), grids, strict=True)]
    qkv = [torch.randn(sum(run.batch * run.tokens for run in runs), 2, 16, requires_grad=True) for _ in "qkv"]
    bumps = [[torch.rand(run.batch, 2, run.tokens - prefix, requires_grad=True) for _ in range(3)] for run in runs]
    coeffs = [Gaussian(*three, clamp, pool) for three in bumps]
    inputs = [*qkv, *(one for three in bumps for one in three)]
    sizes = [run.batch * run.tokens for run in runs]
    parts = zip(*(t.split(sizes) for t in qkv), runs, coeffs, grids, strict=True)
    expected = torch.cat(
        [
            gaussian_attention(*(t.unflatten(0, run).transpose(1, 2) for t in three), coeff, grid, prefix, backend="reference")
            .transpose(1, 2)
            .flatten(0, 1)
            for *three, run, coeff, grid in parts
        ]
    )
    found = packed_triton_attention(*qkv, coeffs, runs, grids, prefix)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    weights = torch.randn_like(found)
    grads = (torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@interpreted
def test_half_precision_stays_near_float32():
    """float16 only: Triton's interpreter multiplies bfloat16 matrices as if their bits were integers."""
    from test_attention import make_inputs, run

    dtype = torch.float16
    inputs = make_inputs((9, 8), 1, dim=64, batch=1, heads=2, dtype=dtype)
    exact, exact_grads = run("reference", [t.float() for t in inputs], (9, 8), 1, clamp=25.0)
    out, grads = run("triton", inputs, (9, 8), 1, clamp=25.0)
    for got, wanted in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert (got.float() - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()


@interpreted
def test_repeats_bit_for_bit_and_takes_any_strides():
    """timm hands over views of one [B, T, 3, heads, d] projection, and gradients arrive in the layout of the output."""
    from ssl_locat.models.attention import Gaussian, gaussian_attention

    torch.manual_seed(0)
    qkv = torch.randn(2, 21, 3, 2, 32, requires_grad=True)
    coeff = [torch.rand(2, 2, 20, requires_grad=True) for _ in range(3)]
    results = []
    for backend in ("triton", "triton", "reference"):
        out = gaussian_attention(*qkv.permute(2, 0, 3, 1, 4), Gaussian(*coeff), (4, 5), 1, backend=backend)
        joined = out.transpose(1, 2).flatten(2)
        results.append((joined.detach(), *torch.autograd.grad(joined.square().sum(), [qkv, *coeff])))
    for first, second, wanted in zip(*results, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, wanted, atol=1e-5, rtol=1e-4)


@interpreted
def test_operator_is_registered_soundly():
    """Fake shapes, strides and autograd agree with the real operator: what torch.compile relies on."""
    from test_attention import make_inputs

    from ssl_locat.models.attention_triton import attend

    inputs = make_inputs((3, 4), 1, dim=16, batch=1, heads=2)
    torch.library.opcheck(
        attend,
        (*inputs, None, 9.0, 1, 3, 4, 1, 0.25),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    compiled = torch.compile(lambda *x: attend(*x, None, 9.0, 1, 3, 4, 1, 0.25)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), attend(*inputs, None, 9.0, 1, 3, 4, 1, 0.25)[0])
    compiled(*inputs).sum().backward()
    assert all(t.grad is not None for t in inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("grid", "prefix", "dim"), [((14, 14), 1, 64), ((6, 6), 1, 64), ((32, 32), 5, 64), ((9, 15), 3, 128)])
def test_equals_reference_on_a_gpu(grid, prefix, dim, dtype):
    from test_attention import make_inputs, run

    inputs = [t.detach().cuda() for t in make_inputs(grid, prefix, dim=dim, dtype=dtype)]
    exact, exact_grads = run("reference", [t.float() for t in inputs], grid, prefix, clamp=100.0)
    out, grads = run("triton", inputs, grid, prefix, clamp=100.0)
    bound = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for got, wanted in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert (got.float() - wanted).abs().max() <= bound * wanted.abs().max()


@pytest.mark.gpu
def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    from test_attention import make_inputs, run

    here, there = (
        run("triton", [t.detach().to(device) for t in make_inputs((5, 6), 1)], (5, 6), 1) for device in ("cuda:0", "cuda:1")
    )
    for a, b in zip((here[0], *here[1]), (there[0], *there[1]), strict=True):
        assert b.device.index == 1 and torch.equal(a.cpu(), b.cpu())


class Launches:
    """Stands in for a kernel and notes its grids and options."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        return lambda *tensors, **options: self.seen.append((grid, options))


@pytest.mark.skipif(INTERPRETING, reason="interprets nothing")
def test_any_number_of_heads_fits_a_launch(monkeypatch):
    """CUDA's second and third axis end at 65535; small crops in large batches have more heads than that."""
    from ssl_locat.models import attention_triton as kernels

    launches = Launches()
    for name in ("forward_kernel", "query_grad_kernel", "key_grad_kernel"):
        monkeypatch.setattr(kernels, name, launches)
    q = torch.zeros(11_000, 6, 5, 8, requires_grad=True)
    coeff = torch.zeros(11_000, 6, 4)
    kernels.attend(q, q, q, coeff, coeff, coeff, None, 9.0, 1, 2, 2, 1, 0.25)[0].sum().backward()
    assert [grid for grid, _ in launches.seen] == [(66_000,)] * 3


@pytest.mark.skipif(INTERPRETING, reason="interprets nothing")
@pytest.mark.parametrize("setter", ["old", "new"])
def test_float32_is_as_exact_as_the_user_asked_for(setter):
    from ssl_locat.models.attention_triton import forward_kernel, launch_options

    def precision():
        return launch_options(forward_kernel, 64, torch.float32)["PRECISION"]

    assert precision() == "ieee"
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision() if setter == "old" else matmul.fp32_precision
    try:
        if setter == "old":
            torch.set_float32_matmul_precision("high")
        else:
            matmul.fp32_precision = "tf32"
        assert precision() == "tf32"
    finally:
        if setter == "old":
            torch.set_float32_matmul_precision(before)
        else:
            matmul.fp32_precision = before


@pytest.fixture(autouse=True)
def _serve_cpu(monkeypatch):
    """The interpreter works on CPU tensors, which the backend rightly refuses otherwise."""
    if INTERPRETING:
        from ssl_locat.models import attention

        monkeypatch.setattr(attention, "unsupported_reason", lambda *args: None)


@pytest.mark.skipif(INTERPRETING, reason="already inside")
@pytest.mark.skipif(
    Version(version("triton")) < Version("3.9") and Version(version("numpy")) >= Version("2.4"),
    reason="the interpreter of Triton 3.6 makes indices of arrays with one dimension, which numpy 2.4 refuses",
)
def test_kernels_when_interpreted():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert run.stdout.split()[0].count(".") == len(CASES) + 7, run.stdout[-2000:]  # none of those skipped


@pytest.mark.skipif(INTERPRETING, reason="an interpreting triton compiles nothing")
@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim"),
    [(80, "bfloat16", 64), (90, "bfloat16", 64), (100, "bfloat16", 64), (90, "float32", 64), (90, "float32", 128)],
)
def test_kernels_compile_without_spills(capability, dtype, head_dim):
    """With ptxas and no GPU."""
    if capability == 100 and Version(version("triton")) < Version("3.9"):
        pytest.skip("triton 3.6 spills 32 bytes of the forward kernel on sm_100")
    resources = compile_ahead(capability, dtype, head_dim)
    assert {r["kernel"] for r in resources} == {"forward_kernel", "query_grad_kernel", "key_grad_kernel"}
    assert all(r["spills"] == 0 and r["registers"] <= 255 for r in resources), resources


@pytest.mark.skipif(INTERPRETING, reason="an interpreting triton compiles nothing")
def test_packed_kernels_compile_without_spills():
    resources = compile_ahead(90, "bfloat16", 64, "packed")
    assert all(r["spills"] == 0 and r["registers"] <= 255 for r in resources), resources


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="an interpreting triton compiles nothing")
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_kernels_compile_in_every_size(dtype, head_dim):
    for capability in (80, 90, 100):
        assert len(compile_ahead(capability, dtype, head_dim)) == 3


def compile_ahead(capability, dtype, head_dim, *packed):
    command = [sys.executable, "-m", "ssl_locat.benchmarks.kernels", str(capability), dtype, str(head_dim), *packed]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)
