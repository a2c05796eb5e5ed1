// fuse::attention, its forward and its backward pass on CPUs, without Python.
//
// Kernels are made known by fuse/targets/cpp/op.py, under the text of their spec. What this file does not know, or cannot do,
// goes to the operators of the same arguments that Python has (fuse/ops/attention.py): derivatives, the first call of a kernel,
// which is when it is built, and calls that a kernel does not take.

namespace {

typedef at::Tensor One(at::TensorList, c10::SymIntArrayRef, std::string_view, std::string_view);
typedef std::tuple<at::Tensor, at::Tensor> Two(at::TensorList, c10::SymIntArrayRef, std::string_view, std::string_view);

template <class F>
c10::TypedOperatorHandle<F> op(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

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

typedef std::vector<at::Tensor> Gradients(
    const at::Tensor&, at::TensorList, c10::SymIntArrayRef, const at::Tensor&, const at::Tensor&, std::string_view, std::string_view,
    c10::List<bool>, const std::optional<at::Tensor>&);

// What a gradient is written to: zeros, where not all of it is `written`. Torch's own functions take longer than the gradients
// of a few tokens.
at::Tensor buffer(const at::Tensor& like, bool written) {
    if (!like.is_non_overlapping_and_dense() || (!written && like.numel() > 1 << 14)) return at::zeros_like(like);
    const at::Tensor found = at::detail::empty_strided_cpu(like.sizes(), like.strides(), like.scalar_type());
    if (!written) std::memset(found.mutable_data_ptr(), 0, found.nbytes());
    return found;
}

// Whether a kernel gave the gradients. Each is one tensor, as torch.empty_like lays it out, to which one or several
// destinations write.
bool gradients_by_kernel(
    std::vector<at::Tensor>& found, const at::Tensor& grad_out, at::TensorList operands, at::IntArrayRef sizes, const at::Tensor& out,
    const at::Tensor& lse, std::string_view spec, std::string_view target, at::IntArrayRef wanted) {
    const Kernel* const kernel = kernel_of(spec, target);
    for (const Backward& b : kernel ? at::ArrayRef<Backward>(kernel->backward) : at::ArrayRef<Backward>()) {
        if (!b.is_of(wanted, sizes) || lse.scalar_type() != b.lse) continue;
        std::vector<at::Tensor> all(operands.size());
        found.clear();
        for (size_t i = 0; i < operands.size(); i++) {
            if (!wanted[i]) continue;
            const size_t at = std::find(b.destinations.begin(), b.destinations.end(), int64_t(i)) - b.destinations.begin();
            found.push_back(all[i] = buffer(operands[i], at < b.shapes.size() && operands[i].sizes() == b.shapes[at]));
        }
        Arguments arguments(out, lse, out.strides(), operands, sizes);
        arguments.a.push_back(0);
        arguments.add(grad_out);
        for (const int64_t i : b.destinations) arguments.add(all[i]);
        if (arguments.run(b.function)) return true;
    }
    return false;
}

std::vector<at::Tensor> attention_backward(
    const at::Tensor& grad_out, at::TensorList operands, at::IntArrayRef sizes, const at::Tensor& out, const at::Tensor& lse,
    std::string_view spec, std::string_view target, c10::List<bool> wanted, const std::optional<at::Tensor>& grad_lse) {
    std::vector<at::Tensor> found;
    const c10::SmallVector<int64_t, 8> asked(wanted.begin(), wanted.end());
    if (!grad_lse && gradients_by_kernel(found, grad_out, operands, sizes, out, lse, spec, target, asked)) return found;
    static const auto in_python = op<Gradients>("fuse::attention_backward_in_python");
    return in_python.call(grad_out, operands, c10::fromIntArrayRefSlow(sizes), out, lse, spec, target, wanted, grad_lse);
}

bool derived(const at::Tensor& t) { return (at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(0).defined(); }
bool derived(at::TensorList tensors) {
    return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) { return derived(t); });
}

at::Tensor attention_autograd(
    at::TensorList operands, c10::SymIntArrayRef sizes, std::string_view spec, std::string_view target) {
    static const auto plain = op<One>("fuse::attention"), in_python = op<One>("fuse::attention_in_python");
    if (derived(operands)) return in_python.call(operands, sizes, spec, target);
    at::AutoDispatchBelowAutograd below;
    return plain.call(operands, sizes, spec, target);
}

std::vector<at::Tensor> backward_autograd(
    const at::Tensor& grad_out, at::TensorList operands, c10::SymIntArrayRef sizes, const at::Tensor& out, const at::Tensor& lse,
    std::string_view spec, std::string_view target, c10::List<bool> wanted, const std::optional<at::Tensor>& grad_lse) {
    static const auto plain = op<Gradients>("fuse::attention_backward");
    static const auto in_python = op<Gradients>("fuse::attention_backward_in_python");
    if (derived(operands) || derived(grad_out) || derived(out) || (grad_lse && derived(*grad_lse)))
        return in_python.call(grad_out, operands, sizes, out, lse, spec, target, wanted, grad_lse);
    at::AutoDispatchBelowAutograd below;
    return plain.call(grad_out, operands, sizes, out, lse, spec, target, wanted, grad_lse);
}

TORCH_LIBRARY_IMPL(fuse, CPU, m) {
    m.impl("attention", &attention);
    m.impl("attention_forward", &attention_forward);
    m.impl("attention_backward", &attention_backward);
}

TORCH_LIBRARY_IMPL(fuse, AutogradCPU, m) {
    m.impl("attention", &attention_autograd);
    m.impl("attention_backward", &backward_autograd);
}

}  // namespace

// Of a spec that was taken; `wanted` is as long as there are operands. `shapes`: for each destination its rank, then so many sizes.
EXPORTED void fuse_take_backward(
    const char* spec, Run* run, int64_t arguments, int64_t operands, const int64_t* wanted, int64_t symbols, const int64_t* sizes,
    int64_t count, const int64_t* destinations, int64_t numbers, const int64_t* shapes, const char* lse) {
    std::vector<std::vector<int64_t>> written;
    for (const int64_t* n = shapes; n < shapes + numbers; n += 1 + *n) written.emplace_back(n + 1, n + 1 + *n);
    change([=](Kernels& all) {
        const auto found = all.find(spec);
        if (found == all.end()) return;
        found->second.backward.push_back(
            {{run, size_t(arguments)}, {wanted, wanted + operands}, {sizes, sizes + symbols}, {destinations, destinations + count},
             written, dtype(lse)});
    });
}

EXPORTED void fuse_forget() {
    change([](Kernels& all) { all.clear(); });
}
