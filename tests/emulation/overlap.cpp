#include "overlap_cuda.cu"

#include "tensor_view.h"

namespace biasmap {
namespace {

// What the kernels call `extern __shared__`.
thread_local float dynamic_shared[96 * 1024 / sizeof(float)];

const dlpack::ExchangeApi *torch_api;

// A CPU tensor as one on cuda:0, but for pairs of concepts.
int as_cuda(void *object, dlpack::Tensor *out) {
    const int status = torch_api->dltensor_from_py_object_no_sync(object, out);
    if (status == 0 && (out->dtype.code != dlpack::kInt || out->dtype.bits != 64))
        out->device = {dlpack::kCuda, 0};
    return status;
}

int no_stream(int32_t, int32_t, void **stream) {
    *stream = nullptr;
    return 0;
}

} // namespace
} // namespace biasmap

// The exchange table of torch as it would be if every tensor were on a GPU.
extern "C" __attribute__((visibility("default"))) PyObject *emulated_table(PyObject *capsule) {
    using biasmap::dlpack::ExchangeApi;
    static ExchangeApi api;
    biasmap::torch_api =
        static_cast<const ExchangeApi *>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    api = *biasmap::torch_api;
    api.dltensor_from_py_object_no_sync = biasmap::as_cuda;
    api.current_work_stream = biasmap::no_stream;
    return PyCapsule_New(&api, "dlpack_exchange_api", nullptr);
}

extern "C" __attribute__((visibility("default"))) void emulated_usable(int usable) {
    emulation::usable = usable != 0;
}
