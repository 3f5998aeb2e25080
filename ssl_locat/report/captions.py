"""What every number of a run is, and what is good: the captions of the report's curves.

A metric is found by its name without the objective that logged it (`dino_kl` is `kl`) and without what its protocol was asked for
(`top1_k20` is `top1`). One that nobody here knows, of an objective of your own, is shown under its name.
"""

import re
from typing import NamedTuple


class Caption(NamedTuple):
    """One chart. names: the metrics in it, `log`: on a logarithmic scale."""

    title: str
    names: tuple[str, ...]
    what: str
    good: str = ""
    unit: str = ""
    log: bool = False


# (heading, charts) in the order of the page
TRAINING: list[tuple[str, list[Caption]]] = [
    ("Learning", [
        Caption("Loss", ("loss",), "What training makes small: the weighted sum of the objectives, on crops that were never seen before.",
                "A slow fall with a little wobble. At 0 within a few steps, or flat at ln K to the last digit, is sick; near ln K in the first "
                "tenth is normal, since that is what guessing costs.", "nats"),
        Caption("DINO loss", ("dino",), "Cross-entropy between the teacher's and the student's choice among K prototypes, on class tokens.",
                "A slow fall below ln K, which is what guessing costs.", "nats"),
        Caption("iBOT loss", ("ibot",), "The same cross-entropy on patches that the student does not see; crops without hidden patches count as 0.",
                "A slow fall below the level of guessing.", "nats"),
        Caption("KoLeo loss", ("koleo",), "Minus the mean log distance of an image's features to the nearest other image's in the batch.",
                "A fall at first, then flat: images are kept apart. Rising later means that features crowd together."),
        Caption("SimDINO loss", ("coding_rate",), "Minus the cosine between views of an image, minus the coding rate, by which images are kept apart.",
                "A fall. Flat from the start: views do not come to agree, or the features of all images are the same."),
        Caption("SimDINO, cosine between views", ("cosine",), "Of class tokens of the student and of the teacher, for two views of one image.", "A rise, well below 1."),
        Caption("SimDINO, patches", ("patch_cosine",), "Cosine of hidden patches with the teacher's; as a loss, with the sign turned.", "Towards agreement."),
        Caption("Gram loss", ("gram",), "How far similarities between patches differ from those of the anchor, an earlier teacher.",
                "Small and steady; jumps where the anchor is renewed."),
        Caption("Metadata loss", ("metadata",), "Cross-entropy of what is known beside the images, as a small head reads it from class tokens; summed over fields.",
                "Of what informs: a fall. Of a nuisance: up to the level of guessing, ln of the number of values.", "nats"),
        Caption("Distillation loss", ("distill",), "Distance of the student's features from the anchor's.", "A steady fall."),
        Caption("Distillation, class tokens", ("cls",), "Distance of the student's class tokens from the anchor's.", "A steady fall."),
        Caption("Distillation, patches", ("patches",), "Distance of the student's patch tokens from the anchor's.", "A steady fall."),
        Caption("KL divergence", ("kl",), "The part of the DINO loss that the student still can learn: loss minus the teacher's entropy.",
                "Above 0, and slowly falling. 0 together with an entropy of 0 is collapse.", "nats"),
        Caption("Teacher entropy", ("teacher_entropy", "patch_entropy"),
                "How undecided the teacher's targets are between prototypes, for class tokens and for patches.",
                "Between a fifth and nine tenths of ln K once the warm-up is over. At ln K targets say nothing, at 0 every image has the same one.",
                "nats"),
        Caption("Prototypes in use", ("active_prototypes",), "How many of the prototypes the losses compare with, by objective.active_prototypes.",
                "Steps where a stage begins; ln K, and with it the loss of guessing, moves with them."),
        Caption("Gradient norm", ("grad_norm",), "Length of the student's gradient before it is clipped.",
                "Steady within a factor of three after the warm-up, but for single spikes, which are clipped; a level that keeps rising is sick.", "", True),
        Caption("Centre drift", ("center_drift",), "How far the running centre of teacher scores lags behind the batch, in temperatures.",
                "Below 1. Above, targets follow the batch more than the image."),
        Caption("Norm of the centre", ("center_norm", "patch_center_norm"), "Length of the running mean of teacher scores that is taken off them.",
                "Levels off after the warm-up."),
        Caption("Distance to the nearest image", ("nearest",), "Mean distance of an image's features to the nearest other image's in the batch.",
                "Away from 0, and steady."),
    ]),
    ("Features", [
        Caption("RankMe", ("rankme",), "How many directions the teacher's features use, on the images of one step (arXiv:2210.02885).",
                "May dip in the first tenth, then holds or rises. A fall that lasts costs accuracy.", "dimensions"),
        Caption("Spread of features", ("feature_std",),
                "1: all directions are used evenly; 0: all images look the same to the teacher.", "0.2 to 1, and steady at the end; a dip is harmless while RankMe holds. Under 0.05 is collapse."),
        Caption("Patches like the class token", ("patch_cls_similarity",), "Mean cosine of a patch token with its image's class token.",
                "Well below 0.9. Near 1 patches no longer say what lies where, which dense tasks need."),
    ]),
    ("Schedules", [
        Caption("Patches for the student", ("student_patches",), "Share of the global crops' patches that the student gets; the teacher sees all of them.",
                "As scheduled (crops.keep_patches).", "share"),
        Caption("Learning rate", ("lr",), "As scheduled, scaled for the global batch.", "A warm-up, then the planned descent."),
        Caption("Weight decay", ("weight_decay",), "As scheduled.", "As planned."),
        Caption("Teacher momentum", ("momentum",), "The teacher keeps this share of itself at each step.", "As planned: to 1 at the end."),
    ]),
    ("Machine", [
        Caption("Throughput", ("images_per_second",), "Images a second of all ranks together, pauses for probes and checkpoints left out.",
                "Flat. A fall is a busy machine or a slow store.", "images/s"),
        Caption("Waiting for data", ("data_wait",), "Share of the time in which the model had nothing to do, mean over ranks.",
                "Under 0.05. Above 0.2 more data.workers or smaller images pay.", "share"),
        Caption("GPU in use", ("gpu_busy",), "Share of the time in which the GPU ran something, as its driver tells, mean over ranks.",
                "Near 1. Below, look at the wait for data.", "share"),
        Caption("Processors in use", ("cpu_cores",), "Cores that a rank and its readers kept busy, mean over ranks.",
                "On a CPU as many as the rank has; with a GPU below the number of cores, or decoding is the bottleneck.", "cores"),
        Caption("Device memory", ("memory_gb",), "Largest so far: of the GPU, or of the training process on a CPU, mean over ranks.",
                "Flat after the first steps.", "GB"),
        Caption("Host memory", ("host_memory_gb",), "Resident memory of a rank and its readers now, mean over ranks; what they share counts for each.",
                "Flat. A steady rise is a leak.", "GB"),
    ]),
]  # fmt: skip

