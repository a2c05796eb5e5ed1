// out = sum over k of w * value,  w = prob
// softmax over k of (score * 0.125) + where(k <= q, 0, -3.40282e+38)
// visible where k <= q
// spec  {"batch":2,"empty_row":"nan","expr":{"nodes":[["Index","int64","b0"],["Index","int64","b1"],["Index","int64","q"],["Index","int64","d"],["Load","float32",0,[0,1,2,3]],["Index","int64","k"],["Load","float32",1,[0,1,5,3]],["Index","int64","e"],["Load","float32",2,[0,1,5,7]],["Score","float32"],["Const","float32","0x1.0000000000000p-3"],["Apply","float32","mul",[9,10]],["Apply","bool","le",[5,2]],["Const","float32","0x0.0p+0"],["Const","float32","-0x1.fffffe0000000p+127"],["Apply","float32","where",[12,13,14]],["Apply","float32","add",[11,15]],["Prob","float32"],["Const","int64",1],["Apply","int64","add",[18,2]]],"roots":{"key":6,"mask.predicate":12,"mask.upper":19,"mask.visible":11,"query":4,"score":16,"value":8,"weight":17}},"extra":[],"fill":"-0x1.fffffe0000000p+127","normalisation":"softmax","operands":[[4,"float32"],[4,"float32"],[4,"float32"]],"out_dtype":"float32","out_order":[0,2,1,3],"qk_dim":64,"v_dim":64,"version":2}
// plan  Plan(core='lanes', isa='avx2', real='float', width=8, vectors=3, rows=4, block_k=128, wave_bytes=8388608, thread_work=262144, part_keys=384, decode_queries=4)
// made by torch-fuse …
// alone: python -m fuse.alone <this file>, which compares it with float64 and times it beside SDPA
// without Python: c++ -std=c++17 -O3 -march=native -w -fopenmp -DFUSE_STANDALONE <this file> -o kernel && ./kernel [threads]
// operand 0 float32, 4 dimensions: query at [b0, b1, q, d]
// operand 1 float32, 4 dimensions: key at [b0, b1, k, d]
// operand 2 float32, 4 dimensions: value at [b0, b1, k, e]
// sizes     B0, B1, q_len, kv_len
// result    float32 at [b0, b1, q, e], in memory by b0, q, b1, e
// read from the entry up: each part uses those above it
// contents, in order
//   VR               vectors, memory, functions: the same in every kernel, up to Call
//   Call             the arguments of a call
//   BatchIndex       one batch index: where its operands begin
//   upper_key        edit: one past the last key that a query may see
//   Packed           keys and values of one head, as tiles are read
//   Rows             what is known of the queries of a block
//   Tile             what functions of entries are given: queries, and some keys
//   score_full       edit: the score of an entry, lanes are queries
//   score_partial    edit: the same where the mask hides some
//   score_exact      edit: the same as eager rounds it
//   weigh            edit: the weight of an entry, lanes are queries
//   multiply         a product of small matrices
//   InPlace          few queries: keys and values where they lie
//   block            tiles of keys, one after the other
//   queries_in       a block of queries against its keys, lanes are queries
//   fuse_attention   the entry
#define FUSE_WIDTH 8
#define FUSE_DOUBLE 0
typedef float R;
constexpr int W = FUSE_WIDTH;   // lanes of a vector
constexpr int NV = 3;   // vectors of queries in a block
constexpr int BQ = NV * W;   // queries of a block
constexpr int MR = 4;   // rows of the microkernel: MR * NV accumulators
constexpr int BK = 128;   // keys of a tile
constexpr int D = 64, DV = 64, DVP = (DV + MR - 1) / MR * MR;
#include <float.h>
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
    if constexpr (sizeof...(J) < W) return blend_blocks<H, HIGH, J..., (sizeof...(J) & H) ? int(W + sizeof...(J)) - (HIGH ? 0
        : H)
                                                                                       : int(sizeof...(J)) + (HIGH ? H : 0)>(a,
                                                                                           b);
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
// Elements of every dtype in memory: read as R (floats), int64 (integers), bool; written from R.
struct Bf16 { uint16_t raw; };

INLINE R to_r(Bf16 x) { const uint32_t u = uint32_t(x.raw) << 16; float f; memcpy(&f, &u, 4); return R(f); }
template <class T> INLINE R to_r(T x) { return R(x); }
template <class T> INLINE T from_r(R x) {
    if constexpr (sizeof(T) == 2 && !__is_same(T, _Float16)) {
        const float f = float(x);
        uint32_t u;
        memcpy(&u, &f, 4);
        return Bf16{uint16_t(f != f ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16)};
    } else return T(x);
}

// W neighbours as reals, and back.
template <class T> INLINE VR load_as(const T* p) {
    if constexpr (__is_same(T, R)) return load(p);
#if AVX512_FLOAT
    else if constexpr (__is_same(T,
        Bf16)) return VR(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
    else if constexpr (__is_same(T, _Float16)) return VR(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#endif
    else { VR v; for (int i = 0; i < W; i++) v[i] = to_r(p[i]); return v; }
}
template <class T> INLINE void store_as(T* p, VR v) {
    if constexpr (__is_same(T, R)) store(p, v);
#if AVX512_FLOAT
    else if constexpr (__is_same(T, Bf16)) {
        const VI u = bits(v), rounded = v != v ? I(0x7fc0) - VI{} : (u + ((u >> 16 & 1) + 0x7fff)) >> 16;
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(__m512i(rounded)));
    }
    else if constexpr (__is_same(T, _Float16)) _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(__m512(v), 0));
#endif
    else for (int i = 0; i < W; i++) p[i] = from_r<T>(v[i]);
}
template <class T> INLINE VR load_some(const T* p, int n) {
    VR v = {}; for (int i = 0; i < n; i++) v[i] = to_r(p[i]); return v;
}

