// out = sum over k of w * value,  w = prob
// softmax over k of (score * 0.125) + where(k <= q, 0, -3.38953e+38)
// visible where k <= q
// spec  {"batch":2,"empty_row":"nan","expr":{"nodes":[["Index","int64","b0"],["Index","int64","b1"],["Index","int64","q"],["Index","int64","d"],["Load","bfloat16",0,[0,1,2,3]],["Index","int64","k"],["Load","bfloat16",1,[0,1,5,3]],["Index","int64","e"],["Load","bfloat16",2,[0,1,5,7]],["Score","bfloat16"],["Const","bfloat16","0x1.0000000000000p-3"],["Apply","bfloat16","mul",[9,10]],["Apply","bool","le",[5,2]],["Const","bfloat16","0x0.0p+0"],["Const","bfloat16","-0x1.fe00000000000p+127"],["Apply","bfloat16","where",[12,13,14]],["Apply","bfloat16","add",[11,15]],["Prob","bfloat16"],["Const","int64",1],["Apply","int64","add",[18,2]]],"roots":{"key":6,"mask.predicate":12,"mask.upper":19,"mask.visible":11,"query":4,"score":16,"value":8,"weight":17}},"extra":[],"fill":"-0x1.fe00000000000p+127","normalisation":"softmax","operands":[[4,"bfloat16"],[4,"bfloat16"],[4,"bfloat16"]],"out_dtype":"bfloat16","out_order":[0,2,1,3],"qk_dim":64,"v_dim":64,"version":2}
// plan  Plan(core='matrix', isa='avx512_bf16', real='float', width=16, vectors=3, rows=6, block_k=64, wave_bytes=1048576, thread_work=262144, part_keys=384, decode_queries=4)
// made by torch-fuse …
// alone: python -m fuse.alone <this file>, which compares it with float64 and times it beside SDPA
// without Python: c++ -std=c++17 -O3 -march=native -w -fopenmp -DFUSE_STANDALONE <this file> -o kernel && ./kernel [threads]
// operand 0 bfloat16, 4 dimensions: query at [b0, b1, q, d]
// operand 1 bfloat16, 4 dimensions: key at [b0, b1, k, d]
// operand 2 bfloat16, 4 dimensions: value at [b0, b1, k, e]
// sizes     B0, B1, q_len, kv_len
// result    bfloat16 at [b0, b1, q, e], in memory by b0, q, b1, e
// read from the entry up: each part uses those above it
// contents, in order
//   VR               vectors, memory, functions: the same in every kernel, up to Call
//   Call             the arguments of a call
//   BatchIndex       one batch index: where its operands begin
//   upper_key        edit: one past the last key that a query may see
//   Matrix           products of bfloat16
//   Packed           keys and values of one head, as tiles are read
//   ScoreFull        edit: the score of an entry, lanes are keys
//   ScorePartial     edit: the same where the mask hides some
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
//   QueryBlock       a block of queries against its keys, by matrix products
//   fuse_attention   the entry
#define FUSE_WIDTH 16
#define FUSE_DOUBLE 0
typedef float R;
constexpr int W = FUSE_WIDTH;   // lanes of a vector
constexpr int BQ = 3 * W;   // queries of a block
constexpr int NV = 3, MR = 8;   // of the lanes core: vectors of queries in a block, rows of the microkernel
constexpr int BK = 64;   // keys of a tile
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
typedef float Lse;

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
    View<Bf16> query;
    View<Bf16> key;
    View<Bf16> value;
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
        b.query.data = (const Bf16*)c.data[0] + base;
        b.query.row = c.q_len > 1 ? query_offset(c, b, 1, 0) - base : 0;
        b.query.column = query_offset(c, b, 0, 1) - base;
    }
    {
        const int64_t base = key_offset(c, b, 0, 0);
        b.key.data = (const Bf16*)c.data[1] + base;
        b.key.row = c.kv_len > 1 ? key_offset(c, b, 1, 0) - base : 0;
        b.key.column = key_offset(c, b, 0, 1) - base;
    }
    {
        const int64_t base = value_offset(c, b, 0, 0);
        b.value.data = (const Bf16*)c.data[2] + base;
        b.value.row = c.kv_len > 1 ? value_offset(c, b, 1, 0) - base : 0;
        b.value.column = value_offset(c, b, 0, 1) - base;
    }
    b.out = c.out + sizeof(Bf16) * (b.b0 * c.out_stride[0] + b.b1 * c.out_stride[1] + 0);
    return b;
}
// Which keys a query may see, as far as it is known without its score.
static int64_t upper_key(const Call& c, const BatchIndex& b, int64_t q) {
    const int64_t x6 = 1 + q;
    return x6;
}
// Products of bf16 by AVX512-BF16: 6 x 64 results in 24 registers; a is broadcast a pair at a time.
// Where few rows are left, as of 64 features, a smaller step takes them.
struct Matrix {
    static constexpr int kRows = 6, kCols = 64, kDepth = 2;

