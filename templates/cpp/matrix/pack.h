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
            interleave_rows(value + i / 2 * VALUE_COLS + e, k < n ? low + at : nullptr, k + 1 < n ? low + b.value.row + at : nullptr,
                            b.value.column, DV - e);
        }
    }
}
