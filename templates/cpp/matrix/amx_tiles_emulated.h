// The tile instructions on plain arrays, with their results and their faults (Intel SDM volume 2: LDTILECFG, TDPBF16PS), so
// that the matrix core is tested where there is no AMX.
#include <stdio.h>

struct TileRegister {
    int rows, row_bytes;
    uint8_t data[kTileRows][kTileBytes];
};
static thread_local TileRegister tiles[8];
static thread_local bool tiles_configured = false;

INLINE void tile_expect(bool legal, const char* what) {
    if (legal) return;
    fprintf(stderr, "AMX fault: %s\n", what);
    abort();
}
INLINE TileRegister& tile_used(int t) {
    tile_expect(tiles_configured && tiles[t].rows > 0 && tiles[t].row_bytes > 0, "tile is not configured");
    return tiles[t];
}
static void tile_configure(const TileConfig& config) {
    tile_expect(config.palette == 1, "palette is not 1");
    for (int t = 0; t < 8; t++) {
        tile_expect(config.rows[t] <= kTileRows && config.row_bytes[t] <= kTileBytes, "tile larger than the palette's");
        tiles[t] = TileRegister{config.rows[t], config.row_bytes[t], {}};
    }
    tiles_configured = true;
}
INLINE void tile_release() { tiles_configured = false; }
template <int T> static void tile_zero() { memset(tile_used(T).data, 0, sizeof tiles[T].data); }
template <int T> static void tile_load(const void* base, int64_t stride) {
    tile_zero<T>();
    for (int r = 0; r < tiles[T].rows; r++) memcpy(tiles[T].data[r], (const char*)base + r * stride, tiles[T].row_bytes);
}
template <int T> static void tile_store(void* base, int64_t stride) {
    const TileRegister& tile = tile_used(T);
    for (int r = 0; r < tile.rows; r++) memcpy((char*)base + r * stride, tile.data[r], tile.row_bytes);
}

// Denormals count as zero, among inputs and results.
INLINE float tile_normal(float x) { return fpclassify(x) == FP_SUBNORMAL ? copysignf(0, x) : x; }
INLINE float tile_element(const TileRegister& tile, int row, int column) {
    Bf16 x;
    memcpy(&x, tile.data[row] + 2 * column, 2);
    return tile_normal(to_r(x));
}
// Even and odd products are summed apart, then together, then into C.
template <int C, int A, int B> static void tile_dot() {
    const TileRegister &a = tile_used(A), &b = tile_used(B);
    TileRegister& c = tile_used(C);
    tile_expect(c.rows == a.rows && a.row_bytes == 4 * b.rows && c.row_bytes == b.row_bytes, "tile shapes do not agree");
    for (int m = 0; m < c.rows; m++)
        for (int n = 0; n < c.row_bytes / 4; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < b.rows; k++) {
                even = tile_normal(fmaf(tile_element(a, m, 2 * k), tile_element(b, k, 2 * n), even));
                odd = tile_normal(fmaf(tile_element(a, m, 2 * k + 1), tile_element(b, k, 2 * n + 1), odd));
            }
            memcpy(&sum, c.data[m] + 4 * n, 4);
            sum = tile_normal(tile_normal(sum) + tile_normal(even + odd));
            memcpy(c.data[m] + 4 * n, &sum, 4);
        }
}
