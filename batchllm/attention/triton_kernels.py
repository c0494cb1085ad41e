"""Triton kernels of attention over shared prefixes: partial results of tiles, and their reduction.

The horizontal fusion of BatchLLM's kernel (paper, section 5: shared and distinct KV in one launch), with what it leaves
out: long ranges are cut (split-K), and the grid is fixed, so that a CUDA graph can hold the launch - each program takes
every `num_programs`-th tile of a list in device memory. Partial softmax and its merge: FlashDecoding; Hydragen
(arXiv 2402.05099), section 3.

All of softmax is base 2: `score_scale` holds log2(e), and so does the log-sum-exp.

So far run in Triton's interpreter, and compiled for compute capability 8.0 to 10.0; not run on a GPU.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# Parameters are what Triton makes of the arguments, for which there are no types.
import triton
import triton.language as tl


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    tile_ptr,
    q_rows_ptr,
    q_pos_ptr,
    slot_indptr_ptr,
    part_o_ptr,
    part_lse_ptr,
    kv_head,
    score_scale,
    q_stride_row,
    q_stride_head,
    k_stride_slot,
    k_stride_head,
    v_stride_slot,
    v_stride_head,
    table_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOGIT_CAP: tl.constexpr,
):
    """One tile, for one KV head: the rows' attention over its KV range, normalised, and its log-sum-exp."""
    first_row = tl.load(tile_ptr)
    num_rows = tl.load(tile_ptr + 1)
    table_row = tl.load(tile_ptr + 2).to(tl.int64)
    kv_start = tl.load(tile_ptr + 3)
    kv_end = tl.load(tile_ptr + 4)
    slot_offset = tl.load(tile_ptr + 5)

    # Lane m is query head m % GROUP of the KV head, of row m // GROUP.
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    is_row = m // GROUP < num_rows
    row = first_row + m // GROUP
    head = kv_head * GROUP + m % GROUP
    q_row = tl.load(q_rows_ptr + row, mask=is_row, other=0).to(tl.int64)
    # Lanes without a row see everything, so that no infinity arises in them.
    q_pos = tl.load(q_pos_ptr + row, mask=is_row, other=2147483647)
    q = tl.load(
        q_ptr + (q_row * q_stride_row + head * q_stride_head)[:, None] + d[None, :], mask=is_row[:, None], other=0.0
    )

    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start_n in tl.range(kv_start, kv_end, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        # Beyond the end the last token is read again: finite values, whose weight becomes 0 below.
        slot = tl.load(table_ptr + table_row * table_stride + tl.minimum(n, kv_end - 1)).to(tl.int64)
        k = tl.load(k_ptr + (slot * k_stride_slot + kv_head * k_stride_head)[:, None] + d[None, :])
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        if LOGIT_CAP > 0:
            # tanh(x) = 2 sigmoid(2x) - 1, on the score without the log2(e) of `score_scale`.
            score = (2 * tl.sigmoid(score * (2 * 0.6931471805599453 / LOGIT_CAP)) - 1) * (
                LOGIT_CAP * 1.4426950408889634
            )
        score = tl.where((n[None, :] < kv_end) & (n[None, :] <= q_pos[:, None]), score, -float("inf"))

        new_max = tl.maximum(row_max, tl.max(score, 1))
        # A row that sees none of this range yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) would be NaN.
        finite_max = tl.where(new_max == -float("inf"), 0.0, new_max)
        rescale = tl.exp2(row_max - finite_max)
        p = tl.exp2(score - finite_max[:, None])
        v = tl.load(v_ptr + (slot * v_stride_slot + kv_head * v_stride_head)[:, None] + d[None, :])
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max

    part_slot = tl.load(slot_indptr_ptr + row, mask=is_row, other=0).to(tl.int64) + slot_offset
    offset = part_slot * NUM_HEADS + head
    # Where a row sees nothing of the range, `row_max` makes the log-sum-exp -inf all the same.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    tl.store(part_o_ptr + offset[:, None] * HEAD_DIM + d[None, :], acc / row_sum[:, None], mask=is_row[:, None])
    tl.store(part_lse_ptr + offset, row_max + tl.log2(row_sum), mask=is_row)


@triton.jit
def attend_tiles(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    counts_ptr,
    tiles_ptr,
    q_rows_ptr,
    q_pos_ptr,
    slot_indptr_ptr,
    part_o_ptr,
    part_lse_ptr,
    score_scale,
    q_stride_row,
    q_stride_head,
    k_stride_slot,
    k_stride_head,
    v_stride_slot,
    v_stride_head,
    table_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_NARROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    LOGIT_CAP: tl.constexpr,
):
    """Every tile of the step, for every KV head. Grid: (any number of programs,).

    q [T, NUM_HEADS, HEAD_DIM], k and v [slots, NUM_HEADS // GROUP, HEAD_DIM], last dimension dense; table int32
    [rows, positions], dense rows. counts int32 [2]: tiles, and how many of them, the first ones, are wide; the other
    lists as in `WorkList`. Writes part_o [slots, NUM_HEADS, HEAD_DIM] and part_lse [slots, NUM_HEADS], float32.
    """
    NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    num_tiles = tl.load(counts_ptr)
    num_wide = tl.load(counts_ptr + 1)
    # The KV heads of one range lie side by side in memory: neighbouring programs read them at the same time.
    for index in tl.range(tl.program_id(0), num_tiles * NUM_KV_HEADS, tl.num_programs(0)):
        tile = index // NUM_KV_HEADS
        kv_head = index % NUM_KV_HEADS
        if tile < num_wide:
            _attend(
                q_ptr,
                k_ptr,
                v_ptr,
                table_ptr,
                tiles_ptr + tile * TILE_FIELDS,
                q_rows_ptr,
                q_pos_ptr,
                slot_indptr_ptr,
                part_o_ptr,
                part_lse_ptr,
                kv_head,
                score_scale,
                q_stride_row,
                q_stride_head,
                k_stride_slot,
                k_stride_head,
                v_stride_slot,
                v_stride_head,
                table_stride,
                NUM_HEADS,
                GROUP,
                HEAD_DIM,
                BLOCK_WIDE,
                BLOCK_N,
                LOGIT_CAP,
            )
        else:
            _attend(
                q_ptr,
                k_ptr,
                v_ptr,
                table_ptr,
                tiles_ptr + tile * TILE_FIELDS,
                q_rows_ptr,
                q_pos_ptr,
                slot_indptr_ptr,
                part_o_ptr,
                part_lse_ptr,
                kv_head,
                score_scale,
                q_stride_row,
                q_stride_head,
                k_stride_slot,
                k_stride_head,
                v_stride_slot,
                v_stride_head,
                table_stride,
                NUM_HEADS,
                GROUP,
                HEAD_DIM,
                BLOCK_NARROW,
                BLOCK_N,
                LOGIT_CAP,
            )


@triton.jit
def merge_slots(
    part_o_ptr,
    part_lse_ptr,
    slot_indptr_ptr,
    q_rows_ptr,
    out_ptr,
    out_stride_row,
    out_stride_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Every row's partial results, weighted by their log-sum-exp. Grid: (rows, blocks of heads).

    Writes out [T, NUM_HEADS, HEAD_DIM], last dimension dense. A row without partial results (padding of a CUDA
    graph) becomes 0.
    """
    row = tl.program_id(0)
    first = tl.load(slot_indptr_ptr + row)
    last = tl.load(slot_indptr_ptr + row + 1)
    q_row = tl.load(q_rows_ptr + row).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, HEAD_DIM)
    is_head = head < NUM_HEADS

    total_max = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
    total_sum = tl.zeros([BLOCK_HEADS], tl.float32)
    acc = tl.zeros([BLOCK_HEADS, HEAD_DIM], tl.float32)
    for start in tl.range(first, last, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        offset = slot.to(tl.int64)[:, None] * NUM_HEADS + head[None, :]
        mask = (slot < last)[:, None] & is_head[None, :]
        lse = tl.load(part_lse_ptr + offset, mask=mask, other=-float("inf"))
        o = tl.load(part_o_ptr + offset[:, :, None] * HEAD_DIM + d[None, None, :], mask=mask[:, :, None], other=0.0)
        new_max = tl.maximum(total_max, tl.max(lse, 0))
        finite_max = tl.where(new_max == -float("inf"), 0.0, new_max)
        rescale = tl.exp2(total_max - finite_max)
        weight = tl.exp2(lse - finite_max[None, :])
        acc = acc * rescale[:, None] + tl.sum(weight[:, :, None] * o, 0)
        total_sum = total_sum * rescale + tl.sum(weight, 0)
        total_max = new_max

    acc = acc / tl.where(total_sum == 0.0, 1.0, total_sum)[:, None]
    tl.store(
        out_ptr + (q_row * out_stride_row + head * out_stride_head)[:, None] + d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=is_head[:, None],
    )