// dst[row * ld + column] = src[row * rs + column * cs] for rows x columns.
template <class T> static void copy_rows(R* dst, int64_t ld, const T* src, int64_t rs, int64_t cs, int64_t rows,
    int64_t columns) {
    for (int64_t i = 0; i < rows; i++) {
        if (cs == 1) {
            int64_t j = 0;
            for (; j + W <= columns; j += W) store(dst + i * ld + j, load_as(src + i * rs + j));
            for (; j < columns; j++) dst[i * ld + j] = to_r(src[i * rs + j]);
        } else for (int64_t j = 0; j < columns; j++) dst[i * ld + j] = to_r(src[i * rs + j * cs]);
    }
}

// dst[column * ld + row] = src[row * rs + column * cs]: W x W squares through registers where columns are neighbours.
template <class T> static void copy_transposed(R* dst, int64_t ld, const T* src, int64_t rs, int64_t cs, int64_t rows,
    int64_t columns) {
    int64_t done = 0;
    if (cs == 1) {
        const int64_t whole = columns - columns % W;
        for (; done + W <= rows; done += W)
            for (int64_t j = 0; j < whole; j += W) {
                VR x[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) x[i] = load_as(src + (done + i) * rs + j);
                transpose(x);
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) store(dst + (j + i) * ld + done, x[i]);
            }
        for (int64_t j = whole; j < columns; j++)
            for (int64_t i = 0; i < done; i++) dst[j * ld + i] = to_r(src[i * rs + j]);
    }
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = done; i < rows; i++) dst[j * ld + i] = to_r(src[i * rs + j * cs]);
}

// What an expression reads: one element, or one per lane.
template <class T> INLINE R read_real(const void* p, int64_t i) { return to_r(((const T*)p)[i]); }
template <class T> INLINE int64_t read_int(const void* p, int64_t i) { return int64_t(((const T*)p)[i]); }
template <class T> INLINE VR gather_real(const void* p, VL at) {
    VR v; for (int i = 0; i < W; i++) v[i] = read_real<T>(p, at[i]); return v;
}
template <class T> INLINE VI gather_int(const void* p, VL at) {
    VI v; for (int i = 0; i < W; i++) v[i] = I(read_int<T>(p, at[i])); return v;
}
template <class T> INLINE VL gather_long(const void* p, VL at) {
    VL v; for (int i = 0; i < W; i++) v[i] = read_int<T>(p, at[i]); return v;
}
template <class T> INLINE VI gather_bool(const void* p, VL at) {
    VI v; for (int i = 0; i < W; i++) v[i] = -I(((const T*)p)[at[i]] != 0); return v;
}
INLINE VR load_lanes(const R* p) { return load(p); }
INLINE VI load_lanes(const I* p) { VI v; memcpy(&v, p, sizeof v); return v; }
#if !FUSE_DOUBLE
INLINE VL load_lanes(const int64_t* p) { VL v; memcpy(&v, p, sizeof v); return v; }
#endif
INLINE VL inside(VL at, int64_t size) { return at < 0 ? VL{} : at >= size ? vl(size - 1) : at; }
template <int BITS> INLINE VI wrap(VI x) { return (x << (8 * sizeof(I) - BITS)) >> (8 * sizeof(I) - BITS); }

template <class D, class T> INLINE D element(T x) {
    if constexpr (__is_same(D, R)) return to_r(x);
    else return D(x);
}

// Lanes past the last query repeat it: what they give is dropped or weighs nothing, unless it were no number.
template <class D> static void repeat_last(D* dst, int ld, int nq, int nk) {
    for (int k = 0; nq < ld && k < nk; k++)
        for (int q = nq; q < ld; q++) dst[k * ld + q] = dst[k * ld + nq - 1];
}

// dst[k * ld + q] = element (q0 + q, k0 + k): the tile of an operand as the lanes of a score program read it.
// ``offset`` is linear wherever ``inside`` holds at the corners; elsewhere it holds every coordinate within the operand.
template <class T, class D, class Offset, class Inside>
static void stage(D* dst, int ld, const T* data, Offset offset, Inside inside, int64_t q0, int nq, int64_t k0, int nk) {
    const int64_t q1 = q0 + nq - 1, k1 = k0 + nk - 1;
    if (!(inside(q0, k0) && inside(q0, k1) && inside(q1, k0) && inside(q1, k1))) {
        for (int k = 0; k < nk; k++)
            for (int q = 0; q < nq; q++) dst[k * ld + q] = element<D>(data[offset(q0 + q, k0 + k)]);
        return;
    }
    const T* base = data + offset(q0, k0);
    const int64_t sq = nq > 1 ? offset(q0 + 1, k0) - offset(q0, k0) : 0, sk = nk > 1 ? offset(q0, k0 + 1) - offset(q0, k0) : 0;
    if constexpr (__is_same(D, R)) {
        if (sk == 1) {
            // Rows lie far apart: the hardware does not foresee the next tile's.
            for (int q = 0; q < nq; q++)
                for (int k = nk; k < 2 * nk; k += 64 / int(sizeof(T))) __builtin_prefetch(base + q * sq + k);
            copy_transposed(dst, ld, base, sq, sk, nq, nk);
        } else copy_rows(dst, ld, base, sk, sq, nk, nq);
    } else {
        for (int k = 0; k < nk; k++)
            for (int q = 0; q < nq; q++) dst[k * ld + q] = element<D>(base[q * sq + k * sk]);
    }
}
// Memory that a call needs. Fresh pages cost a small call more than its arithmetic, so a thread keeps what is no more than MOST_KEPT for
// its next call of this kernel.
#ifndef FUSE_MOST_KEPT
#ifdef __SANITIZE_ADDRESS__
#define FUSE_MOST_KEPT 0  // what lies behind the memory of a call shall not be that of a larger one
#else
#define FUSE_MOST_KEPT (4 << 20)
#endif
#endif
constexpr int64_t MOST_KEPT = FUSE_MOST_KEPT;

struct Kept {
    char* data = nullptr;
    int64_t size = 0;