# what probes measure, whatever the protocol
SCORES: list[Caption] = [
    Caption("top-1", ("top1",), "Share of test images whose class is found at the first guess.",
            "Above the untrained network's and rising; late in long runs flat.", "%"),
    Caption("top-5", ("top5",), "Share of test images whose class is among five guesses.", "Rising.", "%"),
    Caption("validation top-1", ("validation_top1",), "Of the classifier that was chosen, on held-out training images.", "Rising.", "%"),
    Caption("chosen learning rate", ("best_lr",), "Of the best classifier of the sweep.", "Inside the range that was tried.", "", True),
    Caption("chosen blocks", ("best_blocks",), "From how many last blocks the best classifier reads.", "No better or worse."),
    Caption("chosen patch mean", ("best_patch_mean",), "1 where the best classifier reads the mean of patches too.", "No better or worse."),
    Caption("mIoU", ("miou",), "Overlap of predicted and true regions, mean over classes.", "Rising.", "%"),
    Caption("mIoU, classes matched", ("miou_hungarian",), "The same after the best one-to-one renaming of predicted classes.", "Rising.", "%"),
    Caption("held-out score", ("score",), "Mean of the figures on the labelled images that the guard judges by.",
            "Above the start's, which is its line.", "%"),
    Caption("held-out k-NN", ("knn",), "Share of held-out images that the others' labels classify rightly, by neighbours.", "Above the start's.", "%"),
    Caption("held-out linear", ("linear",), "Likewise by a linear classifier in closed form.", "Above the start's.", "%"),
    Caption("metadata read by neighbours", ("read_knn",), "Share of images whose value (camera, site) neighbours tell, mean over values.",
            "Of a nuisance: near chance. Of what informs: rising.", "%"),
    Caption("metadata read linearly", ("read_linear",), "Likewise by a linear classifier in closed form.", "Of a nuisance: near chance.", "%"),
    Caption("metadata above chance", ("above_chance",), "What the better of both readers is above guessing.", "Of a nuisance: near 0.", "points"),
    Caption("mean accuracy", ("mean_accuracy",), "Share of pixels that are right, mean over classes.", "Rising.", "%"),
    Caption("pixel accuracy", ("pixel_accuracy",), "Share of all pixels that are right.", "Rising.", "%"),
    Caption("locality", ("locality",), "Cosine of a patch with its eight neighbours, last block and each layer.", "Above 0, below 1."),
    Caption("patches like the class token", ("patch_cls",), "Cosine of a patch with its image's class token, last block and each layer.",
            "Well below 0.9."),
    Caption("sigma of GAug", ("sigma",), "Mean width of the Gaussian in each layer, in patches.", "Small keeps attention near the patch."),
    Caption("alpha of GAug", ("alpha",), "Mean height of the Gaussian in each layer.", "Large means that nearness counts much."),
    Caption("DSE", ("dse",), "Structure of dense features without labels (arXiv:2510.17299): distance between clusters of patches and their "
            "dimensionality, less the clusters' radius.", "Rising: follows the mIoU of a run's checkpoints. Its noise is 0.01 to 0.04."),
    Caption("DSE: between clusters", ("dse_inter",), "Mean distance of a patch to the nearest cluster that is not its own.", "High."),
    Caption("DSE: within clusters", ("dse_intra",), "Mean radius of the clusters of one image, and of a group of eight.", "Low."),
    Caption("DSE: dimensionality", ("dse_dim",), "Effective dimensionality of patches, as a share.", "High."),
    Caption("RankMe", ("rankme",), "Effective rank of the features that a head sees (arXiv:2210.02885).",
            "High, but it misleads for dense features.", "dimensions"),
    Caption("LiDAR", ("lidar",), "Effective rank of what tells images apart and does not change between crops (arXiv:2312.04000).", "High."),
    Caption("alpha-ReQ", ("alpha_req",), "Decay of the features' eigenspectrum.", "Near 1; means nothing where the fit is bad."),
    Caption("alpha-ReQ: fit", ("alpha_req_r2",), "How well a power law fits the eigenspectrum (R²).", "Near 1."),
    Caption("uniformity", ("uniformity",), "How evenly features cover the sphere (arXiv:2005.10242).", "Low."),
    Caption("alignment", ("alignment",), "Distance between two crops of an image (arXiv:2005.10242).", "Low."),
    Caption("norm outliers", ("norm_outliers",), "Share of patches whose norm exceeds three times the median (after arXiv:2309.16588).", "Near 0."),
]  # fmt: skip

NO_CURVES = {
    "step",
    "samples_seen",
    "time",
    "epoch",
    "quarantined",
    "train_images",
    "test_images",
    "unknown",
    "chance",
}  # counts that say where and on what
_SCORE_OF = {name: caption for caption in SCORES for name in caption.names}


def plain(name: str, objectives: tuple[str, ...] = ()) -> str:
    """A training metric's name without the objective that logged it."""
    for objective in objectives:
        if name.startswith(f"{objective}_"):
            return name.removeprefix(f"{objective}_")
    return name


def score(name: str) -> Caption:
    """The caption of what a probe measured: `top1_k20_t0.1` is `top1`, `sigma_layer3` is `sigma`, `dse_intra_8` is `dse_intra`."""
    base = name
    while base not in _SCORE_OF and "_" in base and re.search(r"_(k\d+|t[\d.e-]+|layer\d+|\d+)$", base):
        base = base.rpartition("_")[0]
    return _SCORE_OF.get(base) or Caption(name, (name,), "Measured by this run under this name.")
