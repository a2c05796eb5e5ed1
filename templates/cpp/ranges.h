// Interval arithmetic: what a value can be anywhere on a tile. Every result holds all values of its operation.
struct Truth {
    bool can, must;
    explicit Truth(bool x) : can(x), must(x) {}
    Truth(bool can, bool must) : can(can), must(must) {}
    static Truth any() { return {true, false}; }
    static Truth none() { return {false, true}; }
    void include(bool x) { can |= x, must &= x; }
};
INLINE Truth operator~(Truth a) { return {!a.must, !a.can}; }
INLINE Truth operator&(Truth a, Truth b) { return {a.can && b.can, a.must && b.must}; }
INLINE Truth operator|(Truth a, Truth b) { return {a.can || b.can, a.must || b.must}; }
INLINE Truth operator^(Truth a, Truth b) { return (a & ~b) | (~a & b); }
INLINE Truth operator!=(Truth a, Truth b) { return a ^ b; }
INLINE Truth operator==(Truth a, Truth b) { return ~(a ^ b); }

struct IntRange {
    int64_t low, high;
    explicit IntRange(int64_t x) : low(x), high(x) {}
    explicit IntRange(Truth x) : low(x.must), high(x.can) {}
    IntRange(int64_t low, int64_t high) : low(low), high(high) {}
    static IntRange any() { return {INT64_MIN, INT64_MAX}; }
    static IntRange none() { return {INT64_MAX, INT64_MIN}; }
    void include(int64_t x) { low = min64(low, x), high = max64(high, x); }
    IntRange with(int64_t x) const { return {min64(low, x), max64(high, x)}; }
    // Conversion to a type that may be narrower, where values out of its range wrap around.
    template <class T> IntRange as() const { return int64_t(T(low)) == low && int64_t(T(high)) == high ? *this : any(); }
};
// What overflows can be anything.
INLINE IntRange operator+(IntRange a, IntRange b) {
    int64_t low, high;
    return __builtin_add_overflow(a.low, b.low, &low) | __builtin_add_overflow(a.high, b.high, &high) ? IntRange::any() : IntRange(low, high);
}
INLINE IntRange operator-(IntRange a, IntRange b) {
    int64_t low, high;
    return __builtin_sub_overflow(a.low, b.high, &low) | __builtin_sub_overflow(a.high, b.low, &high) ? IntRange::any() : IntRange(low, high);
}
INLINE IntRange operator-(IntRange a) { return IntRange(0) - a; }
INLINE IntRange operator*(IntRange a, IntRange b) {
    int64_t x[4];
    const bool over = __builtin_mul_overflow(a.low, b.low, x) | __builtin_mul_overflow(a.low, b.high, x + 1) |
                      __builtin_mul_overflow(a.high, b.low, x + 2) | __builtin_mul_overflow(a.high, b.high, x + 3);
    return over ? IntRange::any() : IntRange(x[0], x[0]).with(x[1]).with(x[2]).with(x[3]);
}
INLINE IntRange f_abs(IntRange a) { return a.low >= 0 ? a : a.high <= 0 ? -a : a.low == INT64_MIN ? IntRange::any() : IntRange(0, max64(-a.low, a.high)); }
INLINE IntRange f_minimum(IntRange a, IntRange b) { return {min64(a.low, b.low), min64(a.high, b.high)}; }
INLINE IntRange f_maximum(IntRange a, IntRange b) { return {max64(a.low, b.low), max64(a.high, b.high)}; }
INLINE IntRange f_floordiv(IntRange a, IntRange b) {
    if (b.low <= 0) return IntRange::any();
    return IntRange(f_floordiv(a.low, b.low)).with(f_floordiv(a.low, b.high)).with(f_floordiv(a.high, b.low)).with(f_floordiv(a.high, b.high));
}
INLINE IntRange f_mod(IntRange a, IntRange b) {
    if (b.low <= 0) return IntRange::any();
    const bool same = b.low == b.high && f_floordiv(a.low, b.low) == f_floordiv(a.high, b.low);
    return same ? IntRange(f_mod(a.low, b.low), f_mod(a.high, b.low)) : IntRange(0, b.high - 1);
}

