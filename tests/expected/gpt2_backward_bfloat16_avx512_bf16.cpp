// gradients of query, key, value, as fuse.ir.gradient has them, of
// out = sum over k of w * value,  w = prob
// softmax over k of (score * 0.125) + where(k <= q, 0, -3.38953e+38)
// visible where k <= q
// spec  {"batch":2,"empty_row":"nan","expr":{"nodes":[["Index","int64","b0"],["Index","int64","b1"],["Index","int64","q"],["Index","int64","d"],["Load","bfloat16",0,[0,1,2,3]],["Index","int64","k"],["Load","bfloat16",1,[0,1,5,3]],["Index","int64","e"],["Load","bfloat16",2,[0,1,5,7]],["Score","bfloat16"],["Const","bfloat16","0x1.0000000000000p-3"],["Apply","bfloat16","mul",[9,10]],["Apply","bool","le",[5,2]],["Const","bfloat16","0x0.0p+0"],["Const","bfloat16","-0x1.fe00000000000p+127"],["Apply","bfloat16","where",[12,13,14]],["Apply","bfloat16","add",[11,15]],["Prob","bfloat16"],["Const","int64",1],["Apply","int64","add",[18,2]]],"roots":{"key":6,"mask.predicate":12,"mask.upper":19,"mask.visible":11,"query":4,"score":16,"value":8,"weight":17}},"extra":[],"fill":"-0x1.fe00000000000p+127","normalisation":"softmax","operands":[[4,"bfloat16"],[4,"bfloat16"],[4,"bfloat16"]],"out_dtype":"bfloat16","out_order":[0,2,1,3],"qk_dim":64,"v_dim":64,"version":2}
// wanted  [true, true, true]
// plan  Plan(core='matrix', isa='avx512_bf16', real='float', width=16, vectors=12, rows=6, block_k=64, wave_bytes=1048576, thread_work=262144, part_keys=768, decode_queries=0)
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
//   Destinations     where gradients go
//   KeyPart          keys whose gradients a thread sums
//   Matrix           products of bfloat16
//   EntriesFull      edit: weight and gradient of an entry, lanes are keys
//   EntriesPartial   edit: the same where the mask hides some
//   Rows             what is known of the queries of a block
//   Tile             what functions of entries are given: queries, and some keys
//   PackedKeys       keys and values, as tiles are read
//   PackedQueries    queries and gradients of results, as tiles are read
//   QueryBlock       a block of queries against its keys, by matrix products
//   Backward         how the gradients are shared by the threads
//   fuse_attention   the entry
#define FUSE_WIDTH 16
#define FUSE_DOUBLE 0
typedef float R;
constexpr int W = FUSE_WIDTH;   // lanes of a vector
constexpr int BQ = 12 * W;   // queries of a block
constexpr int BK = 64;   // keys of a tile
constexpr int PART = 768;   // keys of a part: one thread at a time adds to their gradients
constexpr int D = 64, DV = 64;
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
    const int64_t x11 = 1 + q;
    return x11;
}
// Where gradients go. The arguments of forward are followed by the gradient of the log-sum-exp, which may be null, that of the
// result, its strides, and each sink's
// address and strides.
struct Destinations {
    const Lse* grad_lse;
    const char* grad_out;
    const int64_t* grad_stride;
    void* data[3];
    const int64_t* stride[3];

    explicit Destinations(const int64_t* a) {
        a += 38;
        grad_lse = (const Lse*)*a++;
        grad_out = (const char*)*a++, grad_stride = a, a += 4;
        data[0] = (void*)*a++, stride[0] = a, a += 4;
        data[1] = (void*)*a++, stride[1] = a, a += 4;
        data[2] = (void*)*a++, stride[2] = a, a += 4;
    }
};

static int64_t query_place(const Call& c, const Destinations& t, const BatchIndex& b, int64_t q, int64_t d) {
    return b.b0 * t.stride[0][0] + b.b1 * t.stride[0][1] + q * t.stride[0][2] + d * t.stride[0][3];
}

static int64_t key_place(const Call& c, const Destinations& t, const BatchIndex& b, int64_t k, int64_t d) {
    return b.b0 * t.stride[1][0] + b.b1 * t.stride[1][1] + k * t.stride[1][2] + d * t.stride[1][3];
}

static int64_t value_place(const Call& c, const Destinations& t, const BatchIndex& b, int64_t k, int64_t e) {
    return b.b0 * t.stride[2][0] + b.b1 * t.stride[2][1] + k * t.stride[2][2] + e * t.stride[2][3];
}

template <class T> struct Target { T* data; int64_t row, column; };

// One batch index: what it reads beside its operands, and where its gradients go.
struct Goal {
    View<Bf16> out, grad_out;
    const Lse* grad_lse;
    Target<Bf16> query;
    Target<Bf16> key;
    Target<Bf16> value;
};

static Goal make_goal(const Call& c, const Destinations& t, const BatchIndex& b) {
    Goal g;
    int64_t grad = 0;
    grad += b.b0 * t.grad_stride[0];
    grad += b.b1 * t.grad_stride[1];
    g.out = {(const Bf16*)b.out, c.out_stride[2], c.out_stride[3]};
    g.grad_lse = t.grad_lse ? t.grad_lse + (b.lse - c.lse) : nullptr;
    g.grad_out = {(const Bf16*)t.grad_out + grad, t.grad_stride[2], t.grad_stride[3]};
    {
        const int64_t base = query_place(c, t, b, 0, 0);
        g.query = {(Bf16*)t.data[0] + base, query_place(c, t, b, 1, 0) - base, query_place(c, t, b, 0, 1) - base};
    }
    {
        const int64_t base = key_place(c, t, b, 0, 0);
        g.key = {(Bf16*)t.data[1] + base, key_place(c, t, b, 1, 0) - base, key_place(c, t, b, 0, 1) - base};
    }
    {
        const int64_t base = value_place(c, t, b, 0, 0);
        g.value = {(Bf16*)t.data[2] + base, value_place(c, t, b, 1, 0) - base, value_place(c, t, b, 0, 1) - base};
    }
    return g;
}

// What the entries of a part of the keys add to tensors that are read beside query, key and value.
struct Shares {
};

// One part of the keys, first … last, of one batch index, and where gradients go.
struct KeyPart {
    const Call& c;
    const Destinations& t;
    const BatchIndex& b;
    const Goal& goal;
    const Shares& shares;
    int64_t first, last;
};

// Sum over the features of a row of the result and of its gradient, less the gradient of the row's log-sum-exp.
static R row_delta(const Goal& g, int64_t q) {
    const auto *out = g.out.data + q * g.out.row, *grad = g.grad_out.data + q * g.grad_out.row;
    VR sums = {};
    R sum = 0;
    int e = 0;
    for (; g.out.column == 1 && g.grad_out.column == 1 && e + W <= DV; e += W) sums += load_as(out + e) * load_as(grad + e);
    for (int i = 0; i < W; i++) sum += sums[i];
    for (; e < DV; e++) sum += to_r(out[e * g.out.column]) * to_r(grad[e * g.grad_out.column]);
    return g.grad_lse ? sum - R(g.grad_lse[q]) : sum;
}

// Rows whose probabilities cannot be told from their log-sum-exp: all or nearly all of their entries are masked, or it is so
// large that it has too few digits.
INLINE bool needs_exact(Lse lse) { return lse <= Lse(-1000.0) || (lse >= Lse(1000.0) && lse < Lse(INFINITY)); }