    ~Kept() { drop(); }
    void drop() { free(data), data = nullptr, size = 0; }
    bool hold(int64_t bytes) {
        if (bytes <= size) return true;
        drop();
        if (posix_memalign((void**)&data, 64, bytes)) return data = nullptr, false;
        return size = bytes, true;
    }
};

// Taken while it lives; ``data`` is null where there is no such memory. No two of one ``PART`` live at once in a thread.
template <int PART> class Memory {
    static Kept& kept() { static thread_local Kept of_thread; return of_thread; }

public:
    char* const data;

    explicit Memory(int64_t bytes) : data(kept().hold(bytes) ? kept().data : nullptr) {}
    ~Memory() { if (kept().size > MOST_KEPT) kept().drop(); }
};
// Keys of a tile, cut where the place at which an operand is read jumps: within a run it stays, or moves to the neighbour.
struct Runs {
    struct Run { int64_t at; int first, length, step; } run[BK];
    int count;

    // ``column`` is the part of the place that depends on the key.
    template <class Column> void find(int64_t k0, int nk, Column column) {
        int64_t last = column(k0);
        run[0] = {last, 0, 1, 1}, count = 1;
        for (int i = 1; i < nk; i++) {
            const int64_t at = column(k0 + i), step = at - last;
            Run& r = run[count - 1];
            if (r.length == 1 ? step == 0 || step == 1 : step == r.step) r.step = int(step), r.length++;
            else run[count++] = {at, i, 1, 1};
            last = at;
        }
    }
};
constexpr int kPiece = 64;  // bytes that are written at a time: up to so many beyond what is asked for, less one

template <class T> INLINE void copy_pieces(T* dst, const T* src, int n) {
#ifdef __AVX512BW__
    for (int left = n * int(sizeof(T)), i = 0; i < left; i += kPiece)
        _mm512_storeu_si512((char*)dst + i, _mm512_maskz_loadu_epi8(left - i < kPiece ? (uint64_t(1) << (left - i)) - 1
            : ~uint64_t(0), (const char*)src + i));
#else
    memcpy(dst, src, n * sizeof(T));
#endif
}
template <int BYTES> struct Unsigned;
template <> struct Unsigned<1> { typedef uint8_t type; };
template <> struct Unsigned<2> { typedef uint16_t type; };
template <> struct Unsigned<4> { typedef uint32_t type; };
template <> struct Unsigned<8> { typedef uint64_t type; };
template <class T> INLINE void fill_pieces(T* dst, T x, int n) {
    typedef typename Unsigned<sizeof(T)>::type U;
    typedef U Piece __attribute__((vector_size(kPiece)));
    U bits;
    memcpy(&bits, &x, sizeof x);
    const Piece piece = bits - Piece{};
    for (int i = 0; i < n; i += kPiece / int(sizeof(T))) memcpy((void*)(dst + i), &piece, kPiece);
}

// The same for operands whose place is ``row`` of the query plus ``column`` of the key: as ``stage``, run by run.
template <class T, class D, class Row, class Column>
static void stage_separable(D* dst, int ld, const T* data, Row row, Column column, int64_t q0, int nq, int64_t k0, int nk) {
    Runs runs;
    runs.find(k0, nk, column);
    const int64_t first = row(q0), step = nq > 1 ? row(q0 + 1) - first : 0;
    bool even = __is_same(D, R);
    for (int q = 1; even && q < nq; q++) even = row(q0 + q) - first == q * step;
    for (int i = 0; i < runs.count; i++) {
        const Runs::Run& r = runs.run[i];
        D* to = dst + r.first * ld;
        if constexpr (__is_same(D, R))
            if (even && r.step == 1) {
                copy_transposed(to, ld, data + first + r.at, step, 1, nq, r.length);
                continue;
            }
        for (int q = 0; q < nq; q++) {
            const T* from = data + row(q0 + q) + r.at;
            for (int j = 0; j < (r.step ? r.length : 1); j++) to[j * ld + q] = element<D>(from[j]);
        }
        for (int j = 1; r.step == 0 && j < r.length; j++) memcpy(to + j * ld, to, nq * sizeof(D));
    }
}
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
// One call, decoded from the packed int64 arguments: threads, out, log-sum-exp (dense, or null), the strides of out, the
// sizes, then per operand its address, sizes and strides in elements.
typedef double Lse;

struct Call {
    int threads;
    char* out;
    Lse* lse;
    const int64_t* out_stride;
    int64_t B0, B1, q_len, kv_len;
    const void* data[3];
    const int64_t *size[3], *stride[3];

    explicit Call(const int64_t* a) : threads(int(a[0])), out((char*)a[1]), lse((Lse*)a[2]), out_stride(a + 3) {
        a += 7;
        B0 = *a++;
        B1 = *a++;
        q_len = *a++;
        kv_len = *a++;
        data[0] = (const void*)*a++, size[0] = a, stride[0] = a + 4, a += 8;
        data[1] = (const void*)*a++, size[1] = a, stride[1] = a + 4, a += 8;
        data[2] = (const void*)*a++, size[2] = a, stride[2] = a + 4, a += 8;
    }
};

INLINE int64_t batch_count(const Call& c) { return c.B0 * c.B1 * 1; }
// One batch index: where its operands begin, and the values that depend on nothing else.
template <class T> struct View { const T* data; int64_t row, column; };

struct BatchIndex {
    View<float> query;
    View<float> key;
    View<float> value;
    char* out;
    Lse* lse;
    int64_t b0;
    int64_t b1;
};

INLINE int64_t query_offset(const Call& c, const BatchIndex& b, int64_t q, int64_t d) {
    return b.b0 * c.stride[0][0] + b.b1 * c.stride[0][1] + q * c.stride[0][2] + d * c.stride[0][3];
}

INLINE int64_t key_offset(const Call& c, const BatchIndex& b, int64_t k, int64_t d) {
    return b.b0 * c.stride[1][0] + b.b1 * c.stride[1][1] + k * c.stride[1][2] + d * c.stride[1][3];
}

