"""QuantizationConfig: which matrices of a model become packed rows, and in which format each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from cats_ext.rows import FORMATS, RowFormat
from cats_ext.rows.formats import GROUP_SIZES, STORED

SCOPES = ("mlp", "all")
HEAD = "int8"  # of the output layer, whose errors are those of the predictions
DOWN = {"int4": "int8"}  # of the down projection by default, by what the others are: int4 hurts it most


@dataclass(frozen=True)
class QuantizationConfig:
    """Arguments of :func:`cats_ext.quantize`, which documents them; they are checked when it is made.

    With ``from_pretrained(..., quantization_config=QuantizationConfig())`` transformers loads a dense checkpoint
    quantised.

    Raises:
        ValueError: an argument is out of its range.
    """

    quant_method: ClassVar[str] = "cats"  # how transformers finds the quantizer

    weights: str = "int4"
    group_size: int | None = None
    zero_points: bool = True
    gate: str | None = None
    up: str | None = None
    down: str | None = None
    scope: str = "mlp"

    def __post_init__(self) -> None:
        for name in ("weights", "gate", "up", "down"):
            value = getattr(self, name)
            if value not in (*STORED, *FORMATS) and (value is not None or name == "weights"):
                raise ValueError(
                    f"{name} must be one of {', '.join(STORED)}, or a format such as int4_g64_zp, got {value!r:.50}"
                )
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size not in GROUP_SIZES):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"group_size must be one of {sizes}, or None, got {self.group_size!r:.50}")
        if not isinstance(self.zero_points, bool):
            raise ValueError(f"zero_points must be True or False, got {self.zero_points!r:.50}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r:.50}")

    def format_of(self, matrix: str, columns: int) -> RowFormat:
        """The format of a matrix with rows of so many columns.

        Args:
            matrix: gate, up, down, head (the output layer), or any other name.

        Raises:
            ValueError: groups do not divide the columns.
        """
        given = getattr(self, matrix) if matrix in ("gate", "up", "down") else HEAD if matrix == "head" else None
        if matrix == "down" and given is None:
            given = DOWN.get(self.weights)
        given = given or self.weights
        if given in FORMATS:
            made = FORMATS[given]
        elif given == "fp8":
            made = RowFormat(given)
        else:
            sizes = (self.group_size,) if self.group_size else tuple(reversed(GROUP_SIZES))
            size = next((size for size in sizes if columns % size == 0), sizes[-1])
            made = RowFormat(given, size, given == "int4" and self.zero_points)
        try:
            made.groups(columns)
        except ValueError:
            fitting = [size for size in GROUP_SIZES if columns % size == 0]
            advice = f"take {' or '.join(map(str, fitting))}" if fitting else "take fp8, which has none"
            raise ValueError(
                f"group_size must divide its rows of {columns} columns, got {made.group_size}: {advice}"
            ) from None
        return made

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, **asdict(self)}