// Such rows among the W from q0 on, of which there is at least one.
static bool find_exact(const Call& c, const BatchIndex& b, int64_t q0, VI& chosen) {
    chosen = VI{};
    bool any = false;
    for (int i = 0; i < W && q0 + i < c.q_len; i++)
        if (needs_exact(b.lse[q0 + i])) chosen[i] = -1, any = true;
    return any;
}

// The log-sum-exp of a row; infinite, so that its probabilities vanish, where they are computed exactly.
INLINE Lse row_lse(const BatchIndex& b, int64_t q) { return needs_exact(b.lse[q]) ? Lse(INFINITY) : b.lse[q]; }

// Rows of gradients, times ``scale``.
template <int COLUMNS, class T> static void write_rows(const Target<T>& to, const R* from, int width, int64_t first,
    int64_t last, R scale) {
    for (int64_t k = first; k < last; k++, from += COLUMNS) {
        T* row = to.data + k * to.row;
        int e = 0;
        for (; to.column == 1 && e + W <= width; e += W) store_as(row + e, load(from + e) * scale);
        for (; e < width; e++) row[e * to.column] = from_r<T>(from[e] * scale);
    }
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
// What happens to an entry between the products, as lanes of keys: see backward_score.h.jinja.
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

// 2^x, zero for x = -infinity; within 1e-4, a twentieth of bfloat16's rounding.
INLINE VR exp2_near(VR x) {
    const VR n = VR(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    const VR f = x - n;
    const VR p = ((f * R(0.0790204) + R(0.2241268)) * f + R(0.6968529)) * f + R(1);
    return VR(_mm512_scalef_ps(__m512(p), __m512(n)));
}

// Every entry is visible.
struct EntriesFull {
    const Call& c;
    const BatchIndex& b;
    const int64_t q, k0;

    inline __attribute__((always_inline)) EntriesFull(const Call& c, const BatchIndex& b, const KeyRuns& t, int64_t q,
        int64_t k0, int nk) : c(c), b(b), q(q), k0(k0) {
        EntriesFull& r = *this;
        (void)r, (void)t, (void)nk;
    }
    // ``score`` becomes the weight, ``d_weight`` the gradient of the raw score, for the keys k0 + n … k0 + n + W;
    // ``lse`` is in base 2.
    inline __attribute__((always_inline)) void operator()(VR& score_, VR& d_weight_, VR lse, VR delta, int n) const {
        const EntriesFull& r = *this;
        const VI k = vi(k0 + n) + lane_numbers();
        const VR score = score_, d_weight = d_weight_;
        const VR unmasked = exp2_near(score * (R(0.125) * R(1.44269504088896341)) - lse);
        const VR prob = unmasked;
        const VR d_score = prob * (d_weight - delta);
        score_ = prob;
        d_weight_ = d_score;
        (void)r, (void)k, (void)d_weight, (void)d_score;
    }
};

// Some entries are masked.
struct EntriesPartial {
    const Call& c;
    const BatchIndex& b;
    const int64_t q, k0;
    int64_t upper;

    inline __attribute__((always_inline)) EntriesPartial(const Call& c, const BatchIndex& b, const KeyRuns& t, int64_t q,
        int64_t k0, int nk) : c(c), b(b), q(q), k0(k0) {
        EntriesPartial& r = *this;
        r.upper = clamp64(upper_key(c, b, q), 0, c.kv_len);
        (void)r, (void)t, (void)nk;
    }
    // ``score`` becomes the weight, ``d_weight`` the gradient of the raw score, for the keys k0 + n … k0 + n + W;
    // ``lse`` is in base 2.
    inline __attribute__((always_inline)) void operator()(VR& score_, VR& d_weight_, VR lse, VR delta, int n) const {
        const EntriesPartial& r = *this;
        const VI k = vi(k0 + n) + lane_numbers();
        const VR score = score_, d_weight = d_weight_;
        const VR unmasked = exp2_near(score * (R(0.125) * R(1.44269504088896341)) - lse);
        const auto seen = (k < vi(r.upper));
        const VR prob = select(seen, unmasked, VR{});
        const VR d_score = prob * (d_weight - delta);
        score_ = prob;
        d_weight_ = d_score;
        (void)r, (void)k, (void)d_weight, (void)d_score;
    }
};

// Features as pairs, as rows of a step, and as columns.
constexpr int DPAIRS = round_up(D, Matrix::kDepth) / 2, EPAIRS = round_up(DV, Matrix::kDepth) / 2;
constexpr int DROWS = round_up(D, Matrix::kRows), EROWS = round_up(DV, Matrix::kRows);
constexpr int DC = round_up(D, W), EC = round_up(DV, W);
static_assert(BQ % Matrix::kRows == 0 && Matrix::kRows % Matrix::kDepth == 0 && BK % 32 == 0, "blocks are whole steps");
static_assert(Matrix::kRows <= 2 * W, "a step has at most a vector of queries behind the last one");

// Exact rows take the lanes core, in float: keys and values are packed a tile at a time.
constexpr int NV = 1, MR = 8, DP = round_up(D, MR);
// The products of lanes in backward. Sums over one tile are added up before they are added to what is there: their rounding
// errors then grow with the length of a tile.

// c[M x N*W] = (ADD ? c : 0) + a[M x length] * b[length x N*W]; element (i, j) of a lies at i * RS + j * CS.
template <int M, int N, int LDC, int RS, int CS, int LDB, bool ADD>
static __attribute__((noinline)) void product(R* c, const R* a, const R* b, int length) {
    VR sum[M][N];
#pragma GCC unroll 32
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) sum[i][v] = VR{};
#pragma GCC unroll 2
    for (int j = 0; j < length; j++) {
        VR column[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) column[v] = load(b + j * LDB + v * W);
#pragma GCC unroll 32
        for (int i = 0; i < M; i++)
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sum[i][v] += a[i * RS + j * CS] * column[v];
    }
#pragma GCC unroll 32
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) store(c + i * LDC + v * W, ADD ? load(c + i * LDC + v * W) + sum[i][v] : sum[i][v]);
}

// Registers hold MR * NV sums, in any shape; rows are computed in steps of at most SLACK, which reach beyond the last.
constexpr int SLACK = 12, WIDE = MR * NV >= 24 ? 4 : NV;

// c[rows x COLUMNS] += a[rows x length] * b[length x COLUMNS], rows of a RS apart.
template <int COLUMNS, int RS, int LEFT = COLUMNS> static void add_product(R* c, const R* a, const R* b, int rows, int length) {
    constexpr int VECTORS = LEFT / W, CALLS = (VECTORS + WIDE - 1) / WIDE, N = (VECTORS + CALLS - 1) / CALLS;
    constexpr int M = N == 4 ? MR * NV / 4 : N == 3 ? MR * NV / 3 : N == 2 ? MR * NV / 2 : SLACK;
    for (int i = 0; i < rows; i += M) product<M, N, COLUMNS, RS, 1, COLUMNS, true>(c + i * COLUMNS, a + i * RS, b, length);
    if constexpr (LEFT > N * W) add_product<COLUMNS, RS, LEFT - N * W>(c + N * W, a, b + N * W, rows, length);
}
// Lanes of queries in backward: the products of one tile, and exact rows, which are computed from all keys.

