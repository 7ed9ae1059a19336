"""The streaming Hessian against one float64 product, inside autocast too."""

import torch

from microbat.calibrate.stats import Hessian


def test_batches_add_up_to_one_product_in_full_precision():
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(24, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        for rows in x.split(2):
            hessian.add(rows)
    exact = x.flatten(0, 1).double().T @ x.flatten(0, 1).double() / 35
    torch.testing.assert_close(hessian.mean, exact, rtol=1e-5, atol=1e-6)
