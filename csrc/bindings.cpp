// The only file that knows pybind11: checks, then a params struct, then the kernel of the device.
#include <cmath>
#include <limits>

#include "overlap.h"
#include "tensor_view.h"

namespace py = pybind11;
using biasmap::kAny;
using biasmap::SoftMap;
using biasmap::TensorView;

namespace {

static_assert(sizeof(SoftMap) == 4 * sizeof(float), "state is a [..., 4] float32 tensor");

void require(bool good, const std::string &message) {
    if (!good)
        throw std::invalid_argument(message);
}

void check_soft(double fraction, double temperature) {
    require(fraction > 0.0 && fraction < 1.0,
            "`fraction` must be in (0, 1), got " + std::to_string(fraction));
    require(temperature > 0.0 && std::isfinite(temperature),
            "`temperature` must be positive and finite, got " + std::to_string(temperature));
}

void check_pixels(int64_t pixels) {
    require(pixels > 0, "maps must have at least one pixel");
    require(pixels <= std::numeric_limits<int32_t>::max(), "maps must have fewer than 2^31 pixels");
}

const int64_t *checked_pairs(const TensorView &pairs, int64_t concepts) {
    const auto *data = pairs.data<int64_t>("pairs", "[P, 2]", {kAny, 2});
    for (int64_t i = 0; i < 2 * pairs.size(0); ++i)
        require(data[i] >= 0 && data[i] < concepts,
                "pairs[" + std::to_string(i / 2) + "] names concept " + std::to_string(data[i]) +
                    ", but `maps` has K = " + std::to_string(concepts) + " concepts");
    return data;
}

SoftMap *as_state(float *data) { return reinterpret_cast<SoftMap *>(data); }

template <typename Params> void launch(void (*kernel)(const Params &), const Params &params) {
    py::gil_scoped_release release;
    kernel(params);
}

void pairs_iou(const TensorView &maps, const TensorView &pairs, double percentile,
               const TensorView &iou, const TensorView &union_pixels, const TensorView &area,
               const TensorView &masks) {
    biasmap::PairsIouParams p{};
    p.maps = maps.data<float>("maps", "[B, K, N]", {kAny, kAny, kAny});
    p.batch = maps.size(0), p.concepts = maps.size(1), p.pixels = maps.size(2);
    p.pairs = checked_pairs(pairs, p.concepts);
    p.pair_count = pairs.size(0);
    p.percentile = percentile;
    check_pixels(p.pixels);
    require(percentile >= 0.0 && percentile < 100.0,
            "`percentile` must be in [0, 100), got " + std::to_string(percentile));
    p.iou = iou.data<float>("iou", "[B, P]", {p.batch, p.pair_count});
    p.union_pixels = union_pixels.data<int32_t>("union", "[B, P]", {p.batch, p.pair_count});
    p.area = area.data<int32_t>("area", "[B, K]", {p.batch, p.concepts});
    p.masks = reinterpret_cast<uint64_t *>(masks.data<int64_t>(
        "masks", "[B, K, ceil(N / 64)]", {p.batch, p.concepts, (p.pixels + 63) / 64}));
    launch(biasmap::pairs_iou_cpu, p);
}

void soft_topk(const TensorView &x, double fraction, double temperature, const TensorView &mask,
               const TensorView &state) {
    biasmap::SoftTopkParams p{};
    p.x = x.data<float>("x", "[M, N]", {kAny, kAny});
    p.rows = x.size(0), p.pixels = x.size(1);
    p.fraction = fraction, p.temperature = temperature;
    check_pixels(p.pixels);
    check_soft(fraction, temperature);
    p.mask = mask.data<float>("mask", "[M, N]", {p.rows, p.pixels});
    p.state = as_state(state.data<float>("state", "[M, 4]", {p.rows, 4}));
    launch(biasmap::soft_topk_cpu, p);
}

void soft_topk_backward(const TensorView &grad, const TensorView &mask, const TensorView &state,
                        const TensorView &grad_x) {
    biasmap::SoftTopkBackwardParams p{};
    p.mask = mask.data<float>("mask", "[M, N]", {kAny, kAny});
    p.rows = mask.size(0), p.pixels = mask.size(1);
    p.grad = grad.data<float>("grad", "[M, N]", {p.rows, p.pixels});
    p.state = as_state(state.data<float>("state", "[M, 4]", {p.rows, 4}));
    p.grad_x = grad_x.data<float>("grad_x", "[M, N]", {p.rows, p.pixels});
    launch(biasmap::soft_topk_backward_cpu, p);
}

void soft_iou(const TensorView &maps, const TensorView &pairs, double fraction, double temperature,
              const TensorView &iou, const TensorView &state) {
    biasmap::SoftIouParams p{};
    p.maps = maps.data<float>("maps", "[B, K, N]", {kAny, kAny, kAny});
    p.batch = maps.size(0), p.concepts = maps.size(1), p.pixels = maps.size(2);
    p.pairs = checked_pairs(pairs, p.concepts);
    p.pair_count = pairs.size(0);
    p.fraction = fraction, p.temperature = temperature;
    check_pixels(p.pixels);
    check_soft(fraction, temperature);
    p.iou = iou.data<float>("iou", "[B, P]", {p.batch, p.pair_count});
    p.state = as_state(state.data<float>("state", "[B, K, 4]", {p.batch, p.concepts, 4}));
    launch(biasmap::soft_iou_cpu, p);
}

void soft_iou_backward(const TensorView &grad, const TensorView &iou, const TensorView &maps,
                       const TensorView &pairs, const TensorView &state, double fraction,
                       const TensorView &grad_maps) {
    biasmap::SoftIouBackwardParams p{};
    p.maps = maps.data<float>("maps", "[B, K, N]", {kAny, kAny, kAny});
    p.batch = maps.size(0), p.concepts = maps.size(1), p.pixels = maps.size(2);
    p.pairs = checked_pairs(pairs, p.concepts);
    p.pair_count = pairs.size(0);
    p.fraction = fraction;
    check_pixels(p.pixels);
    check_soft(fraction, 1.0);
    p.grad = grad.data<float>("grad", "[B, P]", {p.batch, p.pair_count});
    p.iou = iou.data<float>("iou", "[B, P]", {p.batch, p.pair_count});
    p.state = as_state(state.data<float>("state", "[B, K, 4]", {p.batch, p.concepts, 4}));
    p.grad_maps = grad_maps.data<float>("grad_maps", "[B, K, N]", {p.batch, p.concepts, p.pixels});
    launch(biasmap::soft_iou_backward_cpu, p);
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
    info["cuda"] = false; // no CUDA kernels in this version
    return info;
}

} // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "Native overlap kernels. Outputs are allocated by the caller; see ops.py.";
    m.attr("__version__") = BIASMAP_VERSION;
    m.def("build_info", build_info, "What this module was compiled with, and runs with here.");
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
}
