"""A fixed frame under Keras with the torch backend: compile() takes the loss, fit() trains, the head stays in torch.

python examples/swap_keras.py
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from sklearn.datasets import load_digits
from torch import nn

from equiframe import attach, long_tail_indices, stratified_split

images, labels = load_digits(return_X_y=True)
train, test, _ = stratified_split(labels, 0.3, seed=0)
train = train[long_tail_indices(labels[train], num_classes=10, ratio=50)]
x = (images / 16).astype(np.float32)

keras.utils.set_random_seed(0)
network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
network, loss, _ = attach(
    network.to(keras.src.backend.torch.core.get_device()), class_counts=np.bincount(labels[train]).tolist()
)

model = keras.Sequential([keras.Input((64,)), keras.layers.TorchModuleWrapper(network, output_shape=(None, 10))])
model.compile(
    optimizer=keras.optimizers.AdamW(2e-3),
    loss=lambda targets, logits: loss(logits, targets.long().flatten()),
    metrics=["sparse_categorical_accuracy"],
)
model.fit(x[train], labels[train], batch_size=32, epochs=20, verbose=0)
predicted = model.predict(x[test], verbose=0).argmax(1)
recall = [np.mean(predicted[labels[test] == k] == k) for k in range(10)]
print(f"macro accuracy {100 * np.mean(recall):.1f} %")
