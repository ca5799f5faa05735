"""The command line: ``biasmap audit | maps | generate | report | export | bench | env``.

Results go to stdout, everything else to stderr. Heavy imports stay inside the commands, so that
``--help`` is quick and a missing extra is named only by the command that needs it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .allocator import keep_freed_memory

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="biasmap",
    help="Audit text-to-image models for concept entanglement: do the words for a profession and "
    "for a demographic attend to the same place of the picture?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_MODEL = "'testbed' (embedded, needs no network), a diffusers directory, or a hub id."
Model = Annotated[str | None, typer.Option(help=f"{_MODEL} [default: testbed]")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. [default: cuda if present]")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. [default: float32]")]
Steps = Annotated[int | None, typer.Option(min=1, help="Inference steps. [default: 25]")]
Scale = Annotated[
    float | None,
    typer.Option(help="Classifier-free guidance, 1 for none. [default: 7.5; testbed: 1]"),
]
Branch = Annotated[
    str | None,
    typer.Option(help="Guidance branch that is attributed: cond or uncond. [default: cond]"),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer", help="Layer name or prefix, repeatable. [default: all down and up blocks]"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more, with tracebacks.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def audit(
    model: Model = None,
    professions: Annotated[
        str | None,
        typer.Option(
            help="Words with commas ('doctor,judge'), or the name of a list ('biasmap'). "
            "[default: the testbed's own; 'biasmap' for other models]"
        ),
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="Demographic axis: a name ('gender', 'race') or 'name=word,word'. Repeatable: "
            "all axes are measured on the same pictures. [default: gender]"
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="A count ('20': 0 to 19), a range ('5-24') or a list. With --precision H it is "
            "the first round, by default of 1/H seeds if that is more. [default: 20]"
        ),
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            help="Draw as many seeds as needed: in rounds, until the 95 % interval of each "
            "profession's mean measure is within plus and minus this, with every word and under "
            "every condition (0.02, say). [default: --seeds and no more]"
        ),
    ] = None,
    max_seeds: Annotated[
        int | None,
        typer.Option(
            help="With --precision H: seeds that a profession may take; one that needs more is "
            "reported as not reached. [default: 20/H]"
        ),
    ] = None,
    steps: Steps = None,
    guidance_scale: Scale = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Pictures drawn at once. [default: 8; testbed without an engine: 16]"),
    ] = None,
    percentile: Annotated[
        list[float] | None,
        typer.Option(
            help="Masks keep what lies above this percentile of a map; repeatable, the first is "
            "the report's main one. [default: 70]"
        ),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            help="'plain', 'guided' (by the energy), or NAME=INTERVENTION, one of "
            "NAME=prompt:TEMPLATE, NAME=lora:PATH[@WEIGHT], NAME=model:ID, NAME=module:function "
            "(a pipeline factory). Repeatable: all are drawn on the same seeds, and compared with "
            "the first. [default: plain]"
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Scale of the energy under 'guided'; its other settings are in --config, "
            "under `energy`. [default: 100]"
        ),
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(help="Text that draws; {profession} brings its article."),
    ] = None,
    attribution_template: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that is attributed, with {profession} and {demographic}; or two texts, one "
            "with each, so that the words do not share one softmax."
        ),
    ] = None,
    branch: Branch = None,
    layer: Layers = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Scheduler class. [default: the checkpoint's]")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="'paper' reproduces the published scripts' settings. [default: default]"),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="What the report opens with: 'containment', with IoU beside it, or 'iou' alone. "
            "[default: containment]"
        ),
    ] = None,
    containment: Annotated[
        str | None,
        typer.Option(
            help="Fractions of the pixels in the profession's mask and in the demographic word's, "
            "for containment. [default: 0.05,0.1]"
        ),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(help="Measure control words and the swapped prompt on the same pictures."),
    ] = True,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Overlap of parts of the maps too: step, layer or branch; repeatable. "
            "[default: step]"
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            help="Reads demographics in the pictures: 'clip:DIR' (or a hub id), 'module:function', "
            "'none'. [default: none; the testbed has its own]"
        ),
    ] = None,
    pictures: Annotated[
        str | None,
        typer.Option(
            "--images",
            "--pictures",
            help="Pictures and maps to keep: none, sample (the first seed of each profession) or "
            "all. What is not kept is not decoded, unless a classifier reads it. "
            "[default: sample]",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Plan in YAML; flags override what it says.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder; the same plan continues it.")] = Path(
        "runs/audit"
    ),
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    engine: Annotated[
        Path | None,
        typer.Option(help="Draw with the engine in this folder, exported from the model."),
    ] = None,
    compile_unet: Annotated[
        bool | None,
        typer.Option(
            "--compile",
            help="Compile the UNet with torch.compile, which takes minutes at the start.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Measure on the workers of a Ray cluster, one a device: 'local' for this machine, "
            "or its address. Needs the extra cluster."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Workers of the --cluster. [default: one a GPU, or one for THREADS CPUs]"
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of each worker of a --cluster.")] = 1,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Measure those chunks again that have pictures whose drawing failed.",
        ),
    ] = False,
    progress: Annotated[bool, typer.Option(help="Progress bar on stderr.")] = True,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure concept entanglement of many pictures and write a report.

    Draws pictures of every profession, attributes profession and demographic words, measures
    the overlap of their maps, and leaves a run folder: plan.yaml, environment.json,
    records/*.parquet, summary.json, report.html. A run that was stopped goes on where it stood
    when the same command is given again.

    Example: biasmap audit --model testbed --seeds 20 --out runs/first
    """
    flags = {
        "model": model,
        "professions": professions,
        "axes": axis,
        "seeds": None if seeds is None else _seeds(seeds),
        "precision": precision,
        "max_seeds": max_seeds,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "batch_size": batch_size,
        "percentiles": percentile,
        "conditions": condition,
        "energy": None if scale is None else {"scale": scale},
        "prompt_template": prompt_template,
        "attribution_template": _templates(attribution_template),
        "branch": branch,
        "layers": layer,
        "scheduler": scheduler,
        "measure": measure,
        "containment": None if containment is None else {"fractions": _fractions(containment)},
        "sweeps": sweep,
        "classifier": classifier,
        "preset": preset,
        "save_pictures": pictures,
        "save_maps": pictures,
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "engine": None if engine is None else str(engine),
        "compile": compile_unet or None,
    }
    with _clear_errors(verbose):
        from .audit import run_audit
        from .audit.sentences import contained, difference, finding, headline
        from .audit.sentences import controls as beside

        given = {name: value for name, value in flags.items() if value is not None}
        plan = _plan(given if controls else {**given, "controls": None}, config)
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
            typer.echo(json.dumps(result.summary, indent=1))
            return
        typer.echo(headline(plan, result.summary))
        for name in plan.axes:
            for text in contained(name, plan, result.summary):
                typer.echo(f"{name}: {text}")
            typer.echo(f"{name}: {finding(name, result.summary)}")
            for text in beside(name, plan, result.summary):
                typer.echo(f"{name}: {text}")
        for row in result.summary["differences"]:
            if row["percentile"] == plan.percentiles[0]:
                typer.echo(f"{row['condition']}: {difference(row)}")
        typer.echo(f"Report: {result.report}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    check: Annotated[
        bool,
        typer.Option(
            "--validate",
            help="Write nothing: compute the summary from the records again, check every file's "
            "hash and every record against the plan, list what differs, and exit with 1 if "
            "anything does.",
        ),
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compute the summary of a run folder from its records and write its report anew.

    Works on unfinished runs too: the report then says how much is missing.
    """
    with _clear_errors(verbose):
        from .audit import render, validate

        if check:
            differences = validate(folder)
            if as_json:
                typer.echo(json.dumps({"valid": not differences, "differences": differences}))
            else:
                for line in differences or [f"{folder} is whole and agrees with its records"]:
                    typer.echo(line)
            raise typer.Exit(bool(differences))

        result = render(folder)
        typer.echo(json.dumps(result.summary, indent=1) if as_json else f"Report: {result.report}")


@app.command()
def maps(
    prompt: Annotated[str, typer.Option(help="Text that draws the picture.")],
    concept: Annotated[
        list[str], typer.Option(help="Word of the attribution prompt to map; repeatable.")
    ],
    attribution_prompt: Annotated[
        str | None, typer.Option(help="Text that is attributed. [default: the prompt]")
    ] = None,
    model: Model = None,
    seed: Annotated[int, typer.Option(help="Of the picture.")] = 0,
    steps: Steps = None,
    guidance_scale: Scale = None,
    branch: Branch = None,
    layer: Layers = None,
    percentile: Annotated[
        float, typer.Option(help="Of the masks whose IoU is printed, between 0 and 100.")
    ] = 70.0,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("maps"),
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Draw one picture and show where words attend.

    Writes picture.png, one overlay-WORD.png a concept (each on its own scale), and
    maps.safetensors; prints the IoU of every two concepts with its chance level.

    Example: biasmap maps --prompt "A photo of the face of a doctor" --attribution-prompt
    "A photo of the face of a doctor and woman" --concept doctor --concept woman
    """
    with _clear_errors(verbose):
        if not 0 < percentile < 100:
            raise ValueError(f"--percentile must lie between 0 and 100, got {percentile:g}")
        name = model or "testbed"
        scale = (1.0 if name == "testbed" else 7.5) if guidance_scale is None else guidance_scale
        pipe = _load(name, revision, device, dtype)
        picture, found = _draw_maps(
            pipe,
            prompt,
            attribution_prompt or prompt,
            tuple(concept),
            seed=seed,
            steps=steps or 25,
            guidance_scale=scale,
            branch=_branch(branch),
            layers=layer,
        )
        written = _write_maps(picture, found, out)
        rows = _pair_rows(found, percentile)
        if as_json:
            typer.echo(json.dumps({"files": written, "pairs": rows}, indent=1))
            return
        for row in rows:
            typer.echo(
                f"IoU of {row['a']!r} and {row['b']!r} at percentile {percentile:g}: "
                f"{row['iou']:.3f} (chance {row['chance']:.3f}, one picture)"
            )
        for path in written:
            typer.echo(path)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="Text that draws the pictures.")],
    concept: Annotated[
        list[str], typer.Option(help="Word of the attribution prompt; two or more.")
    ],
    attribution_prompt: Annotated[
        str | None, typer.Option(help="Text that is attributed. [default: the prompt]")
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="Concepts to keep apart, 'doctor,woman'; repeatable. [default: all]"),
    ] = None,
    scale: Annotated[float, typer.Option(help="Scale of the energy.")] = 100.0,
    inner_steps: Annotated[int, typer.Option(help="Gradients a UNet call.")] = 1,
    start: Annotated[float, typer.Option(help="Fraction of the run where guidance begins.")] = 0.0,
    stop: Annotated[float, typer.Option(help="Fraction of the run where guidance ends.")] = 1.0,
    model: Model = None,
    seeds: Annotated[
        str, typer.Option(help="A count ('4': 0 to 3), a range ('5-24') or a list.")
    ] = "4",
    steps: Steps = None,
    guidance_scale: Scale = None,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at once.")] = 8,
    branch: Branch = None,
    layer: Layers = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("generated"),
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Draw every seed twice, plain and guided by the energy, and show both with their maps.

    Writes pictures, overlays and maps before and after, ledger.csv (what guidance did at every
    step), comparison.png (a row a seed: plain, then guided) and generate.json; prints the IoU of
    every pair before and after.

    Example: biasmap generate --prompt "A photo of the face of a doctor" --attribution-prompt
    "A photo of the face of a doctor and woman" --concept doctor --concept woman --scale 100
    """
    with _clear_errors(verbose):
        from .concepts import AttributionPrompt
        from .generate import generate as draw
        from .generate import write_generated

        name = model or "testbed"
        cfg = (1.0 if name == "testbed" else 7.5) if guidance_scale is None else guidance_scale
        text = attribution_prompt or prompt
        energy = {
            "scale": scale,
            "inner_steps": inner_steps,
            "start": start,
            "stop": stop,
            "layers": layer,
        }
        drawn = draw(
            _load(name, revision, device, dtype),
            prompt,
            AttributionPrompt(text, tuple(concept)),
            seeds=_seeds(seeds),
            pairs=None if pair is None else [_pair(each) for each in pair],
            energy=energy,
            branch=_branch(branch),
            batch_size=batch_size,
            progress=True,
            num_inference_steps=steps or 25,
            guidance_scale=cfg,
        )
        settings = {
            "model": name,
            "revision": revision,
            "prompt": prompt,
            "attribution_prompt": text,
            "concepts": concept,
            "steps": steps or 25,
            "guidance_scale": cfg,
            "branch": _branch(branch),
            "energy": energy,
        }
        written = [str(path) for path in write_generated(drawn, out, settings)]
        rows = drawn.overlaps()
        if as_json:
            typer.echo(json.dumps({"files": written, "overlaps": rows}, indent=1))
            return
        for a, b in drawn.pairs:
            own = [row for row in rows if row["pair"] == [a, b]]
            before, after = (
                sum(row[f"iou_{when}"] for row in own) / len(own) for when in ("before", "after")
            )
            typer.echo(
                f"IoU of {a!r} and {b!r} at percentile 70, mean of {len(own)} pictures: "
                f"{before:.3f} plain, {after:.3f} guided (chance {own[0]['chance']:.3f})"
            )
        typer.echo(f"Look at {out / 'comparison.png'}; {len(written)} files in {out}")


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    model: Model = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Preset of shapes: testbed, sd15, sd21 or sdxl. [default: by the UNet's size]"
        ),
    ] = None,
    dtype: Dtype = None,
    maps: Annotated[
        str, typer.Option(help="Beside the noise prediction: reduced, probabilities or none.")
    ] = "reduced",
    opset: Annotated[int, typer.Option(help="ONNX operator set: 18, 20, 23 or 24.")] = 20,
    layer: Layers = None,
    gradient: Annotated[
        list[str] | None,
        typer.Option(
            help="Latents' HEIGHTxWIDTH of a graph with the energy's gradient, for guidance; "
            "repeatable."
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
    revision: Revision = None,
    progress: Annotated[bool, typer.Option(help="Name the steps on stderr.")] = True,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a model's UNet with its attribution maps for ONNX Runtime or TensorRT.

    Leaves a folder for `--engine` of `biasmap audit` and for `biasmap_fast.load_engine`: the
    graph, its weights, and manifest.json. The folder appears when the graph was compared with
    torch; an export that fails leaves none.

    Example: biasmap export --model testbed --out engines/testbed
    """
    with _clear_errors(verbose, "nothing was left under the folder's name"):
        from .engines.command import run_export

        pipe = _load(model or "testbed", revision, "cpu", dtype)
        found = run_export(
            pipe,
            out,
            shapes=shapes,
            dtype=dtype,
            maps=maps,
            opset=opset,
            layers=layer,
            gradients=gradient or [],
            gradient_prompts=gradient_prompts,
            convolutions=convolutions,
            kind=output_format,
            verify=verify,
            dry_run=dry_run,
            say=(lambda text: typer.echo(f"biasmap: {text}", err=True)) if progress else None,
        )
        if as_json:
            typer.echo(json.dumps(found, indent=1))
            return
        for name, value in found.items():
            typer.echo(f"{name}: {value}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    checkout: Annotated[
        Path | None,
        typer.Option(
            help="Checkout of this package's repository. [default: where an editable install comes "
            "from, or the working directory]"
        ),
    ] = None,
) -> None:
    """Measure speed and memory against what one would run otherwise, and compare with stored runs.

    Runs benchmarks/run.py of a checkout, as neither the benchmarks nor their results are part of an
    installed wheel. All other arguments are handed to it: --set cpu|gpu, --part PART, --ovam DIR
    and --daam DIR (peers, unmodified), --quick, --against FILE|none, --budget SECONDS, --out DIR,
    --json. `biasmap bench -- --help` explains them.

    Exit status 1 if a row failed or is worse than in the device's newest stored run: its time over
    that of its group's first row by more than 5 % (15 % of fewer than five rounds) and beyond the
    quartiles of both, or its memory.

    Example: biasmap bench --quick --part overlap
    """
    with _clear_errors(False, "nothing was written"):
        raise typer.Exit(subprocess.call([sys.executable, _benchmarks(checkout), *context.args]))


