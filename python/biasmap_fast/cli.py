"""The command line: ``biasmap scan | audit | report | maps | generate | export | env``.

Results go to stdout, everything else to stderr. Heavy imports stay inside the commands, so that
``--help`` is quick and a missing extra is named only by the command that needs it.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from . import console, options
from .allocator import keep_freed_memory
from .audit.settings import PlanSettings
from .energy import Energy
from .options import Options, from_settings

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="biasmap",
    help="Measure what a text-to-image model does with a profession and a demographic: how often "
    "each group is drawn, and whether both words act on the same part of the picture.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[Path, typer.Option(help="Folder for the files.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more, with tracebacks.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier run.")]
Concepts = Annotated[
    list[str], typer.Option("--concept", help="Repeatable. Word of the attribution prompt.")
]
AttributionText = Annotated[
    str | None, typer.Option(help="Text that is attributed. [default: the prompt]")
]

_MODEL: Options = {
    "model": (str, "--model"),
    "revision": (str, "--revision"),
    "device": (str, "--device"),
    "dtype": (str, "--dtype"),
}
_DRAWING: Options = {
    **_MODEL,
    "steps": (int, "--steps"),
    "guidance_scale": (float, "--guidance-scale"),
    "branch": (str, "--branch"),
    "layers": (list[str], "--layer"),
}
_AUDIT: Options = {
    "model": (str, "--model"),
    "professions": (str, "--professions"),
    "axes": (list[str], "--axis"),
    "seeds": (str, "--seeds"),
    "precision": (float, "--precision"),
    "max_seeds": (int, "--max-seeds"),
    "conditions": (list[str], "--condition"),
    "measure": (str, "--measure"),
    "fractions": (list[float], "--fraction"),
    **_DRAWING,
    "batch_size": (int, "--batch-size"),
    "height": (int, "--height"),
    "width": (int, "--width"),
    "scheduler": (str, "--scheduler"),
    "engine": (str, "--engine"),
    "compile": (bool, "--compile"),
    "prompt_template": (str, "--prompt-template"),
    "attribution_template": (list[str], "--attribution-template"),
    "negative_prompt": (str, "--negative-prompt"),
    "sweeps": (list[str], "--sweep"),
    "classifier": (str, "--classifier"),
    "preset": (str, "--preset"),
    "save_pictures": (str, "--pictures"),
}
_SCAN: Options = {
    **_MODEL,
    "professions": (str, "--professions"),
    "axes": (list[str], "--axis"),
    "steps": (int, "--steps"),
    "height": (int, "--height"),
    "width": (int, "--width"),
    "prompt_template": (str, "--prompt-template"),
    "attribution_template": (str, "--attribution-template"),
    "negative_prompt": (str, "--negative-prompt"),
}
_ENERGY: Options = {
    "scale": (float, "--scale"),
    "inner_steps": (int, "--inner-steps"),
    "start": (float, "--start"),
    "stop": (float, "--stop"),
}


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
@from_settings((PlanSettings, _AUDIT))
def audit(
    containment: Annotated[
        str | None,
        typer.Option(
            help="Fractions of the pixels in the profession's mask and in the word's, for the "
            "measure containment. [default: 0.05,0.1]"
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Scale of the energy under the condition 'guided'; its other settings are in "
            "--config, under `energy`. [default: 100]"
        ),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(help="Measure control words and the swapped prompt on the same pictures."),
    ] = True,
    config: Annotated[
        Path | None, typer.Option(help="Plan in YAML; options override what it says.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder; the same plan continues it.")] = Path(
        "runs/audit"
    ),
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Measure on the workers of a Ray cluster, one per device: 'local' for this "
            "machine, or its address. Needs the extra cluster."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Workers of the --cluster. [default: one per GPU, or one per THREADS CPUs]"
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of each worker of a --cluster.")] = 1,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Draw pictures again whose drawing failed.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Progress bar on stderr.")] = True,
    as_json: Json = False,
    verbose: Verbose = False,
    **settings: Any,
) -> None:
    """Draw pictures of professions, measure them, and write a report.

    Leaves a run folder: plan.yaml, environment.json, pictures/ and measurements/ in Parquet,
    figures.csv, summary.json, report.html. A run that was stopped goes on where it stood when the
    same command is given again.

    Example: biasmap audit --model testbed --seeds 20 --out runs/first
    """
    with console.clear_errors(verbose):
        from .audit import run_audit
        from .audit.report import summary_json
        from .audit.sentences import console as said

        if "seeds" in settings:
            settings["seeds"] = options.seeds(settings["seeds"])
        if len(template := settings.get("attribution_template", ())) == 1:
            settings["attribution_template"] = template[0]
        if "save_pictures" in settings:
            settings["save_maps"] = settings["save_pictures"]
        if containment is not None:
            settings["containment"] = {"fractions": options.fractions(containment)}
        if scale is not None:
            settings["energy"] = {"scale": scale}
        if not controls:
            settings["controls"] = None
        plan = console.plan(settings, config)
        result = run_audit(
            plan,
            out,
            progress=progress,
            retry_failed=retry_failed,
            cluster=cluster,
            workers=workers,
            threads=threads,
        )
        if as_json:
            typer.echo(summary_json(result.summary), nl=False)
            return
        for line in said(plan, result.summary):
            typer.echo(line)
        typer.echo(f"Report: {result.report}")


@app.command()
@from_settings((PlanSettings, _SCAN))
def scan(
    draws: Annotated[int, typer.Option(min=2, help="Draws of noise per profession and axis.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for scan.json and scan.csv.")] = Path(
        "runs/scan"
    ),
    progress: Annotated[bool, typer.Option(help="Progress bar on stderr.")] = True,
    as_json: Json = False,
    verbose: Verbose = False,
    **settings: Any,
) -> None:
    """Estimate how often each group would be drawn, without drawing a picture.

    Works on any text-to-image model with a UNet or a transformer. The share is that without
    classifier-free guidance, from the denoiser's own predictions at pure noise. Professions are
    printed in the order of their distance from equal shares, with 95 % intervals over the noise.

    Example: biasmap scan --model testbed --professions doctor,judge --out runs/scan
    """
    with console.clear_errors(verbose):
        from . import scan as scanning
        from .audit.plan import AuditPlan
        from .pipelines import load_pipeline

        plan = console.checked(AuditPlan, settings)
        pipe = load_pipeline(
            plan.model, revision=plan.revision, dtype=plan.dtype, device=plan.device
        )
        rows = scanning.scan(pipe, plan, out, draws=draws, progress=progress)
        if as_json:
            typer.echo(json.dumps(rows, indent=1))
            return
        for line in scanning.lines(rows):
            typer.echo(line)
        typer.echo(f"Files: {out / 'scan.json'} and {out / 'scan.csv'}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    check: Annotated[
        bool,
        typer.Option(
            "--validate",
            help="Write nothing: compute every figure from the records again, check every file's "
            "hash and every record against the plan, list what differs, and exit with 1 if "
            "anything does or if the run is not finished.",
        ),
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compute the figures of a run folder from its records and write its report anew.

    Works on unfinished runs too: the report then says how much is missing.
    """
    with console.clear_errors(verbose):
        from .audit import render, validate
        from .audit.report import summary_json

        if not check:
            result = render(folder)
            text = summary_json(result.summary) if as_json else f"Report: {result.report}\n"
            typer.echo(text, nl=False)
            return
        differences = validate(folder)
        if as_json:
            typer.echo(json.dumps({"valid": not differences, "differences": differences}))
        else:
            for line in differences or [f"{folder} is whole and agrees with its records"]:
                typer.echo(line)
        raise typer.Exit(bool(differences))


