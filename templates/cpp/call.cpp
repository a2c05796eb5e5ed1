// Calls of kernels with torch's tensors: what is known of kernels, and how one of them is given a call.
//
// Followed by op.cpp, where there is Python, or by packaged.cpp, where there is none.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

typedef int Run(const char* arguments);

// A kernel's entry, and how many numbers it is given: a call of others is none of its own.
struct Function {
    Run* run;
    size_t count;
};

// Gradients of the operands that are `wanted`, in calls of these sizes.
struct Backward {
    Function function;
    std::vector<int64_t> wanted, sizes, destinations;  // truth values; values of symbols; numbers of operands
    std::vector<std::vector<int64_t>> shapes;          // for each destination, that of which every element is written, or none
    at::ScalarType lse;

    bool is_of(at::IntArrayRef w, at::IntArrayRef s) const { return sizes == s && wanted == w; }
};

struct Kernel {
    Function function;
    int64_t batch, v_dim;
    std::vector<int64_t> order;  // of the result's dimensions in memory
    at::ScalarType out, lse;
    std::vector<Backward> backward;
};

// Replaced as a whole, and never freed: a call on another thread may still be reading the one before.
typedef std::map<std::string, Kernel, std::less<>> Kernels;
std::atomic<const Kernels*> known{new Kernels};
std::mutex replacing;

const Kernel* kernel_of(std::string_view spec, std::string_view target) {
    const Kernels& kernels = *known.load(std::memory_order_acquire);
    const auto found = kernels.find(spec);
    return target == "cpp" && found != kernels.end() ? &found->second : nullptr;
}

// What a kernel is called with: see templates/cpp/shared/call.h.jinja.
struct Arguments {
    c10::SmallVector<int64_t, 128> a;

    Arguments(const at::Tensor& out, const at::Tensor& lse, at::IntArrayRef strides, at::TensorList operands, at::IntArrayRef sizes)
        : a{at::get_num_threads(), address(out), address(lse)} {
        add(strides), add(sizes);
        for (const at::Tensor& t : operands) a.push_back(address(t)), add(t.sizes()), add(t.strides());
    }
    void add(at::IntArrayRef numbers) { a.append(numbers.begin(), numbers.end()); }
    void add(const at::Tensor& t) { a.push_back(address(t)), add(t.strides()); }
    bool run(Function kernel) const { return a.size() == kernel.count && kernel.run(reinterpret_cast<const char*>(a.data())) == 0; }
    static int64_t address(const at::Tensor& t) { return t.defined() ? reinterpret_cast<int64_t>(t.const_data_ptr()) : 0; }
};

// One call: the result, and the log-sum-exp of its rows if somebody wants it.
struct Call {
    at::Tensor out, lse;
    bool done = false;

    Call(at::TensorList operands, at::IntArrayRef sizes, std::string_view spec, std::string_view target, bool with_lse) {
        const Kernel* const kernel = kernel_of(spec, target);
        if (!kernel || sizes.size() < size_t(kernel->batch) + 2) return;
        c10::SmallVector<int64_t, 8> shape(sizes.begin(), sizes.begin() + kernel->batch + 1), strides(kernel->batch + 2);
        shape.push_back(kernel->v_dim);
        int64_t step = 1;
        for (auto dim = kernel->order.rbegin(); dim != kernel->order.rend(); dim++) strides[*dim] = step, step *= shape[*dim];
        out = at::detail::empty_strided_cpu(shape, strides, kernel->out);
        if (with_lse) lse = at::detail::empty_cpu(sizes.slice(0, kernel->batch + 1), kernel->lse);
        done = Arguments(out, lse, strides, operands, sizes).run(kernel->function);
    }
};

at::ScalarType dtype(const std::string& name) {
    const std::map<std::string, at::ScalarType> all = {
        {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};
    return all.at(name);
}

template <class Change> void change(Change make) {
    const std::lock_guard<std::mutex> lock(replacing);
    Kernels* const with = new Kernels(*known.load());
    make(*with);
    known.store(with, std::memory_order_release);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// `order` has `batch` + 2 numbers.
EXPORTED void fuse_take(
    const char* spec, Run* run, int64_t arguments, int64_t batch, int64_t v_dim, const int64_t* order, const char* out, const char* lse) {
    change([=](Kernels& all) { all[spec] = {{run, size_t(arguments)}, batch, v_dim, {order, order + batch + 2}, dtype(out), dtype(lse), {}}; });
}
