// The only file that knows pybind11: checks, then a params struct, then the kernel of the device.
#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <vector>

#include <pybind11/stl.h>

#include "concept_map.h"
#include "overlap.h"
#include "tensor_view.h"

namespace dlpack = biasmap::dlpack;
namespace py = pybind11;
using biasmap::CudaQueue;
using biasmap::Float;
using biasmap::kAny;
using biasmap::Pairs;
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

void check_soft(double fraction, double temperature) {
    require(fraction > 0.0 && fraction < 1.0, "`fraction` must be in (0, 1), got ", fraction);
    require(temperature > 0.0 && std::isfinite(temperature),
            "`temperature` must be positive and finite, got ", temperature);
}

void check_pixels(int64_t pixels) {
    require(pixels > 0, "maps must have at least one pixel");
    require(pixels <= std::numeric_limits<int32_t>::max(), "maps must have fewer than 2^31 pixels");
}

// Where the op runs: where its main tensor is, if there are kernels for that.
dlpack::Device place_of(const TensorView &tensor) {
#if defined(BIASMAP_CUDA_TOOLKIT)
    if (tensor.device().type == dlpack::kCuda)
        return tensor.device();
#else
    (void)tensor;
#endif
    return biasmap::kOnCpu;
}

void check_concepts(int64_t concepts, dlpack::Device place) {
    require(place.type == dlpack::kCpu || concepts <= biasmap::kMostConceptsOnGpu,
            "`maps` on a GPU may have ", biasmap::kMostConceptsOnGpu, " concepts at most, got ",
            concepts);
}

// Pairs may lie on the host whatever the maps' device: kernels then get them by value.
Pairs checked_pairs(const TensorView &pairs, int64_t concepts, dlpack::Device place) {
    check_concepts(concepts, place);
    const bool on_host = pairs.device().type == dlpack::kCpu;
    const auto *data =
        pairs.data<int64_t>("pairs", "[P, 2]", {kAny, 2}, on_host ? biasmap::kOnCpu : place);
    const int64_t count = pairs.size(0);
    if (on_host)
        for (int64_t i = 0; i < 2 * count; ++i)
            require(data[i] >= 0 && data[i] < concepts, "pairs[", i / 2, "] names concept ",
                    data[i], ", but `maps` has K = ", concepts, " concepts");
    require(place.type == dlpack::kCpu || !on_host || count <= biasmap::kPairsByValue, "more than ",
            biasmap::kPairsByValue, " `pairs` must be on the maps' GPU, got ", count,
            " on the CPU");
    return {data, count, on_host};
}

SoftMap *as_state(float *data) { return reinterpret_cast<SoftMap *>(data); }

// The kernels of an op, for `launch`.
#if defined(BIASMAP_CUDA_TOOLKIT)
#    define BIASMAP_CUDA_KERNEL(op) biasmap::op##_cuda
#else
#    define BIASMAP_CUDA_KERNEL(op) nullptr
#endif
#define BIASMAP_KERNELS(op) biasmap::op##_cpu, BIASMAP_CUDA_KERNEL(op)

template <typename Params> using CudaKernel = void (*)(const Params &, const CudaQueue &);

template <typename Params>
void launch(dlpack::Device place, CudaKernel<Params> kernel, const Params &params) {
    require(place.type == dlpack::kCuda && kernel != nullptr,
            "this op has kernels for GPUs only, got tensors on ", biasmap::to_string(place));
    CudaQueue queue{place.id, nullptr};
    const auto *api = biasmap::TorchTensorType::get().api;
    if (api->current_work_stream(place.type, place.id, &queue.stream) != 0)
        throw py::error_already_set();
    py::gil_scoped_release release;
    kernel(params, queue);
}

template <typename Params>
void launch(dlpack::Device place, void (*on_cpu)(const Params &), CudaKernel<Params> on_cuda,
            const Params &params) {
    if (place.type != dlpack::kCpu)
        return launch(place, on_cuda, params);
    py::gil_scoped_release release;
    on_cpu(params);
}

int64_t words_for(int64_t concepts, int64_t pixels, dlpack::Device place) {
    return biasmap::mask_words(concepts, pixels, place.type != dlpack::kCpu);
}

int64_t mask_words(const TensorView &maps) {
    const dlpack::Device place = place_of(maps);
    Float type{};
    maps.floats("maps", "[B, K, N]", {kAny, kAny, kAny}, place, type);
    return words_for(maps.size(1), maps.size(2), place);
}

