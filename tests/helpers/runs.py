"""What a run leaves behind, made up: a summary, a history, images."""

import numpy as np


def distance(mean, sd=1.5, n=3):
    return {"mean": mean, "sd": sd, "n": n}


def table_row(name, kind, temperature, entropy, seen, unseen):
    return {
        "name": name,
        "kind": kind,
        "temperature": temperature,
        "reward": None,
        "ce": 4.1,
        "entropy": entropy,
        "frechet": seen,
        "frechet_unseen": unseen,
        "kernel_unseen": distance(unseen["mean"] / 1000, 0.002),
    }


def make_summary(after=450.0, matched=453.0, unseen=88.0, last=-0.484):
    table = [
        table_row("base, T=1", "base", 1.0, 3.73, distance(471.6), distance(93.1)),
        table_row("base, T=0.95", "temperature", 0.95, 3.48, distance(458.3), distance(90.2)),
        table_row("base, T=0.916", "matched", 0.916, 3.33, distance(matched), distance(88.8)),
        table_row("VA-π", "vapi", 1.0, 3.34, distance(after), distance(unseen)),
        table_row("CE only", "control", 1.0, 3.71, distance(472.3), distance(93.3)),
        table_row("floor", "floor", None, None, distance(257.2), distance(40.3)),
    ]
    return {
        "method": {
            "name": "vapi",
            "title": "VA-π post-training",
            "curves": [
                ["reward", "Reward", "reward, −(MSE + LPIPS)"],
                ["held_out/reward", "Reward, held-out", "reward, −(MSE + LPIPS)"],
                ["entropy", "Policy entropy", "nats per token"],
                ["absent", "Of which there is nothing", ""],
            ],
        },
        "name": "c2i_demo",
        "steps": 40,
        "config": {"vapi": {"group_size": 8}},
        "versions": {"jax": "0.10.2"},
        "devices": {"kind": "cpu", "count": 8, "mesh": {"data": 2, "fsdp": 4}},
        "seconds": {"total": 312.0, "train": 131.0},
        "parameters": {"policy": 2123456},
        "reward": {"first": -0.505, "last": last},
        "ce": {"first": 4.118, "last": 4.171},
        "entropy": {"first": 3.73, "last": 3.34},
        "frechet": {"feature": "VGG features", "before": distance(471.6), "after": distance(after)},
        "frechet_unseen": {
            "feature": "Alex features",
            "before": distance(93.1),
            "after": distance(unseen),
        },
        "table": table,
        "sample_classes": ["cat", "cat", "rocket"],
    }


def make_history(count=40):
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, count + 1):
        row = {"step": step, "time": 0.0, "reward": -0.5 + step / 2000 + rng.normal() / 200}
        row |= {"ce": 4.1, "entropy": 3.7 - step / 100, "grad_norm": 2.0, "reward_std": 0.1}
        row |= {"advantages_nonzero": 0.99, "clip_fraction": 0.0}
        if step % 10 == 0:
            row["held_out/reward"] = -0.5 + step / 2000
        rows.append(row)
    rows[1]["grad_norm"] = None
    rows[1]["non_finite"] = ["grad_norm"]
    return rows


def make_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
