"""``gradprobe record``: train with a probe and keep what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import click
from typer import Option

from gradprobe.trainers.registry import TRAINERS
from gradprobe.trainers.settings import PRECISIONS, PRESETS, TASKS, Settings

D = Settings()  # for the defaults in the help


def record(
    trainer: Annotated[
        str | None,
        Option(help=f"{', '.join(TRAINERS)}, or your own my_module:MyBalancer. [default: {D.trainer}]"),
    ] = None,
    list_trainers: Annotated[
        bool, Option("--list-trainers", help="Say what each trainer does and costs, and leave.")
    ] = False,
    task: Annotated[
        str | None, Option(help=f"The one that `single` trains: {', '.join(TASKS)}; of dial: a, b.")
    ] = None,
    source: Annotated[
        Path | None, Option("--from", help="An earlier run, for the trainers that are made from one.")
    ] = None,
    out: Annotated[Path | None, Option(help="The run file. [default: conflict.h5]")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a run that is there.")] = False,
    resume: Annotated[Path | None, Option(help="Go on with this run from its last whole epoch.")] = None,
    preset: Annotated[str, Option(help=f"A named configuration: {', '.join(PRESETS)}.")] = "",
    data: Annotated[str | None, Option(help=f"data.yaml, phantom, or dial:angle=120,... [default: {D.data}]")] = None,
    cfg: Annotated[str | None, Option(help=f"YOLOv5 model. [default: {D.cfg}]")] = None,
    weights: Annotated[str | None, Option(help="Start from this state_dict (a .pt file).")] = None,
    hyp: Annotated[Path | None, Option(help="A YOLOv5 hyp yaml: loss gains and optimizer.")] = None,
    imgsz: Annotated[int | None, Option(help=f"Image size, a multiple of 32. [default: {D.imgsz}]")] = None,
    epochs: Annotated[int | None, Option(help=f"[default: {D.epochs}]")] = None,
    batch_size: Annotated[
        int | None, Option(help=f"Images, of all processes together. [default: {D.batch_size}]")
    ] = None,
    device: Annotated[str | None, Option(help=f"cpu, 0, mps; 0,1: one process on each. [default: {D.device}]")] = None,
    processes: Annotated[
        int | None, Option(help="How many train together. [default: as torchrun started, or as devices]")
    ] = None,
    precision: Annotated[str | None, Option(help=f"{', '.join(PRECISIONS)}. [default: {D.precision}]")] = None,
    seed: Annotated[int | None, Option(help=f"Weights, data order, phantoms. [default: {D.seed}]")] = None,
    optimizer: Annotated[str | None, Option(help=f"AdamW or SGD. [default: {D.optimizer}]")] = None,
    lr: Annotated[float | None, Option(help=f"First learning rate. [default: {D.lr}]")] = None,
    lrf: Annotated[float | None, Option(help=f"Last one, as a fraction of it. [default: {D.lrf}]")] = None,
    momentum: Annotated[float | None, Option(help=f"SGD's, or AdamW's beta1. [default: {D.momentum}]")] = None,
    weight_decay: Annotated[float | None, Option(help=f"[default: {D.weight_decay}]")] = None,
    clip_norm: Annotated[
        float | None, Option(help="Clip the global gradient norm; couples tasks. [default: off]")
    ] = None,
    task_weights: Annotated[
        str | None, Option(help="Such as det=1,cls=0.01, or equal; GradNorm's first. [default: 1 each]")
    ] = None,
    gradnorm_alpha: Annotated[float | None, Option(help=f"Pull to equal rates. [default: {D.gradnorm_alpha}]")] = None,
    gradnorm_lr: Annotated[float | None, Option(help=f"Of the weights' own Adam. [default: {D.gradnorm_lr}]")] = None,
    gradnorm_momentum: Annotated[float | None, Option(help=f"Its beta1. [default: {D.gradnorm_momentum}]")] = None,
    gradnorm_layer: Annotated[str | None, Option(help="W. [default: the last convolution of SPPF]")] = None,
    min_weight: Annotated[float | None, Option(help=f"GradNorm's lower bound. [default: {D.min_weight}]")] = None,
    max_weight: Annotated[float | None, Option(help="GradNorm's upper bound. [default: none]")] = None,
    weight_sum: Annotated[
        float | None, Option(help="What GradNorm's weights sum to. [default: number of tasks]")
    ] = None,
    dwa_temperature: Annotated[
        float | None, Option(help=f"Of dwa; larger is more even. [default: {D.dwa_temperature}]")
    ] = None,
    share_until: Annotated[
        str | None, Option(help="dual: the last layer of the trunk that stays shared. [default: none]")
    ] = None,
    top_k: Annotated[int | None, Option(help=f"split: how many layers to double. [default: {D.top_k}]")] = None,
    match_norm: Annotated[
        bool | None,
        Option(
            "--match-norm/--no-match-norm",
            help="Gradient surgery: a combined gradient as long as the joint one. [default: on]",
        ),
    ] = None,
    cagrad_c: Annotated[float | None, Option(help=f"Of cagrad. [default: {D.cagrad_c}]")] = None,
    every: Annotated[int | None, Option(help=f"Measure every so many steps. [default: {D.every}]")] = None,
    micro_batches: Annotated[
        int | None,
        Option(
            help="Train and measure each batch in so many micro-batches, which tells noise from gradient; 4 or more. "
            f"[default: {D.micro_batches}, as a whole]"
        ),
    ] = None,
    probe_loader: Annotated[
        str | None,
        Option(help="Also measure on samples drawn from this split: train, or val. Claims rest on it. [default: off]"),
    ] = None,
    probe_every: Annotated[int | None, Option(help=f"Do so every so many steps. [default: {D.probe_every}]")] = None,
    probe_batches: Annotated[
        int | None,
        Option(help=f"On so many micro-batches, as large as those of the training. [default: {D.probe_batches}]"),
    ] = None,
    updates: Annotated[
        bool | None,
        Option(
            "--updates/--no-updates",
            help="Also take the optimizer's updates apart by task, and record clipping. [default: off]",
        ),
    ] = None,
    ledger: Annotated[
        bool | None,
        Option(
            "--ledger/--no-ledger",
            help="Keep a loss ledger: what each task's part of every update did to each loss. [default: off]",
        ),
    ] = None,
    ledger_burst: Annotated[
        int | None, Option(help="Steps of a burst that the ledger measures. [default: 0, all steps]")
    ] = None,
    ledger_every: Annotated[int | None, Option(help="Steps from one such burst to the next. [default: 0]")] = None,
    ledger_ends: Annotated[
        str | None,
        Option(
            help="Whose gradients value an update: probe, of a fixed probe batch; or batch, the training's own, with "
            f"--micro-batches. [default: {D.ledger_ends}]"
        ),
    ] = None,
    ledger_images: Annotated[
        int | None, Option(help=f"Of the fixed probe batch, from the training split. [default: {D.ledger_images}]")
    ] = None,
    bn_batches: Annotated[
        int | None, Option(help=f"To recompute BatchNorm before evaluating. [default: {D.bn_batches}]")
    ] = None,
    plan: Annotated[
        Path | None, Option(help="What was fixed before the runs (a JSON file); kept in the file as plan.*.")
    ] = None,
    arm: Annotated[str, Option(help="The arm of a study that the run belongs to. [default: its trainer]")] = "",
    group_by: Annotated[
        str | None,
        Option(
            help="Which images are of one clip or patient, as for `gradprobe data check`: auto, folder, prefix, none, "
            f"or a regular expression with a group. [default: {D.group_by}]"
        ),
    ] = None,
    skip_bad: Annotated[bool, Option("--skip-bad", help="Leave bad images out instead of refusing the data.")] = False,
    keep_going: Annotated[bool, Option("--keep-going", help="Go on after a loss that is not finite.")] = False,
    project: Annotated[Path | None, Option(help="Folder of the run, as YOLOv5 names it.")] = None,
    name: Annotated[str | None, Option(help="Its sub-folder.")] = None,
) -> int:
    """Train detection and classification together and record what their gradients do to each other."""
    from gradprobe.cli.interventions import trainer_list
    from gradprobe.cli.recording import Request, record_run

    if list_trainers:
        print(trainer_list())
        return 0
    flags: dict[str, Any] = {
        key: value
        for key, value in locals().items()
        if key in Settings.__dataclass_fields__ and key not in ("skip_bad", "keep_going", "task_weights")
    }
    flags["skip_bad"], flags["keep_going"] = skip_bad or None, keep_going or None
    return record_run(
        Request(
            flags=flags,
            task_weights=task_weights,
            preset=preset,
            hyp=hyp,
            out=out,
            project=project,
            name=name,
            overwrite=overwrite,
            resume=resume,
            source=source,
            plan=plan,
            arm=arm,
            arguments=click.get_current_context().obj or (),
        )
    )
