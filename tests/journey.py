"""The first hour of a new user, run for real: a messy folder from images to a backbone, and forty mistakes. Prints Markdown for docs/results.md.

    python tests/journey.py [--only mistakes|journey]

Each command is a process of its own in a temporary folder, timed by the wall and by CPU (other work on the machine changes the first more).
"""

import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = "my photos é"
TINY = "backbone.embed_dim=24 backbone.depth=1 optim.epochs=null optim.total_steps=3 optim.warmup_epochs=0 data.workers=0 log.tensorboard=false"

JOURNEY = [
    f"init '{PHOTOS}'",
    f"pretrain '{PHOTOS}' {TINY}",
    f"pretrain '{PHOTOS}' {TINY}",
    "doctor runs/my_photos_é",
    f"features runs/my_photos_é '{PHOTOS}' features workers=0 max_bad=0.2",
    "export runs/my_photos_é backbone",
    f"shards pack '{PHOTOS}' shards",
]

# what is typed, and a part of what must be said
MISTAKES = [
    ("init photoz", "does not exist"),
    ("init empty", "holds neither images"),
    ("init three", "holds 3 images"),
    ("init notes.txt", "notes.txt is a file"),
    ("init animals --out no/such/folder/x.yaml", "cannot be written"),
    ("init animals --out taken.yaml", "exists"),
    ("pretrain photoz", "nor a folder of images or shards"),
    ("pretrain photoz.yaml", "there is no such file"),
    ("pretrain quickstat", "Did you mean 'quickstart'"),
    ("pretrain animals lr=0.1", "optim.lr=0.1"),
    ("pretrain quickstart batch_size=64", "optim.global_batch_size=64"),
    ("pretrain quickstart --batch-size 64", "optim.global_batch_size=64"),
    ("pretrain quickstart --lr 0.1", "optim.lr=0.1"),
    ("pretrain quickstart epochs=100", "optim.epochs=100"),
    ("pretrain quickstart optim.lrr=0.1", "Did you mean 'lr'"),
    ("pretrain quickstart optim.lr=fast", "optim.lr is 'fast'"),
    ("pretrain quickstart optim.lr", "expected an override of the form"),
    ("pretrain quickstart model=vit_small", "backbone.name=vit_small"),
    ("pretrain quickstart precision=16-mixed", "precision=fp16"),
    ("pretrain quickstart devices=8", "torchrun"),
    ("pretrain quickstart output_dir=here", "run_dir=here"),
    ("pretrain quickstart objective.0.num_prototype=64", "Did you mean 'num_prototypes'"),
    ("pretrain quickstart data.make=null data.train=photoz", "does not exist"),
    ("pretrain quickstart data.make=null data.train='shards/*.tar'", "matches nothing"),
    ("pretrain quickstart probes.knnn='{}'", "Did you mean 'knn'"),
    ("pretrain quickstart --on slrum", "Did you mean 'slurm'"),
    ("pretrain quickstart optim.accumulate_steps=3", "nearest that are"),
    ("pretrain quickstart backbone.init=weights.pth", "there is no weights.pth"),
    ("pretrain quickstart backbone.name=locatvit_tny", "Did you mean 'locatvit_tiny'"),
    ("pretrain broken.yaml", "broken.yaml:3: not valid YAML"),
    ("evaluate kn runs/x", "Did you mean 'knn'"),
    ("evaluate knn runs/x", "data.train"),
    ("evaluate knn runs/x data.train=animals/train data.test=animals/val", "there is no runs/x"),
    ("evaluate knn timm:vit_tiny_patch16_224 data.train=animals/train data.test=photoz", "does not exist"),
    ("evaluate knn timm:vit_tiny_patch16_224 data.train=flat data.test=flat workers=0", "class folders, such as cats/ and dogs/"),
    ("evaluate knn timm:vit_tiny_patch16_224 data.train=torn data.test=torn workers=0", "data.max_bad=0.01"),
    ("features timm:vit_tiny_patch16_224 torn out workers=0", "max_bad=0.01"),
    ("export runs/x backbone", "there is no runs/x"),
    ("report runs/x", "is no folder"),
    ("jobs logs 4711", "no job"),
]


