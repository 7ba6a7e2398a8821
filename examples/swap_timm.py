"""A fixed frame in timm's training script: its optimiser, schedule, mixup, clipping, average of weights and meters.

python examples/swap_timm.py
"""

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, dispatch_clip_grad
from torch.utils.data import DataLoader, TensorDataset

from equiframe import attach, fold, long_tail_indices, stratified_split

images, labels = load_digits(return_X_y=True)
train, test, _ = stratified_split(labels, 0.3, seed=0)
train = train[long_tail_indices(labels[train], num_classes=10, ratio=50)]
x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
x = torch.nn.functional.interpolate(x, size=32)
y = torch.tensor(labels)

torch.manual_seed(0)
np.random.seed(0)  # noqa: NPY002  timm's Mixup draws from it
loader_train = DataLoader(TensorDataset(x[train], y[train]), batch_size=32, shuffle=True, drop_last=True)
loader_eval = DataLoader(TensorDataset(x[test], y[test]), batch_size=128)
EPOCHS = 8

model = timm.create_model("test_resnet", num_classes=10)
model, loss_fn, _ = attach(model, class_counts=np.bincount(labels[train]).tolist(), method="etf-la")  # the one new line
mixup_fn = Mixup(mixup_alpha=0.2, label_smoothing=0.0, num_classes=10)  # soft targets, which every loss here takes
optimizer = create_optimizer_v2(model, opt="adamw", lr=4e-3, weight_decay=0.05)
model_ema = ModelEmaV3(model, decay=0.9)
scheduler, num_epochs = create_scheduler_v2(
    optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=1e-4, updates_per_epoch=len(loader_train)
)

for epoch in range(num_epochs):
    model.train()
    losses_m = AverageMeter()
    for input, target in loader_train:
        input, target = mixup_fn(input, target)
        loss = loss_fn(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), value=5.0, mode="norm")
        optimizer.step()
        model_ema.update(model)
        losses_m.update(loss.item(), input.size(0))
    scheduler.step(epoch + 1)


def validate(model):
    top1_m, losses_m = AverageMeter(), AverageMeter()
    model.eval()
    with torch.inference_mode():
        for input, target in loader_eval:
            output = model(input)
            losses_m.update(loss_fn(output, target).item(), input.size(0))
            top1_m.update(accuracy(output, target)[0].item(), input.size(0))
    return top1_m.avg, losses_m.avg


(top1, loss), (top1_ema, loss_ema) = validate(model), validate(model_ema.module)
print(f"accuracy {top1:.1f} % (loss {loss:.2f}), of the averaged weights {top1_ema:.1f} % (loss {loss_ema:.2f})")
folded = fold(model_ema.module)  # timm.models.load_checkpoint reads its state dict into create_model(…, num_classes=10)
timm.create_model("test_resnet", num_classes=10).load_state_dict(folded.state_dict())
