"""A fixed frame in a torchvision model, trained by plain PyTorch, then folded into an ordinary nn.Linear.

python examples/swap_head.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torchvision.models import VisionTransformer

from equiframe import attach, fold, long_tail_indices, stratified_split

images, labels = load_digits(return_X_y=True)
train, test, _ = stratified_split(labels, 0.3, seed=0)
train = train[long_tail_indices(labels[train], num_classes=10, ratio=50)]  # 125 images of digit 0, 2 of digit 9
x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
y = torch.tensor(labels)

torch.manual_seed(0)
model = VisionTransformer(image_size=8, patch_size=2, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)
attached = attach(model, class_counts=np.bincount(labels[train]).tolist(), method="etf-la")
print(attached)
model, loss, parameters = attached
optimizer = torch.optim.AdamW(parameters, lr=1e-3)

for epoch in range(30):
    for batch in np.array_split(np.random.default_rng(epoch).permutation(train), len(train) // 32):
        optimizer.zero_grad()
        loss(model(x[batch]), y[batch]).backward()  # or model(x[batch], labels=y[batch]).backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    before = model(x[test])
    fold(model)  # from here on a torchvision model like any other
    after = model(x[test])
recall = [(after.argmax(1)[y[test] == k] == k).double().mean().item() for k in range(10)]
print(f"{type(model.heads.head).__name__}: logits differ by at most {(after - before).abs().max():.1e}")
print(f"macro accuracy {100 * np.mean(recall):.1f} %")