struct RealRange {
    R low, high;
    bool nan;
    explicit RealRange(R x) : RealRange(x, x) {}
    explicit RealRange(IntRange x) : RealRange(R(x.low), R(x.high)) {}  // rounding keeps the order
    explicit RealRange(Truth x) : RealRange(R(x.must), R(x.can)) {}
    RealRange(R low, R high, bool nan = false) : low(low), high(high), nan(nan || low != low || high != high) {
        if (this->nan) this->low = -R(INFINITY), this->high = R(INFINITY);
    }
    static RealRange any() { return {-R(INFINITY), R(INFINITY), true}; }
    static RealRange none() { return {R(INFINITY), -R(INFINITY)}; }
    void include(R x) { *this = x != x ? any() : RealRange(f_minimum(low, x), f_maximum(high, x), nan); }
    bool infinite() const { return low == -R(INFINITY) || high == R(INFINITY); }
};
INLINE RealRange operator+(RealRange a, RealRange b) { return {a.low + b.low, a.high + b.high, a.nan || b.nan || (a.infinite() && b.infinite())}; }
INLINE RealRange operator-(RealRange a) { return {-a.high, -a.low, a.nan}; }
INLINE RealRange operator-(RealRange a, RealRange b) { return a + -b; }
INLINE RealRange f_minimum(RealRange a, RealRange b) { return {f_minimum(a.low, b.low), f_minimum(a.high, b.high), a.nan || b.nan}; }
INLINE RealRange f_maximum(RealRange a, RealRange b) { return {f_maximum(a.low, b.low), f_maximum(a.high, b.high), a.nan || b.nan}; }

// Rounding keeps the order.
INLINE RealRange round_f64(RealRange a) { return a; }
INLINE RealRange round_f32(RealRange a) { return {round_f32(a.low), round_f32(a.high), a.nan}; }
INLINE RealRange round_bf16(RealRange a) { return {round_bf16(a.low), round_bf16(a.high), a.nan}; }
INLINE RealRange round_f16(RealRange a) { return {round_f16(a.low), round_f16(a.high), a.nan}; }

INLINE bool has_nan(IntRange) { return false; }
INLINE bool has_nan(RealRange a) { return a.nan; }
// Comparisons with NaN are false, inequality is true.
#define COMPARISONS(T) \
    INLINE Truth operator<(T a, T b) { return {a.low < b.high, a.high < b.low && !has_nan(a) && !has_nan(b)}; } \
    INLINE Truth operator<=(T a, T b) { return {a.low <= b.high, a.high <= b.low && !has_nan(a) && !has_nan(b)}; } \
    INLINE Truth operator==(T a, T b) { \
        return {a.low <= b.high && b.low <= a.high, a.low == b.high && b.low == a.high && !has_nan(a) && !has_nan(b)}; \
    } \
    INLINE Truth operator>(T a, T b) { return b < a; } \
    INLINE Truth operator>=(T a, T b) { return b <= a; } \
    INLINE Truth operator!=(T a, T b) { return ~(a == b); }
COMPARISONS(IntRange)
COMPARISONS(RealRange)

INLINE Truth choose(Truth c, Truth a, Truth b) { return (c & a) | (~c & b); }
INLINE IntRange choose(Truth c, IntRange a, IntRange b) { return c.must ? a : !c.can ? b : IntRange(min64(a.low, b.low), max64(a.high, b.high)); }
INLINE RealRange choose(Truth c, RealRange a, RealRange b) {
    return c.must ? a : !c.can ? b : RealRange(a.low < b.low ? a.low : b.low, a.high > b.high ? a.high : b.high, a.nan || b.nan);
}
