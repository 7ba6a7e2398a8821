"""The training loop, and what a run does around it: prepare, train, test once, save."""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from equiframe.backbones import check_backbone
from equiframe.data.batches import Loader, Part
from equiframe.data.prepare import PreparedData, prepare_data
from equiframe.errors import InputError
from equiframe.heads import training_parameters
from equiframe.losses import Loss
from equiframe.measure import measure, open_run
from equiframe.method import METHOD_FIELDS, build_loss, resolve_method
from equiframe.model import Classifier, ModelCard, build_classifier, save_classifier
from equiframe.numerics import Numerics, choose_numerics, keep_memory, reproducible
from equiframe.optimise import WeightAverage, at_sharpest_point, build_optimizer, fixed_statistics, set_learning_rate
from equiframe.ordering import order_epoch, order_frame
from equiframe.parallel import World, blocks_of, is_sharded, joined, own, sharded_like, whole
from equiframe.profiling import StepProfiler, phase
from equiframe.recipe import WITHOUT_EFFECT, Recipe
from equiframe.runs import RunFolder, as_json, as_npz, environment, settings_that_differ
from equiframe.second_stage import run_second_stage
from equiframe.tracking import Tracker, check_tracks, event_writer, make_loader

Progress = Callable[[dict], None]
SLOW_SAVE = 10.0  # seconds


class Interrupted(Exception):
    """Training stopped on request, after saving; `equiframe train … --resume` continues it."""


class Diverged(InputError):
    """A loss, gradient or weight that is not finite.

    Attributes:
        record: ``epoch`` and ``step`` (from 0), ``what``, ``lr``, and the ``images`` of the batch by name.
    """

    def __init__(self, message: str, record: dict[str, object]) -> None:
        super().__init__(message)
        self.record = record


def learning_rate(recipe: Recipe, done: float) -> float:
    """Learning rate after a share ``done`` in [0, 1] of the run.

    Linear warm-up, then ×0.1 after 80 % and ×0.01 after 90 % (the paper's 160 and 180 of 200 epochs), or a cosine to 0.
    """
    if done < recipe.warmup or recipe.warmup == 1:
        return recipe.lr * done / recipe.warmup
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * (done - recipe.warmup) / (1 - recipe.warmup)))
    return recipe.lr * (0.01 if done >= 0.9 else 0.1 if done >= 0.8 else 1.0)