@app.command()
@from_settings((PlanSettings, _DRAWING))
def maps(
    prompt: Annotated[str, typer.Option(help="Text that draws the picture.")],
    concept: Concepts,
    attribution_prompt: AttributionText = None,
    seed: Annotated[int, typer.Option(help="Seed of the picture.")] = 0,
    fraction: Annotated[
        float, typer.Option(help="Fraction of the pixels in the masks whose IoU is printed.")
    ] = 0.3,
    out: Out = Path("maps"),
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
    **settings: Any,
) -> None:
    """Draw one picture and show where words attend.

    Writes picture.png, one overlay-WORD.png per concept (each on its own scale), and
    maps.safetensors; prints the IoU of every two concepts with its chance level.

    Example: biasmap maps --prompt "A photo of the face of a doctor" --attribution-prompt
    "A photo of the face of a doctor and woman" --concept doctor --concept woman
    """
    with console.clear_errors(verbose):
        import torch

        from . import attribute
        from .concepts import AttributionPrompt
        from .generate import check_free, pair_overlaps, write_maps
        from .overlap import chance_iou

        chance_iou(fraction)  # refuses what is no fraction before anything is drawn
        check_free(out, "maps.safetensors", overwrite=overwrite)
        pipe, arguments = console.pipeline(settings)
        attributed = AttributionPrompt(attribution_prompt or prompt, tuple(concept))
        layers = settings.get("layers")
        with attribute(pipe, attributed, branch=arguments.pop("branch"), layers=layers) as recorder:
            generator = torch.Generator("cpu").manual_seed(seed)
            picture = pipe(prompt, generator=generator, **arguments).images[0]
        rows = pair_overlaps(recorder.maps(), fraction)
        files = [str(path) for path in write_maps(picture, recorder.maps(), out)]
        if as_json:
            typer.echo(json.dumps({"files": files, "pairs": rows}, indent=1))
            return
        for row in rows:
            typer.echo(
                f"IoU of {row['a']!r} and {row['b']!r}, masks of {fraction:g} of the pixels: "
                f"{row['iou']:.3f} (chance {row['chance']:.3f}, one picture)"
            )
        for path in files:
            typer.echo(path)