INLINE int64_t value_offset(const Call& c, const BatchIndex& b, int64_t k, int64_t e) {
    return b.b0 * c.stride[2][0] + b.b1 * c.stride[2][1] + k * c.stride[2][2] + e * c.stride[2][3];
}

static BatchIndex make_batch_index(const Call& c, int64_t number) {
    BatchIndex b;
    b.lse = c.lse ? c.lse + number * c.q_len : nullptr;
    b.b1 = number % c.B1, number /= c.B1;
    b.b0 = number % c.B0, number /= c.B0;
    {
        const int64_t base = query_offset(c, b, 0, 0);
        b.query.data = (const float*)c.data[0] + base;
        b.query.row = c.q_len > 1 ? query_offset(c, b, 1, 0) - base : 0;
        b.query.column = query_offset(c, b, 0, 1) - base;
    }
    {
        const int64_t base = key_offset(c, b, 0, 0);
        b.key.data = (const float*)c.data[1] + base;
        b.key.row = c.kv_len > 1 ? key_offset(c, b, 1, 0) - base : 0;
        b.key.column = key_offset(c, b, 0, 1) - base;
    }
    {
        const int64_t base = value_offset(c, b, 0, 0);
        b.value.data = (const float*)c.data[2] + base;
        b.value.row = c.kv_len > 1 ? value_offset(c, b, 1, 0) - base : 0;
        b.value.column = value_offset(c, b, 0, 1) - base;
    }
    b.out = c.out + sizeof(float) * (b.b0 * c.out_stride[0] + b.b1 * c.out_stride[1] + 0);
    return b;
}
// Which keys a query may see, as far as it is known without its score.
static int64_t upper_key(const Call& c, const BatchIndex& b, int64_t q) {
    const int64_t x6 = 1 + q;
    return x6;
}

// Keys and values of one head.
struct Packed {
    R *key, *value;

    static int64_t rows(int64_t key_tiles) { return key_tiles * BK + MR; }
    static int64_t bytes(int64_t key_tiles) { return (rows(key_tiles) * (D + DVP) * int64_t(sizeof(R)) + 63) / 64 * 64; }
    Packed(char* slot, int64_t key_tiles) : key((R*)slot), value(key + rows(key_tiles) * D) {}
    struct Part { const R *key, *value; };
    Part part(int64_t k0) const { return {key + k0 * D, value + k0 * DVP}; }
};

// Lanes of queries: a block of them, transposed, against tiles of keys; a softmax has a running maximum.
constexpr int DECODE_QUERIES = 4;   // so few queries read keys and values where they lie
constexpr int DR = (D + W - 1) / W * W, DVR = (DV + W - 1) / W * W;

// Owned by one thread, for one block of queries at a time; everything is transposed, so that lanes are queries.
struct alignas(64) LaneScratch {
    R query[D * NV * W];    // [D][queries]
    R scores[BK * NV * W];  // [BK][queries], then the weights
    R out[DVP * NV * W];    // [DVP][queries]
    R query_rows[DECODE_QUERIES * DR], out_rows[DECODE_QUERIES * DVR];  // decoding: queries and results as rows
};

// The score program, as lanes of queries.
// What depends on the query only, for a block of N * W of them; lanes past the last query repeat it.
template <int N> struct Rows {
    VI q[N];
    VI upper[N];
};

template <int N> static Rows<N> make_rows(const Call& c, const BatchIndex& b, int64_t q0) {
    Rows<N> r;
    for (int v = 0; v < N; v++) {
        for (int i = 0; i < W; i++) {
            const int64_t q = min64(q0 + v * W + i, c.q_len - 1);
            r.q[v][i] = I(q);
            r.upper[v][i] = I(clamp64(upper_key(c, b, q), 0, c.kv_len));
        }
    }
    return r;
}

// A tile, which the programs work on: queries q0 … q0 + nq of one batch index against its keys k0 … k0 + nk.
template <int N> struct Tile {
    const Call& c;
    const BatchIndex& b;
    const Rows<N>& r;
    LaneScratch& w;
    int64_t q0;
    int nq;
    int64_t k0;
    int nk;
};

// Every entry is visible.
template <int N> static void score_full(const Tile<N>& tile, VR (&m)[N]) {
    const Call& c = tile.c;
    const BatchIndex& b = tile.b;
    const Rows<N>& r = tile.r;
    LaneScratch& w = tile.w;
    const int64_t q0 = tile.q0, k0 = tile.k0;
    const int nq = tile.nq, nk = tile.nk;


    for (int i = 0; i < nk; i++) {
        const int64_t k = k0 + i;
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) {
            const VR score = load(w.scores + (i * N + v) * W);
            m[v] = vmax(score, m[v]);
        }
    }
}

// Some entries are masked.
template <int N> static void score_partial(const Tile<N>& tile, VR (&m)[N]) {
    const Call& c = tile.c;
    const BatchIndex& b = tile.b;
    const Rows<N>& r = tile.r;
    LaneScratch& w = tile.w;
    const int64_t q0 = tile.q0, k0 = tile.k0;
    const int nq = tile.nq, nk = tile.nk;


    for (int i = 0; i < nk; i++) {
        const int64_t k = k0 + i;
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) {
            const VR score = load(w.scores + (i * N + v) * W);
            const VR visible = select((vi(k) < r.upper[v]), score, vr(-R(INFINITY)));
            store(w.scores + (i * N + v) * W, visible);
            m[v] = vmax(visible, m[v]);
        }
    }
}

// As eager rounds, over every key.
template <int N> static void score_exact(const Tile<N>& tile, VR (&m)[N]) {
    const Call& c = tile.c;
    const BatchIndex& b = tile.b;
    const Rows<N>& r = tile.r;
    LaneScratch& w = tile.w;
    const int64_t q0 = tile.q0, k0 = tile.k0;
    const int nq = tile.nq, nk = tile.nk;


    for (int i = 0; i < nk; i++) {
        const int64_t k = k0 + i;
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) {
            const VR score = load(w.scores + (i * N + v) * W);
            const VR x1 = round_f32(score);
            const VR x2 = round_f32(x1 * vr(R(0.125)));
            const VI x3 = vi(k) <= r.q[v];
            const VR x4 = round_f32(select(x3, vr(R(0.0)), vr(R(-3.4028234663852886e+38))));
            const VR x5 = round_f32(x2 + x4);
            store(w.scores + (i * N + v) * W, x5);
            m[v] = vmax(x5, m[v]);
        }
    }
}

