#include <sys/syscall.h>
#include <unistd.h>

// Linux grants tiles to a process that asks, and ends others at the first use (Documentation/arch/x86/xstate.rst). Python has
// asked before it chose them; a program that loads a kernel without Python, or is made of it, asks here.
static const long tiles_asked = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */);

// The tile instructions the matrix core needs. Inline asm, because gcc 12's intrinsics are unsafe: _tile_loadconfig
// declares 8 of the 64 bytes it reads, and _tile_loadd has no memory clobber, so that earlier stores may sink below it.
INLINE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
INLINE void tile_release() { asm volatile("tilerelease"); }
template <int T> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> INLINE void tile_load(const void* base, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(T) : "memory");
}
template <int T> INLINE void tile_store(void* base, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride), "i"(T) : "memory");
}
// C[m][n] += sum over k of A[m][2k] * B[k][2n] + A[m][2k+1] * B[k][2n+1]
template <int C, int A, int B> INLINE void tile_dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
