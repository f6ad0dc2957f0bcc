"""What one program of the grid computes, in Triton: `shrink` and `expand`.

The product y += Σ w·(x·aᵀ)·bt is taken in two launches. `shrink` leaves t = w·x·aᵀ in
float32, in as many parts as `in` is split into; `expand` adds the parts in their order,
multiplies with bt, adds y and rounds once. Nothing is added atomically, so that the same
input gives the same bits.

Grids depend on shapes alone. Which adapters a row uses, where their factors lie and which
ranks they have is read from the device's memory: a captured CUDA graph stays right when any
of it changes. Ranks are looped over in tiles of 16, the last one masked, so that a row
costs what its own adapters' ranks cost. A row without adapters ends its programs at once.

Traps. Factors are reached by addresses that are read as int64 and cast; Triton cannot know
that they are aligned and is told, in the function that loads from them, since a hint on an
argument is lost (`table.py` checks that it is true). What changes between calls and is no
shape is never specialised on, or a site of number 1 would compile everything again.
`tl.dot` wants 16 rows, so a single token is multiplied without it.

Numbers of float16 or bfloat16 are exact in TF32, their products in float32. Where float32
meets the tensor cores, three TF32 products stand for one ("tf32x3", about 22 bits), and
where the layer is float32 they are not used at all ("ieee").

The idea of the two launches is Punica's (arXiv:2310.18547); true ranks are S-LoRA's
(arXiv:2311.03285).
"""

import triton
import triton.language as tl

# A cell of the table: where a and bt lie, their rank, and whether they are float32.
CELL = tl.constexpr(4)


@triton.jit
def _factor(address, KIND: tl.constexpr):
    """Return the address as a pointer to numbers of this kind, aligned to 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(KIND)), 16)


@triton.jit
def _times_a(
    x,  # (BLOCK_T,) where the tokens begin
    real,  # (BLOCK_T,) which of them are tokens
    address,
    rank,
    low,
    start,
    stop,
    inp,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return (BLOCK_T, BLOCK_R): tokens times rows low… of a, over columns start…stop."""
    a = _factor(address, KIND)
    row = low + tl.arange(0, BLOCK_R)
    held = row < rank
    if BLOCK_T == 1:
        products = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for k in range(start, stop, BLOCK_K):
            column = k + tl.arange(0, BLOCK_K)
            inside = column < inp
            xs = tl.load(x[:, None] + column[None, :], mask=inside[None, :], other=0.0)
            ones = tl.load(
                a + row[:, None] * inp + column[None, :],
                mask=held[:, None] & inside[None, :],
                other=0.0,
            )
            products += xs.to(tl.float32) * ones.to(tl.float32)
        result = tl.sum(products, 1)[None, :]
    else:
        result = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for k in range(start, stop, BLOCK_K):
            column = k + tl.arange(0, BLOCK_K)
            inside = column < inp
            xs = tl.load(
                x[:, None] + column[None, :],
                mask=real[:, None] & inside[None, :],
                other=0.0,
            )
            ones = tl.load(
                a + row[None, :] * inp + column[:, None],
                mask=held[None, :] & inside[:, None],
                other=0.0,
            )
            # Two halves are exact in TF32; the interpreter cannot take bfloat16 in a dot.
            if xs.dtype == tl.float32 or ones.dtype == tl.float32:  # noqa: PLR1714 (Triton)
                result = tl.dot(
                    xs.to(tl.float32),
                    ones.to(tl.float32),
                    result,
                    input_precision=PRECISION,
                )
            else:
                result = tl.dot(
                    xs.to(tl.float32),
                    ones.to(tl.float32),
                    result,
                    input_precision="tf32",
                )
    return result


