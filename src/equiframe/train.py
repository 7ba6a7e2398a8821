"""What a run does around its loop: prepare, settle, train, test once, save; and a second stage for a finished run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from equiframe.backbones import check_backbone
from equiframe.data.prepare import PreparedData, prepare_data
from equiframe.errors import InputError
from equiframe.heads import training_parameters
from equiframe.loop import Diverged, Interrupted, Progress, Trainer, stop_on_signals
from equiframe.measure import measure, open_run
from equiframe.method import METHOD_FIELDS, build_loss, method_with, resolve_method
from equiframe.model import Classifier, ModelCard, build_classifier, save_classifier
from equiframe.numerics import Numerics, choose_numerics, keep_memory, reproducible
from equiframe.optimise import build_optimizer
from equiframe.ordering import order_epoch, order_frame
from equiframe.parallel import World, blocks_of, joined
from equiframe.profiling import StepProfiler
from equiframe.recipe import WITHOUT_EFFECT, Recipe
from equiframe.runs import RunFolder, as_json, as_npz, environment, settings_that_differ
from equiframe.second_stage import run_second_stage
from equiframe.tracking import Tracker, check_tracks, event_writer, make_loader
from equiframe.words import counted

SLOW_SAVE = 10.0  # seconds


def settle(recipe: Recipe, data: PreparedData) -> tuple[Recipe, ModelCard]:
    """Fill in what the recipe left to the method and to the data. The card is that of the model before a second stage."""
    fields = resolve_method(recipe.method, {name: getattr(recipe, name) for name in METHOD_FIELDS})
    backbone = recipe.backbone
    if backbone == "auto":
        backbone = ("resnet20" if data.image_size <= 16 else "resnet32") if data.image_size <= 64 else "timm:resnet18"
    recipe = recipe.with_(
        **fields, backbone=backbone, image_size=data.image_size, augmentation=data.augmentation,
        data_mode=data.data_mode,
    )  # fmt: skip
    card = ModelCard(
        backbone=backbone, width=recipe.width, image_size=data.image_size, class_names=data.class_names,
        train_counts=data.train_counts, mean=data.mean, std=data.std, method=recipe.method,
        method_fields=fields | {"second_stage": "none"},
        centre_crop=recipe.centre_crop,
    )  # fmt: skip
    return recipe, card


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool | str = False,
    data: PreparedData | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda state: None,
    stop: Callable[[], bool] = lambda: False,
    profile: bool = False,
) -> dict[str, object]:
    """Train one run into a folder and return its metrics. Processes that torchrun started train it together, and the first of
    them writes the folder and calls ``say`` and ``progress``.

    Args:
        recipe: what to do; ``auto`` fields are settled and recorded.
        out: the run folder; must be new, or hold this very run with ``resume``.
        resume: continue the run; ``"auto"``: if there is one.
        data: images prepared before (`prepare_data` of the same data fields), to share them between runs.
        say: receives lines for a person; ``progress`` receives the state of the loop.
        stop: asked between steps; once it says True, all is saved and `Interrupted` raised, as after Ctrl-C.
        profile: watch a few steps of the first epoch, and say and write (``OUT/profile``) where their time goes.

    Raises:
        InputError: wrong input; `Diverged`: a loss, gradient or weight that is not finite.
        Interrupted: after Ctrl-C, SIGTERM or ``stop``, with everything saved.
        equiframe.parallel.Lost: if another process of the run died.
    """
    fields = resolve_method(recipe.method, {name: getattr(recipe, name) for name in METHOD_FIELDS})
    check_tracks(recipe.track, build_loss(fields, [1, 1]))  # what can be refused is refused before any work
    check_backbone(recipe.backbone)
    order_epoch(recipe)
    folder = RunFolder(out)
    with joined() as world:
        if not world.leads:
            say = progress = _say_nothing
        try:
            return _train(world, folder, recipe, resume, data, say, progress, stop, profile)
        finally:
            folder.release()


def _say_nothing(what: object) -> None:
    pass


def _train(
    world: World,
    folder: RunFolder,
    recipe: Recipe,
    resume: bool | str,
    data: PreparedData | None,
    say: Callable[[str], None],
    progress: Progress,
    stop: Callable[[], bool],
    profile: bool,
) -> dict[str, object]:
    """`train` in a folder that is released afterwards."""
    if profile and world.size > 1:
        raise InputError("a profile watches one process; train without torchrun for it")
    earlier = world.first(lambda: folder.check(recipe, resume=folder.begun if resume == "auto" else bool(resume)))
    if world.first(lambda: folder.finished):
        say(f"{folder} is finished")
        return world.first(lambda: folder.read_json("metrics.json"))
    asked, checkpoint = recipe, None
    if earlier is not None:  # the run goes on as it was settled then
        world.first(folder.claim)
        recipe = earlier.with_(**{name: getattr(recipe, name) for name in WITHOUT_EFFECT})
    data = data or world.each(lambda: prepare_data(recipe, say), in_turn=recipe.download)
    if earlier is not None:
        world.first(lambda: folder.check_split(data.manifest))
        checkpoint = world.first(lambda: folder.load_checkpoint(say))
    recipe, card = settle(recipe, data)
    torch.manual_seed(recipe.seed)
    model = build_classifier(card, seed=recipe.seed, pretrained=recipe.pretrained and checkpoint is None)
    steps = recipe.epochs * max(1, len(data.train) // (recipe.batch_size * recipe.accumulate))
    keep_memory()
    numerics = choose_numerics(
        model, card.image_size, recipe.batch_size, device=recipe.device, precision=recipe.precision,
        memory_format=recipe.memory_format, compile=recipe.compile, steps=steps * recipe.accumulate, world=world,
    )  # fmt: skip
    recipe = recipe.with_(
        precision=numerics.precision, memory_format=numerics.memory_format, device=str(numerics.device),
        compile="on" if numerics.compile else "off",
    )  # fmt: skip
    model.to(numerics.device, memory_format=numerics.torch_memory_format)
    if recipe.sync_batch_norm:
        world.synchronise_batch_norm(model)
    trainable = training_parameters(model)
    if steps < 300:
        say(f"note: only {steps} steps in all; a smaller --batch-size or more --epochs would train longer")
    for line in _describe(card, model, trainable, numerics, recipe):
        say(line)

    loader = make_loader(
        data.train, card, numerics, recipe, augmentation=recipe.augmentation, mixup=recipe.mixup, cutmix=recipe.cutmix,
        remix=recipe.remix, mix_until=recipe.mix_until, sampler=recipe.sampler, epochs=recipe.epochs, seed=recipe.seed,
        draft=recipe.draft, accumulate=recipe.accumulate,
    )  # fmt: skip
    loader.check_parts()
    observed = model
    if recipe.shard and world.size > 1:
        observed = Classifier(copy.deepcopy(model.backbone).cpu(), model.head)
        world.shard(model.backbone, numerics.device)
    optimizer = build_optimizer(
        model.backbone, model.head, kind=recipe.optimizer, lr=recipe.lr, momentum=recipe.momentum,
        weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay,
    )  # fmt: skip
    if recipe.optimizer == "adamw" and recipe.lr > 0.01:
        say(f"note: AdamW seldom trains at a learning rate of {recipe.lr:g}; --lr 0.001 is usual")
    criterion = build_loss(card.method_fields, card.train_counts).to(numerics.device)
    if not world.leads:
        world.own_generator(recipe.seed)
    trainer = Trainer(recipe, model, criterion, optimizer, loader, numerics, observed)
    if profile:
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[numerics.precision]
        trainer.profiler = StepProfiler(
            folder.path / "profile", model.backbone, card.image_size, loader.batch_size, device=numerics.device,
            dtype=dtype, say=say,
        )  # fmt: skip

    def reorder(epochs_done: int) -> None:
        """Find the frame's order, where this is the time."""
        if order_epoch(recipe) == epochs_done:
            images = make_loader(data.train, card, numerics, recipe)
            with trainer.together():
                say(order_frame(trainer.observed, images, numerics, recipe, by_features=epochs_done > 0))

    tracker = Tracker(recipe, trainer.evaluated, criterion, data, card, numerics)
    try:
        if checkpoint is None:
            record = {
                "trial_images_per_second": numerics.trial,
                "training_parameters": trainable,
                "processes": world.size,
            }
            world.first(lambda: folder.begin(asked, recipe, data.manifest, environment(numerics.device) | record))
            reorder(0)
        else:
            _load_checkpoint(folder, trainer, checkpoint)
            say(f"continuing at epoch {trainer.epoch + 1}, step {trainer.step}")
        world.first(lambda: folder.rewind_history(trainer.epoch))
        with reproducible(recipe.deterministic):
            _train_epochs(trainer, folder, tracker, say, progress, stop, reorder)
    except Diverged as error:
        world.first(folder.discard)
        kept = world.first(lambda record=error.record: folder.keep_divergence(record))
        raise Diverged(f"{error}. {kept}", error.record) from error
    except InputError:
        world.first(folder.discard)
        raise
    with reproducible(recipe.deterministic), trainer.together():
        return finish(folder, trainer.evaluated, card, data, numerics, recipe, say)


