// A process without Python: loads fuse's library, if it is named, then a package of AOTInductor, and prints how far its result
// is from eager's. Both are (2, 77, 64) and lie beside it as float32.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>

int main(int count, char** names) {
    if (count > 2 && !dlopen(names[2], RTLD_NOW)) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    torch::inductor::AOTIModelPackageLoader package(names[1]);
    const auto read = [](const char* name) { return at::from_file(name, false, 2 * 77 * 64, at::kFloat).view({2, 77, 64}); };
    std::printf("%g\n", (package.run({read("x")})[0] - read("expected")).abs().max().item<double>());
}
