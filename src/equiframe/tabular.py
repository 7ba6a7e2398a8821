"""A small network for tables and embeddings: standardise, hidden layers, a linear map to the head's features."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from equiframe.heads import Head, HeadOutput

MOST_FEATURES = 1024


def feature_width(num_classes: int) -> int:
    """D = K − 1, in which a simplex of K vectors fits and loses nothing; at most `MOST_FEATURES`, where frames of smaller
    angles begin."""
    return min(num_classes - 1, MOST_FEATURES)


class TableNetwork(nn.Module):
    r"""``rows (B, F)`` → :math:`(x-\mu)/\sigma` → (linear, ReLU) for each hidden layer → linear → ``features (B, D)`` → head.

    Without hidden layers the features are an affine map of the rows; with a simplex frame in D = K−1 dimensions and no norm
    that is the model of multinomial logistic regression (any logits that sum to 0 over the classes), in other coordinates.

    μ and σ are buffers (0 and 1 until `standardise` sets them), so they travel with the state dict.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, num_inputs: int, hidden: Sequence[int], head: Head) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_inputs))
        self.register_buffer("scale", torch.ones(num_inputs))
        widths = [num_inputs, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Linear(widths[-1], head.dim))
        self.head = head

    @property
    def num_products(self) -> int:
        """Multiplications of one row's way through the network."""
        body = sum(layer.weight.numel() for layer in self.body if isinstance(layer, nn.Linear))
        head = self.head
        projection = 0 if head.inner_dim == head.dim else head.dim * head.inner_dim
        return body + projection + head.inner_dim * head.num_classes

    @torch.no_grad()
    def standardise(self, mean: Tensor, scale: Tensor) -> None:
        """Set μ and σ, each ``(F,)``."""
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, rows: Tensor) -> HeadOutput:
        return self.head(self.body((rows - self.mean) / self.scale))
