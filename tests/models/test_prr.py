"""PRR against the reference's numbers and timm's pooling of the same name."""

import pytest
import torch
from timm.layers import AttentionPoolPrr

from ssl_locat.models.prr import PRR, prr


@pytest.mark.parametrize("name", ["prr_h3", "prr_h6", "prr_h3_nhwc", "prr_h3_nchw"])
def test_reference_values_and_gradients(golden, name):
    file = golden(name)
    x = file["in.x"].requires_grad_()
    if name.endswith("nchw"):
        y = prr(x.permute(0, 2, 3, 1), file.config["heads"]).permute(0, 3, 1, 2)
    else:
        y = prr(x, file.config["heads"])
    torch.testing.assert_close(y, file["out.y"], rtol=1e-5, atol=1e-6)
    (y * file["in.cot"]).sum().backward()
    torch.testing.assert_close(x.grad, file["grad.in.x"], rtol=1e-4, atol=1e-4 * file["grad.in.x"].abs().max().item())


@pytest.mark.parametrize("name", ["prr_pre_post_norm", "prr_pre_norm_nchw", "prr_post_norm_nhwc"])
def test_norms_around_it_equal_the_reference(golden, name):
    file = golden(name)
    options = {key: value for key, value in file.config["kw"].items() if key != "nchw"}
    module = PRR(file.config["heads"], file.config["dim"], **options)
    module.load_state_dict(file.state())
    x = file["in.x"].requires_grad_()
    y = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if name.endswith("nchw") else module(x)
    torch.testing.assert_close(y, file["out.y"], rtol=1e-5, atol=1e-6)
    (y * file["in.cot"]).sum().backward()
    for gradient, expected in [
        (x.grad, file["grad.in.x"]),
        *((parameter.grad, file[f"grad.param.{key}"]) for key, parameter in module.named_parameters()),
    ]:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_class_token_equals_timm_pooling():
    x = torch.randn(2, 10, 24)
    torch.testing.assert_close(PRR(3)(x)[:, 0], AttentionPoolPrr(24, num_heads=3)(x))


def test_nothing_to_learn():
    assert not list(PRR(3).parameters()) and not PRR(3).state_dict()
