// Vectors of W lanes in the extensions of gcc and clang, the same source for every instruction set.
//   R, VR  the real type and its vector     I, VI  the integer of the same size, also lane masks (0 or -1)     VL  int64 lanes
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512F__  // only where needed: reading this header can take a third of a build
#include <immintrin.h>
#endif

// gcc 12 may reach one array of a struct by its distance from another, with no pointer as base; its analysis of what functions
// modify then misses the stores, and their calls are dropped.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-ipa-modref")
#endif

template <int BYTES> struct IntOf { typedef int32_t type; };
template <> struct IntOf<8> { typedef int64_t type; };
typedef IntOf<sizeof(R)>::type I;
typedef R VR __attribute__((vector_size(W * sizeof(R))));
typedef I VI __attribute__((vector_size(W * sizeof(R))));
typedef int64_t VL __attribute__((vector_size(W * 8)));
#define INLINE static inline __attribute__((always_inline))
#define AVX512_FLOAT (defined(__AVX512F__) && FUSE_WIDTH == 16)

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t clamp64(int64_t x, int64_t low, int64_t high) { return max64(low, min64(x, high)); }

INLINE VR vr(R x) { return x - VR{}; }
INLINE VR vr(VR x) { return x; }
INLINE VL vl(int64_t x) { return x - VL{}; }
INLINE VL vl(VL x) { return x; }
INLINE VI vm(bool x) { return I(-I(x)) - VI{}; }
// An int64 in lanes that may be narrower: saturated, which no comparison with values inside the range can tell.
INLINE VI vi(int64_t x) {
    const int64_t limit = sizeof(I) == 8 ? INT64_MAX : INT32_MAX;
    return I(clamp64(x, -limit, limit)) - VI{};
}
INLINE VI narrow(VL x) { return __builtin_convertvector(x, VI); }
INLINE VL widen_int(VI x) { return __builtin_convertvector(x, VL); }
INLINE VR to_real(VI x) { return __builtin_convertvector(x, VR); }
template <class T> INLINE T select(VI mask, T a, T b) {
    if constexpr (sizeof(T) == sizeof(VI)) return mask ? a : b;
    else return widen_int(mask) ? a : b;
}

INLINE VI lane_numbers() { VI v; for (int i = 0; i < W; i++) v[i] = i; return v; }
INLINE VR load(const R* p) { VR v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(R* p, VR v) { memcpy(p, &v, sizeof v); }
INLINE VI bits(VR x) { VI y; memcpy(&y, &x, sizeof y); return y; }
INLINE VR real(VI x) { VR y; memcpy(&y, &x, sizeof y); return y; }
template <class F> INLINE VR lanewise(VR x, F f) { for (int i = 0; i < W; i++) x[i] = f(x[i]); return x; }

// The second operand where either is NaN, as the hardware does: no ordering of NaN is needed inside the softmax.
INLINE VR vmax(VR a, VR b) {
#if AVX512_FLOAT
    return VR(_mm512_max_ps(__m512(a), __m512(b)));
#else
    return a > b ? a : b;
#endif
}

// 2^x, zero below -127, NaN stays NaN. Cody-Waite reduction by adding 1.5 * 2^23, then a minimax polynomial on [-1/2, 1/2].
INLINE VR exp2_lanes(VR x) {
    if constexpr (sizeof(R) == 8) return lanewise(x, [](R y) { return R(exp2(y)); });
    else {
#if AVX512_FLOAT
        const VR n = VR(_mm512_roundscale_ps(__m512(x), 0));
#else
        x = x < R(-127) ? vr(R(-127)) : x;
        const VR t = x + R(12582912);
        const VR n = t - R(12582912);
#endif
        const VR f = x - n;
        VR p = vr(R(1.535336171e-4));
        p = p * f + R(1.339887448e-3);
        p = p * f + R(9.618437359e-3);
        p = p * f + R(5.550332471e-2);
        p = p * f + R(2.402264791e-1);
        p = p * f + R(6.931472029e-1);
        p = p * f + R(1);
#if AVX512_FLOAT
        return VR(_mm512_scalef_ps(__m512(p), __m512(n)));
#else
        return real(bits(p) + (bits(t) << 23));
#endif
    }
}

// Swaps the off-diagonal blocks of 2H x 2H squares, one shuffle per row: log2(W) rounds transpose W x W.
template <int H, bool HIGH, int... J> INLINE VR blend_blocks(VR a, VR b) {
    if constexpr (sizeof...(J) < W) return blend_blocks<H, HIGH, J..., (sizeof...(J) & H) ? int(W + sizeof...(J)) - (HIGH ? 0 : H)
                                                                                       : int(sizeof...(J)) + (HIGH ? H : 0)>(a, b);
    else return __builtin_shufflevector(a, b, J...);
}
template <int H = W / 2> INLINE void transpose(VR (&x)[W]) {
#pragma GCC unroll 64
    for (int i = 0; i < W; i++) {
        if (i & H) continue;
        const VR a = x[i], b = x[i + H];
        x[i] = blend_blocks<H, false>(a, b);
        x[i + H] = blend_blocks<H, true>(a, b);
    }
    if constexpr (H > 1) transpose<H / 2>(x);
}

// exp of denormals costs hundreds of cycles: they are flushed to zero inside the kernel, and the caller's mode restored.
struct FlushDenormals {
    uint64_t saved;
#if defined(__x86_64__)
    FlushDenormals() : saved(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(unsigned(saved) | 0x8040); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(unsigned(saved)); }
#elif defined(__aarch64__)
    FlushDenormals() { asm volatile("mrs %0, fpcr" : "=r"(saved)); asm volatile("msr fpcr, %0" ::"r"(saved | (1 << 24))); }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved)); }
#else
    FlushDenormals() : saved(0) {}
#endif
};
