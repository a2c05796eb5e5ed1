// Python's own way to the operators of op.cpp, which stands before this in one file: for calls that Inductor writes.
//
// A caller is a function of Python that knows its spec. Lists, texts and dispatch cost a call through torch.ops more than many
// kernels take. What is not plain tensors on a CPU, below autograd and beside every mode of torch, goes to `slow`, a function of
// Python that takes the same and calls the operator.
#include <Python.h>

// What torch/csrc/autograd/python_variable.h declares, which takes longer to read than all the rest. Whether a tensor is laid out
// so is asked when the library is loaded: fuse_reads.
struct THPVariable {
    PyObject_HEAD
    at::Tensor cdata;
};
extern PyObject *THPVariableClass, *ParameterClass;
PyObject* THPVariable_Wrap(const at::TensorBase&);

namespace {

struct Caller {
    std::string spec, target;
    PyObject* slow;
};

struct WithoutGil {
    PyThreadState* const state = PyEval_SaveThread();
    ~WithoutGil() { PyEval_RestoreThread(state); }
};

// What dispatch would come to, were it asked.
bool is_plain(const at::Tensor& t) {
    constexpr c10::DispatchKeySet passed = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
                                           c10::default_included_set;
    const auto tls = c10::impl::tls_local_dispatch_key_set();
    return (((t.key_set() | tls.included_) - tls.excluded_) - passed) == c10::DispatchKeySet(c10::DispatchKey::CPU) && !derived(t);
}

bool take(PyObject* of, at::Tensor& to) {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(of));
    if (type != THPVariableClass && type != ParameterClass) return false;
    to = reinterpret_cast<THPVariable*>(of)->cdata;
    return is_plain(to);
}

bool take(PyObject* of, c10::SmallVector<at::Tensor, 8>& to) {
    if (!PyList_CheckExact(of)) return false;
    to.resize(PyList_GET_SIZE(of));
    for (size_t i = 0; i < to.size(); i++)
        if (!take(PyList_GET_ITEM(of, i), to[i])) return false;
    return true;
}

bool take(PyObject* of, c10::SmallVector<int64_t, 8>& to) {
    if (!PyList_CheckExact(of)) return false;
    to.resize(PyList_GET_SIZE(of));
    for (size_t i = 0; i < to.size(); i++) {
        PyObject* const number = PyList_GET_ITEM(of, i);
        if (!PyLong_Check(number)) return false;
        to[i] = PyLong_AsLongLong(number);
        if (to[i] == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
    }
    return true;
}

// The operands and sizes that every operator has, as arguments `first` and the next.
struct Given {
    c10::SmallVector<at::Tensor, 8> operands;
    c10::SmallVector<int64_t, 8> sizes;
    bool take_from(PyObject* const* given) { return take(given[0], operands) && take(given[1], sizes); }
};

bool may_take(Py_ssize_t count, Py_ssize_t expected, PyObject* names) { return count == expected && !names && !at::hasCallbacks(); }

PyObject* pair(const at::Tensor& first, const at::Tensor& second) {
    PyObject *const a = THPVariable_Wrap(first), *const b = THPVariable_Wrap(second);
    return Py_BuildValue("NN", a, b);
}

PyObject* list(const std::vector<at::Tensor>& tensors) {
    PyObject* const found = PyList_New(tensors.size());
    for (size_t i = 0; found && i < tensors.size(); i++) PyList_SET_ITEM(found, i, THPVariable_Wrap(tensors[i]));
    return found;
}

// Null, without an exception, where the call is none for this way.
PyObject* result(const Caller& of, PyObject* const* given, Py_ssize_t count, PyObject* names, bool with_lse) {
    Given all;
    if (!may_take(count, 2, names) || !all.take_from(given)) return nullptr;
    const Call call = [&] {
        WithoutGil released;
        return Call(all.operands, all.sizes, of.spec, of.target, with_lse);
    }();
    if (!call.done) return nullptr;
    return with_lse ? pair(call.out, call.lse) : THPVariable_Wrap(call.out);
}

PyObject* gradients(const Caller& of, PyObject* const* given, Py_ssize_t count, PyObject* names) {
    at::Tensor grad_out, out, lse;
    Given all;
    const bool taken = (may_take(count, 6, names) || (may_take(count, 7, names) && given[6] == Py_None)) && PyList_CheckExact(given[5]) &&
                       take(given[0], grad_out) && all.take_from(given + 1) && take(given[3], out) && take(given[4], lse);
    if (!taken || size_t(PyList_GET_SIZE(given[5])) != all.operands.size()) return nullptr;
    c10::SmallVector<int64_t, 8> wanted;
    for (size_t i = 0; i < all.operands.size(); i++) wanted.push_back(PyList_GET_ITEM(given[5], i) == Py_True);
    std::vector<at::Tensor> found;
    const bool done = [&] {
        WithoutGil released;
        return gradients_by_kernel(found, grad_out, all.operands, all.sizes, out, lse, of.spec, of.target, wanted);
    }();
    return done ? list(found) : nullptr;
}

const Caller& caller_of(PyObject* self) { return *static_cast<const Caller*>(PyCapsule_GetPointer(self, nullptr)); }

// What goes wrong goes wrong again the long way, where torch says it in Python.
template <class Take>
PyObject* called(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names, Take take) {
    const Caller& of = caller_of(self);
    PyObject* found = nullptr;
    try {
        found = take(of);
    } catch (const std::exception&) {
    }
    return found || PyErr_Occurred() ? found : PyObject_Vectorcall(of.slow, given, count, names);
}

PyObject* call_attention(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names) {
    return called(self, given, count, names, [&](const Caller& of) { return result(of, given, count, names, false); });
}

PyObject* call_forward(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names) {
    return called(self, given, count, names, [&](const Caller& of) { return result(of, given, count, names, true); });
}

PyObject* call_backward(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names) {
    return called(self, given, count, names, [&](const Caller& of) { return gradients(of, given, count, names); });
}

#define FUSE_METHOD(name) {#name, reinterpret_cast<PyCFunction>(call_##name), METH_FASTCALL | METH_KEYWORDS, nullptr}
PyMethodDef methods[] = {FUSE_METHOD(attention), FUSE_METHOD(forward), FUSE_METHOD(backward)};

void forget(PyObject* capsule) {
    const Caller* const of = &caller_of(capsule);
    Py_DECREF(of->slow);
    delete of;
}

}  // namespace

// The address that Python knows a tensor by (Tensor._cdata), as it is read here.
EXPORTED int64_t fuse_reads(PyObject* tensor) { return reinterpret_cast<int64_t*>(tensor)[sizeof(PyObject) / sizeof(int64_t)]; }

// `which`: the number of one of the methods. A new reference, or null with an exception.
EXPORTED PyObject* fuse_caller(int which, const char* spec, const char* target, PyObject* slow) {
    Py_INCREF(slow);
    PyObject* const self = PyCapsule_New(new Caller{spec, target, slow}, nullptr, forget);
    PyObject* const found = self ? PyCFunction_New(&methods[which], self) : nullptr;
    Py_XDECREF(self);
    return found;
}