def _train_epochs(
    trainer: Trainer,
    folder: RunFolder,
    tracker: Tracker,
    say: Callable[[str], None],
    progress: Progress,
    stop: Callable[[], bool],
    after_epoch: Callable[[int], None],
) -> None:
    """Train to the end, with a line of history and a checkpoint after each epoch and when somebody wants to stop."""
    epochs, world = trainer.recipe.epochs, trainer.world
    write_event = event_writer(trainer.recipe.log if world.leads else "none", str(folder.path / "tensorboard"))
    told = False

    def save() -> None:
        nonlocal told
        state, started = trainer.state(), time.perf_counter()
        world.first(lambda: folder.save_checkpoint(state))
        took = time.perf_counter() - started
        if took > SLOW_SAVE and not told:
            told = True
            say(f"note: saving a checkpoint took {took:.0f} s; the disk of {folder} is slow (nothing is lost by it)")

    with stop_on_signals() as signalled:

        def stop_requested() -> bool:
            return world.any(signalled() or stop())

        while trainer.epoch < epochs:
            try:
                record = trainer.train_epoch(stop_requested, progress)
            except Interrupted:
                save()
                raise
            with trainer.together():
                world.copy_buffers(trainer.evaluated)
                record |= tracker.record()
            after_epoch(trainer.epoch)
            world.first(lambda record=record: folder.append_history(record))
            write_event(record)
            save()
            progress(record | {"epochs": epochs, "done": True})
            if stop_requested() and trainer.epoch < epochs:
                raise Interrupted


