"""What a model's GRUs cost, by arithmetic: nothing is built and nothing runs.

N1 x N2 cells a map, O_x input channels, O_h state channels, k the kernel's side, T frames (paper section 3).
"""

from dataclasses import dataclass

from grurcn.models.gru_rcn import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LevelCost:
    """One level's GRU, or its GRUs of both directions."""

    tap: str
    channels: int  # O_x
    size: int  # N1 = N2, cells
    hidden: int  # O_h, of each direction
    parameters: int  # 3 k k (O_x O_h + O_h O_h), and 2 k k O_below O_h where stacked
    multiplications: int  # of a clip: the parameters at every cell of every frame
    fully_connected: int  # parameters of a fully connected GRU's input matrices on the same map: 3 N1 N2 O_x O_h


def level_costs(config: ModelConfig, num_frames: int, size: int) -> list[LevelCost]:
    """A row a level of a model of kind gru-rcn, for clips of num_frames frames of size x size pixels; others have none.

    Raises ValueError if the model cannot take such clips.
    """
    config.check_size(num_frames, size)
    if config.kind != "gru-rcn":
        return []
    rows, below = [], 0
    for (name, tap), hidden in zip(config.tap_maps.items(), config.hidden, strict=True):
        window, cells = config.kernel_size**2 if tap.stride else 1, tap.size(size) ** 2
        parameters = window * (3 * (tap.channels + hidden) + 2 * below) * hidden * config.directions
        rows.append(
            LevelCost(
                tap=name,
                channels=tap.channels,
                size=tap.size(size),
                hidden=hidden,
                parameters=parameters,
                multiplications=parameters * cells * num_frames,
                fully_connected=3 * cells * tap.channels * hidden * config.directions,
            )
        )
        below = hidden if config.stacked else 0
    return rows
