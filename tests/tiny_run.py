"""A pretraining that takes seconds: width 24, 12 steps of 16 images."""

from pathlib import Path

from ssl_locat.runs.log import read_jsonl


def write_config(textures: Path, folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(
        f"""
run_dir: {folder}/run
data: {{train: "{textures}/textures-train-*.tar", test: "{textures}/textures-test-*.tar", num_classes: 10, workers: 0}}
backbone: {{name: locatvit_tiny, img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2, drop_path_rate: 0.2, pack_crops: false}}
objective: {{name: dino, num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16}}
crops: {{global_size: 32, local_size: 16, num_local: 2, mode: cpu}}
optim: {{epochs: 2, global_batch_size: 16, lr: 1.0e-2, warmup_epochs: 0.5}}
device: cpu
checkpoint: {{every_steps: 4}}
log: {{every_steps: 2, tensorboard: false}}
"""
    )
    return path


def losses(run_dir: str | Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_jsonl(Path(run_dir) / "metrics.jsonl")}
