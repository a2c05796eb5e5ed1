// fuse::attention and fuse::attention_forward on CPUs, without Python: a call takes two microseconds instead of eighteen.
//
// Kernels are made known by fuse/targets/cpp/op.py, under the text of their spec. What this file does not know, or cannot do,
// goes to the operators of the same arguments that Python has (fuse/ops/attention.py): derivatives, the first call of a kernel,
// which is when it is built, and calls that a kernel does not take.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <string>

namespace {

struct Kernel {
    int (*run)(const char* arguments);
    int64_t batch, v_dim;
    std::vector<int64_t> order;  // of the result's dimensions in memory
    at::ScalarType out, lse;
};

// Replaced as a whole, and never freed: a call on another thread may still be reading the one before.
typedef std::map<std::string, Kernel, std::less<>> Kernels;
std::atomic<const Kernels*> known{new Kernels};
std::mutex replacing;

typedef at::Tensor One(at::TensorList, c10::SymIntArrayRef, std::string_view, std::string_view);
typedef std::tuple<at::Tensor, at::Tensor> Two(at::TensorList, c10::SymIntArrayRef, std::string_view, std::string_view);

template <class F>
c10::TypedOperatorHandle<F> op(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

// One call: the result, and the log-sum-exp of its rows if somebody wants it.
struct Call {
    at::Tensor out, lse;
    bool done = false;

    Call(at::TensorList operands, at::IntArrayRef sizes, std::string_view spec, std::string_view target, bool with_lse) {
        const Kernels& kernels = *known.load(std::memory_order_acquire);
        const auto found = kernels.find(spec);
        if (target != "cpp" || found == kernels.end()) return;
        const Kernel& kernel = found->second;
        c10::SmallVector<int64_t, 8> shape(sizes.begin(), sizes.begin() + kernel.batch + 1), strides(kernel.batch + 2);
        shape.push_back(kernel.v_dim);
        int64_t step = 1;
        for (auto dim = kernel.order.rbegin(); dim != kernel.order.rend(); dim++) strides[*dim] = step, step *= shape[*dim];
        out = at::detail::empty_strided_cpu(shape, strides, kernel.out);
        if (with_lse) lse = at::detail::empty_cpu(sizes.slice(0, kernel.batch + 1), kernel.lse);
        done = run(kernel, operands, sizes, strides);
    }

    // See templates/cpp/shared/call.h.jinja.
    bool run(const Kernel& kernel, at::TensorList operands, at::IntArrayRef sizes, at::IntArrayRef strides) const {
        c10::SmallVector<int64_t, 96> a{at::get_num_threads(), address(out), lse.defined() ? address(lse) : 0};
        a.append(strides.begin(), strides.end());
        a.append(sizes.begin(), sizes.end());
        for (const at::Tensor& t : operands) {
            a.push_back(address(t));
            a.append(t.sizes().begin(), t.sizes().end());
            a.append(t.strides().begin(), t.strides().end());
        }
        return kernel.run(reinterpret_cast<const char*>(a.data())) == 0;
    }

    static int64_t address(const at::Tensor& t) { return reinterpret_cast<int64_t>(t.const_data_ptr()); }
};

at::Tensor attention(at::TensorList operands, at::IntArrayRef sizes, std::string_view spec, std::string_view target) {
    const Call call(operands, sizes, spec, target, false);
    if (call.done) return call.out;
    static const auto in_python = op<One>("fuse::attention_in_python");
    return in_python.call(operands, c10::fromIntArrayRefSlow(sizes), spec, target);
}

std::tuple<at::Tensor, at::Tensor> attention_forward(
    at::TensorList operands, at::IntArrayRef sizes, std::string_view spec, std::string_view target) {
    const Call call(operands, sizes, spec, target, true);
    if (call.done) return {call.out, call.lse};
    static const auto in_python = op<Two>("fuse::attention_forward_in_python");
    return in_python.call(operands, c10::fromIntArrayRefSlow(sizes), spec, target);
}

bool derived(at::TensorList operands) {
    const bool backward = at::GradMode::is_enabled();
    return std::any_of(operands.begin(), operands.end(), [=](const at::Tensor& t) {
        return (backward && t.requires_grad()) || t._fw_grad(0).defined();
    });
}

at::Tensor attention_autograd(
    at::TensorList operands, c10::SymIntArrayRef sizes, std::string_view spec, std::string_view target) {
    static const auto plain = op<One>("fuse::attention"), in_python = op<One>("fuse::attention_in_python");
    if (derived(operands)) return in_python.call(operands, sizes, spec, target);
    at::AutoDispatchBelowAutograd below;
    return plain.call(operands, sizes, spec, target);
}

at::ScalarType dtype(const std::string& name) {
    const std::map<std::string, at::ScalarType> all = {
        {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};
    return all.at(name);
}

void replace(Kernels* with) { known.store(with, std::memory_order_release); }

TORCH_LIBRARY_IMPL(fuse, CPU, m) {
    m.impl("attention", &attention);
    m.impl("attention_forward", &attention_forward);
}

TORCH_LIBRARY_IMPL(fuse, AutogradCPU, m) { m.impl("attention", &attention_autograd); }

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))


// `order` has `batch` + 2 numbers.
EXPORTED void fuse_take(
    const char* spec, void* run, int64_t batch, int64_t v_dim, const int64_t* order, const char* out, const char* lse) {
    const std::lock_guard<std::mutex> lock(replacing);
    Kernels* with = new Kernels(*known.load());
    Kernel& kernel = (*with)[spec];
    kernel = {(int (*)(const char*))run, batch, v_dim, {order, order + batch + 2}, dtype(out), dtype(lse)};
    replace(with);
}

EXPORTED void fuse_forget() {
    const std::lock_guard<std::mutex> lock(replacing);
    replace(new Kernels);
}
