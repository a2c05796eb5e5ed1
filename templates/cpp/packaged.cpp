// fuse::attention on CPUs in a process without Python: kernels of one program, which lie beside this library.
//
// Preceded by call.cpp, followed by PACKAGED, what was packaged: see fuse/targets/cpp/packaged.py.
#include <dlfcn.h>

namespace {

// A kernel in a file of this library's folder; the rest as fuse_take has it.
struct Packaged {
    const char *file, *spec;
    int64_t arguments, batch, v_dim;
    std::vector<int64_t> order;
    const char *out, *lse;
};
const std::vector<Packaged>& packaged();

std::string failure;  // of a kernel that could not be loaded

at::Tensor attention(at::TensorList operands, at::IntArrayRef sizes, std::string_view spec, std::string_view target) {
    TORCH_CHECK(failure.empty(), "fuse::attention: ", failure);
    TORCH_CHECK(kernel_of(spec, target), "fuse::attention: this library was written for another program; fuse.save_library writes one for each");
    const Call call(operands, sizes, spec, target, false);
    TORCH_CHECK(call.done, "fuse::attention: its kernel does not take a call of sizes ", sizes);
    return call.out;
}

TORCH_LIBRARY(fuse, m) { m.def("attention(Tensor[] operands, SymInt[] sizes, str spec, str target) -> Tensor"); }
TORCH_LIBRARY_IMPL(fuse, CPU, m) { m.impl("attention", &attention); }

void load(const std::string& folder, const Packaged& p) {
    void* const library = dlopen((folder + p.file).c_str(), RTLD_NOW | RTLD_LOCAL);
    Run* const run = library ? reinterpret_cast<Run*>(dlsym(library, ENTRY)) : nullptr;
    if (run) fuse_take(p.spec, run, p.arguments, p.batch, p.v_dim, p.order.data(), p.out, p.lse);
    else failure = dlerror();
}

const bool loaded = [] {
    Dl_info self;
    if (!dladdr(reinterpret_cast<const void*>(&load), &self)) return false;
    const std::string path = self.dli_fname;
    for (const Packaged& p : packaged()) load(path.substr(0, path.rfind('/') + 1), p);
    return true;
}();

}  // namespace