    // c[kRows, cols] (+)= a[kRows, 2 * pairs] * b[pairs, cols, 2]; cols at most 64; leading dimensions in elements of a, in
    // pairs of b. More than ``rows`` may be computed: scratch is padded.
    template <bool ADD> void step(const Bf16* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows, int cols,
        int pairs) {
        if (rows > kLeft) by_columns<kRows, ADD>(a, lda, b, ldb, c, ldc, cols, pairs);
        else by_columns<kLeft, ADD>(a, lda, b, ldb, c, ldc, cols, pairs);
    }
    void flush() {}

private:
    static constexpr int kLeft = 4;

    template <int ROWS, bool ADD> static void by_columns(const Bf16* a, int lda, const uint32_t* b, int ldb, float* c, int ldc,
        int cols, int pairs) {
        switch ((cols + 15) / 16) {
            case 4: return in_registers<ROWS, 4, ADD>(a, lda, b, ldb, c, ldc, pairs);
            case 3: return in_registers<ROWS, 3, ADD>(a, lda, b, ldb, c, ldc, pairs);
            case 2: return in_registers<ROWS, 2, ADD>(a, lda, b, ldb, c, ldc, pairs);
            default: return in_registers<ROWS, 1, ADD>(a, lda, b, ldb, c, ldc, pairs);
        }
    }
    template <int ROWS, int N, bool ADD>
    __attribute__((noinline)) static void in_registers(const Bf16* a, int lda, const uint32_t* b, int ldb, float* c, int ldc,
        int pairs) {
        VR sum[ROWS][N];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sum[r][n] = ADD ? load(c + r * ldc + n * W) : VR{};
        for (int k = 0; k < pairs; k++, b += ldb) {
            __m512bh column[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) column[n] = (__m512bh)_mm512_loadu_si512(b + n * W);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                int pair;
                memcpy(&pair, a + r * lda + 2 * k, 4);
                const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) sum[r][n] = VR(_mm512_dpbf16_ps(__m512(sum[r][n]), row, column[n]));
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) store(c + r * ldc + n * W, sum[r][n]);
    }
};
// Operands of products of bfloat16: pairs of neighbours along the summed axis lie together, columns follow.
constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Zeros in the first n columns, rounded up to half vectors, of each of ``rows`` rows that are ``ld`` elements apart.
template <class T> static void clear_rows(T* to, int rows, int64_t ld, int n) {
    constexpr int HALF = 32 / sizeof(T);
    __m256i zeros = _mm256_setzero_si256();
    __asm__("" : "+x"(zeros));  // else the compiler makes each short row a "rep stos", which takes longer to begin than to do
    for (int i = 0; i < rows; i++, to += ld)
        for (int j = 0; j < n; j += HALF) _mm256_storeu_si256((__m256i*)(to + j), zeros);
}

// Of n keys: whole vectors of them, as columns, and whole steps, as what is summed over. What lies behind is not read.
constexpr int columns_of(int64_t n) { return round_up(int(n), W); }
constexpr int summed_of(int64_t n) { return round_up(int(n), 32); }

INLINE __mmask16 first_lanes(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1; }
INLINE __m512i widen(const Bf16* p, int n) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

