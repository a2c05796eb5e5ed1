// The operators of fuse.ir.expr, on scalars and on lanes, with PyTorch's semantics.
#define F_UNARY(NAME, SCALAR) \
    INLINE R NAME(R x) { return SCALAR; } \
    INLINE VR NAME(VR v) { return lanewise(v, [](R x) { return R(SCALAR); }); }
F_UNARY(f_log, R(log(x)))
F_UNARY(f_log2, R(log2(x)))
F_UNARY(f_log1p, R(log1p(x)))
F_UNARY(f_expm1, R(expm1(x)))
F_UNARY(f_erf, R(erf(x)))
F_UNARY(f_sin, R(sin(x)))
F_UNARY(f_cos, R(cos(x)))
F_UNARY(f_floor, R(floor(x)))
F_UNARY(f_ceil, R(ceil(x)))
F_UNARY(f_trunc, R(trunc(x)))
F_UNARY(f_round, R(nearbyint(x)))
F_UNARY(f_sqrt, R(sqrt(x)))

INLINE R f_exp(R x) { return R(exp(x)); }
INLINE R f_exp2(R x) { return R(exp2(x)); }
INLINE R f_tanh(R x) { return R(tanh(x)); }
INLINE VR f_exp2(VR x) { return x > R(127.99999) ? vr(R(INFINITY)) : exp2_lanes(x); }
INLINE VR f_exp(VR x) {
    if constexpr (sizeof(R) == 8) return lanewise(x, [](R y) { return R(exp(y)); });
    const VR y = x * R(1.44269504088896341);
    return f_exp2(y);
}
// Rational minimax of degree 13 over 6 (as Eigen's), within a few units in the last place.
INLINE VR f_tanh(VR x) {
    if constexpr (sizeof(R) == 8) return lanewise(x, [](R y) { return R(tanh(y)); });
    const R limit = R(7.90531110763549805);
    const VR y = x > limit ? vr(limit) : x < -limit ? vr(-limit) : x;
    const VR s = y * y;
    VR p = s * R(-2.76076847742355e-16) + R(2.00018790482477e-13);
    p = p * s + R(-8.60467152213735e-11);
    p = p * s + R(5.12229709037114e-08);
    p = p * s + R(1.48572235717979e-05);
    p = p * s + R(6.37261928875436e-04);
    p = p * s + R(4.89352455891786e-03);
    VR q = s * R(1.19825839466702e-06) + R(1.18534705686654e-04);
    q = q * s + R(2.26843463243900e-03);
    q = q * s + R(4.89352518554385e-03);
    return y * p / q;
}
template <class T> INLINE T f_sigmoid(T x) { return R(1) / (R(1) + f_exp(-x)); }
template <class T> INLINE T f_rsqrt(T x) { return R(1) / f_sqrt(x); }
template <class T> INLINE T f_reciprocal(T x) { return R(1) / x; }
INLINE R f_pow(R x, R y) { return R(pow(x, y)); }
INLINE VR f_pow(VR x, VR y) { for (int i = 0; i < W; i++) x[i] = f_pow(x[i], y[i]); return x; }

template <class T> INLINE T f_abs(T x) { return x < 0 ? -x : x; }
INLINE R f_abs(R x) { return R(fabs(x)); }
INLINE VR f_abs(VR x) { return lanewise(x, [](R y) { return R(fabs(y)); }); }
template <class T> INLINE T f_sign(T x) { return (x > 0 ? T{} + 1 : T{}) - (x < 0 ? T{} + 1 : T{}); }
template <class T> INLINE T f_minimum(T a, T b) { return a < b ? a : b; }
template <class T> INLINE T f_maximum(T a, T b) { return a > b ? a : b; }
INLINE R f_minimum(R a, R b) { return a < b || a != a ? a : b; }
INLINE R f_maximum(R a, R b) { return a > b || a != a ? a : b; }
INLINE VR f_minimum(VR a, VR b) { return (a < b) | (a != a) ? a : b; }
INLINE VR f_maximum(VR a, VR b) { return (a > b) | (a != a) ? a : b; }
INLINE bool f_isnan(R x) { return x != x; }
INLINE VI f_isnan(VR x) { return x != x; }
INLINE bool f_isinf(R x) { return f_abs(x) == R(INFINITY); }
INLINE VI f_isinf(VR x) { return f_abs(x) == R(INFINITY); }

