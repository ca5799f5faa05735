// The only file that knows pybind11: checks, then a params struct, then the kernel of the device.
#include <algorithm>
#include <cmath>
#include <sstream>
#include <vector>

#include <pybind11/stl.h>

#include "concept_map.h"
#include "cpu.h"
#include "overlap.h"
#include "tensor_view.h"

namespace dlpack = biasmap::dlpack;
namespace py = pybind11;
using biasmap::CudaQueue;
using biasmap::Float;
using biasmap::kAny;
using biasmap::MapSets;
using biasmap::SoftMap;
using biasmap::TensorView;

namespace {

static_assert(sizeof(SoftMap) == 4 * sizeof(float), "state is a [..., 4] float32 tensor");

// The parts of the message are put together only if it is needed: this runs in every call.
template <typename... Parts> void require(bool good, const Parts &...parts) {
    if (good)
        return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

biasmap::SoftSettings soft_settings(double fraction, double temperature) {
    require(fraction > 0.0 && fraction < 1.0, "`fraction` must be in (0, 1), got ", fraction);
    require(temperature > 0.0 && std::isfinite(temperature),
            "`temperature` must be positive and finite, got ", temperature);
    return biasmap::soft_settings(fraction, temperature);
}

void check_pixels(int64_t pixels) {
    require(pixels > 0 && pixels < int64_t{1} << 31,
            "maps must have at least one pixel and fewer than 2^31, got ", pixels);
}

// The kernels of an op, for `launch`; of one that has none on the CPU.
#if defined(BIASMAP_CUDA_TOOLKIT)
#    define BIASMAP_ON_GPU(op) biasmap::op##_cuda
constexpr bool kHasCuda = true;
#else
#    define BIASMAP_ON_GPU(op) nullptr
constexpr bool kHasCuda = false;
#endif
#define BIASMAP_KERNELS(op) biasmap::op##_cpu, BIASMAP_ON_GPU(op)
#define BIASMAP_GPU_KERNELS(op) nullptr, BIASMAP_ON_GPU(op)

// Where the op runs: where its main tensor is, if there are kernels for that.
dlpack::Device device_of(const TensorView &tensor) {
    const bool on_gpu = kHasCuda && tensor.device().type == dlpack::kCuda;
    return on_gpu ? tensor.device() : biasmap::kOnCpu;
}

// What the ops on sets of maps have in common; returns where they run.
dlpack::Device take_sets(MapSets &p, const TensorView &maps, const TensorView &pairs) {
    const dlpack::Device device = device_of(maps);
    p.maps = maps.floats("maps", "[B, K, N]", {kAny, kAny, kAny}, device, p.type);
    p.batch = maps.size(0), p.concepts = maps.size(1), p.pixels = maps.size(2);
    p.pairs.data = pairs.data<int64_t>("pairs", "[P, 2]", {kAny, 2}, biasmap::kOnCpu);
    p.pairs.count = pairs.size(0);
    for (int64_t i = 0; i < 2 * p.pairs.count; ++i)
        require(p.pairs.data[i] >= 0 && p.pairs.data[i] < p.concepts, "pairs[", i / 2,
                "] names concept ", p.pairs.data[i], ", but `maps` has K = ", p.concepts,
                " concepts");
    require(device.type == dlpack::kCpu || (p.concepts <= biasmap::kMostConceptsOnGpu &&
                                            p.pairs.count <= biasmap::kMostPairsOnGpu),
            "`maps` on a GPU may have ", biasmap::kMostConceptsOnGpu, " concepts and ",
            biasmap::kMostPairsOnGpu, " pairs at most, got ", p.concepts, " and ", p.pairs.count);
    check_pixels(p.pixels);
    return device;
}

SoftMap *as_state(float *data) { return reinterpret_cast<SoftMap *>(data); }

template <typename Params>
void launch(dlpack::Device device, void (*on_cpu)(const Params &),
            void (*on_gpu)(const Params &, const CudaQueue &), const Params &params) {
    if (device.type == dlpack::kCpu) {
        require(on_cpu != nullptr, "this op has kernels for GPUs only, got tensors on the CPU");
        py::gil_scoped_release release;
        return on_cpu(params);
    }
    CudaQueue queue{device.id, nullptr};
    const auto *api = biasmap::TorchTensorType::get().api;
    if (api->current_work_stream(device.type, device.id, &queue.stream) != 0)
        throw py::error_already_set();
    py::gil_scoped_release release;
    on_gpu(params, queue);
}

void pairs_iou(const TensorView &maps, const TensorView &pairs, double percentile,
               const TensorView &iou, const TensorView &union_pixels, const TensorView &area,
               const TensorView &threshold) {
    biasmap::PairsIouParams p{};
    const dlpack::Device device = take_sets(p, maps, pairs);
    require(percentile >= 0.0 && percentile < 100.0, "`percentile` must be in [0, 100), got ",
            percentile);
    p.percentile = percentile;
    p.iou = iou.data<float>("iou", "[B, P]", {p.batch, p.pairs.count}, device);
    p.union_pixels =
        union_pixels.data<int32_t>("union", "[B, P]", {p.batch, p.pairs.count}, device);
    p.area = area.data<int32_t>("area", "[B, K]", {p.batch, p.concepts}, device);
    p.threshold = threshold.data<float>("threshold", "[B, K]", {p.batch, p.concepts}, device);
    launch<biasmap::PairsIouParams>(device, BIASMAP_KERNELS(pairs_iou), p);
}

// What both directions of an op have in common; these return where it runs.
dlpack::Device take_soft_topk(biasmap::SoftTopkParams &p, const TensorView &x, double fraction,
                              double temperature, const TensorView &mask, const TensorView &state) {
    const dlpack::Device device = device_of(x);
    p.x = x.floats("x", "[M, N]", {kAny, kAny}, device, p.type);
    p.rows = x.size(0), p.pixels = x.size(1);
    check_pixels(p.pixels);
    p.settings = soft_settings(fraction, temperature);
    p.mask = mask.data<float>("mask", "[M, N]", {p.rows, p.pixels}, device);
    p.state = as_state(state.data<float>("state", "[M, 4]", {p.rows, 4}, device));
    return device;
}

dlpack::Device take_soft_iou(biasmap::SoftIouParams &p, const TensorView &maps,
                             const TensorView &pairs, double fraction, double temperature,
                             const TensorView &iou, const TensorView &state,
                             const TensorView &means) {
    const dlpack::Device device = take_sets(p, maps, pairs);
    const int64_t batch = p.batch, concepts = p.concepts;
    p.settings = soft_settings(fraction, temperature);
    p.iou = iou.data<float>("iou", "[B, P]", {batch, p.pairs.count}, device);
    p.state = as_state(state.data<float>("state", "[B, K, 4]", {batch, concepts, 4}, device));
    p.means = means.data<float>("means", "[B, K, K]", {batch, concepts, concepts}, device);
    return device;
}

void soft_topk(const TensorView &x, double fraction, double temperature, const TensorView &mask,
               const TensorView &state) {
    biasmap::SoftTopkParams p{};
    const dlpack::Device device = take_soft_topk(p, x, fraction, temperature, mask, state);
    launch<biasmap::SoftTopkParams>(device, BIASMAP_KERNELS(soft_topk), p);
}

void soft_topk_backward(const TensorView &grad, const TensorView &x, double fraction,
                        double temperature, const TensorView &mask, const TensorView &state,
                        const TensorView &grad_x) {
    biasmap::SoftTopkBackwardParams p{};
    const dlpack::Device device = take_soft_topk(p, x, fraction, temperature, mask, state);
    p.grad = grad.data<float>("grad", "[M, N]", {p.rows, p.pixels}, device);
    p.grad_x = grad_x.floats("grad_x", "[M, N]", {p.rows, p.pixels}, device, p.type);
    launch<biasmap::SoftTopkBackwardParams>(device, BIASMAP_KERNELS(soft_topk_backward), p);
}

void soft_iou(const TensorView &maps, const TensorView &pairs, double fraction, double temperature,
              const TensorView &iou, const TensorView &state, const TensorView &means) {
    biasmap::SoftIouParams p{};
    const dlpack::Device device =
        take_soft_iou(p, maps, pairs, fraction, temperature, iou, state, means);
    launch<biasmap::SoftIouParams>(device, BIASMAP_KERNELS(soft_iou), p);
}

void soft_iou_backward(const TensorView &grad, const TensorView &maps, const TensorView &pairs,
                       double fraction, double temperature, const TensorView &iou,
                       const TensorView &state, const TensorView &means,
                       const TensorView &grad_maps) {
    biasmap::SoftIouBackwardParams p{};
    const dlpack::Device device =
        take_soft_iou(p, maps, pairs, fraction, temperature, iou, state, means);
    p.grad = grad.data<float>("grad", "[B, P]", {p.batch, p.pairs.count}, device);
    p.grad_maps =
        grad_maps.floats("grad_maps", "[B, K, N]", {p.batch, p.concepts, p.pixels}, device, p.type);
    launch<biasmap::SoftIouBackwardParams>(device, BIASMAP_KERNELS(soft_iou_backward), p);
}

bool is_wide(const void *data, const int64_t (&strides)[4]) {
    const auto whole = [](int64_t stride) { return stride % biasmap::kChunk == 0; };
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[3] == 1 &&
           std::all_of(strides, strides + 3, whole);
}

dlpack::Device take_attention(biasmap::Attention &p, const TensorView &query,
                              const TensorView &keys, const TensorView &weights) {
    const dlpack::Device device = device_of(query);
    p.query = query.floats("query", "[B, heads, n, d]", {kAny, kAny, kAny, kAny}, device, p.type,
                           p.strides);
    p.batch = query.size(0), p.heads = query.size(1);
    p.pixels = query.size(2), p.depth = query.size(3);
    p.keys = keys.data<float>("keys", "[heads, T', d]", {p.heads, kAny, p.depth}, device);
    p.tokens = keys.size(1);
    p.weights = weights.data<float>("weights", "[K, T']", {kAny, p.tokens}, device);
    p.concepts = weights.size(0);
    require(p.heads > 0 && p.depth > 0 && p.batch * p.pixels < int64_t{1} << 31,
            "`query` must have heads and d, and fewer than 2^31 pixels in all");
    require(p.tokens > 0 && p.tokens <= biasmap::kMostTokens &&
                p.concepts <= biasmap::kMostConceptsOnGpu,
            "`keys` must have 1 to ", biasmap::kMostTokens, " tokens and `weights` at most ",
            biasmap::kMostConceptsOnGpu, " concepts, got ", p.tokens, " and ", p.concepts);
    require(p.depth % biasmap::kChunk == 0 && is_wide(p.query, p.strides) &&
                reinterpret_cast<uintptr_t>(p.keys) % 16 == 0,
            "`query` and `keys` must be aligned to 16 bytes and have d and strides that are "
            "multiples of ",
            biasmap::kChunk);
    return device;
}

void concept_map(const TensorView &query, const TensorView &keys, const TensorView &weights,
                 const TensorView &maps, bool add) {
    biasmap::ConceptMapParams p{};
    const dlpack::Device device = take_attention(p, query, keys, weights);
    p.maps = maps.data<float>("maps", "[B, K, n]", {p.batch, p.concepts, p.pixels}, device);
    p.add = add;
    launch<biasmap::ConceptMapParams>(device, BIASMAP_GPU_KERNELS(concept_map), p);
}

void concept_map_backward(const TensorView &grad, const TensorView &query, const TensorView &keys,
                          const TensorView &weights, const TensorView &grad_query) {
    biasmap::ConceptMapBackwardParams p{};
    const dlpack::Device device = take_attention(p, query, keys, weights);
    p.grad = grad.data<float>("grad", "[B, K, n]", {p.batch, p.concepts, p.pixels}, device);
    p.grad_query =
        grad_query.floats("grad_query", "[B, heads, n, d]", {p.batch, p.heads, p.pixels, p.depth},
                          device, p.type, p.grad_strides);
    require(is_wide(p.grad_query, p.grad_strides), "`grad_query` must be aligned like `query`");
    launch<biasmap::ConceptMapBackwardParams>(device, BIASMAP_GPU_KERNELS(concept_map_backward), p);
}

void prompt_maps(const TensorView &query, const TensorView &keys, const TensorView &members,
                 const TensorView &weights, const std::vector<py::object> &maps) {
    const dlpack::Device device = biasmap::kOnCpu;
    biasmap::PromptMapsParams p{};
    Float type{};
    p.query = static_cast<const float *>(
        query.floats("query", "[B, n, heads * d]", {kAny, kAny, kAny}, device, type, p.strides));
    p.batch = query.size(0), p.pixels = query.size(1);
    p.keys = keys.data<float>("keys", "[heads, U, d]", {kAny, kAny, kAny}, device);
    p.heads = keys.size(0), p.tokens = keys.size(1), p.depth = keys.size(2);
    require(query.size(2) == p.heads * p.depth, "`query` must have the heads * d = ", p.heads,
            " * ", p.depth, " columns of `keys`, got ", query.size(2));
    p.members = members.data<float>("members", "[P, U]", {kAny, p.tokens}, device);
    p.prompts = members.size(0);
    p.weights = weights.data<float>("weights", "[P, K, U]", {p.prompts, kAny, p.tokens}, device);
    p.concepts = weights.size(1);
    std::vector<biasmap::PromptMaps> targets;
    for (const py::object &object : maps) { // held here: an iterator may hold its tensors no longer
        const auto tensor = object.cast<TensorView>();
        biasmap::PromptMaps target{};
        target.data = static_cast<float *>(tensor.floats("maps", "[P', B, K, n]",
                                                         {kAny, p.batch, p.concepts, p.pixels},
                                                         device, type, target.strides));
        target.prompts = tensor.size(0);
        require(target.prompts <= p.prompts, "`maps` must be of ", p.prompts,
                " prompts at most, got ", target.prompts);
        require(p.pixels == 1 || target.strides[3] == 1, "`maps` must have pixels in a row");
        targets.push_back(target);
    }
    p.maps = targets.data(), p.targets = static_cast<int64_t>(targets.size());
    require(p.tokens > 0, "`keys` must have tokens");
    for (int64_t prompt = 0; prompt < p.prompts; ++prompt) {
        const float *counts = p.members + prompt * p.tokens;
        require(std::any_of(counts, counts + p.tokens, [](float count) { return count != 0.0f; }),
                "members[", prompt, "] names no token");
    }
    py::gil_scoped_release release;
    biasmap::prompt_maps_cpu(p);
}

std::string cuda_refusal([[maybe_unused]] int device) {
    if constexpr (kHasCuda)
        return biasmap::cuda_refusal(device);
    return "this build has no CUDA kernels";
}

py::dict build_info() {
    py::dict info;
    info["version"] = BIASMAP_VERSION;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["openmp"] = _OPENMP;
    const int level = biasmap::x86_level();
    info["isa"] = level ? "x86-64-v" + std::to_string(level) : "baseline";
#if defined(BIASMAP_CUDA_TOOLKIT)
    info["cuda"] = py::dict(py::arg("toolkit") = BIASMAP_CUDA_TOOLKIT,
                            py::arg("architectures") = BIASMAP_CUDA_ARCHITECTURES);
#else
    info["cuda"] = false;
#endif
    return info;
}

template <typename Function, typename... Names>
void def(py::module_ &m, const char *name, Function function, const char *doc, Names... names) {
    m.def(name, function, doc, py::arg(names)...);
}

} // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "Native kernels. Outputs are allocated by the caller; see ops.py.";
    m.attr("__version__") = BIASMAP_VERSION;
    m.attr("most_pairs_on_gpu") = biasmap::kMostPairsOnGpu;
    m.attr("most_tokens") = biasmap::kMostTokens;
    m.attr("most_concepts_on_gpu") = biasmap::kMostConceptsOnGpu;
    def(m, "build_info", build_info, "What this module was compiled with, and runs with here.");
    def(m, "cuda_refusal", cuda_refusal, "Why a GPU cannot run these kernels; empty if it can.",
        "device");
    def(m, "pairs_iou", pairs_iou, "Hard percentile IoU of concept pairs.", "maps", "pairs",
        "percentile", "iou", "union", "area", "threshold");
    def(m, "soft_topk", soft_topk, "Exact soft top-k mask of each row.", "x", "fraction",
        "temperature", "mask", "state");
    def(m, "soft_topk_backward", soft_topk_backward, "Implicit gradient of soft_topk.", "grad", "x",
        "fraction", "temperature", "mask", "state", "grad_x");
    def(m, "soft_iou", soft_iou, "SoftIoU of concept pairs.", "maps", "pairs", "fraction",
        "temperature", "iou", "state", "means");
    def(m, "soft_iou_backward", soft_iou_backward, "Gradient of soft_iou.", "grad", "maps", "pairs",
        "fraction", "temperature", "iou", "state", "means", "grad_maps");
    m.def("concept_map", concept_map, "Attribution maps of one layer from its queries.",
          py::arg("query"), py::arg("keys"), py::arg("weights"), py::arg("maps"),
          py::arg("add") = false);
    def(m, "concept_map_backward", concept_map_backward, "Gradient of concept_map to the queries.",
        "grad", "query", "keys", "weights", "grad_query");
    def(m, "prompt_maps", prompt_maps, "Adds attribution maps of prompts that share their tokens.",
        "query", "keys", "members", "weights", "maps");
}