// dst[j] = the pair (low[j], high[j]), for n of 16 neighbours; nullptr is a row of zeros.
INLINE void interleave(uint32_t* dst, const Bf16* low, const Bf16* high, int n) {
    const __m512i a = low ? widen(low, n) : _mm512_setzero_si512(), b = high ? widen(high, n) : _mm512_setzero_si512();
    _mm512_storeu_si512(dst, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}

// The same of elements that are not neighbours.
INLINE void interleave_strided(uint32_t* dst, const Bf16* low, const Bf16* high, int64_t stride, int n) {
    for (int j = 0; j < W; j++) {
        const uint32_t a = low && j < n ? low[j * stride].raw : 0, b = high && j < n ? high[j * stride].raw : 0;
        dst[j] = a | b << 16;
    }
}

static void interleave_rows(uint32_t* dst, const Bf16* low, const Bf16* high, int64_t stride, int n) {
    if (stride == 1) interleave(dst, low, high, n);
    else interleave_strided(dst, low, high, stride, n);
}

// 16 rows whose columns are neighbours, as pairs of columns: squares of pairs, transposed. dst is [PAIRS][ld].
template <int WIDTH, int PAIRS> static void pack_rows_of_pairs(uint32_t* dst, int ld, const Bf16* from, int64_t row, int n) {
    for (int p = 0; p < PAIRS; p += W) {
        VR x[W];
        const int columns = WIDTH - 2 * p;
        const __mmask32 have = columns >= 32 ? ~0u : columns <= 0 ? 0 : (1u << columns) - 1;
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) x[i] = VR(_mm512_maskz_loadu_epi16(i < n ? have : 0, i < n ? from + i * row + 2 * p
            : from));
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
            if (p + i < PAIRS) store((float*)(dst + (p + i) * ld), x[i]);
    }
}

// Pairs of columns of n rows, zeros up to ``rows``: [PAIRS][ld]. ``stride`` is that of the columns.
template <int WIDTH, int PAIRS> static void pack_column_pairs(uint32_t* dst, int ld, const Bf16* from, int64_t row,
    int64_t stride, int n, int rows) {
    for (int k = 0; k < rows; k += W) {
        const Bf16* first = from + k * row;
        if (stride == 1) pack_rows_of_pairs<WIDTH, PAIRS>(dst + k, ld, first, row, n - k);
        else for (int p = 0; p < PAIRS; p++) {
            const Bf16* low = first + 2 * p * stride;
            interleave_rows(dst + p * ld + k, 2 * p < WIDTH ? low : nullptr, 2 * p + 1 < WIDTH ? low + stride : nullptr, row,
                n - k);
        }
    }
}

// Of [PAIRS][ld] pairs of columns, pairs of each column and itself, in place.
template <int WIDTH> static void repeat_columns(uint32_t* dst, int ld, int rows) {
    for (int p = (WIDTH - 1) / 2; p >= 0; p--)
        for (int k = 0; k < rows; k += W) {
            const __m512i x = _mm512_loadu_si512(dst + p * ld + k), odd = _mm512_srli_epi32(x, 16), even = _mm512_and_si512(x,
                _mm512_set1_epi32(0xffff));
            if (2 * p + 1 < WIDTH) _mm512_storeu_si512(dst + (2 * p + 1) * ld + k, _mm512_or_si512(odd, _mm512_slli_epi32(odd,
                16)));
            _mm512_storeu_si512(dst + 2 * p * ld + k, _mm512_or_si512(even, _mm512_slli_epi32(even, 16)));
        }
}
// Operands in the layouts of matrix products: pairs of neighbours along the summed axis lie together, columns follow.
//   key    per tile of BK keys: [PAIRS][BK] pairs of features
//   value  per tile of BK keys: [BK / 2][DVP] pairs of keys, in the order of packed_key
constexpr int PAIRS = round_up(D, Matrix::kDepth) / 2, VALUE_COLS = round_up(DV, W);

struct Packed {
    uint32_t *key, *value;

    static int64_t bytes(int64_t key_tiles) { return key_tiles * BK * (PAIRS + VALUE_COLS / 2) * sizeof(uint32_t); }
    Packed(char* slot, int64_t key_tiles) : key((uint32_t*)slot), value(key + key_tiles * BK * PAIRS) {}
};

// The weights of 32 keys are packed by one instruction (vpackusdw), which takes four from the first vector and four from
// the second in turn: position i of 32 holds key packed_key(i), and the values are laid out to match.
constexpr int packed_key(int i) { return i / 8 * 4 + i % 4 + (i % 8 < 4 ? 0 : 16); }

static void pack(const Call& c, const BatchIndex& b, const Packed& packed, int64_t k0) {
    const int n = int(min64(BK, c.kv_len - k0));
    uint32_t *key = packed.key + k0 * PAIRS, *value = packed.value + k0 / 2 * VALUE_COLS;
    pack_column_pairs<D, PAIRS>(key, BK, b.key.data + k0 * b.key.row, b.key.row, b.key.column, n, columns_of(n));
    for (int i = 0; i < summed_of(n); i += 2) {
        const int k = i / 32 * 32 + packed_key(i % 32);
        const Bf16* low = b.value.data + (k0 + k) * b.value.row;
        for (int e = 0; e < VALUE_COLS; e += W) {
            const int64_t at = e * b.value.column;
            interleave_rows(value + i / 2 * VALUE_COLS + e, k < n ? low + at : nullptr, k + 1 < n ? low + b.value.row + at
                : nullptr,
                            b.value.column, DV - e);
        }
    }
}
// The score program as lanes of keys, one query at a time.

