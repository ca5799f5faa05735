"""The CUDA kernels against plain torch, torch.compile and what the GPU can do at most.

Inputs rotate among four sets, so that the cache holds none of them where they are large. "In a
graph" is a CUDA graph of one call on each: the kernels without Python's share. A bound is the
larger of the bytes once in and once out over the measured bandwidth of a copy and the exponentials
that must be taken over their measured rate; the share of it stands in the table. A part of the set
``gpu``; ``--set cpu --part kernels --quick`` runs everything small on a CPU, to test this file.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import biasmap_fast as bm
from biasmap_fast import ops, presets, reference

from .harness import Entry, Group, device_clock
from .settings import Settings

SETS, CONCEPTS, SIDE, ROTATED = 256, 8, 64, 4
TOKENS, MAPS = 12, 2
# Cross-attention of SD 1.5 at 512 x 512: queries, heads, d; five layers each in the recorder
LAYERS = ((4096, 8, 40), (1024, 8, 80), (256, 8, 160))
# Errors that are failures (issue 4); a gradient to float16 queries is rounded to them.
FORWARD, GRADIENT, ROUNDED = 1e-5, 1e-4, 1e-3
# Seconds of torch.compile for a soft mask's root, all 64 steps of which it writes out
COMPILING = 30.0


@dataclass
class Setting:
    device: torch.device
    rounds: int
    compiled: bool

    def group(
        self, name: str, workload: str, entries: list[Entry], compiling: float = 15.0
    ) -> Group:
        """``compiling``: seconds that torch.compile needs, if it is asked."""
        if self.compiled:
            name += ", torch compiled"
        seconds = 3.0 + compiling if self.compiled else 3.0
        part = "kernels-compiled" if self.compiled else "kernels"
        return Group(part, name, workload, lambda: entries, self.rounds, seconds, repeats=10)


@dataclass(frozen=True)
class Work:
    bytes: float = 0.0
    exponentials: float = 0.0


def rotating(run: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """Calls ``run`` on the inputs in turn."""
    turn: Iterator[Any] = itertools.cycle(inputs)
    return lambda: run(next(turn))


def in_a_graph(run: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """One CUDA graph of a call on every input, captured at the first run; gives the first one."""
    captured: list[tuple[torch.cuda.CUDAGraph, list[Any]]] = []

    def capture() -> tuple[torch.cuda.CUDAGraph, list[Any]]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(inputs[0])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            return graph, [run(x) for x in inputs]

    def replay() -> Any:
        if not captured:
            captured.append(capture())
        graph, results = captured[0]
        graph.replay()
        return results[0]

    return replay


Function = Callable[[Any], Any]


def as_it_is(function: Function) -> Function:
    return function


def compare(
    setting: Setting,
    inputs: Sequence[Any],
    plain: Function,
    native: Function,
    error: Callable[[Any], float | None] | None,
    tolerance: float | None,
    work: Work,
    wrap: Callable[[Function], Function] = as_it_is,
) -> list[Entry]:
    """Torch, compiled torch, ours, and ours without Python; each in ``wrap``, not compiled.

    ``tolerance``: the greatest error of ours that is no failure.
    """
    found = [Entry("torch reference", rotating(wrap(plain), inputs), error)]
    if setting.compiled:
        fast = wrap(torch.compile(plain))
        found.append(Entry("torch reference, compiled", rotating(fast, inputs), error))
    found.append(Entry("native", rotating(wrap(native), inputs), error, ours=True))
    if setting.device.type == "cuda":
        replay = in_a_graph(wrap(native), inputs)
        name = "native, in a graph"
        found.append(Entry(name, replay, error, calls=len(inputs), ours=True))
    for entry in found:
        entry.bytes, entry.exponentials = work.bytes, work.exponentials
        entry.tolerance = tolerance if entry.ours else None
    return found


def exponential_rate() -> float | None:
    """1e9 exponentials of float32 a second, measured through Triton; None without it."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return None
    from .exponentials import STEPS, take_exponentials

    x = torch.rand(1 << 24, device="cuda")
    take_exponentials(x)
    times = [device_clock(lambda: take_exponentials(x), 3) for _ in range(5)]
    return STEPS * x.numel() / 1e6 / statistics.median(times)


def attribution_like(sets: int, device: torch.device, seed: int) -> torch.Tensor:
    """Maps ``[sets, CONCEPTS, N]``: coarse blobs, some noise, range about 5."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(sets, CONCEPTS, 8, 8, generator=generator) ** 2
    maps = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
    return ((maps + 0.05 * torch.rand(maps.shape, generator=generator)) * 5).flatten(2).to(device)


def with_gradient(function: Function) -> Function:
    """The gradient of the values' sum to the one argument, or the first of a tuple."""

    def run(argument: Any) -> torch.Tensor:
        first, *others = argument if isinstance(argument, tuple) else (argument,)
        x = first.detach().requires_grad_()
        values = function((x, *others) if others else x)
        gradient: torch.Tensor
        (gradient,) = torch.autograd.grad(values.sum(), x)
        return gradient

    return run