// Scores become weights relative to ``reference``, subtracted first: the lowest float times log2(e) would overflow. ``l``, times
// ``alpha``, takes up their sum, before ``weight`` acts on them: sums of PART keys, then of these.
template <int N>
static void weigh(const Tile<N>& tile, R unit, const VR (&reference)[N], const VR (&alpha)[N], VR (&l)[N]) {
    const Call& c = tile.c;
    const BatchIndex& b = tile.b;
    const Rows<N>& r = tile.r;
    LaneScratch& w = tile.w;
    const int64_t q0 = tile.q0, k0 = tile.k0;
    const int nq = tile.nq, nk = tile.nk;

    constexpr int PART = 16;

    VR whole[N] = {};
    for (int first = 0; first < nk; first += PART) {
        VR part[N] = {};
        for (int i = first; i < nk && i < first + PART; i++) {
            const int64_t k = k0 + i;
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) {
                const VR prob = exp2_lanes((load(w.scores + (i * N + v) * W) - reference[v]) * unit);
                part[v] += prob;
                store(w.scores + (i * N + v) * W, prob);
            }
        }
        for (int v = 0; v < N; v++) whole[v] += part[v];
    }
    for (int v = 0; v < N; v++) l[v] = l[v] * alpha[v] + whole[v];
}

// Rounding errors of a sum grow with the number of its terms. So every sum is one of partial sums: over the features in
// parts of TERMS, over the keys in parts of SUMMED.
constexpr int TERMS = D > 128 ? 64 : (D + 1) / 2, SUMMED = 64;

// c[MR x N*W] = old + a[MR x length] * b[length x N*W], the product summed before it is added, where old is nothing, c, or c
// times ``alpha``, a factor per lane. Element (i, j) of a lies at i * RS + j * CS.
enum Old { DROPPED, KEPT, SCALED };
template <int N, int RS, int CS, Old OLD> INLINE void multiply(R* c, const R* a, const R* b, int length, const VR* alpha) {
    VR sum[MR][N];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) sum[i][v] = VR{};
#pragma GCC unroll 2
    for (int j = 0; j < length; j++) {
        VR column[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) column[v] = load(b + (j * N + v) * W);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sum[i][v] += a[i * RS + j * CS] * column[v];
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) {
            R* to = c + (i * N + v) * W;
            store(to, OLD == DROPPED ? sum[i][v] : OLD == KEPT ? load(to) + sum[i][v] : load(to) * alpha[v] + sum[i][v]);
        }
}

// Keys k0 … of one head as rows of reals, [keys][D] and [keys][DVP], zeros up to a multiple of MR.
static void pack_rows(const Call& c, const BatchIndex& b, R* key, R* value, int64_t k0) {
    const int64_t n = min64(BK, c.kv_len - k0), padded = (n + MR - 1) / MR * MR;
    copy_rows(key, D, b.key.data + k0 * b.key.row, b.key.row, b.key.column, n, D);
    copy_rows(value, DVP, b.value.data + k0 * b.value.row, b.value.row, b.value.column, n, DV);
    memset(key + n * D, 0, sizeof(R) * (padded - n) * D);
    for (int64_t k = 0; DVP > DV && k < n; k++) memset(value + k * DVP + DV, 0, sizeof(R) * (DVP - DV));
}

// What is subtracted from scores of which the largest is ``m``: nothing where all of them are -inf, and stay so.
INLINE VR finite_reference(VR m) { return m == -R(INFINITY) ? VR{} : m; }

// Writes the rows ``keep`` allows, lane by lane.
template <int N, class Keys> static void write_out(const Keys&, const Call& c, const BatchIndex& b, LaneScratch& w, int64_t q0,
    const VR* factor, const VI* keep) {
    const int64_t rs = c.out_stride[2], cs = c.out_stride[3];
    for (int v = 0; v < N; v++)
        for (int e0 = 0; e0 < DV; e0 += W) {
            const int width = DV - e0 < W ? DV - e0 : W;
            VR x[W] = {};
            for (int e = 0; e < width; e++) x[e] = load(w.out + ((e0 + e) * N + v) * W) * factor[v];
            transpose(x);
            for (int i = 0; i < W; i++) {
                if (!keep[v][i]) continue;
                float* to = (float*)b.out + (q0 + v * W + i) * rs + e0 * cs;
                if (cs == 1 && width == W) store_as(to, x[i]);
                else for (int e = 0; e < width; e++) to[e * cs] = from_r<float>(x[i][e]);
            }
        }
}

// log of the sum of exp over a row's scores, of which ``highest`` was subtracted: as a rule m * natural, rounded.
template <int N> static void write_lse(const BatchIndex& b, int64_t q0, const VR* m, R natural, const VR* highest, const VR* l,
    const VI* keep) {
    for (int v = 0; v < N; v++)
        for (int i = 0; i < W; i++) {
            if (!keep[v][i]) continue;
            const Lse reference = highest[v][i] == m[v][i] * natural ? Lse(m[v][i]) * Lse(natural) : Lse(highest[v][i]);
            b.lse[q0 + v * W + i] = reference + Lse(log(double(l[v][i])));
        }
}

