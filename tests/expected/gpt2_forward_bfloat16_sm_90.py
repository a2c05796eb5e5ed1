# out = sum over k of w * value,  w = prob
# softmax over k of (score * 0.125) + where(k <= q, 0, -3.38953e+38)
# visible where k <= q
# spec  {"batch":2,"empty_row":"nan","expr":{"nodes":[["Index","int64","b0"],["Index","int64","b1"],["Index","int64","q"],["Index","int64","d"],["Load","bfloat16",0,[0,1,2,3]],["Index","int64","k"],["Load","bfloat16",1,[0,1,5,3]],["Index","int64","e"],["Load","bfloat16",2,[0,1,5,7]],["Score","bfloat16"],["Const","bfloat16","0x1.0000000000000p-3"],["Apply","bfloat16","mul",[9,10]],["Apply","bool","le",[5,2]],["Const","bfloat16","0x0.0p+0"],["Const","bfloat16","-0x1.fe00000000000p+127"],["Apply","bfloat16","where",[12,13,14]],["Apply","bfloat16","add",[11,15]],["Prob","bfloat16"],["Const","int64",1],["Apply","int64","add",[18,2]]],"roots":{"key":6,"mask.predicate":12,"mask.upper":19,"mask.visible":11,"query":4,"score":16,"value":8,"weight":17}},"extra":[],"fill":"-0x1.fe00000000000p+127","operands":[[4,"bfloat16"],[4,"bfloat16"],[4,"bfloat16"]],"out_dtype":"bfloat16","out_order":[0,2,1,3],"qk_dim":64,"v_dim":64,"version":1}
# plan  TritonPlan(width=64, v_width=64, block_q=128, block_k=128, warps=8, stages=3, described=True)
import triton
import triton.language as tl
from triton.language.extra import libdevice

# The operators of fuse.ir.expr that Triton lacks or means otherwise.
from triton.language import target_info


@triton.jit
def f_tanh_half(a):
    """Of what eager rounds to 16 bits: no farther from it than that rounding, 2^-11 of the value (PTX ISA, tanh)."""
    if target_info.cuda_capability_geq(7, 5):
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)
    else:  # near zero, where the quotient would cancel, the beginning of the series
        return tl.where(tl.abs(a) < 0.03125, a - a * a * a * (1 / 3), 1.0 - 2.0 / (tl.exp2(a * 2.8853900817779268) + 1.0))


@triton.jit
def f_floordiv(a, b):
    """Rounds towards minus infinity; Triton's rounds towards zero."""
    quotient = a // b
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def f_mod(a, b):
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def f_floordiv_real(a, b):
    return tl.floor(a / b)


@triton.jit
def f_mod_real(a, b):
    return a - tl.floor(a / b) * b


@triton.jit
def f_sign(a):
    return tl.where(a > 0, a * 0 + 1, tl.where(a < 0, a * 0 - 1, a * 0))


@triton.jit
def f_isnan(a):
    return a != a


@triton.jit
def f_isinf(a):
    return tl.abs(a) == float("inf")


@triton.jit
def f_reciprocal(a):
    return 1.0 / a


@triton.jit
def f_words(seed, plane, row, group):
    """The four numbers of a call of Philox, as fuse.ir.philox has them: for columns 16 apart."""
    return tl.philox(seed, group, tl.cast(row, tl.int32), tl.cast(plane, tl.int32), tl.cast(0, tl.int32))


@triton.jit
def f_chosen(words, which):
    return tl.where(which < 2, tl.where(which == 0, words[0], words[1]), tl.where(which == 2, words[2], words[3]))


@triton.jit
def f_unit(word):
    return tl.cast(tl.cast(word >> 8, tl.int32), tl.float32) * 5.9604644775390625e-8


@triton.jit
def f_uniform(seed, plane, row, column):
    """Of any columns; a call of Philox for each."""
    column = tl.cast(column, tl.int32)
    words = f_words(seed, plane, row, (column >> 6) * 16 + (column & 15))
    return f_unit(f_chosen(words, (column >> 4) & 3))


@triton.jit
def f_uniform_along(seed, plane, row, start, SIZE: tl.constexpr):
    """Of the columns of a tile, which begins at a multiple of its size, a power of two, along its last dimension. Where threads
    have columns 16 apart, the compiler sees that they share a call."""
    lane = tl.arange(0, SIZE)[None, :]
    words = f_words(seed, plane, row, (start >> 6) * 16 + ((lane >> 6) * 16 + (lane & 15)))
    return f_unit(f_chosen(words, ((lane if SIZE >= 64 else start + lane) >> 4) & 3))


