# gradients of query, key, value, as fuse.ir.gradient has them, of
# out = sum over k of w * value,  w = prob
# softmax over k of (score * 0.125) + where(k <= q, 0, -3.38953e+38)
# visible where k <= q
# spec  {"batch":2,"empty_row":"nan","expr":{"nodes":[["Index","int64","b0"],["Index","int64","b1"],["Index","int64","q"],["Index","int64","d"],["Load","bfloat16",0,[0,1,2,3]],["Index","int64","k"],["Load","bfloat16",1,[0,1,5,3]],["Index","int64","e"],["Load","bfloat16",2,[0,1,5,7]],["Score","bfloat16"],["Const","bfloat16","0x1.0000000000000p-3"],["Apply","bfloat16","mul",[9,10]],["Apply","bool","le",[5,2]],["Const","bfloat16","0x0.0p+0"],["Const","bfloat16","-0x1.fe00000000000p+127"],["Apply","bfloat16","where",[12,13,14]],["Apply","bfloat16","add",[11,15]],["Prob","bfloat16"],["Const","int64",1],["Apply","int64","add",[18,2]]],"roots":{"key":6,"mask.predicate":12,"mask.upper":19,"mask.visible":11,"query":4,"score":16,"value":8,"weight":17}},"extra":[],"fill":"-0x1.fe00000000000p+127","normalisation":"softmax","operands":[[4,"bfloat16"],[4,"bfloat16"],[4,"bfloat16"]],"out_dtype":"bfloat16","out_order":[0,2,1,3],"qk_dim":64,"v_dim":64,"version":2}
# wanted  [true, true, true]
# made by torch-fuse …
# alone: python -m fuse.alone <this file>, which compares it with float64 and times it beside SDPA
# operand 0 bfloat16, 4 dimensions: query at [b0, b1, q, d]
# operand 1 bfloat16, 4 dimensions: key at [b0, b1, k, d]
# operand 2 bfloat16, 4 dimensions: value at [b0, b1, k, e]
# sizes     B0, B1, q_len, kv_len
# result    bfloat16 at [b0, b1, q, e], in memory by b0, q, b1, e
# contents, in order
#   fuse_attention_rows      What gradients need of each row: delta, and log-sum-exp in base 2.
#   fuse_attention_keys      Gradients of a block of keys and their values, from the queries that see them.
#   fuse_attention_queries   Gradients of a block of queries, from the keys that they see.
#   # edit                   the score of an entry, from raw, the product of query and key
#   # edit                   probability, weight and score's gradient of an entry, from raw, the product of query and key
import triton
import triton.language as tl


