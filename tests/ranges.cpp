// Around the cases of tests/interval_cases.py: each is a function of many ranges. Those of integers and truth values are two
// int64, those of reals three floats, the last of which tells whether they may be NaN.
#define FUSE_WIDTH 4
#define FUSE_DOUBLE 0
typedef float R;
constexpr int W = 4;
#include <float.h>
#include "vector.h"
#include "memory.h"
#include "functions.h"
#include "ranges.h"

template <class Range> Range range_at(const void* from, long i);
template <> IntRange range_at(const void* from, long i) {
    const int64_t* x = (const int64_t*)from + 2 * i;
    return {x[0], x[1]};
}
template <> Truth range_at(const void* from, long i) {
    const int64_t* x = (const int64_t*)from + 2 * i;
    return {x[1] != 0, x[0] != 0};
}
template <> RealRange range_at(const void* from, long i) {
    const float* x = (const float*)from + 3 * i;
    return {x[0], x[1], x[2] != 0};
}
static void put(void* to, long i, IntRange r) { ((int64_t*)to)[2 * i] = r.low, ((int64_t*)to)[2 * i + 1] = r.high; }
static void put(void* to, long i, Truth r) { put(to, i, IntRange(r)); }
static void put(void* to, long i, RealRange r) {
    float* x = (float*)to + 3 * i;
    x[0] = r.low, x[1] = r.high, x[2] = r.nan;
}