// What a block does with keys and values that are packed; ``keys`` gives them tile by tile.
template <int N, class Keys> static void load_queries(const Keys&, const BatchIndex& b, LaneScratch& w, int64_t q0, int nq) {
    copy_transposed(w.query, N * W, b.query.data + q0 * b.query.row, b.query.row, b.query.column, nq, D);
    for (int d = 0; nq < N * W && d < D; d++)
        for (int i = nq; i < N * W; i++) w.query[d * N * W + i] = 0;
    memset(w.out, 0, sizeof(R) * DVP * N * W);
}
// Rows i … of the tile behind, which is read next: whole heads are streamed from memory that others share, too.
template <class Part> INLINE void prefetch_next(const Part& part, int i) {
    constexpr int LINE = 64 / int(sizeof(R));
#pragma GCC unroll 1
    for (int x = 0; x < MR * D; x += LINE) __builtin_prefetch(part.key + (BK + i) * D + x, 0, 2);
#pragma GCC unroll 1
    for (int x = 0; x < MR * DVP; x += LINE) __builtin_prefetch(part.value + (BK + i) * DVP + x, 0, 2);
}
template <int N, class Part> static void score_product(const Part& part, LaneScratch& w, int, int nk) {
    for (int d = 0; d < D; d += TERMS)
        for (int i = 0; i < nk; i += MR) {
            R* scores = w.scores + i * N * W;
            const R *key = part.key + i * D + d, *query = w.query + d * N * W;
            const int terms = D - d < TERMS ? D - d : TERMS;
            if (d == 0) prefetch_next(part, i);
            if (d == 0) multiply<N, D, 1, DROPPED>(scores, key, query, terms, nullptr);
            else multiply<N, D, 1, KEPT>(scores, key, query, terms, nullptr);
        }
}
template <int N, class Part> static void value_product(const Part& part, LaneScratch& w, int, int nk, const VR* alpha) {
    for (int k = 0; k < nk; k += SUMMED)
        for (int e = 0; e < DVP; e += MR) {
            R* out = w.out + e * N * W;
            const R *value = part.value + k * DVP + e, *weights = w.scores + k * N * W;
            const int keys = nk - k < SUMMED ? nk - k : SUMMED;
            if (k == 0) multiply<N, 1, DVP, SCALED>(out, value, weights, keys, alpha);
            else multiply<N, 1, DVP, KEPT>(out, value, weights, keys, nullptr);
        }
}

// As few queries as in decoding: keys and values are read once, where they lie, and lanes of the products are features.
struct InPlace {
    const BatchIndex& b;

    struct Part { const float* key; const float* value; int64_t key_row, value_row; };
    Part part(int64_t k0) const {
        return {b.key.data + k0 * b.key.row, b.value.data + k0 * b.value.row, b.key.row, b.value.row};
    }
};

static bool all_in_place(const Call& c, const BatchIndex* batch, int64_t count) {
    bool possible = c.q_len <= DECODE_QUERIES;
    for (int64_t i = 0; possible && i < count; i++) possible = batch[i].key.column == 1 && batch[i].value.column == 1;
    return possible;
}

// Rows of 32 bits that are fetched before they are needed: hardware does not foresee that keys and values take turns.
constexpr int AHEAD = 16;

// Features e … e + W of a row of WIDTH.
template <int WIDTH, class T> INLINE VR features(const T* row, int e) {
    return e + W <= WIDTH ? load_as(row + e) : load_some(row + e, WIDTH - e);
}

template <int N> static void load_queries(const InPlace&, const BatchIndex& b, LaneScratch& w, int64_t q0, int nq) {
    memset(w.query_rows, 0, sizeof w.query_rows);
    memset(w.out_rows, 0, sizeof w.out_rows);
    memset(w.scores, 0, sizeof(R) * BK * N * W);
    copy_rows(w.query_rows, DR, b.query.data + q0 * b.query.row, b.query.row, b.query.column, nq, D);
}

// Sums of products over the features, W keys at a time: their partial sums are transposed and added.
template <int N> static void score_product(const InPlace::Part& part, LaneScratch& w, int nq, int nk) {
    for (int k0 = 0; k0 < nk; k0 += W)
        for (int q = 0; q < nq; q++) {
            VR x[W];
            const int keys = nk - k0 < W ? nk - k0 : W;
            for (int k = 0; k < W; k++) {
                VR products = {};  // in a register, where an element of x would not be
                const float* row = part.key + (k0 + (k < keys ? k : 0)) * part.key_row;
#pragma GCC unroll 8
                for (int d = 0; d < D; d += W) {
                    if (sizeof *row == 4) __builtin_prefetch(row + AHEAD * part.key_row + d);
                    products += features<D>(row, d) * load(w.query_rows + q * DR + d);
                }
                x[k] = products;
            }
            transpose(x);
            VR sum = x[0];
            for (int k = 1; k < W; k++) sum += x[k];
            for (int k = 0; k < keys; k++) w.scores[(k0 + k) * N * W + q] = sum[k];
        }
}

template <int N> static void value_product(const InPlace::Part& part, LaneScratch& w, int nq, int nk, const VR* alpha) {
    constexpr int CHUNK = 4 * W;  // results kept in registers
    for (int e0 = 0; e0 < DVR; e0 += CHUNK)
        for (int q = 0; q < nq; q++) {
            R* out = w.out_rows + q * DVR + e0;
            VR sum[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sum[i] = VR{};
            for (int k = 0; k < nk; k++)
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    if (e0 + i * W >= DVR) continue;
                    if (sizeof *part.value == 4) __builtin_prefetch(part.value + (k + AHEAD) * part.value_row + e0 + i * W);
                    sum[i] += w.scores[k * N * W + q] * features<DV>(part.value + k * part.value_row, e0 + i * W);
                }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                if (e0 + i * W < DVR) store(out + i * W, load(out + i * W) * alpha[0][q] + sum[i]);
        }
}

// Results are rows already.
template <int N> static void write_out(const InPlace&, const Call& c, const BatchIndex& b, LaneScratch& w, int64_t q0,
    const VR* factor, const VI* keep) {
    const int64_t rs = c.out_stride[2], cs = c.out_stride[3];
    for (int q = 0; q < DECODE_QUERIES; q++) {
        if (!keep[0][q]) continue;
        float* const to = (float*)b.out + (q0 + q) * rs;
        for (int e0 = 0; e0 < DV; e0 += W) {
            const VR x = load(w.out_rows + q * DVR + e0) * factor[0][q];
            if (cs == 1 && DV - e0 >= W) store_as(to + e0, x);
            else for (int e = e0; e < DV && e < e0 + W; e++) to[e * cs] = from_r<float>(x[e - e0]);
        }
    }
}