def _load_checkpoint(folder: RunFolder, trainer: Trainer, checkpoint: dict) -> None:
    """Continue from a checkpoint; an error if it is not one of this run."""
    where = folder.path / "checkpoints" / "last.pt"
    try:
        difference = settings_that_differ(Recipe(**checkpoint["recipe"]), trainer.recipe)
        if difference:
            raise InputError(f"checkpoint {where} belongs to another recipe ({difference})")
        trainer.load_state(checkpoint)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"checkpoint {where} does not fit this run: {error!r}") from error


def finish(
    folder: RunFolder,
    model: Classifier,
    card: ModelCard,
    data: PreparedData,
    numerics: Numerics,
    recipe: Recipe,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, object]:
    """Run the second stage if there is one, fit the temperature, test once, write ``model.*``, ``details.json``,
    ``predictions.npz`` and ``metrics.json``. The last epoch's weights are used."""
    chosen: dict[str, object] = {}
    if recipe.second_stage not in (None, "none"):
        started = time.perf_counter()
        model, card, chosen = run_second_stage(recipe.second_stage, model, card, data, numerics, recipe)
        say(f"second stage: {_in_words(chosen)}; {time.perf_counter() - started:.1f} s")
    measured = measure(model, card, data, numerics, recipe)

    def write() -> dict[str, object]:
        history = folder.history()
        metrics = measured.metrics | {
            "seconds": round(sum(r["seconds"] for r in history), 3),
            "images_per_second": round(sum(r["images_per_second"] for r in history) / max(len(history), 1), 1),
            "epochs": len(history),
            "selected": "last epoch" + (", average of weights" if recipe.ema else ""),
            **(
                {"skipped_steps": sum(len(r.get("skipped", ())) for r in history)}
                if recipe.on_nonfinite == "skip"
                else {}
            ),
            **chosen,
        }
        files: dict[str, bytes] = {}
        save_classifier(model, measured.card, files.__setitem__)
        files |= {"details.json": as_json(measured.details), "predictions.npz": as_npz(measured.predictions)}
        folder.write_files(files | {"metrics.json": as_json(metrics)})  # last: with it the run is finished
        folder.drop_previous_checkpoint()
        return metrics

    return numerics.world.first(write)


def apply_second_stage(
    run: str | Path,
    stage: str,
    out: str | Path,
    *,
    method: str | None = None,
    tau: float | None = None,
    device: str = "auto",
    data: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, object]:
    """Give a finished run a second stage, in a run folder of its own, and return its metrics.

    The result is that of training anew with ``second_stage``, without training. The folder has no checkpoint.

    Args:
        run: a finished run without a second stage; it stays as it is.
        stage: a name of `equiframe.method.SECOND_STAGES`.
        out: the new run folder.
        method: the name that the new run goes by. Default: the named method that has just these fields (``crt`` where a run of
            ``ce`` gets that stage), else that of the run.
        tau: of the stages tau-norm and post-hoc; None: chosen on validation images.
        data: where the run's images lie now, if not where the run found them.

    Raises:
        InputError: if the folder is not such a run, its data has changed, ``out`` is taken, or the stage makes no sense on
            its head.
    """
    first, folder = RunFolder(run), RunFolder(out)
    model, card, images, numerics, opened = open_run(run, device=device, data=data)
    if card.method_fields.get("second_stage", "none") != "none":
        raise InputError(
            f"{run} has a second stage already ({card.method_fields['second_stage']}); "
            "give a run that was trained with --second-stage none, or by a method without one (etf-mix-la, etf-ce, ce, …)"
        )
    if stage == "none":
        raise InputError("second stage 'none' changes nothing; choose another")
    recipe = first.recipe().with_(second_stage=stage, stage_tau=tau)
    fields = resolve_method(recipe.method, {name: getattr(recipe, name) for name in METHOD_FIELDS})
    recipe = recipe.with_(method=method or method_with(fields) or recipe.method)
    folder.check(recipe, resume=False, resumable=False)
    record = first.read_json("environment.json")
    kept = {name: record[name] for name in ("left_open", "training_parameters") if name in record}
    try:
        folder.begin(recipe, recipe, images.manifest, {})
        folder.write_json("environment.json", environment(numerics.device) | kept | {"second_stage_of": str(run)})
        folder.keep_history(first.history())
        card = replace(card, method=recipe.method, temperature=None, temperature_from=None)
        return finish(folder, model, card, images, numerics, opened.with_(second_stage=stage, stage_tau=tau), say)
    except BaseException:
        folder.discard()
        raise
    finally:
        folder.release()