// Integer division that rounds towards minus infinity; by zero it gives 0, where eager would raise.
INLINE int64_t f_floordiv(int64_t a, int64_t b) { return b == 0 ? 0 : a / b - (a % b != 0 && (a % b < 0) != (b < 0)); }
INLINE int64_t f_mod(int64_t a, int64_t b) { return b == 0 ? 0 : a - f_floordiv(a, b) * b; }
// A quotient of integers of 32 bits is never rounded up to the next whole number in 53 bits.
INLINE VI f_floordiv(VI a, VI b) {
    if constexpr (sizeof(I) == 8) {
        for (int i = 0; i < W; i++) a[i] = f_floordiv(int64_t(a[i]), int64_t(b[i]));
        return a;
    }
    typedef double VD __attribute__((vector_size(W * 8)));
    const VD quotient = __builtin_convertvector(a, VD) / __builtin_convertvector(b == 0 ? VI{} + 1 : b, VD);
    const VI whole = __builtin_convertvector(quotient, VI);
    return b == 0 ? VI{} : whole + narrow(VL(__builtin_convertvector(whole, VD) > quotient));
}
INLINE VI f_mod(VI a, VI b) { return b == 0 ? VI{} : a - f_floordiv(a, b) * b; }
INLINE R f_mod(R a, R b) { const R r = R(fmod(a, b)); return r != 0 && (r < 0) != (b < 0) ? r + b : r; }
// Of the exact quotient: a / b may be rounded up to the next whole number.
INLINE R f_floordiv(R a, R b) {
    if (b == 0) return a / b;
    const R rest = R(fmod(a, b)), whole = (a - rest) / b - (rest != 0 && (rest < 0) != (b < 0)), below = R(floor(whole));
    return whole == 0 ? R(copysign(0, a / b)) : whole - below > R(0.5) ? below + 1 : below;
}
INLINE VR f_floordiv(VR a, VR b) { for (int i = 0; i < W; i++) a[i] = f_floordiv(a[i], b[i]); return a; }
INLINE VR f_mod(VR a, VR b) { for (int i = 0; i < W; i++) a[i] = f_mod(a[i], b[i]); return a; }
#if !FUSE_DOUBLE
INLINE VL f_floordiv(VL a, VL b) { for (int i = 0; i < W; i++) a[i] = f_floordiv(a[i], b[i]); return a; }
INLINE VL f_mod(VL a, VL b) { for (int i = 0; i < W; i++) a[i] = f_mod(a[i], b[i]); return a; }
#endif

// The value as a tensor of its dtype holds it; halves are rounded to float first, which is what eager computes them in. A value
// that is rounded is kept apart from what is computed of it: compilers make a product and a sum one operation with one rounding,
// and gcc has been seen to drop a vector's conversion to a narrower type and back.
template <class T> INLINE T apart(T x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}
INLINE R round_f64(R x) { return apart(x); }
INLINE R round_f32(R x) { return apart(R(float(x))); }
INLINE R round_bf16(R x) { return to_r(from_r<Bf16>(x)); }
INLINE R round_f16(R x) { return apart(R(_Float16(float(x)))); }
INLINE VR round_f64(VR x) { return apart(x); }
INLINE VR round_f32(VR x) {
    if constexpr (sizeof(R) == 8) return lanewise(x, [](R y) { return round_f32(y); });
    else return apart(x);
}
INLINE VR round_bf16(VR x) {
    if constexpr (sizeof(R) == 8) return lanewise(x, [](R y) { return round_bf16(y); });
    else return f_isnan(x) ? x : real((bits(x) + (((bits(x) >> 16) & 1) + 0x7fff)) & I(0xffff0000));
}
INLINE VR round_f16(VR x) { return lanewise(x, [](R y) { return round_f16(y); }); }
