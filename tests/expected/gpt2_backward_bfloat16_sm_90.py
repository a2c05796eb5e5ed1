# gradients of query, key, value, as fuse.ir.gradient has them, of
# out = sum over k of w * value,  w = prob
# softmax over k of (score * 0.125) + where(k <= q, 0, -3.38953e+38)
# visible where k <= q
# spec  {"batch":2,"empty_row":"nan","expr":{"nodes":[["Index","int64","b0"],["Index","int64","b1"],["Index","int64","q"],["Index","int64","d"],["Load","bfloat16",0,[0,1,2,3]],["Index","int64","k"],["Load","bfloat16",1,[0,1,5,3]],["Index","int64","e"],["Load","bfloat16",2,[0,1,5,7]],["Score","bfloat16"],["Const","bfloat16","0x1.0000000000000p-3"],["Apply","bfloat16","mul",[9,10]],["Apply","bool","le",[5,2]],["Const","bfloat16","0x0.0p+0"],["Const","bfloat16","-0x1.fe00000000000p+127"],["Apply","bfloat16","where",[12,13,14]],["Apply","bfloat16","add",[11,15]],["Prob","bfloat16"],["Const","int64",1],["Apply","int64","add",[18,2]]],"roots":{"key":6,"mask.predicate":12,"mask.upper":19,"mask.visible":11,"query":4,"score":16,"value":8,"weight":17}},"extra":[],"fill":"-0x1.fe00000000000p+127","operands":[[4,"bfloat16"],[4,"bfloat16"],[4,"bfloat16"]],"out_dtype":"bfloat16","out_order":[0,2,1,3],"qk_dim":64,"v_dim":64,"version":1}
# wanted  [true, true, true]
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
def fuse_attention_rows(
    out, grad_out, lse, normal, delta, tops, rests, flags, sg_0, sg_1, sg_2, sg_3, 
    p0, p1, p2, B0, B1, q_len, kv_len, n0_0, n0_1, n0_2, n0_3, s0_0, s0_1, s0_2, s0_3, n1_0, n1_1, n1_2, n1_3, s1_0, s1_1, s1_2, s1_3, n2_0, n2_1, n2_2, n2_3, s2_0, s2_1, s2_2, s2_3,
so_0, so_1, so_2, so_3, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    # The sum over the features of a row of the result and of its gradient.
    blocks = (q_len + BM - 1) // BM
    site = tl.program_id(0) // blocks
    left = site
    b1 = left % B1
    left = left // B1
    b0 = left % B0
    left = left // B0
    line = tl.cast(site, tl.int64) * q_len
    q = tl.program_id(0) % blocks * BM + tl.arange(0, BM)[:, None]
    q_ok = q < q_len
    d = tl.arange(0, 64)[None, :]
    d_ok = d < 64
    e = tl.arange(0, 64)[None, :]
    e_ok = e < 64
    share = tl.sum(tl.cast(tl.load(grad_out + tl.cast(b0, tl.int64) * sg_0 + tl.cast(b1, tl.int64) * sg_1 + tl.cast(q, tl.int64) * sg_2 + tl.cast(e, tl.int64) * sg_3, mask=q_ok & e_ok, other=0), tl.float32) * tl.cast(tl.load(out + tl.cast(b0, tl.int64) * so_0 + tl.cast(b1, tl.int64) * so_1 + tl.cast(q, tl.int64) * so_2 + tl.cast(e, tl.int64) * so_3, mask=q_ok & e_ok, other=0), tl.float32), 1)[:, None]
    tl.store(delta + line + q, share, mask=q_ok)
    # Log-sum-exp in base 2. Where it has lost its digits it is infinite, so that probabilities vanish.
    log_sum = tl.load(lse + line + q, mask=q_ok, other=float("inf"))
    lost = log_sum <= -1000.0
    tl.store(normal + line + q, tl.where(lost, float("inf"), log_sum * 1.4426950408889634), mask=q_ok)
    if tl.max(tl.cast(lost, tl.int32)) > 0:
        # The softmax of these rows again, over every key, rounded as eager rounds.
        tl.store(flags + site, 1)
        query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1 + tl.cast(q, tl.int64) * s0_2 + tl.cast(d, tl.int64) * s0_3, mask=d_ok & q_ok, other=0)
        top = tl.full([BM, 1], -float("inf"), tl.float32)
        total = tl.zeros([BM, 1], tl.float32)
        for k0 in range(0, kv_len, BN):
            k_lane = tl.arange(0, BN)[None, :]
            k = k0 + k_lane
            k_ok = k < kv_len
            row = k0 + tl.arange(0, BN)[:, None]
            row_ok = row < kv_len
            key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(row, tl.int64) * s1_2 + tl.cast(d, tl.int64) * s1_3, mask=d_ok & row_ok, other=0)
            raw = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            x22 = tl.cast(tl.cast(tl.cast(tl.cast(raw, tl.bfloat16), tl.float32), tl.bfloat16), tl.float32)
            x23 = tl.cast(tl.cast(x22 * 0.125, tl.bfloat16), tl.float32)
            x24 = k <= q
            x25 = tl.cast(tl.cast(tl.where(x24, 0.0, -3.3895313892515355e+38), tl.bfloat16), tl.float32)
            x26 = tl.cast(tl.cast(x23 + x25, tl.bfloat16), tl.float32)
            score = tl.where(k_ok, x26, -float("inf"))
            higher = tl.maximum(top, tl.max(score, 1)[:, None])
            reference = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp(top - reference) + tl.sum(tl.exp(score - reference), 1)[:, None]
            top = higher
        tl.store(tops + line + q, top, mask=q_ok)
        tl.store(rests + line + q, tl.log(total), mask=q_ok)