@app.command()
def env(as_json: Json = False) -> None:
    """Print versions, devices and what was compiled: put this into a bug report."""
    from .environment import describe

    found = describe()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        if not isinstance(value, dict):
            shown = ", ".join(value) or "none" if isinstance(value, list) else value
            typer.echo(f"{name}: {shown}")
            continue
        typer.echo(f"{name}:")
        for key, entry in value.items():
            typer.echo(f"  {key}: {'not installed' if entry is None else entry}")


def main() -> None:
    """Runs the command line."""
    # Read when torch loads. By default libgomp's threads spin while they wait, and so starve those
    # they wait for on a busy machine: 16 pictures took 13 s, and 5 s with this.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_freed_memory()
    app()


def _benchmarks(checkout: Path | None) -> Path:
    """The script in ``checkout``, or in one that is found."""
    beside = Path(__file__).resolve().parents[2]  # of an editable install
    places = [beside, Path.cwd()] if checkout is None else [checkout]
    for place in places:
        if (place / "benchmarks/run.py").is_file() and (place / "csrc").is_dir():
            return place / "benchmarks/run.py"
    raise ValueError(
        f"the benchmarks are in the repository, not in the installed package, and not in "
        f"{' or '.join(map(str, places))}: clone it and give --checkout DIR"
    )