@triton.jit(do_not_specialize=["site0", "site1", "site2", "sites", "tokens", "total"])
def shrink(
    x,
    t,
    cells,
    first,
    last,
    slot,
    weight,
    site0,
    site1,
    site2,
    sites,
    tokens,
    total,
    inp,
    stride,
    width,
    chunk,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write t (sites of the launch, parts, total, width): tokens times a times the weight.

    Grid: tiles of tokens, row by row; parts of `inp`, of `chunk` columns; up to three
    sites that read one x. `tokens` are those of one row, `total` those of all.
    """
    tiles = tl.cdiv(tokens, BLOCK_T)
    row = tl.program_id(0) // tiles
    begin = tl.load(first + row)
    end = tl.load(last + row)
    if begin == end:
        return
    part = tl.program_id(1)
    which = tl.program_id(2)
    site = tl.where(which == 0, site0, tl.where(which == 1, site1, site2))
    within = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    real = within < tokens
    token = row.to(tl.int64) * tokens + within
    start = part * chunk
    stop = tl.minimum(start + chunk, inp)
    place = t + ((which * tl.num_programs(1) + part).to(tl.int64) * total + token) * width
    at_x = x + token * stride
    taken = tl.zeros((), tl.int32)  # columns of t that the row's adapters before took
    for entry in range(begin, end):
        cell = cells + (tl.load(slot + entry).to(tl.int64) * sites + site) * CELL
        rank = tl.load(cell + 2).to(tl.int32)
        if rank > 0:
            address = tl.load(cell)
            scale = tl.load(weight + entry)
            wide = tl.load(cell + 3)
            for low in range(0, rank, BLOCK_R):
                if wide != 0:
                    found = _times_a(
                        at_x, real, address, rank, low, start, stop, inp,
                        tl.float32, PRECISION, BLOCK_T, BLOCK_R, BLOCK_K,
                    )  # fmt: skip
                else:
                    found = _times_a(
                        at_x, real, address, rank, low, start, stop, inp,
                        NARROW, PRECISION, BLOCK_T, BLOCK_R, BLOCK_K,
                    )  # fmt: skip
                one = low + tl.arange(0, BLOCK_R)
                tl.store(
                    place[:, None] + taken + one[None, :],
                    found * scale,
                    mask=real[:, None] & (one < rank)[None, :],
                )
            taken += rank


@triton.jit
def _plus_bt(
    result,
    t,  # (BLOCK_T,) where the tokens' numbers for this adapter begin, in the first part
    real,
    parts,
    between,
    address,
    rank,
    out,
    column,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return `result` (BLOCK_T, BLOCK_N) plus t (BLOCK_T, rank) · bt[:, column]."""
    bt = _factor(address, KIND)
    inside = column < out
    for low in range(0, rank, BLOCK_R):
        one = low + tl.arange(0, BLOCK_R)
        held = one < rank
        ts = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for part in range(parts):
            ts += tl.load(
                t[:, None] + part * between + one[None, :],
                mask=real[:, None] & held[None, :],
                other=0.0,
            )
        ones = tl.load(
            bt + one[:, None] * out + column[None, :],
            mask=held[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        if BLOCK_T == 1:
            result += tl.sum(tl.trans(ts) * ones, 0)[None, :]
        else:
            result = tl.dot(ts, ones, result, input_precision=PRECISION)
    return result


@triton.jit(do_not_specialize=["site", "sites", "tokens", "total", "parts"])
def expand(
    y,
    t,
    cells,
    first,
    last,
    slot,
    site,
    sites,
    tokens,
    total,
    out,
    stride,
    width,
    parts,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add to y (total, out) what t (parts, total, width) times bt is; round once.

    Grid: tiles of tokens, row by row; tiles of `out`. A token without adapters at
    this site is neither read nor written: minus zero stays what it is.
    """
    tiles = tl.cdiv(tokens, BLOCK_T)
    row = tl.program_id(0) // tiles
    begin = tl.load(first + row)
    end = tl.load(last + row)
    if begin == end:
        return
    within = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    real = within < tokens
    token = row.to(tl.int64) * tokens + within
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    between = total.to(tl.int64) * width
    result = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    taken = tl.zeros((), tl.int32)
    for entry in range(begin, end):
        cell = cells + (tl.load(slot + entry).to(tl.int64) * sites + site) * CELL
        rank = tl.load(cell + 2).to(tl.int32)
        if rank > 0:
            address = tl.load(cell + 1)
            at_t = t + token * width + taken
            if tl.load(cell + 3) != 0:
                result = _plus_bt(
                    result, at_t, real, parts, between, address, rank, out, column,
                    tl.float32, PRECISION, BLOCK_T, BLOCK_R,
                )  # fmt: skip
            else:
                result = _plus_bt(
                    result, at_t, real, parts, between, address, rank, out, column,
                    NARROW, PRECISION, BLOCK_T, BLOCK_R,
                )  # fmt: skip
            taken += rank
    if taken > 0:
        place = y + token[:, None] * stride + column[None, :]
        there = real[:, None] & (column < out)[None, :]
        before = tl.load(place, mask=there, other=0.0).to(tl.float32)
        tl.store(place, (before + result).to(y.dtype.element_ty), mask=there)
