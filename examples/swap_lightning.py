"""A fixed frame in Lightning: LightningMixin gives the steps, re-weighting that begins late, and recall by class group.

python examples/swap_lightning.py
"""

import lightning
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from equiframe import attach, long_tail_indices, stratified_split
from equiframe.trainers import LightningMixin


class Net(LightningMixin, lightning.LightningModule):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.attached_parameters, lr=2e-3)


images, labels = load_digits(return_X_y=True)
train, test, _ = stratified_split(labels, 0.3, seed=0)
train = train[long_tail_indices(labels[train], num_classes=10, ratio=50)]
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)

lightning.seed_everything(0, verbose=False)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
net = Net(
    attach(
        model, class_counts=np.bincount(labels[train]).tolist(), method="etf-dr", class_weighting="class-balanced",
        reweight_from=0.5,
    )
)  # fmt: skip
trainer = lightning.Trainer(
    max_epochs=20, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=20,
)  # fmt: skip
trainer.fit(
    net,
    DataLoader(TensorDataset(x[train], y[train]), batch_size=32, shuffle=True, drop_last=True),
    DataLoader(TensorDataset(x[test], y[test]), batch_size=128),
)
for name, value in sorted(trainer.callback_metrics.items()):
    print(f"{name} {value:.2f}")
