"""What other trainers lack for long tails, without importing them. Most need nothing: `attach` is enough (docs/integrations.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassStatScores

from equiframe.imbalance import class_groups
from equiframe.integrate import Attached


class LightningMixin:
    """An attached model as a ``LightningModule``: its steps, deferred re-weighting, and recall by class group.

        class Net(LightningMixin, lightning.LightningModule):
            def configure_optimizers(self):
                return torch.optim.AdamW(self.attached_parameters, lr=1e-3)

        net = Net(attach(model, class_counts=counts, method="etf-la"))

    Batches are pairs ``(inputs, targets)``, or mappings with ``labels`` as transformers' collators make them. Logged are
    ``train_loss``, ``val_loss`` and, in percent, ``val_macro`` and the mean recall of each of `class_groups`
    (``val_many``, …, ``val_tail``), over all ranks; a group without validation samples is left out.
    """

    def __init__(self, attached: Attached) -> None:
        super().__init__()
        self.model, self.criterion, self.attached_parameters = attached
        self.scores = MulticlassStatScores(num_classes=attached.head.num_classes, average=None)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)

    def on_train_epoch_start(self) -> None:
        total = self.trainer.estimated_stepping_batches
        self.criterion.at(self.trainer.global_step / total if 0 < total < math.inf else 0.0)

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        loss = self._loss_and_logits(batch, logits=False)[0]
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: object, batch_idx: int) -> None:
        loss, logits, targets = self._loss_and_logits(batch, logits=True)
        self.log("val_loss", loss, batch_size=len(targets), sync_dist=True)
        self.scores.update(logits.argmax(1), targets)

    def on_validation_epoch_end(self) -> None:
        scores = self.scores.compute()  # (K, 5): true positives first, the class's samples last
        self.scores.reset()
        present, recall = scores[:, 4] > 0, scores[:, 0] / scores[:, 4].clamp_min(1)
        groups = {"macro": torch.ones_like(present)}
        if self.criterion.loss.class_counts is not None:
            counts = self.criterion.loss.class_counts.tolist()
            groups |= {
                name: torch.as_tensor(mask, device=present.device) for name, mask in class_groups(counts).items()
            }
        for name, mask in groups.items():
            if bool((mask & present).any()):
                self.log(f"val_{name}", 100 * recall[mask & present].mean(), prog_bar=name == "macro")

    def _loss_and_logits(self, batch: object, *, logits: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        if isinstance(batch, Mapping):
            outputs = self.model(**batch)
            return outputs.loss, outputs.logits, batch["labels"]
        inputs, targets = batch
        if not logits:
            return self.model(inputs, labels=targets), None, targets
        made = self.model(inputs)
        return self.criterion(made, targets), made, targets
