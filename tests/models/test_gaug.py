"""GAug against the reference's numbers, and each of its variants against slow loops written from the paper's equations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_locat.errors import UserError
from ssl_locat.models.gaug import GAug, constants

CASES = [
    "gaug_a_native_14x14_p1",
    "gaug_b_init14_cur6_p1",
    "gaug_c_init14_cur20x28_p1",
    "gaug_d_prefix0",
    "gaug_d_prefix5",
    "gaug_e_fast_eval_init32_cur8x12",
    "gaug_e_fast_eval_init32_native_rows",
    "gaug_e_fast_train_init32_cur8x12",
    "gaug_e_fast_train_init32_native_rows",
    "gaug_disable_clamp",
    "gaug_with_clamp",
]


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", CASES)
def test_reference_values_and_gradients(golden, name):
    file = golden(name)
    config, grid, prefix = file.config, tuple(file.config["current"]), file.config["prefix"]
    q = file["in.q"].requires_grad_()
    options = {"disable_clamp": True} if config.get("disable_clamp") else {}
    gaug = GAug(q.shape[-1], config["dim"], config["heads"], config["initial"], fast="reference", **options)
    gaug.load_state_dict(file.state())
    gaug.train(config.get("train", False))
    coefficients = gaug(q[:, :, prefix:], grid)
    bias = torch.nn.functional.pad(gaug.bias(coefficients, grid), (prefix, 0, prefix, 0))
    if "in.rows" in file:
        assert relative(bias[:, :, file["in.rows"]], file["out.addition_rows"]) < 1e-6
    else:
        assert relative(bias, file["out.addition"]) < 1e-6
    variance = torch.stack([0.5 / coefficients.ay, 0.5 / coefficients.ax], -1) - gaug.constants.eps
    if coefficients.pool == 1:
        assert relative(variance.flatten(), file["out.var"].flatten()) < 1e-5  # eps is added and taken away again
        assert relative(coefficients.alpha.flatten(), file["out.alpha"].flatten()) < 1e-6
    (bias * file["in.cot_row"][..., None] * file["in.cot_col"][..., None, :]).sum().backward()
    assert relative(q.grad, file["grad.in.q"]) < 1e-4
    for key, parameter in gaug.named_parameters():
        assert relative(parameter.grad, file[f"grad.param.{key}"]) < 1e-4, key


def test_constants_of_the_reference(golden):
    file = golden("gaug_constants")
    for i, grid in enumerate(file["in.grids"].tolist()):
        ours = constants(grid)
        assert (ours.coef, ours.eps) == (file["out.sigmoid_coef"][i].item(), file["out.eps"][i].item())
        assert ours.shift == pytest.approx(file["out.sigmoid_shift"][i].item(), rel=1e-12)
        assert ours.clamp == -2 * file["out.clamp"][i].item()
        sigmoid = GAug(4, 4, 1, grid).scaled_sigmoid(file["in.x"])
        torch.testing.assert_close(sigmoid, file["out.sigmoid"][i], rtol=1e-6, atol=1e-7)


def slow_bias(gaug, q, k, x, grid):
    """One patch and one head at a time, from eq. 5-9, 12 and 16-21, with the release's eps, clamp and rescaling."""
    cols = grid[1]
    batch, heads, patches, depth = q.shape
    coef, _, eps, clamp = gaug.constants
    top = coef if gaug.kernel == "gaussian" else math.sqrt(coef)
    shift = math.log(top - 1) if (top > 2 if gaug.kernel == "gaussian" else top > 1) else 0.0
    rescale = min(grid) / min(gaug.initial_grid)
    bias = torch.zeros(batch, heads, patches, patches)
    for b in range(batch):
        for h in range(heads):
            for p in range(patches):
                if gaug.sigma is not None:
                    width = [gaug.sigma**2 if gaug.kernel == "gaussian" else gaug.sigma]
                else:
                    if gaug.source == "query":
                        raw = gaug.log_var(q[b, h, p])
                    else:
                        n = gaug.num_widths
                        raw = gaug.log_var(x[b, p])[h * n : (h + 1) * n]
                    width = [top / (1 + math.exp(shift - r)) for r in raw.tolist()]
                along_rows, along_cols = (rescale * width[0] + eps, rescale * width[-1] + eps)
                if gaug.alpha == "learned":
                    alpha = math.log1p(math.exp(gaug.log_alpha(q[b, h, p]).item()))
                elif gaug.alpha == "auto":
                    alpha = q[b, h, p].norm().item() * sum(key.norm().item() for key in k[b, h]) / patches / math.sqrt(depth)
                else:
                    alpha = 1.0
                for t in range(patches):
                    dy2, dx2 = min((p // cols - t // cols) ** 2, clamp), min((p % cols - t % cols) ** 2, clamp)
                    r = math.sqrt(dy2 + dx2) / along_rows
                    kernel = {
                        "gaussian": math.exp(-0.5 * (dy2 / along_rows + dx2 / along_cols)),
                        "laplace": math.exp(-r),
                        "inverse": 1 / (1 + r),
                    }
                    bias[b, h, p, t] = alpha * kernel[gaug.kernel]
    return bias


VARIANTS = {
    "full": {},
    "from_input": {"source": "input"},
    "isotropic": {"isotropic": True},
    "fixed_width": {"sigma": 1.5},
    "no_alpha": {"alpha": "one"},
    "auto_alpha": {"alpha": "auto"},
    "laplace": {"kernel": "laplace"},
    "inverse_distance": {"kernel": "inverse"},
    "laplace_from_input_no_alpha": {"kernel": "laplace", "source": "input", "alpha": "one"},
    "isotropic_from_input": {"source": "input", "isotropic": True},
    "fixed_laplace": {"kernel": "laplace", "sigma": 0.7},
}


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (1, 4)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_slow_loop(variant, grid):
    torch.manual_seed(0)
    gaug = GAug(8, 16, 2, (3, 3), **VARIANTS[variant])
    for parameter in gaug.parameters():
        torch.nn.init.normal_(parameter)
    patches = grid[0] * grid[1]
    q, k, v = torch.randn(3, 2, 2, patches + 1, 8)
    x = torch.randn(2, patches, 16)
    with torch.no_grad():
        coefficients = gaug(q[:, :, 1:], grid, k=k[:, :, 1:], x=x)
        expected = slow_bias(gaug, q[:, :, 1:], k[:, :, 1:], x, grid)
        torch.testing.assert_close(gaug.bias(coefficients, grid), expected, rtol=1e-5, atol=1e-6)
        logits = q @ k.mT / math.sqrt(8)
        logits[:, :, 1:, 1:] += expected
        torch.testing.assert_close(gaug.attend(q, k, v, coefficients, grid, 1), logits.softmax(-1) @ v, rtol=1e-5, atol=1e-6)


@given(rows=st.integers(1, 6), cols=st.integers(1, 6), side=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_bias_is_largest_at_its_own_patch(rows, cols, side, seed):
    torch.manual_seed(seed)
    gaug = GAug(4, 8, 2, (side, side))
    q = torch.randn(1, 2, rows * cols, 4)
    bias = gaug.bias(gaug(q, (rows, cols)), (rows, cols))
    assert torch.equal(bias.amax(-1), bias.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(bias.amax(-1), gaug(q, (rows, cols)).alpha)


@given(rows=st.integers(1, 5), cols=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_flipping_the_image_flips_the_bias(rows, cols, seed):
    torch.manual_seed(seed)
    gaug = GAug(4, 8, 2, (4, 4))
    q = torch.randn(1, 2, rows * cols, 4)
    flip = torch.arange(rows * cols).view(rows, cols).flip(1).flatten()
    bias, flipped = (gaug.bias(gaug(t, (rows, cols)), (rows, cols)) for t in (q, q[:, :, flip]))
    torch.testing.assert_close(flipped, bias[:, :, flip][:, :, :, flip])


def test_deviation_is_what_was_predicted():
    gaug = GAug(4, 8, 2, (7, 7))
    torch.nn.init.zeros_(gaug.log_var.weight)
    sigma_x, sigma_y = gaug.deviation(gaug(torch.randn(1, 2, 49, 4), (7, 7)))
    torch.testing.assert_close(sigma_x, torch.ones(1, 2, 49))  # f(0) = 1
    torch.testing.assert_close(sigma_y, torch.ones(1, 2, 49))


def test_coefficients_are_float32_under_autocast():
    gaug, q = GAug(8, 16, 2, (4, 4)), torch.randn(1, 2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        coefficients = gaug(q.bfloat16(), (4, 4))
    assert all(t.dtype == torch.float32 for t in coefficients[:3])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kernel": "laplce"}, "laplace"),
        ({"alpha": "none"}, "learned, one, auto"),
        ({"sigma": -1.0}, "above 0"),
        ({"alpha": "one", "small_start": True}, "learned alpha"),
    ],
)
def test_wrong_option_is_named(options, message):
    with pytest.raises(UserError, match=message):
        GAug(8, 16, 2, (4, 4), **options)


def test_fast_path_refuses_odd_grids():
    gaug = GAug(4, 4, 1, (32, 32), fast="reference")
    with pytest.raises(UserError, match="even sides"):
        gaug(torch.randn(1, 1, 15, 4), (3, 5))