// Some queries, and the gradients of their results: as lanes, and as rows.
template <int QUERIES> struct Block {
    R query[D * QUERIES], grad[DV * QUERIES];            // [D][lanes], [DV][lanes]
    R query_rows[QUERIES * DC], grad_rows[QUERIES * EC];  // [queries][DC], [queries][EC]
};

// Owned by one thread.
struct alignas(64) LaneScratch {
    R scores[(BK + SLACK) * NV * W], grads[(BK + SLACK) * NV * W];  // [BK + SLACK][lanes], see backward_score.h.jinja
    R key[(PART + SLACK) * DC], value[(PART + SLACK) * EC];         // gradients of a part of the keys
    Block<W> one;          // a vector of queries with exact rows
    R one_result[DP * W];  // [DP][W]
};

// What happens to an entry between the products: its probability is computed anew from the score and its row's log-sum-exp.
//   scores  the raw score, replaced by the weight
//   grads   the gradient of the weight, replaced by that of the raw score, but for the factor 0.125
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

// What is known about the rows of a block: an entry's probability is exp(score - lse) * inverse. EXACT rows are not
// normalised by their log-sum-exp, which has lost precision there.
template <int N> struct Norm {
    VR lse[N];      // near the log-sum-exp. EXACT: the largest score
    VR delta[N];    // sum over the features of gradient and result
    VR inverse[N];  // what lse leaves of the log-sum-exp. EXACT: one over the sum of weights
    VI chosen[N];   // EXACT: rows that are
};

// Adds a run of a tile's keys for a vector of queries, whose rows begin at ``row``.
INLINE void add_run(R* const (&row)[W], const Runs::Run& run, const R* tile, int ld, int lanes) {
    if (run.step == 0 || run.length == 1) {
        VR sum = {};
        for (int k = 0; k < run.length; k++) sum += load(tile + k * ld);
        for (int i = 0; i < lanes; i++) row[i][run.at] += sum[i];
        return;
    }
    int k = 0;
    for (; k + W <= run.length; k += W) {
        VR x[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) x[i] = load(tile + (k + i) * ld);
        transpose(x);
        for (int i = 0; i < lanes; i++) store(row[i] + run.at + k, load(row[i] + run.at + k) + x[i]);
    }
    for (; k < run.length; k++)
        for (int i = 0; i < lanes; i++) row[i][run.at + k] += tile[k * ld + i];
}

// Adds a tile [keys][lanes] of queries where ``index`` says. It is a part of the query plus a part of the key wherever
// ``inside`` holds at the corners.
template <class Index, class Inside>
static void add_tile(R* to, Index index, Inside inside, const R* tile, int ld, int64_t q0, int nq, int64_t k0, int nk) {
    const int64_t q1 = q0 + nq - 1, k1 = k0 + nk - 1, first = index(q0, k0);
    if (!(inside(q0, k0) && inside(q0, k1) && inside(q1, k0) && inside(q1, k1))) {
        for (int k = 0; k < nk; k++)
            for (int q = 0; q < nq; q++) to[index(q0 + q, k0 + k)] += tile[k * ld + q];
        return;
    }
    Runs runs;
    runs.find(k0, nk, [&](int64_t k) { return index(q0, k) - first; });
    for (int q = 0; q < nq; q += W) {
        const int lanes = nq - q < W ? nq - q : W;
        R* row[W];
        for (int i = 0; i < lanes; i++) row[i] = to + index(q0 + q + i, k0);
        for (int i = 0; i < runs.count; i++) add_run(row, runs.run[i], tile + runs.run[i].first * ld + q, ld, lanes);
    }
}

// Sums over the keys, one for each row.
template <int N> struct Sums {
};

// Scores only.
template <int N> static void scores_exact(const Tile<N>& tile) {
    const Call& c = tile.c;
    const BatchIndex& b = tile.b;
    const Rows<N>& r = tile.r;
    LaneScratch& w = tile.w;
    const int64_t q0 = tile.q0, k0 = tile.k0;
    const int nq = tile.nq, nk = tile.nk;


    for (int i = 0; i < nk; i++) {
        const int64_t k = k0 + i;
        for (int v = 0; v < N; v++) {
            const VR score = load(w.scores + (i * N + v) * W);
            const VR x1 = round_bf16(score);
            const VR x2 = round_bf16(x1 * vr(R(0.125)));
            const VI x3 = vi(k) <= r.q[v];
            const VR x4 = round_bf16(select(x3, vr(R(0.0)), vr(R(-3.3895313892515355e+38))));
            const VR x5 = round_bf16(x2 + x4);
            store(w.scores + (i * N + v) * W, x5);
        }
    }
}

// Rows that are normalised again, from every key.
template <int N>
static void entries_exact(const Tile<N>& tile, const KeyPart& part, const Norm<N>& norm, Sums<N>& sums) {
    const Call& c = tile.c;
    const BatchIndex& b = tile.b;
    const Rows<N>& r = tile.r;
    LaneScratch& w = tile.w;
    const int64_t q0 = tile.q0, k0 = tile.k0;
    const int nq = tile.nq, nk = tile.nk;

    const Destinations& t = part.t;
    const Shares& shares = part.shares;

    for (int i = 0; i < nk; i++) {
        const int64_t k = k0 + i;
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) {
            const VR score = load(w.scores + (i * N + v) * W);
            const VR lse = norm.lse[v];
            const VR d_weight = load(w.grads + (i * N + v) * W);
            const VR x6 = round_bf16(score);
            const VR x7 = round_bf16(x6 * vr(R(0.125)));
            const VI x8 = vi(k) <= r.q[v];
            const VR x9 = round_bf16(select(x8, vr(R(0.0)), vr(R(-3.3895313892515355e+38))));
            const VR x10 = round_bf16(x7 + x9);
            const VR weighed = exp2_lanes((x10 - lse) * R(1.44269504088896341)) * norm.inverse[v];
            const VR prob = select(norm.chosen[v], weighed, VR{});
            store(w.scores + (i * N + v) * W, prob);
            const VR d_score = prob * (d_weight - norm.delta[v]);
            store(w.grads + (i * N + v) * W, select(vr(R(0.125)) == R(0), VR{}, d_score * vr(R(0.125)) * R(8.0)));
        }
    }
}

INLINE int lanes_of(int nq) { return (nq + W - 1) / W * W; }

// Rows [nq][COLUMNS] and lanes [WIDTH][lanes] of a matrix, zeros where it ends.
template <int WIDTH, int COLUMNS, class T> static void pack_rows_and_lanes(R* rows, R* lanes, const View<T>& from, int64_t q0,
    int nq) {
    const T* data = from.data + q0 * from.row;
    const int ld = lanes_of(nq);
    copy_rows(rows, COLUMNS, data, from.row, from.column, nq, WIDTH);
    for (int i = 0; COLUMNS > WIDTH && i < nq; i++) memset(rows + i * COLUMNS + WIDTH, 0, sizeof(R) * (COLUMNS - WIDTH));
    copy_transposed(lanes, ld, data, from.row, from.column, nq, WIDTH);
    for (int d = 0; d < WIDTH; d++)
        for (int i = nq; i < ld; i++) lanes[d * ld + i] = 0;
}

template <int N> static void add_sums(const KeyPart& part, const Sums<N>& sums, int64_t q0, int nq) {
}