@triton.jit(do_not_specialize=['B0', 'B1', 'q_len', 'kv_len'])
def fuse_attention_keys(
    grad_out, lse, normal, delta, tops, rests, flags, sg_0, sg_1, sg_2, sg_3, 
    p0, p1, p2, B0, B1, q_len, kv_len, n0_0, n0_1, n0_2, n0_3, s0_0, s0_1, s0_2, s0_3, n1_0, n1_1, n1_2, n1_3, s1_0, s1_1, s1_2, s1_3, n2_0, n2_1, n2_2, n2_3, s2_0, s2_1, s2_2, s2_3,
    sites, starts, g_key, s_key_0, s_key_1, s_key_2, s_key_3, g_value, s_value_0, s_value_1, s_value_2, s_value_3, 
HAS_key: tl.constexpr, HAS_value: tl.constexpr, ALONE: tl.constexpr, LISTED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    blocks = (kv_len + BN - 1) // BN
    group = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BN
    last = tl.minimum(first + BN, kv_len) - 1
    k = first + tl.arange(0, BN)[:, None]
    k_ok = k < kv_len
    d = tl.arange(0, 64)[None, :]
    d_ok = d < 64
    e = tl.arange(0, 64)[None, :]
    e_ok = e < 64
    d_key = tl.zeros([BN, 64], tl.float32)
    d_value = tl.zeros([BN, 64], tl.float32)
    SHARED: tl.constexpr = HAS_key and HAS_value
    if SHARED:
        site = tl.load(sites + tl.load(starts + group))
        left = site
        b1 = left % B1
        left = left // B1
        b0 = left % B0
        left = left // B0
        key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(k, tl.int64) * s1_2 + tl.cast(d, tl.int64) * s1_3, mask=d_ok & k_ok, other=0)
        value = tl.load(p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1 + tl.cast(k, tl.int64) * s2_2 + tl.cast(e, tl.int64) * s2_3, mask=e_ok & k_ok, other=0)
    # One after the other, what shares these keys.
    for member in range(group if ALONE else tl.load(starts + group), group + 1 if ALONE else tl.load(starts + group + 1)):
        site = tl.load(sites + member)
        left = site
        b1 = left % B1
        left = left // B1
        b0 = left % B0
        left = left // B0
        line = tl.cast(site, tl.int64) * q_len
        if not SHARED:
            key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(k, tl.int64) * s1_2 + tl.cast(d, tl.int64) * s1_3, mask=d_ok & k_ok, other=0)
            value = tl.load(p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1 + tl.cast(k, tl.int64) * s2_2 + tl.cast(e, tl.int64) * s2_3, mask=e_ok & k_ok, other=0)
        begin = 0
        end = q_len
        full_begin = 0
        full_end = q_len
        begin = tl.cast(tl.minimum(tl.maximum(first - (1) + 1, 0), q_len), tl.int32)
        full_begin = tl.cast(tl.minimum(tl.maximum(last - (1) + 1, 0), q_len), tl.int32)
        full_begin = tl.minimum((full_begin + BM - 1) // BM * BM, end)
        for q0 in range(begin // BM * BM, full_begin, BM):
            q_lane = tl.arange(0, BM)[None, :]
            q = q0 + q_lane
            q_ok = q < q_len
            row = q0 + tl.arange(0, BM)[:, None]
            row_ok = row < q_len
            lse2 = tl.load(normal + line + q, mask=q_ok, other=float("inf"))
            share = tl.load(delta + line + q, mask=q_ok, other=0)
            query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1 + tl.cast(row, tl.int64) * s0_2 + tl.cast(d, tl.int64) * s0_3, mask=d_ok & row_ok, other=0)
            grad = tl.load(grad_out + tl.cast(b0, tl.int64) * sg_0 + tl.cast(b1, tl.int64) * sg_1 + tl.cast(row, tl.int64) * sg_2 + tl.cast(e, tl.int64) * sg_3, mask=row_ok & e_ok, other=0)
            raw = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            x6 = 1 + q
            seen = q_ok & (k < x6)
            prob = tl.where(seen, tl.exp2(raw * 0.18033688011112042 - lse2), 0.0)
            if HAS_value:
                d_value = tl.dot(tl.cast(prob, grad.dtype), grad, d_value, input_precision=PRECISION)
            d_weight = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
            d_score = prob * (d_weight - share)
            if HAS_key:
                d_key = tl.dot(tl.cast(d_score, query.dtype), query, d_key, input_precision=PRECISION)
        for q0 in range(full_begin, full_end, BM):
            q_lane = tl.arange(0, BM)[None, :]
            q = q0 + q_lane
            q_ok = q < q_len
            row = q0 + tl.arange(0, BM)[:, None]
            row_ok = row < q_len
            lse2 = tl.load(normal + line + q, mask=q_ok, other=float("inf"))
            share = tl.load(delta + line + q, mask=q_ok, other=0)
            query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1 + tl.cast(row, tl.int64) * s0_2 + tl.cast(d, tl.int64) * s0_3, mask=d_ok & row_ok, other=0)
            grad = tl.load(grad_out + tl.cast(b0, tl.int64) * sg_0 + tl.cast(b1, tl.int64) * sg_1 + tl.cast(row, tl.int64) * sg_2 + tl.cast(e, tl.int64) * sg_3, mask=row_ok & e_ok, other=0)
            raw = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            prob = tl.exp2(raw * 0.18033688011112042 - lse2)
            if HAS_value:
                d_value = tl.dot(tl.cast(prob, grad.dtype), grad, d_value, input_precision=PRECISION)
            d_weight = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
            d_score = prob * (d_weight - share)
            if HAS_key:
                d_key = tl.dot(tl.cast(d_score, query.dtype), query, d_key, input_precision=PRECISION)
        if tl.load(flags + site) > 0:
            for q0 in range(0, q_len, BM):
                q_lane = tl.arange(0, BM)[None, :]
                q = q0 + q_lane
                q_ok = q < q_len
                chosen = tl.load(lse + line + q, mask=q_ok, other=float("inf")) <= -1000.0
                top = tl.load(tops + line + q, mask=chosen, other=0)
                rest = tl.load(rests + line + q, mask=chosen, other=0)
                if tl.max(tl.cast(chosen, tl.int32)) > 0:
                    q_lane = tl.arange(0, BM)[None, :]
                    q = q0 + q_lane
                    q_ok = q < q_len
                    row = q0 + tl.arange(0, BM)[:, None]
                    row_ok = row < q_len
                    lse2 = tl.load(normal + line + q, mask=q_ok, other=float("inf"))
                    share = tl.load(delta + line + q, mask=q_ok, other=0)
                    query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1 + tl.cast(row, tl.int64) * s0_2 + tl.cast(d, tl.int64) * s0_3, mask=d_ok & row_ok, other=0)
                    grad = tl.load(grad_out + tl.cast(b0, tl.int64) * sg_0 + tl.cast(b1, tl.int64) * sg_1 + tl.cast(row, tl.int64) * sg_2 + tl.cast(e, tl.int64) * sg_3, mask=row_ok & e_ok, other=0)
                    raw = tl.dot(key, tl.trans(query), input_precision=PRECISION)
                    x1 = tl.cast(tl.cast(tl.cast(tl.cast(raw, tl.bfloat16), tl.float32), tl.bfloat16), tl.float32)
                    x2 = tl.cast(tl.cast(x1 * 0.125, tl.bfloat16), tl.float32)
                    x3 = k <= q
                    x4 = tl.cast(tl.cast(tl.where(x3, 0.0, -3.3895313892515355e+38), tl.bfloat16), tl.float32)
                    x5 = tl.cast(tl.cast(x2 + x4, tl.bfloat16), tl.float32)
                    prob = tl.where(chosen & q_ok, tl.exp2((x5 - top - rest) * 1.4426950408889634), 0.0)
                    if HAS_value:
                        d_value = tl.dot(tl.cast(prob, grad.dtype), grad, d_value, input_precision=PRECISION)
                    d_weight = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
                    d_score = prob * (d_weight - share)
                    if HAS_key:
                        d_key = tl.dot(tl.cast(d_score * 0.125 * 8.0, query.dtype), query, d_key, input_precision=PRECISION)
    site = tl.load(sites + tl.load(starts + group))
    left = site
    b1 = left % B1
    left = left // B1
    b0 = left % B0
    left = left // B0
    if HAS_key:
        done = d_key * 0.125
        tl.store(g_key + tl.cast(b0, tl.int64) * s_key_0 + tl.cast(b1, tl.int64) * s_key_1 + tl.cast(k, tl.int64) * s_key_2 + tl.cast(d, tl.int64) * s_key_3, tl.cast(done, g_key.dtype.element_ty), mask=k_ok & d_ok)
    if HAS_value:
        done = d_value
        tl.store(g_value + tl.cast(b0, tl.int64) * s_value_0 + tl.cast(b1, tl.int64) * s_value_1 + tl.cast(k, tl.int64) * s_value_2 + tl.cast(e, tl.int64) * s_value_3, tl.cast(done, g_value.dtype.element_ty), mask=k_ok & e_ok)


