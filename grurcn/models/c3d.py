"""C3D (Tran et al. 2015), a baseline of the paper's Table 1: convolutions over time and space, then one vote a clip.

Parameters have the names of the Sports-1M weights as converted for PyTorch (conv1.weight ... fc7.bias), so such a file loads as
it is. Its fc8, 487 sports, is ignored; `head` has our classes in its place.

B clips of 16 frames of 112 x 112, I input channels, K classes.
"""

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import max_pool3d

from grurcn.models.config import C3D_FRAMES, C3D_SIZE
from grurcn.models.dropout import dropout
from grurcn.models.trunks.base import BadWeights, scale_channels


class C3D(nn.Module):
    """Eight convolutions and two large layers, with one level that votes. It is called as GRURCN is."""

    def __init__(self, num_classes: int, in_channels: int = 3, width: float = 1.0, dropout: float = 0.5):
        """width multiplies the channels of every layer; dropout is the fraction of fc6 and fc7 that training drops."""
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.clip_shape = (C3D_FRAMES, in_channels, C3D_SIZE, C3D_SIZE)
        x64, x128, x256, x512, fc = (scale_channels(channels, width) for channels in (64, 128, 256, 512, 4096))
        conv = partial(nn.Conv3d, kernel_size=3, padding=1)
        self.conv1 = conv(in_channels, x64)
        self.conv2 = conv(x64, x128)
        self.conv3a = conv(x128, x256)
        self.conv3b = conv(x256, x256)
        self.conv4a = conv(x256, x512)
        self.conv4b = conv(x512, x512)
        self.conv5a = conv(x512, x512)
        self.conv5b = conv(x512, x512)
        self.fc6 = nn.Linear(x512 * 4 * 4, fc)
        self.fc7 = nn.Linear(fc, fc)
        for module in self.children():  # without the head, which no ReLU follows
            assert isinstance(module, nn.Conv3d | nn.Linear)
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
        self.head = nn.Linear(fc, num_classes)

    def forward(self, clips: Tensor, draw: Tensor) -> Tensor:
        """clips (B, 16, I, 112, 112), normalised; draw (B,) int64, each clip's random bits for dropout
        -> log-probabilities of the one level (B, 1, K) float32.

        Raises ValueError for clips of another size: fc6 has a weight for each cell of the last map.
        """
        if clips.shape[1:] != self.clip_shape:
            frames, channels, height, width = clips.shape[1:]
            raise ValueError(
                f"clips of {frames} frames of {height} x {width} with {channels} channels: C3D takes {C3D_FRAMES} frames of "
                f"{C3D_SIZE} x {C3D_SIZE} with {self.clip_shape[1]} (--clips.num-frames {C3D_FRAMES} --clips.size {C3D_SIZE})"
            )
        x = clips.transpose(1, 2)  # (B, I, 16, 112, 112)
        x = max_pool3d(self.conv1(x).relu(), (1, 2, 2))  # (B, 64, 16, 56, 56)
        x = max_pool3d(self.conv2(x).relu(), 2)  # (B, 128, 8, 28, 28)
        x = self.conv3a(x).relu()
        x = max_pool3d(self.conv3b(x).relu(), 2)  # (B, 256, 4, 14, 14)
        x = self.conv4a(x).relu()
        x = max_pool3d(self.conv4b(x).relu(), 2)  # (B, 512, 2, 7, 7)
        x = self.conv5a(x).relu()
        x = max_pool3d(self.conv5b(x).relu(), 2, padding=(0, 1, 1))  # (B, 512, 1, 4, 4)
        x = x.flatten(1)  # (B, 8192), channel by channel, as in the converted files
        for level, fc in enumerate((self.fc6, self.fc7)):
            x = fc(x).relu()  # (B, 4096)
            if self.training:
                x = dropout(x, self.dropout, draw, level)
        return self.head(x).float().log_softmax(dim=-1)[:, None]

    def load(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Loads all but the head by name, and ignores what else the file holds, such as fc8.

        Raises BadWeights, naming `source`, if a parameter is missing or has another shape.
        """
        expected = {name: parameter for name, parameter in self.state_dict().items() if not name.startswith("head.")}
        missing = [name for name in expected if name not in weights]
        if missing:
            raise BadWeights(
                f"{source}: no {missing[0]} ({len(missing)} of C3D's {len(expected)} parameters are missing; found "
                f"{', '.join(list(weights)[:3])}, ...); expected Sports-1M weights of C3D, converted for PyTorch"
            )
        for name, parameter in expected.items():
            if weights[name].shape != parameter.shape:
                raise BadWeights(
                    f"{source}: {name} is {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}; weights fit "
                    "a network of the same width and input channels only (--model.width 1 and 3 channels for Sports-1M's)"
                )
        self.load_state_dict({name: weights[name] for name in expected}, strict=False)
