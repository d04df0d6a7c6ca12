"""Small videos, captions, lists and tars to pack and to train on, written without any module of the package.

`write_inputs` lays them into a folder:

    videos/CLASS/NN.avi     four motions of a bright square; some are short, long, wide or upright, one is broken, one empty
    scenes/*.avi            coloured squares, with their captions in train.json, val.json and test.json
    table.csv               some of the videos, whole and in parts, with their splits
    ucf101/, hmdb51/, kinetics/    a few of the videos again, named and listed as those data sets do it
    tars/SPLIT-NNNNNN.tar   WebDataset tars such as others write
    asked.json              what a served model is asked

Two trees are compared on the same files, so these need not come out the same everywhere.
"""

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CLASSES = {"down": (0, 1), "left": (-1, 0), "right": (1, 0), "up": (0, -1)}  # the step of the square, (x, y)
COLOURS = {"red": (220, 60, 50), "green": (70, 200, 80), "blue": (80, 110, 240)}
SCENES = {"train": 16, "val": 5, "test": 6}
ODD = {  # other than 24 frames of 40 x 40: (class, number) -> frames, height, width
    ("down", 5): (9, 40, 40),
    ("left", 5): (37, 48, 64),
    ("right", 5): (24, 66, 40),
    ("up", 5): (1, 40, 40),
}


def write_inputs(folder: Path) -> None:
    """All of it, into an empty folder."""
    write_classes(folder / "videos", per_class=7)
    (folder / "videos" / "down" / "broken.avi").write_bytes((folder / "videos" / "down" / "00.avi").read_bytes()[:3000])
    (folder / "videos" / "up" / "empty.avi").write_bytes(b"")
    write_scenes(folder, SCENES)
    write_table(folder)
    write_ucf101(folder)
    write_hmdb51(folder)
    write_kinetics(folder)
    write_tars(folder)
    asked = [{"path": str(folder / "videos" / label / "01.avi")} for label in CLASSES]
    (folder / "asked.json").write_text(json.dumps({"dataframe_records": asked}))


def write_classes(folder: Path, per_class: int, frames: int = 24, side: int = 40, odd: bool = True) -> None:
    """FOLDER/CLASS/NN.avi: a bright square before a dark pattern, which moves one way."""
    for number, (label, step) in enumerate(CLASSES.items()):
        for video in range(per_class):
            about = ODD.get((label, video)) if odd else None
            shape = about or (frames, side, side)
            rng = np.random.default_rng([number, video])
            write_video(folder / label / f"{video:02}.avi", draw(shape, [(step, shape[0])], (240, 230, 200), rng))