def _seeds(text: str) -> list[int]:
    """Seeds of a count, a range or a list.

    Example:
        >>> _seeds("3"), _seeds("5-7"), _seeds("1,9")
        ([0, 1, 2], [5, 6, 7], [1, 9])
    """
    text = text.replace(" ", "")
    if re.fullmatch(r"\d+", text) and int(text) > 0:
        return list(range(int(text)))
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        first, last = int(match[1]), int(match[2])
        if first <= last:
            return list(range(first, last + 1))
    elif re.fullmatch(r"\d+(,\d+)+,?|\d+,", text):
        return [int(part) for part in text.split(",") if part]
    raise typer.BadParameter(
        f"expected a count ('20'), a range ('5-24') or a list ('1,7,9'), got {text!r}",
        param_hint="--seeds",
    )


def _fractions(text: str) -> tuple[float, ...]:
    """Two fractions with a comma between them; that they are two, the plan checks.

    Example:
        >>> _fractions("0.05, 0.1")
        (0.05, 0.1)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"expected two fractions ('0.05,0.1'), got {text!r}", param_hint="--containment"
        ) from None


def _branch(given: str | None) -> Any:
    if given not in (None, "cond", "uncond"):
        raise ValueError(f"--branch must be cond or uncond, got {given!r}")
    return given or "cond"


def _pair(text: str) -> tuple[str, str]:
    """The two concepts of ``"doctor,woman"``."""
    words = [word.strip() for word in text.split(",")]
    if len(words) != 2 or not all(words):
        raise ValueError(f"--pair must be two concepts, 'doctor,woman', got {text!r}")
    return words[0], words[1]


def _templates(given: list[str] | None) -> str | list[str] | None:
    if not given:
        return None
    return given[0] if len(given) == 1 else given


def _plan(flags: dict[str, Any], config: Path | None) -> Any:
    from pydantic import ValidationError

    from .audit.plan import AuditPlan, explain, read_settings

    settings = {} if config is None else read_settings(config)
    if (
        "energy" in flags
    ):  # --scale alone leaves the file's other settings of the energy as they are
        flags = {**flags, "energy": {**(settings.get("energy") or {}), **flags["energy"]}}
    try:
        return AuditPlan(**{**settings, **flags})
    except ValidationError as error:
        raise ValueError(explain(error)) from error


def _load(model: str, revision: str | None, device: str | None, dtype: str | None) -> Any:
    import torch

    from .pipelines import load_pipeline

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kinds = ("float32", "float16", "bfloat16")
    if dtype is not None and dtype not in kinds:
        raise ValueError(f"--dtype must be one of {', '.join(kinds)}, got {dtype!r}")
    return load_pipeline(model, revision=revision, dtype=dtype or "float32", device=chosen)


def _draw_maps(
    pipe: Any,
    prompt: str,
    text: str,
    concepts: tuple[str, ...],
    *,
    seed: int,
    steps: int,
    guidance_scale: float,
    branch: Any,
    layers: list[str] | None,
) -> tuple[Any, Any]:
    import torch

    from .attribution import attribute
    from .concepts import AttributionPrompt

    attributed = AttributionPrompt(text, concepts)
    with attribute(pipe, attributed, branch=branch, layers=layers) as recorder:
        output = pipe(
            prompt,
            generator=torch.Generator("cpu").manual_seed(seed),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        )
    return output.images[0], recorder.maps()


def _write_maps(picture: Any, found: Any, out: Path) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "picture.png"]
    picture.save(written[0])
    for concept in found.concepts:
        word = re.sub(r"[^\w-]+", "-", concept)
        path = out / f"overlay-{word}.png"
        found.overlay(picture, concept).save(path)
        written.append(path)
    written.append(out / "maps.safetensors")
    found.save(written[-1])
    return [str(path) for path in written]


def _pair_rows(found: Any, percentile: float) -> list[dict[str, Any]]:
    from itertools import combinations

    from .overlap import chance_iou, iou

    return [
        {
            "a": a,
            "b": b,
            "iou": float(iou(found[a], found[b], percentile=percentile)[0]),
            "chance": chance_iou(1 - percentile / 100),
        }
        for a, b in combinations(found.concepts, 2)
    ]


@contextmanager
def _clear_errors(
    verbose: bool, interrupted: str = "the same command goes on where it stopped"
) -> Iterator[None]:
    """Errors that a user can mend become one line on stderr and exit status 1."""
    # What libraries have to say is theirs, short of a warning: an export's would be 500 lines.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="biasmap: %(message)s")
    logging.getLogger("biasmap_fast").setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"biasmap: interrupted; {interrupted}", err=True)
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _mendable(error):
            raise
        logger.debug("traceback", exc_info=True)
        typer.echo(f"biasmap: error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def _mendable(error: RuntimeError) -> bool:
    """Whether a `RuntimeError` is one of this package's, and not a fault inside it."""
    return type(error).__module__.partition(".")[0] == (__package__ or "").partition(".")[0]


if __name__ == "__main__":
    main()
