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
    else if constexpr (__is_same(T, Bf16)) return VR(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
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
template <class T> INLINE VR load_some(const T* p, int n) { VR v = {}; for (int i = 0; i < n; i++) v[i] = to_r(p[i]); return v; }

// dst[row * ld + column] = src[row * rs + column * cs] for rows x columns.
template <class T> static void copy_rows(R* dst, int64_t ld, const T* src, int64_t rs, int64_t cs, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++) {
        if (cs == 1) {
            int64_t j = 0;
            for (; j + W <= columns; j += W) store(dst + i * ld + j, load_as(src + i * rs + j));
            for (; j < columns; j++) dst[i * ld + j] = to_r(src[i * rs + j]);
        } else for (int64_t j = 0; j < columns; j++) dst[i * ld + j] = to_r(src[i * rs + j * cs]);
    }
}

// dst[column * ld + row] = src[row * rs + column * cs]: W x W squares through registers where columns are neighbours.
template <class T> static void copy_transposed(R* dst, int64_t ld, const T* src, int64_t rs, int64_t cs, int64_t rows, int64_t columns) {
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
template <class T> INLINE VR gather_real(const void* p, VL at) { VR v; for (int i = 0; i < W; i++) v[i] = read_real<T>(p, at[i]); return v; }
template <class T> INLINE VI gather_int(const void* p, VL at) { VI v; for (int i = 0; i < W; i++) v[i] = I(read_int<T>(p, at[i])); return v; }
template <class T> INLINE VL gather_long(const void* p, VL at) { VL v; for (int i = 0; i < W; i++) v[i] = read_int<T>(p, at[i]); return v; }
template <class T> INLINE VI gather_bool(const void* p, VL at) { VI v; for (int i = 0; i < W; i++) v[i] = -I(((const T*)p)[at[i]] != 0); return v; }
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
