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
        for (int i = 0; i < W; i++) x[i] = VR(_mm512_maskz_loadu_epi16(i < n ? have : 0, i < n ? from + i * row + 2 * p : from));
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
            if (p + i < PAIRS) store((float*)(dst + (p + i) * ld), x[i]);
    }
}

// Pairs of columns of n rows, zeros up to ``rows``: [PAIRS][ld]. ``stride`` is that of the columns.
template <int WIDTH, int PAIRS> static void pack_column_pairs(uint32_t* dst, int ld, const Bf16* from, int64_t row, int64_t stride, int n, int rows) {
    for (int k = 0; k < rows; k += W) {
        const Bf16* first = from + k * row;
        if (stride == 1) pack_rows_of_pairs<WIDTH, PAIRS>(dst + k, ld, first, row, n - k);
        else for (int p = 0; p < PAIRS; p++) {
            const Bf16* low = first + 2 * p * stride;
            interleave_rows(dst + p * ld + k, 2 * p < WIDTH ? low : nullptr, 2 * p + 1 < WIDTH ? low + stride : nullptr, row, n - k);
        }
    }
}

// Of [PAIRS][ld] pairs of columns, pairs of each column and itself, in place.
template <int WIDTH> static void repeat_columns(uint32_t* dst, int ld, int rows) {
    for (int p = (WIDTH - 1) / 2; p >= 0; p--)
        for (int k = 0; k < rows; k += W) {
            const __m512i x = _mm512_loadu_si512(dst + p * ld + k), odd = _mm512_srli_epi32(x, 16), even = _mm512_and_si512(x, _mm512_set1_epi32(0xffff));
            if (2 * p + 1 < WIDTH) _mm512_storeu_si512(dst + (2 * p + 1) * ld + k, _mm512_or_si512(odd, _mm512_slli_epi32(odd, 16)));
            _mm512_storeu_si512(dst + 2 * p * ld + k, _mm512_or_si512(even, _mm512_slli_epi32(even, 16)));
        }
}
