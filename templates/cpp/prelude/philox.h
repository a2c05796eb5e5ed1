// Random numbers without a state, Philox-4x32-10, as fuse/ir/philox.py has them: the number at (plane, row, column) for a seed.
// One call gives four: the columns c, c + 16, c + 32 and c + 48 of a group of 64.
#ifdef __AVX2__
#include <immintrin.h>
#endif
constexpr int kDrawn = 64, kDrawnLanes = 16;
constexpr uint32_t kPhilox[2] = {0xD2511F53, 0xCD9E8D57}, kPhiloxKey[2] = {0x9E3779B9, 0xBB67AE85};

INLINE R f_uniform(int64_t seed, int64_t plane, int64_t row, int64_t column) {
    const int64_t group = column >> 6;
    uint32_t key[2] = {uint32_t(seed), uint32_t(uint64_t(seed) >> 32)};
    uint32_t x[4] = {uint32_t(group * kDrawnLanes + (column & (kDrawnLanes - 1))), uint32_t(row), uint32_t(plane), 0};
    for (int i = 0; i < 10; i++) {
        const uint64_t a = uint64_t(x[0]) * kPhilox[0], b = uint64_t(x[2]) * kPhilox[1];
        x[0] = uint32_t(b >> 32) ^ x[1] ^ key[0], x[1] = uint32_t(b), x[2] = uint32_t(a >> 32) ^ x[3] ^ key[1], x[3] = uint32_t(a);
        key[0] += kPhiloxKey[0], key[1] += kPhiloxKey[1];
    }
    return R(x[column >> 4 & 3] >> 8) * R(0x1p-24);
}

// dst[k * ld + q] = value(q0 + q, k0 + k)
template <class Value> static void draw_each(R* dst, int ld, Value value, int64_t q0, int nq, int64_t k0, int nk) {
    for (int k = 0; k < nk; k++)
        for (int q = 0; q < nq; q++) dst[k * ld + q] = value(q0 + q, k0 + k);
}
#if FUSE_DOUBLE
static void draw(R* dst, int ld, int64_t seed, int64_t plane, int64_t q0, int nq, int64_t k0, int nk) {
    draw_each(dst, ld, [&](int64_t q, int64_t k) { return f_uniform(seed, plane, q, k); }, q0, nq, k0, nk);
}
#else
typedef uint32_t VU __attribute__((vector_size(W * 4)));
typedef uint64_t VU64 __attribute__((vector_size(W * 4)));

// Products of the even lanes.
INLINE VU64 multiply_even(VU64 a, uint64_t b) {
#if AVX512_FLOAT
    return VU64(_mm512_mul_epu32(__m512i(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__) && FUSE_WIDTH == 8
    return VU64(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(b)));
#else
    return (a & 0xffffffff) * b;
#endif
}
INLINE void multiply_wide(VU a, uint32_t b, VU& high, VU& low) {
    VU lanes;
    for (int i = 0; i < W; i++) lanes[i] = i;
    const VU64 even = multiply_even(VU64(a), b), odd = multiply_even(VU64(a) >> 32, b);
    const auto is_odd = (lanes & 1) != 0;
    high = is_odd ? VU(odd) : VU(even >> 32);
    low = is_odd ? VU(odd << 32) : VU(even);
}
// CHAINS independent calls: one alone waits for its products.
template <int CHAINS> INLINE void philox(VU (&x)[CHAINS][4], int64_t seed) {
    uint32_t key[2] = {uint32_t(seed), uint32_t(uint64_t(seed) >> 32)};
#pragma GCC unroll 10
    for (int i = 0; i < 10; i++) {
#pragma GCC unroll 4
        for (int n = 0; n < CHAINS; n++) {
            VU high[2], low[2];
            multiply_wide(x[n][0], kPhilox[0], high[0], low[0]);
            multiply_wide(x[n][2], kPhilox[1], high[1], low[1]);
            x[n][0] = high[1] ^ x[n][1] ^ key[0], x[n][1] = low[1], x[n][2] = high[0] ^ x[n][3] ^ key[1], x[n][3] = low[0];
        }
        key[0] += kPhiloxKey[0], key[1] += kPhiloxKey[1];
    }
}
INLINE VR uniform_lanes(VU word) { return __builtin_convertvector(VI(word >> 8), VR) * R(0x1p-24); }

// Rows are lanes: dst[k * ld + q] = the number at row q0 + q, column k0 + k.
static void draw(R* dst, int ld, int64_t seed, int64_t plane, int64_t q0, int nq, int64_t k0, int nk) {
    for (int64_t group = k0 / kDrawn; group * kDrawn < k0 + nk; group++)
        for (int j = 0; j < kDrawnLanes; j++)
            for (int q = 0; q < nq; q += W) {
                VU x[1][4] = { {VU{} + uint32_t(group * kDrawnLanes + j), VU(lane_numbers()) + uint32_t(q0 + q), VU{} + uint32_t(plane), VU{}} };
                philox(x, seed);
                for (int i = 0; i < 4; i++) {
                    const int64_t k = group * kDrawn + i * kDrawnLanes + j - k0;
                    if (k >= 0 && k < nk) store(dst + k * ld + q, uniform_lanes(x[0][i]));
                }
            }
}
// Columns are lanes: the numbers at row q and the columns k0 … k0 + COLUMNS, k0 a multiple of 64. Rows are drawn in fours.
template <int COLUMNS> struct DrawnRows {
    static constexpr int ROWS = 4;
    int64_t seed = 0, plane = 0, first = -1, k0 = -1;
    R number[ROWS][(COLUMNS + kDrawn - 1) / kDrawn * kDrawn];

    const R* row(int64_t new_seed, int64_t new_plane, int64_t q, int64_t new_k0) {
        if (q - q % ROWS != first || new_k0 != k0 || new_plane != plane || new_seed != seed) {
            seed = new_seed, plane = new_plane, first = q - q % ROWS, k0 = new_k0;
            fill();
        }
        return number[q % ROWS];
    }

private:
    __attribute__((noinline)) void fill() {
        for (int at = 0; at < COLUMNS; at += kDrawn)
            for (int j = 0; j < kDrawnLanes; j += W) {
                VU x[ROWS][4];
                for (int n = 0; n < ROWS; n++) {
                    x[n][0] = VU(lane_numbers()) + uint32_t((k0 + at) / kDrawn * kDrawnLanes + j), x[n][1] = VU{} + uint32_t(first + n);
                    x[n][2] = VU{} + uint32_t(plane), x[n][3] = VU{};
                }
                philox(x, seed);
                for (int n = 0; n < ROWS; n++)
                    for (int i = 0; i < 4; i++) store(number[n] + at + i * kDrawnLanes + j, uniform_lanes(x[n][i]));
            }
    }
};
#endif