@triton.jit(do_not_specialize=['B0', 'B1', 'q_len', 'kv_len'])
def fuse_attention_rows(
    out, grad_out, lse, lse2, delta, exact_m, exact_log_l, has_exact, p0, p1,
    grad_lse,
    B0, B1, q_len, kv_len,
    s_out_0, s_out_1, s_out_2, s_out_3, s_grad_out_0, s_grad_out_1, s_grad_out_2, s_grad_out_3,
    s0_0, s0_1, s0_2, s0_3, s1_0, s1_1, s1_2, s1_3,
    HAS_GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """What gradients need of each row: delta, and log-sum-exp in base 2."""
    # delta: the sum over the features of the result and its gradient (FlashAttention-2, Dao 2023, algorithm 2), less the
    # gradient of the log-sum-exp.
    blocks = (q_len + BM - 1) // BM
    flat_b = tl.program_id(0) // blocks
    rest = flat_b
    b1 = rest % B1
    rest = rest // B1
    b0 = rest % B0
    row_at = tl.cast(flat_b, tl.int64) * q_len
    q = tl.program_id(0) % blocks * BM + tl.arange(0, BM)[:, None]
    q_ok = q < q_len
    d = tl.arange(0, 64)[None, :]
    d_ok = d < 64
    e = tl.arange(0, 64)[None, :]
    e_ok = e < 64
    row_delta = tl.sum(tl.cast(tl.load(grad_out + tl.cast(b0, tl.int64) * s_grad_out_0 + tl.cast(b1, tl.int64) * s_grad_out_1
        + tl.cast(q, tl.int64) * s_grad_out_2 + tl.cast(e, tl.int64) * s_grad_out_3, mask=q_ok & e_ok, other=0), tl.float32)
        * tl.cast(tl.load(out + tl.cast(b0, tl.int64) * s_out_0 + tl.cast(b1, tl.int64) * s_out_1
        + tl.cast(q, tl.int64) * s_out_2 + tl.cast(e, tl.int64) * s_out_3, mask=q_ok & e_ok, other=0), tl.float32), 1)[:, None]
    if HAS_GRAD_LSE:
        row_delta -= tl.load(grad_lse + row_at + q, mask=q_ok, other=0)
    tl.store(delta + row_at + q, row_delta, mask=q_ok)
    # Log-sum-exp in base 2. Where it has lost its digits it is infinite, so that probabilities vanish.
    log_sum = tl.load(lse + row_at + q, mask=q_ok, other=float("inf"))
    exact = (log_sum <= -1000.0) | ((log_sum >= 1000.0) & (log_sum < float("inf")))
    tl.store(lse2 + row_at + q, tl.where(exact, float("inf"), log_sum * 1.4426950408889634), mask=q_ok)
    if tl.max(tl.cast(exact, tl.int32)) > 0:
        # The softmax of these rows again, over every key, rounded as eager rounds.
        tl.store(has_exact + flat_b, 1)
        query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1 + tl.cast(q, tl.int64) * s0_2
            + tl.cast(d, tl.int64) * s0_3, mask=d_ok & q_ok, other=0)
        m = tl.full([BM, 1], -float("inf"), tl.float32)
        l = tl.zeros([BM, 1], tl.float32)
        for k0 in range(0, kv_len, BN):
            k_lane = tl.arange(0, BN)[None, :]
            k = k0 + k_lane
            k_ok = k < kv_len
            row = k0 + tl.arange(0, BN)[:, None]
            row_ok = row < kv_len
            key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(row, tl.int64) * s1_2
                + tl.cast(d, tl.int64) * s1_3, mask=d_ok & row_ok, other=0)
            raw = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            # edit: the score of an entry, from raw, the product of query and key
            x22 = tl.cast(tl.cast(tl.cast(tl.cast(raw, tl.bfloat16), tl.float32), tl.bfloat16), tl.float32)
            x23 = tl.cast(tl.cast(x22 * 0.125, tl.bfloat16), tl.float32)
            x24 = k <= q
            x25 = tl.cast(tl.cast(tl.where(x24, 0.0, -3.3895313892515355e+38), tl.bfloat16), tl.float32)
            x26 = tl.cast(tl.cast(x23 + x25, tl.bfloat16), tl.float32)
            score = tl.where(k_ok, x26, -float("inf"))
            m_new = tl.maximum(m, tl.max(score, 1)[:, None])
            reference = tl.where(m_new == -float("inf"), 0.0, m_new)
            l = l * tl.exp(m - reference) + tl.sum(tl.exp(score - reference), 1)[:, None]
            m = m_new
        tl.store(exact_m + row_at + q, m, mask=q_ok)
        tl.store(exact_log_l + row_at + q, tl.log(l), mask=q_ok)