void pairs_iou(const TensorView &maps, const TensorView &pairs, double percentile,
               const TensorView &iou, const TensorView &union_pixels, const TensorView &area,
               const TensorView &masks) {
    const dlpack::Device place = place_of(maps);
    biasmap::PairsIouParams p{};
    p.maps = maps.floats("maps", "[B, K, N]", {kAny, kAny, kAny}, place, p.type);
    p.batch = maps.size(0), p.concepts = maps.size(1), p.pixels = maps.size(2);
    p.pairs = checked_pairs(pairs, p.concepts, place);
    p.percentile = percentile;
    check_pixels(p.pixels);
    require(percentile >= 0.0 && percentile < 100.0, "`percentile` must be in [0, 100), got ",
            percentile);
    p.iou = iou.data<float>("iou", "[B, P]", {p.batch, p.pairs.count}, place);
    p.union_pixels = union_pixels.data<int32_t>("union", "[B, P]", {p.batch, p.pairs.count}, place);
    p.area = area.data<int32_t>("area", "[B, K]", {p.batch, p.concepts}, place);
    const int64_t words = words_for(p.concepts, p.pixels, place);
    p.masks = reinterpret_cast<uint64_t *>(
        masks.data<int64_t>("masks", "[B, K, mask_words]", {p.batch, p.concepts, words}, place));
    launch<biasmap::PairsIouParams>(place, BIASMAP_KERNELS(pairs_iou), p);
}

void soft_topk(const TensorView &x, double fraction, double temperature, const TensorView &mask,
               const TensorView &state) {
    const dlpack::Device place = place_of(x);
    biasmap::SoftTopkParams p{};
    p.x = x.floats("x", "[M, N]", {kAny, kAny}, place, p.type);
    p.rows = x.size(0), p.pixels = x.size(1);
    p.fraction = fraction, p.temperature = temperature;
    check_pixels(p.pixels);
    check_soft(fraction, temperature);
    p.mask = mask.data<float>("mask", "[M, N]", {p.rows, p.pixels}, place);
    p.state = as_state(state.data<float>("state", "[M, 4]", {p.rows, 4}, place));
    launch<biasmap::SoftTopkParams>(place, BIASMAP_KERNELS(soft_topk), p);
}

void soft_topk_backward(const TensorView &grad, const TensorView &mask, const TensorView &state,
                        const TensorView &grad_x) {
    const dlpack::Device place = place_of(mask);
    biasmap::SoftTopkBackwardParams p{};
    p.mask = mask.data<float>("mask", "[M, N]", {kAny, kAny}, place);
    p.rows = mask.size(0), p.pixels = mask.size(1);
    p.grad = grad.data<float>("grad", "[M, N]", {p.rows, p.pixels}, place);
    p.state = as_state(state.data<float>("state", "[M, 4]", {p.rows, 4}, place));
    p.grad_x = grad_x.data<float>("grad_x", "[M, N]", {p.rows, p.pixels}, place);
    launch<biasmap::SoftTopkBackwardParams>(place, BIASMAP_KERNELS(soft_topk_backward), p);
}

void soft_iou(const TensorView &maps, const TensorView &pairs, double fraction, double temperature,
              const TensorView &iou, const TensorView &state) {
    const dlpack::Device place = place_of(maps);
    biasmap::SoftIouParams p{};
    p.maps = maps.floats("maps", "[B, K, N]", {kAny, kAny, kAny}, place, p.type);
    p.batch = maps.size(0), p.concepts = maps.size(1), p.pixels = maps.size(2);
    p.pairs = checked_pairs(pairs, p.concepts, place);
    p.fraction = fraction, p.temperature = temperature;
    check_pixels(p.pixels);
    check_soft(fraction, temperature);
    p.iou = iou.data<float>("iou", "[B, P]", {p.batch, p.pairs.count}, place);
    p.state = as_state(state.data<float>("state", "[B, K, 4]", {p.batch, p.concepts, 4}, place));
    launch<biasmap::SoftIouParams>(place, BIASMAP_KERNELS(soft_iou), p);
}

