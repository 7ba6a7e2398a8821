"""A fixed frame in skorch: a scikit-learn classifier with cross-validation, made of any PyTorch model.

python examples/swap_skorch.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from skorch import NeuralNetClassifier
from torch import nn

from equiframe import attach, long_tail_indices

images, labels = load_digits(return_X_y=True)
kept = long_tail_indices(labels, num_classes=10, ratio=20)
x, y = (images[kept] / 16).astype(np.float32), labels[kept]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
model, loss, _ = attach(model, class_counts=np.bincount(y).tolist(), method="etf-la")
net = NeuralNetClassifier(
    model,
    criterion=loss,  # takes what the model returns, as skorch calls it
    optimizer=torch.optim.AdamW,
    lr=2e-3,
    max_epochs=15,
    batch_size=32,
    iterator_train__shuffle=True,
    iterator_train__drop_last=True,  # BatchNorm never sees a single sample
    train_split=None,
    predict_nonlinearity=lambda logits: logits.softmax(1),
    verbose=0,
)
scores = cross_val_score(net, x, y, cv=3, scoring="balanced_accuracy")
print(f"balanced accuracy {100 * scores.mean():.1f} % (three folds: {', '.join(f'{100 * s:.1f}' for s in scores)})")