def write_scenes(folder: Path, counts: Mapping[str, int], frames: int = 24, side: int = 40) -> None:
    """FOLDER/scenes/ID_0_1.avi of coloured squares that turn half-way, and FOLDER/SPLIT.json with two or three captions each."""
    for place, (split, count) in enumerate(counts.items()):
        listed = []
        for number in range(count):
            rng = np.random.default_rng([10 + place, number])
            first, second = map(str, rng.permutation(list(CLASSES))[:2])
            colour = str(rng.choice(list(COLOURS)))
            name = f"{split}{number:02}_0_1.avi"
            steps = [(CLASSES[first], frames // 2), (CLASSES[second], frames - frames // 2)]
            write_video(folder / "scenes" / name, draw((frames, side, side), steps, COLOURS[colour], rng))
            captions = [
                f"a {colour} square moves {first}, then {second}",
                f"The {colour} square goes {first} and then {second}.",
                f"something {colour} moves",
            ]
            listed.append({"id": name, "caption": captions[: 2 + number % 2]})
        (folder / f"{split}.json").write_text(json.dumps(listed, indent=1))


Steps = list[tuple[tuple[int, int], int]]


def draw(
    shape: tuple[int, int, int], steps: Steps, colour: tuple[int, int, int], rng: np.random.Generator
) -> np.ndarray:
    """(T, H, W, 3) uint8 RGB: a square of that colour, which goes so many frames by each step; the picture's edges meet."""
    _, height, width = shape
    pattern = np.kron(rng.uniform(20, 90, (height // 8 + 1, width // 8 + 1, 3)), np.ones((8, 8, 1)))[:height, :width]
    place, speed = rng.uniform(0, 1, 2) * (width, height), rng.uniform(1.2, 2.2)
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    frames = []
    for step, count in steps:
        for _ in range(count):
            right = abs((columns - place[0] + width / 2) % width - width / 2)
            down = abs((rows - place[1] + height / 2) % height - height / 2)
            frames.append(np.where((np.maximum(right, down) < 6)[..., None], colour, pattern))
            place = place + speed * np.array(step)
    return np.stack(frames).astype(np.uint8)


def write_video(path: Path, frames: np.ndarray) -> None:
    """(T, H, W, 3) uint8 RGB -> an AVI at 12 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(12), options={"q": "3"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_table(folder: Path) -> None:
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "group", "start", "end"])
        for label in CLASSES:
            writer.writerow([f"{label}/00.avi", label, "train", f"{label} 0", "", ""])
            writer.writerow([f"{label}/01.avi", label, "train", f"{label} 1", "0.5", "1.5"])
            writer.writerow([f"{label}/02.avi", label, "val", "", "", ""])
            writer.writerow([f"{label}/03.avi", label, "test", "", "0", "1.25"])
        writer.writerow(["down/nowhere.avi", "down", "train", "", "", ""])


def copy_video(folder: Path, label: str, number: int, target: str) -> None:
    (folder / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "videos" / label / f"{number:02}.avi", folder / target)


def write_ucf101(folder: Path) -> None:
    lists, names = folder / "ucf101" / "lists", {"Down": "down", "Left": "left"}
    lists.mkdir(parents=True)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for place, (label, source) in enumerate(names.items(), start=1):
        for number in range(5):
            name = f"{label}/v_{label}_g{number + 1:02}_c01.avi"
            copy_video(folder, source, number, f"ucf101/videos/{name}")
            split = "test" if number == 4 else "train"
            lines[split].append(f"{name} {place}" if split == "train" else name)
    (lists / "classInd.txt").write_text("".join(f"{place} {label}\n" for place, label in enumerate(names, start=1)))
    for split, listed in lines.items():
        (lists / f"{split}list01.txt").write_text("".join(f"{line}\n" for line in listed))


def write_hmdb51(folder: Path) -> None:
    (folder / "hmdb51" / "lists").mkdir(parents=True)
    for label in ("left", "right"):
        listed = []
        for number, mark in enumerate((1, 1, 1, 2, 0)):
            name = f"Film{'ABCDE'[number]}_{label}_u_nm_np1_fr_med_0.avi"
            copy_video(folder, label, number, f"hmdb51/videos/{label}/{name}")
            listed.append(f"{name} {mark} \n")
        (folder / "hmdb51" / "lists" / f"{label}_test_split1.txt").write_text("".join(listed))


def write_kinetics(folder: Path) -> None:
    rows = []
    for label in ("moving up", "moving down"):
        for number, split in enumerate(("train", "train", "validate", "test")):
            video = f"{label[7:]}_video{number}"
            copy_video(folder, label.split()[1], number, f"kinetics/videos/{label}/{video}_000001_000011.avi")
            rows.append([label, video, 1, 11, split])
    copy_video(folder, "up", 4, "kinetics/videos/whole_video.avi")
    rows.append(["moving up", "whole_video", 0, 1, "train"])
    with (folder / "kinetics" / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
        writer.writerows(rows)


def write_tars(folder: Path) -> None:
    """Samples with KEY.cls, KEY.json and KEY.txt, one without any, and one whose video is broken."""
    (folder / "tars").mkdir()
    tars = {"train-000000": (0, 1), "train-000001": (2,), "val-000000": (3,), "test-000000": (4,)}
    for name, numbers in tars.items():
        with tarfile.open(folder / "tars" / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for label, number in ((label, number) for number in numbers for label in CLASSES):
                key, place = f"{label}-{number}", list(CLASSES).index(label)
                add(tar, f"{key}.avi", (folder / "videos" / label / f"{number:02}.avi").read_bytes())
                about = {"label": place, "class": label, "group": f"group {number}", "captions": [f"it moves {label}"]}
                add(tar, f"{key}.json", json.dumps(about).encode())
            if name == "train-000001":
                add(tar, "bare.avi", (folder / "videos" / "up" / "00.avi").read_bytes())
                add(tar, "broken.avi", b"not a video")
                add(tar, "broken.cls", b"1")


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