void soft_iou_backward(const TensorView &grad, const TensorView &iou, const TensorView &maps,
                       const TensorView &pairs, const TensorView &state, double fraction,
                       const TensorView &grad_maps) {
    const dlpack::Device place = place_of(maps);
    biasmap::SoftIouBackwardParams p{};
    p.maps = maps.floats("maps", "[B, K, N]", {kAny, kAny, kAny}, place, p.type);
    p.batch = maps.size(0), p.concepts = maps.size(1), p.pixels = maps.size(2);
    p.pairs = checked_pairs(pairs, p.concepts, place);
    p.fraction = fraction;
    check_pixels(p.pixels);
    check_soft(fraction, 1.0);
    p.grad = grad.data<float>("grad", "[B, P]", {p.batch, p.pairs.count}, place);
    p.iou = iou.data<float>("iou", "[B, P]", {p.batch, p.pairs.count}, place);
    p.state = as_state(state.data<float>("state", "[B, K, 4]", {p.batch, p.concepts, 4}, place));
    Float type{};
    p.grad_maps =
        grad_maps.floats("grad_maps", "[B, K, N]", {p.batch, p.concepts, p.pixels}, place, type);
    require(type == p.type, "`grad_maps` must be of the dtype of `maps`");
    launch<biasmap::SoftIouBackwardParams>(place, BIASMAP_KERNELS(soft_iou_backward), p);
}

// What both directions of the concept maps have in common.
template <typename Params>
void take_attention(Params &p, const TensorView &query, const TensorView &keys,
                    const TensorView &weights, dlpack::Device place) {
    p.query = query.strided_floats("query", "[B, heads, n, d]", {kAny, kAny, kAny, kAny}, place,
                                   p.type, p.strides);
    p.batch = query.size(0), p.heads = query.size(1);
    p.pixels = query.size(2), p.depth = query.size(3);
    p.keys = keys.data<float>("keys", "[heads, T', d]", {p.heads, kAny, p.depth}, place);
    p.tokens = keys.size(1);
    p.weights = weights.data<float>("weights", "[K, T']", {kAny, p.tokens}, place);
    p.concepts = weights.size(0);
    require(p.heads > 0 && p.depth > 0 && p.tokens > 0,
            "queries and keys must have heads, tokens and d, got ", p.heads, ", ", p.tokens,
            " and ", p.depth);
    require(p.batch * p.pixels <= std::numeric_limits<int32_t>::max(),
            "`query` must have fewer than 2^31 pixels in all");
    require(p.tokens <= biasmap::kMostTokens, "`keys` may have ", biasmap::kMostTokens,
            " tokens at most, got ", p.tokens);
}

void concept_map(const TensorView &query, const TensorView &keys, const TensorView &weights,
                 const TensorView &maps, bool add) {
    const dlpack::Device place = place_of(query);
    biasmap::ConceptMapParams p{};
    take_attention(p, query, keys, weights, place);
    p.maps = maps.data<float>("maps", "[B, K, n]", {p.batch, p.concepts, p.pixels}, place);
    p.add = add;
    launch<biasmap::ConceptMapParams>(place, BIASMAP_CUDA_KERNEL(concept_map), p);
}

void concept_map_backward(const TensorView &grad, const TensorView &query, const TensorView &keys,
                          const TensorView &weights, const TensorView &grad_query) {
    const dlpack::Device place = place_of(query);
    biasmap::ConceptMapBackwardParams p{};
    take_attention(p, query, keys, weights, place);
    p.grad = grad.data<float>("grad", "[B, K, n]", {p.batch, p.concepts, p.pixels}, place);
    Float type{};
    p.grad_query = grad_query.strided_floats("grad_query", "[B, heads, n, d]",
                                             {p.batch, p.heads, p.pixels, p.depth}, place, type,
                                             p.grad_strides);
    require(type == p.type, "`grad_query` must be of the dtype of `query`");
    launch<biasmap::ConceptMapBackwardParams>(place, BIASMAP_CUDA_KERNEL(concept_map_backward), p);
}