// Products of nk keys' rows with lanes of queries, summed as forward sums scores: half of the features at a time.
template <int N, int WIDTH> static void products(R* to, const R* rows, const R* lanes, int nk) {
    constexpr int L = N * W, TERMS = WIDTH > 128 ? 64 : (WIDTH + 1) / 2;
    for (int d = 0; d < WIDTH; d += TERMS) {
        const int terms = WIDTH - d < TERMS ? WIDTH - d : TERMS;
        for (int i = 0; i < nk; i += MR) {
            if (d == 0) product<MR, N, L, WIDTH, 1, L, false>(to + i * L, rows + i * WIDTH, lanes, terms);
            else product<MR, N, L, WIDTH, 1, L, true>(to + i * L, rows + i * WIDTH + d, lanes + d * L, terms);
        }
    }
}

// Keys and values of one tile, and their gradients.
struct KeyRows {
    const R *key, *value;
    R *d_key, *d_value;
};

// The products of one tile, around ``entries``.
template <int N, int QUERIES, class Entries>
static void tile_products(const KeyRows& keys, const Block<QUERIES>& block, LaneScratch& w, R* d_query, int nq, int nk,
                          Entries entries) {
    constexpr int L = N * W;
    products<N, D>(w.scores, keys.key, block.query, nk);
    products<N, DV>(w.grads, keys.value, block.grad, nk);
    entries();
    if (nk < BK || BK % (2 * SLACK)) {  // what the last step adds beyond the tile's keys must be nothing
        memset(w.scores + nk * L, 0, sizeof(R) * SLACK * L);
        memset(w.grads + nk * L, 0, sizeof(R) * SLACK * L);
    }
    for (int d = 0; d < D; d += MR) product<MR, N, L, 1, D, L, true>(d_query + d * L, keys.key + d, w.grads, nk);
    add_product<EC, L>(keys.d_value, w.scores, block.grad_rows, nk, nq);
    add_product<DC, L>(keys.d_key, w.grads, block.query_rows, nk, nq);
}

// The rows q0 + i of one vector for which ``chosen``, against all keys for their sums and then against those of the part.
// ``keys`` gives tiles of keys and values; what the rows add to the gradients of query, key and value is in the scratch.
template <class Keys>
static void attend_exactly(const KeyPart& part, const Keys& keys, LaneScratch& w, int64_t q0, VR delta, VI chosen) {
    const Call& c = part.c;
    const BatchIndex& b = part.b;
    const int64_t first = part.first, last = part.last;
    const int nq = int(min64(W, c.q_len - q0));
    pack_rows_and_lanes<D, DC>(w.one.query_rows, w.one.query, b.query, q0, nq);
    pack_rows_and_lanes<DV, EC>(w.one.grad_rows, w.one.grad, part.goal.grad_out, q0, nq);
    const Rows<1> r = make_rows<1>(c, b, q0);
    Norm<1> norm = {};
    norm.lse[0] = vr(-R(INFINITY)), norm.delta[0] = delta, norm.chosen[0] = chosen;
    VR sum = {};
    for (int pass = 0; pass < 2; pass++)
        for (int64_t k0 = 0; k0 < c.kv_len; k0 += BK) {
            const int nk = int(min64(BK, c.kv_len - k0));
            products<1, D>(w.scores, keys.part(k0).key, w.one.query, nk);
            scores_exact<1>({c, b, r, w, q0, nq, k0, nk});
            for (int i = 0; i < nk; i++) {
                if (pass == 0) norm.lse[0] = vmax(load(w.scores + i * W), norm.lse[0]);
                else sum += exp2_lanes((load(w.scores + i * W) - norm.lse[0]) * R(1.44269504088896341));
            }
        }
    norm.inverse[0] = R(1) / sum;
    Sums<1> sums;
    memset(w.one_result, 0, sizeof(R) * DP * W);
    for (int64_t k0 = first; k0 < last; k0 += BK) {
        const int nk = int(min64(BK, last - k0));
        const auto packed = keys.part(k0);
        const KeyRows rows_of_keys = {packed.key, packed.value, w.key + (k0 - first) * DC, w.value + (k0 - first) * EC};
        tile_products<1>(rows_of_keys, w.one, w, w.one_result, nq, nk,
                         [&] { entries_exact<1>({c, b, r, w, q0, nq, k0, nk}, part, norm, sums); });
    }
    add_sums<1>(part, sums, q0, nq);
}

// Owned by one thread.
struct alignas(64) ExactScratch {
    LaneScratch lanes;
    R key[(BK + SLACK) * D], value[(BK + SLACK) * DV];  // of one tile
};

struct PackedTile {
    const Call& c;
    const BatchIndex& b;
    R *key, *value;

    struct Part { const R *key, *value; };
    Part part(int64_t k0) const {
        const int64_t n = min64(BK, c.kv_len - k0);
        copy_rows(key, D, b.key.data + k0 * b.key.row, b.key.row, b.key.column, n, D);
        copy_rows(value, DV, b.value.data + k0 * b.value.row, b.value.row, b.value.column, n, DV);
        return {key, value};
    }
};

// Keys and values, tile by tile: pairs of features for the products with queries and gradients, pairs of keys for the
// gradients of queries.
struct KeyTile {
    uint32_t key[DPAIRS * BK], value[EPAIRS * BK], key_pairs[BK / 2 * DC];  // [DPAIRS][BK], [EPAIRS][BK], [BK / 2][DC]
};
struct PackedKeys {
    KeyTile* tiles;

    static int64_t bytes(const Call& c) { return (c.kv_len + BK - 1) / BK * int64_t(sizeof(KeyTile)); }
    PackedKeys(const Call&, char* p) : tiles((KeyTile*)p) {}
    KeyTile& tile(int64_t k0) const { return tiles[k0 / BK]; }
};

static void pack_keys(const Call& c, const BatchIndex& b, char* memory, int64_t k0) {
    KeyTile& p = PackedKeys(c, memory).tile(k0);
    const int n = int(min64(BK, c.kv_len - k0)), columns = columns_of(n);
    const Bf16 *key = b.key.data + k0 * b.key.row, *value = b.value.data + k0 * b.value.row;
    pack_column_pairs<D, DPAIRS>(p.key, BK, key, b.key.row, b.key.column, n, columns);
    pack_column_pairs<DV, EPAIRS>(p.value, BK, value, b.value.row, b.value.column, n, columns);
    for (int k = 0; k < summed_of(n); k += 2)
        for (int d = 0; d < DC; d += W) {
            const Bf16* low = key + k * b.key.row + d * b.key.column;
            interleave_rows(p.key_pairs + k / 2 * DC + d, k < n ? low : nullptr, k + 1 < n ? low + b.key.row : nullptr,
                b.key.column, D - d);
        }
}

// A block of queries and the gradients of their results: as rows, and transposed.
struct PackedQueries {
    Bf16 query[BQ * 2 * DPAIRS], grad[BQ * 2 * EPAIRS];        // [BQ][2 * DPAIRS], [BQ][2 * EPAIRS]
    Bf16 query_lanes[DROWS * BQ], grad_lanes[EROWS * BQ];  // [DROWS][BQ], [EROWS][BQ]
    R lse[BQ], delta[BQ]; // of each row; lse in base 2