def _in_words(chosen: dict[str, object]) -> str:
    """What a second stage chose, for a person."""
    words = [str(chosen["second_stage"])]
    if "second_stage_tau" in chosen:
        source = {
            "recipe": "as asked",
            "validation": "chosen on validation images",
            "default": "the usual one: there are no validation images to choose it on",
        }[str(chosen["second_stage_tau_from"])]
        if chosen["second_stage_tau"] == 0:
            source += "; it changes nothing, and --stage-tau sets another"
        words.append(f"τ = {chosen['second_stage_tau']:g}, {source}")
    if "second_stage_share" in chosen:
        words.append(f"{100 * chosen['second_stage_share']:.0f} % of the logits are the new classifier's")
    if "second_stage_val_macro" in chosen:
        words.append(f"validation macro {100 * chosen['second_stage_val_macro']:.1f} %")
    return ", ".join(words)


def _mixing(recipe: Recipe) -> str:
    """``; mixup 1 (share: known, until 80 % of the run)``; nothing where nothing is mixed."""
    kinds = [f"{name} {getattr(recipe, name):g}" for name in ("mixup", "cutmix") if getattr(recipe, name)]
    if not kinds:
        return ""
    limits = ["share: known"] if recipe.mix_share == "known" else []
    limits += [f"until {100 * recipe.mix_until:g} % of the run"] if recipe.mix_until < 1 else []
    return f"; {' or '.join(kinds)}" + (f" ({', '.join(limits)})" if limits else "")


def _features(model: Classifier) -> str:
    head = model.head
    return f"{head.dim} features" + (f", projected to {head.inner_dim}" if head.inner_dim != head.dim else "")


def _describe(
    card: ModelCard, model: Classifier, trainable: dict[str, int], numerics: Numerics, recipe: Recipe
) -> list[str]:
    """What is about to happen, for a person: in particular which parameters train."""
    head = {name: size for name, size in trainable.items() if name.startswith("head.")}
    in_head = ", ".join(f"{name} ({size:,})" for name, size in head.items()) or "nothing"
    parts = numerics.world.size * recipe.accumulate
    shared = [
        f"a step of {recipe.batch_size * recipe.accumulate} images is shared by "
        f"{counted(numerics.world.size, 'process', 'processes')}, in {counted(recipe.accumulate, 'part')} each; BatchNorm sees "
        + ("a part of one process" if not recipe.sync_batch_norm else "a part of all processes")
        + (
            f"; the backbone is sharded and put together in {counted(len(blocks_of(model.backbone)) + 1, 'piece')}"
            if recipe.shard
            else ""
        )
    ]
    tried = "; tried " + ", ".join(f"{k}: {v:g} img/s" for k, v in numerics.trial.items()) if numerics.trial else ""
    return [
        f"method: {card.method} on {card.backbone}, {_features(model)}; trains {sum(trainable.values()):,} "
        f"parameters, in the head: {in_head}"
        + ("" if recipe.sampler == "instance" else f"; classes drawn by {recipe.sampler} sampling")
        + _mixing(recipe),
        f"machine: {numerics.device}, {numerics.precision}, {numerics.memory_format}{', compiled' if numerics.compile else ''}"
        f"{', deterministic' if recipe.deterministic else ''}{tried}"
        + (f" ({numerics.note})" if numerics.note else ""),
        *(shared if parts > 1 else []),
        *(
            [
                f"note: the second stage ({recipe.second_stage}) makes the classifier after the last epoch; accuracies before are without it"
            ]
            if recipe.second_stage not in (None, "none")
            else []
        ),
    ]
