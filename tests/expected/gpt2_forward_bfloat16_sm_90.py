# out = sum over k of w * value,  w = prob
# softmax over k of (score * 0.125) + where(k <= q, 0, -3.38953e+38)
# visible where k <= q
# spec  {"batch":2,"empty_row":"nan","expr":{"nodes":[["Index","int64","b0"],["Index","int64","b1"],["Index","int64","q"],["Index","int64","d"],["Load","bfloat16",0,[0,1,2,3]],["Index","int64","k"],["Load","bfloat16",1,[0,1,5,3]],["Index","int64","e"],["Load","bfloat16",2,[0,1,5,7]],["Score","bfloat16"],["Const","bfloat16","0x1.0000000000000p-3"],["Apply","bfloat16","mul",[9,10]],["Apply","bool","le",[5,2]],["Const","bfloat16","0x0.0p+0"],["Const","bfloat16","-0x1.fe00000000000p+127"],["Apply","bfloat16","where",[12,13,14]],["Apply","bfloat16","add",[11,15]],["Prob","bfloat16"],["Const","int64",1],["Apply","int64","add",[18,2]]],"roots":{"key":6,"mask.predicate":12,"mask.upper":19,"mask.visible":11,"query":4,"score":16,"value":8,"weight":17}},"extra":[],"fill":"-0x1.fe00000000000p+127","normalisation":"softmax","operands":[[4,"bfloat16"],[4,"bfloat16"],[4,"bfloat16"]],"out_dtype":"bfloat16","out_order":[0,2,1,3],"qk_dim":64,"v_dim":64,"version":2}
# plan  TritonPlan(width=64, v_width=64, block_q=128, block_k=128, warps=8, stages=3, described=True)
# made by torch-fuse …
# alone: python -m fuse.alone <this file>, which compares it with float64 and times it beside SDPA
# operand 0 bfloat16, 4 dimensions: query at [b0, b1, q, d]
# operand 1 bfloat16, 4 dimensions: key at [b0, b1, k, d]
# operand 2 bfloat16, 4 dimensions: value at [b0, b1, k, e]
# sizes     B0, B1, q_len, kv_len
# result    bfloat16 at [b0, b1, q, e], in memory by b0, q, b1, e
# contents, in order
#   fuse_attention           The result of a block of queries, from the keys that they see.
#   # edit                   the score of an entry, from raw, the product of query and key
#   # edit                   the weight of an entry, from prob, which is not yet divided by l
import triton
import triton.language as tl