void prompt_maps(const TensorView &query, const TensorView &keys, const TensorView &members,
                 const TensorView &weights, const std::vector<TensorView> &maps) {
    const dlpack::Device place = biasmap::kOnCpu;
    biasmap::PromptMapsParams p{};
    Float type{};
    p.query = static_cast<const float *>(query.strided_floats(
        "query", "[B, n, heads * d]", {kAny, kAny, kAny}, place, type, p.strides));
    p.batch = query.size(0), p.pixels = query.size(1);
    p.keys = keys.data<float>("keys", "[heads, U, d]", {kAny, kAny, kAny}, place);
    p.heads = keys.size(0), p.tokens = keys.size(1), p.depth = keys.size(2);
    require(query.size(2) == p.heads * p.depth, "`query` must have the heads * d = ", p.heads,
            " * ", p.depth, " columns of `keys`, got ", query.size(2));
    p.members = members.data<float>("members", "[P, U]", {kAny, p.tokens}, place);
    p.prompts = members.size(0);
    p.weights = weights.data<float>("weights", "[P, K, U]", {p.prompts, kAny, p.tokens}, place);
    p.concepts = weights.size(1);
    std::vector<biasmap::PromptMaps> targets;
    for (const TensorView &each : maps) {
        biasmap::PromptMaps target{};
        target.data = static_cast<float *>(
            each.strided_floats("maps", "[P', B, K, n]", {kAny, p.batch, p.concepts, p.pixels},
                                place, type, target.strides));
        target.prompts = each.size(0);
        require(target.prompts <= p.prompts, "`maps` must be of ", p.prompts,
                " prompts at most, got ", target.prompts);
        require(p.pixels == 1 || target.strides[3] == 1, "`maps` must have pixels in a row");
        targets.push_back(target);
    }
    p.maps = targets.data(), p.targets = static_cast<int64_t>(targets.size());
    require(p.tokens > 0, "`keys` must have tokens");
    for (int64_t prompt = 0; prompt < p.prompts; ++prompt) {
        const float *own = p.members + prompt * p.tokens;
        require(std::any_of(own, own + p.tokens, [](float count) { return count != 0.0f; }),
                "members[", prompt, "] names no token");
    }
    py::gil_scoped_release release;
    biasmap::prompt_maps_cpu(p);
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
    info["isa"] = biasmap::cpu_isa();
#if defined(BIASMAP_CUDA_TOOLKIT)
    info["cuda"] = py::dict(py::arg("toolkit") = BIASMAP_CUDA_TOOLKIT,
                            py::arg("architectures") = BIASMAP_CUDA_ARCHITECTURES);
#else
    info["cuda"] = false;
#endif
    return info;
}

} // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "Native kernels. Outputs are allocated by the caller; see ops.py.";
    m.attr("__version__") = BIASMAP_VERSION;
    m.attr("pairs_by_value") = biasmap::kPairsByValue;
    m.attr("most_tokens") = biasmap::kMostTokens;
    m.attr("most_concepts_on_gpu") = biasmap::kMostConceptsOnGpu;
    m.def("build_info", build_info, "What this module was compiled with, and runs with here.");
    m.def("mask_words", mask_words, "Last size of the scratch that pairs_iou needs for these maps.",
          py::arg("maps"));
    m.def("pairs_iou", pairs_iou, "Hard percentile IoU of concept pairs.", py::arg("maps"),
          py::arg("pairs"), py::arg("percentile"), py::arg("iou"), py::arg("union"),
          py::arg("area"), py::arg("masks"));
    m.def("soft_topk", soft_topk, "Exact soft top-k mask of each row.", py::arg("x"),
          py::arg("fraction"), py::arg("temperature"), py::arg("mask"), py::arg("state"));
    m.def("soft_topk_backward", soft_topk_backward, "Implicit gradient of soft_topk.",
          py::arg("grad"), py::arg("mask"), py::arg("state"), py::arg("grad_x"));
    m.def("soft_iou", soft_iou, "SoftIoU of concept pairs.", py::arg("maps"), py::arg("pairs"),
          py::arg("fraction"), py::arg("temperature"), py::arg("iou"), py::arg("state"));
    m.def("soft_iou_backward", soft_iou_backward, "Gradient of soft_iou.", py::arg("grad"),
          py::arg("iou"), py::arg("maps"), py::arg("pairs"), py::arg("state"), py::arg("fraction"),
          py::arg("grad_maps"));
    m.def("concept_map", concept_map, "Attribution maps of one layer from its queries.",
          py::arg("query"), py::arg("keys"), py::arg("weights"), py::arg("maps"), py::arg("add"));
    m.def("concept_map_backward", concept_map_backward, "Gradient of concept_map to the queries.",
          py::arg("grad"), py::arg("query"), py::arg("keys"), py::arg("weights"),
          py::arg("grad_query"));
    m.def("prompt_maps", prompt_maps, "Adds attribution maps of prompts that share their tokens.",
          py::arg("query"), py::arg("keys"), py::arg("members"), py::arg("weights"),
          py::arg("maps"));
}