    static int64_t bytes(const Call& c) { return (c.q_len + BQ - 1) / BQ * int64_t(sizeof(PackedQueries)); }
    static PackedQueries& at(char* p, int64_t q0) { return ((PackedQueries*)p)[q0 / BQ]; }
};

// Of nq queries: whole steps and whole vectors of them, as what is summed over. What lies behind is not read.
static int filled(int nq) {
    return round_up(nq, Matrix::kRows) > round_up(nq, W) ? round_up(nq, Matrix::kRows) : round_up(nq, W);
}

// lanes [ROWS][BQ] of nq rows, zeros beyond, and rows [BQ][2 * PAIRS], of which a step makes results that nobody reads beyond.
template <int WIDTH, int PAIRS, int ROWS> static void pack_both(Bf16* rows, Bf16* lanes, const View<Bf16>& view, int64_t q0,
    int nq) {
    const Bf16* from = view.data + q0 * view.row;
    const int vectors = round_up(nq, W);
    memset(rows + nq * 2 * PAIRS, 0, sizeof(Bf16) * (vectors - nq) * 2 * PAIRS);
    for (int i = 0; i < nq; i++) {
        memset(rows + i * 2 * PAIRS + WIDTH, 0, sizeof(Bf16) * (2 * PAIRS - WIDTH));
        if (view.column == 1) memcpy(rows + i * 2 * PAIRS, from + i * view.row, sizeof(Bf16) * WIDTH);
        else for (int d = 0; d < WIDTH; d++) rows[i * 2 * PAIRS + d] = from[i * view.row + d * view.column];
    }
    clear_rows(lanes + WIDTH * BQ, ROWS - WIDTH, BQ, filled(nq));
    uint32_t pairs[PAIRS * W];
    for (int q = 0; q < nq; q += W) {
        pack_rows_of_pairs<2 * PAIRS, PAIRS>(pairs, W, rows + q * 2 * PAIRS, 2 * PAIRS, W);
        const bool half = q + W == vectors && vectors < filled(nq);  // of a step: the rest of it is zeros
        for (int d = 0; d < WIDTH; d++) {
            const __m512i pair = _mm512_loadu_si512(pairs + d / 2 * W);
            Bf16* to = lanes + d * BQ + q;
            _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(d % 2 ? _mm512_srli_epi32(pair, 16) : pair));
            if (half) _mm256_storeu_si256((__m256i*)(to + W), _mm256_setzero_si256());
        }
    }
}

static void pack_queries(const Call& c, const BatchIndex& b, const Goal& goal, char* memory, int64_t q0) {
    PackedQueries& packed = PackedQueries::at(memory, q0);
    const int nq = int(min64(BQ, c.q_len - q0));
    pack_both<D, DPAIRS, DROWS>(packed.query, packed.query_lanes, b.query, q0, nq);
    pack_both<DV, EPAIRS, EROWS>(packed.grad, packed.grad_lanes, goal.grad_out, q0, nq);
    for (int i = 0; i < BQ; i++) {
        packed.delta[i] = i < nq ? row_delta(goal, q0 + i) : R(0);
        packed.lse[i] = i < nq ? row_lse(b, q0 + i) * R(1.44269504088896341) : R(INFINITY);
    }
}

// What a part of the keys adds to the gradients of a head's queries: [BQ][DC] for each block.
struct QueryGradients {
    static int64_t bytes(const Call& c) { return (c.q_len + BQ - 1) / BQ * BQ * DC * sizeof(R); }
    static R* block(char* p, int64_t q0) { return (R*)p + q0 * DC; }
};

// Owned by one thread.
struct alignas(64) Scratch {
    R scores[2][Matrix::kRows * BK], grads[2][Matrix::kRows * BK];  // raw scores and gradients of weights, of rows in turn
    uint32_t weights[BQ / 2 * BK], grad_pairs[BQ / 2 * BK];         // [BQ / 2][BK]: pairs of rows
    Bf16 grad_rows[BQ * BK];                                        // [BQ][BK]
    R key[PART * DROWS], value[PART * EROWS];  // [DROWS][BK], [EROWS][BK] for each tile of the part: gradients, transposed
    R rows[BK * (DC > EC ? DC : EC)];
    ExactScratch exact;
};

// A block of queries against tiles of keys.
struct QueryBlock {
    const Call& c;
    const BatchIndex& b;
    const PackedQueries& packed;
    Scratch& w;
    R* d_query;
    const int64_t q0;
    const int nq;
    Matrix matrix;
    KeyRuns runs;

    static constexpr int kSteps = (DC + Matrix::kCols - 1) / Matrix::kCols, kCols = round_up((DC + kSteps - 1) / kSteps, W);

    // c[rows, columns] (+)= a * b, step by step.
    template <bool ADD, int STEP> void multiply(const Bf16* a, int lda, const uint32_t* b, int ldb, R* to, int ldc, int rows,
        int columns, int pairs) {
        for (int i = 0; i < rows; i += Matrix::kRows)
            for (int j = 0; j < columns; j += STEP)
                matrix.step<ADD>(a + i * lda, lda, b + j, ldb, to + i * ldc + j, ldc, rows - i, columns - j < STEP ? columns
                    - j : STEP, pairs);
    }
    // Raw scores and gradients of weights of the rows i … end, of which a step takes the first.
    void score_step(const KeyTile& keys, int i, int end, int side, int columns) {
        const int rows = end - i < Matrix::kRows ? end - i : Matrix::kRows;
        multiply<false, Matrix::kCols>(packed.query + i * 2 * DPAIRS, 2 * DPAIRS, keys.key, BK, w.scores[side], BK, rows,
            columns, DPAIRS);
        multiply<false, Matrix::kCols>(packed.grad + i * 2 * EPAIRS, 2 * EPAIRS, keys.value, BK, w.grads[side], BK, rows,
            columns, EPAIRS);
    }

