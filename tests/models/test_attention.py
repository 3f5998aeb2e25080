"""Every attention backend equals the paper's formula, in values and in gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from ssl_locat.errors import UserError
from ssl_locat.models import attention_tiled
from ssl_locat.models.attention import HAS_TRITON, Gaussian, factors, forced_backend, gaussian_attention, gaussian_bias

GRIDS = [(4, 4), (1, 5), (5, 1), (3, 7), (6, 4)]
NAMES = ("q", "k", "v", "ax", "ay", "alpha")


def make_inputs(grid, prefix, *, batch=2, heads=3, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    qkv = [torch.randn(batch, heads, prefix + patches, dim, generator=generator).to(dtype) for _ in range(3)]
    coeff = [torch.rand(batch, heads, patches, generator=generator) * 2 + 0.01 for _ in range(3)]
    return [t.requires_grad_() for t in qkv + coeff]


def run(backend, inputs, grid, prefix, *, clamp=float("inf"), pool=1, kept=None, **options):
    """Output and the gradients of all six inputs."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = gaussian_attention(*inputs[:3], Gaussian(*inputs[3:], clamp, pool, kept), grid, prefix, backend=backend, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad(out, inputs, cotangent)


def loop_bias(coeff, grid):
    """S written as two loops over patches, straight from the definition."""
    rows, cols = grid
    cells = [(y // coeff.pool * coeff.pool, x // coeff.pool * coeff.pool) for y in range(rows) for x in range(cols)]
    bias = torch.zeros(*coeff.alpha.shape, rows * cols)
    for p, (yp, xp) in enumerate(cells):
        for t, (yt, xt) in enumerate(cells):
            dx2, dy2 = min((xp - xt) ** 2, coeff.clamp), min((yp - yt) ** 2, coeff.clamp)
            bias[..., p, t] = coeff.alpha[..., p] * torch.exp(-coeff.ax[..., p] * dx2 - coeff.ay[..., p] * dy2)
    return bias


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("clamp", "pool"), [(float("inf"), 1), (4.0, 1), (4.0, 2)])
def test_bias_follows_its_definition(grid, clamp, pool):
    coeff = Gaussian(*[t.detach() for t in make_inputs(grid, 0)[3:]], clamp, pool)
    torch.testing.assert_close(gaussian_bias(coeff, grid), loop_bias(coeff, grid), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("prefix", "clamp", "pool"), [(0, float("inf"), 1), (1, 4.0, 1), (5, 9.0, 2), (8, 4.0, 1)])
def test_backend_equals_reference(backend, grid, prefix, clamp, pool):
    inputs = make_inputs(grid, prefix)
    expected, expected_grads = run("reference", inputs, grid, prefix, clamp=clamp, pool=pool)
    out, grads = run(backend, inputs, grid, prefix, clamp=clamp, pool=pool)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    for name, grad, wanted in zip(NAMES, grads, expected_grads, strict=True):
        torch.testing.assert_close(
            grad, wanted, atol=2e-6 * max(1.0, wanted.abs().max().item()), rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def keep_some(batch, patches, n, seed=0):
    """[B, n]: other patches of each image, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(patches, generator=generator)[:n] for _ in range(batch)])


def cut(inputs, prefix, kept):
    """The tokens and coefficients of kept patches."""
    *qkv, ax, ay, alpha = (t.detach() for t in inputs)
    b = torch.arange(len(kept))[:, None]
    tokens = torch.cat([torch.arange(prefix).expand(len(kept), -1), prefix + kept], 1)
    return [t[b, :, tokens].transpose(1, 2) for t in qkv] + [t[b, :, kept].transpose(1, 2) for t in (ax, ay, alpha)]


KEPT = [((4, 4), 1, 16), ((5, 1), 0, 3), ((3, 7), 5, 10), ((6, 4), 1, 1), ((9, 8), 2, 40)]


@pytest.mark.parametrize("backend", ["reference", "sdpa", "tiled"])
@pytest.mark.parametrize(("grid", "prefix", "n"), KEPT)
def test_kept_patches_see_the_full_matrix_cut_to_them(backend, grid, prefix, n, monkeypatch):
    """Values, and gradients with respect to everything, of plain attention with the bias of the whole grid cut to rows and columns."""
    monkeypatch.setattr(attention_tiled, "TILE", 300)  # several tiles, of several heads or of parts of one
    monkeypatch.setattr(attention_tiled, "QUERIES", 1)
    inputs = make_inputs(grid, prefix)
    kept = keep_some(2, grid[0] * grid[1], n)
    leaves = [t.requires_grad_() for t in inputs]
    bias = gaussian_bias(Gaussian(*leaves[3:], 9.0), grid)
    b, h = torch.arange(2)[:, None, None, None], torch.arange(3)[None, :, None, None]
    bias = F.pad(bias[b, h, kept[:, None, :, None], kept[:, None, None, :]], (prefix, 0, prefix, 0))
    tokens = torch.cat([torch.arange(prefix).expand(2, -1), prefix + kept], 1)
    q, k, v = (t[b[..., 0, 0], :, tokens].transpose(1, 2) for t in leaves[:3])
    expected = (q @ k.mT / 4 + bias).softmax(-1) @ v
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = cut(torch.autograd.grad(expected, leaves, cotangent), prefix, kept)
    out, grads = run(backend, cut(inputs, prefix, kept), grid, prefix, clamp=9.0, kept=kept)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    for name, grad, want in zip(NAMES, grads, wanted, strict=True):
        bound = 2e-6 * max(1.0, want.abs().max().item())
        torch.testing.assert_close(grad, want, atol=bound, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_kept_patches_are_counted():
    inputs = make_inputs((4, 4), 1)
    with pytest.raises(UserError, match=r"17 tokens.* 1 prefix tokens and 5 kept patches make 6"):
        run("sdpa", inputs, (4, 4), 1, kept=keep_some(2, 16, 5))


def test_tiles_of_any_size_make_the_whole(monkeypatch):
    inputs = make_inputs((6, 5), 3)
    expected, expected_grads = run("reference", inputs, (6, 5), 3)
    for elements in (33, 17 * 33, 33 * 33, 2 * 33 * 33, 5 * 33 * 33):  # 16 queries, 32, one head, two, more
        monkeypatch.setattr(attention_tiled, "TILE", elements)
        monkeypatch.setattr(attention_tiled, "QUERIES", 1)
        out, grads = run("tiled", inputs, (6, 5), 3)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("backend", "tile"), [("sdpa", None), ("tiled", attention_tiled.TILE), ("tiled", 20 * 50)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float32(backend, tile, dtype, monkeypatch):
    """Bound: four roundings of the dtype, relative to the largest value; the formula itself in that dtype is no nearer."""
    monkeypatch.setattr(attention_tiled, "TILE", tile)
    monkeypatch.setattr(attention_tiled, "QUERIES", 1)
    inputs = make_inputs((7, 7), 1, dim=32, dtype=dtype)
    exact, exact_grads = run("reference", [t.float() for t in inputs], (7, 7), 1, clamp=36.0)
    out, grads = run(backend, inputs, (7, 7), 1, clamp=36.0)
    bound = 4 * torch.finfo(dtype).eps
    for got, wanted in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert (got.float() - wanted).abs().max() <= bound * wanted.abs().max()


def test_float64_reference_agrees():
    """The tolerances above are float32 rounding, not a shared mistake."""
    inputs = make_inputs((5, 6), 2)
    out, grads = run("tiled", inputs, (5, 6), 2, clamp=9.0)
    exact, exact_grads = run("reference", [t.double() for t in inputs], (5, 6), 2, clamp=9.0)
    for got, wanted in zip((out, *grads), (exact, *exact_grads), strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=3e-6, rtol=1e-5)


def test_far_patches_cost_no_denormals_and_no_accuracy():
    inputs = make_inputs((1, 40), 1)
    inputs[3] = torch.full_like(inputs[3], 2.0).requires_grad_()  # exp(-2 * 39^2): far below float32
    expected, expected_grads = run("reference", inputs, (1, 40), 1)
    for backend in ("sdpa", "tiled"):
        out, grads = run(backend, inputs, (1, 40), 1)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(grads[3], expected_grads[3], atol=2e-6, rtol=1e-4)


def test_neither_bias_nor_its_gradient_is_denormal():
    """On Intel CPUs an operation on denormals takes a hundred cycles: they made half of the attention core's time."""
    grid, (ax, ay, alpha) = (14, 14), [torch.full((1, 1, 196), 0.5) for _ in range(3)]  # as LocAt starts: variances of 1
    factor_x, factor_y = factors(Gaussian(ax, ay, alpha), grid)
    bump = factor_y[..., :, None] * factor_x[..., None, :]
    assert bump[bump > 0].min() * 1e-10 >= torch.finfo().tiny  # times a small gradient
    torch.testing.assert_close(bump.flatten(-2), gaussian_bias(Gaussian(ax, ay, 2 * alpha), grid), atol=1e-12, rtol=1e-5)


def test_autocast_casts_like_fused_attention():
    q, k, v, *coeff = make_inputs((4, 4), 1)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [gaussian_attention(q, k.bfloat16(), v, Gaussian(*coeff), (4, 4), 1, backend=b) for b in ("sdpa", "tiled")]
    assert all(out.dtype == torch.bfloat16 for out in outs)
    torch.testing.assert_close(outs[0], outs[1], atol=0.02, rtol=0.02)
    outs[1].float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in (q, k, v, *coeff))


def test_auto_keeps_nothing_quadratic_for_the_backward():
    saved = []
    q, k, v, *coeff = make_inputs((12, 12), 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        gaussian_attention(q, k, v, Gaussian(*coeff), (12, 12), 1)
    assert max(saved) < q.shape[0] * q.shape[1] * 144 * 144


def test_compiled_equals_eager():
    q, k, v, *coeff = make_inputs((4, 4), 1)
    compiled = torch.compile(gaussian_attention, backend="aot_eager", fullgraph=True)
    out = compiled(q, k, v, Gaussian(*coeff), (4, 4), 1)
    torch.testing.assert_close(out, gaussian_attention(q, k, v, Gaussian(*coeff), (4, 4), 1), atol=2e-6, rtol=1e-5)


def test_what_is_chosen_on_a_gpu_compiles_into_one_graph():
    """On fake CUDA tensors, which need no GPU: choosing a backend must not break the graph, or every block of a model does."""
    graphs = []

    def note(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    def call(q, *coeff):
        return gaussian_attention(q, q, q, Gaussian(*coeff), (4, 4), 1)

    with FakeTensorMode():
        q, *coeff = (torch.randn(2, 3, *shape, device="cuda") for shape in ((17, 64), (16,), (16,), (16,)))
        assert torch.compile(call, backend=note, fullgraph=True)(q, *coeff).shape == q.shape
    assert len(graphs) == 1
    assert ("ssl_locat.gaussian_attention" if HAS_TRITON else "scaled_dot_product_attention") in graphs[0]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_extra_bias_is_added(backend):
    q, k, v, ax, ay, alpha = make_inputs((3, 4), 1)
    extra = torch.randn(1, 3, 13, 13)
    out = gaussian_attention(q, k, v, Gaussian(ax, ay, alpha), (3, 4), 1, extra_bias=extra, scale=0.3, backend=backend)
    bias = F.pad(gaussian_bias(Gaussian(ax, ay, alpha), (3, 4)), (1, 0, 1, 0)) + extra
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3), atol=2e-6, rtol=1e-5)


def test_unknown_backend_names_the_nearest():
    q, k, v, *coeff = make_inputs((2, 2), 1)
    with pytest.raises(UserError, match="Did you mean 'sdpa'"):
        gaussian_attention(q, k, v, Gaussian(*coeff), (2, 2), 1, backend="spda")


def test_forced_backend_that_cannot_serve_says_why():
    q, k, v, *coeff = make_inputs((2, 2), 1)
    call = (q, k, v, Gaussian(*coeff), (2, 2), 1)
    with pytest.raises(UserError, match="neither dropout nor an extra bias"):
        gaussian_attention(*call, dropout_p=0.1, backend="tiled")
    with pytest.raises(UserError, match="runs on CPUs"):
        gaussian_attention(*(t.to("meta") for t in (q, k, v)), *call[3:], backend="tiled")
    with pytest.raises(UserError, match=r"'cpu'|triton package"), forced_backend("triton"):
        gaussian_attention(*call)
    assert gaussian_attention(*call, dropout_p=0.1).shape == q.shape  # auto finds one that can


def test_wrong_grid_is_refused():
    q, k, v, *coeff = make_inputs((2, 3), 1)
    with pytest.raises(UserError, match="3 x 3 grid"):
        gaussian_attention(q, k, v, Gaussian(*coeff), (3, 3), 1)
