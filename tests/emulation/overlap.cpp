#include "overlap_cuda.cu"

#include "tensor_view.h"

namespace biasmap {
namespace {

// What the kernels call `extern __shared__`.
thread_local float dynamic_shared[96 * 1024 / sizeof(float)];

const dlpack::ExchangeApi *torch_api;

// A CPU tensor as one on cuda:0, but for pairs of concepts, which may lie on either; `pairs_on_gpu`
// says where.
bool pairs_on_gpu;

int as_cuda(void *object, dlpack::Tensor *out) {
    const int status = torch_api->dltensor_from_py_object_no_sync(object, out);
    if (status == 0 && (pairs_on_gpu || out->dtype.code != dlpack::kInt || out->ndim != 2 ||
                        out->dtype.bits != 64))
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

extern "C" __attribute__((visibility("default"))) void emulated_pairs_on_gpu(int on_gpu) {
    biasmap::pairs_on_gpu = on_gpu != 0;
}
