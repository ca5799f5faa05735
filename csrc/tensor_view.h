// A view of a torch tensor through DLPack's C exchange table: no libtorch, 0.1 us a tensor.
// The structs restate the ABI of the DLPack 1.3 specification (dmlc/dlpack, dlpack.h).
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include "device.h"

namespace biasmap {

namespace dlpack {

struct Device {
    int32_t type, id;
};
struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct Tensor {
    void *data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t *shape;
    int64_t *strides; // in elements
    uint64_t byte_offset;
};
struct ExchangeApi {
    uint32_t major, minor;
    void *prev_api;
    void *managed_tensor_allocator;
    void *managed_tensor_from_py_object_no_sync;
    void *managed_tensor_to_py_object_no_sync;
    int (*dltensor_from_py_object_no_sync)(void *py_object, Tensor *out);
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out_stream);
};

constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6; // of dtypes

} // namespace dlpack

template <typename T> constexpr dlpack::DataType dtype_of();
template <> constexpr dlpack::DataType dtype_of<float>() { return {dlpack::kFloat, 32, 1}; }
template <> constexpr dlpack::DataType dtype_of<int32_t>() { return {dlpack::kInt, 32, 1}; }
template <> constexpr dlpack::DataType dtype_of<int64_t>() { return {dlpack::kInt, 64, 1}; }

