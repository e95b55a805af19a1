"""Linear maps whose weights are kept in the form that this processor multiplies fastest.

Every kind takes any number of rows, and a row's product does not depend on the other rows. Weights are laid out once,
the plain ones are not kept. A kernel that is missing, or does not take a map's widths, raises `NoKernel`.

Letters: O outputs, I inputs, G groups of inputs.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32  # inputs that share a scale, of int4
TINY = 1e-30


class NoKernel(Exception):
    """This machine, or this release of torch, lacks what a kind of weights needs; the message says what."""


class Product(nn.Module):
    """x (..., I) -> x W^T + b (..., O), in the precision of x. weight_OI, bias_O: copied into a form of their own."""

    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.dtype, self.device = weight_OI.dtype, weight_OI.device
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (moved.dtype, moved.device) != (self.dtype, self.device):
            raise ValueError(
                f"this model is prepared for decoding on {self.device} in {self.dtype}; load it again, move it, and "
                "then prepare it"
            )
        return self


class Joined(Product):
    """Plain weights; several maps of one input may stand in them one below the other."""

    weight_OI: Tensor

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__(weight_OI, bias_O)
        self.register_buffer("weight_OI", weight_OI.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_OI, self.bias)


class Transposed(Product):
    """Weights stored by inputs: what a product of few rows reads then lies in one piece."""

    weight_IO: Tensor

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__(weight_OI, bias_O)
        self.register_buffer("weight_IO", weight_OI.detach().t().contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight_IO
        return y if self.bias is None else y + self.bias


class Packed(Product):
    """Weights in oneDNN's blocked layout: the same numbers, not laid out anew in every call."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__(weight_OI, bias_O)
        try:
            if weight_OI.dtype not in (torch.float32, torch.bfloat16):
                raise NoKernel(f"oneDNN has no packed products in {weight_OI.dtype}")
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), 8)
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            raise NoKernel(f"torch has no packed products of oneDNN ({error})") from error

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8(Product):
    """Rows of weights in 8 bits with a scale each.

    With VNNI instructions each row of inputs becomes two of 8 bits, a whole part and the rest, 16 bits together, whose
    sums are whole numbers: what is next to it in a window or batch does not change a row's product. (8 bits alone are
    faster, and a rounding that differs in an ulp then changes the text.) Elsewhere inputs are rounded to bfloat16.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__(weight_OI, bias_O)
        wide_OI = weight_OI.detach().float()
        scale_O = wide_OI.abs().amax(dim=1).clamp(min=TINY) / 127
        self.packed = _in_whole_numbers(wide_OI, scale_O) if torch.cpu._is_vnni_supported() else None
        if self.packed is None:
            self.missing = -self.in_features % 16  # torch reads rows in eights (AVX2) or sixteens, and beyond their end
            self.rows_OI = F.pad((wide_OI / scale_O[:, None]).round().to(torch.int8), (0, self.missing)).contiguous()
            self.scale_O = scale_O.bfloat16()
            try:
                self(torch.zeros(1, self.in_features))
            except (AttributeError, NotImplementedError, RuntimeError) as error:
                raise NoKernel(f"torch has no products of 8 bits ({error})") from error

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            flat = F.pad(x.reshape(-1, self.in_features).bfloat16(), (0, self.missing)).contiguous()
            y = torch._weight_int8pack_mm(flat, self.rows_OI, self.scale_O).view(*x.shape[:-1], -1).to(x.dtype)
            return y if self.bias is None else y + self.bias
        flat_PI = x.reshape(-1, self.in_features).float()
        step_P1 = flat_PI.abs().amax(dim=-1, keepdim=True).clamp_(min=TINY).div_(127)
        steps_PI = flat_PI / step_P1
        whole_PI = steps_PI.round()
        parts = torch.cat([whole_PI, (steps_PI - whole_PI).mul_(254)])
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(parts, 1.0, 128, self.packed)
        high, low = y.chunk(2)
        y = torch.add(high, low, alpha=1 / 254).mul_(step_P1).view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


def _in_whole_numbers(weight_OI: Tensor, scale_O: Tensor) -> Any:
    """Weights for products of 8 by 8 bits; None where this release of torch has none."""
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "fbgemm"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensors of this kind will go; the next kernel is then taken
            zeros_O = torch.zeros(len(scale_O), dtype=torch.long)
            quantised = torch.quantize_per_channel(weight_OI, scale_O.double(), zeros_O, 0, torch.qint8)
            return torch.ops.quantized.linear_prepack(quantised, None)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    finally:
        torch.backends.quantized.engine = before


class Int4(Product):
    """Weights in 4 bits, with a scale and a zero for every 32 inputs; inputs and outputs are rounded to bfloat16."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__(weight_OI, bias_O)
        if self.in_features % GROUP or self.out_features % 16:
            raise NoKernel(
                f"4 bits need widths in multiples of {GROUP} and 16, not {self.in_features} and {self.out_features}"
            )
        grouped = weight_OI.detach().float().view(self.out_features, -1, GROUP)
        low, high = grouped.amin(dim=2), grouped.amax(dim=2)
        scale_OG = ((high - low) / 15).clamp(min=TINY)
        steps = ((grouped - low[..., None]) / scale_OG[..., None]).round().clamp(0, 15).to(torch.int32)
        zeros_OG = low + 8 * scale_OG  # the kernel's (step - 8) * scale + zero
        try:
            self.packed = torch._convert_weight_to_int4pack_for_cpu(steps.view_as(weight_OI), 1)
            self.scales = torch.stack([scale_OG.T, zeros_OG.T], dim=2).bfloat16().contiguous()
            self(torch.zeros(1, self.in_features))
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            raise NoKernel(f"torch has no products of 4 bits ({error})") from error

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, GROUP, self.scales)
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


# What holds the same numbers, by name; and what rounds them.
LAYOUTS: dict[str, type[Product]] = {"joined": Joined, "transposed": Transposed, "onednn": Packed}
ROUNDED: dict[str, type[Product]] = {"int8": Int8, "int4": Int4}
