"""A transformer encoder of Hugging Face with two heads, trained by their Trainer; nothing is downloaded.

The encoder is built from a config. Its texts are drawn: words of one topic are more frequent in each than others. One
head tells the topic of a text, the other marks the words that belong to it.

    python examples/transformer_two_heads.py --out transformer.h5
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from gradprobe.integrations.huggingface import GradprobeCallback

TOPICS, WORDS, LENGTH = 4, 64, 24
WEIGHTS = {"topic": 1.0, "marked": 0.5}


def texts(n: int, seed: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    topics = torch.randint(TOPICS, (n,), generator=draw)
    words = torch.randint(WORDS, (n, LENGTH), generator=draw)
    of_topic = torch.randint(WORDS // TOPICS, (n, LENGTH), generator=draw) + topics[:, None] * (WORDS // TOPICS)
    words = torch.where(torch.rand(n, LENGTH, generator=draw) < 0.2, of_topic, words)
    marked = (words // (WORDS // TOPICS) == topics[:, None]).long()
    names = ("input_ids", "topic", "marked")
    return [dict(zip(names, values, strict=True)) for values in zip(words, topics, marked, strict=True)]


class TwoHeads(nn.Module):
    """Returns the loss that is trained on, and under ``losses`` what it is made of."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * hidden,
            max_position_embeddings=LENGTH,
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.topic, self.marked = nn.Linear(hidden, TOPICS), nn.Linear(hidden, 2)

    def forward(self, input_ids: Tensor, topic: Tensor, marked: Tensor) -> dict[str, Any]:
        every = torch.ones_like(input_ids)  # no text is shorter than others
        hidden = self.encoder(input_ids=input_ids, attention_mask=every).last_hidden_state
        losses = {
            "topic": nn.functional.cross_entropy(self.topic(hidden.mean(1)), topic),
            "marked": nn.functional.cross_entropy(self.marked(hidden).flatten(0, 1), marked.flatten()),
        }
        return {"loss": sum(WEIGHTS[task] * loss for task, loss in losses.items()), "losses": losses}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("transformer.h5"))
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--texts", type=int, default=4096)
    options.add_argument("--hidden", type=int, default=64)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--every", type=int, default=10)
    args = options.parse_args()

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=TwoHeads(args.hidden, args.layers),
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=32,
                learning_rate=1e-3,
                eval_strategy="epoch",
                save_strategy="no",
                prediction_loss_only=True,
                label_names=["topic", "marked"],
                remove_unused_columns=False,
                report_to="none",
            ),
            train_dataset=texts(args.texts, seed=0),
            eval_dataset=texts(max(64, args.texts // 8), seed=1),
        )
        GradprobeCallback(tuple(WEIGHTS), args.out, weights=WEIGHTS, every=args.every, overwrite=True).add_to(trainer)
        trainer.train()
    print(f"Recorded. Look at it: gradprobe summary {args.out}; gradprobe plot {args.out}")


if __name__ == "__main__":
    main()
