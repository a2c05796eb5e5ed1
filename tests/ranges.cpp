// Ranges of small integers of either sign, of the ends of int64, and of reals with infinities and NaN: every pair of them,
// and every value in each, by every operation; and that comparisons are decided wherever they can be.
#include <stdio.h>
#include <vector>
#define FUSE_WIDTH 4
#define FUSE_DOUBLE 0
typedef float R;
constexpr int W = 4;
#include <float.h>
#include "vector.h"
#include "memory.h"
#include "functions.h"
#include "ranges.h"

static int failures = 0;
static void require(bool holds, const char* what, double a, double b) {
    if (!holds && failures++ < 20) printf("%s is not in its range for %g and %g\\n", what, a, b);
}
static bool has(Truth t, bool x) { return x ? t.can : !t.must; }
static bool has(IntRange r, int64_t x) { return r.low <= x && x <= r.high; }
static bool has(RealRange r, R x) { return x != x ? r.nan : r.low <= x && x <= r.high; }

template <class Range, class T> struct Case { Range range; std::vector<T> values; };
template <class Range, class T> static std::vector<Case<Range, T>> cases(std::vector<T> grid) {
    std::vector<Case<Range, T>> found;
    for (size_t i = 0; i < grid.size(); i++)
        for (size_t j = i; j < grid.size(); j++) {
            Case<Range, T> c = {Range::none(), {grid.begin() + i, grid.begin() + j + 1}};
            for (T x : c.values) c.range.include(x);
            found.push_back(c);
        }
    return found;
}
#define CHECK(OP, TEXT) require(has(OP, [&] { return TEXT; }()), #TEXT, double(x), double(y))
template <class Range, class T> static void compare(const Case<Range, T>& a, const Case<Range, T>& b) {
    bool lt = true, le = true, eq = true, apart = true;
    for (T x : a.values) for (T y : b.values) {
        CHECK(a.range < b.range, x < y); CHECK(a.range <= b.range, x <= y); CHECK(a.range > b.range, x > y);
        CHECK(a.range >= b.range, x >= y); CHECK(a.range == b.range, x == y); CHECK(a.range != b.range, x != y);
        CHECK(f_minimum(a.range, b.range), f_minimum(x, y)); CHECK(f_maximum(a.range, b.range), f_maximum(x, y));
        CHECK(-a.range, T(-x));
        for (bool c : {false, true}) { const Truth t = Truth::any(); CHECK(choose(t, a.range, b.range), c ? x : y); }
        lt &= x < y, le &= x <= y, eq &= x == y, apart &= x != y;
    }
    require((a.range < b.range).must == lt, "tight <", 0, 0);
    require((a.range <= b.range).must == le, "tight <=", 0, 0);
    require((a.range == b.range).must == eq, "tight ==", 0, 0);
}
static bool fits(__int128 x) { return x == int64_t(x); }

int main() {
    std::vector<int64_t> grid = {INT64_MIN, INT64_MIN + 1};
    for (int64_t i = -7; i <= 7; i++) grid.push_back(i);
    grid.push_back(INT64_MAX - 1), grid.push_back(INT64_MAX);
    const auto ints = cases<IntRange, int64_t>(grid);
    for (const auto& a : ints) {
        for (int64_t x : a.values) {
            const int64_t y = 0;
            if (x != INT64_MIN) CHECK(f_abs(a.range), x < 0 ? -x : x);
            CHECK(a.range.as<int8_t>(), int64_t(int8_t(x))); CHECK(a.range.as<uint8_t>(), int64_t(uint8_t(x)));
            CHECK(RealRange(a.range), R(x));
        }
        for (const auto& b : ints)
            for (int64_t x : a.values) for (int64_t y : b.values) {
                if (fits(__int128(x) + y)) CHECK(a.range + b.range, x + y);
                if (fits(__int128(x) - y)) CHECK(a.range - b.range, x - y);
                if (fits(__int128(x) * y)) CHECK(a.range * b.range, x * y);
                if (!(x == INT64_MIN && y == -1)) { CHECK(f_floordiv(a.range, b.range), f_floordiv(x, y)); CHECK(f_mod(a.range, b.range), f_mod(x, y)); }
            }
    }
    std::vector<int64_t> small(grid.begin() + 2, grid.end() - 2);
    for (const auto& a : cases<IntRange, int64_t>(small)) for (const auto& b : cases<IntRange, int64_t>(small)) compare(a, b);
    const auto reals = cases<RealRange, R>({-R(INFINITY), -FLT_MAX, -65520, -2, -1, R(-0.0), 0, 0.5, 257, FLT_MAX, R(INFINITY), R(NAN)});
    for (const auto& a : reals) for (const auto& b : reals) {
        compare(a, b);
        for (R x : a.values) {
            const R y = 0;
            CHECK(round_bf16(a.range), round_bf16(x)); CHECK(round_f16(a.range), round_f16(x)); CHECK(round_f32(a.range), round_f32(x));
        }
        for (R x : a.values) for (R y : b.values) { CHECK(a.range + b.range, x + y); CHECK(a.range - b.range, x - y); }
    }
    const auto truths = cases<Truth, bool>({false, true});
    for (const auto& a : truths) for (const auto& b : truths)
        for (bool x : a.values) for (bool y : b.values) {
            CHECK(~a.range, !x); CHECK(a.range & b.range, x && y); CHECK(a.range | b.range, x || y); CHECK(a.range ^ b.range, x != y);
            CHECK(a.range == b.range, x == y); CHECK(a.range != b.range, x != y);
            CHECK(choose(a.range, b.range, ~b.range), x ? y : !y); CHECK(IntRange(a.range), int64_t(x)); CHECK(RealRange(a.range), R(x));
        }
    return failures != 0;
}
