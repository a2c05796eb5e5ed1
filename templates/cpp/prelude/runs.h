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
        _mm512_storeu_si512((char*)dst + i, _mm512_maskz_loadu_epi8(left - i < kPiece ? (uint64_t(1) << (left - i)) - 1 : ~uint64_t(0), (const char*)src + i));
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