def image(path: Path, size: tuple[int, int] = (40, 36), mode: str = "RGB", **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.name))
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], channels), dtype=np.uint8).squeeze()
    Image.fromarray(pixels, mode).save(path, **options)


def make_messy(folder: Path) -> None:
    """Spaces, unicode, corrupt, empty, huge and CMYK files, links in circles and to nowhere, and what a Mac leaves behind."""
    for number in range(24):
        image(folder / f"holiday 2024/día {number:02}.jpg")
        image(folder / f"写真/{number}.PNG")
    image(folder / "print/cmyk.jpg", mode="CMYK")
    image(folder / "grey.tif", mode="L")
    (folder / "torn.jpg").write_bytes((folder / "holiday 2024/día 00.jpg").read_bytes()[:400])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404</html>")
    Image.new("L", (12_000, 9_000)).save(folder / "huge.png")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / ".DS_Store").write_bytes(b"\0" * 64)
    (folder / "__MACOSX").mkdir()
    for name in ("._día 00.jpg", "__MACOSX/._1.PNG"):
        (folder / name).write_bytes(b"\0\5\26\7" + b"\0" * 100)
    (folder / "Thumbs.db").write_bytes(b"\0" * 64)
    (folder / "notes.txt").write_text("not an image")


def make_places(home: Path) -> None:
    make_messy(home / PHOTOS)
    for part in ("train", "val"):
        for label in ("cats", "dogs"):
            for number in range(6):
                image(home / f"animals/{part}/{label}/{number}.png")
    for number in range(6):
        image(home / f"flat/{number}.png")
        image(home / f"torn/{'ab'[number % 2]}/{number}.png")
    for number in range(3):
        image(home / f"three/{number}.png")
    (home / "torn/a/torn.png").write_bytes(b"\x89PNG and no more")
    (home / "empty").mkdir()
    (home / "notes.txt").write_text("not an image")
    (home / "taken.yaml").write_text("mine")
    (home / "broken.yaml").write_text("run_dir: runs/x\ndata: {train: [\n")


def ask(line: str, home: Path) -> tuple[int, float, float, str]:
    """(exit code, seconds, CPU-seconds, what was said on both streams) of `ssl-locat LINE`."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "ssl_locat", *shlex.split(line)]
    done = subprocess.run(command, cwd=home, env={**os.environ, "COLUMNS": "1000"}, capture_output=True, text=True, timeout=900)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, time.monotonic() - began, cpu, done.stdout + done.stderr


def last_words(said: str) -> str:
    """The message: from `ssl-locat:` on, or the last line."""
    lines = [line for line in said.splitlines() if line.strip()]
    start = next((at for at, line in enumerate(lines) if line.startswith("ssl-locat:")), len(lines) - 1)
    words = " ".join(line.strip() for line in lines[start:]).removeprefix("ssl-locat: ")
    return (words if len(words) <= 200 else words[:197] + "...").replace("|", "\\|")


def main() -> int:
    only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else ""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_places(home)
        print(f"Load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n")
        header = "| `ssl-locat ...` | exit | s | CPU-s | message |\n|---|---|---|---|---|"
        if only != "mistakes":
            print(header)
            for line in JOURNEY:
                code, seconds, cpu, said = ask(line, home)
                wrong += code != 0 or "Traceback" in said
                print(f"| `{line}` | {code} | {seconds:.1f} | {cpu:.1f} | {last_words(said)} |", flush=True)
            print()
        if only != "journey":
            print(header)
            for line, wanted in MISTAKES:
                code, seconds, cpu, said = ask(line, home)
                fine = code == 2 and wanted in said and "Traceback" not in said
                wrong += not fine
                flag = "" if fine else "**not as wanted** "
                print(f"| `{line}` | {code} | {seconds:.1f} | {cpu:.1f} | {flag}{last_words(said)} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