def largest_error(exact: torch.Tensor) -> Callable[[torch.Tensor], float]:
    return lambda found: float((found.double() - exact).abs().nan_to_num(torch.inf).max())


def relative_error(exact: torch.Tensor) -> Callable[[torch.Tensor], float]:
    return lambda found: float((found.double() - exact).norm() / exact.norm())


def overlap_rows(setting: Setting, sets: int, concepts: int) -> Iterator[Group]:
    pairs = torch.combinations(torch.arange(concepts))
    inputs = [
        attribution_like(sets, setting.device, seed)[:, :concepts].contiguous()
        for seed in range(ROTATED)
    ]
    on_device = pairs.to(setting.device)
    workload = f"{sets} sets of {concepts} concepts at {SIDE} x {SIDE}, {len(pairs)} pairs"
    size, pixels = inputs[0].nbytes, inputs[0].numel()
    exact = inputs[0].double().requires_grad_()
    expected = reference.soft_iou(exact, on_device, 0.3, 0.01)
    (gradient,) = torch.autograd.grad(expected.sum(), exact)

    def guided() -> list[Entry]:
        # Maps and their gradient; a mask at the root, and once more, as masks are not kept
        return compare(
            setting,
            inputs,
            lambda maps: reference.soft_iou(maps, on_device, 0.3, 0.01),
            lambda maps: ops.soft_iou(maps, pairs, 0.3, 0.01),
            relative_error(gradient),
            GRADIENT,
            Work(2 * size, 2 * pixels),
            with_gradient,
        )

    yield setting.group("SoftIoU with gradient", workload, guided(), COMPILING)
    if concepts == CONCEPTS and not setting.compiled:
        # One call between two events, not ten: the unrolled one takes seconds.
        yield Group(
            "kernels", "SoftIoU with gradient, as published", workload,
            lambda: [published(inputs[0], pairs), *(each for each in guided() if each.ours)],
            min(3, setting.rounds), 10.0,
        )  # fmt: skip
    yield setting.group(
        "hard IoU",
        workload,
        compare(
            setting,
            inputs,
            lambda maps: reference.pairs_iou(maps, on_device, 70.0)[0],
            lambda maps: ops.pairs_iou(maps, pairs, 70.0).iou,
            largest_error(reference.pairs_iou(inputs[0], on_device, 70.0)[0].double()),
            FORWARD,
            Work(size),
        ),
    )
    yield soft_topk_rows(setting, [maps.flatten(0, 1) for maps in inputs])
    # A mask at the root, once: no method that finds it does with less.
    yield setting.group(
        "SoftIoU",
        workload,
        compare(
            setting,
            inputs,
            lambda maps: reference.soft_iou(maps, on_device, 0.3, 0.01),
            lambda maps: ops.soft_iou(maps, pairs, 0.3, 0.01),
            largest_error(expected.detach()),
            FORWARD,
            Work(size, pixels),
        ),
        COMPILING,
    )


def soft_topk_rows(setting: Setting, inputs: Sequence[torch.Tensor]) -> Group:
    exact = inputs[0].double().requires_grad_()
    (gradient,) = torch.autograd.grad(reference.soft_topk(exact, 0.3, 0.01)[:, ::2].sum(), exact)
    return setting.group(
        "soft top-k with gradient",
        f"{len(exact)} maps at {SIDE} x {SIDE}",
        compare(
            setting,
            inputs,
            lambda x: reference.soft_topk(x, 0.3, 0.01)[:, ::2],
            lambda x: ops.soft_topk(x, 0.3, 0.01)[:, ::2],
            relative_error(gradient),
            GRADIENT,
            Work(4 * inputs[0].nbytes, exact.numel()),  # maps, mask, its gradient, theirs
            with_gradient,
        ),
        COMPILING,
    )