@triton.jit
def f_uniform_down(seed, plane, row, start, SIZE: tl.constexpr, OTHER: tl.constexpr):
    """The same down its first dimension, where threads have few columns: numbers are drawn by groups, and exchanged."""
    if SIZE >= 64:
        words = f_words(seed, plane, row, (start >> 6) * 16 + tl.arange(0, SIZE // 4)[:, None])
        four = tl.join(tl.join(words[0], words[1]), tl.join(words[2], words[3]))
        four = tl.reshape(four, [SIZE // 64, 16, OTHER, 2, 2])
        return f_unit(tl.reshape(tl.permute(four, (0, 4, 3, 1, 2)), [SIZE, OTHER]))
    else:
        return f_uniform(seed, plane, row, start + tl.arange(0, SIZE)[:, None])


@triton.jit(do_not_specialize=['B0', 'B1', 'q_len', 'kv_len'])
def fuse_attention(
    to, lse, query_rows, key_rows, value_rows, p0, p1, p2, B0, B1, q_len, kv_len, to_0, to_1, to_2, to_3, n0_0, n0_1, n0_2, n0_3, s0_0, s0_1, s0_2, s0_3, n1_0, n1_1, n1_2, n1_3, s1_0, s1_1, s1_2, s1_3, n2_0, n2_1, n2_2, n2_3, s2_0, s2_1, s2_2, s2_3,
    DESCRIBED: tl.constexpr, LISTED: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    # The last block first: with a causal mask it has the most keys.
    blocks = (q_len + BM - 1) // BM
    block = blocks - 1 - tl.program_id(0) % blocks
    site = tl.program_id(0) // blocks
    rest = site
    b1 = rest % B1
    rest = rest // B1
    b0 = rest % B0
    rest = rest // B0
    q0 = block * BM
    q1 = tl.minimum(q0 + BM, q_len) - 1
    q = q0 + tl.arange(0, BM)[:, None]
    q_ok = q < q_len
    line = tl.cast(site, tl.int64) * q_len + q
    x3 = 1 + q
    x4 = tl.maximum(x3, 0)
    x5 = tl.minimum(x4, kv_len)
    x6 = tl.cast(x5, tl.int32)
    d = tl.arange(0, 64)[None, :]
    d_ok = d < 64
    if DESCRIBED:
        query = tl.reshape(query_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(q0, tl.int32), 0]), [BM, 64])
    else:
        query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1 + tl.cast(q, tl.int64) * s0_2 + tl.cast(d, tl.int64) * s0_3, mask=d_ok & q_ok, other=0)

    d = tl.arange(0, 64)[:, None]
    d_ok = d < 64
    e = tl.arange(0, 64)[None, :]
    e_ok = e < 64
    k_lane = tl.arange(0, BN)[None, :]
    row_lane = tl.arange(0, BN)[:, None]
    key_at = p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(k_lane, tl.int64) * s1_2 + tl.cast(d, tl.int64) * s1_3
    value_at = p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1 + tl.cast(row_lane, tl.int64) * s2_2 + tl.cast(e, tl.int64) * s2_3

    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, 64], tl.float32)

    begin = 0
    end = kv_len
    full_begin = 0
    full_end = kv_len
    x1 = 1 + q0
    x2 = 1 + q1
    end = tl.cast(tl.minimum(tl.maximum(x2, 0), kv_len), tl.int32)
    full_end = tl.cast(tl.minimum(tl.maximum(x1, 0), kv_len), tl.int32)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_begin, full_end // BN * BN)

    for k0 in range(full_begin, full_end, BN):
        k = k0 + k_lane
        k_ok = k < kv_len
        if DESCRIBED:
            key = tl.trans(tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64]))
        else:
            key = tl.load(key_at + tl.cast(k0, tl.int64) * s1_2)

        raw = tl.dot(query, key, input_precision=PRECISION)
        score = raw
        highest = tl.maximum(top, tl.max(score, 1))
        reference = tl.where(highest == -float("inf"), 0.0, highest)
        shrink = tl.exp2((top - reference) * 0.18033688011112042)
        prob = tl.exp2(score * 0.18033688011112042 - (reference * 0.18033688011112042)[:, None])
        total = total * shrink + tl.sum(prob, 1)
        row = k0 + row_lane
        row_ok = row < kv_len
        if DESCRIBED:
            value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64])
        else:
            value = tl.load(value_at + tl.cast(k0, tl.int64) * s2_2)

        out = out * shrink[:, None] + tl.dot(tl.cast(prob, value.dtype), value, input_precision=PRECISION)
        top = highest

    for k0 in range(full_end, end, BN):
        k = k0 + k_lane
        k_ok = k < kv_len
        if DESCRIBED:
            key = tl.trans(tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64]))
        else:
            key = tl.load(key_at + tl.cast(k0, tl.int64) * s1_2, mask=d_ok & k_ok, other=0)

        raw = tl.dot(query, key, input_precision=PRECISION)
        score = tl.where((k_lane < x6 - k0), raw, -float("inf"))
        highest = tl.maximum(top, tl.max(score, 1))
        reference = tl.where(highest == -float("inf"), 0.0, highest)
        shrink = tl.exp2((top - reference) * 0.18033688011112042)
        prob = tl.exp2(score * 0.18033688011112042 - (reference * 0.18033688011112042)[:, None])
        total = total * shrink + tl.sum(prob, 1)
        row = k0 + row_lane
        row_ok = row < kv_len
        if DESCRIBED:
            value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64])
        else:
            value = tl.load(value_at + tl.cast(k0, tl.int64) * s2_2, mask=e_ok & row_ok, other=0)

        out = out * shrink[:, None] + tl.dot(tl.cast(prob, value.dtype), value, input_precision=PRECISION)
        top = highest

    scale = tl.full([BM], 1.0, tl.float32)
    highest = top * 0.125
    factor = scale / total
    log_sum = highest + tl.log(total)

    offset = tl.cast(b0, tl.int64) * to_0 + tl.cast(b1, tl.int64) * to_1 + tl.cast(q, tl.int64) * to_2 + tl.cast(e, tl.int64) * to_3
    done = q_ok
    again = (((top * 0.125 > -3.3895313892515355e+38) & (tl.abs(total) < float("inf"))) == 0)[:, None] & q_ok
    done = q_ok & (again == 0)
    tl.store(to + offset, tl.cast(out * factor[:, None], to.dtype.element_ty), mask=done & e_ok)
    if HAS_LSE:
        tl.store(lse + line, log_sum[:, None], mask=done)
    if tl.max(tl.cast(again, tl.int32)) > 0:
        # Rows that see nothing, or so little that eager's roundings show: every key, rounded as eager rounds.
        top = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        out = tl.zeros([BM, 64], tl.float32)

        for k0 in range(0, kv_len, BN):
            k = k0 + k_lane
            k_ok = k < kv_len
            if DESCRIBED:
                key = tl.trans(tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64]))
            else:
                key = tl.load(key_at + tl.cast(k0, tl.int64) * s1_2, mask=d_ok & k_ok, other=0)

            raw = tl.dot(query, key, input_precision=PRECISION)
            x7 = tl.cast(tl.cast(tl.cast(tl.cast(raw, tl.bfloat16), tl.float32), tl.bfloat16), tl.float32)
            x8 = tl.cast(tl.cast(x7 * 0.125, tl.bfloat16), tl.float32)
            x9 = k <= q
            x10 = tl.cast(tl.cast(tl.where(x9, 0.0, -3.3895313892515355e+38), tl.bfloat16), tl.float32)
            x11 = tl.cast(tl.cast(x8 + x10, tl.bfloat16), tl.float32)
            score = tl.where(k_ok, x11, -float("inf"))
            highest = tl.maximum(top, tl.max(score, 1))
            reference = tl.where(highest == -float("inf"), 0.0, highest)
            shrink = tl.exp2((top - reference) * 1.4426950408889634)
            prob = tl.exp2((score - reference[:, None]) * 1.4426950408889634)
            total = total * shrink + tl.sum(prob, 1)
            row = k0 + row_lane
            row_ok = row < kv_len
            if DESCRIBED:
                value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64])
            else:
                value = tl.load(value_at + tl.cast(k0, tl.int64) * s2_2, mask=e_ok & row_ok, other=0)

            out = out * shrink[:, None] + tl.dot(tl.cast(prob, value.dtype), value, input_precision=PRECISION)
            top = highest

        scale = tl.full([BM], 1.0, tl.float32)
        highest = top * 1.0
        factor = scale / total
        log_sum = highest + tl.log(total)

        tl.store(to + offset, tl.cast(out * factor[:, None], to.dtype.element_ty), mask=again & e_ok)
        if HAS_LSE:
            tl.store(lse + line, log_sum[:, None], mask=again)



if __name__ == "__main__":
    # Runs the kernel on random tensors; prints the median time and a checksum.
    from fuse.targets.triton.alone import run

    run(__file__)