    // Rows first + i and first + i + 1, rounded, as rows and as pairs.
    template <class Entries, bool TAIL> void entries(int side, int first, int last, int64_t k0, int nk) const {
        __m512i low, high;
        for (int i = 0; i < 32; i++) ((uint16_t*)&low)[i] = i / 2 + i % 2 * 32, ((uint16_t*)&high)[i] = 16 + i / 2 + i % 2 * 32;
        const int end = last - first < Matrix::kRows ? last - first : Matrix::kRows;
        for (int i = 0; i < end; i += 2) {
            const int q = first + i;
            const Entries row[2] = { {c, b, runs, q0 + q, k0, nk}, {c, b, runs, min64(q0 + q + 1, c.q_len - 1), k0, nk} };
            for (int n = 0; n < nk; n += 32) {
                __m512i weight[2], grad[2];
#pragma GCC unroll 2
                for (int r = 0; r < 2; r++) {
                    VR x[2], y[2];
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        const int at = n + h * W;
                        x[h] = load(w.scores[side] + (i + r) * BK + at), y[h] = load(w.grads[side] + (i + r) * BK + at);
                        row[r](x[h], y[h], vr(packed.lse[q + r]), vr(packed.delta[q + r]), at);
                        if (TAIL) {
                            const VI inside = vi(nk - at) > lane_numbers();
                            x[h] = inside ? x[h] : VR{}, y[h] = inside ? y[h] : VR{};
                        }
                    }
                    weight[r] = (__m512i)_mm512_cvtne2ps_pbh(__m512(x[1]), __m512(x[0]));
                    grad[r] = (__m512i)_mm512_cvtne2ps_pbh(__m512(y[1]), __m512(y[0]));
                }
                if (q + 1 == last) weight[1] = grad[1] = _mm512_setzero_si512();
                uint32_t *to_weight = w.weights + q / 2 * BK + n, *to_grad = w.grad_pairs + q / 2 * BK + n;
                _mm512_storeu_si512(to_weight, _mm512_permutex2var_epi16(weight[0], low, weight[1]));
                _mm512_storeu_si512(to_weight + W, _mm512_permutex2var_epi16(weight[0], high, weight[1]));
                _mm512_storeu_si512(to_grad, _mm512_permutex2var_epi16(grad[0], low, grad[1]));
                _mm512_storeu_si512(to_grad + W, _mm512_permutex2var_epi16(grad[0], high, grad[1]));
                _mm512_storeu_si512(w.grad_rows + q * BK + n, grad[0]);
                _mm512_storeu_si512(w.grad_rows + (q + 1) * BK + n, grad[1]);
            }
        }
    }

    // The rows from … to, the first of which is a whole number of steps along the rows.
    template <class Entries> void tile(const KeyTile& keys, R* d_key, R* d_value, int from, int to, int64_t k0, int nk) {
        const int columns = columns_of(nk);
        runs.find(c, b, k0, nk);
        score_step(keys, from, to, 0, columns);
        matrix.flush();
        for (int i = from, side = 0; i < to; i += Matrix::kRows, side = 1 - side) {
            if (i + Matrix::kRows < to) score_step(keys, i + Matrix::kRows, to, 1 - side, columns);
            if (nk % 32) entries<Entries, true>(side, i, to, k0, nk);
            else entries<Entries, false>(side, i, to, k0, nk);
            matrix.flush();
        }
        const int first = from / 2, pairs = (to + 1) / 2, last = round_up(to, Matrix::kDepth) / 2;
        memset(w.weights + pairs * BK, 0, sizeof(uint32_t) * (last - pairs) * BK);
        memset(w.grad_pairs + pairs * BK, 0, sizeof(uint32_t) * (last - pairs) * BK);
        multiply<true, Matrix::kCols>(packed.grad_lanes + from, BQ, w.weights + first * BK, BK, d_value, BK, DV, columns,
            last - first);
        multiply<true, Matrix::kCols>(packed.query_lanes + from, BQ, w.grad_pairs + first * BK, BK, d_key, BK, D, columns,
            last - first);
        multiply<true, kCols>(w.grad_rows + from * BK, BK, keys.key_pairs, DC, d_query + from * DC, DC, to - from, DC,
            summed_of(nk) / 2);
        matrix.flush();
    }
};

// Adds what attend_exactly has found, and clears it.
static void add_exact(LaneScratch& r, Scratch& w, R* d_query, int rows, int keys) {
    for (int i = 0; i < rows; i++)
        for (int d = 0; d < D; d++) d_query[i * DC + d] += r.one_result[d * W + i];
    for (int k = 0; k < keys; k++) {
        R *key = w.key + k / BK * BK * DROWS + k % BK, *value = w.value + k / BK * BK * EROWS + k % BK;
        for (int d = 0; d < D; d++) key[d * BK] += r.key[k * DC + d];
        for (int e = 0; e < DV; e++) value[e * BK] += r.value[k * EC + e];
    }
    memset(r.key, 0, sizeof(R) * keys * DC);
    memset(r.value, 0, sizeof(R) * keys * EC);
}


// The first of n rows for which ``holds``, n if there is none; whatever row it holds for, it holds for those that follow.
template <class Holds> static int first_row(int n, Holds holds) {
    int from = 0;
    while (from < n) {
        const int middle = (from + n) / 2;
        if (holds(middle)) n = middle;
        else from = middle + 1;
    }
    return from;
}

// A block of queries against those keys of the part that it may see.
static void block(const KeyPart& part, const PackedKeys& keys, char* queries, Scratch& w, char* gradients, int64_t q0) {
    const Call& c = part.c;
    const BatchIndex& b = part.b;
    const int64_t first = part.first, last = part.last;
    const int nq = int(min64(BQ, c.q_len - q0));
    R* d_query = QueryGradients::block(gradients, q0);
    QueryBlock block = {c, b, PackedQueries::at(queries, q0), w, d_query, q0, nq, {}, {}};
    memset(d_query, 0, sizeof(R) * nq * DC);
    int64_t begin = 0, end = c.kv_len, full_begin = 0, full_end = c.kv_len;
    end = clamp64(upper_key(c, b, q0 + nq - 1), 0, c.kv_len), full_end = upper_key(c, b, q0);
    begin = max64(begin - begin % BK, first), end = min64(end, last);
    for (int64_t k0 = begin; k0 < end; k0 += BK) {
        const int nk = int(min64(BK, end - k0));
        bool full = k0 >= full_begin && k0 + nk <= full_end;
        R *d_key = w.key + (k0 - first) * DROWS, *d_value = w.value + (k0 - first) * EROWS;
        if (!full) {
            int from = 0, to = nq;  // rows that may see a key of the tile
            from = first_row(nq, [&](int i) { return upper_key(c, b, q0 + i) > k0; });
            from -= from % Matrix::kRows, to = int(min64(round_up(to, Matrix::kRows), nq));
            if (from < to) block.tile<EntriesPartial>(keys.tile(k0), d_key, d_value, from, to, k0, nk);
            continue;
        }
        block.tile<EntriesFull>(keys.tile(k0), d_key, d_value, 0, nq, k0, nk);
    }
    for (int i = 0; i < nq; i += W) {
        VI chosen;
        if (!find_exact(c, b, q0 + i, chosen)) continue;
        attend_exactly(part, PackedTile{c, b, w.exact.key, w.exact.value}, w.exact.lanes, q0 + i, load(block.packed.delta + i),
            chosen);
        add_exact(w.exact.lanes, w, d_query + i * DC, nq - i < W ? nq - i : W, int(last - first));
    }
}

// Gradients of a part, transposed back a tile at a time.
template <int WIDTH, int ROWS, int COLUMNS, class T> static void write_tiles(const Target<T>& to, const R* from, Scratch& w,
    int64_t first, int64_t last, R scale) {
    for (int64_t k0 = first; k0 < last; k0 += BK, from += BK * ROWS) {
        const int64_t n = min64(BK, last - k0);
        copy_transposed(w.rows, COLUMNS, from, BK, 1, WIDTH, columns_of(n));
        write_rows<COLUMNS>(to, w.rows, WIDTH, k0, k0 + n, scale);
    }
}
template <int ROWS> static void clear_tiles(R* sums, int64_t keys) {
    for (; keys > 0; keys -= BK, sums += BK * ROWS) clear_rows(sums, ROWS, BK, columns_of(min64(BK, keys)));
}
static void clear_key(Scratch& w, int64_t keys) { clear_tiles<DROWS>(w.key, keys); }
static void clear_value(Scratch& w, int64_t keys) {
    clear_tiles<EROWS>(w.value, keys);
    memset(w.exact.lanes.key, 0, sizeof(R) * (keys + SLACK) * DC);
    memset(w.exact.lanes.value, 0, sizeof(R) * (keys + SLACK) * EC);
}
static void write_key(const Goal& goal, Scratch& w, int64_t first, int64_t last) {
    write_tiles<D, DROWS, DC>(goal.key, w.key, w, first, last, R(0.125));
}
static void write_value(const Goal& goal, Scratch& w, int64_t first, int64_t last) {
    write_tiles<DV, EROWS, EC>(goal.value, w.value, w, first, last, R(1));
}
// Adds gradients of one block of queries; the ``first`` ones replace what was there.
static void add_query(const Call& c, char* to, char* from, int64_t q0) {
    R *sum = QueryGradients::block(to, q0), *part = QueryGradients::block(from, q0);
    for (int i = 0; i < min64(BQ, c.q_len - q0) * DC; i += W) store(sum + i, load(sum + i) + load(part + i));
}
static void write_query(const Call& c, const Goal& goal, char* d_query, Scratch&, int64_t q0) {
    write_rows<DC>(goal.query, QueryGradients::block(d_query, q0), D, q0, min64(q0 + BQ, c.q_len), R(0.125));
}

