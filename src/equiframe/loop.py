"""The training loop: one step after another, what is not finite, and the state that continuing exactly needs."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from equiframe.data.batches import Loader, Part
from equiframe.errors import InputError
from equiframe.losses import Loss
from equiframe.model import Classifier
from equiframe.numerics import Numerics
from equiframe.optimise import WeightAverage, at_sharpest_point, fixed_statistics, set_learning_rate
from equiframe.parallel import is_sharded, own, sharded_like, whole
from equiframe.profiling import StepProfiler, phase
from equiframe.recipe import Recipe

Progress = Callable[[dict], None]


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
    known: float = (
        0.0  # share of the images of batches that were not mixed that the network had right, of the epoch before
    )
    right: float = 0.0  # of this process's such images of the epoch so far
    seen: float = 0  # how many those are

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
        if self.recipe.mix_share == "known":
            self.loader.mix_share = self.known
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
        if self.recipe.mix_share == "known":
            record["mix_share"] = self.known
            right, seen = self._right_and_seen()
            self.known, self.right, self.seen = right / seen if seen else self.known, 0.0, 0
        self.epoch, self.step, self.loss_sum, self.seconds, self.skipped = self.epoch + 1, 0, 0.0, 0.0, []
        return record

    def _right_and_seen(self) -> list[float]:
        """`right` and `seen` of all processes."""
        return self.world.add_(torch.tensor([float(self.right), self.seen], dtype=torch.float64)).tolist()

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
            before_it = self.right, self.seen
            with here, fixed_statistics(self.model):
                self._gradients(parts)
            self.right, self.seen = before_it
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
                output = self.head(features)
                loss = part.share * self.criterion(output, part.targets, part.together)
            if self.recipe.mix_share == "known" and isinstance(part.targets, Tensor):
                self.right = self.right + (output.logits.detach().argmax(1) == part.targets).sum()
                self.seen += len(part.targets)
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
            "progress": {
                **{name: getattr(self, name) for name in ("epoch", "step", "loss_sum", "seconds", "skipped", "known")},
                **dict(zip(("right", "seen"), self._right_and_seen(), strict=True)),
            },
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
        if not self.world.leads:  # the first goes on with the counts of all
            self.right, self.seen = 0.0, 0
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
