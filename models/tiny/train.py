# SPDX-License-Identifier: MIT
"""Train the tiny MoE model on a CPU until a wall-clock limit.

    python -m models.tiny.train --data build/tiny-data --out build/tiny-run --minutes 70

The learning rate follows the clock, not the steps: warm-up, constant, then linear decay over the last part of
`--minutes`, so that a slower machine trains less but still completes the schedule. Writes loss.csv and
checkpoint.pt to `--out`; the checkpoint is replaced atomically every few minutes, and a run resumes from it,
time spent included.
"""

import argparse
import csv
import os
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from models.tiny.model import Config, TinyMoE

WARMUP_STEPS = 60
DECAY_FROM = 0.55  # share of the time after which the learning rate falls
BALANCE_WEIGHT = 0.003  # a third of the customary 0.01: keeps experts alive, leaves room to specialise


def batch_of(tokens, rng, batch, n_ctx):
    """Random windows of the token stream: inputs and next tokens, each (batch, n_ctx)."""
    at = rng.integers(0, len(tokens) - n_ctx - 1, size=batch)
    windows = torch.from_numpy(np.stack([tokens[i : i + n_ctx + 1] for i in at]).astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def validate(model, tokens, n_ctx, windows):
    """Mean loss in nats per token over `windows` evenly spread windows of held-out text."""
    starts = np.linspace(0, len(tokens) - n_ctx - 1, windows).astype(int)
    total = 0.0
    for i in starts:
        ids = torch.from_numpy(tokens[i : i + n_ctx + 1].astype(np.int64))
        total += F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:]).item()
    return total / windows


def rate(step, done):
    """Learning-rate factor at this step and at this share of the time."""
    decay = 1.0 if done < DECAY_FROM else max(0.02, (1.0 - done) / (1.0 - DECAY_FROM))
    return min(1.0, (step + 1) / WARMUP_STEPS) * decay


class Run:
    """One training run: model, optimiser and progress, kept in the checkpoint of folder `out`."""

    def __init__(self, out, lr):
        self.checkpoint = out / "checkpoint.pt"
        self.config = Config()
        self.model = TinyMoE(self.config)
        self.lr, self.step, self.tokens, self.seconds = lr, 0, 0, 0.0
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), foreach=True)
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint)
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
            print(f"resumed at step {self.step}, {self.seconds / 60:.1f} min", flush=True)

    def save(self):
        """Replace the checkpoint; at every moment there is a complete one."""
        temporary = f"{self.checkpoint}.tmp"
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "config": asdict(self.config),
        }
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)

    def learn(self, inputs, targets, factor):
        """One optimiser step; returns the loss and the balance loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * factor
        logits, _, balance = self.model(inputs)
        loss = F.cross_entropy(logits.view(-1, self.config.n_vocab), targets.reshape(-1))
        self.optimiser.zero_grad(set_to_none=True)
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimiser.step()
        self.step += 1
        self.tokens += inputs.numel()
        return loss.item(), balance.item()


def train_until(run, limit, batch, train, val, log_file):
    """Train until `limit` seconds of training time are spent, writing a CSV row every 25 steps."""
    n_ctx = run.config.n_ctx
    log = csv.writer(log_file)
    if log_file.tell() == 0:
        log.writerow(["minutes", "step", "tokens", "learning_rate", "train_loss", "val_loss", "balance"])
    begin = time.monotonic() - run.seconds
    last_saved, recent = run.seconds, []
    while run.seconds < limit:
        rng = np.random.default_rng(run.step)  # by step, so that a resumed run sees new windows
        factor = rate(run.step, run.seconds / limit)
        recent.append(run.learn(*batch_of(train, rng, batch, n_ctx), factor))
        run.seconds = time.monotonic() - begin
        if run.step % 25 == 0:
            loss, balance = np.mean(recent, axis=0)
            val_loss = f"{validate(run.model, val, n_ctx, 8):.4f}" if run.step % 100 == 0 else ""
            log.writerow(
                [
                    f"{run.seconds / 60:.2f}",
                    run.step,
                    run.tokens,
                    f"{run.lr * factor:.2e}",
                    f"{loss:.4f}",
                    val_loss,
                    f"{balance:.3f}",
                ]
            )
            log_file.flush()
            recent = []
        if run.seconds - last_saved > 240:
            last_saved = run.seconds
            run.save()
    run.save()
    loss = validate(run.model, val, n_ctx, 64)
    log.writerow([f"{run.seconds / 60:.2f}", run.step, run.tokens, "", "", f"{loss:.4f}", ""])
    print(f"done: {run.step} steps, {run.tokens} tokens, validation loss {loss:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by models.tiny.data")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pt and loss.csv")
    parser.add_argument("--minutes", type=float, default=70.0, help="wall-clock limit of the whole run")
    parser.add_argument("--batch", type=int, default=5, help="windows per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    train = np.fromfile(args.data / "train.bin", dtype=np.uint16)
    val = np.fromfile(args.data / "val.bin", dtype=np.uint16)
    run = Run(args.out, args.lr)
    with open(args.out / "loss.csv", "a", newline="") as log_file:
        train_until(run, args.minutes * 60, args.batch, train, val, log_file)


if __name__ == "__main__":
    main()
