"""Long-tailed text classification: a small ModernBERT from a configuration, Hugging Face's Trainer, nothing downloaded.

Each class is a language of its own: a random Markov chain over 64 words, half of it common to all. The largest class has
50 times as many texts as the smallest; the test is balanced.

python examples/long_tailed_text.py --methods ce,logit-adjusted,etf-la --seeds 0,1,2,3,4 --out result.json
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import ModernBertConfig, ModernBertForSequenceClassification, Trainer, TrainingArguments

from equiframe import attach, class_profile

K, WORDS, LENGTH = 10, 64, 24


def languages(generator: np.random.Generator) -> np.ndarray:
    """Transition probabilities ``(K, WORDS, WORDS)``: common habit, the language's favourite words, its own turns."""
    common = generator.dirichlet(np.full(WORDS, 0.1), WORDS)
    turns = generator.dirichlet(np.full(WORDS, 0.1), (K, WORDS))
    favourites = generator.dirichlet(np.full(WORDS, 0.5), (K, 1))
    return 0.5 * common + 0.3 * favourites + 0.2 * turns


def texts(chains: np.ndarray, labels: np.ndarray, generator: np.random.Generator) -> torch.Tensor:
    """One text for each label; word 0 is kept for padding, so words are 1, …, WORDS."""
    cumulative = chains.cumsum(-1)
    words = [generator.integers(WORDS, size=len(labels))]
    for _ in range(LENGTH - 1):
        draws = generator.random(len(labels))[:, None]
        words.append((cumulative[labels, words[-1]] < draws).sum(1).clip(max=WORDS - 1))
    return torch.tensor(np.stack(words, 1) + 1)


def run(method: str, seed: int, largest: int, epochs: int) -> dict[str, float]:
    generator = np.random.default_rng(seed)
    chains = languages(generator)
    counts = class_profile(K, largest, ratio=50)
    labels = {"train": np.repeat(np.arange(K), counts), "test": np.repeat(np.arange(K), 100)}
    drawn = {split: zip(texts(chains, y, generator), y.tolist(), strict=True) for split, y in labels.items()}
    data = {split: [{"input_ids": x, "labels": k} for x, k in pairs] for split, pairs in drawn.items()}
    transformers.set_seed(seed)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    none = dict.fromkeys(["bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"])
    config = ModernBertConfig(vocab_size=WORDS + 1, pad_token_id=0, classifier_pooling="mean", **size, **none)
    model = ModernBertForSequenceClassification(config)
    attach(model, class_counts=counts, method=method)  # all it takes: Trainer finds the loss beside the logits
    arguments = TrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=1e-3, weight_decay=0.01,
        lr_scheduler_type="cosine", warmup_steps=20, seed=seed, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_drop_last=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data["train"])
    trainer.train()
    hits = trainer.predict(data["test"]).predictions.argmax(1) == labels["test"]
    recall = 100 * hits.reshape(K, -1).mean(1)
    return {"macro": recall.mean(), "head": recall[:3].mean(), "middle": recall[3:6].mean(), "tail": recall[6:].mean()}


parser = argparse.ArgumentParser()
for name, default in {"methods": "etf-la", "seeds": "0", "largest": 400, "epochs": 5, "out": ""}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
chosen = parser.parse_args()
results = {}
for method in chosen.methods.split(","):
    rows = results[method] = [run(method, int(s), chosen.largest, chosen.epochs) for s in chosen.seeds.split(",")]
    cells = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    spread = {name: v.std(ddof=min(1, len(v) - 1)) for name, v in cells.items()}
    print(f"{method:18}", "  ".join(f"{name} {v.mean():5.1f} ± {spread[name]:.1f}" for name, v in cells.items()))
if chosen.out:
    Path(chosen.out).write_text(json.dumps({"arguments": vars(chosen), "results": results}, indent=1))
