// Operands in the layouts of matrix products: pairs of neighbours along the summed axis lie together, columns follow.
//   key    per tile of BK keys: [PAIRS][BK] pairs of features
//   value  per tile of BK keys: [BK / 2][DVP] pairs of keys, in the order of packed_key
constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }
constexpr int PAIRS = round_up(D, Matrix::kDepth) / 2, VALUE_COLS = round_up(DV, W);

struct Packed {
    uint32_t *key, *value;
    const KeyRanges* tiles;  // one for each tile of BK keys

    static int64_t bytes(int64_t key_tiles) { return key_tiles * BK * (PAIRS + VALUE_COLS / 2) * sizeof(uint32_t); }
    Packed(char* slot, int64_t key_tiles, const KeyRanges* tiles) : key((uint32_t*)slot), value(key + key_tiles * BK * PAIRS), tiles(tiles) {}
};

// The weights of 32 keys are packed by one instruction (vpackusdw), which takes four from the first vector and four from
// the second in turn: position i of 32 holds key packed_key(i), and the values are laid out to match.
constexpr int packed_key(int i) { return i / 8 * 4 + i % 4 + (i % 8 < 4 ? 0 : 16); }

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

// 16 keys whose features are neighbours: squares of pairs, transposed.
static void pack_key_rows(uint32_t* dst, const Bf16* key, int64_t row, int n) {
    for (int p = 0; p < PAIRS; p += W) {
        VR x[W];
        const int features = D - 2 * p;
        const __mmask32 have = features >= 32 ? ~0u : features <= 0 ? 0 : (1u << features) - 1;
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) x[i] = VR(_mm512_maskz_loadu_epi16(i < n ? have : 0, i < n ? key + i * row + 2 * p : key));
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
            if (p + i < PAIRS) store((float*)(dst + (p + i) * BK), x[i]);
    }
}

static void pack(const Call& c, const Site& s, const Packed& packed, int64_t k0) {
    const int n = int(min64(BK, c.kv_len - k0));
    uint32_t *key = packed.key + k0 * PAIRS, *value = packed.value + k0 / 2 * VALUE_COLS;
    for (int k = 0; k < BK; k += W) {
        const Bf16* rows = s.key.data + (k0 + k) * s.key.row;
        if (s.key.column == 1) pack_key_rows(key + k, rows, s.key.row, n - k);
        else for (int p = 0; p < PAIRS; p++) {
            const Bf16* low = rows + 2 * p * s.key.column;
            interleave_rows(key + p * BK + k, 2 * p < D ? low : nullptr, 2 * p + 1 < D ? low + s.key.column : nullptr, s.key.row, n - k);
        }
    }
    for (int i = 0; i < BK; i += 2) {
        const int k = i / 32 * 32 + packed_key(i % 32);
        const Bf16* low = s.value.data + (k0 + k) * s.value.row;
        for (int e = 0; e < VALUE_COLS; e += W) {
            const int64_t at = e * s.value.column;
            interleave_rows(value + i / 2 * VALUE_COLS + e, k < n ? low + at : nullptr, k + 1 < n ? low + s.value.row + at : nullptr,
                            s.value.column, DV - e);
        }
    }
}