@dataclass
class Trainer:
    """Model, loss and optimiser of a run, and the loop over them.

    Attributes:
        observed: the model that can be looked at between epochs, inside `together`: ``model`` itself unless its backbone is sharded.
    """

    recipe: Recipe
    model: Classifier
    criterion: Loss
    optimizer: torch.optim.Optimizer
    loader: Loader
    numerics: Numerics
    observed: Classifier | None = None
    epoch: int = 0
    step: int = 0  # of the epoch
    loss_sum: float = 0.0  # of the epoch's steps so far
    seconds: float = 0.0  # of the epoch's steps so far
    profiler: StepProfiler | None = None
    skipped: list[dict] = field(default_factory=list)  # steps of the epoch that were left out, as in `Diverged.record`

    def __post_init__(self) -> None:
        self.world = self.numerics.world
        self.observed = self.observed or self.model
        backbone = torch.compile(self.model.backbone) if self.numerics.compile else self.model.backbone
        self.backbone, self.head = self.world.data_parallel(backbone), self.world.data_parallel(self.model.head)
        self.model.head.world = self.world
        self.average = WeightAverage(self.model, self.recipe.ema) if self.recipe.ema else None
        self.scaler = self.numerics.scaler()

    @property
    def evaluated(self) -> Classifier:
        """The model to measure and to save: the average of the weights where there is one."""
        return self.observed if self.average is None else self.average.model

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, `observed` has the weights of a sharded model, in all processes; outside, it takes no memory of a GPU."""
        if self.observed is self.model:
            yield
            return
        backbone = self.observed.backbone.to(self.numerics.device)
        for tensor, sharded in zip(
            backbone.state_dict().values(), self.model.backbone.state_dict().values(), strict=True
        ):
            tensor.copy_(whole(sharded))
        try:
            yield
        finally:
            backbone.to("cpu")

    def train_epoch(self, stop_requested: Callable[[], bool], progress: Progress) -> dict[str, float]:
        """The rest of the current epoch. Raises `Interrupted` between two steps on request."""
        self.model.train()
        device, steps = self.numerics.device, self.loader.steps
        if self.profiler is not None:
            self.profiler.begin(steps - self.step)
        pending: list[Tensor] = []  # steps not yet looked at: a GPU is not made to wait at each
        started = time.perf_counter()  # the making of batches counts, telling and saving do not
        for parts in self.world.steps(self.loader.parts(self.epoch, self.step)):
            lr = learning_rate(self.recipe, (self.epoch + (self.step + 1) / steps) / self.recipe.epochs)
            self.criterion.at((self.epoch + self.step / steps) / self.recipe.epochs)
            loss = self.train_step(parts, lr)
            pending.append(torch.stack([loss.float(), self._largest_gradient()]))
            self.step += 1
            if device.type == "cpu" or self.step % 50 == 0 or self.step == steps:
                self._look_at(pending, lr)
            self.seconds += time.perf_counter() - started
            if self.profiler is not None:
                self.profiler.step()
            if self.step % 10 == 0:
                progress({"epoch": self.epoch, "step": self.step, "steps": steps, "loss": self._mean_loss()})
            if stop_requested() and self.step < steps:
                self._look_at(pending, lr)
                self._check_weights(lr)
                raise Interrupted
            started = time.perf_counter()
        self._check_weights(lr)
        record = {
            "epoch": self.epoch,
            "loss": self._mean_loss(),
            "lr": lr,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(steps * self.loader.batch_size / max(self.seconds, 1e-9), 1),
        }
        if self.skipped:
            record["skipped"] = self.skipped
        self.epoch, self.step, self.loss_sum, self.seconds, self.skipped = self.epoch + 1, 0, 0.0, 0.0, []
        return record

    def train_step(self, parts: list[Part], lr: float) -> Tensor:
        """One step of gradient descent on this process's parts of a step's images; returns their share of its loss, detached.

        With ``on_nonfinite="skip"`` a step whose loss or gradient is not finite leaves model and optimiser as they were.
        """
        set_learning_rate(self.optimizer, lr)
        skip = self.recipe.on_nonfinite == "skip"
        before = {n: b.clone() for n, b in self.model.named_buffers()} if skip else {}  # running statistics
        loss = self._gradients(parts)
        if self.recipe.sam:
            here = at_sharpest_point(self.model.parameters(), self.recipe.sam, self.world)
            with here, fixed_statistics(self.model):
                self._gradients(parts)
        with phase("optimiser"):
            good = not skip or not self.world.any(not math.isfinite(loss + self._largest_gradient()))
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
                self.scaler.step(self.optimizer)  # not where a gradient is infinite: the scale was too large
                self.scaler.update()
            elif good:
                self.optimizer.step()
            if not good:
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(before[name])
            elif self.average is not None:
                self.average.update(self.model)
        return loss

    def _gradients(self, parts: list[Part]) -> Tensor:
        """Gradients of a step, summed over its parts and the processes; returns this process's share of the loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = [self._backward(part, last=part is parts[-1]) for part in parts]
        return sum(losses[1:], losses[0])

    def _backward(self, part: Part, *, last: bool) -> Tensor:
        """Loss of a part, weighted by its share of the step's images; its gradient is added to what is there, and with that
        of the last part the processes exchange theirs."""
        with contextlib.nullcontext() if last else self.world.alone(self.backbone, self.head):
            with phase("features"), self.numerics.autocast():
                features = self.backbone(part.images)
            with phase("head and loss"):
                loss = part.share * self.criterion(self.head(features), part.targets, part.together)
            with phase("backward"):
                total = self.world.size * loss  # DistributedDataParallel takes the mean
                (total if self.scaler is None else self.scaler.scale(total)).backward()
        return loss.detach()

    # --- what is not finite -------------------------------------------------------------------------------------------

    def _largest_gradient(self) -> Tensor:
        """The largest absolute value of a gradient (in this process's shards): not finite if one is not."""
        gradients = [own(p.grad) for p in self.model.parameters() if p.grad is not None]
        gradients = [gradient for gradient in gradients if gradient.numel()]
        if not gradients:
            return torch.zeros((), device=self.numerics.device)
        return torch.nn.utils.get_total_norm(gradients, math.inf).float()

    def _look_at(self, pending: list[Tensor], lr: float) -> None:
        """Count the losses of the last steps; a step that is not finite ends the run, or is recorded as skipped."""
        first = self.step - len(pending)
        looked = self.world.add_(torch.stack(pending).cpu().double()).tolist() if pending else []  # losses: shares
        for step, (loss, gradient) in enumerate(looked, first):
            overflow = self.scaler is not None and self.scaler.get_scale() >= 1  # of the scaled loss: it was halved
            if math.isfinite(loss) and (math.isfinite(gradient) or overflow):
                self.loss_sum += loss
                continue
            wrong = "a gradient became infinite or NaN" if math.isfinite(loss) else f"the loss became {loss}"
            if self.recipe.on_nonfinite == "stop" or len(self.skipped) + 1 == self.loader.steps:
                raise self._diverged(wrong, step, lr)
            self.skipped.append(self._record(wrong, step, lr))
        pending.clear()

    def _mean_loss(self) -> float:
        return self.loss_sum / max(1, self.step - len(self.skipped))

    def _check_weights(self, lr: float) -> None:
        if self.world.any(not all(bool(own(x).isfinite().all()) for x in self.model.state_dict().values())):
            raise self._diverged("a weight became infinite or NaN", self.step - 1, lr)

    def _record(self, what: str, step: int, lr: float) -> dict[str, object]:
        images = self.loader.images.names
        names = [images[i] for i in self.loader.positions(self.epoch, step)]
        return {"epoch": self.epoch, "step": step, "what": what, "lr": lr, "images": names}

    def _diverged(self, what: str, step: int, lr: float) -> Diverged:
        record = self._record(what, step, lr)
        names = record["images"]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        advice = f"Try a lower --lr than {self.recipe.lr:g}, --precision float32"
        return Diverged(
            f"{what} in epoch {self.epoch + 1}, step {step + 1} (learning rate {lr:.3g}; images {', '.join(names[:3])}{more}); "
            f"training stopped. {advice}" + (", --on-nonfinite skip" if self.recipe.on_nonfinite == "stop" else ""),
            record,
        )

    def state(self) -> dict[str, object]:
        """All that continuing exactly needs; data order and augmentation follow from seed, epoch and step. Every process calls
        it, for the generators of all and to put shards together, which the first gets: a checkpoint looks the same whether
        shared, sharded or neither."""

        def put_together(value: object) -> object:
            if not is_sharded(value):
                return value
            together = whole(value)
            return together.cpu() if self.world.leads else None

        device = self.numerics.device
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        (rng, cuda_rng), *others = self.world.gather((torch.get_rng_state(), cuda))
        return {
            "recipe": self.recipe.to_dict(),
            "model": tree_map(put_together, dict(self.model.state_dict())),
            "average": None if self.average is None else self.average.state(),
            "optimizer": tree_map(put_together, self.optimizer.state_dict()),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "progress": {name: getattr(self, name) for name in ("epoch", "step", "loss_sum", "seconds", "skipped")},
            "rng": rng,
            "cuda_rng": cuda_rng,
            "rng_of_others": others,
        }

    def load_state(self, state: dict) -> None:
        mine = self.model.state_dict()
        self.model.load_state_dict({name: sharded_like(x, mine[name]) for name, x in state["model"].items()})
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        of_each = {
            i: {
                name: sharded_like(x, parameters[i]) if isinstance(x, Tensor) else x for name, x in of_parameter.items()
            }
            for i, of_parameter in state["optimizer"]["state"].items()
        }
        # the groups are the recipe's, and earlier versions made others of the same parameters in the same order
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": of_each})
        if self.average is not None:
            self.average.load_state(state["average"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        generators = [(state["rng"], state["cuda_rng"]), *state.get("rng_of_others", ())]
        if self.world.rank >= len(generators):  # there were fewer processes then
            self.world.own_generator(self.recipe.seed, self.epoch, self.step)
            return
        rng, cuda_rng = generators[self.world.rank]
        torch.set_rng_state(rng)
        if cuda_rng and self.numerics.device.type == "cuda":  # earlier versions kept that of each GPU
            index = self.numerics.device.index or 0
            torch.cuda.set_rng_state(cuda_rng[min(index, len(cuda_rng) - 1)], self.numerics.device)


@contextmanager
def stop_on_signals():
    """Yields a function that says whether Ctrl-C or SIGTERM came; a second signal acts at once, as usual."""
    asked = False

    def ask(signum, frame) -> None:
        nonlocal asked
        asked = True
        for number in previous:
            signal.signal(number, previous[number])

    try:
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody can press Ctrl-C here
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
        remix=recipe.remix, sampler=recipe.sampler, epochs=recipe.epochs, seed=recipe.seed, draft=recipe.draft,
        accumulate=recipe.accumulate,
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
        method: the name that the new run goes by: ``crt`` where a run of ``ce`` gets that stage. Default: that of the run.
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
            "give a run that was trained with --second-stage none"
        )
    if stage == "none":
        raise InputError("second stage 'none' changes nothing; choose another")
    recipe = first.recipe().with_(second_stage=stage, stage_tau=tau, method=method or card.method)
    resolve_method(recipe.method, {name: getattr(recipe, name) for name in METHOD_FIELDS})
    folder.check(recipe, resume=False)
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
    if "second_stage_val_macro" in chosen:
        words.append(f"validation macro {100 * chosen['second_stage_val_macro']:.1f} %")
    return ", ".join(words)


def _describe(
    card: ModelCard, model: Classifier, trainable: dict[str, int], numerics: Numerics, recipe: Recipe
) -> list[str]:
    """What is about to happen, for a person: in particular which parameters train."""
    head = {name: size for name, size in trainable.items() if name.startswith("head.")}
    in_head = ", ".join(f"{name} ({size:,})" for name, size in head.items()) or "nothing"
    parts = numerics.world.size * recipe.accumulate
    shared = [
        f"a step of {recipe.batch_size * recipe.accumulate} images is shared by {numerics.world.size} process(es), in "
        f"{recipe.accumulate} part(s) each; BatchNorm sees "
        + ("a part of one process" if not recipe.sync_batch_norm else "a part of all processes")
        + (
            f"; the backbone is sharded and put together in {len(blocks_of(model.backbone)) + 1} piece(s)"
            if recipe.shard
            else ""
        )
    ]
    tried = "; tried " + ", ".join(f"{k}: {v:g} img/s" for k, v in numerics.trial.items()) if numerics.trial else ""
    return [
        f"method: {card.method} on {card.backbone}, {model.head.dim} features; trains {sum(trainable.values()):,} "
        f"parameters, in the head: {in_head}",
        f"machine: {numerics.device}, {numerics.precision}, {numerics.memory_format}{', compiled' if numerics.compile else ''}"
        f"{', deterministic' if recipe.deterministic else ''}{tried}"
        + (f" ({numerics.note})" if numerics.note else ""),
        *(shared if parts > 1 else []),
    ]