// Work is cut so that whatever adds to a gradient is done by one thread, in one order, however many threads there are.
// Batch indices that share a key, a value, a query or an element of a dense tensor form a component; the keys of a component are cut
// into parts. A part owns its keys' gradients; its queries' are kept apart and summed over the parts.

struct Place {
    int64_t component, key, value, query, number;
};

static int compare_places(const void* a, const void* b) {
    const Place &x = *(const Place*)a, &y = *(const Place*)b;
    const int64_t of_x[] = {x.component, x.key, x.value, x.number}, of_y[] = {y.component, y.key, y.value, y.number};
    for (int i = 0; i < 4; i++)
        if (of_x[i] != of_y[i]) return of_x[i] < of_y[i] ? -1 : 1;
    return 0;
}

static int64_t root_of(Place* places, int64_t i) {
    while (places[i].component != i) i = places[i].component = places[places[i].component].component;
    return i;
}

// Joins the batch indices that have the same ``key``; component numbers are those of their first ones.
struct Keyed { int64_t key, number; };
static int compare_keyed(const void* a, const void* b) {
    const Keyed &x = *(const Keyed*)a, &y = *(const Keyed*)b;
    return x.key != y.key ? (x.key < y.key ? -1 : 1) : x.number < y.number ? -1 : x.number > y.number;
}
template <class Key> static void join(Place* places, Keyed* keyed, int64_t count, Key key) {
    for (int64_t i = 0; i < count; i++) keyed[i] = {key(i), i};
    qsort(keyed, count, sizeof(Keyed), compare_keyed);
    for (int64_t i = 1; i < count; i++) {
        if (keyed[i].key != keyed[i - 1].key) continue;
        const int64_t a = root_of(places, keyed[i - 1].number), b = root_of(places, keyed[i].number);
        places[a > b ? a : b].component = a < b ? a : b;
    }
}

// The batch indices of a value must follow each other, as those of a key do.
static bool in_order(const Place* places, int64_t count) {
    for (int64_t i = 1; i < count; i++)
        for (int64_t j = i - 2; j >= 0 && places[i].value != places[i - 1].value && places[j].component == places[i].component;
            j--)
            if (places[j].value == places[i].value) return false;
    return true;
}

struct Backward {
    const Call& c;
    const Destinations& t;
    const int64_t count, blocks, key_tiles, parts;
    int64_t slots;  // parts whose gradients of queries are held at a time
    const int64_t* starts;  // where components begin among the batch indices, and their number
    const Place* places;  // component: its first batch index
    const BatchIndex* batch;
    const Goal* goals;
    char* slices;  // what parts add to tensors beside query, key and value

    static int64_t slice_bytes(const Call& c) {
        return (0) * sizeof(R);
    }
    Shares shares(int64_t index, int64_t part) const {
        R* p = (R*)(slices + (index * parts + part) * slice_bytes(c));
        Shares found;
        (void)p;
        return found;
    }

    // Memory of one batch index: packed queries, packed keys (of the first that shares them), and the gradients of its
    // queries: their sum over the parts so far, begun by the first, then those of some parts.
    int64_t queries_bytes() const { return PackedQueries::bytes(c); }
    int64_t keys_bytes() const { return PackedKeys::bytes(c); }
    int64_t gradients_bytes() const { return QueryGradients::bytes(c); }
    int64_t index_bytes() const { return queries_bytes() + keys_bytes() + (1 + slots) * gradients_bytes(); }
    char* queries(char* m) const { return m; }
    char* keys(char* m) const { return m + queries_bytes(); }
    char* gradients(char* m) const { return m + queries_bytes() + keys_bytes(); }
    char* gradients(char* m, int64_t slot) const { return gradients(m) + (1 + slot) * gradients_bytes(); }

    bool same_keys(int64_t a, int64_t b) const {
        return batch[a].key.data == batch[b].key.data && batch[a].value.data == batch[b].value.data;
    }

    // Packs a block of queries or a tile of keys: item of blocks + key_tiles.
    void pack(int64_t index, char* m, bool packs_keys, int64_t item) const {
        if (item < blocks) return pack_queries(c, batch[index], goals[index], queries(m), item * BQ);
        const int64_t k0 = (item - blocks) * BK;
        if (packs_keys) pack_keys(c, batch[index], keys(m), k0);
    }

    // One part of the keys of the component first … last; ``memory`` is that of the first.
    void attend(int64_t first, int64_t last, char* memory, Scratch& w, int64_t part, int64_t slot) const {
        const int64_t begin = part * PART, end = min64(begin + PART, c.kv_len);
        char* packed = memory;
        clear_key(w, end - begin), clear_value(w, end - begin);
        for (int64_t i = first; i < last; i++) {
            char* m = memory + (i - first) * index_bytes();
            if (i > first && !same_keys(i, i - 1)) packed = m;
            const PackedKeys packed_keys(c, keys(packed));
            const Shares found = shares(i, part);
            const KeyPart of_index = {c, t, batch[i], goals[i], found, begin, end};
            char* d_query = part == 0 ? gradients(m) : gradients(m, slot);
            for (int64_t q0 = 0; q0 < c.q_len; q0 += BQ) block(of_index, packed_keys, queries(m), w, d_query, q0);
            if (i + 1 == last) write_key(goals[i], w, begin, end);
            else if (places[i].key != places[i + 1].key) write_key(goals[i], w, begin, end), clear_key(w, end - begin);
            if (i + 1 == last) write_value(goals[i], w, begin, end);
            else if (places[i].value != places[i + 1].value) write_value(goals[i], w, begin, end), clear_value(w, end - begin);
        }
    }

    // Gradients of a block of queries, by the first batch index that has them; ``m`` is its memory.
    void finish(int64_t index, char* m, Scratch& w, int64_t item) const {
        const int64_t q0 = item * BQ;
        for (int64_t i = places[index].component; i < index; i++)
            if (places[i].query == places[index].query) return;
        for (int64_t i = index + 1; i < count && places[i].component == places[index].component; i++)
            if (places[i].query == places[index].query) add_query(c, gradients(m), gradients(m + (i - index) * index_bytes()),
                q0);
        write_query(c, goals[index], gradients(m), w, q0);
    }