@triton.jit(do_not_specialize=['B0', 'B1', 'q_len', 'kv_len'])
def fuse_attention(
    out, lse, query_rows, key_rows, value_rows, p0, p1, p2,
    B0, B1, q_len, kv_len,
    s_out_0, s_out_1, s_out_2, s_out_3,
    s0_0, s0_1, s0_2, s0_3, s1_0, s1_1, s1_2, s1_3, s2_0, s2_1, s2_2, s2_3,
    DESCRIBED: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """The result of a block of queries, from the keys that they see."""
    # The last block first: with a causal mask it has the most keys.
    blocks = (q_len + BM - 1) // BM
    block = blocks - 1 - tl.program_id(0) % blocks
    flat_b = tl.program_id(0) // blocks
    rest = flat_b
    b1 = rest % B1
    rest = rest // B1
    b0 = rest % B0
    q0 = block * BM
    q1 = tl.minimum(q0 + BM, q_len) - 1
    q0_ok = q0 < q_len
    q1_ok = q1 < q_len
    q = q0 + tl.arange(0, BM)[:, None]
    q_ok = q < q_len
    row_at = tl.cast(flat_b, tl.int64) * q_len + q
    x1 = 1 + q
    x2 = tl.maximum(x1, 0)
    x3 = tl.minimum(x2, kv_len)
    x4 = tl.cast(x3, tl.int32)
    d = tl.arange(0, 64)[None, :]
    d_ok = d < 64
    if DESCRIBED:
        query = tl.reshape(query_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(q0, tl.int32), 0]), [BM, 64])
    else:
        query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1 + tl.cast(q, tl.int64) * s0_2
            + tl.cast(d, tl.int64) * s0_3, mask=d_ok & q_ok, other=0)
    d = tl.arange(0, 64)[:, None]
    d_ok = d < 64
    e = tl.arange(0, 64)[None, :]
    e_ok = e < 64
    k_lane = tl.arange(0, BN)[None, :]
    row_lane = tl.arange(0, BN)[:, None]
    key_at = (p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(k_lane, tl.int64) * s1_2
        + tl.cast(d, tl.int64) * s1_3)
    value_at = (p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1 + tl.cast(row_lane, tl.int64) * s2_2
        + tl.cast(e, tl.int64) * s2_3)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, 64], tl.float32)
    begin = 0
    end = kv_len
    full_begin = 0
    full_end = kv_len
    x10 = 1 + q0
    full_end = tl.cast(tl.minimum(tl.maximum(x10, 0), kv_len), tl.int32)
    x11 = 1 + q1
    end = tl.cast(tl.minimum(tl.maximum(x11, 0), kv_len), tl.int32)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_begin, tl.minimum(full_end, end) // BN * BN)
    for k0 in range(full_begin, full_end, BN):
        k = k0 + k_lane
        k_ok = k < kv_len
        if DESCRIBED:
            key = tl.trans(tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]),
                [BN, 64]))
        else:
            key = tl.load(key_at + tl.cast(k0, tl.int64) * s1_2)
        raw = tl.dot(query, key, input_precision=PRECISION)
        # edit: the score of an entry, from raw, the product of query and key
        score = raw
        m_new = tl.maximum(m, tl.max(score, 1))
        reference = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = tl.exp2((m - reference) * 0.18033688011112042)
        prob = tl.exp2(score * 0.18033688011112042 - (reference * 0.18033688011112042)[:, None])
        l = l * alpha + tl.sum(prob, 1)
        # edit: the weight of an entry, from prob, which is not yet divided by l
        row = k0 + row_lane
        row_ok = row < kv_len
        if DESCRIBED:
            value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]),
                [BN, 64])
        else:
            value = tl.load(value_at + tl.cast(k0, tl.int64) * s2_2)
        acc = acc * alpha[:, None] + tl.dot(tl.cast(prob, value.dtype), value, input_precision=PRECISION)
        m = m_new
    for k0 in range(full_end, end, BN):
        k = k0 + k_lane
        k_ok = k < kv_len
        if DESCRIBED:
            key = tl.trans(tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]),
                [BN, 64]))
        else:
            key = tl.load(key_at + tl.cast(k0, tl.int64) * s1_2, mask=d_ok & k_ok, other=0)
        raw = tl.dot(query, key, input_precision=PRECISION)
        # edit: the score of an entry, from raw, the product of query and key
        score = tl.where((k_lane < x4 - k0), raw, -float("inf"))
        m_new = tl.maximum(m, tl.max(score, 1))
        reference = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = tl.exp2((m - reference) * 0.18033688011112042)
        prob = tl.exp2(score * 0.18033688011112042 - (reference * 0.18033688011112042)[:, None])
        l = l * alpha + tl.sum(prob, 1)
        # edit: the weight of an entry, from prob, which is not yet divided by l
        row = k0 + row_lane
        row_ok = row < kv_len
        if DESCRIBED:
            value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]),
                [BN, 64])
        else:
            value = tl.load(value_at + tl.cast(k0, tl.int64) * s2_2, mask=e_ok & row_ok, other=0)
        acc = acc * alpha[:, None] + tl.dot(tl.cast(prob, value.dtype), value, input_precision=PRECISION)
        m = m_new
    scale = tl.full([BM], 1.0, tl.float32)
    largest = m * 0.125
    factor = scale / l
    log_sum = largest + tl.log(l)
    out_at = (tl.cast(b0, tl.int64) * s_out_0 + tl.cast(b1, tl.int64) * s_out_1 + tl.cast(q, tl.int64) * s_out_2
        + tl.cast(e, tl.int64) * s_out_3)
    exact = (((m * 0.125 > -3.3895313892515355e+38) & (tl.abs(l) < float("inf"))) == 0)[:, None] & q_ok
    ordinary = q_ok & (exact == 0)
    tl.store(out + out_at, tl.cast(acc * factor[:, None], out.dtype.element_ty), mask=ordinary & e_ok)
    if HAS_LSE:
        tl.store(lse + row_at, log_sum[:, None], mask=ordinary)
    if tl.max(tl.cast(exact, tl.int32)) > 0:
        # Rows that see nothing, or so little that eager's roundings show: every key, rounded as eager rounds.
        m = tl.full([BM], -float("inf"), tl.float32)
        l = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, 64], tl.float32)
        for k0 in range(0, kv_len, BN):
            k = k0 + k_lane
            k_ok = k < kv_len
            if DESCRIBED:
                key = tl.trans(tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32),
                    0]), [BN, 64]))
            else:
                key = tl.load(key_at + tl.cast(k0, tl.int64) * s1_2, mask=d_ok & k_ok, other=0)
            raw = tl.dot(query, key, input_precision=PRECISION)
            # edit: the score of an entry, from raw, the product of query and key
            x5 = tl.cast(tl.cast(tl.cast(tl.cast(raw, tl.bfloat16), tl.float32), tl.bfloat16), tl.float32)
            x6 = tl.cast(tl.cast(x5 * 0.125, tl.bfloat16), tl.float32)
            x7 = k <= q
            x8 = tl.cast(tl.cast(tl.where(x7, 0.0, -3.3895313892515355e+38), tl.bfloat16), tl.float32)
            x9 = tl.cast(tl.cast(x6 + x8, tl.bfloat16), tl.float32)
            score = tl.where(k_ok, x9, -float("inf"))
            m_new = tl.maximum(m, tl.max(score, 1))
            reference = tl.where(m_new == -float("inf"), 0.0, m_new)
            alpha = tl.exp2((m - reference) * 1.4426950408889634)
            prob = tl.exp2((score - reference[:, None]) * 1.4426950408889634)
            l = l * alpha + tl.sum(prob, 1)
            # edit: the weight of an entry, from prob, which is not yet divided by l
            row = k0 + row_lane
            row_ok = row < kv_len
            if DESCRIBED:
                value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]),
                    [BN, 64])
            else:
                value = tl.load(value_at + tl.cast(k0, tl.int64) * s2_2, mask=e_ok & row_ok, other=0)
            acc = acc * alpha[:, None] + tl.dot(tl.cast(prob, value.dtype), value, input_precision=PRECISION)
            m = m_new
        scale = tl.full([BM], 1.0, tl.float32)
        largest = m * 1.0
        factor = scale / l
        log_sum = largest + tl.log(l)
        tl.store(out + out_at, tl.cast(acc * factor[:, None], out.dtype.element_ty), mask=exact & e_ok)
        if HAS_LSE:
            tl.store(lse + row_at, log_sum[:, None], mask=exact)


if __name__ == "__main__":
    # Runs the kernel by itself: --help says how.
    from fuse.alone import run
    run(__file__)
