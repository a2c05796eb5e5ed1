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
