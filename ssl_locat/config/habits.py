"""Keys as other projects call them, and ours: what people type from habit is answered with the full key.

From LightlyTrain's and Lightning's arguments, DINO's and iBOT's options, and timm's train.py.
"""

# their name -> our full key
HABITS = {
    # length and steps
    "epochs": "optim.epochs",
    "max_epochs": "optim.epochs",
    "num_epochs": "optim.epochs",
    "steps": "optim.total_steps",
    "max_steps": "optim.total_steps",
    "total_steps": "optim.total_steps",
    "batch_size": "optim.global_batch_size",
    "global_batch_size": "optim.global_batch_size",
    "batch_size_per_gpu": "optim.global_batch_size",
    "bs": "optim.global_batch_size",
    "accumulate_grad_batches": "optim.accumulate_steps",
    "grad_accum_steps": "optim.accumulate_steps",
    "accum_iter": "optim.accumulate_steps",
    # the optimiser
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "min_lr": "optim.min_lr",
    "warmup_epochs": "optim.warmup_epochs",
    "weight_decay": "optim.weight_decay",
    "wd": "optim.weight_decay",
    "clip_grad": "optim.clip_grad",
    "gradient_clip_val": "optim.clip_grad",
    "betas": "optim.betas",
    "layer_decay": "optim.layer_decay",
    # data
    "data_path": "data.train",
    "data_dir": "data.train",
    "dataset": "data.train",
    "train": "data.train",
    "images": "data.train",
    "val": "data.test",
    "test": "data.test",
    "workers": "data.workers",
    "num_workers": "data.workers",
    "num_classes": "data.num_classes",
    # the model
    "model": "backbone.name",
    "arch": "backbone.name",
    "patch_size": "backbone.patch_size",
    "img_size": "crops.global_size",
    "image_size": "crops.global_size",
    "drop_path": "backbone.drop_path_rate",
    "drop_path_rate": "backbone.drop_path_rate",
    "pretrained": "backbone.init",
    "pretrained_weights": "backbone.init",
    "embed_dim": "backbone.embed_dim",
    "depth": "backbone.depth",
    "num_heads": "backbone.num_heads",
    # the objective
    "method": "objective.name",
    "loss": "objective.name",
    "out_dim": "objective.num_prototypes",
    "num_prototypes": "objective.num_prototypes",
    "teacher_temp": "objective.teacher_temp",
    "warmup_teacher_temp_epochs": "objective.teacher_temp_warmup_epochs",
    "freeze_last_layer": "objective.frozen_last_layer_epochs",
    "use_bn_in_head": "objective.batch_norm",
    "momentum_teacher": "teacher.momentum",
    "momentum": "teacher.momentum",
    # crops
    "global_crops_scale": "crops.global_scale",
    "local_crops_scale": "crops.local_scale",
    "local_crops_number": "crops.num_local",
    "mean": "crops.mean",
    "std": "crops.std",
    # the run
    "out": "run_dir",
    "output": "run_dir",
    "output_dir": "run_dir",
    "out_dir_path": "run_dir",
    "default_root_dir": "run_dir",
    "save_dir": "run_dir",
    "saveckp_freq": "checkpoint.every_steps",
    "save_every": "checkpoint.every_steps",
    "checkpoint_hist": "checkpoint.keep_last",
    "log_interval": "log.every_steps",
    "log_every_n_steps": "log.every_steps",
    "accelerator": "device",
    "amp": "precision",
    "use_fp16": "precision",
    "torchcompile": "compile",
    "grad_checkpointing": "activation_checkpointing",
    "strategy": "parallel",
}

# what is no key here, and what takes its place
ELSEWHERE = {
    "devices": "processes are the launcher's: torchrun --nproc-per-node 8 --no-python ssl-locat pretrain ..., or --on slurm",
    "gpus": "processes are the launcher's: torchrun --nproc-per-node 8 --no-python ssl-locat pretrain ..., or --on slurm",
    "num_nodes": "nodes are the launch profile's: --on slurm,nodes=4",
    "resume": "the same command resumes by itself; --resume PATH starts from a certain checkpoint",
    "resume_interrupted": "the same command resumes by itself; --resume PATH starts from a certain checkpoint",
    "ckpt_path": "the same command resumes by itself; --resume PATH starts from a certain checkpoint",
    "overwrite": "nothing is overwritten: give another run_dir, or delete the folder",
    "opt": "the optimiser is AdamW; its keys are under optim",
    "optimizer": "the optimiser is AdamW; its keys are under optim",
    "callbacks": "probes, checkpoint and log are sections of the YAML: docs/config.md",
}

# values as others write them: key -> {theirs: ours}
VALUES = {
    "precision": {
        "16-mixed": "fp16",
        "16": "fp16",
        "float16": "fp16",
        "half": "fp16",
        "amp": "bf16",
        "true": "bf16",
        "bf16-mixed": "bf16",
        "bfloat16": "bf16",
        "32": "fp32",
        "32-true": "fp32",
        "float32": "fp32",
    },
    "device": {"gpu": "cuda", "cuda:0": "cuda"},
}


def plain(name: str) -> str:
    """`--batch-size` and `batch-size` are `batch_size`."""
    return name.lstrip("-").replace("-", "_")


def in_our_words(name: str, value: object = None) -> str:
    """' Here it is optim.lr: optim.lr=0.1' for a key that others call `name`, '' if nobody does."""
    name = plain(name)
    if name in ELSEWHERE:
        return f" Here {ELSEWHERE[name]}."
    if name not in HABITS:
        return ""
    key = HABITS[name]
    if value is None or isinstance(value, dict | list):
        return f" Here it is {key}."
    return f" Here it is {key}, as in {key}={our_value(key, value)}" + (
        " (images of one step on all GPUs together)." if key == "optim.global_batch_size" else "."
    )


def our_value(key: str, value: object) -> object:
    """`bf16` for a `precision` of `bf16-mixed`; other values as they are."""
    return VALUES.get(key, {}).get(str(value).lower(), value)