// A row of an operand along the keys of a tile: in place where they are whole vectors of neighbours, else copied.
template <class T> struct Along {
    const T* at;
    T copy[BK + kPiece / sizeof(T)];

    // ``offset`` is linear in k wherever ``inside`` holds at both ends; elsewhere it stays within the operand.
    template <class Offset, class Inside> inline __attribute__((always_inline)) void read(const void* data, int64_t k0, int nk,
        Offset offset, Inside inside) {
        const int64_t first = offset(k0), step = nk > 1 ? offset(k0 + 1) - first : 1;
        at = (const T*)data + first;
        const bool neighbours = step == 1 && inside(k0) && inside(k0 + nk - 1);
        if (neighbours && nk % (2 * W) == 0) return;  // two vectors are read at a time
        if (neighbours) memcpy(copy, at, nk * sizeof(T));
        else for (int i = 0; i < nk; i++) copy[i] = ((const T*)data)[offset(k0 + i)];
        at = copy;
    }
    // ``row`` is where the part of the place that depends on the query lies.
    inline __attribute__((always_inline)) void read(const T* row, const Runs& runs) {
        for (int i = 0; i < runs.count; i++) {
            const Runs::Run& r = runs.run[i];
            if (r.step == 0) fill_pieces(copy + r.first, row[r.at], r.length);
            else copy_pieces(copy + r.first, row + r.at, r.length);
        }
        at = copy;
    }
};
template <class T> INLINE VR along_real(const Along<T>& a, int n) { return load_as(a.at + n); }
template <class T> INLINE VI along_int(const Along<T>& a, int n) {
    VI v; for (int i = 0; i < W; i++) v[i] = I(a.at[n + i]); return v;
}
template <class T> INLINE VL along_long(const Along<T>& a, int n) {
    VL v; for (int i = 0; i < W; i++) v[i] = a.at[n + i]; return v;
}
// Behind the last key a copy may hold bytes that are no bool: they are read as bytes, and what is made of them is dropped.
template <class T> INLINE VI along_bool(const Along<T>& a, int n) {
    VI v; for (int i = 0; i < W; i++) v[i] = -I(a.at[n + i] != 0); return v;
}
INLINE VI along_bool(const Along<bool>& a, int n) {
    VI v; for (int i = 0; i < W; i++) v[i] = -I(((const unsigned char*)a.at)[n + i] != 0); return v;
}

// Where a tile's keys are found in operands that are read at a place of their own.
struct KeyRuns {
    void find(const Call& c, const BatchIndex& b, int64_t k0, int nk) {
        (void)c, (void)b, (void)k0, (void)nk;
    }
};

// Every entry is visible.
struct ScoreFull {
    const Call& c;
    const BatchIndex& b;
    const int64_t q, k0;

    inline __attribute__((always_inline)) ScoreFull(const Call& c, const BatchIndex& b, const KeyRuns& t, int64_t q,
        int64_t k0, int nk) : c(c), b(b), q(q), k0(k0) {
        ScoreFull& r = *this;
        (void)r, (void)t, (void)nk;
    }
    inline __attribute__((always_inline)) VR operator()(VR score, int n) const {
        const ScoreFull& r = *this;
        const VI k = vi(k0 + n) + lane_numbers();
        (void)r, (void)k;
        return score;
    }
};

// Some entries are masked.
struct ScorePartial {
    const Call& c;
    const BatchIndex& b;
    const int64_t q, k0;
    int64_t upper;

