"""The grouped product on a GPU: y += Σ weight · (x·aᵀ)·bt, every row with its own adapters.

    add_grouped(y, x, table, site, rows)

`reference.py` says what it is; `programs.py` how it is computed. Layers that read one
input (q, k and v; gate and up) share a launch: `shrink_grouped` for up to three sites, then
`expand_grouped` for each when its output is there.

Safe in a CUDA graph: launches are chosen by shapes and dtypes alone, nothing is tuned at
run time, and what changes between replays is read from the device (`table.py`, `rows.py`).
As with any Triton kernel, run the shapes once before they are captured, since the first
call compiles. Triton is imported at the first launch.
"""

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_hub.errors import InputError
from lora_hub.kernels.rows import RowLists
from lora_hub.kernels.table import Table

BLOCK_R = 16  # ranks in one tile, the least that `tl.dot` takes

# So many programs keep every multiprocessor of a large GPU busy.
ENOUGH_PROGRAMS = 128

MOST_SITES = 3  # that share a launch


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a launch is cut into programs. It depends on shapes alone."""

    block_t: int
    block_k: int
    block_n: int
    chunk: int  # columns of `in` in one part; a whole number of `block_k`
    parts: int


def is_available(device: torch.device | str) -> bool:
    """Return whether the kernels run there: NVIDIA's GPUs since 8.0, with Triton installed.

    On a CPU only where Triton interprets (TRITON_INTERPRET=1), which is for tests: slow.
    """
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)  # bfloat16 and TF32


def add_grouped(y: Tensor, x: Tensor, table: Table, site: int, rows: RowLists) -> None:
    """Add to y, in place, what the rows' adapters make of x at this site.

    Args:
        y: (…, out), float32, bfloat16 or float16; the last axis contiguous. It is rounded
            once, after a sum in float32.
        x: (…, in), as many tokens as y, of one of these dtypes.
        table: of the device of both.
        site: the layer's number.
        rows: the tokens are a multiple of `rows.count`, a row's tokens side by side.

    Raises:
        InputError: shapes, dtypes or devices are others, or do not belong together.
    """
    (t,) = shrink_grouped(x, table, (site,), rows)
    expand_grouped(y, t, table, site, rows)


def shrink_grouped(
    x: Tensor, table: Table, sites: Sequence[int], rows: RowLists
) -> tuple[Tensor, ...]:
    """Return for each site t = weight · (x·aᵀ), for `expand_grouped`.

    Args:
        x: (…, in), read by all sites.
        table: as for `add_grouped`, like `rows`.
        sites: one to three.
        rows: which adapters each row uses.

    Returns:
        A float32 (parts, tokens, width) each. Only what adapters of true rank take is
        written; the rest is whatever the memory held.
    """
    from lora_hub.kernels.programs import shrink

    if not 1 <= len(sites) <= MOST_SITES:
        raise InputError(f"{len(sites)} sites, expected one to {MOST_SITES}")
    flat = _flat(x, "x", table)
    tokens = _tokens(flat, rows, x)
    _before_launch(table, rows, sites)
    for site in sites:
        table.takes(site, flat.shape[1])
    shape = _shape(tokens, rows.count, flat.shape[1], 1)
    width, cells = _width(table, rows), table.cells
    t = torch.empty(
        (len(sites), shape.parts, len(flat), width), dtype=torch.float32, device=x.device
    )
    grid = rows.count * -(-tokens // shape.block_t), shape.parts, len(sites)
    if not all(grid):
        return t.unbind()
    numbers = (*sites, sites[0], sites[0])[:MOST_SITES]
    with _on(x):
        shrink[grid](
            flat, t, cells, rows.first, rows.last, rows.slot, rows.weight,
            *numbers, cells.shape[1], tokens, len(flat), flat.shape[1], flat.stride(0),
            width, shape.chunk,
            NARROW=_narrow(table.dtype), PRECISION=_precision(x.dtype),
            BLOCK_T=shape.block_t, BLOCK_R=BLOCK_R, BLOCK_K=shape.block_k,
            num_warps=4,
        )  # fmt: skip
    return t.unbind()


def expand_grouped(y: Tensor, t: Tensor, table: Table, site: int, rows: RowLists) -> None:
    """Add t·bt to y in place.

    Args:
        y: (…, out), see `add_grouped`.
        t: of `shrink_grouped` with this site, the same rows and as many tokens.
        table: as for `shrink_grouped`, like `rows`.
        site: the layer's number.
        rows: which adapters each row uses.
    """
    from lora_hub.kernels.programs import expand

    flat = _flat(y, "y", table)
    if flat.data_ptr() != y.data_ptr():
        raise InputError(f"y of strides {y.stride()} cannot be added to in place")
    tokens = _tokens(flat, rows, y)
    _before_launch(table, rows, (site,))
    parts, total, width = t.shape
    if total != len(flat):
        raise InputError(f"y has {len(flat)} tokens, x had {total}", where=f"site {site}")
    if width != _width(table, rows):
        raise InputError(
            "the table or the rows grew since t was taken", where=f"site {site}"
        )
    table.gives(site, flat.shape[1])
    shape = _shape(tokens, rows.count, 1, flat.shape[1])
    grid = rows.count * -(-tokens // shape.block_t), -(-flat.shape[1] // shape.block_n)
    cells = table.cells  # once: another thread may let the table grow
    if not all(grid):
        return
    with _on(y):
        expand[grid](
            flat, t, cells, rows.first, rows.last, rows.slot,
            site, cells.shape[1], tokens, total, flat.shape[1], flat.stride(0), width,
            parts,
            NARROW=_narrow(table.dtype), PRECISION=_precision(y.dtype),
            BLOCK_T=shape.block_t, BLOCK_R=BLOCK_R, BLOCK_N=shape.block_n,
            num_warps=4,
        )  # fmt: skip


def _shape(tokens: int, rows: int, inp: int, out: int) -> _Shape:
    """Choose how to cut a launch: `tokens` of each of `rows`.

    One token a row is bound by reading a: `in` is split so that one row alone keeps many
    multiprocessors reading, in the same way for any number of rows. Many tokens fill the
    GPU by themselves, and parts would only be written and read again.
    """
    if tokens == 1:
        block_k, most = 256, 16
        block_t, block_n = 1, 64 if rows * out < 2**15 else 128
    else:
        block_k, most = 64, 8
        block_t = 16 if tokens <= 16 else 32
        block_n = 64
        programs = rows * max(1, -(-tokens // block_t))
        most = max(1, min(most, ENOUGH_PROGRAMS // programs))
    chunk = -(-max(inp, 1) // (most * block_k)) * block_k
    return _Shape(block_t, block_k, block_n, chunk, -(-inp // chunk))


def _flat(tensor: Tensor, name: str, table: Table) -> Tensor:
    """Return it as (tokens, features), without copying where it lies in rows."""
    if tensor.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        raise InputError(f"{name} is {tensor.dtype}, which the kernels do not compute in")
    if tensor.device != table.cells.device:
        raise InputError(f"{name} is on {tensor.device}, the table on {table.cells.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{name} wants gradients, which the kernels do not give",
            hint="call the model under torch.no_grad() or torch.inference_mode()",
        )
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _tokens(flat: Tensor, rows: RowLists, given: Tensor) -> int:
    """Return how many tokens each row has."""
    if len(flat) % rows.count:
        raise InputError(
            f"{tuple(given.shape)} holds {len(flat)} tokens, which {rows.count} rows"
            " do not share equally",
            hint="give one entry for each row of the batch; `each=` with beams or"
            " num_return_sequences",
        )
    return len(flat) // rows.count


def _width(table: Table, rows: RowLists) -> int:
    """Return how many columns of t the adapters of a row take at most."""
    return rows.per_row * table.max_rank if rows.width is None else rows.width


def _before_launch(table: Table, rows: RowLists, sites: Sequence[int]) -> None:
    if min(sites) < 0:
        raise InputError(f"site {min(sites)} is negative")
    if table.cells.is_cuda and torch.cuda.is_current_stream_capturing():
        table.captured = rows.captured = True
    # Rows may name slots and layers sites that nothing was put at: they are bare, but must
    # lie within the table, since a kernel reads whatever is there.
    table.reserve(slots=rows.most_slot + 1, sites=max(sites) + 1)


def _narrow(dtype: torch.dtype) -> object:
    """Return Triton's name of the dtype."""
    import triton.language as tl

    names = {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    return names[dtype]


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32x3"


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