@triton.jit(do_not_specialize=['B0', 'B1', 'q_len', 'kv_len'])
def fuse_attention_keys(
    grad_out, lse, lse2, delta, exact_m, exact_log_l, has_exact, p0, p1, p2,
    members, starts, grad_key, grad_value,
    B0, B1, q_len, kv_len,
    s_grad_out_0, s_grad_out_1, s_grad_out_2, s_grad_out_3,
    s0_0, s0_1, s0_2, s0_3, s1_0, s1_1, s1_2, s1_3, s2_0, s2_1, s2_2, s2_3,
    s_grad_key_0, s_grad_key_1, s_grad_key_2, s_grad_key_3, s_grad_value_0, s_grad_value_1, s_grad_value_2, s_grad_value_3,
    HAS_key: tl.constexpr, HAS_value: tl.constexpr, ALONE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradients of a block of keys and their values, from the queries that see them."""
    blocks = (kv_len + BN - 1) // BN
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks
    k0 = block * BN
    k1 = tl.minimum(k0 + BN, kv_len) - 1
    k = k0 + tl.arange(0, BN)[:, None]
    k_ok = k < kv_len
    d = tl.arange(0, 64)[None, :]
    d_ok = d < 64
    e = tl.arange(0, 64)[None, :]
    e_ok = e < 64
    d_key = tl.zeros([BN, 64], tl.float32)
    d_value = tl.zeros([BN, 64], tl.float32)
    SHARED: tl.constexpr = HAS_key and HAS_value
    if SHARED:
        flat_b = tl.load(members + tl.load(starts + group))
        rest = flat_b
        b1 = rest % B1
        rest = rest // B1
        b0 = rest % B0
        key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(k, tl.int64) * s1_2
            + tl.cast(d, tl.int64) * s1_3, mask=d_ok & k_ok, other=0)
        value = tl.load(p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1 + tl.cast(k, tl.int64) * s2_2
            + tl.cast(e, tl.int64) * s2_3, mask=e_ok & k_ok, other=0)
    # One after the other, what shares these keys.
    for member in range(group if ALONE else tl.load(starts + group), group + 1 if ALONE else tl.load(starts + group + 1)):
        flat_b = tl.load(members + member)
        rest = flat_b
        b1 = rest % B1
        rest = rest // B1
        b0 = rest % B0
        row_at = tl.cast(flat_b, tl.int64) * q_len
        if not SHARED:
            key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(k, tl.int64) * s1_2
                + tl.cast(d, tl.int64) * s1_3, mask=d_ok & k_ok, other=0)
            value = tl.load(p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1 + tl.cast(k, tl.int64) * s2_2
                + tl.cast(e, tl.int64) * s2_3, mask=e_ok & k_ok, other=0)
        begin = 0
        end = q_len
        full_begin = 0
        full_end = q_len
        begin = tl.cast(tl.minimum(tl.maximum(k0 - (1) + 1, 0), q_len), tl.int32)
        full_begin = tl.cast(tl.minimum(tl.maximum(k1 - (1) + 1, 0), q_len), tl.int32)
        full_begin = tl.minimum((full_begin + BM - 1) // BM * BM, end)
        for q0 in range(begin // BM * BM, full_begin, BM):
            q_lane = tl.arange(0, BM)[None, :]
            q = q0 + q_lane
            q_ok = q < q_len
            row = q0 + tl.arange(0, BM)[:, None]
            row_ok = row < q_len
            row_lse2 = tl.load(lse2 + row_at + q, mask=q_ok, other=float("inf"))
            row_delta = tl.load(delta + row_at + q, mask=q_ok, other=0)
            query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1 + tl.cast(row, tl.int64) * s0_2
                + tl.cast(d, tl.int64) * s0_3, mask=d_ok & row_ok, other=0)
            grad = tl.load(grad_out + tl.cast(b0, tl.int64) * s_grad_out_0 + tl.cast(b1, tl.int64) * s_grad_out_1
                + tl.cast(row, tl.int64) * s_grad_out_2 + tl.cast(e, tl.int64) * s_grad_out_3, mask=row_ok & e_ok, other=0)
            raw = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            # edit: probability, weight and score's gradient of an entry, from raw, the product of query and key
            x6 = 1 + q
            seen = q_ok & (k < x6)
            prob = tl.where(seen, tl.exp2(raw * 0.18033688011112042 - row_lse2), 0.0)
            if HAS_value:
                d_value = tl.dot(tl.cast(prob, grad.dtype), grad, d_value, input_precision=PRECISION)
            d_weight = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
            d_score = prob * (d_weight - row_delta)
            if HAS_key:
                d_key = tl.dot(tl.cast(d_score, query.dtype), query, d_key, input_precision=PRECISION)
        for q0 in range(full_begin, full_end, BM):
            q_lane = tl.arange(0, BM)[None, :]
            q = q0 + q_lane
            q_ok = q < q_len
            row = q0 + tl.arange(0, BM)[:, None]
            row_ok = row < q_len
            row_lse2 = tl.load(lse2 + row_at + q, mask=q_ok, other=float("inf"))
            row_delta = tl.load(delta + row_at + q, mask=q_ok, other=0)
            query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1 + tl.cast(row, tl.int64) * s0_2
                + tl.cast(d, tl.int64) * s0_3, mask=d_ok & row_ok, other=0)
            grad = tl.load(grad_out + tl.cast(b0, tl.int64) * s_grad_out_0 + tl.cast(b1, tl.int64) * s_grad_out_1
                + tl.cast(row, tl.int64) * s_grad_out_2 + tl.cast(e, tl.int64) * s_grad_out_3, mask=row_ok & e_ok, other=0)
            raw = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            # edit: probability, weight and score's gradient of an entry, from raw, the product of query and key
            prob = tl.exp2(raw * 0.18033688011112042 - row_lse2)
            if HAS_value:
                d_value = tl.dot(tl.cast(prob, grad.dtype), grad, d_value, input_precision=PRECISION)
            d_weight = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
            d_score = prob * (d_weight - row_delta)
            if HAS_key:
                d_key = tl.dot(tl.cast(d_score, query.dtype), query, d_key, input_precision=PRECISION)
        if tl.load(has_exact + flat_b) > 0:
            for q0 in range(0, q_len, BM):
                q_lane = tl.arange(0, BM)[None, :]
                q = q0 + q_lane
                q_ok = q < q_len
                log_sum = tl.load(lse + row_at + q, mask=q_ok, other=float("inf"))
                exact = (log_sum <= -1000.0) | ((log_sum >= 1000.0) & (log_sum < float("inf")))
                m = tl.load(exact_m + row_at + q, mask=exact, other=0)
                log_l = tl.load(exact_log_l + row_at + q, mask=exact, other=0)
                if tl.max(tl.cast(exact, tl.int32)) > 0:
                    q_lane = tl.arange(0, BM)[None, :]
                    q = q0 + q_lane
                    q_ok = q < q_len
                    row = q0 + tl.arange(0, BM)[:, None]
                    row_ok = row < q_len
                    row_lse2 = tl.load(lse2 + row_at + q, mask=q_ok, other=float("inf"))
                    row_delta = tl.load(delta + row_at + q, mask=q_ok, other=0)
                    query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1
                        + tl.cast(row, tl.int64) * s0_2 + tl.cast(d, tl.int64) * s0_3, mask=d_ok & row_ok, other=0)
                    grad = tl.load(grad_out + tl.cast(b0, tl.int64) * s_grad_out_0 + tl.cast(b1, tl.int64) * s_grad_out_1
                        + tl.cast(row, tl.int64) * s_grad_out_2 + tl.cast(e, tl.int64) * s_grad_out_3, mask=row_ok & e_ok,
                        other=0)
                    raw = tl.dot(key, tl.trans(query), input_precision=PRECISION)
                    # edit: probability, weight and score's gradient of an entry, from raw, the product of query and key
                    x1 = tl.cast(tl.cast(tl.cast(tl.cast(raw, tl.bfloat16), tl.float32), tl.bfloat16), tl.float32)
                    x2 = tl.cast(tl.cast(x1 * 0.125, tl.bfloat16), tl.float32)
                    x3 = k <= q
                    x4 = tl.cast(tl.cast(tl.where(x3, 0.0, -3.3895313892515355e+38), tl.bfloat16), tl.float32)
                    x5 = tl.cast(tl.cast(x2 + x4, tl.bfloat16), tl.float32)
                    prob = tl.where(exact & q_ok, tl.exp2((x5 - m - log_l) * 1.4426950408889634), 0.0)
                    if HAS_value:
                        d_value = tl.dot(tl.cast(prob, grad.dtype), grad, d_value, input_precision=PRECISION)
                    d_weight = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
                    d_score = prob * (d_weight - row_delta)
                    if HAS_key:
                        d_key = tl.dot(tl.cast(d_score * 0.125 * 8.0, query.dtype), query, d_key, input_precision=PRECISION)
    flat_b = tl.load(members + tl.load(starts + group))
    rest = flat_b
    b1 = rest % B1
    rest = rest // B1
    b0 = rest % B0
    if HAS_key:
        done = d_key * 0.125
        tl.store(grad_key + tl.cast(b0, tl.int64) * s_grad_key_0 + tl.cast(b1, tl.int64) * s_grad_key_1
            + tl.cast(k, tl.int64) * s_grad_key_2 + tl.cast(d, tl.int64) * s_grad_key_3,
            tl.cast(done, grad_key.dtype.element_ty), mask=k_ok & d_ok)
    if HAS_value:
        done = d_value
        tl.store(grad_value + tl.cast(b0, tl.int64) * s_grad_value_0 + tl.cast(b1, tl.int64) * s_grad_value_1
            + tl.cast(k, tl.int64) * s_grad_value_2 + tl.cast(e, tl.int64) * s_grad_value_3,
            tl.cast(done, grad_value.dtype.element_ty), mask=k_ok & e_ok)


@triton.jit(do_not_specialize=['B0', 'B1', 'q_len', 'kv_len'])
def fuse_attention_queries(
    grad_out, lse, lse2, delta, exact_m, exact_log_l, p0, p1, p2,
    key_rows, value_rows, members, starts, grad_query,
    B0, B1, q_len, kv_len,
    s_grad_out_0, s_grad_out_1, s_grad_out_2, s_grad_out_3,
    s0_0, s0_1, s0_2, s0_3, s1_0, s1_1, s1_2, s1_3, s2_0, s2_1, s2_2, s2_3,
    s_grad_query_0, s_grad_query_1, s_grad_query_2, s_grad_query_3,
    HAS_query: tl.constexpr, DESCRIBED: tl.constexpr, ALONE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradients of a block of queries, from the keys that they see."""
    # The last block first: with a causal mask it has the most keys.
    blocks = (q_len + BM - 1) // BM
    block = blocks - 1 - tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks
    q0 = block * BM
    q1 = tl.minimum(q0 + BM, q_len) - 1
    q0_ok = q0 < q_len
    q1_ok = q1 < q_len
    q = q0 + tl.arange(0, BM)[:, None]
    q_ok = q < q_len
    d = tl.arange(0, 64)[None, :]
    d_ok = d < 64
    e = tl.arange(0, 64)[None, :]
    e_ok = e < 64
    d_query = tl.zeros([BM, 64], tl.float32)
    # One after the other, what shares these queries.
    for member in range(group if ALONE else tl.load(starts + group), group + 1 if ALONE else tl.load(starts + group + 1)):
        flat_b = tl.load(members + member)
        rest = flat_b
        b1 = rest % B1
        rest = rest // B1
        b0 = rest % B0
        row_at = tl.cast(flat_b, tl.int64) * q_len
        x12 = 1 + q
        x13 = tl.maximum(x12, 0)
        x14 = tl.minimum(x13, kv_len)
        x15 = tl.cast(x14, tl.int32)
        row_lse2 = tl.load(lse2 + row_at + q, mask=q_ok, other=float("inf"))
        row_delta = tl.load(delta + row_at + q, mask=q_ok, other=0)
        query = tl.load(p0 + tl.cast(b0, tl.int64) * s0_0 + tl.cast(b1, tl.int64) * s0_1 + tl.cast(q, tl.int64) * s0_2
            + tl.cast(d, tl.int64) * s0_3, mask=d_ok & q_ok, other=0)
        grad = tl.load(grad_out + tl.cast(b0, tl.int64) * s_grad_out_0 + tl.cast(b1, tl.int64) * s_grad_out_1
            + tl.cast(q, tl.int64) * s_grad_out_2 + tl.cast(e, tl.int64) * s_grad_out_3, mask=q_ok & e_ok, other=0)
        begin = 0
        end = kv_len
        full_begin = 0
        full_end = kv_len
        x27 = 1 + q0
        full_end = tl.cast(tl.minimum(tl.maximum(x27, 0), kv_len), tl.int32)
        x28 = 1 + q1
        end = tl.cast(tl.minimum(tl.maximum(x28, 0), kv_len), tl.int32)
        full_end = tl.maximum(full_begin, tl.minimum(full_end, end) // BN * BN)
        for k0 in range(full_begin, full_end, BN):
            k_lane = tl.arange(0, BN)[None, :]
            k = k0 + k_lane
            k_ok = k < kv_len
            row = k0 + tl.arange(0, BN)[:, None]
            row_ok = row < kv_len
            if DESCRIBED:
                key = tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]),
                    [BN, 64])
            else:
                key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(row, tl.int64) * s1_2
                    + tl.cast(d, tl.int64) * s1_3, mask=d_ok & row_ok, other=0)
            if DESCRIBED:
                value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]),
                    [BN, 64])
            else:
                value = tl.load(p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1 + tl.cast(row, tl.int64) * s2_2
                    + tl.cast(e, tl.int64) * s2_3, mask=e_ok & row_ok, other=0)
            raw = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            # edit: probability, weight and score's gradient of an entry, from raw, the product of query and key
            prob = tl.exp2(raw * 0.18033688011112042 - row_lse2)
            d_weight = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
            d_score = prob * (d_weight - row_delta)
            if HAS_query:
                d_query = tl.dot(tl.cast(d_score, key.dtype), key, d_query, input_precision=PRECISION)
        for k0 in range(full_end, end, BN):
            k_lane = tl.arange(0, BN)[None, :]
            k = k0 + k_lane
            k_ok = k < kv_len
            row = k0 + tl.arange(0, BN)[:, None]
            row_ok = row < kv_len
            if DESCRIBED:
                key = tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]),
                    [BN, 64])
            else:
                key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1 + tl.cast(row, tl.int64) * s1_2
                    + tl.cast(d, tl.int64) * s1_3, mask=d_ok & row_ok, other=0)
            if DESCRIBED:
                value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]),
                    [BN, 64])
            else:
                value = tl.load(p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1 + tl.cast(row, tl.int64) * s2_2
                    + tl.cast(e, tl.int64) * s2_3, mask=e_ok & row_ok, other=0)
            raw = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            # edit: probability, weight and score's gradient of an entry, from raw, the product of query and key
            seen = (k_lane < x15 - k0)
            prob = tl.where(seen, tl.exp2(raw * 0.18033688011112042 - row_lse2), 0.0)
            d_weight = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
            d_score = prob * (d_weight - row_delta)
            if HAS_query:
                d_query = tl.dot(tl.cast(d_score, key.dtype), key, d_query, input_precision=PRECISION)
        log_sum = tl.load(lse + row_at + q, mask=q_ok, other=float("inf"))
        exact = (log_sum <= -1000.0) | ((log_sum >= 1000.0) & (log_sum < float("inf")))
        m = tl.load(exact_m + row_at + q, mask=exact, other=0)
        log_l = tl.load(exact_log_l + row_at + q, mask=exact, other=0)
        if tl.max(tl.cast(exact, tl.int32)) > 0:
            for k0 in range(0, kv_len, BN):
                k_lane = tl.arange(0, BN)[None, :]
                k = k0 + k_lane
                k_ok = k < kv_len
                row = k0 + tl.arange(0, BN)[:, None]
                row_ok = row < kv_len
                if DESCRIBED:
                    key = tl.reshape(key_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32), 0]),
                        [BN, 64])
                else:
                    key = tl.load(p1 + tl.cast(b0, tl.int64) * s1_0 + tl.cast(b1, tl.int64) * s1_1
                        + tl.cast(row, tl.int64) * s1_2 + tl.cast(d, tl.int64) * s1_3, mask=d_ok & row_ok, other=0)
                if DESCRIBED:
                    value = tl.reshape(value_rows.load([tl.cast(b0, tl.int32), tl.cast(b1, tl.int32), tl.cast(k0, tl.int32),
                        0]), [BN, 64])
                else:
                    value = tl.load(p2 + tl.cast(b0, tl.int64) * s2_0 + tl.cast(b1, tl.int64) * s2_1
                        + tl.cast(row, tl.int64) * s2_2 + tl.cast(e, tl.int64) * s2_3, mask=e_ok & row_ok, other=0)
                raw = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                # edit: probability, weight and score's gradient of an entry, from raw, the product of query and key
                x7 = tl.cast(tl.cast(tl.cast(tl.cast(raw, tl.bfloat16), tl.float32), tl.bfloat16), tl.float32)
                x8 = tl.cast(tl.cast(x7 * 0.125, tl.bfloat16), tl.float32)
                x9 = k <= q
                x10 = tl.cast(tl.cast(tl.where(x9, 0.0, -3.3895313892515355e+38), tl.bfloat16), tl.float32)
                x11 = tl.cast(tl.cast(x8 + x10, tl.bfloat16), tl.float32)
                prob = tl.where(exact & k_ok, tl.exp2((x11 - m - log_l) * 1.4426950408889634), 0.0)
                d_weight = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
                d_score = prob * (d_weight - row_delta)
                if HAS_query:
                    d_query = tl.dot(tl.cast(d_score * 0.125 * 8.0, key.dtype), key, d_query, input_precision=PRECISION)
    if HAS_query:
        flat_b = tl.load(members + tl.load(starts + group))
        rest = flat_b
        b1 = rest % B1
        rest = rest // B1
        b0 = rest % B0
        tl.store(grad_query + tl.cast(b0, tl.int64) * s_grad_query_0 + tl.cast(b1, tl.int64) * s_grad_query_1
            + tl.cast(q, tl.int64) * s_grad_query_2 + tl.cast(d, tl.int64) * s_grad_query_3,
            tl.cast(d_query * 0.125, grad_query.dtype.element_ty), mask=q_ok & d_ok)


if __name__ == "__main__":
    # Runs the kernel by itself: --help says how.
    from fuse.alone import run
    run(__file__)
