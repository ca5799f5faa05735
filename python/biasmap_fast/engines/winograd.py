"""3 x 3 convolutions of an exported graph by Winograd's minimal filtering, in fewer products.

If a runtime multiplies as fast as its processor can, as ONNX Runtime does on a CPU, only fewer
products make a convolution faster: tiles of 2 x 2 pixels take 4 per pixel and channel instead of 9,
tiles of 4 x 4 take 2.25. The graph keeps the UNet's own weights; a runtime folds their
transformation when it loads the graph.

S. Winograd, Arithmetic Complexity of Computations, 1980; A. Lavin and S. Gray, Fast Algorithms for
Convolutional Neural Networks, 2016 (arXiv 1509.09308).
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import conv2d, pad, pixel_shuffle

from .graph import level_of

logger = logging.getLogger(__name__)

# Tile -> finite points of interpolation. Of the pairs tried for 4, these lose least in float32:
# half of what the usual 0, 1, -1, 2, -2 lose.
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)}

# Fewer channels than this are not worth the transformations.
_FEWEST_CHANNELS = 256
# From so many pixels on a tile of 4 gains more by its fewer products than its weights, 36 numbers
# for 9, take longer to read.
_PIXELS_OF_LARGE_TILES = 1024


class WinogradConv2d(torch.nn.Module):
    """A convolution that is `applicable` as products over tiles of 2 x 2 or 4 x 4 of its output."""

    def __init__(self, convolution: torch.nn.Conv2d, tile: int) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias
        self.tile = tile
        self._of_output, self._of_weight, self._of_input = (
            torch.from_numpy(np.kron(matrix, matrix)).to(self.weight.dtype)
            for matrix in transformations(tile)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to ``[B, O, H, W]``."""
        batch, channels, height, width = images.shape
        tile, count, side = self.tile, len(self._of_weight), self.tile + 2
        # [count, O, C]; one operator, as a runtime that folds it keeps every result in between
        weight = torch.einsum("kij,ocij->koc", self._of_weight.view(count, 3, 3), self.weight)

        whole = statically_known_true(height % tile == 0) and statically_known_true(
            width % tile == 0
        )
        end = 1 if whole else tile
        planes = pad(images.reshape(batch * channels, 1, height, width), (1, end, 1, end))
        tiles = conv2d(planes, self._of_input.view(count, 1, side, side), stride=tile)
        size = tiles.shape[-2:]  # tiles down and across, T in all

        tiles = tiles.view(batch, channels, count, -1).transpose(1, 2)  # [B, count, C, T]
        products = weight @ tiles  # [B, count, O, T]
        pixels = self._of_output @ products.flatten(2)  # [B, tile * tile, O * T]
        pixels = pixels.view(batch, tile * tile, weight.shape[1], -1).transpose(1, 2)
        result = pixel_shuffle(pixels.reshape(batch, -1, *size), tile)
        if not whole:
            result = result[..., :height, :width]
        return result if self.bias is None else result + self.bias[:, None, None]


def transformations(tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cook and Toom's matrices for a kernel of 3: of output, weight and input.

    ``A [tile, tile + 2]``, ``G [tile + 2, 3]``, ``B [tile + 2, tile + 2]`` with
    ``y = A @ ((G @ w) * (B @ x))``, y being x's correlation with w.
    """
    points = np.array(POINTS[tile])
    others = [np.delete(points, place) for place in range(len(points))]
    powers = np.vander(points, tile, increasing=True)
    output = np.vstack([powers, np.eye(tile)[-1:]]).T
    scale = np.array([np.prod(point - rest) for point, rest in zip(points, others, strict=True)])
    weight = np.vstack([np.vander(points, 3, increasing=True) / scale[:, None], np.eye(3)[-1:]])
    rows = [np.append(np.poly(rest)[::-1], 0.0) for rest in others]
    return output, weight, np.vstack([*rows, np.poly(points)[::-1]])


def applicable(module: torch.nn.Module) -> bool:
    """Whether a module is a convolution that gains by it."""
    return (
        isinstance(module, torch.nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.stride == (1, 1)
        and module.padding == (1, 1)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and min(module.in_channels, module.out_channels) >= _FEWEST_CHANNELS
    )


def use_winograd(unet: Any, pixels: int) -> Any:
    """The UNet with its convolutions replaced that gain by it at this many pixels of latents."""
    levels = len(unet.config.down_block_types)
    convolutions = [name for name, module in unet.named_modules() if applicable(module)]
    if not convolutions:
        logger.warning(
            "convolutions='winograd' changes nothing: the UNet has no 3 x 3 convolution of at "
            "least %d channels",
            _FEWEST_CHANNELS,
        )
    for name in convolutions:
        tile = 4 if pixels >> 2 * level_of(name, levels) >= _PIXELS_OF_LARGE_TILES else 2
        unet.set_submodule(name, WinogradConv2d(unet.get_submodule(name), tile))
    return unet
