"""Synthetic videos to try things with: a shape moves over a patchwork, and no single frame tells how.

    MOTIONS    eight classes: left, right, up, down, shrinking, growing, counterclockwise, clockwise
    scenes     a shape that moves in one direction, then in another, with captions that say so

The edges of the picture meet: a shape that leaves on one side enters on the other. So a frame taken by itself has the same
distribution whatever the motion.
"""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = 40  # pixels
NUM_FRAMES = 24
# Which of the shape's (x, y, log size, angle) changes, and in which direction.
MOTIONS = {
    "left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1),
    "shrinking": (2, -1), "growing": (2, 1), "counterclockwise": (3, -1), "clockwise": (3, 1),
}  # fmt: skip
PERIODS = np.array([SIZE, SIZE, np.log(2.2), 2 * np.pi])  # each of the four wraps around after this much

# Scenes
COLOURS = {"red": (220, 60, 50), "green": (70, 200, 80), "blue": (80, 110, 240), "yellow": (230, 220, 70)}
SHAPES = ("square", "disc", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SENTENCES = (
    "a {colour} {shape} moves {first}, then {second}",
    "a {colour} {shape} goes {first} and then {second}",
    "the {shape} is {colour} and moves {first}, then {second}",
)


def make_motion_videos(folder: Path, per_class: int, progress: Callable[[], object] = lambda: None) -> None:
    """Writes FOLDER/CLASS/VIDEO.avi, the same videos each time, and calls `progress` after each. Existing files are kept."""
    for motion in MOTIONS:
        (folder / motion).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            video = folder / motion / f"{motion}-{number:03}.avi"
            if not video.exists():
                partial = video.with_name(f".{video.stem}.partial.avi")
                write_video(partial, draw_motion(motion, np.random.default_rng([list(MOTIONS).index(motion), number])))
                partial.replace(video)
            progress()


def draw_motion(motion: str, rng: np.random.Generator) -> np.ndarray:
    """(T, SIZE, SIZE, 3) uint8 RGB: a shape of a random colour moves over a patchwork at a random, steady speed.

    The shape starts at a random place, size and angle, and whichever of them changes wraps around.
    """
    axis, direction = MOTIONS[motion]
    start = rng.uniform(0, 1, 4) * PERIODS
    velocity = np.zeros(4)
    velocity[axis] = direction * rng.uniform(1 / 28, 1 / 18) * PERIODS[axis]  # one period takes 18 to 28 frames
    patches = patchwork(rng)
    colour = rng.uniform(140, 255, 3)
    frames = [
        np.where(shape_at((start + frame * velocity) % PERIODS)[..., None], colour, patches)
        for frame in range(NUM_FRAMES)
    ]
    return np.stack(frames).astype(np.uint8)


def shape_at(state: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE) bool: where a hook with this (x, y, log size, angle) covers the picture."""
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
    """(T, SIZE, SIZE, 3) uint8 RGB: a shape moves in the first direction and about half-way turns into the second."""
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
    """(SIZE, SIZE) bool: where a shape centred at (x, y) covers the picture."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    right = abs((columns - place[0] + SIZE / 2) % SIZE - SIZE / 2)
    down = abs((rows - place[1] + SIZE / 2) % SIZE - SIZE / 2)
    if shape == "disc":
        return np.hypot(right, down) < 8
    if shape == "square":
        return np.maximum(right, down) < 6
    return (np.minimum(right, down) < 2) & (np.maximum(right, down) < 9)  # a cross


def patchwork(rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3): dark patches of random colours."""
    return np.kron(rng.uniform(20, 110, (4, 4, 3)), np.ones((SIZE // 4, SIZE // 4, 1)))


def scene_captions(colour: str, shape: str, first: str, second: str) -> list[str]:
    """What people may say of such a scene."""
    return [sentence.format(colour=colour, shape=shape, first=first, second=second) for sentence in SENTENCES]


def directions_in(caption: str) -> list[str]:
    """The directions that a caption names, in order."""
    return [word for word in caption.replace(",", " ").split() if word in DIRECTIONS]
