"""TRL's GRPOTrainer, a JSON line a step; benchmarks/end_to_end.py runs it in TRL's environment.

    python benchmarks/trl_step.py --model DIR --data FILE --records FILE --steps 7 …

A step is 1,024 answers, sampled by transformers' generate and judged by a comparison of strings,
and one optimizer step. Under torchrun the ranks share the answers. Nothing of this project is
imported. A step ends with a line {"tokens_sampled": …, "tokens_trained": …, "right": …} in the log.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Counts(TrainerCallback):
    """What the answers of one step were, over all ranks; written when the step ends."""

    def __init__(self, log: Path) -> None:
        self._log, self._counts = log, torch.zeros(3, dtype=torch.long)

    def reward(
        self, completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        """1 for an answer that ends with the right box, else 0."""
        found = [
            float(text.endswith(f"\\boxed{{{right}}}"))
            for text, right in zip(completions, answer, strict=True)
        ]
        lengths = list(map(len, completion_ids))
        # every answer goes through forward and backward, also where its group's advantages are 0
        self._counts += torch.tensor([sum(lengths), sum(lengths), int(sum(found))])
        return found

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if dist.is_initialized():
            dist.all_reduce(self._counts)
        if int(os.environ.get("RANK", "0")) == 0:
            names = "tokens_sampled", "tokens_trained", "right"
            line = json.dumps(dict(zip(names, self._counts.tolist(), strict=True)))
            with self._log.open("a") as file:
                file.write(line + "\n")
        self._counts.zero_()


def options(args: argparse.Namespace) -> GRPOConfig:
    """What both programs do alike; and nothing on the way that a step does not need."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch = min(args.micro_batch, args.answers // num_ranks)
    num_micro_batches = args.answers // num_ranks // micro_batch
    return GRPOConfig(
        output_dir=str(args.records.parent / "trl"),
        max_steps=args.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=num_micro_batches,
        steps_per_generation=num_micro_batches,
        num_generations=args.group,
        max_completion_length=args.max_tokens,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        num_iterations=1,
        loss_type="dapo",  # a mean over tokens
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        ddp_backend="gloo" if num_ranks > 1 else None,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in "model", "data", "records":
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in "steps", "answers", "group", "max-tokens", "micro-batch":
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    counts = Counts(args.records)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        reward_funcs=counts.reward,
        args=options(args),
        train_dataset=Dataset.from_list(
            [{"prompt": row["question"], "answer": row["answer"]} for row in rows]
        ),
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        callbacks=[counts],
    )
    trainer.train()


if __name__ == "__main__":
    main()
