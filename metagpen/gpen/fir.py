"""The 4x4 FIR filter of a blur as one Triton kernel, for channels_last maps on a GPU.

cuDNN's depthwise convolutions on channels_last maps read and write at a small part of the memory's bandwidth. Here a
program walks down a strip of columns: each input value is loaded four times, for the four columns it is under, and
every output is written once. `Blur.forward` uses it where Triton is at hand; its plain twin is `Blur.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, CHANNELS = 16, 4, 64  # of one program's output


@triton.jit
def _value(x, row, column, width, channels, inside):
    return tl.load(x + (row * width + column) * channels, mask=inside & (column >= 0) & (column < width), other=0.0)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "before", "row_tiles"])
def _filter(x, kernel, y, channels, height, width, out_height, out_width, before, row_tiles,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, EXACT: tl.constexpr):
    """y [B, out_height, out_width, C] = kernel [4, 4] over x [B, height, width, C], zeros around it.

    Compiled anew for as little as possible: the loop over rows is not unrolled, and no side counts as a constant.
    """
    dtype: tl.constexpr = tl.float64 if EXACT else tl.float32
    image = (tl.program_id(0) // row_tiles).to(tl.int64)
    top = tl.program_id(0) % row_tiles * ROWS
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    x += image * height * width * channels + channel
    y += image * out_height * out_width * channels + channel
    k00, k01, k02, k03 = tl.load(kernel), tl.load(kernel + 1), tl.load(kernel + 2), tl.load(kernel + 3)
    k10, k11, k12, k13 = tl.load(kernel + 4), tl.load(kernel + 5), tl.load(kernel + 6), tl.load(kernel + 7)
    k20, k21, k22, k23 = tl.load(kernel + 8), tl.load(kernel + 9), tl.load(kernel + 10), tl.load(kernel + 11)
    k30, k31, k32, k33 = tl.load(kernel + 12), tl.load(kernel + 13), tl.load(kernel + 14), tl.load(kernel + 15)
    first = tl.zeros((COLUMNS, CHANNELS), dtype)  # outputs of which the last, ..., the first row of taps is to come
    second, third = first, first
    for i in range(ROWS + 3):
        row = top + i - before + 0 * column  # a block as the rest is: the interpreter takes no mask of mixed shapes
        at = column - before
        here = (row >= 0) & (row < height) & (channel < channels)
        v0, v1 = _value(x, row, at, width, channels, here), _value(x, row, at + 1, width, channels, here)
        v2, v3 = _value(x, row, at + 2, width, channels, here), _value(x, row, at + 3, width, channels, here)
        v0, v1, v2, v3 = v0.to(dtype), v1.to(dtype), v2.to(dtype), v3.to(dtype)
        first += v0 * k30 + v1 * k31 + v2 * k32 + v3 * k33
        second += v0 * k20 + v1 * k21 + v2 * k22 + v3 * k23
        third += v0 * k10 + v1 * k11 + v2 * k12 + v3 * k13
        fourth = v0 * k00 + v1 * k01 + v2 * k02 + v3 * k03
        out = row + before - 3
        done = (out >= top) & (out < out_height) & (column < out_width) & (channel < channels)
        tl.store(y + (out * out_width + column) * channels, first.to(y.dtype.element_ty), mask=done)
        first, second, third = second, third, fourth


@torch.library.custom_op("metagpen::fir", mutates_args=())
def filtered(x: Tensor, kernel: Tensor, before: int, after: int) -> Tensor:
    """`fir`, without gradients."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    out_height, out_width = (side + before + after - 3 for side in (height, width))
    y = torch.empty(batch, channels, out_height, out_width, dtype=x.dtype, device=x.device,
                    memory_format=torch.channels_last)
    row_tiles = triton.cdiv(out_height, ROWS)
    block = min(CHANNELS, triton.next_power_of_2(channels))
    grid = (batch * row_tiles, triton.cdiv(out_width, COLUMNS), triton.cdiv(channels, block))
    exact = x.dtype == torch.float64
    kernel = kernel.to(torch.float64 if exact else torch.float32).contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _filter[grid](x, kernel, y, channels, height, width, out_height, out_width, before, row_tiles,
                      ROWS=ROWS, COLUMNS=COLUMNS, CHANNELS=block, EXACT=exact)
    return y


@filtered.register_fake
def _(x: Tensor, kernel: Tensor, before: int, after: int) -> Tensor:
    shape = *x.shape[:2], *(side + before + after - 3 for side in x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


class Fir(torch.autograd.Function):
    """The filter and its gradient, which is a filter too; also under `torch.func`, with one kernel for all."""

    @staticmethod
    def forward(x: Tensor, kernel: Tensor, before: int, after: int) -> Tensor:
        return filtered(x, kernel, before, after)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
        _, kernel, ctx.before, ctx.after = inputs
        ctx.save_for_backward(kernel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernel, = ctx.saved_tensors
        return Fir.apply(gradient, kernel.flip(0, 1), 3 - ctx.before, 3 - ctx.after), None, None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int, None, None, None], x: Tensor, kernel: Tensor, before: int,
             after: int) -> tuple[Tensor, int]:
        x = x.movedim(dims[0], 0)
        return Fir.apply(x.flatten(0, 1), kernel, before, after).unflatten(0, x.shape[:2]), 0


def fir(x: Tensor, kernel: Tensor, before: int, after: int) -> Tensor:
    """Every channel of x [B, C, H, W] correlated with kernel [4, 4], `before` and `after` zeros around it on both axes:
    [B, C, H + before + after - 3, W + before + after - 3], channels_last, in x's dtype; sums in float32, or float64
    where x is. Differentiable in x, any number of times."""
    return Fir.apply(x, kernel, before, after)