@app.command()
@from_settings((PlanSettings, {**_DRAWING, "batch_size": (int, "--batch-size")}), (Energy, _ENERGY))
def generate(
    prompt: Annotated[str, typer.Option(help="Text that draws the pictures.")],
    concept: Concepts,
    attribution_prompt: AttributionText = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable. Concepts to keep apart, 'doctor,woman'. [default: every pair]"
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="A count ('4': 0 to 3), a range ('5-24') or a list.")
    ] = "4",
    out: Out = Path("generated"),
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
    **settings: Any,
) -> None:
    """Draw every seed twice, plain and guided by the energy, and show both with their maps.

    Writes pictures, overlays and maps before and after, ledger.csv (what guidance did at every
    step), comparison.png (one row per seed: plain, then guided) and generate.json; prints the IoU
    of every pair before and after.

    Example: biasmap generate --prompt "A photo of the face of a doctor" --attribution-prompt
    "A photo of the face of a doctor and woman" --concept doctor --concept woman --scale 100
    """
    with console.clear_errors(verbose):
        from . import generate as drawing
        from .concepts import AttributionPrompt

        energy: dict[str, Any] = {n: settings.pop(n) for n in _ENERGY if n in settings}
        energy |= {"layers": settings.get("layers")}
        if pair:
            energy["pairs"] = [options.pair(text) for text in pair]
        text = attribution_prompt or prompt
        drawing.check_free(out, "generate.json", overwrite=overwrite)
        pipe, arguments = console.pipeline(settings)
        drawn = drawing.generate(
            pipe,
            prompt,
            AttributionPrompt(text, tuple(concept)),
            seeds=options.seeds(seeds),
            energy=console.checked(Energy, energy),
            batch_size=settings.get("batch_size", 8),
            progress=True,
            **arguments,
        )
        record = {**settings, **arguments, "energy": energy, "concepts": concept}
        record |= {"prompt": prompt, "attribution_prompt": text}
        written = drawing.write_generated(drawn, out, record, overwrite=overwrite)
        rows = drawn.overlaps()
        if as_json:
            typer.echo(json.dumps({"files": list(map(str, written)), "overlaps": rows}, indent=1))
            return
        for a, b in drawn.pairs:
            values = [row for row in rows if row["pair"] == [a, b]]
            before, after = (
                sum(row[f"iou_{when}"] for row in values) / len(values)
                for when in ("before", "after")
            )
            typer.echo(
                f"IoU of {a!r} and {b!r}, masks of 0.3 of the pixels, mean of {len(values)} "
                f"pictures: {before:.3f} plain, {after:.3f} guided "
                f"(chance {values[0]['chance']:.3f})"
            )
        typer.echo(f"Look at {out / 'comparison.png'}; {len(written)} files in {out}")