def published(maps: torch.Tensor, pairs: torch.Tensor) -> Entry:
    """The unrolled iteration, sixteen sets at a time: more of its states do not fit."""
    i, j = pairs.unbind(1)

    def function(x: torch.Tensor) -> torch.Tensor:
        square = x.view(*x.shape[:2], SIDE, SIDE)
        return presets.paper_soft_iou(square[:, i], square[:, j])

    some = maps[:16]
    run = with_gradient(function)
    parts = -(-len(maps) // len(some))

    def every() -> Any:
        for _ in range(parts):
            run(some)

    note = "another quantity: row by row, not converged"
    return Entry("unrolled, batched (published)", every, None, note)


def attention_inputs(
    batch: int, shape: tuple[int, int, int], device: torch.device
) -> list[tuple[torch.Tensor, ...]]:
    """Float16 queries as `to_q` leaves them, keys and weights; as many as rotate."""
    n, heads, depth = shape
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    keys = (torch.randn(heads, TOKENS, depth, generator=generator) / depth**0.5).to(device)
    weights = torch.zeros(MAPS, TOKENS, device=device)
    weights[0, 3] = weights[1, 5] = 1.0
    queries = (torch.randn(batch, n, heads * depth, device=device) for _ in range(ROTATED))
    return [
        (q.to(dtype).view(batch, n, heads, depth).transpose(1, 2), keys, weights) for q in queries
    ]


def concept_map_rows(setting: Setting) -> Iterator[Group]:
    batch = 16 if setting.device.type == "cuda" else 1
    for shape in LAYERS[: 1 if setting.compiled else None]:
        inputs = attention_inputs(batch, shape, setting.device)
        query, keys, weights = inputs[0]
        exact = query.double().requires_grad_()
        expected = reference.concept_map(exact, keys.double(), weights.double())
        (gradient,) = torch.autograd.grad(expected.sum(), exact)
        n, heads, depth = shape
        workload = (
            f"{batch} x {n} queries, {heads} heads of {depth}, {TOKENS} tokens, {query.dtype}"
        )

        yield setting.group(
            "concept maps",
            workload,
            compare(
                setting,
                inputs,
                lambda arguments: reference.concept_map(*arguments),
                lambda arguments: ops.concept_map(*arguments),
                largest_error(expected.detach()),
                FORWARD * heads,
                Work(query.nbytes),
            ),
        )
        yield setting.group(
            "concept maps with gradient",
            workload,
            compare(
                setting,
                inputs,
                lambda arguments: reference.concept_map(*arguments),
                lambda arguments: ops.concept_map(*arguments),
                relative_error(gradient),
                ROUNDED,
                Work(2 * query.nbytes),  # queries, their gradient
                with_gradient,
            ),
        )


def recorder_group(setting: Setting) -> Group:
    """All that the recorder computes in one UNet call of one image: fifteen layers."""
    layers = [attention_inputs(1, shape, setting.device)[0] for shape in LAYERS for _ in range(5)]
    sums = {
        n: torch.zeros(1, MAPS, n, device=setting.device) for n in (shape[0] for shape in LAYERS)
    }

    def plain(_: Any) -> None:
        for query, keys, weights in layers:
            sums[query.shape[2]] += reference.concept_map(query, keys, weights)

    def native(_: Any) -> None:
        for query, keys, weights in layers:
            ops.add_concept_map(sums[query.shape[2]], query, keys, weights)

    work = Work(sum(query.nbytes for query, *_ in layers))
    return setting.group(
        "the recorder's share of a UNet call",
        "15 layers of SD 1.5, one image",
        compare(setting, [None], plain, native, None, None, work),
    )


def captured_unet(settings: Settings, width: int = 320, side: int = 64) -> list[Entry]:
    """A UNet call in a CUDA graph, without the recorder and then with it."""
    from .guidance import PROMPT, Calls, build  # needs diffusers

    pipe = build(width).to(settings.device, settings.dtype)
    latents, timestep, text = Calls(pipe, 2, side).arguments()
    timestep = timestep.to(settings.device)  # a copy from the host cannot be captured
    recorder = bm.attribute(pipe, PROMPT, chunks=2)

    def plain(_: Any) -> torch.Tensor:
        with torch.no_grad():
            sample: torch.Tensor = pipe.unet(latents, timestep, text).sample
        return sample

    replay = in_a_graph(plain, [None])
    found: list[Callable[[], Any]] = []

    def recorded() -> torch.Tensor:
        # Entered once the plain call is captured, and never left: the graph reads its keys.
        if not found:
            recorder.__enter__()
            found.append(in_a_graph(plain, [None]))
        sample: torch.Tensor = found[0]()
        return sample

    def error(_: torch.Tensor) -> float:
        maps: Any = recorder.maps()
        if not float(maps.values.sum()) > 0:
            raise ValueError("nothing was recorded")
        return float((recorded() - replay()).abs().max())

    return [
        Entry("plain", replay),
        Entry("recorder", recorded, error, "2 concepts, 1 prompt", ours=True, tolerance=0.0),
    ]


def captured_group(settings: Settings) -> Group:
    return Group(
        "kernels", "a UNet call in a CUDA graph",
        "SD 1.5 shapes, random weights, 1 image, two chunks, latents of 64 x 64, float16",
        lambda: captured_unet(settings), settings.rounds(9), 30.0, repeats=10,
    )  # fmt: skip


def groups(settings: Settings) -> Iterator[Group]:
    """Lazily: each has its inputs when it is asked for."""
    setting = Setting(settings.device, settings.rounds(9), False)
    sets = 2 if settings.quick else SETS
    yield from overlap_rows(setting, sets, CONCEPTS)
    yield from overlap_rows(setting, 1, 2)
    yield from concept_map_rows(setting)
    yield recorder_group(setting)
    if settings.gpu:
        yield captured_group(settings)


def compiled_groups(settings: Settings) -> Iterator[Group]:
    """The same beside torch.compile, a part of its own as compiling takes longest."""
    setting = Setting(settings.device, settings.rounds(9), True)
    sets = 2 if settings.quick else SETS
    yield from concept_map_rows(setting)
    yield from overlap_rows(setting, sets, CONCEPTS)