// One block of N * W queries against every key that it may see. EXACT: no tile is skipped and scores are rounded as eager
// rounds them; only the rows of ``exact`` are written. Returns through ``exact`` the rows that need this.
template <int N, bool EXACT, class Keys> static bool block(const Call& c, const BatchIndex& b, const Keys& p, LaneScratch& w,
    int64_t q0, VI* exact) {
    const int nq = int(min64(N * W, c.q_len - q0));
    const Rows<N> r = make_rows<N>(c, b, q0);
    load_queries<N>(p, b, w, q0, nq);
    VR m[N], l[N];  // as FlashAttention-2 names them: a row's largest score so far, and its sum of exp(score - m)
    for (int v = 0; v < N; v++) m[v] = vr(-R(INFINITY)), l[v] = VR{};
    int64_t begin = 0, end = c.kv_len, full_begin = 0, full_end = c.kv_len;
    if (!EXACT) end = clamp64(upper_key(c, b, q0 + nq - 1), 0, c.kv_len), full_end = upper_key(c, b, q0);
    const R natural = EXACT ? R(1) : R(0.125), unit = natural * R(1.44269504088896341);
    for (int64_t k0 = begin - begin % MR; k0 < end; k0 += BK) {
        const int nk = int(min64(BK, end - k0));
        bool full = !EXACT && k0 >= full_begin && k0 + nk <= full_end;
        const Tile<N> tile = {c, b, r, w, q0, nq, k0, nk};
        const auto part = p.part(k0);
        score_product<N>(part, w, nq, nk);
        VR m_old[N], alpha[N], reference[N];  // alpha: what l and the result so far are worth now that m has grown
        for (int v = 0; v < N; v++) m_old[v] = m[v];
        if constexpr (EXACT) score_exact<N>(tile, m);
        else
        if (!full) score_partial<N>(tile, m);
        else
        score_full<N>(tile, m);
        for (int v = 0; v < N; v++) {
            reference[v] = finite_reference(m[v]);
            alpha[v] = exp2_lanes((m_old[v] - reference[v]) * unit);
        }
        weigh<N>(tile, unit, reference, alpha, l);
        value_product<N>(part, w, nq, nk, alpha);
    }
    bool any = false;
    VR factor[N], highest[N];
    VI keep[N];
    for (int v = 0; v < N; v++) {
        VR out_scale = vr(R(1));
        highest[v] = m[v] * natural;
        factor[v] = c.kv_len == 0 ? VR{} : out_scale / l[v];  // a sum over no keys is zero, whatever the weights are
        keep[v] = vi(c.q_len - q0 - v * W) > lane_numbers();
        if constexpr (EXACT) keep[v] &= exact[v];
        else {
            exact[v] = keep[v] & ~((m[v] * R(0.125) > R(-3.4028234663852886e+38)) & (f_abs(l[v]) < R(INFINITY)));
            keep[v] &= ~exact[v];
            for (int i = 0; i < W; i++) any |= exact[v][i] != 0;
        }
    }
    write_out<N>(p, c, b, w, q0, factor, keep);
    if (b.lse) write_lse<N>(b, q0, m, natural, highest, l, keep);
    return any;
}

// One block, and those of its rows that are exact.
template <int N, class Keys> static void queries_in(const Call& c, const BatchIndex& b, const Keys& p, LaneScratch& w,
    int64_t q0) {
    VI exact[N];
    if (!block<N, false>(c, b, p, w, q0, exact)) return;
    for (int v = 0; v < N; v++) {
        bool any = false;
        for (int i = 0; i < W; i++) any |= exact[v][i] != 0;
        if (any) block<1, true>(c, b, p, w, q0 + v * W, exact + v);
    }
}
using Scratch = LaneScratch;  // of a thread

static void pack(const Call& c, const BatchIndex& b, const Packed& p, int64_t k0) {
    pack_rows(c, b, p.key + k0 * D, p.value + k0 * DVP, k0);
}

// One block, of no more vectors than it needs.
template <int N = NV> static void queries(const Call& c, const BatchIndex& b, const Packed& p, Scratch& w, int64_t q0) {
    if constexpr (N > 1)
        if (q0 + (N - 1) * W >= c.q_len) return queries<N - 1>(c, b, p, w, q0);
    queries_in<N>(c, b, p, w, q0);
}
static void decode(const Call& c, const BatchIndex& b, Scratch& w) { queries_in<1>(c, b, InPlace{b}, w, 0); }

// Heads are taken in waves: all threads pack the keys and values of a wave, then share its blocks of queries.

// Batch indices that follow each other and read the same keys and values share one packed copy; copies are numbered in ``slot``.
static void number_slots(const BatchIndex* batch, int64_t* slot, int64_t count) {
    slot[0] = 0;
    for (int64_t i = 1; i < count; i++) {
        const bool same = batch[i].key.data == batch[i - 1].key.data && batch[i].value.data == batch[i - 1].value.data;
        slot[i] = slot[i - 1] + !same;
    }
}

static int64_t wave_end(const int64_t* slot, int64_t first, int64_t count, int64_t limit) {
    int64_t last = first;
    while (last < count && slot[last] - slot[first] < limit) last++;
    return last;
}