    // Items one after the other, or shared by the threads.
    template <class Item> static void each(bool shared, int64_t items, Item item) {
        if (shared) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < items; i++) item(i);
        } else {
            for (int64_t i = 0; i < items; i++) item(i);
        }
    }

    // Components from … to, by one thread or by all. Parts of early keys first: with a causal mask they are the longest.
    void wave(int64_t from, int64_t to, char* memory, Scratch& w, bool shared) const {
        const int64_t items = blocks + key_tiles, first = starts[from], number = starts[to] - first, width = to - from;
        const auto at = [&](int64_t index) { return memory + (index - first) * index_bytes(); };
        each(shared, number * items, [&](int64_t i) {
            const int64_t index = first + i / items;
            pack(index, at(index), index == places[index].component || !same_keys(index, index - 1), i % items);
        });
        for (int64_t part = 0; part < parts; part += slots) {
            const int64_t now = min64(slots, parts - part);
            each(shared, width * now, [&](int64_t i) {
                const int64_t component = from + i % width;
                attend(starts[component], starts[component + 1], at(starts[component]), w, part + i / width, i / width);
            });
            each(shared, number * blocks, [&](int64_t i) {
                char* m = at(first + i / blocks);
                for (int64_t slot = part == 0; slot < now; slot++) add_query(c, gradients(m), gradients(m, slot), i % blocks
                    * BQ);
            });
        }
        each(shared, number * blocks, [&](int64_t i) {
            const int64_t index = first + i / blocks;
            finish(index, at(index), w, i % blocks);
        });
    }

    // Adds the slices, in order, to the gradients that they are slices of.
    void add_slices() const {
    }
};

extern "C" __attribute__((visibility("default"))) int fuse_attention(const int64_t* arguments) {
    const Call c(arguments);
    const Destinations t(arguments);
    const int64_t count = batch_count(c), blocks = (c.q_len + BQ - 1) / BQ, key_tiles = (c.kv_len + BK - 1) / BK;
    if (count * blocks * key_tiles == 0) return 0;
    if (c.q_len > 16777216 || c.kv_len > 16777216) return 1;
    const int64_t parts = (c.kv_len + PART - 1) / PART;
    const int64_t slices = count * parts * Backward::slice_bytes(c);
    if (slices > INT64_C(1073741824)) return 1;
    const int64_t tile_bytes = 0;
    // Batch indices, where gradients go, tiles and slices.
    const Memory<0> head(count * int64_t(sizeof(BatchIndex) + sizeof(Goal) + sizeof(Place) + sizeof(Keyed) + sizeof(int64_t))
        + tile_bytes + slices + 128);
    if (!head.data) return 2;
    BatchIndex* batch = (BatchIndex*)head.data;
    Goal* goals = (Goal*)(batch + count);
    Place* places = (Place*)(goals + count);
    Keyed* keyed = (Keyed*)(places + count);
    int64_t* starts = (int64_t*)(keyed + count);
    char* tiles = (char*)(starts + count + 1);
    Backward work = {c, t, count, blocks, key_tiles, parts, 1, starts, places, batch, goals, tiles + (tile_bytes + 63) / 64
        * 64};
    {
        const FlushDenormals flush;
        for (int64_t i = 0; i < count; i++) batch[i] = make_batch_index(c, i), places[i] = {i, 0, 0, 0, i};
        for (int64_t i = 0; i < count; i++) places[i].query = query_place(c, t, batch[i], 0, 0);
        join(places, keyed, count, [&](int64_t i) { return places[i].query; });
        for (int64_t i = 0; i < count; i++) places[i].key = key_place(c, t, batch[i], 0, 0);
        join(places, keyed, count, [&](int64_t i) { return places[i].key; });
        for (int64_t i = 0; i < count; i++) places[i].value = value_place(c, t, batch[i], 0, 0);
        join(places, keyed, count, [&](int64_t i) { return places[i].value; });
        for (int64_t i = 0; i < count; i++) places[i].component = root_of(places, i);
        qsort(places, count, sizeof(Place), compare_places);
        for (int64_t i = 0; i < count; i++) batch[i] = make_batch_index(c, places[i].number), goals[i] = make_goal(c, t,
            batch[i]);
    }
    if (!in_order(places, count)) return 1;
    int64_t components = 0, largest = 0;
    for (int64_t i = 0, component = -1; i < count; i++) {
        if (places[i].component != component) component = places[i].component, starts[components++] = i;
        places[i].component = starts[components - 1];
        largest = max64(largest, i + 1 - places[i].component);
    }
    starts[components] = count;
    const int threads = int(min64(c.threads, 1 + count * c.q_len * c.kv_len * (D + DV) / 262144));
    // A thread takes whole components where there are enough: no barriers, and what it packs stays in its cache.
    const bool shared = threads > 1 && components < 4 * threads;
    work.slots = shared ? min64(parts, 2 * threads) : 1;
    const int64_t width = shared ? min64(components, (4 * threads + work.slots - 1) / work.slots) : 1;
    const int64_t per_thread = sizeof(Scratch) + 64, per_wave = (width * largest * work.index_bytes() + 63) / 64 * 64;
    // Packed operands and gradients of queries, and the threads' scratch.
    const Memory<1> held(threads * per_thread + (shared ? 1 : threads) * per_wave);
    char* const memory = held.data;
    if (!memory) return 2;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const FlushDenormals flush;
#ifdef _OPENMP
        const int thread = omp_get_thread_num();
#else
        const int thread = 0;
#endif
        Scratch& w = *new (memory + thread * per_thread) Scratch;
        char* packed = memory + threads * per_thread + (shared ? 0 : thread * per_wave);
        if (shared) {
            for (int64_t i = 0; i < components; i += width) work.wave(i, min64(i + width, components), packed, w, true);
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < components; i++) work.wave(i, i + 1, packed, w, false);
        }
    }
    {
        const FlushDenormals flush;
        work.add_slices();
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
    more.push_back(Tensor::random<Bf16>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true));
    more.push_back(Tensor::random<Bf16>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true));
    more.push_back(Tensor::random<Bf16>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true));
    more.push_back(Tensor::random<Bf16>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true));
    Tensor out = Tensor::random<Bf16>({ 1, 8, 512, 64 }, { 0, 1, 2, 3 }, true);
    Tensor lse = Tensor::random<Lse>({ 1, 8, 512 }, { 0, 1, 2 }, true);
    std::vector<int64_t> arguments = {threads, (int64_t)out.bytes.data(), (int64_t)lse.bytes.data()};
    const auto append = [&](const std::vector<int64_t>& more) { arguments.insert(arguments.end(), more.begin(), more.end()); };
    append(out.stride);
    append(sizes);
    for (const Tensor& t : operands) append({(int64_t)t.bytes.data()}), append(t.shape), append(t.stride);
    append({0});  // nobody asks for the gradient of the log-sum-exp
    for (const Tensor& t : more) append({(int64_t)t.bytes.data()}), append(t.stride);
    std::vector<double> times;
    for (int i = 0; i < 11; i++) {
        const auto start = std::chrono::steady_clock::now();
        if (const int code = fuse_attention(arguments.data())) return printf("error %d\n", code), code;
        times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::sort(times.begin(), times.end());
    double sum = 0;
    sum += more[1].sum<Bf16>();
    sum += more[2].sum<Bf16>();
    sum += more[3].sum<Bf16>();
    printf("%s, threads = %d: %.3f ms, sum of the result %.6g\n", said, int(threads), times[times.size() / 2] * 1e3, sum);
    return 0;
}
#endif
