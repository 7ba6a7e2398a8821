"""Equiframe as a scikit-learn classifier, for tables and embeddings.

model = EquiframeClassifier().fit(X, y)
model.predict(X_new)
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from equiframe.errors import InputError
from equiframe.frames.assign import SIMILAR
from equiframe.imbalance import stratified_split
from equiframe.losses import Loss, class_balanced_weights
from equiframe.method import build_head, build_loss, resolve_method
from equiframe.numerics import choose_device
from equiframe.optimise import build_optimizer, set_learning_rate
from equiframe.tabular import TableNetwork, feature_width

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.metrics import recall_score
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils import Tags, check_random_state, compute_class_weight
    from sklearn.utils.multiclass import _check_partial_fit_first_call, check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise InputError("EquiframeClassifier needs scikit-learn 1.6 or newer: pip install 'equiframe[train]'") from error

CHUNK = 1 << 22  # numbers of a batch of rows that prediction makes at once
SMALL_STEP = 1 << 22  # multiplications of a forward pass below which a second thread costs more than it gives


class EquiframeClassifier(ClassifierMixin, BaseEstimator):
    r"""A small network on a fixed frame (or with any other head and loss of ``equiframe methods``), scikit-learn's way.

    Standardised columns go through the hidden layers and a linear map to D = min(K−1, 1024) features, which meet the fixed
    class vectors. Rows may be dense, sparse (made dense a batch at a time), pandas or polars; labels anything that
    scikit-learn sorts. It computes in the precision of X: float32 stays float32 (faster), all else is float64.

    Args:
        method: a name of ``equiframe methods`` without a second stage.
        hidden_layer_sizes: widths of the hidden layers; ``()`` is a linear map to the frame.
        method_options: fields of the method that differ from its own, as ``{"tau": 0.5}``. Unlike elsewhere, ``norm`` is
            ``"none"`` unless said here: columns are standardised, and every sample counts by its weight exactly.
        standardise: subtract the (weighted) mean of each column and divide by its standard deviation.
        max_iter: passes over the data, or ``"auto"``: as many as show the network 10 million rows, within 10 and 100.
        batch_size: rows of a step, or ``"auto"``: N/50, within 200 and 4,096 (all, where there are fewer).
        learning_rate_init: of AdamW; in `fit` it falls to 0 along a cosine over ``max_iter``, in `partial_fit` it stays.
        alpha: AdamW's decoupled weight decay.
        early_stopping: hold out ``validation_fraction`` of each class (a class of one row stays in training), stop when
            the mean recall of its classes has not risen by ``tol`` in ``n_iter_no_change`` passes, and keep the best weights.
            Without, all passes are made.
        warm_start: `fit` goes on from the weights, and the columns' means, that are there. The classes must be the same.
        class_weight: ``{class: weight}``, ``"balanced"`` or None. The loss of each sample is multiplied by its class's weight.
            n_k in a loss's formula is the (weighted) number of rows of class k and knows nothing of a dict: with a
            logit-adjusted loss, whose predictions hold for equally frequent classes, a weight of 2 makes a class count as if
            it were twice as frequent as the others. ``"balanced"`` weighs by N/(K·n_k), and the loss is told that classes
            are equally large, for so they now are: nothing is balanced twice, and ``etf-la`` becomes weighted ``etf-ce``.
        random_state: of weights, frame, order of rows and held-out rows; None draws them anew.
        verbose: print the loss of each pass.
        device: ``cpu``, ``cuda``, ``mps``, ``auto``.

    Attributes:
        classes_, n_features_in_, feature_names_in_: as in every classifier of scikit-learn.
        class_counts_: (weighted) training rows of each class, ``(K,)``; what `partial_fit` has seen so far.
        n_iter_: passes made, all of them where training went on.
        loss_, loss_curve_: the mean loss of the last pass, of each.
        validation_scores_: mean recall on held-out rows after each pass of the last `fit`, with ``early_stopping``.
        network_: the `equiframe.tabular.TableNetwork`.

    `predict_proba` of a logit-adjusted method is what holds where all classes are equally frequent, as it is of
    ``LogisticRegression(class_weight="balanced")``. For the frequencies of the training rows take ``method="etf-ce"``, or calibrate
    (``CalibratedClassifierCV``).

    Global state of torch (generators, threads, gradient mode) is left as it was found.

    Raises:
        InputError: in `fit`, for a parameter out of range, one class, labels that are no classes.
    """

    def __init__(
        self,
        method: str = "etf-la",
        *,
        hidden_layer_sizes: tuple[int, ...] | int = (128,),
        method_options: Mapping[str, object] | None = None,
        standardise: bool = True,
        max_iter: int | str = "auto",
        batch_size: int | str = "auto",
        learning_rate_init: float = 1e-2,
        alpha: float = 1.0,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        warm_start: bool = False,
        class_weight: Mapping | str | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
        device: str = "cpu",
    ) -> None:
        self.method = method
        self.hidden_layer_sizes = hidden_layer_sizes
        self.method_options = method_options
        self.standardise = standardise
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.alpha = alpha
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.class_weight = class_weight
        self.random_state = random_state
        self.verbose = verbose
        self.device = device

    # --- the verbs ----------------------------------------------------------------------------------------------------

    def fit(self, X, y, sample_weight=None) -> EquiframeClassifier:
        """Train on rows ``X (N, F)`` and labels ``y (N,)``; ``sample_weight (N,)`` ≥ 0.

        Only the ratios of weights matter (but to effective numbers, whose n_k is the sum of class k's weights). A whole weight is as good as so many copies of a row, to rounding, where all rows make one batch; weight 0 is no row.
        """
        self._check_parameters()
        goes_on = self.warm_start and hasattr(self, "network_")
        X, y, weights = self._validated(X, y, sample_weight, reset=not goes_on)
        classes, targets = np.unique(y, return_inverse=True)
        if goes_on and not np.array_equal(classes, self.classes_):
            raise InputError(
                f"warm_start goes on with the classes {_few(self.classes_)}; these rows have {_few(classes)}"
            )
        if not goes_on:
            self._begin(classes)
        self.__dict__.pop("_optimizer", None)
        held_out: tuple | None = None
        if self.early_stopping:
            train, held, _ = stratified_split(targets, self.validation_fraction, seed=self._draw())
            if not len(held):
                raise InputError("early_stopping holds out rows of each class, and no class has two")
            held_out = tuple(None if part is None else part[held] for part in (X, targets, weights))
            X, targets, weights = (None if part is None else part[train] for part in (X, targets, weights))
        self.class_counts_ = np.bincount(targets, weights, len(classes)).astype(float)
        with self._training():
            if not goes_on:
                self._make_network(X, weights)
            with _threads_for(self._batch_size(len(targets)) * self.network_.num_products):
                self._passes(X, targets, weights, held_out)
        return self

    def partial_fit(self, X, y, classes=None, sample_weight=None) -> EquiframeClassifier:
        """One pass over more rows. The first call needs ``classes``: all that will ever come.

        Means and standard deviations of the columns, and the class counts in the loss, are of all rows seen so far.
        """
        self._check_parameters()
        if self.early_stopping:
            raise InputError(
                "partial_fit does not know which rows will come, so it cannot hold any out: early_stopping=False"
            )
        X, y, weights = self._validated(X, y, sample_weight, reset=not hasattr(self, "network_"))
        if _check_partial_fit_first_call(self, classes) or not hasattr(self, "network_"):
            self._begin(self.classes_)
        targets = np.searchsorted(self.classes_, y).clip(max=len(self.classes_) - 1)
        if not np.array_equal(self.classes_[targets], y):
            unknown = y[self.classes_[targets] != y]
            raise InputError(f"label {_few(unknown[:1])} is none of the classes {_few(self.classes_)}")
        self.class_counts_ = self.class_counts_ + np.bincount(targets, weights, len(self.classes_))
        with self._training():
            if not hasattr(self, "network_"):
                self._make_network(X, weights)
            else:
                self._standardise(X, weights)
            if not hasattr(self, "_optimizer"):
                self._optimizer = self._new_optimizer()
            with _threads_for(self._batch_size(len(targets)) * self.network_.num_products):
                self._pass(X, targets, self._all_weights(targets, weights), self._optimizer, self._loss())
            self._say()
        return self

    def predict(self, X) -> np.ndarray:
        """The class of the largest logit, ``(N,)``."""
        check_is_fitted(self, "network_")
        return self.classes_[self._of_logits(self._checked(X), lambda logits: logits.argmax(1))]

    def predict_proba(self, X) -> np.ndarray:
        """The softmax of the logits, ``(N, K)``; columns as in ``classes_``."""
        check_is_fitted(self, "network_")
        return self._of_logits(self._checked(X), lambda logits: torch.softmax(logits, 1))

    def decision_function(self, X) -> np.ndarray:
        """The logits ``(N, K)``; of two classes the second's minus the first's, ``(N,)``."""
        check_is_fitted(self, "network_")
        logits = self._of_logits(self._checked(X), lambda logits: logits)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def __getstate__(self) -> dict:
        """A model that was trained on another device is pickled as one of the CPU, so that it can be read anywhere."""
        state = super().__getstate__()
        if "network_" in state and state["network_"].mean.device.type != "cpu":
            state = {name: value for name, value in state.items() if name != "_optimizer"}
            state["network_"] = copy.deepcopy(self.network_).cpu()
        return state

    # --- what comes in ------------------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        def check(name: str, good: bool, wanted: str) -> None:
            if not good:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

        def number(name: str, wanted: str, good: Callable[[float], bool]) -> None:
            value = getattr(self, name)
            check(name, isinstance(value, numbers.Real) and not isinstance(value, bool) and good(value), wanted)

        for name in ("max_iter", "batch_size"):
            value = getattr(self, name)
            check(
                name, value == "auto" if isinstance(value, str) else _whole(value), "a whole number above 0, or 'auto'"
            )
        check("n_iter_no_change", _whole(self.n_iter_no_change), "a whole number above 0")
        check("hidden_layer_sizes", all(map(_whole, self._hidden())), "whole numbers above 0, or ()")
        number("learning_rate_init", "above 0 and finite", lambda value: 0 < value < math.inf)
        number("alpha", "at least 0 and finite", lambda value: 0 <= value < math.inf)
        number("tol", "at least 0", lambda value: value >= 0)
        number("validation_fraction", "between 0 and 1", lambda value: 0 < value < 1)
        options = self.method_options
        check("method_options", options is None or isinstance(options, Mapping), "a dict of a method's fields, or None")
        weight = self.class_weight
        good = weight is None or isinstance(weight, Mapping) or (isinstance(weight, str) and weight == "balanced")
        check("class_weight", good, "a dict, 'balanced' or None")

    def _hidden(self) -> tuple[int, ...]:
        sizes = self.hidden_layer_sizes
        return tuple(sizes) if np.iterable(sizes) and not isinstance(sizes, str) else (sizes,)

    def _validated(self, X, y, sample_weight, *, reset: bool) -> tuple:
        """Rows, labels, and weights or None; rows of weight 0 are left out."""
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=(np.float64, np.float32), reset=reset)
        check_classification_targets(y)
        if sample_weight is None:
            return X, y, None
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        kept = weights > 0
        if not kept.any():
            raise InputError("every sample_weight is 0: there is nothing to train on")
        return (X, y, weights) if kept.all() else (X[kept], y[kept], weights[kept])

    def _checked(self, X):
        return validate_data(self, X, accept_sparse="csr", dtype=(np.float64, np.float32), reset=False)

    # --- what is made of it -------------------------------------------------------------------------------------------

    def _begin(self, classes: np.ndarray) -> None:
        """Forget what was learned."""
        if len(classes) < 2:
            raise InputError(f"a classifier needs at least two classes; these rows have one class: {_few(classes)}")
        for name in ("network_", "_optimizer", "validation_scores_"):
            self.__dict__.pop(name, None)
        self.classes_ = classes
        self.class_counts_ = np.zeros(len(classes))
        self.loss_curve_: list[float] = []
        self._scaler = StandardScaler()
        self._random = np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1))

    def _draw(self) -> int:
        return int(self._random.integers(2**31 - 1))

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Inside, gradients are made and torch's generators are ours; after it, all is as it was."""
        device = choose_device(self.device)
        cuda = device.type == "cuda"
        with torch.random.fork_rng([device] if cuda else []), torch.inference_mode(False), torch.enable_grad():
            torch.default_generator.manual_seed(self._draw())
            if cuda:
                torch.cuda.manual_seed(self._draw())
            if hasattr(self, "network_"):
                self.network_.to(device)
            yield
        self.network_.eval()
        self.n_iter_ = len(self.loss_curve_)
        self.loss_ = self.loss_curve_[-1]

    def _make_network(self, X, weights: np.ndarray | None) -> None:
        device, dtype = choose_device(self.device), torch.float32 if X.dtype == np.float32 else torch.float64
        if device.type == "mps" and dtype == torch.float64:
            raise InputError("device 'mps' has no float64: give X as float32")
        options = dict(self.method_options or {})
        fields = resolve_method(self.method, options)
        if fields["norm"] is not None and options.get("norm") is None:
            fields = resolve_method(self.method, options | {"norm": "none"})
        if fields["second_stage"] != "none":
            raise InputError(
                f"method {self.method!r} has a second stage ({fields['second_stage']}), which belongs to runs on images"
            )
        if fields["sampler"] != "instance":
            raise InputError(f"sampler {fields['sampler']!r} of method {self.method!r} belongs to runs on images")
        if fields["mixup"] or fields["cutmix"]:
            raise InputError(f"method {self.method!r} mixes images (mixup, cutmix), which belongs to runs on images")
        if fields["frame_order"] in SIMILAR:
            raise InputError(
                f"frame_order {fields['frame_order']!r} belongs to runs on images; here it is 'given' or 'random'"
            )
        self._fields = fields
        head = build_head(fields, feature_width(len(self.classes_)), len(self.classes_), seed=self._draw())
        self.network_ = TableNetwork(X.shape[1], self._hidden(), head).to(device, dtype)
        self._standardise(X, weights)

    def _standardise(self, X, weights: np.ndarray | None) -> None:
        if not self.standardise:
            return
        self._scaler.set_params(with_mean=not _is_sparse(X))
        rows = max(1, CHUNK // X.shape[1])
        for i in range(0, X.shape[0], rows):  # a chunk at a time: it copies what it gets to float64
            self._scaler.partial_fit(X[i : i + rows], sample_weight=None if weights is None else weights[i : i + rows])
        self.network_.standardise(torch.from_numpy(self._scaler.mean_), torch.from_numpy(self._scaler.scale_))

    def _loss(self) -> Loss:
        """The method's loss. Balanced classes are told to be equally large; a class without rows (yet) counts as one row."""
        counts = self.class_counts_
        if self.class_weight == "balanced":
            counts = np.full_like(counts, counts.mean())
        counts = counts / min(1.0, counts[counts > 0].min())
        return build_loss(self._fields, torch.from_numpy(counts.clip(min=1.0))).to(self.network_.mean)

    def _all_weights(self, targets: np.ndarray, weights: np.ndarray | None) -> np.ndarray | None:
        """Sample weights times class weights, or None where all are 1."""
        if self.class_weight is None:
            return weights
        if self.class_weight == "balanced":
            of_class = class_balanced_weights(torch.from_numpy(self.class_counts_.clip(min=1e-12))).numpy()
        else:
            of_class = compute_class_weight(dict(self.class_weight), classes=self.classes_, y=self.classes_)
        return of_class[targets] if weights is None else weights * of_class[targets]

    def _new_optimizer(self) -> torch.optim.Optimizer:
        network = self.network_
        return build_optimizer(
            network.body, network.head, kind="adamw", lr=self.learning_rate_init, weight_decay=self.alpha
        )

    # --- training -----------------------------------------------------------------------------------------------------

    def _passes(self, X, targets: np.ndarray, weights: np.ndarray | None, held_out: tuple | None) -> None:
        """All passes of `fit`, or until the recall of held-out rows has not risen for a while."""
        weights = self._all_weights(targets, weights)
        if weights is not None:
            if not weights.any():
                raise InputError("class_weight and sample_weight leave every row with weight 0")
            weights = weights / weights.mean()
        optimizer, loss = self._new_optimizer(), self._loss()
        last = min(100, max(10, round(1e7 / len(targets)))) if self.max_iter == "auto" else int(self.max_iter)
        self.validation_scores_: list[float] = []
        best, best_state, waited = -math.inf, None, 0
        for done in range(last):
            loss.at(done / last)
            self._pass(X, targets, weights, optimizer, loss, done, last)
            if held_out is None:
                self._say(f"/{last}")
                continue
            score = self._mean_recall(*held_out)
            self.validation_scores_.append(score)
            self._say(f"/{last}")
            waited = 0 if score > best + self.tol else waited + 1
            if score > best:
                best, best_state = score, copy.deepcopy(self.network_.state_dict())
            if waited >= self.n_iter_no_change:
                break
        if best_state is not None:
            self.network_.load_state_dict(best_state)

    def _pass(self, X, targets, weights, optimizer, loss: Loss, done: int = 0, last: int | None = None) -> None:
        """Every row once, in batches of nearly equal size; with ``last``, the learning rate follows a cosine to 0."""
        network, num = self.network_.train(), len(targets)
        batches = np.array_split(self._random.permutation(num), math.ceil(num / self._batch_size(num)))
        sizes, losses = [len(rows) for rows in batches], []
        for i, rows in enumerate(batches):
            if last is not None:
                share = (done + i / len(batches)) / last
                set_learning_rate(optimizer, self.learning_rate_init * (1 + math.cos(math.pi * share)) / 2)
            of_rows = None if weights is None else self._tensor(weights[rows])
            value = loss(network(self._tensor(X[rows])), self._tensor(targets[rows]), sample_weights=of_rows)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        mean = float(np.average(torch.stack(losses).tolist(), weights=sizes))
        if not math.isfinite(mean):
            del self.network_
            raise InputError(
                f"the loss is {mean} after {len(self.loss_curve_) + 1} passes: a learning_rate_init below "
                f"{self.learning_rate_init:g} or standardise=True may help"
            )
        self.loss_curve_.append(mean)

    def _batch_size(self, num: int) -> int:
        return min(num, min(4096, max(200, num // 50)) if self.batch_size == "auto" else int(self.batch_size))

    def _tensor(self, rows) -> Tensor:
        """Rows on the network's device, numbers in its precision."""
        like = self.network_.mean
        tensor = torch.from_numpy(rows.toarray() if _is_sparse(rows) else rows)
        return tensor.to(like.device, like.dtype) if tensor.is_floating_point() else tensor.to(like.device)

    def _of_logits(self, X, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        """What a function makes of the logits, a chunk of rows at a time."""
        network = self.network_
        widest = max(X.shape[1], len(self.classes_), *self._hidden(), 1)
        rows = max(1, CHUNK // widest)
        with torch.inference_mode(), _threads_for(min(rows, X.shape[0]) * network.num_products):
            chunks = (self._tensor(_writable(X[i : i + rows])) for i in range(0, X.shape[0], rows))
            return np.concatenate([function(network(chunk).logits).cpu().numpy() for chunk in chunks])

    def _mean_recall(self, X, targets: np.ndarray, weights: np.ndarray | None) -> float:
        self.network_.eval()
        predicted = self._of_logits(X, lambda logits: logits.argmax(1))
        return float(
            recall_score(targets, predicted, labels=np.unique(targets), average="macro", sample_weight=weights)
        )

    def _say(self, of: str = "") -> None:
        if self.verbose:
            held_out = f", recall of held-out rows {self.validation_scores_[-1]:.4f}" if self.early_stopping else ""
            print(f"pass {len(self.loss_curve_)}{of}: loss {self.loss_curve_[-1]:.4f}{held_out}")


@contextmanager
def _threads_for(products: float) -> Iterator[None]:
    """Inside, one thread where steps are small; after it, as many as before."""
    before = torch.get_num_threads()
    if products >= SMALL_STEP or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value > 0


def _is_sparse(X: object) -> bool:
    return hasattr(X, "toarray")


def _writable(X):
    """The rows, copied where they are read-only (a memory map), which torch warns of."""
    return X if _is_sparse(X) or X.flags.writeable else X.copy()


def _few(classes: np.ndarray) -> str:
    return ", ".join(map(str, classes[:5].tolist())) + (f", … ({len(classes)})" if len(classes) > 5 else "")