extern "C" __attribute__((visibility("default"))) int fuse_attention(const int64_t* arguments) {
    const Call c(arguments);
    const int64_t count = batch_count(c), blocks = (c.q_len + BQ - 1) / BQ, key_tiles = (c.kv_len + BK - 1) / BK;
    if (count * blocks == 0) return 0;
    if (c.q_len > 16777216 || c.kv_len > 16777216) return 1;
    const int64_t tile_bytes = 0;
    // Batch, slots and tiles.
    const Memory<0> head(count * int64_t(sizeof(BatchIndex) + sizeof(int64_t)) + tile_bytes);
    if (!head.data) return 2;
    BatchIndex* batch = (BatchIndex*)head.data;
    int64_t* slot = (int64_t*)(batch + count);
    {
        const FlushDenormals flush;
        for (int64_t i = 0; i < count; i++) batch[i] = make_batch_index(c, i);
        number_slots(batch, slot, count);
    }
    const bool packs = !all_in_place(c, batch, count);
    const int64_t slot_bytes = packs ? Packed::bytes(key_tiles) : 0;
    // Enough blocks in a wave to balance the threads, and no more than the outer cache holds.
    const int64_t balanced = (8 * c.threads + blocks - 1) / blocks, cached = 8388608 / (slot_bytes + 1);
    const int64_t limit = min64(max64(max64(balanced, cached), 1), count);
    const int threads = int(min64(c.threads, 1 + count * c.q_len * c.kv_len * (D + DV) / 262144));
    const int64_t packed_bytes = limit * slot_bytes, per_thread = sizeof(Scratch) + 64;
    // Packed keys and values, and the threads' scratch.
    const Memory<1> held(packed_bytes + threads * per_thread);
    char* const memory = held.data;
    if (!memory) return 2;
    char* scratch = memory + packed_bytes;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const FlushDenormals flush;
#ifdef _OPENMP
        Scratch& w = *new (scratch + omp_get_thread_num() * per_thread) Scratch;
#else
        Scratch& w = *new (scratch) Scratch;
#endif
        for (int64_t first = 0, last; first < count; first = last) {
            last = wave_end(slot, first, count, limit);
            char* const packed = memory - slot[first] * slot_bytes;
#pragma omp for schedule(dynamic, 1)
            for (int64_t t = 0; t < (last - first) * key_tiles; t++) {
                const int64_t i = first + t / key_tiles, k0 = t % key_tiles * BK;
                const Packed p(packed + slot[i] * slot_bytes, key_tiles);
                if (packs && (i == first || slot[i] != slot[i - 1])) pack(c, batch[i], p, k0);
            }
            // The last blocks of a head first: with a causal mask they are the longest.
#pragma omp for schedule(dynamic, 1)
            for (int64_t t = 0; t < (last - first) * blocks; t++) {
                const int64_t i = first + t / blocks, q0 = (blocks - 1 - t % blocks) * BQ;
                if (!packs) { decode(c, batch[i], w); continue; }
                queries(c, batch[i], Packed(packed + slot[i] * slot_bytes, key_tiles), w, q0);
            }
        }
    }
    return 0;
}
#ifdef FUSE_STANDALONE
// Runs the kernel alone on random tensors: ./kernel [threads], and prints sizes, the median time and a checksum.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

struct Tensor {
    std::vector<char> bytes;
    std::vector<int64_t> shape, stride;

    // Dense; ``order`` names the dimensions from outermost to innermost.
    template <class T> static Tensor random(std::vector<int64_t> shape, std::vector<int> order, bool is_float) {
        Tensor t;
        t.shape = t.stride = shape;
        int64_t count = 1;
        for (size_t i = shape.size(); i-- > 0; count *= shape[order[i]]) t.stride[order[i]] = count;
        t.bytes.resize(count * sizeof(T));
        uint32_t state = 1;
        for (int64_t i = 0; i < count; i++) {
            state = state * 1664525u + 1013904223u;
            if (is_float) ((T*)t.bytes.data())[i] = from_r<T>(R(state >> 8) / R(1 << 23) - R(1));
            else t.bytes[i * sizeof(T)] = 1;
        }
        return t;
    }
    template <class T> double sum() const {
        double found = 0;
        for (size_t i = 0; i < bytes.size() / sizeof(T); i++) found += double(to_r(((const T*)bytes.data())[i]));
        return found;
    }
};

int main(int count, char** texts) {
    const int64_t threads = count > 1 ? atoll(texts[1]) : 1;
    const char* said = "B0 = 1, B1 = 8, q_len = 512, kv_len = 512";
    if (count > 2 || threads < 1) {
        printf("usage: %s [threads]\n\n", texts[0]);
        printf("Runs the kernel 11 times on random tensors of these sizes; prints the median time and a checksum:\n");
        printf("    %s\n", said);
        printf("    operand 0 float32, 1 x 8 x 512 x 64\n");
        printf("    operand 1 float32, 1 x 8 x 512 x 64\n");
        printf("    operand 2 float32, 1 x 8 x 512 x 64\n");
        printf("python -m fuse.alone FILE takes the sizes of your model, compares with float64 and times it beside SDPA.\n");
        return count != 2 || std::string(texts[1]) != "--help";
    }
    const std::vector<int64_t> sizes = { 1, 8, 512, 512 };  // B0, B1, q_len, kv_len
    std::vector<Tensor> operands, more;
    operands.push_back(Tensor::random<float>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true));
    operands.push_back(Tensor::random<float>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true));
    operands.push_back(Tensor::random<float>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true));
    Tensor out = Tensor::random<float>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true);
    std::vector<int64_t> arguments = {threads, (int64_t)out.bytes.data(), 0};
    const auto append = [&](const std::vector<int64_t>& more) { arguments.insert(arguments.end(), more.begin(), more.end()); };
    append(out.stride);
    append(sizes);
    for (const Tensor& t : operands) append({(int64_t)t.bytes.data()}), append(t.shape), append(t.stride);
    for (const Tensor& t : more) append({(int64_t)t.bytes.data()}), append(t.stride);
    std::vector<double> times;
    for (int i = 0; i < 11; i++) {
        const auto start = std::chrono::steady_clock::now();
        if (const int code = fuse_attention(arguments.data())) return printf("error %d\n", code), code;
        times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::sort(times.begin(), times.end());
    double sum = 0;
    sum += out.sum<float>();
    printf("%s, threads = %d: %.3f ms, sum of the result %.6g\n", said, int(threads), times[times.size() / 2] * 1e3, sum);
    return 0;
}
#endif
