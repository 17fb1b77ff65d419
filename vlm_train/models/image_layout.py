"""In which order a language model reads the tokens of a picture's images: tile behind tile, or as one map.

A picture that is one image is read as that image is. Of one in tiles the overview comes first, and then

- `rows`: each tile by itself, row by row. What else stands there is the tokenizer's (`data.tiles`).
- `map`: the tokens of all tiles put together as the tiles are, so that a row of tokens runs across the whole picture;
  without the rows and columns that are padding alone (`data.tiles.as_map` counts them), as many at either end; and
  with a learned vector, `image_newline`, behind each row. LLaVA-NeXT's layout (Liu et al. 2024; its `spatial_unpad`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.connectors.base import Connector
from vlm_train.types import WHOLE, Grid, TileLayout


class TileRows(nn.Module):
    """One image behind the other."""

    def largest(self, max_tiles: int) -> Grid:
        """The tiles of a picture that has the most tokens."""
        return Grid(1, max_tiles)

    def forward(self, tokens_NQD: Tensor, pictures: Sequence[Grid]) -> Tensor:
        """Tokens of the images of `pictures` [N, Q, D] -> as they are read [M, D].

        Raises:
            ConfigError: a picture that is a map.
        """
        for grid in pictures:
            if grid.is_map:
                raise _not_laid_out(grid, "rows")
        return tokens_NQD.flatten(0, 1)


class TileMap(nn.Module):
    """The tiles of each picture as one map.

    Args:
        side: of the square of tokens that an image has.
        width: D of a token.
    """

    def __init__(self, *, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.image_newline = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As LLaVA-NeXT starts it."""
        nn.init.normal_(self.image_newline, std=len(self.image_newline) ** -0.5)

    def largest(self, max_tiles: int) -> Grid:
        """The tiles of a picture that has the most tokens: of as many tiles, those with the most rows."""
        return Grid(max_tiles, 1, max_tiles * self.side, self.side)

    def forward(self, tokens_NQD: Tensor, pictures: Sequence[Grid]) -> Tensor:
        """Tokens of the images of `pictures` [N, Q, D] -> as they are read [M, D].

        Raises:
            ConfigError: a picture whose tiles are no map of such tokens.
        """
        newline_D = self.image_newline.to(tokens_NQD.dtype)
        laid, start = [newline_D.expand(0, -1)], 0  # it has a gradient, of zeros, where no picture has a row
        for grid in pictures:
            images_NQD = tokens_NQD[start : start + grid.num_images]
            start += grid.num_images
            laid.append(images_NQD[0])
            if grid != WHOLE:
                laid.append(self._map(images_NQD[1:], grid, newline_D))
        return torch.cat(laid)

    def _map(self, tiles_NQD: Tensor, grid: Grid, newline_D: Tensor) -> Tensor:
        """[M, D] of the tiles of one picture."""
        above, below = divmod(grid.rows * self.side - grid.map_rows, 2)
        left, right = divmod(grid.columns * self.side - grid.map_columns, 2)
        if not grid.is_map or below or right or min(above, left) < 0:
            raise _not_laid_out(grid, f"map, of {self.side} x {self.side} tokens a tile")
        tiles_RCYXD = tiles_NQD.unflatten(1, (self.side, self.side)).unflatten(0, (grid.rows, grid.columns))
        whole_YXD = tiles_RCYXD.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        map_YXD = whole_YXD[above : above + grid.map_rows, left : left + grid.map_columns]
        newlines_YXD = newline_D.expand(grid.map_rows, 1, -1)
        return torch.cat([map_YXD, newlines_YXD], dim=1).flatten(0, 1)


def layout_of(name: TileLayout, connector: Connector, *, width: int, max_tiles: int) -> TileRows | TileMap:
    """The layout `name` for the tokens of a connector.

    Args:
        name: what tiles become.
        connector: gives the tokens of each image.
        width: D of a token.
        max_tiles: most tiles of a picture.

    Raises:
        ConfigError: an unknown name, or a map where there are no tiles or their tokens are no square of places.
    """
    if name not in get_args(TileLayout):
        raise ConfigError("unknown layout of tiles", got=f"model.tile_layout={name}", allowed=get_args(TileLayout),
                          remedy="model.tile_layout=rows")  # fmt: skip
    if name == "rows":
        return TileRows()
    if max_tiles < 2:
        raise ConfigError("a map is made of tiles, and there are none", got=f"model.max_tiles={max_tiles}",
                          allowed="2 or more", remedy="model.max_tiles=4, or model.tile_layout=rows")  # fmt: skip
    side = math.isqrt(connector.num_tokens)
    if not connector.keeps_places or side**2 != connector.num_tokens:
        raise ConfigError(
            "the tokens of this connector are no map of an image",
            got=f"{type(connector).__name__} with {connector.num_tokens} tokens for an image",
            allowed="linear, attention or pixel_shuffle, without a class token",
            remedy="model.tile_layout=rows, another connector, or model.drop_class_token=true",
        )
    return TileMap(side=side, width=width)


def _not_laid_out(grid: Grid, layout: str) -> ConfigError:
    return ConfigError(
        "the tiles of a picture are not laid out as the model reads them",
        got=grid,
        allowed=layout,
        remedy="build the data with the model's own dialogue",
    )