@triton.jit(do_not_specialize=['B0', 'B1', 'q_len', 'kv_len'])
def fuse_attention_queries(
    grad_out, lse, normal, delta, tops, rests, flags, sg_0, sg_1, sg_2, sg_3, 
    p0, p1, p2, B0, B1, q_len, kv_len, n0_0, n0_1, n0_2, n0_3, s0_0, s0_1, s0_2, s0_3, n1_0, n1_1, n1_2, n1_3, s1_0, s1_1, s1_2, s1_3, n2_0, n2_1, n2_2, n2_3, s2_0, s2_1, s2_2, s2_3,
    key_rows, value_rows, sites, starts, g_query, s_query_0, s_query_1, s_query_2, s_query_3, 
HAS_query: tl.constexpr, DESCRIBED: tl.constexpr, ALONE: tl.constexpr, LISTED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    # The last block first: with a causal mask it has the most keys.
    blocks = (q_len + BM - 1) // BM
    group = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * BM
    last = tl.minimum(first + BM, q_len) - 1
    first_ok = first < q_len
    last_ok = last < q_len
    q = first + tl.arange(0, BM)[:, None]
    q_ok = q < q_len
    d = tl.arange(0, 64)[None, :]
    d_ok = d < 64
    e = tl.arange(0, 64)[None, :]
    e_ok = e < 64
    d_query = tl.zeros([BM, 64], tl.float32)
    # One after the other, what shares these queries.
    for member in range(group if ALONE else tl.load(starts + group), group + 1 if ALONE else tl.load(starts + group + 1)):
        site = tl.load(sites + member)
        left = site
        b1 = left % B1
        left = left // B1
        b0 = left % B0
        left = left // B0
        line = tl.cast(site, tl.int64) * q_len
        x12 = 1 + q
        x13 = tl.maximum(x12, 0)
        x14 = tl.minimum(x13, kv_len)
        x15 = tl.cast(x14, tl.int32)
        lse2 = tl.load(normal + line + q, mask=q_ok, other=float("inf"))
        share = tl.load(delta + line + q, mask=q_ok, other=0)
        query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1 + tl.cast(q, tl.int64) * s0_2 + tl.cast(d, tl.int64) * s0_3, mask=d_ok & q_ok, other=0)
        grad = tl.load(grad_out + tl.cast(b0, tl.int64) * sg_0 + tl.cast(b1, tl.int64) * sg_1 + tl.cast(q, tl.int64) * sg_2 + tl.cast(e, tl.int64) * sg_3, mask=q_ok & e_ok, other=0)
        begin = 0
        end = kv_len
        full_begin = 0
        full_end = kv_len
        x27 = 1 + first
        x28 = 1 + last
        full_end = tl.cast(tl.minimum(tl.maximum(x27, 0), kv_len), tl.int32)
        end = tl.cast(tl.minimum(tl.maximum(x28, 0), kv_len), tl.int32)
        full_end = tl.maximum(full_begin, tl.minimum(full_end, end) // BN * BN)
        for k0 in range(full_begin, full_end, BN):
            k_lane = tl.arange(0, BN)[None, :]
            k = k0 + k_lane
            k_ok = k < kv_len
            row = k0 + tl.arange(0, BN)[:, None]
            row_ok = row < kv_len
            if DESCRIBED:
                key = tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64])
            else:
                key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(row, tl.int64) * s1_2 + tl.cast(d, tl.int64) * s1_3, mask=d_ok & row_ok, other=0)
            if DESCRIBED:
                value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64])
            else:
                value = tl.load(p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1 + tl.cast(row, tl.int64) * s2_2 + tl.cast(e, tl.int64) * s2_3, mask=e_ok & row_ok, other=0)
            raw = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            prob = tl.exp2(raw * 0.18033688011112042 - lse2)
            d_weight = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
            d_score = prob * (d_weight - share)
            if HAS_query:
                d_query = tl.dot(tl.cast(d_score, key.dtype), key, d_query, input_precision=PRECISION)
        for k0 in range(full_end, end, BN):
            k_lane = tl.arange(0, BN)[None, :]
            k = k0 + k_lane
            k_ok = k < kv_len
            row = k0 + tl.arange(0, BN)[:, None]
            row_ok = row < kv_len
            if DESCRIBED:
                key = tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64])
            else:
                key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(row, tl.int64) * s1_2 + tl.cast(d, tl.int64) * s1_3, mask=d_ok & row_ok, other=0)
            if DESCRIBED:
                value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64])
            else:
                value = tl.load(p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1 + tl.cast(row, tl.int64) * s2_2 + tl.cast(e, tl.int64) * s2_3, mask=e_ok & row_ok, other=0)
            raw = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            seen = (k_lane < x15 - k0)
            prob = tl.where(seen, tl.exp2(raw * 0.18033688011112042 - lse2), 0.0)
            d_weight = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
            d_score = prob * (d_weight - share)
            if HAS_query:
                d_query = tl.dot(tl.cast(d_score, key.dtype), key, d_query, input_precision=PRECISION)
        chosen = tl.load(lse + line + q, mask=q_ok, other=float("inf")) <= -1000.0
        top = tl.load(tops + line + q, mask=chosen, other=0)
        rest = tl.load(rests + line + q, mask=chosen, other=0)
        if tl.max(tl.cast(chosen, tl.int32)) > 0:
            for k0 in range(0, kv_len, BN):
                k_lane = tl.arange(0, BN)[None, :]
                k = k0 + k_lane
                k_ok = k < kv_len
                row = k0 + tl.arange(0, BN)[:, None]
                row_ok = row < kv_len
                if DESCRIBED:
                    key = tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64])
                else:
                    key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(row, tl.int64) * s1_2 + tl.cast(d, tl.int64) * s1_3, mask=d_ok & row_ok, other=0)
                if DESCRIBED:
                    value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]), [BN, 64])
                else:
                    value = tl.load(p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1 + tl.cast(row, tl.int64) * s2_2 + tl.cast(e, tl.int64) * s2_3, mask=e_ok & row_ok, other=0)
                raw = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                x7 = tl.cast(tl.cast(tl.cast(tl.cast(raw, tl.bfloat16), tl.float32), tl.bfloat16), tl.float32)
                x8 = tl.cast(tl.cast(x7 * 0.125, tl.bfloat16), tl.float32)
                x9 = k <= q
                x10 = tl.cast(tl.cast(tl.where(x9, 0.0, -3.3895313892515355e+38), tl.bfloat16), tl.float32)
                x11 = tl.cast(tl.cast(x8 + x10, tl.bfloat16), tl.float32)
                prob = tl.where(chosen & k_ok, tl.exp2((x11 - top - rest) * 1.4426950408889634), 0.0)
                d_weight = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
                d_score = prob * (d_weight - share)
                if HAS_query:
                    d_query = tl.dot(tl.cast(d_score * 0.125 * 8.0, key.dtype), key, d_query, input_precision=PRECISION)
    if HAS_query:
        site = tl.load(sites + tl.load(starts + group))
        left = site
        b1 = left % B1
        left = left // B1
        b0 = left % B0
        left = left // B0
        tl.store(g_query + tl.cast(b0, tl.int64) * s_query_0 + tl.cast(b1, tl.int64) * s_query_1 + tl.cast(q, tl.int64) * s_query_2 + tl.cast(d, tl.int64) * s_query_3, tl.cast(d_query * 0.125, g_query.dtype.element_ty), mask=q_ok & d_ok)


if __name__ == "__main__":
    # Runs the kernel on random tensors; prints the median time and a checksum.
    from fuse.targets.triton.alone import run
    run(__file__)
