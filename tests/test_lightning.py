"""The head, the loss and the measures inside Lightning's Trainer: logged by name, on one process and on two."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

import equiframe
from equiframe.collapse.metrics import NC1, NC3, NC2Angle
from equiframe.collapse.statistics import ClassStatistics
from equiframe.collapse.summary import collapse_measures

lightning = pytest.importorskip("lightning")
K, D = 4, 6


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(5, D)
        self.head = equiframe.FrameHead(D, K, logit_scale=8.0, norm="none")
        self.criterion = equiframe.DotRegression()
        sizes = {"num_classes": K, "dim": D}
        self.metrics = MetricCollection(
            [NC1(**sizes), NC2Angle(**sizes), NC3(**sizes, class_vectors=self.head.class_vectors)]
        )

    def training_step(self, batch, _):
        return self.criterion(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch, _):
        self.metrics.update(self.head(self.backbone(batch[0])).features, batch[1])
        self.log_dict(self.metrics)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def module_and_data(size: int = 64):
    torch.manual_seed(0)
    labels = torch.arange(size) % K
    images = torch.randn(K, 5)[labels] + 0.3 * torch.randn(size, 5)
    return Module(), TensorDataset(images, labels)


@pytest.mark.filterwarnings("ignore")  # Lightning's own advice on workers, loggers and ranks
@pytest.mark.parametrize("processes", [1, 2])
def test_measures_in_lightning_are_those_of_one_pass(tmp_path, processes):
    module, data = module_and_data()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=processes, strategy="ddp_fork" if processes > 1 else "auto",
        default_root_dir=tmp_path, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    batches = DataLoader(data, batch_size=8)
    trainer.fit(module, batches, batches)
    with torch.no_grad():
        features = module.head(module.backbone(data.tensors[0])).features
    statistics = ClassStatistics(K, D)
    statistics.update(features, data.tensors[1])
    expected = collapse_measures(statistics, module.head.class_vectors(), None)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name, key in (("NC1", "nc1"), ("NC2Angle", "nc2_angle"), ("NC3", "nc3")):
        assert logged[name] == pytest.approx(expected[key], rel=1e-5), (name, sorted(expected))