inline std::string to_string(dlpack::DataType dtype) {
    static const char *const names[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
    if (dtype.code == dlpack::kBool)
        return "bool";
    return dtype.code < 6 ? names[dtype.code] + std::to_string(dtype.bits) : "another dtype";
}

inline std::string to_string(dlpack::Device device) {
    if (device.type == dlpack::kCpu)
        return "the CPU";
    return device.type == dlpack::kCuda ? "cuda:" + std::to_string(device.id) : "another device";
}

constexpr int64_t kAny = -1;
constexpr dlpack::Device kOnCpu{dlpack::kCpu, 0};

class TensorView {
public:
    // The data as T*, null if empty, after checking everything a kernel relies on. `shape` may hold
    // kAny; `layout` names the dimensions in the error text.
    template <typename T>
    T *data(const char *name, const char *layout, std::initializer_list<int64_t> shape,
            dlpack::Device device) const {
        constexpr dlpack::DataType want = dtype_of<T>();
        const bool good = is_at(device) && is_contiguous() && has(shape) &&
                          view_.dtype.code == want.code && view_.dtype.bits == want.bits;
        if (!good)
            refuse(name, expected(layout, shape) + " " + to_string(want) + " contiguous", device);
        return static_cast<T *>(address());
    }

    // The same for numbers of a type that the kernels of the device read: of `type`, unless that is
    // kAny and then set. With `strides`, in elements, they may be any.
    void *floats(const char *name, const char *layout, std::initializer_list<int64_t> shape,
                 dlpack::Device device, Float &type, int64_t *strides = nullptr) const {
        if (!(is_at(device) && has(shape) && has_float_type(device, type) &&
              (strides != nullptr || is_contiguous())))
            refuse(name,
                   expected(layout, shape) + float_types(device) + (strides ? "" : " contiguous"),
                   device);
        if (strides != nullptr)
            std::copy_n(view_.strides, view_.ndim, strides);
        return address();
    }

    dlpack::Device device() const { return view_.device; }
    int64_t size(int32_t dim) const { return view_.shape[dim]; }

private:
    friend struct pybind11::detail::type_caster<TensorView>;

    bool is_at(dlpack::Device device) const {
        return view_.device.type == device.type &&
               (device.type == dlpack::kCpu || view_.device.id == device.id);
    }

    bool has(std::initializer_list<int64_t> shape) const {
        bool good = view_.ndim == static_cast<int32_t>(shape.size());
        const int64_t *dim = view_.shape;
        for (auto it = shape.begin(); good && it != shape.end(); ++it, ++dim)
            good = *it == kAny || *it == *dim;
        return good;
    }

    bool has_float_type(dlpack::Device device, Float &type) const {
        const dlpack::DataType dtype = view_.dtype;
        const bool half = dtype.bits == 16 && reads_half(device);
        const Float has = dtype.code == dlpack::kFloat && dtype.bits == 32 ? Float::kFloat32
                          : half && dtype.code == dlpack::kFloat           ? Float::kFloat16
                          : half && dtype.code == dlpack::kBfloat          ? Float::kBfloat16
                                                                           : Float::kAny;
        const bool good = has != Float::kAny && (type == Float::kAny || type == has);
        type = good ? has : type;
        return good;
    }

    // ops.py widens half types on the CPU.
    static bool reads_half(dlpack::Device device) { return device.type == dlpack::kCuda; }

    static const char *float_types(dlpack::Device device) {
        return reads_half(device) ? " float32, float16 or bfloat16" : " float32";
    }

    void *address() const { return static_cast<char *>(view_.data) + view_.byte_offset; }

    [[noreturn]] void refuse(const char *name, const std::string &wanted,
                             dlpack::Device device) const {
        throw std::invalid_argument("`" + std::string(name) + "` must be " + wanted + " on " +
                                    to_string(device) + ", got " + describe(device));
    }

    bool is_contiguous() const {
        int64_t stride = 1, count = 1;
        bool packed = true;
        for (int32_t d = view_.ndim - 1; d >= 0; --d) {
            packed = packed && (view_.shape[d] == 1 || view_.strides[d] == stride);
            stride *= view_.shape[d];
            count *= view_.shape[d];
        }
        return packed || count == 0;
    }

    static std::string expected(const char *layout, std::initializer_list<int64_t> shape) {
        std::string sizes;
        bool known = true;
        for (const int64_t size : shape) {
            sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
            known = known && size != kAny;
        }
        return known ? std::string(layout) + " = [" + sizes + "]" : std::string(layout);
    }

    std::string describe(dlpack::Device wanted) const {
        std::string text = "[";
        for (int32_t d = 0; d < view_.ndim; ++d)
            text += (d ? ", " : "") + std::to_string(view_.shape[d]);
        text += "] " + to_string(view_.dtype);
        if (!is_contiguous())
            text += ", not contiguous";
        if (!is_at(wanted))
            text += ", on " + to_string(view_.device);
        return text;
    }

    dlpack::Tensor view_{};
};

struct TorchTensorType {
    PyObject *type; // torch.Tensor, held for the life of the process
    const dlpack::ExchangeApi *api;

    static const TorchTensorType &get() {
        static pybind11::gil_safe_call_once_and_store<TorchTensorType> storage;
        return storage.call_once_and_store_result(load).get_stored();
    }

private:
    static TorchTensorType load() {
        pybind11::object type = pybind11::module_::import("torch").attr("Tensor");
        pybind11::object capsule =
            pybind11::getattr(type, "__dlpack_c_exchange_api__", pybind11::none());
        const auto *api = static_cast<const dlpack::ExchangeApi *>(
            PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (api == nullptr || api->major != 1) {
            PyErr_Clear();
            throw pybind11::import_error(
                "torch >= 2.11 required: this torch.Tensor has no DLPack 1.x C exchange table");
        }
        return {type.release().ptr(), api};
    }
};

} // namespace biasmap

namespace pybind11::detail {

template <> struct type_caster<biasmap::TensorView> {
    PYBIND11_TYPE_CASTER(biasmap::TensorView, const_name("torch.Tensor"));

    bool load(handle source, bool) {
        const auto &torch = biasmap::TorchTensorType::get();
        const std::string name = Py_TYPE(source.ptr())->tp_name;
        if (PyObject_TypeCheck(source.ptr(), reinterpret_cast<PyTypeObject *>(torch.type)) == 0)
            throw type_error("expected a torch tensor, got " + name);
        if (torch.api->dltensor_from_py_object_no_sync(source.ptr(), &value.view_) != 0) {
            PyErr_Clear();
            throw type_error("expected a dense torch tensor with its own memory, got " + name);
        }
        return true;
    }
};

} // namespace pybind11::detail