@app.command()
@from_settings((PlanSettings, {n: _DRAWING[n] for n in ("model", "revision", "dtype", "layers")}))
def export(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Preset of shapes: testbed, sd15, sd21 or sdxl. [default: by the UNet's size]"
        ),
    ] = None,
    maps: Annotated[
        str, typer.Option(help="Beside the noise prediction: reduced, probabilities or none.")
    ] = "reduced",
    opset: Annotated[int, typer.Option(help="ONNX operator set: 18, 20, 23 or 24.")] = 20,
    gradient: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable. Latents' HEIGHTxWIDTH of a graph with the energy's gradient, for "
            "guidance."
        ),
    ] = None,
    gradient_prompts: Annotated[
        int,
        typer.Option(
            min=1,
            help="Most attribution prompts of one picture in that graph: a guided audit has one "
            "for each demographic word.",
        ),
    ] = 2,
    convolutions: Annotated[
        str,
        typer.Option(
            help="direct, or winograd for fewer products: for ONNX Runtime on a CPU, float32."
        ),
    ] = "direct",
    output_format: Annotated[
        str, typer.Option("--format", help="onnx; tensorrt or tensorrt-rtx build plans as well.")
    ] = "onnx",
    verify: Annotated[bool, typer.Option(help="Compare with torch before naming it.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes and write nothing.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Name the steps on stderr.")] = True,
    as_json: Json = False,
    verbose: Verbose = False,
    **settings: Any,
) -> None:
    """Write a model's UNet with its attribution maps for ONNX Runtime or TensorRT.

    Leaves a folder for `--engine` of `biasmap audit` and for `biasmap_fast.load_engine`: the
    graph, its weights, and manifest.json. The folder appears when the graph was compared with
    torch; an export that fails leaves none.

    Example: biasmap export --model testbed --out engines/testbed
    """
    with console.clear_errors(verbose, "nothing was left under the folder's name"):
        from .engines.command import run_export

        pipe, _ = console.pipeline({**settings, "device": "cpu"})
        result = run_export(
            pipe,
            out,
            shapes=shapes,
            dtype=settings.get("dtype"),
            maps=maps,
            opset=opset,
            layers=settings.get("layers"),
            gradients=gradient or [],
            gradient_prompts=gradient_prompts,
            convolutions=convolutions,
            kind=output_format,
            verify=verify,
            dry_run=dry_run,
            say=(lambda text: typer.echo(f"biasmap: {text}", err=True)) if progress else None,
        )
        console.show(result, as_json)


@app.command()
def env(as_json: Json = False) -> None:
    """Print versions, devices and what was compiled: put this into a bug report."""
    from .environment import describe

    console.show(describe(), as_json)


def main() -> None:
    """Runs the command line."""
    # Read when torch loads. By default libgomp's threads spin while they wait, and so starve those
    # they wait for on a busy machine: 16 pictures took 13 s, and 5 s with this.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_freed_memory()
    app()
