"""Make videos to try things with: one shape moves before a patchwork, in eight ways, and no single frame tells which.

    python -m jobs.demo.videos --out data/videos --per-class 20

The classes are left, right, up, down, growing, shrinking, clockwise and counterclockwise. The edges of the picture meet: a shape
that leaves it comes back at the other side. OUT gets a folder for each class. Videos that are there already are left alone.

--json FILE holds: out, classes, videos.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from cluster.progress import Bar
from jobs.command import command_line, finish, run_command

SIZE = 40  # pixels
NUM_FRAMES = 24
# Which of the shape's (x, y, log size, angle) changes, and in which direction.
MOTIONS = {
    "left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1),
    "shrinking": (2, -1), "growing": (2, 1), "counterclockwise": (3, -1), "clockwise": (3, 1),
}  # fmt: skip
PERIODS = np.array([SIZE, SIZE, np.log(2.2), 2 * np.pi])  # after which each is where it was

# Of the captioned videos.
COLOURS = {"red": (220, 60, 50), "green": (70, 200, 80), "blue": (80, 110, 240), "yellow": (230, 220, 70)}
SHAPES = ("square", "disc", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SENTENCES = (
    "a {colour} {shape} moves {first}, then {second}",
    "a {colour} {shape} goes {first} and then {second}",
    "the {shape} is {colour} and moves {first}, then {second}",
)


@dataclass(frozen=True, kw_only=True)
class DemoVideos:
    """Options of making videos."""

    out: Path
    """Folder that gets a folder of videos for each class."""
    per_class: int = 20
    """Videos of each class."""
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise ValueError(f"per_class {self.per_class}: wanted at least 1")


def main(job: DemoVideos) -> int:
    """Makes the videos that are not there yet."""
    make_videos(job.out, job.per_class)
    total = job.per_class * len(MOTIONS)
    finish(
        f"made {total:,} videos of {len(MOTIONS)} classes: {job.out}",
        {"out": str(job.out.absolute()), "classes": len(MOTIONS), "videos": total},
        job.json,
    )
    return 0


def make_videos(folder: Path, per_class: int) -> None:
    """So many videos of each motion, the same ones each time; those that are there already are left alone."""
    with Bar("drawing", "videos", per_class * len(MOTIONS)) as bar:
        for motion in MOTIONS:
            (folder / motion).mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                video = folder / motion / f"{motion}-{number:03}.avi"
                if not video.exists():
                    partial = video.with_name(f".{video.stem}.partial.avi")
                    write_video(
                        partial, draw_motion(motion, np.random.default_rng([list(MOTIONS).index(motion), number]))
                    )
                    partial.replace(video)
                bar.advance()


def draw_motion(motion: str, rng: np.random.Generator) -> np.ndarray:
    """(T, SIZE, SIZE, 3) uint8 RGB: a shape of some colour before a patchwork, moving at a steady speed of its own.

    The shape starts at a random place, size and angle, and whichever of them changes wraps around. So a frame taken by
    itself has the same distribution in every class.
    """
    axis, direction = MOTIONS[motion]
    start = rng.uniform(0, 1, 4) * PERIODS
    velocity = np.zeros(4)
    velocity[axis] = direction * rng.uniform(1 / 28, 1 / 18) * PERIODS[axis]  # a round in 18 to 28 frames
    patches = patchwork(rng)
    colour = rng.uniform(140, 255, 3)
    frames = [
        np.where(shape_at((start + frame * velocity) % PERIODS)[..., None], colour, patches)
        for frame in range(NUM_FRAMES)
    ]
    return np.stack(frames).astype(np.uint8)


def shape_at(state: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE) bool: a hook at (x, y, log size, angle), on a picture whose edges meet."""
    x, y, log_size, angle = state
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    right, down = (columns - x + SIZE / 2) % SIZE - SIZE / 2, (rows - y + SIZE / 2) % SIZE - SIZE / 2
    scale = 6 * np.exp(log_size)
    u = (np.cos(angle) * right + np.sin(angle) * down) / scale
    v = (np.cos(angle) * down - np.sin(angle) * right) / scale
    stem, arm = (abs(u) < 0.35) & (abs(v) < 1.2), (v > -1.2) & (v < -0.5) & (u > -0.35) & (u < 1.2)
    return stem | arm


def write_video(path: Path, frames: np.ndarray) -> None:
    """(T, H, W, 3) uint8 RGB -> an AVI at 12 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(12), options={"q": "2"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.bit_rate = 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def draw_scene(colour: str, shape: str, first: str, second: str, rng: np.random.Generator) -> np.ndarray:
    """(T, SIZE, SIZE, 3) uint8 RGB: a shape that moves in one direction, and about half-way turns into another.

    It starts anywhere and the edges meet, so that each single frame is equally likely whatever the directions.
    """
    place = rng.uniform(0, SIZE, 2)
    turn = int(rng.integers(NUM_FRAMES // 2 - 2, NUM_FRAMES // 2 + 3))
    speed = SIZE * rng.uniform(1 / 26, 1 / 18)
    patches = patchwork(rng).mean(axis=2, keepdims=True)  # grey
    frames = []
    for frame in range(NUM_FRAMES):
        frames.append(np.where(figure_at(shape, place % SIZE)[..., None], COLOURS[colour], patches))
        place = place + speed * np.array(DIRECTIONS[first if frame < turn else second])
    return np.stack(frames).astype(np.uint8)


def figure_at(shape: str, place: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE) bool: a shape around a place (x, y)."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    right = abs((columns - place[0] + SIZE / 2) % SIZE - SIZE / 2)
    down = abs((rows - place[1] + SIZE / 2) % SIZE - SIZE / 2)
    if shape == "disc":
        return np.hypot(right, down) < 8
    if shape == "square":
        return np.maximum(right, down) < 6
    return (np.minimum(right, down) < 2) & (np.maximum(right, down) < 9)  # a cross


def patchwork(rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3): dark patches of some colours."""
    return np.kron(rng.uniform(20, 110, (4, 4, 3)), np.ones((SIZE // 4, SIZE // 4, 1)))


def sentences(colour: str, shape: str, first: str, second: str) -> list[str]:
    """What people may say of such a video."""
    return [sentence.format(colour=colour, shape=shape, first=first, second=second) for sentence in SENTENCES]


def directions_in(caption: str) -> list[str]:
    """The directions that a caption names, in its order."""
    return [word for word in caption.replace(",", " ").split() if word in DIRECTIONS]


if __name__ == "__main__":
    run_command(lambda: main(command_line(DemoVideos, __doc__ or "")))
