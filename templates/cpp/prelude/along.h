// A row of an operand along the keys of a tile: in place where they are whole vectors of neighbours, else copied.
template <class T> struct Along {
    const T* at;
    T copy[BK + kPiece / sizeof(T)];

    // ``offset`` is linear in k wherever ``inside`` holds at both ends; elsewhere it stays within the operand.
    template <class Offset, class Inside> inline __attribute__((always_inline)) void read(const void* data, int64_t k0, int nk, Offset offset, Inside inside) {
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
template <class T> INLINE VI along_int(const Along<T>& a, int n) { VI v; for (int i = 0; i < W; i++) v[i] = I(a.at[n + i]); return v; }
template <class T> INLINE VL along_long(const Along<T>& a, int n) { VL v; for (int i = 0; i < W; i++) v[i] = a.at[n + i]; return v; }
// Behind the last key a copy may hold bytes that are no bool: they are read as bytes, and what is made of them is dropped.
template <class T> INLINE VI along_bool(const Along<T>& a, int n) { VI v; for (int i = 0; i < W; i++) v[i] = -I(a.at[n + i] != 0); return v; }
INLINE VI along_bool(const Along<bool>& a, int n) { VI v; for (int i = 0; i < W; i++) v[i] = -I(((const unsigned char*)a.at)[n + i] != 0); return v; }
