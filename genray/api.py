"""The functions of genray, for programs and notebooks; the commands in `genray.cli` call the same ones.

Each imports what it needs when it is called, so that `genray --help` loads neither torch nor Ray.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from genray.config.arguments import Count, Natural, Place, Seconds, check_again, checked

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from genray.config.schema import RunConfig
    from genray.reporting.content import Report
    from genray.reporting.trials import Trials

    Configuration: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | RunConfig | None
    Overrides: TypeAlias = Iterable[str] | Mapping[str, Any]
    Network: TypeAlias = nn.Module
    Factory: TypeAlias = Callable[..., nn.Module]
    Model: TypeAlias = nn.Module | Callable[[Tensor], Tensor]
    Images: TypeAlias = Tensor | np.ndarray
    Arrays: TypeAlias = tuple[np.ndarray, np.ndarray]
    Examples: TypeAlias = tuple[Images, Images] | Dataset | None
    Labeller: TypeAlias = Model | str | os.PathLike[str]
    Unlabelled: TypeAlias = Images | str | None
    Names: TypeAlias = str | Iterable[str]
    Radius: TypeAlias = float | str | Fraction
    Radii: TypeAlias = Radius | Sequence[Radius] | Mapping[str, Radius | Sequence[Radius]] | None
    SavedImages: TypeAlias = dict[str, np.ndarray]
    Transfer: TypeAlias = str | os.PathLike[str] | Mapping[str, Model | str | os.PathLike[str]] | None
    Paths: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
    EpochCallback: TypeAlias = Callable[[dict[str, Any]], object]
    PlanCallback: TypeAlias = Callable[[str], object]
    Findings: TypeAlias = tuple[Report, list[tuple[str, str]]]
    Table: TypeAlias = Trials
else:  # not checked here: the functions that read these values report more than their type
    Configuration = Overrides = Network = Factory = Model = Images = Labeller = Unlabelled = Names = Any
    Arrays = Examples = Radii = SavedImages = Transfer = Paths = EpochCallback = PlanCallback = Findings = Table = Any

DEFAULT_STORAGE = "runs"
Runtime = Literal["ray", "local"]
Device = Literal["auto", "cpu", "cuda"]
Layout = Literal["trades", "robustbench", "onnx", "safetensors"]


@checked
def train(
    config: Configuration = None,
    overrides: Overrides = (),
    *,
    runtime: Runtime = "ray",
    address: str | None = None,
    name: str | None = None,
    storage: Place = DEFAULT_STORAGE,
    resume: bool = False,
    overwrite: bool = False,
    network: Factory | None = None,
    train: Examples = None,
    test: Examples = None,
    on_epoch: EpochCallback | None = None,
) -> dict[str, Any]:
    """Trains one run to its end and returns its final record.

    Args:
        config: path of a YAML file, a mapping, a `RunConfig`, or None for the embedded digits run.
        overrides: "key=value" strings, or a mapping with nested or dotted keys; a class in it, or in a `config` that
            is a mapping, stands for its name: your own objective or attack (docs/own.md).
        runtime: "ray" (one actor a learner) or "local" (one after another in this process, same bits on CPU).
        address: Ray cluster to join, "auto" or "host:port"; None starts a private Ray on this machine.
        name: run name, instead of the configuration's.
        storage: path or URI of the folder that holds the runs.
        resume: go on from the newest checkpoint of a run of this name; of a finished run, only its record is read.
        overwrite: begin a run of this name anew; the old one is removed once the new one can start.
        network: returns the network to train, a `torch.nn.Module` from (N, C, H, W) in [0, 1] to logits; instead of
            `model.name`. Called with `model.options` and with num_classes, in_channels and image_size as far as it
            has such parameters; sent to the actors by value if it is defined in a notebook or script.
        train: the training images, instead of `data.source`: (x, y), or a Dataset of (image, label). x is (N, C, H, W),
            or (N, H, W, C) where the last axis has 1 or 3 entries and the second has not, or (N, H, W); uint8, or
            floats in [0, 1], which are rounded to 8 bits; y (N,) integers 0..K-1. Read once, into memory; a resumed
            run is given the same ones.
        test: the test images, likewise.
        on_epoch: called with each epoch's record, as in `metrics.jsonl`; again for epochs that are replayed.

    Returns:
        The record of `results.json`: accuracies are fractions with 95 % Wilson intervals.

    Raises:
        InputError: configuration, data, folder or cluster are wrong; nothing was started.
        GenrayError: the run failed.
    """
    from genray.reporting.results import Results
    from genray.training import train_run

    how = {"runtime": runtime, "address": address, "name": name, "storage": storage, "on_epoch": on_epoch}
    return Results(
        train_run(config, overrides, **how, resume=resume, overwrite=overwrite, network=network, train=train, test=test)
    )


@checked
def test_images(run: Place) -> Arrays:
    """The test images of a run, as they are decoded for it.

    Args:
        run: path or URI of a run folder.

    Returns:
        (x, y): (N, C, H, W) uint8 and (N,) int64 class numbers, as `genray.evaluate` takes them.

    Raises:
        InputError: there is no run, or its data are not there.
    """
    from genray.evaluation.sources import test_images_of

    return test_images_of(run)


@checked
def evaluate(
    model: Model,
    x: Images,
    y: Images,
    *,
    attacks: Names = ("standard",),
    norms: Names = ("linf",),
    epsilon: Radii = None,
    step_size: Radii = None,
    num_classes: Count | None = None,
    seed: Natural = 0,
    block_size: Count | None = None,
    engine: str | None = None,
    workers: Natural | None = None,
    address: str | None = None,
    device: Device = "auto",
    startup_timeout_s: Seconds = 120.0,
    stall_timeout_s: Seconds = 1800.0,
    max_failures: Natural = 5,
    output: Place | None = None,
    resume: bool = False,
    overwrite: bool = False,
    data: dict[str, Any] | None = None,
    transfer: Transfer = None,
    save_images: bool = False,
) -> dict[str, Any]:
    """Natural and robust accuracy of any model on any images.

    Args:
        model: `torch.nn.Module` or a function, images (N, C, H, W) float32 in [0, 1] -> logits (N, K); evaluated in
            eval mode and float32, and neither it nor `x` is changed.
        x: (N, C, H, W) tensor or array, float in [0, 1] or uint8.
        y: (N,) integer labels, 0..K-1.
        attacks: column names or groups: `paper` (all), `standard` (AutoAttack), `pgd20`, `pgd100`, `mim`, `cw`,
            `apgd_ce`, `apgd_dlr`, `apgd_t`, `fab_t`, `square`, `aa`; `transfer` and `transfer_from=FILE` (a run folder
            or model file), whose images are made on other networks; your own classes, or their names
            `package.module:CLASS` (docs/own.md); or one string "pgd20,aa".
        norms: of "linf", "l2", "l1".
        epsilon: norm -> radius on the [0, 1] pixel scale (8/255 may be the string "8/255"), or the radius alone
            with one norm. A list of radii gives the curve over them: what falls at a radius has fallen at every larger
            one, and only what stands is attacked again. By default the radii that a model of genray was trained for,
            else those of the papers: 8/255, 128/255 and 12.
        step_size: norm -> step size of pgd20, pgd100, mim and cw; epsilon / 4 by default.
        num_classes: K; by default the number of logits.
        seed: of all random numbers.
        block_size: examples a block (part of the protocol: attacks that draw for a batch draw for a block); None for
            100, more if images are tiny, and on a GPU of this process as many as half of its free memory holds, up to
            3,200.
        engine: runs the members of AutoAttack: "genray", "genray-bf16" or "pyautoattack" (`evaluation/engines.py`);
            None for "genray" in linf and l2 and "pyautoattack" in l1.
        workers: None evaluates in this process; a number starts as many Ray actors, 0 one a device.
        address: Ray cluster of the workers.
        device: of the workers: "auto", "cpu", or "cuda", which asks for a GPU each even if the cluster has none yet.
        startup_timeout_s: limit of the wait for a first worker.
        stall_timeout_s: seconds without any computing after which a worker is replaced.
        max_failures: tolerated losses: of workers by one block, and of one worker in a row.
        output: folder for finished blocks, `results.json` and `results.parquet`; None keeps nothing.
        resume: go on with the finished blocks in `output`, and their `block_size` and `engine` where these are None.
        overwrite: replace the evaluation in `output`, once the first new block is done.
        data: {"source", "split"} for the record.
        transfer: networks of the column `transfer`: a run folder, for its base learners, or name -> network, run folder
            or model file.
        save_images: write the images that fell into `images/` of `output`, for `load_images`, and score the stored
            ones again; `norms.<norm>.images` says how many still fool the model, also after rounding to 8 bits.

    Returns:
        The record: `natural`, `norms` (a part a norm, or "linf_8/255" a radius where a norm has several), `union`
        (several norms), `findings` (reasons to distrust a number) and `protocol`. Accuracies are fractions with 95 %
        Wilson intervals.

    Raises:
        InputError: arguments, data or folder are wrong; nothing was evaluated.
        StorageError: files could not be written until minutes after the end; the record was printed.
    """
    from genray.evaluation.inputs import EvaluationArguments
    from genray.evaluation.run import run_evaluation
    from genray.reporting.results import Results

    how: tuple[Any, ...] = (num_classes, seed, block_size, engine, output, resume, overwrite, data)
    more: tuple[Any, ...] = (transfer, save_images)
    asked = EvaluationArguments(attacks, norms, epsilon, step_size, *how, *more)
    if workers is None:
        return Results(run_evaluation(model, x, y, asked))
    from genray.runtime.ray.evaluation import run_on_workers
    from genray.runtime.ray.worker_pool import PoolOptions

    limits: tuple[Any, ...] = (workers, address, device, startup_timeout_s, stall_timeout_s, max_failures)
    pool = PoolOptions(*limits)
    together, on_workers = workers or os.cpu_count() or 1, partial(run_on_workers, pool=pool)
    return Results(run_evaluation(model, x, y, asked, together, on_workers))


@checked
def load_images(path: Place) -> SavedImages:
    """The adversarial images that an evaluation with `save_images` wrote.

    Args:
        path: path or URI of the evaluation's folder, or of `images` in it.

    Returns:
        Arrays of one entry an image that fell, at the smallest radius at which the attack found it: `image` (n, C, H,
        W) float32 in [0, 1]; `index` among the evaluated images, `label`, and the classes predicted `before` and
        `after`, int64; `norm`, `epsilon` and `attack` as text; `length`, the norm of the perturbation.

    Raises:
        InputError: there are none, or a file is damaged.
    """
    from genray.evaluation import saved_images

    return saved_images.load_images(path)


@checked
def tune(
    grid: Place,
    overrides: Overrides = (),
    *,
    address: str | None = None,
    storage: Place = DEFAULT_STORAGE,
    max_concurrent: Count | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_plan: PlanCallback | None = None,
    debug: bool = False,
) -> Table:
    """Runs every trial of a grid to its end and writes their table.

    Args:
        grid: path of a grid file.
        overrides: for every trial: "key=value" strings, or a mapping with nested or dotted keys.
        address: Ray cluster to join, "auto" or "host:port"; None starts a private Ray on this machine.
        storage: folder or URI that holds the grid's folder; every node has to see it.
        max_concurrent: at most so many trials at once; None for as many as fit.
        resume: go on with a grid of this name: what is finished is not done again.
        overwrite: begin a grid of this name anew; its trials' runs are removed once the new ones can start.
        on_plan: called with the plan, as `--dry-run` prints it, before the first trial starts.
        debug: show Ray Tune's own report of a failed trial.

    Returns:
        The `Trials`: one row a trial.

    Raises:
        InputError: the grid, a configuration, the storage or the cluster is wrong; no trial was started.
        GenrayError: trials failed; the others' table is written.
    """
    from genray.tuning import require_ray
    from genray.tuning.grid import load_grid

    check_again(resume, overwrite)
    require_ray()
    from genray.reporting.report import report_grid
    from genray.reporting.trials import markdown
    from genray.runtime.ray.cluster import connected, node_resources
    from genray.tuning.plan import needs_of, plan_text
    from genray.tuning.run import begin_folder, check_ended, check_folder, check_room, run_grid

    loaded = load_grid(grid, overrides)
    place = check_folder(loaded, storage, resume, overwrite)  # before the data are read
    needs, widest = needs_of(loaded, address)
    with connected(address, num_cpus=widest):
        if on_plan:
            on_plan(plan_text(needs, node_resources(), None if address else os.cpu_count(), max_concurrent))
        check_room(needs, bool(address))
        folder = begin_folder(loaded, place, overwrite)
        try:
            outcome = run_grid(
                needs, folder, train=train, evaluate=evaluate, max_concurrent=max_concurrent, debug=debug
            )
        finally:
            trials, unwritten = report_grid(folder)
    check_ended(outcome, loaded.size)
    if unwritten:
        print(markdown(trials))  # the figures are not lost with the files
        raise unwritten
    return trials


@checked
def report(
    paths: Paths,
    *,
    output: Place = "report",
    formats: Names | None = None,
    gallery: Paths | None = None,
    images: Count = 300,
) -> Findings:
    """Makes a report of all runs, evaluations, mixtures and grids below some folders.

    Args:
        paths: folders of runs, evaluations, mixtures and grids, or their parent folders.
        output: folder or URI; an earlier report is overwritten, nothing else is.
        formats: a list, or one string "html,md", of html, md, csv, tex, png, svg; all but svg by default.
        gallery: two models, each a run folder or a model file in a run; None for theta_g and the robust base learner
            of the first run that has both; () for no gallery. A gallery needs matplotlib.
        images: at most so many test images are attacked for the gallery.

    Returns:
        (the `Report`, [(folder, reason why it is left out or incomplete)]).

    Raises:
        InputError: nothing that could be shown was found, or an argument is wrong; nothing was written.
    """
    from genray.reporting.report import make_report

    return make_report(paths, output, formats, gallery, images)


@checked
def label(
    model: Labeller,
    output: Place,
    images: Unlabelled = None,
    *,
    image_column: str | None = None,
    resize: bool = False,
    examples: Count | None = None,
    batch_size: Count = 256,
    workers: Natural | None = None,
    address: str | None = None,
    device: Device = "auto",
    startup_timeout_s: Seconds = 120.0,
    overwrite: bool = False,
) -> str:
    """Writes images with the classes that a model predicts, as a file for `data.extra`.

    Args:
        model: a run folder or a model file written by genray (path or URI), or any `torch.nn.Module`, images
            (N, C, H, W) float32 in [0, 1] -> logits (N, K).
        output: path or URI of the file. FILE.npz has `image` (N, H, W, C) uint8, `label` (N,) int64 and `pseudo` (N,),
            all true; FILE.parquet has columns of the same names, images as PNG.
        images: (N, C, H, W) uint8, or "npz:FILE", "parquet:FILE_OR_FOLDER", "image_folder:FOLDER" (any folders below
            it), "svhn_extra[:FOLDER]"; their labels are not read. None, with a run folder, for the training images
            that the run left out by `data.train_examples`.
        image_column: Parquet column with the images; by default found from the column types.
        resize: resize image files to the size of the model's images.
        examples: label only the first so many images.
        batch_size: images a forward pass.
        workers, address, startup_timeout_s: as in `genray.evaluate`.
        device: where to compute, each worker too; "auto" takes a GPU where there is one.
        overwrite: replace a file that is there.

    Returns:
        Path or URI of the file.

    Raises:
        InputError: the model, the images or the output are wrong; nothing was written.
        GenrayError: a worker or writing failed.
    """
    from genray.evaluation.labelling import label_images

    on_workers = None
    if workers is not None:
        from genray.runtime.ray.labelling import predicted_on_workers
        from genray.runtime.ray.worker_pool import PoolOptions

        limits: tuple[Any, ...] = (workers, address, device, startup_timeout_s)
        on_workers = partial(predicted_on_workers, pool=PoolOptions(*limits))
    how = {"image_column": image_column, "resize": resize, "examples": examples, "batch_size": batch_size}
    return label_images(model, output, images, **how, device=device, on_workers=on_workers, overwrite=overwrite)


@checked
def export(source: Place, layout: Layout, output: Place | None = None, *, overwrite: bool = False) -> str:
    """Writes the model of a run as a file that other programs read.

    The file gives the logits of `genray.load_model(source)` for images in [0, 1], normalisation included.

    Args:
        source: a run folder, or a model file written by genray: path or URI.
        layout: "onnx"; "safetensors", which `load_model` reads, with a model card (`README.md`) beside it; or "trades"
            or "robustbench": a state dict that the classes of these repositories load strictly
            (`genray.interop.published_layouts` names the classes and their limits).
        output: path or URI of the file; by default `model.onnx`, `model.safetensors`, `model_trades.pt` or
            `model_robustbench.pt` beside the model.
        overwrite: replace a file that is there.

    Returns:
        Path or URI of the file.

    Raises:
        InputError: the source, the output or the layout is wrong; nothing was written.
        GenrayError: writing failed, or the ONNX file does not give the same logits.
    """
    from genray.interop.export import export_model

    return export_model(source, layout, output, overwrite)


@checked
def load_model(path: Place, device: Any = "cpu", *, network: Factory | None = None, trust: bool = False) -> Network:
    """Loads the model of a genray run.

    Args:
        path: a run folder, a `model.pt` or a `model.safetensors`: a local path or a URI, such as "hf://USER/NAME".
        device: torch device of the model.
        network: the factory of a network of your own, as in `genray.train(network=...)`.
        trust: import the factory `package.module:FACTORY` that the file names, which runs that package's code.

    Returns:
        The network in eval mode: images (N, C, H, W) in [0, 1] -> logits (N, K).

    Raises:
        ConfigError: torch has no such device.
        CheckpointError: absent, corrupt, or not written by genray (for other files: `build_model`, `load_into`).
        RunFolderError: the URI cannot be understood, or the storage does not answer.
    """
    from genray.interop import load

    return load.load_model(path, device, network=network, trust=trust)
