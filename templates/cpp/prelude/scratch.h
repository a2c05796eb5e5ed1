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