    inline __attribute__((always_inline)) ScorePartial(const Call& c, const BatchIndex& b, const KeyRuns& t, int64_t q,
        int64_t k0, int nk) : c(c), b(b), q(q), k0(k0) {
        ScorePartial& r = *this;
        r.upper = clamp64(upper_key(c, b, q), 0, c.kv_len);
        (void)r, (void)t, (void)nk;
    }
    inline __attribute__((always_inline)) VR operator()(VR score, int n) const {
        const ScorePartial& r = *this;
        const VI k = vi(k0 + n) + lane_numbers();
        (void)r, (void)k;
        return select((k < vi(r.upper)), score, vr(-R(INFINITY)));
    }
};
// What the matrix core leaves to the lanes core: exact rows, which need float and a running maximum, and decoding, which costs
// less than to pack the keys. Keys and values are read as they are, a tile at a time.
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
            const VR x1 = round_bf16(score);
            const VR x2 = round_bf16(x1 * vr(R(0.125)));
            const VI x3 = vi(k) <= r.q[v];
            const VR x4 = round_bf16(select(x3, vr(R(0.0)), vr(R(-3.3895313892515355e+38))));
            const VR x5 = round_bf16(x2 + x4);
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
                Bf16* to = (Bf16*)b.out + (q0 + v * W + i) * rs + e0 * cs;
                if (cs == 1 && width == W) store_as(to, x[i]);
                else for (int e = 0; e < width; e++) to[e * cs] = from_r<Bf16>(x[i][e]);
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

    struct Part { const Bf16* key; const Bf16* value; int64_t key_row, value_row; };
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
                const Bf16* row = part.key + (k0 + (k < keys ? k : 0)) * part.key_row;
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
        Bf16* const to = (Bf16*)b.out + (q0 + q) * rs;
        for (int e0 = 0; e0 < DV; e0 += W) {
            const VR x = load(w.out_rows + q * DVR + e0) * factor[0][q];
            if (cs == 1 && DV - e0 >= W) store_as(to + e0, x);
            else for (int e = e0; e < DV && e < e0 + W; e++) to[e * cs] = from_r<Bf16>(x[e - e0]);
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
            exact[v] = keep[v] & ~((m[v] * R(0.125) > R(-3.3895313892515355e+38)) & (f_abs(l[v]) < R(INFINITY)));
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

// Owned by one thread.
struct alignas(64) ExactScratch {
    LaneScratch lanes;
    R key[(BK + MR) * D], value[(BK + MR) * DVP];  // of one tile
};

// Gives tiles that are packed when they are asked for.
struct PackedTile {
    const Call& c;
    const BatchIndex& b;
    R *key, *value;

    struct Part { const R *key, *value; };
    Part part(int64_t k0) const {
        pack_rows(c, b, key, value, k0);
        return {key, value};
    }
};

// The rows q0 + i for which exact[i].
static void attend_exactly(const Call& c, const BatchIndex& b, ExactScratch& w, int64_t q0, int nq, const bool* exact) {
    const PackedTile packed = {c, b, w.key, w.value};
    for (int first = 0; first < nq; first += NV * W) {
        VI chosen[NV] = {};
        bool any = false;
        for (int i = 0; i < NV * W && first + i < nq; i++) chosen[i / W][i % W] = -I(exact[first + i]), any |= exact[first + i];
        if (any) block<NV, true>(c, b, packed, w.lanes, q0 + first, chosen);
    }
}
// Softmax with a fixed reference per row, the maximum of the first tile that it sees, where others keep a running maximum:
// the result is then touched by the matrix unit only. bfloat16 weights keep their precision up to 2^127, so that a reference
// may be far too small; rows whose sum has grown beyond kRescale are scaled down, rows that overflow are exact.
constexpr float kRescale = 0x1p30f, kOverflow = 0x1p96f;
// Scores below this, and below the mask's fill, do not make a reference: a later, visible one would overflow.
constexpr float kMasked = -9000.0;
constexpr float kUnit = R(0.125) * R(1.44269504088896341);
constexpr float kThreshold = R(-3.3895313892515355e+38) * R(1.44269504088896341);
constexpr int QUERY_COLS = 2 * PAIRS;

// Owned by one thread, for one block of queries at a time.
struct alignas(64) Scratch {
    static constexpr int kRows = BQ + Matrix::kRows;  // a last step may reach beyond
    Bf16 query[kRows * QUERY_COLS];
    float scores[2][kRows * BK];
    Bf16 weights[2][kRows * BK];   // bits of bfloat16, keys in the order of packed_key
    float out[kRows * VALUE_COLS];
    float l[kRows * W];            // sums of weights, lane by lane
    float reference[kRows];        // base 2, infinity as long as the row has seen masked entries only
    float skipped[kRows];          // largest score seen until then
    ExactScratch exact;

    float* score(int side, int row) { return scores[side] + row * BK; }
    Bf16* weight(int side, int row) { return weights[side] + row * BK; }

    void clear(int nq) {
        memset(out, 0, sizeof(float) * nq * VALUE_COLS);
        memset(l, 0, sizeof(float) * nq * W);
        for (int i = 0; i < nq; i++) reference[i] = INFINITY, skipped[i] = -INFINITY;
    }
    float sum(int row) const { return _mm512_reduce_add_ps(__m512(load(l + row * W))); }

    // Powers of two: exact.
    void rescale(int nq) {
        for (int i = 0; i < nq; i++) {
            const float now = sum(i);
            if (!(now > kRescale && now < kOverflow)) continue;
            int exponent;
            frexpf(now, &exponent);
            const float alpha = ldexpf(1, -exponent);
            reference[i] += exponent;
            store(l + i * W, load(l + i * W) * alpha);
            for (int e = 0; e < VALUE_COLS; e += W) store(out + i * VALUE_COLS + e, load(out + i * VALUE_COLS + e) * alpha);
        }
    }
};

INLINE bool too_large(VR sums) { return _mm512_cmp_ps_mask(__m512(sums), _mm512_set1_ps(kRescale / W), _CMP_NLE_UQ) != 0; }

// Bits of the bfloat16 next to 2^x in 32-bit lanes; negative for x < -127, infinity for x >= 128 and for NaN. Rounding the
// sum of exponent and mantissa to an integer rounds the mantissa, so no conversion is needed. 2^f - 1 - f on [0, 1) is
// f * (c1 + f * (c2 + f * c3)) within 1e-4, a twentieth of bfloat16's rounding.
INLINE __m512i exp2_bits(VR x) {
    x = VR(_mm512_min_ps(__m512(x), _mm512_set1_ps(128)));
    const VR f = x - VR(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    const VR p = (f * R(0.0790204) + R(0.2241268)) * f - R(0.3031471);
    return _mm512_cvtps_epi32(__m512((p * f + x) * R(128) + R(127 * 128)));
}

// Rows of one tile of scores.
struct ScoreRows {
    const Call& c;
    const BatchIndex& b;
    Scratch& w;
    const KeyRuns& runs;
    const int64_t q0, k0;
    const int nk, side;

    // Sets the reference of rows that have none. Returns whether some row still has none.
    template <class Score> __attribute__((noinline)) bool refer(int nq) const {
        bool unset = false;
        for (int i = 0; i < nq; i++) {
            if (w.reference[i] != INFINITY) continue;
            const Score score(c, b, runs, q0 + i, k0, nk);
            VR m = vr(-INFINITY);
            for (int n = 0; n < nk; n += W) m = vmax(m, within(score(load(w.score(side, i) + n), n), n));
            const float highest = _mm512_reduce_max_ps(__m512(m)) * R(0.125);
            if (highest > kMasked) {
                w.reference[i] = highest * R(1.44269504088896341);
                // What was skipped must weigh nothing; else the row overflows on purpose.
                if (!(highest > w.skipped[i] + 200)) store(w.l + i * W, vr(INFINITY));
            } else {
                w.skipped[i] = fmaxf(w.skipped[i], highest);
                unset = true;
            }
        }
        return unset;
    }

    VR within(VR score, int n) const { return vi(nk - n) > lane_numbers() ? score : vr(-INFINITY); }

    // Scores of rows from … to become weights. Returns the larger of ``most`` and their sums. TAIL: nk is no whole vectors.
    template <class Score, bool TAIL> VR weigh(int from, int to, VR most) const {
        for (int i = from; i < to; i++) {
            const Score score(c, b, runs, q0 + i, k0, nk);
            const float* scores = w.score(side, i);
            const VR reference = vr(w.reference[i]);
            VR sum = load(w.l + i * W);
#pragma GCC unroll 2
            for (int n = 0; n < nk; n += 2 * W) {
                __m512i half[2];
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const int at = n + h * W;
                    VR x = score(load(scores + at), at);
                    if (TAIL) x = within(x, at);
                    half[h] = exp2_bits(x * kUnit - reference);
                }
                const __m512i pair = _mm512_packus_epi32(half[0], half[1]);
                sum = VR(_mm512_dpbf16_ps(__m512(sum), (__m512bh)pair, (__m512bh)_mm512_set1_epi32(0x3f803f80)));
                _mm512_storeu_si512(w.weight(side, i) + n, pair);
            }
            store(w.l + i * W, sum);
            most = vmax(most, sum);
        }
        return most;
    }
};

// Queries q0 … q0 + nq of one head against every tile of keys that they may see. While the scores of tile j + 1 and the
// values of tile j - 1 go through the matrix unit, a few rows at a time, the weights of tile j go through the vector units.
struct QueryBlock {
    const Call& c;
    const BatchIndex& b;
    const Packed& packed;
    Scratch& w;
    const int64_t q0;
    const int nq;
    Matrix matrix;
    KeyRuns runs[2];  // of the tiles on both sides

    struct KeyTile {
        int64_t k0;
        int nk;      // keys
        int side;    // buffer of scores and weights
        bool full;   // no entry is masked
        int columns() const { return columns_of(nk); }
    };

    static constexpr int kValueSteps = (VALUE_COLS + Matrix::kCols - 1) / Matrix::kCols;
    static constexpr int kValueCols = round_up((VALUE_COLS + kValueSteps - 1) / kValueSteps, W);

    int row_steps() const { return (nq + Matrix::kRows - 1) / Matrix::kRows; }
    int score_steps(const KeyTile& t) const { return row_steps() * ((t.columns() + Matrix::kCols - 1) / Matrix::kCols); }
    int value_steps() const { return row_steps() * kValueSteps; }

    void score_step(const KeyTile& t, int i) {
        const int steps = (t.columns() + Matrix::kCols - 1) / Matrix::kCols, row = i / steps * Matrix::kRows,
            column = i % steps * Matrix::kCols;
        const int cols = t.columns() - column;
        matrix.step<false>(w.query + row * QUERY_COLS, QUERY_COLS, packed.key + t.k0 * PAIRS + column, BK, w.score(t.side,
            row) + column, BK,
                           nq - row, cols < Matrix::kCols ? cols : Matrix::kCols, PAIRS);
    }
    void value_step(const KeyTile& t, int i) {
        const int row = i / kValueSteps * Matrix::kRows, column = i % kValueSteps * kValueCols;
        const int cols = VALUE_COLS - column;
        matrix.step<true>(w.weight(t.side, row), BK, packed.value + t.k0 / 2 * VALUE_COLS + column, VALUE_COLS, w.out + row
            * VALUE_COLS + column,
                          VALUE_COLS, nq - row, cols < kValueCols ? cols : kValueCols, summed_of(t.nk) / 2);
    }
    void all_values(const KeyTile& t) {
        for (int i = 0; i < value_steps(); i++) value_step(t, i);
        matrix.flush();
    }
    // Rows from … to. Returns the larger of ``most`` and their sums of weights.
    VR weigh(const KeyTile& t, int from, int to, VR most) const {
        const ScoreRows rows = {c, b, w, runs[t.side], q0, t.k0, t.nk, t.side};
        if (!t.full) return rows.weigh<ScorePartial, true>(from, to, most);
        return t.nk % 32 ? rows.weigh<ScoreFull, true>(from, to, most) : rows.weigh<ScoreFull, false>(from, to, most);
    }
    bool refer(const KeyTile& t) const {
        const ScoreRows rows = {c, b, w, runs[t.side], q0, t.k0, t.nk, t.side};
        if (!t.full) return rows.refer<ScorePartial>(nq);
        return rows.refer<ScoreFull>(nq);
    }

    void load_queries() const {
        for (int i = 0; i < nq; i++) {  // what a step reads behind them makes rows that nobody reads
            Bf16* to = w.query + i * QUERY_COLS;
            const Bf16* from = b.query.data + (q0 + i) * b.query.row;
            if (b.query.column == 1) memcpy(to, from, D * sizeof(Bf16));
            else for (int d = 0; d < D; d++) to[d] = from[d * b.query.column];
            if (QUERY_COLS > D) memset(to + D, 0, (QUERY_COLS - D) * sizeof(Bf16));
        }
    }

    void attend() {
        load_queries();
        w.clear(nq);
        int64_t begin = 0, end = c.kv_len, full_begin = 0, full_end = c.kv_len;
        end = clamp64(upper_key(c, b, q0 + nq - 1), 0, c.kv_len), full_end = upper_key(c, b, q0);
        // The tile at or after k0 that some query may see; one past the last has no keys.
        const auto tile = [&](int64_t k0, int side) -> KeyTile {
            for (;; k0 += BK) {
                const int nk = int(max64(0, min64(BK, end - k0)));
                bool full = k0 >= full_begin && k0 + nk <= full_end;
                return {k0, nk, side, full};
            }
        };
        KeyTile before = {}, now = tile(begin - begin % BK, 0);
        if (now.nk == 0) return;
        runs[0].find(c, b, now.k0, now.nk);
        for (int i = 0; i < score_steps(now); i++) score_step(now, i);
        matrix.flush();
        bool pending = false, unset = true;
        for (;;) {
            if (unset) unset = refer(now);
            const KeyTile next = tile(now.k0 + BK, 1 - now.side);
            const int scores = next.nk ? score_steps(next) : 0, values = pending ? value_steps() : 0, steps = scores + values;
            if (next.nk) runs[next.side].find(c, b, next.k0, next.nk);
            VR most = VR{};
            for (int i = 0, row = 0; i < steps; i++) {
                if (i < scores) score_step(next, i);
                else value_step(before, i - scores);
                const int to = nq * (i + 1) / steps;
                most = weigh(now, row, to, most);
                row = to;
            }
            if (steps == 0) most = weigh(now, 0, nq, most);
            pending = !too_large(most);
            if (!pending) {
                all_values(now);
                w.rescale(nq);
            }
            // What the last step left in tiles is read next.
            if (values == 0) matrix.flush();
            if (!next.nk) break;
            before = now, now = next;
        }
        if (pending) all_values(now);
    }

    // Writes the rows that are done; the others are exact: in float, with a running maximum.
    void finish() const {
        bool exact[BQ] = {}, any = false;
        for (int i = 0; i < nq; i++) any |= exact[i] = !write_row(i);
        if (any) attend_exactly(c, b, w.exact, q0, nq, exact);
    }

    bool write_row(int i) const {
        const int64_t q = q0 + i;
        const float reference = w.reference[i];
        float l = w.sum(i);
        if (!(l > 0 && l < kOverflow && reference > kThreshold)) return false;
        VR zero = VR{};  // stays so unless the row has overflowed
        for (int e = 0; e < VALUE_COLS; e += W) zero += load(w.out + i * VALUE_COLS + e) * R(0);
        if (_mm512_cmp_ps_mask(__m512(zero), _mm512_setzero_ps(), _CMP_NEQ_UQ)) return false;
        if (b.lse) b.lse[q] = (reference + log2f(l)) * 0.693147180559945f;
        store_row(q, [&](int e) { return load(w.out + i * VALUE_COLS + e) * (1 / l); });
        return true;
    }

    void write_empty_row(int64_t q) const {
        if (b.lse) b.lse[q] = -INFINITY;
        store_row(q, [](int) { return vr(R(NAN)); });
    }

    template <class Row> void store_row(int64_t q, Row row) const {
        const int64_t stride = c.out_stride[3];
        Bf16* to = (Bf16*)b.out + q * c.out_stride[2];
        for (int e = 0; e < DV; e += W) {
            const VR x = row(e);
            if (stride == 1 && e + W <= DV) store_as(to + e, x);
            else for (int j = 0; j < W && e + j < DV; j++) to[(e + j) * stride] = from_r<Bf16>(x[j]);
        }
    }
};

static void queries(const Call& c, const BatchIndex& b, const Packed& packed, Scratch& w, int64_t q0) {
    const int64_t end = min64(q0 + BQ, c.q_len);
    QueryBlock block = {c, b, packed, w, q0, int(end - q0), {}, {}};
    block.attend();
    block.finish();
}
static void decode(const Call& c, const BatchIndex& b, Scratch& w) {
    queries_in<1>(c, b, InPlace{b}, w.exact.lanes, 0);
}

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
    const int64_t balanced = (8 * c.threads + blocks - 1) / blocks, cached = 1048576 / (slot_bytes + 1);
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
        printf("    operand 0 bfloat16, 1 x 8 x 512 x 64\n");
        printf("    operand 1 bfloat16, 1 x 8 x 512 x 64\n");
        printf("    operand 2 bfloat16, 1 x 8 x 512 x 64\n");
        printf("python -m fuse.alone FILE takes the sizes of your model, compares with float64 and times it beside SDPA.\n");
        return count != 2 || std::string(texts[1]) != "--help";
    }
    const std::vector<int64_t> sizes = { 1, 8, 512, 512 };  // B0, B1, q_len, kv_len
    std::vector<Tensor> operands, more;
    operands.push_back(Tensor::random<Bf16>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true));
    operands.push_back(Tensor::random<Bf16>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true));
    operands.push_back(Tensor::random<Bf16>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true));
    Tensor out = Tensor::random<Bf16>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true);
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
    sum += out.sum<Bf16>();
    printf("%s, threads = %d: %.3f ms, sum of the result %.6g\n", said, int(threads), times[times.size() / 2] * 1e3, sum);
    return 0;
}
#endif
